"""The Triton kernels beside plain PyTorch, on a GPU or, slowly, in Triton's interpreter."""

import pytest
import torch

from quant import dequantize, levels, quantize_4bit, quantize_blockwise, quantize_layer, scales
from quant_kernels import triton_4bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter, which is NumPy, has no bf16 products.
MATMUL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(y, expected):
    return ((y.float() - expected).norm() / expected.norm()).item()


def product(q, x):
    return triton_4bit(x, q.packed, levels(q.code, x.device), scales(q), q.block)


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("shape", [(70, 96), (33, 640)], ids=str)  # not whole tiles
def test_4bit_products(code, double, rows, shape):
    q = quantize_blockwise(normal(*shape), code, block=32, double=double)
    x = normal(rows, shape[1], seed=1)
    assert error(product(q, x), x @ dequantize(q).T) < 1e-6


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", MATMUL_DTYPES, ids=str)
def test_products_in_the_dtype_of_their_input(rows, dtype):
    q, x = quantize_4bit(normal(40, 128)), normal(rows, 128, seed=1, dtype=dtype)
    y = product(q, x)
    assert y.dtype == dtype and error(y, x.float() @ dequantize(q).T) < TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="layers take the kernels, or dense products, on CUDA")
@pytest.mark.parametrize("to", ["nf4", "nf4-double", "int8", "nf2"])
def test_layers_on_cuda_equal_plain_products(to):
    """int8 and nf2 have no kernel: plain PyTorch computes them."""
    layer = quantize_layer(normal(48, 128), normal(48, seed=1), to)
    x = normal(2, 5, 128, seed=2).requires_grad_()
    y, expected = layer(x), x @ layer.dense().T + layer.bias
    torch.testing.assert_close(y, expected)
    weights = normal(2, 5, 48, seed=3)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected)))
