"""The arithmetic of quant.py that has to be fast: what a CPU needs, and Triton kernels for CUDA.

quant.py says what is computed; each function here computes the same with fewer instructions or less memory.

    decode             codes to numbers, one table look-up for each byte instead of one for each code
    nearest            numbers to codes, two look-ups instead of a binary search
    int8_product       y = x W~^T. On the CPU a few rows of W~ are decoded at a time and stay in the cache. For 4 bits on
    blockwise_product  CUDA, Triton kernels decode a few values at a time, which stay in registers

Decoding a token at a time multiplies one x with every weight: each weight is read once and used for two operations, so
memory bandwidth is the limit, and 4.5 bits a weight can be 3.6 times as fast as 16. With many x the arithmetic is
the limit, and cuBLAS does it best. So there are two Triton kernels for 4 bits:

    matvec     one x: a program holds some output features and walks along I, a few blocks at a time:
               y_o = sum_b s_ob sum_i l[c_oi] x_i  over the i of block b,  in fp32
    decode     many x: the weights once, in x's dtype, for one dense product

A byte holds two codes, for an even and an odd column, so matvec splits x into its even and its odd columns.

A third kernel, `_adamw`, is AdamW8bit's step (runtime/optimizer.py). It reads and writes each value once; in PyTorch the
step takes 35 operations.

Without Triton, or without the C compiler that it needs, plain PyTorch computes the same, slower. Without a GPU, Triton's
interpreter runs the kernels, slowly (TRITON_INTERPRET=1).
"""

import functools
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CHUNK = 2**20  # values worked on at a time on a CPU: 4 MB of fp32, which stay in the cache


def chunk(device: torch.device) -> int:
    """How many values to work on at a time. On CUDA an operation must be worth its launch: 2^25 values are more than any
    matrix in Phi-2's blocks has, and 134 MB for each temporary tensor."""
    return CHUNK if device.type == "cpu" else 2**25


def pack(codes: Tensor, bits: int, fill: int) -> Tensor:
    """Codes uint8 [n] of 2, 4 or 8 bits -> bytes uint8 [ceil(n bits / 8)], the first code in the highest bits. The last byte
    is filled up with the code `fill`."""
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -len(codes) % per_byte), value=fill).view(-1, per_byte)
    return functools.reduce(lambda packed, code: packed << bits | code, codes.unbind(1))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: bytes uint8 -> codes int32, including those that fill up the last byte."""
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.int32, device=packed.device)
    codes = packed.view(-1, 1).int() >> shifts  # [bytes, codes a byte]
    return (codes & (2**bits - 1)).flatten()


def decode(packed: Tensor, levels: Tensor, absmax: Tensor, block: int, n: int) -> Tensor:
    """w~ = l_c s_b of the first n codes: bytes, levels fp32 [2^bits], absmax fp32 [ceil(n / block)] -> fp32 [n]."""
    table = _levels_of_bytes(levels)
    values = table.index_select(0, packed.flatten().int()).view(torch.float32)[:n]
    if n % block:
        values = F.pad(values, (0, -n % block))
    return values.view(-1, block).mul_(absmax[:, None]).view(-1)[:n]


@functools.lru_cache(maxsize=64)  # tensors are told apart by identity; quant.levels gives the same one every time
def _levels_of_bytes(levels: Tensor) -> Tensor:
    """The levels of all codes in each of the 256 bytes, [256]. They are viewed as one wide number, because torch gathers
    numbers faster than rows of two."""
    bits = (len(levels) - 1).bit_length()
    every_byte = torch.arange(256, dtype=torch.uint8, device=levels.device)
    wide = {2: torch.complex128, 4: torch.int64, 8: torch.float32}[bits]  # 16, 8 and 4 bytes
    return levels[unpack(every_byte, bits)].view(wide)


def nearest(x: Tensor, midpoints: Tensor) -> Tensor:
    """How many midpoints lie below each x: x fp32 of any shape, midpoints fp32 [at most 255], ascending -> uint8.

    torch.bucketize(x, midpoints) gives the same by binary search, ten times slower. Here are two look-ups: numbers that
    agree in their upper 16 bits (sign, exponent, 7 bits of the fraction) lie so close together that at most one midpoint is
    among them, and that one is compared with x.
    """
    below, midpoint = _cells(midpoints)
    flat = x.flatten()
    cell = (flat.view(torch.int32) >> 16).add_(2**15)  # 0 .. 2^16 - 1
    count = below.index_select(0, cell)
    count += flat > midpoint.index_select(0, cell)
    return count.view(x.shape)


@functools.lru_cache(maxsize=64)
def _cells(midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the 2^16 cells of numbers with the same upper half: how many midpoints lie below the cell, uint8, and the
    next midpoint, fp32."""
    first = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=midpoints.device) * 2**16
    smallest = torch.stack((first, first + 0xFFFF)).view(torch.float32).amin(dim=0)
    below = torch.bucketize(smallest, midpoints)
    following = F.pad(midpoints, (0, 1), value=math.inf)[below]
    return below.to(torch.uint8), following


def int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """y = (x C^T) s / 127:  x [N, I], codes int8 [O, I], scale fp32 [O] -> [N, O] in x's dtype."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        # torch's product of bf16 with int8. It would round the scales to bf16, so they are multiplied afterwards.
        y = torch._weight_int8pack_mm(x.contiguous(), codes, x.new_ones(len(codes)))
    else:
        y = in_parts(x, len(codes), 1, lambda start, stop: codes[start:stop])
    return (y * (scale / 127.0)).to(x.dtype)


def blockwise_product(x: Tensor, packed: Tensor, levels: Tensor, absmax: Tensor, block: int) -> Tensor:
    """y = x W~^T:  x [N, I], bytes of [O, I] codes, levels fp32 [2^bits], absmax fp32 [blocks] -> [N, O] in x's dtype."""
    I = x.shape[1]
    per_byte = 8 // (len(levels) - 1).bit_length()
    if x.is_cuda and per_byte == 2 and suits_triton(I, block) and triton_runs(x.device):
        return triton_4bit(x, packed, levels, absmax, block)

    def rows(start: int, stop: int) -> Tensor:
        first, end = start * I, stop * I  # in the flattened matrix
        some_bytes = packed[first // per_byte : math.ceil(end / per_byte)]
        some_scales = absmax[first // block : math.ceil(end / block)]
        return decode(some_bytes, levels, some_scales, block, end - first).view(-1, I)

    whole = math.lcm(I, block, per_byte) // I  # after so many rows a block and a byte end too
    return in_parts(x, packed.numel() * per_byte // I, whole, rows)


def in_parts(x: Tensor, out_features: int, whole: int, rows: Callable[[int, int], Tensor]) -> Tensor:
    """x W^T, a few rows of W at a time, each multiplied while it is in the cache; on CUDA all of them at once.

    x [N, I]; rows(start, stop) -> those rows of W, in any dtype. Each part has a multiple of `whole` rows, but for the last
    -> [N, out_features] in x's dtype
    """
    step = out_features if x.is_cuda else max(1, CHUNK // (x.shape[1] * whole)) * whole
    parts = [(start, min(start + step, out_features)) for start in range(0, out_features, step)]
    return torch.cat([F.linear(x, rows(*part).to(x.dtype)) for part in parts], dim=1)


def int32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in int32, exact:  a int8 [N, I], b int8 [O, I] -> [N, O]."""
    return padded_int32_product(a, b) if a.is_cuda else torch._int_mm(a, b.T)


def padded_int32_product(a: Tensor, b: Tensor) -> Tensor:
    """The same for cuBLAS, which takes at least 17 rows and sizes that are multiples of 8; zeros change no sum."""
    rows, (features, columns) = len(a), b.shape
    a = F.pad(a, (0, -columns % 8, 0, max(0, 17 - rows)))
    if features % 8 or columns % 8:  # not in Phi-2, whose weights need no copy
        b = F.pad(b, (0, -columns % 8, 0, -features % 8))
    return torch._int_mm(a, b.T)[:rows, :features]


def suits_triton(I: int, block: int) -> bool:
    """Whether rows are whole blocks of a size that Triton takes, as they are in Phi-2."""
    return I % block == 0 and block >= 16 and block & (block - 1) == 0


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Whether Triton can be used on a GPU. To compile a kernel it needs a C compiler and Python's header files; without them
    a warning says so, once."""
    if triton is None:
        return False
    try:
        zeros = torch.zeros(32, dtype=torch.uint8, device=device)
        triton_decode(zeros, torch.zeros(16, device=device), torch.zeros(1, device=device), 64, torch.float32)
    except Exception as error:  # Triton, the compiler and the driver each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton does not run here, so products of 4-bit weights are slower: {reason}", stacklevel=2)
        return False
    return True


def rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """model.rotate for one token a row, x [B, H, 1, h], in one launch instead of seven: of 27 launches a block,
    14 were rotations. The sums are fp32, rounded once."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    size = x.shape[1] * x.shape[3]  # of a row
    with torch.cuda.device_of(x):
        grid = len(x), triton.cdiv(size, 1024)
        _rotate_one[grid](x, cos.contiguous(), sin.contiguous(), y, size, x.shape[3], cos.shape[3], SIZE=1024)
    return y


def triton_4bit(x: Tensor, packed: Tensor, levels: Tensor, absmax: Tensor, block: int) -> Tensor:
    """`blockwise_product` for 4-bit codes, two a byte, whose rows are whole blocks (`suits_triton`)."""
    rows, I = x.shape
    if rows > 1:  # on an H200 decoding all weights costs less than a second matvec
        return F.linear(x, triton_decode(packed, levels, absmax, block, x.dtype).view(-1, I))
    O = packed.numel() * 2 // I
    y = x.new_empty(1, O)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(O, MATVEC["ROWS"]),)
        sizes = MATVEC | {"BLOCKS": max(1, min(MATVEC["BLOCKS"], 256 // block))}
        _matvec[grid](x.contiguous(), packed, levels, absmax, y, O, I, BLOCK=block, **sizes)
    return y


def triton_decode(packed: Tensor, levels: Tensor, absmax: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """`decode` of all 4-bit codes, rounded to `dtype`: bytes uint8 [n / 2] -> [n]."""
    out = torch.empty(2 * packed.numel(), dtype=dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        sizes = DECODE | {"BLOCKS": max(1, min(DECODE["BLOCKS"], 2048 // block))}
        grid = (triton.cdiv(len(absmax), sizes["BLOCKS"]),)
        _decode[grid](packed, levels, absmax, out, len(absmax), BLOCK=block, **sizes)
    return out


def triton_adamw(w: Tensor, g: Tensor, moments: list[tuple[Tensor, ...]], block: int, numbers: dict[str, float]) -> None:
    """AdamW's step with moments in 8 bits, in place: w and g fp32 [n]; for m and for v codes uint8 [n], scales fp32
    [ceil(n / block)], levels fp32 [256] and midpoints fp32 [255]; `numbers` by the names that `_adamw` has for them."""
    tables = [(codes, scales, table, *_cells(midpoints)) for codes, scales, table, midpoints in moments]
    with torch.cuda.device_of(w):
        grid = (triton.cdiv(len(w), ADAMW["BLOCKS"] * block),)
        _adamw[grid](w, g, *tables[0], *tables[1], len(w), **numbers, BLOCK=block, **ADAMW)


# Output features of a program; blocks of up to 64 that it works on at a time; warps.
MATVEC = {"ROWS": 4, "BLOCKS": 4, "num_warps": 4}
DECODE = {"BLOCKS": 32, "num_warps": 4}
ADAMW = {"BLOCKS": 4, "num_warps": 4}

if triton is not None:

    @triton.jit
    def _rotate_one(x, cos, sin, y, size, head_size, half, SIZE: tl.constexpr):
        row = tl.program_id(0)
        n = tl.program_id(1) * SIZE + tl.arange(0, SIZE)  # in the row
        d = n % head_size
        inside, turns, left = n < size, d < 2 * half, d < half
        here = tl.load(x + row * size + n, mask=inside).to(tl.float32)
        there = tl.load(x + row * size + tl.where(left, n + half, n - half), mask=inside & turns, other=0.0).to(tl.float32)
        angle = row * half + tl.where(left, d, d - half)
        c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        turned = here * c + tl.where(left, -there, there) * s
        tl.store(y + row * size + n, turned.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _matvec(x, packed, levels, absmax, y, O, I, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
        HALF: tl.constexpr = BLOCK // 2  # bytes of a block
        o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        blocks = I // BLOCK  # of a row
        total = tl.zeros([ROWS, BLOCKS], tl.float32)
        for first in range(0, blocks, BLOCKS):
            b = first + tl.arange(0, BLOCKS)  # [BLOCKS]
            mask = (o[:, None] < O) & (b[None, :] < blocks)  # [ROWS, BLOCKS]
            block = o[:, None].to(tl.int64) * blocks + b[None, :]
            scale = tl.load(absmax + block, mask=mask, other=0.0)
            byte = block[:, :, None] * HALF + tl.arange(0, HALF)[None, None, :]  # [ROWS, BLOCKS, HALF]
            codes = tl.load(packed + byte, mask=mask[:, :, None], other=0)
            column = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
            some_x = tl.load(x + column, mask=b[:, None] < blocks, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(some_x, [BLOCKS, HALF, 2]))  # [BLOCKS, HALF] each
            products = tl.load(levels + (codes >> 4)) * even[None] + tl.load(levels + (codes & 15)) * odd[None]
            total += tl.sum(products, axis=2) * scale
        tl.store(y + o, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=o < O)

    @triton.jit
    def _decode(packed, levels, absmax, out, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
        HALF: tl.constexpr = BLOCK // 2  # bytes of a block
        b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
        inside = (b < blocks)[:, None]
        scale = tl.load(absmax + b[:, None], mask=inside, other=0.0)  # [BLOCKS, 1]
        codes = tl.load(packed + b[:, None].to(tl.int64) * HALF + tl.arange(0, HALF)[None, :], mask=inside, other=0)
        pairs = tl.join(tl.load(levels + (codes >> 4)) * scale, tl.load(levels + (codes & 15)) * scale)
        w = tl.reshape(pairs, [BLOCKS, BLOCK])
        column = b[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(out + column, w.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _nearest(x, scale, below, midpoint):
        """`nearest` of x / scale."""
        x = x * (1 / tl.maximum(scale, 1.2e-38))
        cell = (x.to(tl.int32, bitcast=True) >> 16) + 32768
        return tl.load(below + cell) + (x > tl.load(midpoint + cell)).to(tl.uint8)

    @triton.jit
    def _adamw(
        w, g,
        m_codes, m_scales, m_levels, m_below, m_midpoint,
        v_codes, v_scales, v_levels, v_below, v_midpoint,
        n, keep_m, new_m, keep_v, new_v, decay, rate, root, eps,
        BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]  # [BLOCKS, 1]
        i = b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
        inside, started = i < n, b * BLOCK < n  # the last block may be short
        grad = tl.load(g + i, mask=inside, other=0.0)
        m = tl.load(m_levels + tl.load(m_codes + i, mask=inside, other=0)) * tl.load(m_scales + b, mask=started, other=0.0)
        v = tl.load(v_levels + tl.load(v_codes + i, mask=inside, other=0)) * tl.load(v_scales + b, mask=started, other=0.0)
        m = tl.where(inside, m * keep_m + grad * new_m, 0.0)
        v = tl.where(inside, v * keep_v + new_v * grad * grad, 0.0)
        step = m / (tl.sqrt(v) / root + eps)
        tl.store(w + i, tl.load(w + i, mask=inside) * decay - rate * step, mask=inside)
        m_scale, v_scale = tl.max(tl.abs(m), axis=1)[:, None], tl.max(v, axis=1)[:, None]  # [BLOCKS, 1]
        tl.store(m_codes + i, _nearest(m, m_scale, m_below, m_midpoint), mask=inside)
        tl.store(v_codes + i, _nearest(v, v_scale, v_below, v_midpoint), mask=inside)
        tl.store(m_scales + b, m_scale, mask=started)
        tl.store(v_scales + b, v_scale, mask=started)
