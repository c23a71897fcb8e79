"""AdamW, and AdamW with its moments in 8 bits.

AdamW (Loshchilov & Hutter 2019, algorithm 2) keeps two running means of every weight's gradient g, the *moments* m and v:

    m = b1 m + (1 - b1) g                        v = b2 v + (1 - b2) g^2
    w = (1 - lr wd) w  -  lr m^ / (sqrt(v^) + eps)     with  m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)  after t steps

In fp32 the moments take 8 bytes a weight: 22.2 of the 44.5 GB that training all of Phi-2 needs before any activation.
AdamW8bit keeps them in 2. Both optimizers allocate their whole state when they are made, so a checkpoint can be checked
against it.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from quant import encode_blocks, levels, midpoints
from quant_kernels import CHUNK, decode, triton_adamw, triton_runs
from runtime import parallel
from runtime.files import InputError
from runtime.settings import Optimizer
from runtime.weights import read_header

# ------------------------------------------------------------------------------------------------- moments in 8 bits

BLOCK = 256  # values that share a scale
MOMENTS = {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8-unsigned"}  # m has a sign, v has none


def in_8_bits(p: Tensor) -> bool:
    """Whether AdamW8bit keeps p's moments in 8 bits: only matrices from 4,096 values on. A sharded parameter's shape is its
    whole shape, so the answer is the same for any number of processes."""
    return p.ndim >= 2 and p.numel() >= 4096


class AdamW8bit(torch.optim.Optimizer):
    """AdamW that stores m and v as 8-bit codes with one scale for each block of 256 (8-bit Optimizers via Block-wise
    Quantization, Dettmers et al. 2022, section 2):

        m~ = l_c s,   s = max |m| of the block,   c = the code of the level nearest to m / s;     v the same, levels unsigned

    Each step decodes m~ and v~, takes AdamW's step in fp32, and rounds the new m and v: 2 bytes a weight and 8/256 for the
    scales. A parameter is updated slice by slice, so the fp32 temporaries stay small; on CUDA one Triton kernel does it all.

    One rule goes beyond the paper: v > 0 is never rounded to 0. A value whose gradient is below 4e-4 of the largest in its
    block has v / s < 1.6e-7, for which 0 is the nearest level, while its m survives. If its next gradient is 0, as in the
    embedding of a token that does not occur, m / (sqrt(0) + eps) would be a step of thousands of learning rates.

    State of a parameter: "step", "exp_avg" and "exp_avg_sq"; if these are codes, also "exp_avg_absmax" and
    "exp_avg_sq_absmax". If a row is a multiple of 256 values, as in all of Phi-2, no block crosses into the next row: codes
    are uint8 [rows, row], scales fp32 [rows, row / 256], and both are sharded like the parameter's rows. Otherwise they are
    uint8 [values] and fp32 [blocks], and the last block may be short.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros(()), **_zero_moments(p.detach())}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        state["step"] += 1
        t = state["step"].item()
        flat = {key: parallel.own(value).view(-1) for key, value in state.items()}
        w, g = parallel.own(p).view(-1), parallel.own(p.grad).reshape(-1)
        if in_8_bits(p) and w.is_cuda and triton_runs(w.device):
            triton_step(w, g, flat, t, **group)
            return
        # On the CPU a slice should fit into the cache; on CUDA it must be worth the launch of 30 kernels.
        size = CHUNK if w.device.type == "cpu" else 4 * CHUNK
        for start in range(0, len(w), size):
            part = slice(start, start + size)
            if not in_8_bits(p):
                _adamw(w[part], g[part], flat["exp_avg"][part], flat["exp_avg_sq"][part], t, **group)
                continue
            blocks = slice(start // BLOCK, (start + size) // BLOCK)
            stored = {key: (flat[key][part], flat[f"{key}_absmax"][blocks]) for key in MOMENTS}
            tables = {key: levels(code, w.device) for key, code in MOMENTS.items()}
            moments = {key: decode(codes, tables[key], scales, BLOCK, len(codes)) for key, (codes, scales) in stored.items()}
            _adamw(w[part], g[part], *moments.values(), t, **group)
            for key, code in MOMENTS.items():
                values = moments[key]
                rows = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)  # the last block is filled up with zeros
                codes, scales = encode_blocks(rows, code)
                stored[key][0].copy_(codes.view(-1)[: len(values)])
                stored[key][1].copy_(scales)


def _zero_moments(p: Tensor) -> dict[str, Tensor]:
    """The moments of a parameter before its first step. InputError if it is sharded and its rows are not whole blocks."""
    if not in_8_bits(p):
        return {key: torch.zeros_like(p, dtype=torch.float32) for key in MOMENTS}
    rows = p.flatten(1)
    like_codes, like_scales = rows, rows[:, ::BLOCK]
    if rows.shape[1] % BLOCK:
        if parallel.is_dtensor(p):
            needs = f"needs weights whose rows are a multiple of {BLOCK} values, and one is {list(p.shape)}"
            raise InputError(f"--optimizer adamw8bit on several GPUs {needs}; use --optimizer adamw")
        like_codes, like_scales = p.flatten(), p.flatten()[::BLOCK]
    moments = {key: torch.zeros_like(like_codes, dtype=torch.uint8) for key in MOMENTS}  # any codes: their scales are 0
    return moments | {f"{key}_absmax": torch.zeros_like(like_scales, dtype=torch.float32) for key in MOMENTS}


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: float, lr, betas, eps, weight_decay, **_) -> None:
    """Step t of AdamW, in place: all fp32 [n]."""
    b1, b2 = betas
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.mul_(1 - lr * weight_decay)
    w.addcdiv_(m, v.sqrt().div_(math.sqrt(1 - b2**t)).add_(eps), value=-lr / (1 - b1**t))


def triton_step(w: Tensor, g: Tensor, state: dict[str, Tensor], t: float, lr, betas, eps, weight_decay, **_) -> None:
    """Step t in one kernel: w and g fp32 [n], and a parameter's flattened state."""
    b1, b2 = betas
    numbers = {"keep_m": b1, "new_m": 1 - b1, "keep_v": b2, "new_v": 1 - b2, "eps": eps, "decay": 1 - lr * weight_decay}
    numbers |= {"rate": lr / (1 - b1**t), "root": math.sqrt(1 - b2**t)}
    tables = [(levels(code, w.device), midpoints(code, w.device)) for code in MOMENTS.values()]
    stored = [(state[key], state[f"{key}_absmax"], *both) for key, both in zip(MOMENTS, tables)]
    triton_adamw(w, g, stored, BLOCK, numbers)


def adamw(groups: list[dict], **settings) -> torch.optim.AdamW:
    """torch.optim.AdamW, fused, with its moments allocated."""
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {key: torch.zeros_like(p) for key in MOMENTS}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, for the trained parameters. Biases and LayerNorms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    make = AdamW8bit if settings.optimizer == "adamw8bit" else adamw
    return make(groups, lr=settings.lr, betas=(0.9, settings.adam_beta2))


# --------------------------------------------------------------------------------------------------------- checkpoints

FILE = "optimizer.safetensors"


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """("exp_avg.lm_head.bias", tensor), ... of all trained parameters. 8-bit codes stay codes: the map has no level at -1,
    so decoding and rounding them would change them."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield from ((f"{key}.{name}", value) for key, value in optimizer.state[p].items())


def save_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the optimizer's whole state, from which any number of ranks can resume. All ranks must call this."""
    state = dict(_named_state(model, optimizer))
    if parallel.size() > 1:
        state = parallel.whole_on_main(state.items())
    if parallel.is_main():
        save_file(state, directory / FILE)


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills the optimizer's state in place; each rank reads only its rows. InputError if another optimizer wrote it."""
    file = read_header(directory / FILE)
    for name, value in _named_state(model, optimizer):
        stored, kind = file.get(name), {torch.float32: "F32", torch.uint8: "U8"}[value.dtype]  # as safetensors spells it
        if stored is None or (stored.shape, stored.dtype) != (tuple(value.shape), kind):
            key, _, parameter = name.partition(".")
            what = f"no {key}" if stored is None else f"{key} as {stored.dtype} {[*stored.shape]}"
            raise InputError(f"{directory / FILE} has {what} for {parameter}; resume with the --optimizer that wrote it")
        if value.ndim:
            stored.fill(value)
        else:
            value.copy_(stored.read())
