"""Number formats for weights: absmax int8 and blockwise 4-bit, the layers that hold them, and training through them.

A matrix is stored as small integers ("codes") and a few scales. Every format here is the same three lines,

    s = the largest |w| of a row, or of a block of consecutive values              the scale, fp32          ("absmax")
    c = the number of the level l_c nearest to w / s                               the code, a few bits
    w ~ l_c s                                                                      what is computed with

and formats differ only in their table of levels in [-1, 1] and in how many values share a scale. The error of a value is
at most s times half the widest gap between two levels, so one large value spoils all that share its scale: short blocks
are more exact, but each block costs 32 bits of scale.

A row of eight numbers in NF4, by hand (one block; the table is in `normal_float`):

    w             0.5     -1.0      0.1      0.75    -0.3      0.0      2.0     -0.05        s = 2.0
    w / s         0.25    -0.5      0.05     0.375   -0.15     0.0      1.0     -0.025
    nearest       0.2461  -0.5251   0.0796   0.3379  -0.1848   0.0      1.0      0.0
    code          10       2        8        11       5        7        15       7
    two a byte       0xA2              0x8B              0x57              0xF7              first code in the high half
    w ~           0.4922  -1.0501   0.1592   0.6758  -0.3695   0.0      2.0      0.0

32 bytes of fp32 became 4 bytes of codes and 4 of scale. With blocks of 64 it is 4.5 bits a weight; "nf4-double" rounds the
scales too and needs 4.127.

Papers: LLM.int8() (Dettmers et al. 2022), QLoRA (Dettmers et al. 2023: NF4, double quantization), 8-bit Approximations for
Parallelism in Deep Learning (Dettmers 2016: the dynamic map). Codes, scales and names on disk are those of bitsandbytes.
Nothing here knows of Phi: everything works on any nn.Linear. The same arithmetic made fast is in quant_kernels.py.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import quant_kernels
from quant_kernels import nearest, pack
from runtime.files import InputError

SKIP = ("lm_head",)  # layers that stay as they are unless asked: errors of the output layer are errors of the logits


@dataclass(frozen=True)
class Format:
    code: str  # whose table of levels; "int8": rows of int8 with a scale each
    double: bool = False  # blockwise codes: quantize the scales too
    threshold: float | None = None  # int8: round activations too, except outliers from here on; None: only the weights


FORMATS = {
    "int8": Format("int8"),
    "llm.int8": Format("int8", threshold=6.0),
    "nf4": Format("nf4"),
    "nf4-double": Format("nf4", double=True),
    "fp4": Format("fp4"),
    "int4": Format("int4"),
    "nf2": Format("nf2"),
}


def normal_float(bits: int) -> Tensor:
    """The levels of NF2 and NF4 (QLoRA, section 3): quantiles of N(0, 1), so that all codes would be used equally often if
    all weights shared one scale fitted to their spread. Ascending, fp32 [2^bits], with an exact 0 and both ends.

        l = q(p) / q(p_max),   q the quantiles of N(0, 1),   p_max = 1 - (1/(2^bits - 1) + 1/2^bits) / 4

    The positive side has 2^(bits-1) values of p, evenly spaced from p_max down towards 1/2; the negative side has one fewer,
    mirrored; and there is 0.

    For NF4 p_max = 0.9677083 and the levels are -1, -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0, .0796, .1609, .2461,
    .3379, .4407, .5626, .7230, 1: equal to bitsandbytes' table in every bit, because its p is in fp32 too.
    """
    count = 2 ** (bits - 1)
    p_max = round(1 - (1 / (2**bits - 1) + 1 / 2**bits) / 4, 7)

    def quantiles(n: int) -> Tensor:  # q(p) = sqrt(2) erfinv(2p - 1)
        p = torch.linspace(p_max, 0.5, n + 1)[:-1].double()
        return math.sqrt(2) * torch.erfinv(2 * p - 1)

    table = torch.cat((-quantiles(count - 1), torch.zeros(1).double(), quantiles(count).flip(0))).float()
    return table / table.max()


def float_e2m1() -> Tensor:
    """FP4: a sign bit, two exponent bits, one mantissa bit, in bitsandbytes' order of codes; code 8 is -0. fp32 [16]."""
    magnitude = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat((magnitude, -magnitude))


def integers(bits: int) -> Tensor:
    """Evenly spaced levels k / (2^(bits-1) - 1), symmetric about 0: for 4 bits k = -7 .. 7, and the last code is spare."""
    most = 2 ** (bits - 1) - 1
    return (torch.arange(-most, most + 2) / most).clamp(max=1)


def dynamic_map(signed: bool = True) -> Tensor:
    """The dynamic 8-bit map (Dettmers 2016): seven decades, 10^-6 .. 1, each with twice the levels of the one below, so that
    small values keep their relative precision. Ascending, fp32 [256], with 0 and 1. Unsigned, for values that are never
    negative: each decade has twice as many levels, 2 .. 128, and none is below 0."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        centres = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += centres + [-x for x in centres if signed]
    return torch.tensor(sorted(values))


TABLES = {  # code: the function that makes its levels, and its bits
    "nf4": (lambda: normal_float(4), 4),
    "fp4": (float_e2m1, 4),
    "int4": (lambda: integers(4), 4),
    "nf2": (lambda: normal_float(2), 2),
    "dynamic8": (dynamic_map, 8),  # not for weights: for the scales of double quantization, and 8-bit AdamW's first moment
    "dynamic8-unsigned": (lambda: dynamic_map(signed=False), 8),  # and its second
}
CODES = ("nf4", "fp4", "int4", "nf2")  # for weights


@functools.cache
def levels(code: str, device: torch.device | str = "cpu") -> Tensor:
    """The table of a code on a device: fp32 [2^bits], the level of code c at index c."""
    make, _ = TABLES[code]
    return make().to(device)


def bits(code: str) -> int:  # of one code
    return TABLES[code][1]


@functools.cache
def midpoints(code: str, device: torch.device | str = "cpu") -> Tensor:
    """The points halfway between neighbouring levels, fp32 [2^bits - 1]: the level nearest to x is the one with as many
    levels below it as x has midpoints. In "dynamic8-unsigned" the code of 0 is for 0 alone; the next level is 3.25e-7."""
    ascending = levels(code, device).sort().values
    middle = (ascending[1:] + ascending[:-1]) / 2
    if code == "dynamic8-unsigned":
        middle[0] = 0
    return middle


def quantize_int8(w: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """Symmetric absmax int8:  s = max |w| of a row,  c = round(127 w / s)  in -127 .. 127  (LLM.int8(), eq. 1).

    w [O, I] of any floating-point dtype -> codes int8 [O, I] and scale s fp32 [O], one for each output feature.
    InputError if w is not finite; without `check` such rows decode to NaN.

    Error: |w - w~| <= s / 254, half a step, for s >= 1e-36; smaller rows get the codes of s = 1e-36, as 127 / s would be
    infinite in fp32. Errors are uniform within a step s / 127, so for w ~ N(0, 1) their relative RMSE is about
    sqrt(E[s^2]) / 127 / sqrt(12). Rows of 2,560 have sqrt(E[s^2]) = 3.70: .0084.
    """
    w = w.detach()
    scale = w.abs().amax(dim=1).float()
    if check:
        _check_finite(scale)
    factor = 127.0 / scale.clamp(min=1e-36)  # a row of zeros has codes 0; infinity times 0 would be NaN
    return torch.round(w * factor[:, None]).to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """w~ = (c / 127) s:  codes int8 [O, I], scale fp32 [O] -> fp32 [O, I]. Dividing first gives the largest |w| back
    exactly, so quantizing w~ changes nothing."""
    return codes.float() / 127.0 * scale[:, None]


NOT_FINITE = "contains NaN or infinity and cannot be quantized; is the checkpoint damaged?"


def _check_finite(scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise InputError(NOT_FINITE)


def llm_int8(x: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """x W^T with int8 weights *and* activations (LLM.int8(), section 3):

        x_low  = x without its outliers, each row (token) scaled by its own absmax to int8
        x_high = the features that have an outlier, |x| >= threshold (6.0 in the paper), in any row, as they are
        y      = s_x s_w / 127^2 (c_x C_w^T)  +  x_high W~^T                the integer product is exact

    As in bitsandbytes, a token shares the outlier features of the others, and s_x leaves out only the token's own.
    x [..., I], codes int8 [O, I], scale fp32 [O] -> [..., O] in x's dtype. InputError if x is not finite.
    """
    shape = x.shape
    x = x.reshape(-1, shape[-1])  # [N, I]
    outlier = x.abs() >= threshold  # [N, I]
    high = outlier.any(dim=0)  # [I]
    x_codes, x_scale = quantize_int8(x.masked_fill(outlier, 0))  # [N, I], [N]
    product = quant_kernels.int32_product(x_codes.masked_fill(high, 0), codes)  # [N, O]
    y = product.float() * (x_scale[:, None] * scale) * (1 / 127**2)
    y += x[:, high].float() @ dequantize_int8(codes[:, high], scale).T
    return y.to(x.dtype).view(*shape[:-1], -1)


@dataclass
class Quantized:
    """A tensor in blocks of codes."""

    packed: Tensor  # uint8 [bytes, 1]
    absmax: Tensor  # the scale of each block, fp32 [blocks]; with double quantization its code, uint8 [blocks]
    code: str
    block: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the tensor that was quantized
    nested_absmax: Tensor | None = None  # double: scales of the scales, fp32 [blocks / 256]
    offset: Tensor | None = None  # double: mean of the scales, fp32 []


def quantize_blockwise(w: Tensor, code: str = "nf4", block: int = 64, double: bool = False, check: bool = True) -> Quantized:
    """Blocks of `block` consecutive values of the flattened w, each with its own scale (QLoRA, eq. 1):

        s_b = max |w| over the block,      c = the code of the level nearest to w / s_b

    w of any shape and floating-point dtype; the last block may be short. `double` quantizes the scales too: their mean is
    subtracted and the rest stored in 8 bits with the dynamic map, in blocks of 256. 32 bits a block become 8 + 32/256.
    InputError if w is empty or not finite (without `check`: such blocks decode to NaN or infinity); ValueError if there is
    no such code or block.

    Error: |w - w~| <= s_b g / 2, where g is the widest gap between levels: .304 for NF4, 1/3 for FP4, 1/7 for int4, 1 for
    NF2; double quantization adds its own error of s_b. For w ~ N(0, 1), block 64, sqrt(E[s^2]) = 2.63, and evenly spaced
    levels err uniformly within a step: int4's relative RMSE is 2.63 / 7 / sqrt(12) = .108. Summed over the unequal gaps of
    NF4 and FP4, weighted by the normal density: .092 and .122. NF4 is best where most values lie, FP4 near 0.

    Equal bit for bit to bitsandbytes' CUDA kernels, where w / s is w times 1 / s. (Its CPU code divides in a last, short
    block, and gives a short block of zeros the scale 1e-38, not 0.)
    """
    if code not in TABLES or block < 1:
        raise ValueError(f"code {code!r}, block {block}: codes are {', '.join(CODES)}, and a block has at least one value")
    if w.numel() == 0:
        raise InputError("is empty and cannot be quantized")
    flat = w.detach().flatten()
    rows = F.pad(flat, (0, -len(flat) % block)).view(-1, block)  # [blocks, block]; zeros do not change the largest |w|
    parts = rows.split(max(1, quant_kernels.chunk(w.device) // block))
    codes, absmax = map(torch.cat, zip(*(encode_blocks(part.float(), code) for part in parts)))
    if check:
        _check_finite(absmax)
    code_of_zero = int(levels(code).abs().argmin())
    packed = pack(codes.flatten()[: len(flat)], bits(code), fill=code_of_zero)[:, None]
    q = Quantized(packed, absmax, code, block, tuple(w.shape), w.dtype)
    if double:
        q.offset = absmax.mean()
        scales = quantize_blockwise(absmax - q.offset, "dynamic8", block=256, check=check)
        q.absmax = scales.packed[:, 0]
        q.nested_absmax = scales.absmax
    return q


def encode_blocks(rows: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """rows fp32 [blocks, block] -> codes uint8 [blocks, block], absmax fp32 [blocks]."""
    absmax = rows.abs().amax(dim=1)
    scaled = (rows * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)  # a block of zeros stays zeros
    codes = nearest(scaled, midpoints(code, rows.device))
    if code == "fp4":  # its levels do not ascend
        codes = levels(code, rows.device).argsort(stable=True).to(torch.uint8)[codes.int()]
    return codes, absmax


def quantize_4bit(w: Tensor, code: str = "nf4", block: int = 64, double: bool = False) -> Quantized:
    """`quantize_blockwise` with two codes to a byte: nf4, fp4 or int4; ValueError for another code."""
    if code not in ("nf4", "fp4", "int4"):
        raise ValueError(f"{code!r} is not a 4-bit code; there are nf4, fp4 and int4")
    return quantize_blockwise(w, code, block, double)


def scales(q: Quantized) -> Tensor:
    """The scale of each block, fp32 [blocks]; with double quantization  s = l_c s' + mean."""
    if q.nested_absmax is None:
        return q.absmax
    table = levels("dynamic8", q.absmax.device)
    return quant_kernels.decode(q.absmax, table, q.nested_absmax, 256, len(q.absmax)) + q.offset


def dequantize(q: Quantized) -> Tensor:
    """w~ = l_c s_b, in the shape and dtype of the tensor that was quantized; the products are fp32, rounded at the end."""
    table = levels(q.code, q.packed.device)
    flat = quant_kernels.decode(q.packed, table, scales(q), q.block, math.prod(q.shape))
    return flat.view(q.shape).to(q.dtype)


def round_to(w: Tensor, to: str = "nf4", block: int = 64, check: bool = True) -> Tensor:
    """w~: a matrix [O, I] quantized to one of FORMATS and back, in w's dtype. `block` does nothing in int8 and llm.int8.
    InputError if w is not finite, unless `check` is False. Rounding w~ again changes nothing, except in nf4-double, where
    the rounded scales have another mean."""
    form = FORMATS[to]
    if form.code == "int8":
        return dequantize_int8(*quantize_int8(w, check)).to(w.dtype)
    return dequantize(quantize_blockwise(w, form.code, block, form.double, check))


class FakeQuantize(torch.autograd.Function):
    """`round_to` with the gradient d w~ / d w = 1, as if nothing had been rounded (Bengio et al. 2013, straight-through),
    since the true derivative of rounding is 0 nearly everywhere and nothing would be learned. The weights that an optimizer
    moves stay unrounded: small steps add up until a code changes."""

    @staticmethod
    def forward(ctx, w: Tensor, to: str, block: int) -> Tensor:
        return round_to(w, to, block, check=False)  # a GPU would wait for each check; and training checks its loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None


def fake_quantize(w: Tensor, to: str = "nf4", block: int = 64) -> Tensor:
    """w~ of `round_to`, with the straight-through gradient."""
    return FakeQuantize.apply(w, to, block)


class FakeQuantLinear(nn.Linear):
    """y = x W~^T + b, with W~ rounded anew from the trained W in every forward pass. Activations are not rounded. A linear
    layer becomes one in place (`train_quantized`), since what shards a model keeps hold of its layers."""

    rounding: tuple[str, int]  # a format and its block

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        return F.linear(x, fake_quantize(self.weight, *self.rounding), self.bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _FrozenProduct(torch.autograd.Function):
    """y = x W~^T for a layer with frozen quantized weights. The backward pass, dx = dy W~, decodes W~ again: only the
    codes are kept between the two (QLoRA, section 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "FrozenLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.dense().to(grad.dtype), None


class FrozenLinear(nn.Module):
    """y = x W~^T + b in the input's dtype, with a gradient for x and b but none for W. The scales stay fp32 whatever dtype
    the model is moved to.

    Subclasses have `dense()`, W~ [O, I]; `product(x)`, without all of W~ in memory; and `with_weight(w)`, a layer of the
    same format and bias for another matrix.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def product(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        return F.linear(x, self.dense().to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        x = x.to(compute_dtype(x))
        y = _FrozenProduct.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)
        # A copy even without a bias: adapters add to y in place, which autograd forbids on the output of a Function.
        return y.clone() if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.format}"


class Int8Linear(FrozenLinear):
    """A linear layer with codes int8 [O, I] and scale fp32 [O] of `quantize_int8`. With a threshold: LLM.int8()."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float | None = None):
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.threshold = threshold
        self.format = "int8" if threshold is None else f"llm.int8, threshold={threshold}"
        self.register_buffer("weight", codes)
        self.register_buffer("SCB", scale)  # bitsandbytes' name on disk

    def dense(self) -> Tensor:
        return dequantize_int8(self.weight, self.SCB)

    def product(self, x: Tensor) -> Tensor:
        if self.threshold is not None:
            return llm_int8(x, self.weight, self.SCB, self.threshold)
        y = quant_kernels.int8_product(x.reshape(-1, self.in_features), self.weight, self.SCB)
        return y.view(*x.shape[:-1], -1)

    def with_weight(self, weight: Tensor) -> FrozenLinear:
        return Int8Linear(*quantize_int8(weight), self.bias, self.threshold)


class Linear4bit(FrozenLinear):
    """A linear layer of an [O, I] matrix in a blockwise code. It is named after the usual case, but holds NF2 as well."""

    def __init__(self, q: Quantized, bias: Tensor | None):
        super().__init__(q.shape[1], q.shape[0], bias)
        self.form = {"code": q.code, "block": q.block, "shape": q.shape, "dtype": q.dtype}
        self.format = f"{q.code}, block={q.block}" + (", double" if q.nested_absmax is not None else "")
        self.register_buffer("weight", q.packed)
        for name in ("absmax", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(q, name))

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.weight, self.absmax, **self.form, nested_absmax=self.nested_absmax, offset=self.offset)

    def dense(self) -> Tensor:
        return dequantize(self.quantized)

    def product(self, x: Tensor) -> Tensor:
        q = self.quantized
        rows = x.reshape(-1, self.in_features)
        y = quant_kernels.blockwise_product(rows, q.packed, levels(q.code, x.device), scales(q), q.block)
        return y.view(*x.shape[:-1], -1)

    def with_weight(self, weight: Tensor) -> FrozenLinear:
        q = self.quantized
        return Linear4bit(quantize_blockwise(weight.to(q.dtype), q.code, q.block, q.nested_absmax is not None), self.bias)


def quantize_layer(
    weight: Tensor, bias: Tensor | None, to: str = "nf4", block: int = 64, where: str = "the matrix"
) -> FrozenLinear:
    """The layer x -> x W~^T + b of a matrix [O, I] and its bias [O] in one of FORMATS. `block` does nothing in int8 and
    llm.int8. InputError, which begins with `where`, if the matrix is not finite."""
    form = FORMATS[to]
    try:
        if form.code == "int8":
            return Int8Linear(*quantize_int8(weight), bias, form.threshold)
        return Linear4bit(quantize_blockwise(weight, form.code, block, form.double), bias)
    except InputError as error:
        raise InputError(f"{where} {error}") from None


def linear_layers(model: nn.Module, skip: tuple[str, ...] = SKIP) -> list[tuple[str, nn.Linear]]:
    """(name, layer) of every nn.Linear of a model whose last part of the name is not in `skip`."""
    layers = model.named_modules()
    return [(n, layer) for n, layer in layers if isinstance(layer, nn.Linear) and n.rpartition(".")[2] not in skip]


@torch.no_grad()
def quantize_model(model: nn.Module, to: str = "nf4", *, block: int = 64, skip: tuple[str, ...] = SKIP) -> nn.Module:
    """Replaces every nn.Linear of a model but `skip`, in place, by its `quantize_layer`; returns the model. InputError names
    a layer that is not finite."""
    for name, layer in linear_layers(model, skip):
        model.set_submodule(name, quantize_layer(layer.weight, layer.bias, to, block, f"{name}.weight"))
    return model


def train_quantized(model: nn.Module, to: str = "nf4", block: int = 64, *, skip: tuple[str, ...] = SKIP) -> nn.Module:
    """Makes every nn.Linear of a model but `skip` a FakeQuantLinear, in place; parameters and their names stay the same.
    InputError names a layer that is not finite."""
    for name, layer in linear_layers(model, skip):
        if not layer.weight.isfinite().all():
            raise InputError(f"{name}.weight {NOT_FINITE}")
        layer.__class__, layer.rounding = FakeQuantLinear, (to, block)
    return model
