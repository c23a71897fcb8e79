"""AdamW, the same with moments in 8 bits or in the CPU's memory, and the learning rate's course over a run.

AdamW (Loshchilov & Hutter 2019, algorithm 2) keeps two running means of every weight's gradient, the *moments*:

    m = b1 m + (1 - b1) g                        v = b2 v + (1 - b2) g^2
    w = (1 - lr wd) w  -  lr m^ / (sqrt(v^) + eps)     with  m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)  after t steps

In fp32 they take 8 bytes a weight: 22 GB of Phi-2's 45. `AdamW8bit` keeps them in 2 bytes; `Offloaded` leaves them to the
CPU's memory. Every optimizer here has its whole state from the start (torch's would make it in the first step), so that a
checkpoint can be checked against it.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from levels import levels, nearest
from model import Phi
from quant import CHUNK
from runtime.files import InputError
from runtime.parallel import own
from runtime.settings import Config


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up to `lr`, then a cosine or linear decay that would reach 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * (0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress)


# ------------------------------------------------------------------------------------------------- moments in 8 bits

BLOCK = 256  # values that share a scale
SMALL = 4096  # parameters of fewer values keep fp32 moments
MOMENTS = {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8-unsigned"}  # of m, which has a sign, and of v, which has none


def in_8_bits(p: Tensor) -> bool:
    """Whether AdamW8bit keeps p's moments in 8 bits: matrices of 4,096 values or more. (Vectors are few, and the rows of a
    sharded one are single values, which fill no block.) A sharded parameter counts with its whole shape, so the answer does
    not depend on how many processes there are."""
    return p.ndim >= 2 and p.numel() >= SMALL


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with m and v in blocks of 256 codes and one scale (8-bit Optimizers via Block-wise Quantization, Dettmers et al.
    2022, section 2):

        m~ = l_c s,   s = max |m| of the block,   c = the code of the level nearest to m / s;     v the same, levels unsigned

    Each step decodes m~ and v~, makes the step of AdamW from them in fp32, and rounds the new m and v for the next one: 2
    bytes and 8/256 of a scale a weight. It works through a parameter in slices, so that its fp32 temporaries are small.

    One rule is added to the paper's: v > 0 never becomes 0. A value whose gradient is below 4e-4 of its block's largest has
    v / s < 1.6e-7, for which 0 is the nearest level, while its m survives. If its gradient is 0 in the next step, as in the
    embedding of a token that does not occur, m / (sqrt(0) + eps) would be a step of up to thousands of learning rates.

    State of a parameter: "step", "exp_avg" and "exp_avg_sq"; if these are codes, "exp_avg_absmax" and "exp_avg_sq_absmax".
    In rows of a multiple of 256 values, as all of Phi-2's are, no block reaches from one row into the next, and codes are
    uint8 [rows, row], scales fp32 [rows, row / 256]; a process that holds some rows of a sharded parameter holds the same
    rows of its state. In other rows they are uint8 [values] and fp32 [blocks]; the last block may be short.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros(()), **_zero_moments(p)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        state["step"] += 1
        flat = {key: value.view(-1) for key, value in state.items()}
        w, g = own(p).view(-1), own(p.grad).reshape(-1)
        # On the CPU a slice stays in the cache; on CUDA it must be long enough to pay for starting 30 kernels.
        size = CHUNK if w.device.type == "cpu" else 4 * CHUNK
        for start in range(0, len(w), size):
            part, blocks = slice(start, start + size), slice(start // BLOCK, (start + size) // BLOCK)
            if not in_8_bits(p):
                _adamw(w[part], g[part], flat["exp_avg"][part], flat["exp_avg_sq"][part], state["step"].item(), **group)
                continue
            stored = {key: (flat[key][part], flat[f"{key}_absmax"][blocks]) for key in MOMENTS}
            m, v = (_decode(*stored[key], code) for key, code in MOMENTS.items())
            _adamw(w[part], g[part], m, v, state["step"].item(), **group)
            for key, moment in zip(MOMENTS, (m, v)):
                _encode(moment, MOMENTS[key], *stored[key])


def _zero_moments(p: Tensor) -> dict[str, Tensor]:
    """The moments of a parameter before its first step. InputError if its rows cannot be sharded."""
    mine, row = own(p.detach()), math.prod(p.shape[1:])
    if not in_8_bits(p):
        return {key: torch.zeros_like(mine, dtype=torch.float32) for key in MOMENTS}
    whole = row % BLOCK == 0
    if isinstance(p, DTensor) and not whole:
        raise InputError(
            f"--optimizer adamw8bit needs rows of a multiple of {BLOCK} values when weights are sharded over several GPUs, "
            f"and a parameter is {list(p.shape)}; use --optimizer adamw"
        )
    codes = (len(mine), row) if whole else (mine.numel(),)
    scales = (len(mine), row // BLOCK) if whole else (math.ceil(mine.numel() / BLOCK),)
    moments = {}
    for key in MOMENTS:
        moments[key] = torch.zeros(codes, dtype=torch.uint8, device=mine.device)  # any code: its scale is 0
        moments[f"{key}_absmax"] = torch.zeros(scales, device=mine.device)
    return moments


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: float, lr, betas, eps, weight_decay, **_) -> None:
    """Step t of AdamW, in place: all fp32 [n]."""
    b1, b2 = betas
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.mul_(1 - lr * weight_decay)
    w.addcdiv_(m, v.sqrt().div_(math.sqrt(1 - b2**t)).add_(eps), value=-lr / (1 - b1**t))


def _blocks(x: Tensor) -> Tensor:
    """[n] -> [blocks, 256], the last filled up with zeros."""
    short = -len(x) % BLOCK
    return (F.pad(x, (0, short)) if short else x).view(-1, BLOCK)


def _decode(codes: Tensor, scale: Tensor, code: str) -> Tensor:
    """uint8 [n] and fp32 [blocks] -> fp32 [n]."""
    values = torch.index_select(levels(code, codes.device), 0, codes.int())
    return _blocks(values).mul_(scale[:, None]).view(-1)[: len(codes)]


def _encode(values: Tensor, code: str, codes: Tensor, scale: Tensor) -> None:
    """fp32 [n] -> codes uint8 [n] and scales fp32 [blocks], written in place: those of quant.quantize_blockwise."""
    blocks = _blocks(values)
    torch.amax(blocks.abs(), dim=1, out=scale)
    scaled = (blocks * (1 / scale.clamp(min=1e-38))[:, None]).clamp_(-1, 1)  # a block of zeros stays zeros
    codes.copy_(nearest(scaled, code).view(-1)[: len(codes)])


# ------------------------------------------------------------------------------------------- moments in the CPU's memory


class Offloaded:
    """An optimizer whose state and arithmetic are the CPU's, for a model whose weights and gradients are on CUDA (ZeRO-
    Offload, Ren et al. 2021). In each step, parameter by parameter,

        the gradient is copied down  ->  the CPU steps its fp32 copy of the weights  ->  the copy's weights are copied up

    The GPU is spared the moments, 8 bytes a weight with AdamW: 22 GB for Phi-2. The CPU's memory holds them and the copy, 12
    bytes a weight, and one gradient at a time. A step costs 4 bytes a weight over PCIe each way, 11 GB for Phi-2, and the
    CPU's arithmetic, which is bound by its memory. The weights are those of the same optimizer on the CPU, bit for bit.
    """

    def __init__(self, groups: list[dict], make: Callable):
        """groups: [{"params": [...], "weight_decay": ...}]; make(groups) -> the optimizer that the CPU runs."""
        self.optimizers = {}  # one a parameter, so that no two gradients need be on the CPU together
        for group in groups:
            for p in group["params"]:
                copy = _pinned(own(p.detach()).to("cpu", copy=True), p)
                self.optimizers[p] = make([{**group, "params": [copy]}])
        self.param_groups = [optimizer.param_groups[0] for optimizer in self.optimizers.values()]
        self.state = {p: next(iter(optimizer.state.values())) for p, optimizer in self.optimizers.items()}
        largest = max((group["params"][0] for group in self.param_groups), key=Tensor.numel)
        self.gradient = _pinned(torch.empty(largest.numel()), next(iter(self.optimizers)))  # of one parameter at a time

    @torch.no_grad()
    def step(self) -> None:
        for p, optimizer in self.optimizers.items():
            if p.grad is None:
                continue
            (copy,) = optimizer.param_groups[0]["params"]
            copy.grad = self.gradient[: copy.numel()].view_as(copy).copy_(own(p.grad))
            optimizer.step()
            copy.grad = None
            own(p).copy_(copy)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.optimizers:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.zero_()


def _pinned(x: Tensor, p: Tensor) -> Tensor:
    """A CPU tensor in memory that CUDA can copy from and to directly, if p is on CUDA."""
    return x.pin_memory() if p.is_cuda else x


# ----------------------------------------------------------------------------------------------------------- which one


def adamw(groups: list[dict], **settings) -> torch.optim.AdamW:
    """torch.optim.AdamW, fused."""
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def make_optimizer(model: Phi, config: Config) -> torch.optim.Optimizer | Offloaded:
    """The optimizer of --optimizer and --offload-optimizer for the parameters that require gradients, as they are now; decay
    on the matrices only, not on biases and LayerNorms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim == 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    kind = AdamW8bit if config.optimizer == "adamw8bit" else adamw
    make = functools.partial(kind, lr=config.lr, betas=(0.9, config.adam_beta2))
    if not config.offload_optimizer:
        return make(groups)
    if kind is AdamW8bit and any(isinstance(p, DTensor) for p in trained):
        raise InputError("--offload-optimizer with --optimizer adamw8bit is for one GPU; leave one of them out")
    return Offloaded(groups, make)
