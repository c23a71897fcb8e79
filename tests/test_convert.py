"""A checkpoint in, a quantized one out: what its config, its account and its files say, and what is left as it was."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert import quantize_checkpoint, quantized_summary, stored_dtype
from model import Phi, PhiConfig
from quant import Int8Linear
from runtime import weights
from runtime.files import InputError, read_json, write_json
from runtime.weights import INDEX

# Of each of the 2 blocks q, k, v, dense [64, 64] and fc1, fc2 [128, 64]: 32,768 weights.
SHAPE = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
WEIGHTS = 2 * (4 * 64 * 64 + 2 * 128 * 64)


def phi(**other):
    model = Phi(PhiConfig(**SHAPE, partial_rotary_factor=0.5, other=other)).init_weights(0)
    for p in model.parameters():
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.fixture
def full(tmp_path):
    phi().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def stored(directory):
    """All tensors of a checkpoint, whatever files they are in."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bytes_of(directory):
    return sum(tensor.nbytes for tensor in stored(directory).values())


# ------------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize("to", ["nf4", "nf4-double"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_config_says_to_transformers_what_there_is(tmp_path, to, dtype):
    phi(resid_pdrop=0.1, eos_token_id=95).to(getattr(torch, dtype)).save_pretrained(tmp_path / "full")
    before = read_json(tmp_path / "full" / "config.json")
    quantize_checkpoint(tmp_path / "full", tmp_path / "q", to)
    config = read_json(tmp_path / "q" / "config.json")
    assert config.pop("quantization_config") == {
        "quant_method": "bitsandbytes",
        "llm_int8_skip_modules": ["lm_head"],
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": to == "nf4-double",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
    assert config == before and config["torch_dtype"] == dtype  # all else as it was


@pytest.mark.parametrize(("to", "threshold"), [("int8", None), ("llm.int8", 6.0)])
def test_the_config_of_int8_says_how_the_activations_are_rounded(full, tmp_path, to, threshold):
    """bitsandbytes rounds them in any case; a file that it reads must name its threshold."""
    quantize_checkpoint(full, tmp_path / "q", to)
    assert read_json(tmp_path / "q" / "config.json")["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "llm_int8_skip_modules": ["lm_head"],
        "load_in_8bit": True,
        "llm_int8_threshold": 6.0,
        "weight_only": threshold is None,
    }
    layers = [layer for layer in Phi.from_pretrained(tmp_path / "q").modules() if isinstance(layer, Int8Linear)]
    assert len(layers) == 12 and {layer.threshold for layer in layers} == {threshold}


# ------------------------------------------------------------------------------------------------------------- the account


def test_the_account_in_words(tmp_path):
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    did = {"bytes before": 42_000_000, "bytes after": 7_160_000, "bits per weight": 4.128}
    told = quantized_summary(tmp_path, "nf4-double", did)
    assert told.startswith("42.0 MB -> 7.2 MB; 4.13 bits a weight, scales included\n")


@pytest.mark.parametrize(
    ("to", "options", "coded"),
    [
        ("int8", {}, WEIGHTS + 2 * 4 * (4 * 64 + 128 + 64)),  # a byte, an fp32 scale a row
        ("nf4", {}, WEIGHTS // 2 + WEIGHTS // 64 * 4),  # half a byte, an fp32 scale for each 64
        ("int4", {"block": 32}, WEIGHTS // 2 + WEIGHTS // 32 * 4),
    ],
)
def test_the_account_is_that_of_the_files(full, tmp_path, to, options, coded):
    done = quantize_checkpoint(full, tmp_path / "q", to, **options)
    assert done["bytes before"] == (full / "model.safetensors").stat().st_size
    assert done["bytes after"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert done["bits per weight"] == 8 * coded / WEIGHTS
    # The file has more of each layer: a byte that names the format of int8, or the table, 16 x 4 bytes, and some JSON.
    more = [t for n, t in stored(tmp_path / "q").items() if re.search(r"weight_format|quant_map|quant_state", n)]
    assert bytes_of(tmp_path / "q") == bytes_of(full) - 4 * WEIGHTS + coded + sum(t.nbytes for t in more)


# --------------------------------------------------------------------------------------------------------------- the files


def test_all_but_the_matrices_is_copied_bit_for_bit(full, tmp_path):
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    before, after = stored(full), stored(tmp_path / "q")
    kept = {n for n in before if not (n.startswith("model.layers.") and n.endswith(".weight") and "layernorm" not in n)}
    assert len(kept) == len(before) - 12 and "lm_head.weight" in kept
    for name in kept:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])
    with safe_open(tmp_path / "q" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "q" / INDEX).exists()


def test_the_tokenizer_travels_along_and_nothing_else(full, tmp_path):
    travels = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    travels |= {"generation_config.json", "chat_template.jinja"}
    for name in travels | {"README.md", "state.json", "optimizer.safetensors"}:
        (full / name).write_text(name)
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    assert {p.name for p in (tmp_path / "q").iterdir()} == travels | {"config.json", "model.safetensors"}
    assert all((tmp_path / "q" / name).read_text() == name for name in travels)


def test_the_index_maps_every_tensor_to_its_file(full, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    index = read_json(tmp_path / "q" / INDEX)
    files = {p.name: set(load_file(p)) for p in (tmp_path / "q").glob("*.safetensors")}
    assert len(files) > 2
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_size"] == bytes_of(tmp_path / "q")


W, B = "model.layers.1.mlp.fc1.weight", "model.layers.1.mlp.fc1.bias"
FAULTS = {
    "2 tensors are missing, the first 'model.layers.1.mlp.fc1.weight'": lambda t: {k: t[k] for k in t if k not in (W, B)},
    "unexpected tensor 'more'": lambda t: t | {"more": torch.ones(3)},
    f"tensor '{W}' has shape": lambda t: t | {W: t[W][:-1].clone()},
    "tensor 'model.embed_tokens.weight' has shape [95, 64], the config needs [96, 64]": lambda t: (
        t | {"model.embed_tokens.weight": torch.ones(95, 64)}
    ),
    f"tensor '{W}' holds I8": lambda t: t | {W: t[W].char()},
    f"tensor '{W}' holds F8_E5M2": lambda t: t | {W: t[W].to(torch.float8_e5m2)},
    f"tensor '{W}' holds NaN": lambda t: t | {W: t[W] * float("nan")},
    f"tensor '{B}' holds NaN or infinity": lambda t: t | {B: t[B] + float("inf")},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_checkpoint_with_a_fault_is_refused_and_what_was_written_does_not_load(full, tmp_path, message):
    save_file(FAULTS[message](load_file(full / "model.safetensors")), full / "model.safetensors")
    with pytest.raises(InputError, match=re.escape(message)):
        quantize_checkpoint(full, tmp_path / "q", "nf4")
    assert not (tmp_path / "q" / "config.json").exists()


@pytest.mark.parametrize("told", ["float16", "int8", "nonsense", None])
def test_the_dtype_is_that_of_the_tensors_whatever_the_config_says(full, tmp_path, told):
    """2^20 is infinite in fp16."""
    config, tensors = read_json(full / "config.json"), load_file(full / "model.safetensors")
    write_json(full / "config.json", config | {"torch_dtype": told})
    tensors["lm_head.bias"].fill_(2.0**20)
    save_file(tensors, full / "model.safetensors")
    assert stored_dtype(full) == torch.float32
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    assert (
        read_json(tmp_path / "q" / "config.json")["torch_dtype"] == "float32"
        and stored_dtype(tmp_path / "q") == torch.float32
    )
    assert torch.equal(stored(tmp_path / "q")["lm_head.bias"], tensors["lm_head.bias"])
    save_file({name: t.bfloat16() for name, t in tensors.items()}, full / "model.safetensors")
    quantize_checkpoint(full, tmp_path / "q", "nf4")  # whose scales are fp32
    assert stored_dtype(full) == stored_dtype(tmp_path / "q") == torch.bfloat16
    tensors["lm_head.bias"] = tensors["lm_head.bias"].half()
    save_file(tensors, full / "model.safetensors")
    assert stored_dtype(full) == torch.float32
