"""Weights survive the way to disk and back, in every form that is read; what cannot be read is an error with a name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hub_server import hub, hub_environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora import add_lora, base_directory, is_adapter
from model import Phi, PhiConfig
from runtime import weights
from runtime.files import InputError, read_json, write_json
from runtime.weights import fingerprint, resolve, save_tensors, stored_tensors

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(vocab_size=32, hidden_size=40, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@torch.no_grad()
def make_phi(seed=0):
    """A tiny Phi whose parameters, biases and LayerNorms too, are all different."""
    model, generator = Phi(PhiConfig(**TINY)), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.normal_(0, 0.2, generator=generator)
    return model


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    """A directory with config.json and model.safetensors of make_phi()."""
    directory = tmp_path / "saved"
    make_phi().save_pretrained(directory)
    return directory


def load_error(directory):
    with pytest.raises(InputError) as error:
        Phi.from_pretrained(directory)
    return str(error.value)


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


def edit_config(directory, **changes):
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **changes})


# -------------------------------------------------------------------------------------------------------- save and load


def test_what_is_saved_is_loaded_bit_for_bit(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    loaded = Phi.from_pretrained(saved)
    assert same_weights(loaded, make_phi()) and all(p.requires_grad for p in loaded.parameters())
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(loaded(tokens), make_phi()(tokens))


def test_names_and_shapes_are_those_of_the_hugging_face_checkpoint(saved):
    D, inner, V = 40, 24, 32
    layer = {
        "input_layernorm": [D],
        "self_attn.q_proj": [D, D],
        "self_attn.k_proj": [D, D],
        "self_attn.v_proj": [D, D],
        "self_attn.dense": [D, D],
        "mlp.fc1": [inner, D],
        "mlp.fc2": [D, inner],
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"model.final_layernorm": [D], "lm_head": [V, D]}
    expected = {"model.embed_tokens.weight": [V, D]}  # no bias; everything else has one
    expected |= {f"{name}.weight": shape for name, shape in shapes.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    assert {name: list(t.shape) for name, t in load_file(saved / "model.safetensors").items()} == expected


def test_config_comes_back_with_the_fields_that_the_network_does_not_use(tmp_path):
    raw = PhiConfig(**TINY, rope_theta=500.0).to_dict()
    raw |= {"resid_pdrop": 0.1, "eos_token_id": 50295, "torch_dtype": "float32"}
    model = Phi(PhiConfig.from_dict(raw))
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json") == raw
    assert Phi.from_pretrained(tmp_path).config == model.config


def test_dtype_is_converted_on_load(tmp_path):
    original = make_phi()
    make_phi().bfloat16().save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["torch_dtype"] == "bfloat16"
    assert same_weights(Phi.from_pretrained(tmp_path, dtype=torch.bfloat16), make_phi().bfloat16())
    wide = Phi.from_pretrained(tmp_path)  # float32, the default
    assert same_weights(wide, make_phi().bfloat16().float())
    assert max((a - b).abs().max() for a, b in zip(wide.parameters(), original.parameters())) < 2**-8  # |w| < 1
    wide.save_pretrained(tmp_path)
    assert same_weights(Phi.from_pretrained(tmp_path, dtype=torch.bfloat16), make_phi().bfloat16())


def test_several_shards_load_as_one(tmp_path, monkeypatch):
    model = make_phi()
    total = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr(weights, "SHARD_BYTES", total // 3)
    model.save_pretrained(tmp_path)
    index = read_json(tmp_path / "model.safetensors.index.json")
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) >= 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(model.state_dict()) and sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert all(sum(t.nbytes for t in load_file(tmp_path / file).values()) <= total // 3 for file in files)
    assert same_weights(Phi.from_pretrained(tmp_path), model)


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 40)
    save_tensors(tmp_path, {"large": torch.ones(100), "small": torch.zeros(4), "larger": torch.ones(200)})
    assert [(t.file.name, name) for name, t in stored_tensors(tmp_path).items()] == [
        ("model-00001-of-00003.safetensors", "large"),
        ("model-00002-of-00003.safetensors", "larger"),
        ("model-00003-of-00003.safetensors", "small"),
    ]


def test_a_shard_may_be_full_to_the_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 32)
    save_tensors(tmp_path, {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(1)})  # 16 + 16 bytes, then 4
    assert [(t.file.name, name) for name, t in stored_tensors(tmp_path).items()] == [
        ("model-00001-of-00002.safetensors", "a"),
        ("model-00001-of-00002.safetensors", "b"),
        ("model-00002-of-00002.safetensors", "c"),
    ]
    save_tensors(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_files_say_that_their_tensors_are_pytorch_s(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_a_save_that_fails_half_way_is_not_taken_for_a_whole_model(tmp_path, monkeypatch):
    """The second shard cannot be written. Without an index the first is not read, but the model saved before."""
    save_tensors(tmp_path, {"a": torch.zeros(100), "b": torch.zeros(100)})
    monkeypatch.setattr(weights, "SHARD_BYTES", 400)
    with pytest.raises(Exception, match="meta"):
        save_tensors(tmp_path, {"a": torch.ones(100), "b": torch.ones(100, device="meta")})
    assert [(t.file.name, name) for name, t in stored_tensors(tmp_path).items()] == [
        ("model.safetensors", "a"),
        ("model.safetensors", "b"),
    ]
    assert not load_file(tmp_path / "model.safetensors")["a"].any()


# ------------------------------------------------------------------------------------------- faults in the weights


def test_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("model.layers.1.mlp.fc1.bias"))
    assert load_error(saved) == f"{saved}: 1 tensors are missing, the first 'model.layers.1.mlp.fc1.bias'"


def test_so_are_faults_of_the_rows_that_a_model_is_filled_with(saved):
    """`Phi.fill` reads into memory that nobody has cleared: a tensor that is left out would stay what it happens to be."""

    def fill_error(edit):
        make_phi().save_pretrained(saved)
        path = edit_tensors(saved, edit)
        with pytest.raises(InputError) as error:
            weights.load_weights(make_phi(), saved)
        return str(error.value).removeprefix(str(path)).removeprefix(str(saved))

    model = make_phi(seed=1)
    weights.load_weights(model, saved)
    assert same_weights(model, make_phi())
    missing = fill_error(lambda tensors: tensors.pop("model.layers.1.mlp.fc1.bias"))
    assert missing == ": 1 tensors are missing, the first 'model.layers.1.mlp.fc1.bias'"
    unexpected = fill_error(lambda tensors: tensors.update({"model.layers.2.mlp.fc1.bias": torch.zeros(24)}))
    assert unexpected.startswith(": unexpected tensor 'model.layers.2.mlp.fc1.bias'")
    longer = fill_error(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(33, 40)}))
    assert longer == ": tensor 'lm_head.weight' has shape [33, 40], the config needs [32, 40]"


@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_whole_numbers_and_codes_are_not_taken_for_weights(saved, dtype, name):
    path = edit_tensors(saved, lambda tensors: tensors.update({"lm_head.bias": torch.zeros(32).to(dtype)}))
    assert load_error(saved) == f"{path}: tensor 'lm_head.bias' holds {name}, not floating-point weights"


def test_unexpected_tensor_is_named(saved):
    path = edit_tensors(saved, lambda tensors: tensors.update({"model.layers.2.mlp.fc1.bias": torch.zeros(24)}))
    assert load_error(saved).startswith(f"{path}: unexpected tensor 'model.layers.2.mlp.fc1.bias'")


def test_mis_shaped_tensor_is_named_with_both_shapes(saved):
    path = edit_tensors(saved, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(31, 40)}))
    assert load_error(saved) == f"{path}: tensor 'lm_head.weight' has shape [31, 40], the config needs [32, 40]"


@pytest.mark.parametrize("keep", [0, 4, 100, -1])  # nothing; half the length field; some of the header; all but a byte
def test_truncated_file_is_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert load_error(saved).startswith(f"{path}: not a whole safetensors file")


def test_shard_that_the_index_names_but_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    make_phi().save_pretrained(tmp_path)
    (shard,) = tmp_path.glob("model-00002-of-*.safetensors")
    shard.unlink()
    assert load_error(tmp_path) == f"{shard}: no such file"


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (None, '"weight_map" is missing, not dict'),
        (["model.safetensors"], '"weight_map" is list, not dict'),
        *(
            ({"a": name}, f"{name!r} is not the name of a safetensors file beside it")
            for name in ("../x", "a/x", "/etc/x", "..", "", 5)
        ),
    ],
)
def test_an_index_names_files_of_its_own_directory(saved, weight_map, reason):
    (saved / "model.safetensors").unlink()
    write_json(saved / weights.INDEX, {"weight_map": weight_map})
    assert load_error(saved) == f"{saved / weights.INDEX}: {reason}"


def test_which_tensors_are_the_models_has_one_answer(saved):
    single, other = saved / "model.safetensors", saved / "model-1.safetensors"
    other.write_bytes(single.read_bytes())
    write_json(saved / weights.INDEX, {"weight_map": {"a": other.name}})
    assert load_error(saved).startswith(f"{saved} holds model.safetensors and {weights.INDEX}; move the one away")
    single.rename(saved / "model-2.safetensors")
    write_json(saved / weights.INDEX, {"weight_map": {"a": other.name, "b": "model-2.safetensors"}})
    assert load_error(saved) == f"{saved / 'model-2.safetensors'}: tensor 'lm_head.bias' is in {other} too"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("meta", [True, False])
def test_a_tensor_that_is_not_finite_is_named(saved, value, meta):
    path = edit_tensors(saved, lambda tensors: tensors["model.layers.1.mlp.fc1.bias"][3:4].fill_(value))
    with pytest.raises(InputError) as error:
        Phi.from_pretrained(saved) if meta else weights.load_weights(make_phi(), saved)
    message = "tensor 'model.layers.1.mlp.fc1.bias' holds NaN or infinity; copy or download it again"
    assert str(error.value) == f"{path}: {message}"


def test_pickle_is_not_read(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    message = load_error(saved)
    assert message.startswith(f"{saved / 'model.safetensors'}: no such file") and "pytorch_model*.bin" in message


# -------------------------------------------------------------------------------------------- faults in the config


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'phi'"),
        ({"model_type": "phi3"}, "model_type is 'phi3', not 'phi'"),
        ({"model_type": None}, "model_type is None"),
        ({"qk_layernorm": True}, "qk_layernorm = True is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn' is not supported"),
        *(({"hidden_size": x}, f"hidden_size is {x}, not a positive number up to") for x in (2**40, -1, 40.0, True, None)),
        *(({"rope_theta": x}, "rope_theta is ") for x in (float("nan"), float("inf"), "10000", [], 1e300)),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, not a positive number up to 1,024"),
        ({"quantization_config": []}, '"quantization_config" is list, not dict | None'),
        ({"torch_dtype": 16}, '"torch_dtype" is int, not str | None'),
    ],
)
def test_config_that_is_not_computed_here_is_refused_by_file_and_field(saved, changes, reason):
    edit_config(saved, **changes)
    assert load_error(saved).startswith(f"{saved}/config.json: {reason}")


def test_default_rope_parameters_of_current_transformers_are_read(saved):
    raw = read_json(saved / "config.json")
    del raw["rope_theta"], raw["partial_rotary_factor"]
    for scaling in (None, {}):  # transformers' default share is one half
        assert PhiConfig.from_dict({**raw, "rope_scaling": scaling}).rotary_size == 10
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.4}
    config = PhiConfig.from_dict({**raw, "rope_parameters": rope})
    assert (config.rope_theta, config.rotary_size) == (500.0, 8)
    outer = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert PhiConfig.from_dict({**raw, **outer, "rope_parameters": rope}) == config  # as transformers 5 does


def test_sizes_that_do_not_divide_are_refused(saved):
    edit_config(saved, num_attention_heads=3)
    assert "do not divide" in load_error(saved)


def test_absent_config_is_named(saved):
    (saved / "config.json").unlink()
    assert load_error(saved) == f"{saved / 'config.json'}: no such file"


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./phi-2", "../phi-2", "/nowhere/phi-2"])
def test_neither_a_directory_nor_a_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        resolve(name)


def test_a_run_that_does_not_exist_is_looked_for_beside_the_others_and_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError) as error:
        resolve("out/demo-dpp")
    assert str(error.value) == f"out/demo-dpp: no such directory, looked for in {tmp_path}/out"


def test_a_file_is_no_model_and_a_directory_has_no_revision(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="saved/config.json: no such directory"):
        resolve("saved/config.json")  # two parts, as in a hub name
    assert resolve("saved") == Path("saved")
    with pytest.raises(InputError, match="--revision main makes no sense for the directory"):
        resolve(saved, revision="main")


# ------------------------------------------------------------------------------------------------------ whose adapters


def adapter_directory(directory, saved, **config):
    add_lora(Phi.from_pretrained(saved), 2).save_pretrained(directory)
    write_json(directory / "adapter_config.json", read_json(directory / "adapter_config.json") | config)
    return directory


def test_adapters_know_their_base(saved, tmp_path):
    assert not is_adapter(saved) and base_directory(saved) == saved
    adapters = adapter_directory(tmp_path / "adapters", saved)
    assert is_adapter(adapters) and base_directory(adapters) == saved


@pytest.mark.slow
def test_adapters_come_with_the_revision_of_the_base_that_they_were_trained_on(saved, tmp_path):
    """Of a base on the hub the commit that their config names is asked for, not the newest."""
    base = "owner/base"
    pinned = adapter_directory(tmp_path / "pinned", saved, base_model_name_or_path=base, revision="v9")
    newest = adapter_directory(tmp_path / "newest", saved, base_model_name_or_path=base, revision=None)
    with hub({base: saved}) as (endpoint, requests):
        result = load_from_hub(endpoint, tmp_path / "home", str(pinned), str(newest))
    assert result[str(pinned)].startswith(
        f"{pinned} holds adapters of {base}, and {base}: the repository has no revision 'v9'"
    )
    assert result[str(newest)] == make_phi().lm_head.weight.sum().item()
    asked = [path for path in requests if "/revision/" in path]
    assert any(path.endswith("/revision/v9") for path in asked) and any(path.endswith("/revision/main") for path in asked)
    local = adapter_directory(tmp_path / "local", saved, revision="v9")
    with pytest.raises(InputError, match=r"local holds adapters of .*--revision v9 makes no sense for the directory"):
        base_directory(local)


# ------------------------------------------------------------------------------------------------------------- the hub


def load_from_hub(endpoint, home, *names):
    """What Phi.from_pretrained makes of each name: {name: sum of lm_head.weight, or the InputError's text}; any other
    exception fails the test. In a process of its own: huggingface_hub reads its environment when it is imported."""
    script = """
import json, sys
from runtime.files import InputError
from model import Phi
results = {}
for name in sys.argv[1:]:
    repo, _, revision = name.partition("@")
    try:
        results[name] = Phi.from_pretrained(repo, revision=revision or None).lm_head.weight.sum().item()
    except InputError as error:
        results[name] = str(error)
print(json.dumps(results))"""
    environment = hub_environment(endpoint, home, offline=False)
    process = subprocess.run(
        [sys.executable, "-B", "-c", script, *names], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
def test_hub_model_is_downloaded_once_and_every_failure_is_an_input_error(saved, tmp_path):
    home = tmp_path / "home"
    total = make_phi().lm_head.weight.sum().item()
    for name in ("pytorch_model.bin", "README.md", "modeling_phi.py"):
        (saved / name).write_text("not wanted")

    answers = {"owner/tiny": saved, "owner/gated": (401, "GatedRepo"), "owner/private": (401, "RepoNotFound")}
    with hub(answers) as (endpoint, requests):
        result = load_from_hub(endpoint, home, "owner/tiny", "owner/tiny@v9", *list(answers)[1:], "owner/nothing")
    assert result["owner/tiny"] == total
    assert result["owner/tiny@v9"] == "owner/tiny: the repository has no revision 'v9'"
    assert result["owner/gated"].startswith("owner/gated: the repository asks for its terms to be accepted")
    for name in ("owner/private", "owner/nothing"):
        assert result[name].startswith(f"{name}: no such directory here and no such repository on the hub")
    fetched = {path.rpartition("/")[2] for path in requests if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}  # neither code nor a pickle

    result = load_from_hub(endpoint, home, "owner/tiny", "owner/other")  # the server is gone now
    assert result["owner/tiny"] == total  # the local copy
    offline = "no complete copy is here, and the hub cannot be reached or refuses; give a path"
    assert result["owner/other"] == f"owner/other: {offline}"


def test_a_second_save_in_the_same_directory_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    """From shards to one file and back: whatever a loader prefers, it finds the weights of the last save."""
    first, second = make_phi(seed=1), make_phi(seed=2)
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    first.save_pretrained(tmp_path)
    assert (tmp_path / weights.INDEX).exists()
    monkeypatch.undo()
    second.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]
    assert torch.equal(Phi.from_pretrained(tmp_path).lm_head.weight, second.lm_head.weight)
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    first.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(Phi.from_pretrained(tmp_path).lm_head.weight, first.lm_head.weight)


# -------------------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_tells_every_bit_and_every_name():
    def plain(*names):
        return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names}).requires_grad_(False)

    one, other = plain("a", "b"), plain("a", "b")
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
    other["b"].weight.view(torch.int32)[1, 1] ^= 1  # the last bit of the last weight
    assert fingerprint(one) != fingerprint(other)
    renamed = plain("a", "c")
    renamed["a"].weight.copy_(one["a"].weight)
    renamed["c"].weight.copy_(one["b"].weight)
    assert fingerprint(one) != fingerprint(renamed)


def test_codes_count_in_a_fingerprint(tiny):
    model = Phi.from_pretrained(tiny, base="nf4")
    before = fingerprint(model)
    model.model.layers[0].mlp.fc1.weight[0] ^= 1
    assert fingerprint(model) != before
