"""Quantized checkpoints: what is written is read back, whatever made it, and damage is named."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import quantize_checkpoint
from data import Example, collate
from generate import generate
from model import Phi, PhiConfig, completion_logprobs
from quant import CODES, FrozenLinear, Int8Linear, Linear4bit, dequantize, quantize_blockwise, quantize_layer, quantize_model
from runtime import weights
from runtime.files import InputError, read_json, write_json
from runtime.weights import INDEX, from_tensors, layer_from_tensors, layer_tensors, quantized_layers, to_tensors
from train import main

TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=96)
FORMATS = [
    ("int8", {}),
    ("llm.int8", {}),
    ("nf4", {}),
    ("nf4-double", {}),
    ("fp4", {"block": 128}),
    ("int4", {}),
    ("nf2", {"block": 256}),
]
IDS = torch.arange(40).view(2, 20)


def phi():
    model = Phi(PhiConfig(**TINY, partial_rotary_factor=0.5)).init_weights(0)
    for p in model.parameters():  # biases too, and large enough that rounding shows
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.fixture
def full(tmp_path):
    phi().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize(("to", "options"), FORMATS, ids=str)
@torch.no_grad()
def test_a_converted_checkpoint_is_the_quantized_model(full, tmp_path, to, options):
    expected = quantize_model(Phi.from_pretrained(full), to, **options)(IDS)
    quantize_checkpoint(full, tmp_path / "q", to, **options)
    model = Phi.from_pretrained(tmp_path / "q")
    assert torch.equal(model(IDS), expected) and not torch.equal(expected, phi()(IDS))
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    assert len(layers) == 12 and type(model.lm_head.weight) is torch.nn.Parameter
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(Phi.from_pretrained(tmp_path / "again")(IDS), expected)
    first, again = (json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in ("q", "again"))
    assert first == again


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_matrix_of_any_size_and_dtype_comes_back_from_its_tensors(code, dtype):
    """3 x 43 values: the last block is short, and so is the last byte."""
    w = torch.randn(3, 43, generator=torch.Generator().manual_seed(0)).to(dtype)
    for double in (False, True):
        q = quantize_blockwise(w, code, block=32, double=double)
        back = from_tensors(to_tensors(q), [3, 43])
        assert (back.code, back.block, back.shape, back.dtype) == (code, 32, (3, 43), dtype)
        assert dequantize(back).dtype == dtype and torch.equal(dequantize(back), dequantize(q))


def test_names_on_disk_are_those_of_bitsandbytes_where_it_knows_the_code():
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    plain = {"weight", "weight.absmax", "weight.quant_map"}
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    assert set(to_tensors(quantize_blockwise(w, "nf4"))) == plain | {"weight.quant_state.bitsandbytes__nf4"}
    assert set(to_tensors(quantize_blockwise(w, "int4"))) == plain | {"weight.quant_state.blockwise__int4"}
    doubled = to_tensors(quantize_blockwise(w.bfloat16(), "fp4", block=128, double=True))
    assert set(doubled) == plain | nested | {"weight.quant_state.bitsandbytes__fp4"}
    state = json.loads(bytes(doubled["weight.quant_state.bitsandbytes__fp4"].tolist()))
    assert state.pop("nested_offset") > 0
    assert state == {
        "quant_type": "fp4",
        "blocksize": 128,
        "dtype": "bfloat16",
        "shape": [4, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    names = ["a.fc.weight.quant_state.bitsandbytes__nf4", "a.fc.weight", "b.SCB", "c.weight"]
    assert quantized_layers(names) == ["a.fc", "b"]


def test_codes_in_words_of_another_type_and_scales_of_16_bits_are_read():
    """bitsandbytes may store the bytes as any type (bnb_4bit_quant_storage), so that FSDP can shard them with the rest."""
    q = quantize_blockwise(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), "nf4")
    tensors = to_tensors(q)
    stored = tensors | {"weight": q.packed.flatten().view(torch.bfloat16)[:, None], "weight.absmax": q.absmax.half()}
    back = from_tensors(stored, [4, 64])
    assert torch.equal(back.packed, q.packed) and back.absmax.dtype == torch.float32
    assert torch.equal(back.absmax, q.absmax.half().float())


@pytest.mark.parametrize(
    ("to", "options", "expected"),
    [
        (
            "nf4-double",
            {},
            {
                "quant_method": "bitsandbytes",
                "llm_int8_skip_modules": ["lm_head"],
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
            },
        ),
        ("fp4", {}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        ("nf4", {"block": 16}, {"quant_method": "blockwise", "code": "nf4", "block": 16}),  # bitsandbytes begins at 32
        ("int4", {}, {"quant_method": "blockwise", "code": "int4", "block": 64}),
        (
            "llm.int8",
            {},
            {
                "quant_method": "bitsandbytes",
                "llm_int8_skip_modules": ["lm_head"],
                "load_in_8bit": True,
                "llm_int8_threshold": 6.0,
                "weight_only": False,
            },
        ),
        ("int8", {}, {"llm_int8_threshold": 6.0, "weight_only": True}),
    ],
    ids=str,
)
def test_the_config_says_what_is_stored(tmp_path, to, options, expected):
    quantize_model(phi().bfloat16(), to, **options).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {name: config.get(name) for name in expected} == expected
    if "int8" in to:
        layer = Phi.from_pretrained(tmp_path).model.layers[0].mlp.fc1
        assert layer.threshold == (6.0 if to == "llm.int8" else None)


def test_a_config_goes_without_the_quantization_that_is_no_longer_there(full, tmp_path):
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    model = Phi.from_pretrained(tmp_path / "q")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FrozenLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features)
            plain.weight.data, plain.bias.data = layer.dense(), layer.bias.data
            model.set_submodule(name, plain)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(Phi.from_pretrained(tmp_path / "plain")(IDS), model(IDS))


def test_what_is_quantized_already_is_not_quantized_again(full, tmp_path):
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    with pytest.raises(InputError, match="q is stored quantized already; leave out --base int8"):
        Phi.from_pretrained(tmp_path / "q", base="int8")


@torch.no_grad()
def test_quantizing_while_reading_gives_the_quantized_model(full):
    model = Phi.from_pretrained(full, base="nf4")
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert torch.equal(model(IDS), quantize_model(phi(), "nf4")(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_what_is_not_quantized_takes_the_dtype_that_is_asked_for(full, tmp_path, dtype):
    quantize_checkpoint(full, tmp_path / "q", "nf4")
    model = Phi.from_pretrained(tmp_path / "q", dtype=dtype)
    assert model(IDS).dtype == dtype and model.model.layers[0].mlp.fc1.absmax.dtype == torch.float32


@torch.no_grad()
def test_a_quantized_output_layer_is_read_and_used(full, tmp_path):
    quantize_model(Phi.from_pretrained(full), "int8", skip=()).save_pretrained(tmp_path / "q")
    model = Phi.from_pretrained(tmp_path / "q")
    assert isinstance(model.lm_head, Int8Linear)
    assert torch.equal(model(IDS), quantize_model(Phi.from_pretrained(full), "int8", skip=())(IDS))
    batch = collate([Example([5, 6, 7], [[8, 9], [10]])])  # log-probabilities go through the rounded output layer too
    logits = model(torch.tensor([[5, 6, 7, 8, 9]])).log_softmax(-1)[0]
    expected = logits[2, 8] + logits[3, 9]
    torch.testing.assert_close(completion_logprobs(model, batch)[0], expected)
    assert len(generate(model, [[5, 6, 7]], 4)[0]) == 4


@torch.no_grad()
def test_shards_in_and_shards_out(full, tmp_path, monkeypatch):
    tensors, weight_map = load_file(full / "model.safetensors"), {}
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):  # a layer's weight and bias in different files
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, full / file)
        weight_map |= dict.fromkeys(part, file)
    (full / "model.safetensors").unlink()
    (full / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for most, count in ((weights.SHARD_BYTES, 1), (30_000, 4)):
        monkeypatch.setattr(weights, "SHARD_BYTES", most)
        quantize_checkpoint(full, tmp_path / "q", "nf4")
        files = list((tmp_path / "q").glob("*.safetensors"))
        assert len(files) == count and all(sum(t.nbytes for t in load_file(f).values()) <= most for f in files)
        assert torch.equal(Phi.from_pretrained(tmp_path / "q")(IDS), quantize_model(phi(), "nf4")(IDS))


# ----------------------------------------------------------------------------------------------------------------- damage


def damage(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


LAYER = "model.layers.0.mlp.fc1"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def change_state(tensors, **changes):
    text = json.dumps(json.loads(bytes(tensors[STATE].tolist())) | changes)
    tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)


STATES = [
    *({"dtype": value} for value in ("float31", "nn", "int64", 3)),
    *({"blocksize": value} for value in (0, -64, "64", 64.0, True, 10**30)),
    {"shape": 8192},
    {"quant_type": ["nf4"]},
    *({"nested_offset": value} for value in ("1", float("nan"), float("inf"))),
    {"nested_blocksize": "256"},
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight.absmax"), "incomplete or damaged"),
        (lambda t: t.pop(f"{LAYER}.weight"), "incomplete or damaged"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-8].clone()}), "incomplete or damaged"),
        (lambda t: t.update({f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"][1:].clone()}), "incomplete or damaged"),
        (lambda t: t.update({f"{LAYER}.weight.quant_map": torch.zeros(16)}), "not the table"),
        (lambda t: t.pop(f"{LAYER}.bias"), f"1 tensors are missing, the first '{LAYER}.bias'"),
        (lambda t: t.update({"model.layers.7.mlp.fc1.SCB": torch.zeros(3)}), "no such linear layer"),
        (lambda t: t.update({"model.embed_tokens.SCB": torch.zeros(3)}), "no such linear layer"),
        (lambda t: t.update({f"{LAYER}.weight.extra": torch.zeros(3)}), "weight.extra"),
        (lambda t: change_state(t, nested_blocksize=512), "quantized otherwise than in blocks of 256"),
        (lambda t: t.update({f"{LAYER}.weight.nested_quant_map": torch.zeros(256)}), "quantized otherwise than"),
        (lambda t: t.pop(f"{LAYER}.weight.nested_quant_map"), "incomplete or damaged"),
        (lambda t: t.update({f"{LAYER}.weight.nested_absmax": torch.ones(2)}), "incomplete or damaged"),
        (lambda t: change_state(t, nested_offset=None), "incomplete or damaged"),
        (lambda t: change_state(t, blocksize=32), "128 scales for 8192 values in blocks of 32"),
        (lambda t: change_state(t, blocksize=0), "in blocks of 0"),
        (lambda t: change_state(t, shape=[128, 32]), r"a matrix of \[128, 32\], the config needs \[128, 64\]"),
        (lambda t: change_state(t, quant_type="fp4"), "not the table of 'fp4'"),
        (lambda t: change_state(t, quant_type="nf5"), "not the table of 'nf5'"),
        *((lambda t, x=x: change_state(t, **x), "incomplete or damaged") for x in STATES),
        (lambda t: t.update({STATE: torch.tensor(list(b"[" * 9999), dtype=torch.uint8)}), "incomplete or damaged"),
        (lambda t: t.update({f"{LAYER}.weight.absmax": torch.ones(128)}), "incomplete or damaged"),
        (lambda t: t.update({STATE: torch.tensor(list(b"{"), dtype=torch.uint8)}), "incomplete or damaged"),
    ],
)
def test_damage_is_named(full, tmp_path, change, message):
    quantize_checkpoint(full, tmp_path / "q", "nf4-double")
    damage(tmp_path / "q", change)
    with pytest.raises(InputError, match=message) as error:
        Phi.from_pretrained(tmp_path / "q")
    assert re.match(re.escape(f"{tmp_path / 'q'}: ") + r".*model\.(layers\.[07]\.mlp\.fc1|embed_tokens)", str(error.value))


def test_a_layer_of_another_shape_is_an_error(full, tmp_path):
    quantize_checkpoint(full, tmp_path / "q", "int8")
    damage(tmp_path / "q", lambda t: t.update({f"{LAYER}.weight": torch.zeros(128, 32, dtype=torch.int8)}))
    with pytest.raises(InputError, match=r"holds a matrix of \[128, 32\], the config needs \[128, 64\]"):
        Phi.from_pretrained(tmp_path / "q")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "not in bitsandbytes' row format"),
        ({"weight": torch.zeros(24, 64)}, "not in bitsandbytes' row format"),
        ({"weight": None}, "not in bitsandbytes' row format"),
        ({"SCB": torch.ones(23)}, r"scales \[23\] float32 for \[24, 64\] codes"),
        ({"SCB": torch.ones(24, dtype=torch.int64)}, r"scales \[24\] int64"),
        ({"weight_format": torch.zeros(2)}, "not in bitsandbytes' row format"),
        ({"extra": torch.ones(3)}, "extra"),
        ({"weight": torch.zeros(24, 32, dtype=torch.int8)}, r"a matrix of \[24, 32\], the config needs \[24, 64\]"),
    ],
)
def test_int8_layers_that_are_damaged(changes, message):
    plain = torch.nn.Linear(64, 24)
    tensors = layer_tensors(quantize_layer(plain.weight, None, "int8"))
    assert torch.equal(layer_from_tensors(tensors, plain, {}).weight, tensors["weight"])
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        layer_from_tensors(tensors, plain, {})


def test_an_int8_checkpoint_without_a_threshold_has_bitsandbytes_own():
    plain = torch.nn.Linear(64, 24)
    tensors = layer_tensors(quantize_layer(plain.weight, None, "int8"))
    none = float("inf")  # by 0 bitsandbytes means that no value is an outlier
    for value, threshold in ((None, 6.0), (4.0, 4.0), (0.0, none), (0, none), (-1, none)):
        layer = layer_from_tensors(tensors, plain, {"llm_int8_threshold": value})
        assert layer.threshold == threshold
    assert layer_from_tensors(tensors, plain, {"weight_only": True}).threshold is None
    for settings in ({"llm_int8_threshold": "6"}, {"llm_int8_threshold": float("nan")}, {"weight_only": 1}):
        with pytest.raises(InputError, match='quantization_config: "(llm_int8_threshold|weight_only)" is'):
            layer_from_tensors(tensors, plain, settings)


def test_quantized_weights_need_a_config_that_says_so(full, tmp_path):
    """Without it int8 rows could be either kind, and quantizing would round codes once more."""
    quantize_checkpoint(full, tmp_path / "q", "int8")
    config = read_json(tmp_path / "q" / "config.json")
    for lost in ({}, {"quantization_config": None}):
        del config["quantization_config"]
        config |= lost
        write_json(tmp_path / "q" / "config.json", config)
        with pytest.raises(InputError, match=r'config.json: "quantization_config" is missing'):
            Phi.from_pretrained(tmp_path / "q")
        with pytest.raises(InputError, match="q is quantized already"):
            quantize_checkpoint(tmp_path / "q", tmp_path / "again", "nf4")
        config["quantization_config"] = None
    write_json(full / "config.json", config)  # null says that nothing is quantized, and nothing is
    quantize_checkpoint(full, tmp_path / "again", "nf4")


def test_no_outliers_stays_no_outliers(full, tmp_path):
    quantize_checkpoint(full, tmp_path / "q", "llm.int8")
    config = read_json(tmp_path / "q" / "config.json")
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    write_json(tmp_path / "q" / "config.json", config)
    Phi.from_pretrained(tmp_path / "q").save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json") == config


def test_nan_in_a_checkpoint_names_file_and_tensor_and_leaves_nothing_that_loads(full, tmp_path):
    damage(full, lambda t: t[f"{LAYER}.weight"].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(InputError, match=r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.fc1\.weight' holds NaN"):
        quantize_checkpoint(full, tmp_path / "q", "nf4")
    with pytest.raises(InputError):
        Phi.from_pretrained(tmp_path / "q")


# ------------------------------------------------------------------------------------------------------- the command line


def run(*flags):
    return main([str(flag) for flag in flags])


def test_the_quantize_stage(full, tmp_path, capsys):
    where = ("--model", full, "--out", tmp_path)
    assert run("--stage", "quantize", "--to", "nf4-double", *where) == 0
    out = capsys.readouterr().out
    assert " bits a weight, scales included\n" in out
    assert "this project's own" not in out
    assert run("--stage", "quantize", "--to", "int4", *where) == 0
    assert "int4 in this form is this project's own" in capsys.readouterr().out
    model = Phi.from_pretrained(tmp_path / "full-nf4-double")
    assert isinstance(model.model.layers[1].self_attn.dense, Linear4bit)
    assert run("--stage", "quantize", "--to", "nf4-double", *where) == 2  # never over an earlier run
    assert "--overwrite" in capsys.readouterr().err
    assert run("--stage", "quantize", "--to", "int8", "--model", tmp_path / "full-nf4-double", "--out", tmp_path) == 2
    assert "quantized already" in capsys.readouterr().err
