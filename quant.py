"""Number formats for weights: absmax int8 and blockwise 4-bit, the layers that hold them, and training through them.

A matrix is stored as small integers ("codes") and a few scales. Every format here is the same three lines,

    s = the largest |w| of a row, or of a block of consecutive values              the scale, fp32          ("absmax")
    c = the number of the level l_c nearest to w / s                               the code, a few bits
    w ~ l_c s                                                                      what is computed with

and formats differ only in their table of levels in [-1, 1] and in how many values share a scale. The error of a value is
at most s times half the widest gap between two levels, so one large value spoils all that share its scale: short blocks
are more exact, and cost 32 bits of scale each.

A row of eight numbers in NF4, by hand (one block; the table is in `normal_float`):

    w             0.5     -1.0      0.1      0.75    -0.3      0.0      2.0     -0.05        s = 2.0
    w / s         0.25    -0.5      0.05     0.375   -0.15     0.0      1.0     -0.025
    nearest       0.2461  -0.5251   0.0796   0.3379  -0.1848   0.0      1.0      0.0
    code          10       2        8        11       5        7        15       7
    two a byte       0xA2              0x8B              0x57              0xF7              first code in the high half
    w ~           0.4922  -1.0501   0.1592   0.6758  -0.3695   0.0      2.0      0.0

32 bytes of fp32 became 4 bytes of codes and 4 of scale; with blocks of 64, 4.5 bits a weight.

Papers: LLM.int8() (Dettmers et al. 2022), QLoRA (Dettmers et al. 2023: NF4, double quantization), 8-bit Approximations for
Parallelism in Deep Learning (Dettmers 2016: the dynamic map). Codes, scales and names on disk are those of bitsandbytes.
Nothing here knows of Phi: it works on any nn.Linear.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from levels import CODES, bits, levels, pack, unpack
from runtime.files import InputError

FORMATS = ("int8", *CODES)  # what `--to` and `quantize_model` take
SKIP = ("lm_head",)  # layers that stay as they are unless asked: the output layer's errors would be errors of the logits
CHUNK = 2**20  # values worked on at a time: 4 MB of fp32, which stay in the cache


# --------------------------------------------------------------------------------------------------------- absmax int8


def quantize_int8(w: Tensor, per: str = "row") -> tuple[Tensor, Tensor]:
    """Symmetric absmax int8:  s = max |w|,  c = round(127 w / s)  in -127 .. 127  (LLM.int8(), Dettmers et al. 2022, eq. 1).

    w [O, I] of any floating-point dtype -> codes int8 [O, I] and scale s fp32: [O] per "row" (one output feature),
    [I] per "column", [] per "tensor". InputError if w is not finite.

    Error: |w - w~| <= s / 254, half a step, for s >= 1e-36. Where all of a row is smaller, its codes are those of
    s = 1e-36, because 127 / s would be infinite in fp32: w~ is too small then.

    The errors are uniform within a step s / 127, so for w ~ N(0, 1) their relative RMSE is about
    sqrt(E[s^2]) / 127 / sqrt(12). Rows of 2,560 have sqrt(E[s^2]) = 3.69: .0084.
    """
    w, dim = w.detach(), {"row": 1, "column": 0, "tensor": (0, 1)}[per]
    scale = w.abs().amax(dim).float()
    _check_finite(scale)
    # A row of zeros has codes 0. The smallest scale is 1e-36 and not 1e-38, as fp32 ends at 3.4e38: 127 / 1e-38 is infinite,
    # and infinity times 0 is NaN.
    factor = 127.0 / scale.clamp(min=1e-36)
    return torch.round(w * _along(factor, per)).to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor, per: str = "row") -> Tensor:
    """w~ = (c / 127) s, fp32 [O, I]. Divided first, so that the largest |w| comes back exactly: quantizing once more then
    changes nothing."""
    return codes.float() / 127.0 * _along(scale, per)


def _along(scale: Tensor, per: str) -> Tensor:
    """[O, 1], [I] or [1], to be multiplied with [O, I]. (A factor without a dimension would be rounded to w's dtype.)"""
    return scale[:, None] if per == "row" else scale.view(-1)


def _check_finite(scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise InputError("holds NaN or infinity, which no scale can stretch over; is the checkpoint damaged?")


def llm_int8(x: Tensor, codes: Tensor, scale: Tensor, threshold: float, outliers: str = "batch") -> Tensor:
    """x W^T with int8 weights *and* activations (LLM.int8(), Dettmers et al. 2022, section 3):

        x_low  = x without its outliers, each row (token) scaled by its own absmax to int8
        x_high = the outliers, |x| >= threshold (6.0 in the paper): a few features with huge values, kept as they are
        y      = s_x s_w / 127^2 (c_x C_w^T)  +  x_high W~^T                the integer product is exact

    outliers "batch": a feature with an outlier anywhere in the batch is x_high for all its tokens, as in bitsandbytes; a
    token's result then depends on its neighbours. "token": each token's own outliers only.

    x [..., I], codes int8 [O, I], scale fp32 [O] -> [..., O] in x's dtype. As in bitsandbytes, s_x leaves out only the
    token's own outliers.
    """
    shape, x = x.shape, x.reshape(-1, x.shape[-1])  # [N, I]
    high = x.abs() >= threshold  # [N, I]
    x_low = x.masked_fill(high, 0)
    x_codes, x_scale = quantize_int8(x_low)  # [N, I], [N]
    if outliers == "batch":
        high = high.any(dim=0).expand_as(x)
        x_codes = x_codes.masked_fill(high, 0)
    product = _int8_product(x_codes, codes).float()  # [N, O]
    y = product * (x_scale[:, None] * scale) * (1 / 127**2)
    columns = high.any(dim=0).nonzero()[:, 0]
    if len(columns):
        x_high = x.where(high, 0)[:, columns]  # [N, outlier features]
        y += x_high.float() @ dequantize_int8(codes[:, columns], scale).T
    return y.to(x.dtype).view(*shape[:-1], -1)


def _int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in int32, exact: a [N, I] and b [O, I] int8."""
    return _padded_int8_product(a, b) if a.is_cuda else torch._int_mm(a, b.T)


def _padded_int8_product(a: Tensor, b: Tensor) -> Tensor:
    """The same for cuBLAS, which takes at least 17 rows and sizes that are multiples of 8; zeros change no sum."""
    rows, columns = len(a), len(b)
    if rows < 17 or a.shape[1] % 8:
        a = F.pad(a, (0, -a.shape[1] % 8, 0, max(0, 17 - rows)))
    if columns % 8 or b.shape[1] % 8:
        b = F.pad(b, (0, -b.shape[1] % 8, 0, -columns % 8))
    return torch._int_mm(a, b.T)[:rows, :columns]


# ------------------------------------------------------------------------------------------------------------ blockwise


@dataclass
class Quantized:
    """A tensor in blocks of codes. `absmax` is fp32 [blocks]; with double quantization uint8 [blocks], see `scales`."""

    packed: Tensor  # uint8 [bytes, 1]
    absmax: Tensor
    code: str
    block: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the tensor that was quantized
    low: Tensor | None = None  # int4-asym: smallest value of each block, fp32 [blocks]; absmax is then the largest
    nested_absmax: Tensor | None = None  # double: scales of the scales, fp32 [blocks / 256]
    offset: Tensor | None = None  # double: mean of the scales, fp32 []

    @property
    def nbytes(self) -> int:
        parts = (self.packed, self.absmax, self.low, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def quantize_blockwise(w: Tensor, code: str, block: int = 64, double: bool = False, compiled: bool = False) -> Quantized:
    """Blocks of `block` consecutive values of the flattened w, each with its own scale (QLoRA, eq. 1):

        s_b = max |w| over the block,      c = #{ midpoints between neighbouring levels below w / s_b }
        int4-asym: low_b = min w, high_b = max w, and (w - low_b) / (high_b - low_b) instead of w / s_b

    w of any shape and floating-point dtype; the last block may be short. `double` quantizes the scales too: their mean is
    subtracted and the rest stored in 8 bits with the dynamic map, in blocks of 256; 32 bits a block become 8 + 32/256.
    `compiled`: torch.compile's fused kernel, the same codes. InputError if w is empty or not finite.

    Error: |w - w~| <= s_b g / 2, where g is the widest gap between levels: .304 for NF4, 1/3 for FP4, 1/7 for int4; for
    int4-asym (high_b - low_b) / 30; double quantization adds its own error of s_b. For w ~ N(0, 1), block 64, the relative
    RMSE follows from sqrt(E[s^2]) = 2.62. Evenly spaced levels err uniformly within a step: int4 2.62 / 7 / sqrt(12) = .108,
    and int4-asym with sqrt(E[(high - low)^2]) = 4.73, 4.73 / 15 / sqrt(12) = .091. For NF4 and FP4 the same sum runs over
    their unequal gaps, weighted by the normal density: .092 and .122. NF4 is best where most values lie, FP4 near 0.

    Equal to bitsandbytes bit for bit; its CUDA kernels are the model: w / s is w times 1 / s there. (Its CPU code divides
    in a last, short block, and writes 1e-38 as the scale of a short block of zeros, where CUDA and this write 0.)
    """
    if code not in CODES:
        raise InputError(f"no code {code!r}; there are {', '.join(CODES)}")
    if block < 1 or w.numel() == 0:
        raise InputError(f"a tensor of {w.numel()} values cannot be cut into blocks of {block}")
    if double and code == "int4-asym":
        raise InputError("int4-asym has two scales a block; double quantization is for the symmetric codes")
    flat = w.detach().flatten()
    rows = F.pad(flat, (0, -len(flat) % block), value=0.0).view(-1, block)  # zeros do not change the largest |w|
    if code == "int4-asym" and len(flat) % block:
        rows[-1, len(flat) % block :] = flat[-1]  # but they do change the smallest w
    if compiled and bits(code) <= 4:
        midpoints, order = _midpoints(code, rows.device)
        codes, absmax, low = _encode_compiled()(rows, code, tuple(midpoints.tolist()), order)
    else:
        codes, absmax, low = _encode(rows, code)
    _check_finite(absmax if low is None else absmax - low)
    zero = 0 if code == "int4-asym" else int((levels(code) == 0).nonzero()[0])
    packed = pack(codes.flatten()[: len(flat)], bits(code), fill=zero)[:, None]
    q = Quantized(packed, absmax, code, block, tuple(w.shape), w.dtype, low)
    if double:
        q.offset = absmax.mean()
        scales = quantize_blockwise(absmax - q.offset, "dynamic8", block=256)
        q.absmax, q.nested_absmax = scales.packed[:, 0], scales.absmax
    return q


def _encode(rows: Tensor, code: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """rows [blocks, block] -> codes uint8 [blocks, block], absmax fp32 [blocks], low fp32 [blocks] or None."""
    midpoints, order = _midpoints(code, rows.device)
    parts = []
    for part in rows.split(max(1, CHUNK // rows.shape[1])):
        scaled, absmax, low = _scale(part.float(), code)
        place = torch.bucketize(scaled, midpoints, out_int32=True)  # how many midpoints lie below: the nearest level
        parts.append(((order[place] if code == "fp4" else place).to(torch.uint8), absmax, low))
    codes, absmax, low = zip(*parts)
    return torch.cat(codes), torch.cat(absmax), None if low[0] is None else torch.cat(low)


def _midpoints(code: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The points halfway between neighbouring levels, and the codes in order of their levels (FP4's are not in order)."""
    ascending, order = levels(code, device).sort(stable=True)
    return (ascending[1:] + ascending[:-1]) / 2, order


@functools.cache
def _encode_compiled():
    """`_encode` as one kernel: with few levels, counting the midpoints below each value beats searching for its place."""

    def encode(rows: Tensor, code: str, midpoints: tuple[float, ...], order: Tensor):
        scaled, absmax, low = _scale(rows.float(), code)
        place = torch.zeros(rows.shape, dtype=torch.int32, device=rows.device)
        for midpoint in midpoints:
            place = place + (scaled > midpoint).to(torch.int32)
        return (order[place] if code == "fp4" else place).to(torch.uint8), absmax, low

    return torch.compile(encode, dynamic=True)


def _scale(rows: Tensor, code: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """rows fp32 [blocks, block] -> the same within [-1, 1] (int4-asym: [0, 1]), absmax [blocks], low [blocks] or None."""
    if code == "int4-asym":
        low, high = rows.aminmax(dim=1)
        return (rows - low[:, None]) * (1 / (high - low).clamp(min=1e-38))[:, None], high, low
    absmax = rows.abs().amax(dim=1)
    return (rows * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1), absmax, None  # a block of zeros stays zeros


def quantize_4bit(w: Tensor, code: str = "nf4", block: int = 64, double: bool = False, compiled: bool = False) -> Quantized:
    """`quantize_blockwise` to one of the 4-bit codes: nf4, fp4, int4, int4-asym."""
    if code not in CODES or bits(code) != 4:
        raise InputError(f"{code!r} is not a 4-bit code; there are nf4, fp4, int4 and int4-asym")
    return quantize_blockwise(w, code, block, double, compiled)


def scales(q: Quantized) -> Tensor:
    """The scale of each block, fp32 [blocks]; with double quantization  s = l_c s' + mean."""
    if q.nested_absmax is None:
        return q.absmax
    absmax = Quantized(q.absmax[:, None], q.nested_absmax, "dynamic8", 256, tuple(q.absmax.shape), torch.float32)
    return dequantize(absmax) + q.offset


def dequantize(q: Quantized) -> Tensor:
    """w~ = l_c s_b, in the shape and dtype of the tensor that was quantized; the products are fp32, rounded at the end."""
    n = math.prod(q.shape)
    values = F.pad(_decode(q.packed, q.code)[:n], (0, -n % q.block)).view(-1, q.block)  # [blocks, block]
    return _rescale(values, scales(q), q.low).flatten()[:n].view(q.shape).to(q.dtype)


def _decode(packed: Tensor, code: str, out: Tensor | None = None) -> Tensor:
    """Bytes -> the levels of their codes, fp32 [values]; into `out` if it is given."""
    if bits(code) != 4:
        return torch.index_select(levels(code, packed.device), 0, unpack(packed, bits(code)), out=out)
    out = None if out is None else out.view(torch.int64)
    return torch.index_select(_pairs(code, packed.device), 0, packed.flatten().int(), out=out).view(torch.float32)


@functools.cache
def _pairs(code: str, device: torch.device) -> Tensor:
    """The two levels of each of the 256 bytes, as one 8-byte number [256]: half the lookups, three times as fast."""
    table = levels(code, device)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.int64)[:, 0].contiguous()


def _rescale(values: Tensor, absmax: Tensor, low: Tensor | None) -> Tensor:
    """Levels [blocks, block] -> values, in place."""
    if low is None:
        return values.mul_(absmax[:, None])
    # lerp is exact at both ends, so that quantizing once more changes nothing
    return torch.lerp(low[:, None], absmax[:, None], values, out=values)


# ------------------------------------------------------------------------------------------- quantization-aware training


class _StraightThrough(torch.autograd.Function):
    """Forward w~, backward as if nothing had been rounded: d w~ / d w = 1 (Bengio et al. 2013, straight-through)."""

    @staticmethod
    def forward(ctx, w: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def round_to(w: Tensor, to: str, block: int = 64, double: bool = False, per: str = "row", compiled: bool = False) -> Tensor:
    """w~: quantized to a format and back, in w's shape and dtype. `per` is for int8, `block` and `double` for the others."""
    if to == "int8":
        return dequantize_int8(*quantize_int8(w, per), per).to(w.dtype)
    return dequantize(quantize_blockwise(w, to, block, double, compiled))


def fake_quantize(
    w: Tensor, to: str = "nf4", block: int = 64, double: bool = False, per: str = "row", compiled: bool = False
) -> Tensor:
    """w~ with a gradient: bit-equal to `dequantize` of `quantize`, and d w~ / d w = 1, since the true derivative of
    rounding is 0 nearly everywhere and nothing would be learned. The weights that an optimizer moves stay unrounded; they
    gather small steps until a code flips."""
    return _StraightThrough.apply(w, round_to(w.detach(), to, block, double, per, compiled))


class FakeQuantLinear(nn.Linear):
    """y = x W~^T + b, with W~ rounded anew from the trained W in every forward pass."""

    def __init__(self, layer: nn.Linear, to: str, block: int, compiled: bool):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.format, self.block, self.compiled = to, block, compiled

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        return F.linear(x, fake_quantize(self.weight, self.format, self.block, compiled=self.compiled), self.bias)


def train_quantized(
    model: nn.Module, to: str, block: int = 64, compiled: bool = False, skip: tuple[str, ...] = SKIP
) -> nn.Module:
    """Makes every nn.Linear of a model but `skip` a FakeQuantLinear, in place; parameters and their names stay the same."""
    for name, layer in linear_layers(model, skip):
        model.set_submodule(name, FakeQuantLinear(layer, to, block, compiled))
    return model


# -------------------------------------------------------------------------------------------------------------- layers


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of x run in: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _FrozenProduct(torch.autograd.Function):
    """y = forward(x) for a layer with frozen quantized weights. The backward pass, dx = dy W~, makes W~ anew, so that only
    the codes are kept between the two (QLoRA, section 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.dense().to(grad.dtype), None


class FrozenLinear(nn.Module):
    """What the two quantized layers share: y = x W~^T + b in the input's dtype, a gradient for x and b but none for W, and
    scales that stay fp32 whatever dtype the model is moved to.

    A subclass has `product(x)` and `dense()`. `kernel` is "eager", "compiled" (CPU) or "triton" (CUDA): see `use_kernels`.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features, self.kernel = in_features, out_features, "eager"
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        x = x.to(compute_dtype(x))
        y = _FrozenProduct.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.format}"


class Int8Linear(FrozenLinear):
    """A linear layer with absmax int8 rows. `threshold` None: the weights alone are rounded; a number: LLM.int8()."""

    format = "int8"

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float | None = None):
        """codes int8 [O, I], scale fp32 [O] (`quantize_int8`), bias [O] or None."""
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.threshold = threshold
        self.register_buffer("weight", codes)
        self.register_buffer("SCB", scale)  # bitsandbytes' name on disk

    def dense(self) -> Tensor:
        return dequantize_int8(self.weight, self.SCB)

    def product(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        if self.threshold is not None:
            return llm_int8(x, self.weight, self.SCB, self.threshold)
        rows = x.reshape(-1, self.in_features)  # [N, I]
        if self.kernel == "triton":
            from quant_kernels import int8_product

            y = int8_product(rows, self.weight, self.SCB)
        elif self.kernel == "compiled" and len(rows) == 1:
            y = _compiled_matvec8()(rows, self.weight, self.SCB)
        else:
            y = product_in_parts(rows, self.out_features, lambda part, out: out.copy_(self.weight[part]))
            y = (y * (self.SCB / 127.0)).to(x.dtype)
        return y.view(*x.shape[:-1], -1)


class Linear4bit(FrozenLinear):
    """A linear layer in a blockwise code; named after the usual case, but it holds 2, 3 and 8 bits too."""

    def __init__(self, q: Quantized, bias: Tensor | None):
        """q: an [O, I] matrix from `quantize_4bit` or `quantize_blockwise`; bias [O] or None."""
        super().__init__(q.shape[1], q.shape[0], bias)
        self.quantized = q

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.weight, self.absmax, *self.form, self.low, self.nested_absmax, self.offset)

    @quantized.setter
    def quantized(self, q: Quantized) -> None:
        self.form = (q.code, q.block, tuple(q.shape), q.dtype)
        self.format = f"{q.code}, block={q.block}" + (", double" if q.nested_absmax is not None else "")
        self.register_buffer("weight", q.packed)
        for name in ("absmax", "low", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(q, name))

    def dense(self) -> Tensor:
        return dequantize(self.quantized)

    def product(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        q, rows = self.quantized, x.reshape(-1, self.in_features)  # [N, I]
        table, absmax, width = levels(q.code, x.device), scales(q), bits(q.code)
        in_rows = self.in_features % q.block == 0  # no block reaches from one row of W into the next
        if self.kernel == "triton" and width == 4 and q.block % 2 == 0 and self.in_features % 2 == 0:
            from quant_kernels import blockwise_product

            y = blockwise_product(rows, q.packed, table, absmax, q.low, q.block)
        elif self.kernel == "compiled" and len(rows) == 1 and width == 4 and in_rows and q.block % 2 == 0 and q.low is None:
            y = _compiled_matvec4()(rows, q.packed, table, absmax, q.block)
        elif in_rows and self.in_features * width % 8 == 0 and not x.is_cuda:
            y = product_in_parts(rows, self.out_features, lambda part, out: _decode_rows(q, absmax, part, out))
        else:
            y = F.linear(rows, self.dense().to(x.dtype))
        return y.view(*x.shape[:-1], -1)


def _decode_rows(q: Quantized, absmax: Tensor, part: slice, out: Tensor) -> None:
    """W~ of some rows, each of whole blocks and whole bytes, into `out` fp32 [rows, I]."""
    size, blocks = out.shape[1] * bits(q.code) // 8, out.shape[1] // q.block  # of a row
    codes, part = slice(part.start * size, part.stop * size), slice(part.start * blocks, part.stop * blocks)
    _decode(q.packed[codes], q.code, out.view(-1))
    _rescale(out.view(-1, q.block), absmax[part], None if q.low is None else q.low[part])


def product_in_parts(x: Tensor, out_features: int, decode: Callable[[slice, Tensor], object]) -> Tensor:
    """x W~^T on the CPU: a few rows of W at a time are decoded into one buffer and multiplied while they are in the cache.

    x [N, I], `decode(rows, out)` writes those rows of W~ to out fp32 [rows, I] -> [N, O]
    """
    step, y = min(out_features, max(1, CHUNK // x.shape[1])), x.new_empty(len(x), out_features)
    buffer = torch.empty(step, x.shape[1], device=x.device)
    for row in range(0, out_features, step):
        part = slice(row, min(row + step, out_features))
        w = buffer[: part.stop - part.start]
        decode(part, w)
        y[:, part] = F.linear(x, w.to(x.dtype))
    return y


@functools.cache
def _compiled_matvec8():
    """y = (W_codes x) s / 127 for one x, read from the codes in one pass."""

    def matvec(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:  # [1, I], int8 [O, I], [O] -> [1, O]
        return ((codes.float() * x.float()).sum(dim=1) * scale / 127.0).to(x.dtype)[None]

    return torch.compile(matvec, dynamic=False)


@functools.cache
def _compiled_matvec4():
    """The same for 4-bit codes: each byte is two levels, for an even and an odd place of x."""

    def matvec(x: Tensor, packed: Tensor, table: Tensor, absmax: Tensor, block: int) -> Tensor:  # x [1, I] -> [1, O]
        blocks = x.shape[1] // block
        even, odd = x.float().view(1, blocks, block // 2, 2).unbind(dim=-1)  # [1, blocks, block/2]
        byte = packed.int().view(-1, blocks, block // 2)  # [O, blocks, block/2]
        products = table[byte >> 4] * even + table[byte & 15] * odd
        return (products * absmax.view(-1, blocks, 1)).sum(dim=(1, 2)).to(x.dtype)[None]

    return torch.compile(matvec, dynamic=False)


def use_kernels(model: nn.Module, device: str, compiled: bool) -> str | None:
    """Chooses the fast paths of a model's quantized layers: Triton on CUDA, torch.compile on the CPU if `compiled`.

    Where one is asked for but missing, the layers stay plain PyTorch; the line that says so is returned.
    """
    kernel, missing = "eager", None
    if str(device).startswith("cuda"):
        try:
            import quant_kernels  # noqa: F401

            kernel = "triton"
        except ImportError as error:
            missing = f"Triton is missing ({error}): quantized layers run as plain PyTorch. pip install triton"
    elif compiled:
        missing = compile_missing()
        kernel = "eager" if missing else "compiled"
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            layer.kernel = kernel
    return missing


def compile_missing() -> str | None:
    """None if torch.compile works here (it needs a C++ compiler on the CPU), else a line that says why not."""
    try:
        x, codes = torch.ones(1, 8), torch.ones(8, 8, dtype=torch.int8)
        _compiled_matvec8()(x, codes, torch.ones(8))
    except Exception as error:  # whatever the compiler's tool chain raises
        reason = str(error).strip().splitlines()[0][:200]
        return f"torch.compile does not work here ({reason}): going on with plain PyTorch."
    return None


# ------------------------------------------------------------------------------------------------------- whole models


def linear_layers(model: nn.Module, skip: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    """(name, layer) of every nn.Linear of a model whose own name is not in `skip`."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return [(name, layer) for name, layer in layers if name.rpartition(".")[2] not in skip]


def quantize_layer(
    weight: Tensor,
    bias: Tensor | None,
    to: str,
    block: int = 64,
    double: bool = False,
    threshold: float | None = None,
    compiled: bool = False,
) -> FrozenLinear:
    """The quantized layer of a matrix [O, I] and its bias."""
    if to == "int8":
        return Int8Linear(*quantize_int8(weight), bias, threshold)
    return Linear4bit(quantize_blockwise(weight, to, block, double, compiled), bias)


@torch.no_grad()
def quantize_model(model: nn.Module, to: str = "nf4", *, skip: tuple[str, ...] = SKIP, **options) -> nn.Module:
    """Replaces every nn.Linear of a model, in place, by its quantized layer; returns the model.

    The output layer stays as it is unless `skip` is empty; embeddings always do. `options`: those of `quantize_layer`.
    InputError names a layer that is not finite.
    """
    for name, layer in linear_layers(model, skip):
        try:
            quantized = quantize_layer(layer.weight, layer.bias, to, **options)
        except InputError as error:
            raise InputError(f"{name}.weight {error}") from None
        model.set_submodule(name, quantized)
    return model
