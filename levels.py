"""The tables of levels that weights are rounded to, and their codes packed into bytes.

A level is a number in [-1, 1] that is multiplied with a scale (quant.py); its code is its place in the table.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

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


def dynamic_map() -> Tensor:
    """The signed dynamic 8-bit map (Dettmers 2016): seven decades, 10^-6 .. 1, each with twice the levels of the one below,
    so that small values keep their relative precision. Ascending, fp32 [256], with 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centres.tolist(), *(-centres).tolist()]
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
    }
    return tables[code]().to(device)


def bits(code: str) -> int:
    return {"nf3": 3, "nf2": 2, "dynamic8": 8}.get(code, 4)


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
