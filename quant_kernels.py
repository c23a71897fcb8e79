"""CUDA kernels for the quantized layers, in Triton: y = x W~^T straight from the codes, W~ never in memory.

A product of one x with a matrix (decoding, a token at a time) reads each weight once and does two operations with it: the
memory's speed is the limit, so 4-bit codes can be four times as fast as 16-bit weights if they are decoded on the way, in
registers. With many x the arithmetic is the limit, and W~ is decoded a tile at a time for the tensor cores.

    matvec    a program holds ROWS output features and walks along I;  y_o = sum_i  (l[c_oi] s_oi) x_i,  fp32
    matmul    a program holds a [M, N] tile of y and walks along I:  decode a [N, K] tile of W~, tl.dot with x's

A byte holds two codes, for an even and an odd column. Instead of weaving them together, both kernels multiply twice, with
the even and with the odd columns of x: sum_i w_i x_i = sum_j w_2j x_2j + sum_j w_2j+1 x_2j+1.

Without a GPU they run, slowly, in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests run them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 8  # up to this many x, one matvec each


@triton.jit
def _decode_pair(packed, levels, absmax, low, byte, mask, block, HAS_LOW: tl.constexpr):
    """The two weights of each byte in `byte` (indices into packed), fp32; they share a block, whose size is even."""
    codes = tl.load(packed + byte, mask=mask, other=0).to(tl.int32)
    scale = tl.load(absmax + 2 * byte // block, mask=mask, other=0.0)
    even, odd = tl.load(levels + (codes >> 4)), tl.load(levels + (codes & 15))  # 16 values: they stay in the L1 cache
    if HAS_LOW:
        start = tl.load(low + 2 * byte // block, mask=mask, other=0.0)
        return start + (scale - start) * even, start + (scale - start) * odd
    return scale * even, scale * odd


@triton.jit
def _matvec4(x, packed, levels, absmax, low, y, O, I, block, HAS_LOW: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    n = tl.program_id(1)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, I // 2, BYTES):
        j = start + tl.arange(0, BYTES)  # [BYTES] pairs of columns
        inside = j < I // 2
        x_even = tl.load(x + n * I + 2 * j, mask=inside, other=0.0).to(tl.float32)
        x_odd = tl.load(x + n * I + 2 * j + 1, mask=inside, other=0.0).to(tl.float32)
        byte = o[:, None].to(tl.int64) * (I // 2) + j[None, :]  # [ROWS, BYTES]
        mask = (o[:, None] < O) & inside[None, :]
        w_even, w_odd = _decode_pair(packed, levels, absmax, low, byte, mask, block, HAS_LOW)
        total += tl.sum(tl.where(mask, w_even * x_even[None, :] + w_odd * x_odd[None, :], 0.0), axis=1)
    tl.store(y + n * O + o, total.to(y.dtype.element_ty), mask=o < O)


@triton.jit
def _matmul4(
    x, packed, levels, absmax, low, y, rows, O, I, block,
    HAS_LOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)  # [M] rows of x
    o = tl.program_id(1) * N + tl.arange(0, N)  # [N] output features
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, I // 2, BYTES):
        j = start + tl.arange(0, BYTES)
        inside = j < I // 2
        at = m[:, None].to(tl.int64) * I + 2 * j[None, :]  # [M, BYTES]
        x_mask = (m[:, None] < rows) & inside[None, :]
        x_even, x_odd = tl.load(x + at, mask=x_mask, other=0.0), tl.load(x + at + 1, mask=x_mask, other=0.0)
        byte = o[None, :].to(tl.int64) * (I // 2) + j[:, None]  # [BYTES, N], so that no transpose is needed
        w_mask = (o[None, :] < O) & inside[:, None]
        w_even, w_odd = _decode_pair(packed, levels, absmax, low, byte, w_mask, block, HAS_LOW)
        total = tl.dot(x_even, w_even.to(x_even.dtype), total, input_precision="ieee")
        total = tl.dot(x_odd, w_odd.to(x_odd.dtype), total, input_precision="ieee")
    out = m[:, None].to(tl.int64) * O + o[None, :]
    tl.store(y + out, total.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (o[None, :] < O))


@triton.jit
def _matvec8(x, codes, scale, y, O, I, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, I, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        mask = (o[:, None] < O) & (i[None, :] < I)
        w = tl.load(codes + o[:, None].to(tl.int64) * I + i[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.sum(w * tl.load(x + n * I + i, mask=i < I, other=0.0).to(tl.float32)[None, :], axis=1)
    total = total * tl.load(scale + o, mask=o < O, other=0.0) / 127.0
    tl.store(y + n * O + o, total.to(y.dtype.element_ty), mask=o < O)


@triton.jit
def _matmul8(x, codes, scale, y, rows, O, I, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.program_id(0) * M + tl.arange(0, M)
    o = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, I, K):
        i = start + tl.arange(0, K)
        at = m[:, None].to(tl.int64) * I + i[None, :]
        x_tile = tl.load(x + at, mask=(m[:, None] < rows) & (i[None, :] < I), other=0.0)  # [M, K]
        w_at = o[None, :].to(tl.int64) * I + i[:, None]
        w = tl.load(codes + w_at, mask=(o[None, :] < O) & (i[:, None] < I), other=0)  # [K, N]
        total = tl.dot(x_tile, w.to(x_tile.dtype), total, input_precision="ieee")
    total = total * (tl.load(scale + o, mask=o < O, other=0.0) / 127.0)[None, :]
    out = m[:, None].to(tl.int64) * O + o[None, :]
    tl.store(y + out, total.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (o[None, :] < O))


def blockwise_product(x: Tensor, packed: Tensor, levels: Tensor, absmax: Tensor, low: Tensor | None, block: int) -> Tensor:
    """x [N, I], 4-bit codes of [O, I] two a byte, levels fp32 [16], absmax (and low) fp32 [blocks] -> [N, O] in x's dtype.
    I and block are even."""
    x = x.contiguous()
    rows, I = x.shape
    O = packed.numel() * 2 // I
    y = x.new_empty(rows, O)
    start = absmax if low is None else low  # a pointer is needed even where it is not read
    with torch.cuda.device_of(x):
        if rows <= FEW:
            grid = (triton.cdiv(O, 4), rows)
            _matvec4[grid](x, packed, levels, absmax, start, y, O, I, block, low is not None, ROWS=4, BYTES=256)
        else:
            m = _tile_rows(rows)
            grid = (triton.cdiv(rows, m), triton.cdiv(O, 64))
            _matmul4[grid](x, packed, levels, absmax, start, y, rows, O, I, block, low is not None, M=m, N=64, BYTES=32)
    return y


def int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [N, I], codes int8 [O, I], scale fp32 [O] -> x W~^T [N, O] in x's dtype."""
    x = x.contiguous()
    rows, I = x.shape
    O = len(codes)
    y = x.new_empty(rows, O)
    with torch.cuda.device_of(x):
        if rows <= FEW:
            _matvec8[triton.cdiv(O, 4), rows](x, codes, scale, y, O, I, ROWS=4, COLUMNS=512)
        else:
            m = _tile_rows(rows)
            _matmul8[triton.cdiv(rows, m), triton.cdiv(O, 64)](x, codes, scale, y, rows, O, I, M=m, N=64, K=64)
    return y


def _tile_rows(rows: int) -> int:
    """Rows of x in a tile: 16, the least that tensor cores take, to 64."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64
