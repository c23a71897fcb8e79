"""The tables of levels that weights are rounded to, and their codes packed into bytes.

A level is a number in [-1, 1] that is multiplied with a scale (quant.py); its code is its place in the table.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes for weights. "dynamic8-unsigned" is not among them: it is for AdamW's second moment (optimizer.py).
CODES = ("nf4", "fp4", "int4", "int4-asym", "nf3", "nf2", "dynamic8")

# -------------------------------------------------------------------------------------------------- tables of levels


def normal_float(bits: int) -> Tensor:
    """The levels of NF2, NF3 and NF4 (QLoRA, section 3): quantiles of N(0, 1), so that every code is used about equally
    often when weights are normal. Ascending, fp32 [2^bits], with an exact 0 and both ends.

        l = Phi^-1(p) / Phi^-1(p_max),  2^(bits-1) values of p evenly from p_max down towards 1/2 for the positive side,
        one fewer mirrored for the negative side, and 0;   p_max = 1 - (1/(2^bits - 1) + 1/2^bits) / 4

    For NF4 p_max = 0.9677083 and the levels are -1, -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0, .0796, .1609, .2461,
    .3379, .4407, .5626, .7230, 1: equal to bitsandbytes' table in every bit, because p is in fp32 there too.
    """
    count = 2 ** (bits - 1)
    p_max = round(1 - (1 / (2**bits - 1) + 1 / 2**bits) / 4, 7)

    def quantiles(n: int) -> Tensor:  # Phi^-1(p) = sqrt(2) erfinv(2p - 1)
        p = torch.linspace(p_max, 0.5, n + 1)[:-1].double()
        return math.sqrt(2) * torch.erfinv(2 * p - 1)

    levels = torch.cat((-quantiles(count - 1), torch.zeros(1).double(), quantiles(count).flip(0))).float()
    return levels / levels.max()


def float_e2m1() -> Tensor:
    """FP4: a sign bit, two exponent bits, one mantissa bit, in bitsandbytes' order of codes; code 8 is -0. fp32 [16]."""
    magnitude = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat((magnitude, -magnitude))


def integers(bits: int) -> Tensor:
    """Evenly spaced levels k / (2^(bits-1) - 1), symmetric about 0: for 4 bits k = -7 .. 7, and the last code is spare."""
    most = 2 ** (bits - 1) - 1
    return (torch.arange(-most, most + 2) / most).clamp(max=1)


def unsigned(bits: int) -> Tensor:
    """Evenly spaced levels k / (2^bits - 1) in [0, 1], for asymmetric blocks:  w ~ low + (high - low) l."""
    return torch.arange(2**bits) / (2**bits - 1)


def dynamic_map(signed: bool = True) -> Tensor:
    """The dynamic 8-bit map (Dettmers 2016): seven decades, 10^-6 .. 1, each with twice the levels of the one below, so that
    small values keep their relative precision. Ascending, fp32 [256], with 0 and 1. Unsigned, for what is never negative:
    each decade has twice as many levels, 2 .. 128, and none is below 0."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centres.tolist(), *(-centres).tolist()] if signed else centres.tolist()
    return torch.tensor(sorted(values))


@functools.cache
def levels(code: str, device: torch.device | str = "cpu") -> Tensor:
    """The table of a code on a device: fp32, the level of code c at place c."""
    tables = {
        "nf4": lambda: normal_float(4),
        "nf3": lambda: normal_float(3),
        "nf2": lambda: normal_float(2),
        "fp4": float_e2m1,
        "int4": lambda: integers(4),
        "int4-asym": lambda: unsigned(4),
        "dynamic8": dynamic_map,
        "dynamic8-unsigned": lambda: dynamic_map(signed=False),
    }
    return tables[code]().to(device)


def bits(code: str) -> int:
    return {"nf3": 3, "nf2": 2, "dynamic8": 8, "dynamic8-unsigned": 8}.get(code, 4)


def nearest(x: Tensor, code: str) -> Tensor:
    """The code of the level nearest to each x, for tables in ascending order: x fp32 within [-1, 1] -> uint8, in x's shape.
    In "dynamic8-unsigned" the code of 0 is for 0 alone: what is larger gets at least the next level, 3.25e-7.

    A code is the number of midpoints below x, which torch.bucketize searches for. Where midpoints are many, two look-ups are
    several times faster: numbers that agree in their upper 16 bits (sign, exponent, 7 bits of the fraction) lie so close
    together that at most one midpoint is among them, and that one is compared with x.
    """
    below, midpoint = _cells(code, x.device)
    shape, x = x.shape, x.flatten()
    cell = (x.view(torch.int32) >> 16).add_(2**15)  # 0 .. 2^16 - 1
    codes = torch.index_select(below, 0, cell)
    codes += x > torch.index_select(midpoint, 0, cell)
    return codes.view(shape)


@functools.cache
def _cells(code: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the 2^16 cells of numbers with the same upper half: how many midpoints lie below the cell, uint8, and the next
    midpoint, fp32."""
    table = levels(code)
    midpoints = (table[1:] + table[:-1]) / 2
    if code == "dynamic8-unsigned":
        midpoints[0] = 0
    first = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
    smallest = torch.stack((first, first + 0xFFFF)).view(torch.float32).amin(dim=0)
    below = torch.bucketize(smallest, midpoints)
    following = F.pad(midpoints, (0, 1), value=math.inf)[below]
    return below.to(device, torch.uint8), following.to(device)


# ------------------------------------------------------------------------------------------------------- codes in bytes


def pack(codes: Tensor, bits: int, fill: int) -> Tensor:
    """Codes uint8 [n] of 2, 3, 4 or 8 bits -> bytes uint8, the first code in the highest bits: two 4-bit codes a byte, four
    2-bit codes a byte, eight 3-bit codes in three bytes. The last word is filled up with the code `fill`."""
    word = math.lcm(bits, 8)
    per_word, word_bytes = word // bits, word // 8
    codes = F.pad(codes, (0, -len(codes) % per_word), value=fill).view(-1, per_word)  # [words, codes]
    if word_bytes == 1:
        return functools.reduce(lambda packed, c: packed << bits | c, codes.unbind(1))
    packed = functools.reduce(lambda packed, c: packed << bits | c, codes.int().unbind(1))
    return torch.stack([packed >> 8 * i for i in reversed(range(word_bytes))], dim=1).to(torch.uint8).flatten()


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n packed codes."""
    word = math.lcm(bits, 8)
    return math.ceil(n * bits / word) * word // 8


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: bytes -> codes int32, those that filled up the last word too."""
    word = math.lcm(bits, 8)
    per_word, word_bytes = word // bits, word // 8
    words = functools.reduce(lambda joined, byte: joined << 8 | byte, packed.view(-1, word_bytes).int().unbind(1))
    codes = torch.stack([words >> bits * i for i in reversed(range(per_word))], dim=1)  # [words, codes]
    return (codes & (2**bits - 1)).flatten()
