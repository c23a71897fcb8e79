"""Beside bitsandbytes: codes, scales, layers, and checkpoints that each reads from the other.

bitsandbytes has several implementations of the same function. Its CUDA kernels are what its users run and what is matched
here: w / absmax is w times 1 / absmax everywhere. On the CPU, where these tests run, it differs in four places:
  - a last, short 4-bit block is divided instead of multiplied (a code could differ where w / absmax lies within one
    rounding of a midpoint; in these tensors none does), and its scale is at least 1e-38, which shows if it is all zeros;
  - its C++ kernel of the 8-bit map takes the neighbouring code for about 1 in 700 values near a midpoint (never a nearer
    one); for fp64 input it searches all levels, as its GPU backends do, and that is what is compared;
  - its C++ kernel that decodes 4 bits takes wrong scales in matrices whose rows are not whole blocks (version 0.50.2), so
    matrices here have rows of whole blocks, as Phi-2's do;
  - evaluation on a CPU with AVX512-BF16 multiplies in bf16; in training mode it does not, so layers are compared there.
"""

import json
import logging

import bitsandbytes as bnb
import bitsandbytes.functional as peer
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_model import VOCABULARY
from test_model import peer as random_phi

import quant
from convert import quantize_checkpoint
from model import Phi
from quant import (
    FORMATS,
    dequantize,
    dynamic_map,
    llm_int8,
    quantize_blockwise,
    quantize_int8,
    quantize_layer,
    quantize_model,
)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 63, 64, 65, 127, 128, 1000, 4097, 40_960, 65_569]


def normal(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 256])
def test_nf4_bytes_and_scales_are_identical(dtype, block):
    for seed, size in enumerate(SIZES * 3):
        w = normal(size, seed=seed).to(dtype)
        packed, state = peer.quantize_4bit(w, blocksize=block, quant_type="nf4")
        q = quantize_blockwise(w, "nf4", block)
        assert torch.equal(q.packed, packed) and torch.equal(q.absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_values_are_identical(code, dtype):
    """Values, for FP4's two zeros have different codes."""
    for seed, shape in enumerate([(64, 128), (5, 640), (10, 3, 64), (1001,)]):
        w = normal(*shape, seed=seed).to(dtype)
        theirs = peer.dequantize_4bit(*peer.quantize_4bit(w, quant_type=code))
        assert torch.equal(dequantize(quantize_blockwise(w, code)), theirs)


def test_the_dynamic_map_is_identical():
    assert torch.equal(dynamic_map(), peer.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blockwise_8bit(dtype):
    w = normal(65_569).to(dtype)
    q = quantize_blockwise(w, "dynamic8", block=256)
    exact, absmax = torch.ops.bitsandbytes.quantize_blockwise(w.double(), dynamic_map(), 256)
    assert torch.equal(q.absmax, absmax)
    apart = (q.packed[:, 0] != exact).nonzero()[:, 0]  # 16-bit values that lie midway between two levels
    assert len(apart) < 0.001 * len(w) and (dtype != torch.float32 or len(apart) == 0)
    scaled = w.float() / absmax.repeat_interleave(256)[: len(w)]
    ours, theirs = ((scaled - dynamic_map()[c.long()]).abs()[apart] for c in (q.packed[:, 0], exact))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    fast, _ = peer.quantize_blockwise(w, blocksize=256)
    assert (q.packed[:, 0] != fast).float().mean() < 0.003
    ours, theirs = ((scaled - dynamic_map()[c.long()]).abs() for c in (q.packed[:, 0], fast))
    assert (ours <= theirs + 1e-6).all()


@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_double_quantization_is_identical(code):
    for seed, size in enumerate([4096, 65_536, 640_000]):
        w = normal(size, seed=seed)
        _, state = peer.quantize_4bit(w, quant_type=code, compress_statistics=True)
        q = quantize_blockwise(w, code, double=True)
        assert q.offset == state.offset and torch.equal(q.nested_absmax, state.state2.absmax)
        once = quantize_blockwise(w, code).absmax
        exact, _ = torch.ops.bitsandbytes.quantize_blockwise((once - once.mean()).double(), dynamic_map(), 256)
        assert torch.equal(q.absmax, exact)
        state.absmax = q.absmax  # their decoding of our codes
        assert torch.equal(quant.scales(q), peer.dequantize_blockwise(q.absmax, state.state2) + state.offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_and_scales_are_identical(dtype):
    for seed, shape in enumerate([(96, 160), (7, 33), (1, 5), (64, 2560)]):
        w = normal(*shape, seed=seed).to(dtype)
        codes, scale = quantize_int8(w)
        theirs, absmax, _ = peer.int8_vectorwise_quant(w)
        assert torch.equal(codes, theirs) and torch.equal(scale, absmax)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_layers_give_the_same_output(threshold):
    """Inputs that fp16 holds exactly, since bitsandbytes converts them. Its 1 / 127^2 is 6.200124e-05, off by 1.8e-5."""
    w, x = normal(96, 160).half().float(), (20 * normal(2, 12, 160, seed=1)).half().float()
    x[0, 3, 7], x[1, 5, 100] = 20.0, -8.0  # outliers
    theirs = bnb.nn.Linear8bitLt(160, 96, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict({"weight": w, "bias": normal(96)})
    theirs = theirs.to("cpu").eval()
    ours = quantize_layer(w, normal(96), "llm.int8")
    ours.threshold = threshold or float("inf")
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 3e-5
        half = x.half()
        assert relative(ours(half), theirs(half)) < 1e-3  # fp16 rounding of the sums
    assert relative(llm_int8(x, ours.weight, ours.SCB, 6.0), x @ w.T) < 0.02


@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_4bit_layers_give_the_same_output_and_gradient(code):
    w, bias, x = normal(96, 192), normal(96, seed=1), normal(12, 192, seed=2)
    theirs = bnb.nn.Linear4bit(192, 96, quant_type=code, compress_statistics=False)
    theirs.load_state_dict({"weight": w, "bias": bias})
    theirs = theirs.to("cpu").train()
    ours = quantize_layer(w, bias, code)
    outputs, gradients = [], []
    for layer in (ours, theirs):
        x = x.detach().requires_grad_()
        outputs.append(layer(x))
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
    assert relative(*outputs) < 1e-6 and relative(*gradients) < 1e-6


# ----------------------------------------------------------------------------------------------------------- checkpoints

KINDS = {  # a format here, and the same for bitsandbytes
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "llm.int8": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A random Phi saved by transformers, without dropout, so that training mode computes the same."""
    directory = tmp_path_factory.mktemp("full")
    model = random_phi(hidden_size=128, num_attention_heads=4, partial_rotary_factor=0.5)
    model.config.resid_pdrop = 0.0
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def their_logits(model, ids, kind):
    """In training mode for 4 bits, see above; LLM.int8() is what evaluation runs."""
    model.train(mode="int8" not in kind)
    return model(ids).logits


def ids():
    return torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in FORMATS])
def test_transformers_and_bitsandbytes_read_ours(full, tmp_path, kind):
    quantize_checkpoint(full, tmp_path, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs.model.layers[0].mlp.fc1) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    ours = Phi.from_pretrained(tmp_path)(ids())
    # bitsandbytes rounds the activations to fp16 before it rounds them to int8: some codes move by one.
    assert relative(ours, their_logits(theirs, ids(), kind)) < (5e-3 if kind == "llm.int8" else 1e-6)


def test_weight_only_int8_is_what_bitsandbytes_computes_in_training(full, tmp_path):
    quantize_checkpoint(full, tmp_path, "int8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    with torch.no_grad():
        assert relative(Phi.from_pretrained(tmp_path)(ids()), theirs(ids()).logits) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_ours_reads_what_transformers_and_bitsandbytes_write(full, tmp_path, kind):
    config = transformers.BitsAndBytesConfig(**KINDS[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(full, quantization_config=config)
    theirs.save_pretrained(tmp_path)
    ours = Phi.from_pretrained(tmp_path)
    assert isinstance(ours.model.layers[0].mlp.fc1, quant.FrozenLinear)
    assert relative(ours(ids()), their_logits(theirs, ids(), kind)) < (5e-3 if kind == "llm.int8" else 1e-6)
    if kind == "nf4":  # and what we write of it is byte for byte what they wrote
        ours.save_pretrained(tmp_path / "again")
        again, first = load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "model.safetensors")
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first if ".quant_state." not in name)


def test_ours_equals_theirs_on_quantized_weights(full):
    """quantize_model on a loaded model, and their quantization while loading."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(full, quantization_config=config)
    ours = quantize_model(Phi.from_pretrained(full), "nf4")
    assert relative(ours(ids()), their_logits(theirs, ids(), "nf4")) < 1e-6


def test_transformers_refuses_our_own_formats(full, tmp_path):
    quantize_checkpoint(full, tmp_path, "int4")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "blockwise" and "own format" in config["note"]
    with pytest.raises(Exception):  # noqa: B017 (its kind changes with transformers' versions)
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
