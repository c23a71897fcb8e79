"""The Triton kernels beside plain PyTorch, on a GPU or, slowly, in Triton's interpreter; and what a GPU would run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quant_kernels
from model import rotary_angles, rotate
from quant import dequantize, levels, quantize_4bit, quantize_blockwise, quantize_layer, scales
from quant_kernels import suits_triton, triton_4bit, triton_decode
from runtime.optimizer import AdamW8bit, triton_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter, which is NumPy, has no bf16 products, and cuts bf16 off instead of rounding it.
ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("dtype", MATMUL_DTYPES, ids=str)
def test_decoding_equals_dequantize_to_the_bit(dtype):
    q = quantize_4bit(normal(37, 192, dtype=dtype))  # 111 blocks, not whole tiles
    decoded = triton_decode(q.packed, levels("nf4", q.packed.device), q.absmax, q.block, dtype)
    assert torch.equal(decoded.view(37, 192), dequantize(q))


@pytest.mark.parametrize("heads, size, turning", [(2, 20, 8), (32, 80, 32), (3, 8, 8)])
def test_one_token_a_row_is_rotated_in_one_launch(heads, size, turning):
    x = normal(5, 1, heads, size).transpose(1, 2)  # [B, H, 1, h]
    position = torch.tensor([[0], [1], [7], [100], [2047]], device=DEVICE)
    cos, sin = rotary_angles(position, turning, 10000.0, torch.float32)
    rotate_one = quant_kernels.rotate_one
    torch.testing.assert_close(rotate_one(x, cos, sin), rotate(x, cos, sin), rtol=0, atol=1e-6)
    assert torch.equal(rotate_one(x, cos, sin)[..., turning:], x[..., turning:])
    half = (t.bfloat16() for t in (x, cos, sin))
    torch.testing.assert_close(rotate_one(*half).float(), rotate(x, cos, sin), rtol=0.01, atol=0.05)


def test_which_matrices_have_a_kernel():
    """Rows of whole blocks, blocks of a power of two; the others are multiplied by plain PyTorch."""
    shapes = [(2560, 64), (10240, 256), (2560, 16), (2560, 96), (2560, 8), (100, 64)]
    assert [suits_triton(*shape) for shape in shapes] == [True, True, True, False, False, False]


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine on which Triton cannot run")
def test_where_triton_cannot_run_a_warning_says_so_once(monkeypatch, recwarn):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    program = "import torch, quant_kernels as k; print([k.triton_runs(torch.device('cpu')) for _ in range(2)])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[False, False]\n" and done.stderr.count("Triton does not run here") == 1


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


@pytest.mark.parametrize("shape", [(9, 512), (70, 77)], ids=str)  # rows of whole blocks; a last block that is short
def test_the_step_in_one_kernel_is_that_of_adamw8bit(shape):
    """Three steps, each from the same state, with gradients of all sizes, 0 and a block of zeros among them. The codes are
    equal. Scales and weights are equal but for the last bit: b m + (1 - b) g is rounded once in PyTorch, twice in NumPy."""
    plain = torch.nn.Parameter(normal(*shape).cpu())
    optimizer = AdamW8bit([plain], lr=0.01, weight_decay=0.1)
    for step in (1, 2, 3):
        state = {key: value.flatten().clone().to(DEVICE) for key, value in optimizer.state[plain].items()}
        w = plain.detach().flatten().clone().to(DEVICE)
        plain.grad = (normal(*shape, seed=step) * 10 ** normal(*shape, seed=9)).cpu()
        plain.grad.masked_fill_(normal(*shape, seed=step + 20).cpu() > 1, 0).view(-1)[256:512] = 0
        triton_step(w, plain.grad.flatten().to(DEVICE), state, step, **optimizer.param_groups[0])
        optimizer.step()
        torch.testing.assert_close(w.cpu(), plain.detach().flatten(), rtol=2.5e-7, atol=3e-7)
        for key in ("exp_avg", "exp_avg_sq"):
            codes, expected = state[key].cpu().int(), optimizer.state[plain][key].flatten().int()
            assert (codes - expected).abs().sum() <= (0 if DEVICE == "cpu" else 5), key  # a GPU's 1 / s is not exact
            scales, expected = state[f"{key}_absmax"].cpu(), optimizer.state[plain][f"{key}_absmax"].flatten()
            torch.testing.assert_close(scales, expected, rtol=2**-22, atol=0)


# Compiles the kernels for GPUs that need not be there, and prints what a program of each uses.
COMPILE = """
import subprocess, tempfile
from pathlib import Path
import triton, quant_kernels as ours
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

weights = {"packed": "*u8", "levels": "*fp32", "absmax": "*fp32", "x": "*bf16", "y": "*bf16", "out": "*bf16"}
moments = dict.fromkeys(["w", "g", *(f"{m}_{part}" for m in "mv" for part in ("scales", "levels", "midpoint"))], "*fp32")
moments |= dict.fromkeys([f"{m}_{part}" for m in "mv" for part in ("codes", "below")], "*u8")
moments |= dict.fromkeys("keep_m new_m keep_v new_v decay rate root eps".split(), "fp32")
kernels = [(ours._matvec, ours.MATVEC, 64, weights), (ours._decode, ours.DECODE, 64, weights)]
for kernel, sizes, block, types in [*kernels, (ours._adamw, ours.ADAMW, 256, moments)]:
    known = {"BLOCK": block, **sizes}
    warps = known.pop("num_warps")
    signature = {name: types.get(name, "constexpr" if name in known else "i32") for name in kernel.arg_names}
    whole = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in ("I", "n")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, known, aligned), target=target, options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(made.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            subprocess.run([tool, "--dump-resource-usage", file.name], check=True)
"""


def test_kernels_compile_for_gpus_within_their_registers():
    """An A100 or an H100 has 65,536 registers for up to 2,048 threads, 32 each; with 64, half of them fit, and that is
    enough to keep the memory busy. No value is spilled to the stack."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "REG:" in line]
    assert len(lines) == 6  # three kernels for two GPUs
    for line in lines:
        used = {what: int(size) for what, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        assert used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == 0 and used["SHARED"] <= 16384, line
