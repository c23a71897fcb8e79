"""Adapters: by hand, by identities, by gradients; then through the driver: what DPO measures from, resume, merge."""

import copy
import json
import shutil

import pytest
import torch
from rows import pair_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from data import Example, collate
from lora import LoraLinear, Origin, add_lora, load_lora, lora_layers, merge_lora
from model import Phi, completion_logprobs
from quant import FORMATS, Int8Linear, Linear4bit, linear_layers, quantize_layer, quantize_model
from runtime.files import InputError, read_json, write_jsonl
from runtime.runs import read_metrics, steps_saved, stored_settings
from runtime.weights import fingerprint
from train import load_to_tune, main


def batch():
    return collate([Example([5, 6, 7], [[8, 9], [10, 11, 12]]), Example([20, 21], [[22], [23, 24]])])


def stir(model, seed=0):
    """Gives every B values, as training would."""
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.05, generator=draw)
    return model


def logprobs(model):
    with torch.no_grad():
        return completion_logprobs(model, batch())


def test_an_adapter_by_hand():
    base = nn.Linear(2, 2)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, -0.5])
    layer = LoraLinear(base, rank=1, alpha=2.0)  # s = 2
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[10.0], [20.0]])
    # x = (3, 1): W x + b = (5.5, 12.5), A x = 2, s B A x = (40, 80)
    assert layer(torch.tensor([3.0, 1.0])).tolist() == [45.5, 92.5]
    assert layer.delta().tolist() == [[20.0, -20.0], [40.0, -40.0]]


def test_new_adapters_change_nothing_and_alone_are_trained(tiny):
    model = Phi.from_pretrained(tiny)
    before, size = logprobs(model), model.config.hidden_size
    add_lora(model, rank=4, alpha=8)
    torch.testing.assert_close(logprobs(model), before, rtol=0, atol=0)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    (layer,) = {
        layer.base.in_features: layer for layer in lora_layers(model).values() if layer.base.in_features == size
    }.values()
    assert (
        layer.lora_A.abs().max() <= size**-0.5 and layer.lora_A.std() > 0.4 * size**-0.5
    )  # uniform: 0.577 of its half-width
    assert sorted(n.rpartition(".")[2] for n in lora_layers(model)) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]


def test_targets_by_name(tiny):
    model = add_lora(Phi.from_pretrained(tiny), 2, targets="q_proj, fc2")
    assert sorted(n.rpartition(".")[2] for n in lora_layers(model)) == ["fc2", "q_proj"]
    with pytest.raises(InputError, match="no layer is called 'query'.*q_proj"):
        add_lora(Phi.from_pretrained(tiny), 2, targets="query")


def test_the_seed_draws_every_adapter_and_nothing_else_does(tiny):
    """Drawn from a generator of its own: the state of torch's, which --seed sets elsewhere, makes no difference."""
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(starts))
        layers = lora_layers(add_lora(Phi.from_pretrained(tiny), 4, seed=seed)).values()
        starts.append([layer.lora_A.detach() for layer in layers])
    first, again, other = starts
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    q, k, *_ = first
    assert q.shape == k.shape and not torch.equal(q, k)  # no two layers start alike either


def test_without_an_alpha_the_product_is_added_as_it_is():
    for alpha, scale in ((None, 1.0), (8, 2.0), (2, 0.5)):
        model = add_lora(nn.Sequential(nn.Linear(6, 5)), 4, alpha=alpha, targets="0")
        (layer,) = lora_layers(stir(model)).values()
        torch.testing.assert_close(layer.delta(), scale * layer.lora_B @ layer.lora_A)
        assert not layer.base.weight.requires_grad and not layer.base.bias.requires_grad


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "llm.int8"])  # which rounds activations too
def test_gradients_are_those_through_the_dequantized_weights(tiny, to):
    """QLoRA: the codes of W are not touched, yet A, B and all below W have the gradients that a dense W~ would give."""
    coded = Phi.from_pretrained(tiny, base=to)
    dense = Phi.from_pretrained(tiny)
    for name, layer in linear_layers(dense, ("lm_head",)):
        layer.weight.data = coded.get_submodule(name).dense()
    gradients = []
    for model in (coded, dense):
        stir(add_lora(model, 4, seed=1))
        completion_logprobs(model, batch()).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_quantizing_on_reading_gives_the_codes_of_quantizing_afterwards(tiny):
    read, afterwards = Phi.from_pretrained(tiny, base="nf4"), quantize_model(Phi.from_pretrained(tiny), "nf4")
    assert fingerprint(read) == fingerprint(afterwards)


@pytest.mark.parametrize("base", [None, "nf4", "int8"])
def test_merging_adds_the_product(tiny, base):
    model = stir(add_lora(Phi.from_pretrained(tiny, base=base), 4, alpha=8))
    separate, layers = logprobs(model), lora_layers(copy.deepcopy(model))
    assert not lora_layers(merge_lora(model))
    kind = {None: nn.Linear, "nf4": Linear4bit, "int8": Int8Linear}[base]
    assert all(isinstance(model.get_submodule(name), kind) for name in layers)
    for name, layer in layers.items():
        merged = model.get_submodule(name)
        if base is None:
            torch.testing.assert_close(merged.weight, layer.base.weight + 2 * layer.lora_B @ layer.lora_A)
        else:  # rounded once more: no further than half of the widest step off
            wanted = layer.base.dense() + layer.delta()
            error = (merged.dense() - wanted).abs().max() / wanted.abs().max()
            assert error <= (0.304 / 2 if base == "nf4" else 1 / 254) + 1e-6
    if base is None:
        torch.testing.assert_close(logprobs(model), separate, rtol=1e-5, atol=1e-4)


def test_a_bf16_weight_is_rounded_once_when_it_is_merged(tiny):
    """W + s B A is summed in fp32: s B A rounded to bf16 before would be a second rounding."""
    model = stir(add_lora(Phi.from_pretrained(tiny, dtype=torch.bfloat16), 4, alpha=8))
    differ = 0
    layers = lora_layers(copy.deepcopy(model))
    merge_lora(model)
    for name, layer in layers.items():
        merged, delta = model.get_submodule(name), layer.delta()
        assert merged.weight.dtype == torch.bfloat16 and delta.dtype == torch.float32
        assert torch.equal(merged.weight, (layer.base.weight.float() + delta).bfloat16())
        differ += (merged.weight != layer.base.weight + delta.bfloat16()).sum().item()
    assert differ  # so rounding twice would be seen


FORMS = [("int8", 64), ("llm.int8", 64), ("nf4-double", 64), ("nf4", 128), ("fp4", 32), ("nf2", 256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("to", "block"), FORMS)
def test_a_merged_layer_is_quantized_as_its_base_was(to, block, dtype):
    """Merging is quantizing W~ + s B A with the base's own settings, and its bias stays."""
    draw = torch.Generator().manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    plain[0].weight.data.normal_(0, 0.1, generator=draw)
    plain[0].bias.data.normal_(0, 0.1, generator=draw)
    bias = plain[0].bias.detach().clone()
    model = stir(add_lora(quantize_model(plain, to, block=block), 4, alpha=6, targets="0"))
    base, delta = model[0].base, model[0].delta()
    wanted = (base.dense().float() + delta).to(base.dense().dtype)
    expected = quantize_layer(wanted, base.bias, to, block)
    merge_lora(model)
    merged = model[0]
    assert type(merged) is type(base) and merged.extra_repr() == base.extra_repr()
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor)
    assert torch.equal(merged.bias, bias)
    assert getattr(merged, "threshold", None) == (6.0 if to == "llm.int8" else None)
    assert merged.dense().dtype == base.dense().dtype


def test_a_block_that_is_run_again_drops_the_same(tiny):
    """With gradient checkpointing, or the gradient would be that of another forward pass."""
    model, gradients = stir(add_lora(Phi.from_pretrained(tiny), 4, dropout=0.5)).train(), []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        loss = model(torch.arange(12)[None]).square().mean()
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_dropout_drops_in_training_steps_only():
    layer = LoraLinear(nn.Linear(64, 8), rank=4, alpha=4.0, dropout=0.5)
    nn.init.ones_(layer.lora_A), nn.init.ones_(layer.lora_B)
    x = torch.ones(1, 64)
    assert layer.training
    layer.eval()  # gradients or not
    assert torch.equal(layer(x), layer(x))
    adapter = (layer(x) - layer.base(x))[0, 0]
    layer.train()
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
    draws = torch.stack([(layer(x) - layer.base(x))[0, 0] for _ in range(400)])
    assert draws.std() > 0
    torch.testing.assert_close(draws.mean(), adapter, rtol=0.05, atol=0)  # what is kept is scaled up: the mean stays


def test_saved_and_read_again(tiny, tmp_path):
    model = stir(add_lora(Phi.from_pretrained(tiny, base="nf4"), 4, alpha=6, targets="q_proj,fc1"))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "base.json"]
    again = Phi.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(model) and again.origin == model.origin
    torch.testing.assert_close(logprobs(again), logprobs(model), rtol=0, atol=0)


def test_the_config_is_peft_s_and_every_setting_comes_back(tiny, tmp_path):
    model = stir(add_lora(Phi.from_pretrained(tiny), 4, alpha=6.5, targets="q_proj,fc1", dropout=0.25))
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny.resolve()),
        "revision": None,
        "r": 4,
        "lora_alpha": 6.5,
        "lora_dropout": 0.25,
        "target_modules": ["fc1", "q_proj"],
        "bias": "none",
    }
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    layers = ("self_attn.q_proj", "mlp.fc1")
    assert names == {f"base_model.model.model.layers.0.{n}.lora_{p}.weight" for n in layers for p in "AB"}
    again = Phi.from_pretrained(tmp_path)
    for layer in lora_layers(again).values():
        assert (layer.rank, layer.alpha, layer.dropout) == (4, 6.5, 0.25)
    trained = {name.rpartition(".")[2] for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    whole = add_lora(Phi.from_pretrained(tiny), 4, alpha=8)
    whole.origin = Origin("owner/model", "v2", None, tiny)
    whole.save_pretrained(tmp_path / "whole")
    config = read_json(tmp_path / "whole" / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/model", "v2")


def test_a_second_save_in_the_same_directory_forgets_the_format_of_the_first(tiny, tmp_path):
    """Or the second model's adapters would be read onto a base that they were not trained on."""
    stir(add_lora(Phi.from_pretrained(tiny, base="nf4"), 4)).save_pretrained(tmp_path)
    model = stir(add_lora(Phi.from_pretrained(tiny), 4))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "base.json").exists()
    assert fingerprint(Phi.from_pretrained(tmp_path)) == fingerprint(model)


def test_reading_other_values_into_adapted_layers_replaces_the_adapters(tiny, tmp_path):
    first, second = (stir(add_lora(Phi.from_pretrained(tiny), 4, seed=seed), seed) for seed in (1, 2))
    second.save_pretrained(tmp_path)
    load_lora(first, tmp_path)
    assert fingerprint(first) == fingerprint(second)
    assert not any(isinstance(layer.base, LoraLinear) for layer in lora_layers(first).values())


def broken(directory, **changes):
    config = read_json(directory / "adapter_config.json")
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return directory


OTHER_PRODUCT = """
    use_dora use_qalora use_bdlora fan_in_fan_out alora_invocation_tokens use_rslora alpha_pattern rank_pattern
    modules_to_save lora_bias target_parameters trainable_token_indices layer_replication arrow_config kasa_config""".split()
OTHER_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "unheard of", ["eva", 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: True}, f"not plain LoRA .{name}.") for name in OTHER_PRODUCT),
        ({"rank_pattern": {"fc1": 8}, "use_rslora": True}, "not plain LoRA .rank_pattern, use_rslora."),
        ({"a_setting_of_tomorrow": 1}, "not plain LoRA .a_setting_of_tomorrow."),
        ({"bias": "all"}, "not plain LoRA .bias."),
        ({"bias": "lora_only"}, "not plain LoRA .bias."),
        *(({"init_lora_weights": x}, "init_lora_weights .* changes the weights under") for x in OTHER_BASE),
        *(({"r": x}, '"r" is .*, not int') for x in ("4", 4.0, True, None)),
        *(({"lora_alpha": x}, '"lora_alpha" is .*, not int . float') for x in ("8", float("nan"), [])),
        ({"r": 0}, "r = 0, lora_dropout = 0.0 make no sense"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0 make no sense"),
        ({"r": 10**9}, "do not fit rank 1000000000"),
        ({"target_modules": ["fc1"]}, "fc2: target_modules in adapter_config.json and the tensors disagree"),
        ({"target_modules": ["fc1", 5]}, "fc2: target_modules in adapter_config.json and the tensors disagree"),
        ({"target_modules": {}}, '"target_modules" is dict, not list . str'),
        ({"peft_type": "IA3"}, "not plain LoRA .IA3"),
        ({"r": 5}, "do not fit rank 5"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "holds adapters of /nowhere/at/all.*no such directory"),
        ({"base_model_name_or_path": None}, '"base_model_name_or_path" is missing'),
        ({"revision": 5}, '"revision" is int, not str'),
    ],
)
def test_adapters_that_cannot_be_used_are_refused(tiny, tmp_path, changes, message):
    add_lora(Phi.from_pretrained(tiny), 4).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        Phi.from_pretrained(broken(tmp_path, **changes))


def test_settings_that_leave_the_product_as_it_is_are_read(tiny, tmp_path):
    model = stir(add_lora(Phi.from_pretrained(tiny), 4))
    model.save_pretrained(tmp_path)
    for start in (True, False, None, "gaussian", "orthogonal", "eva"):
        known = {"init_lora_weights": start, "eva_config": {"rho": 2.0}, "inference_mode": True, "megatron_core": "megatron"}
        assert fingerprint(Phi.from_pretrained(broken(tmp_path, **known, use_dora=False))) == fingerprint(model)


def test_a_model_and_adapters_in_one_directory_are_refused(tiny, tmp_path):
    """transformers would take the adapters and their base, another reader the model."""
    add_lora(Phi.from_pretrained(tiny), 4).save_pretrained(tmp_path)
    Phi.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds adapters .adapter_config.json. and a model .config.json.: move one"):
        Phi.from_pretrained(tmp_path)


def test_a_format_that_is_none_is_refused(tiny, tmp_path):
    add_lora(Phi.from_pretrained(tiny, base="nf4"), 4).save_pretrained(tmp_path)
    for value, message in ((["nf4"], '"format" is list, not str'), ("nf5", "there is no format 'nf5'")):
        (tmp_path / "base.json").write_text(json.dumps({"format": value}))
        with pytest.raises(InputError, match=f"base.json: {message}"):
            Phi.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_an_adapter_and_tensors_that_are_none_are_refused(tiny, tmp_path, part):
    add_lora(Phi.from_pretrained(tiny), 4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.model.layers.0.mlp.fc1.{part}.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(InputError, match=rf"mlp\.fc1 has half an adapter, only lora_{'BA'[part == 'lora_B']}"):
        Phi.from_pretrained(tmp_path)
    save_file({}, file)
    with pytest.raises(InputError, match="there are no tensors in it"):
        Phi.from_pretrained(tmp_path)
    others = (name.replace("lora_", "lora_magnitude_vector_"), "x", "base_model.model.lm_head.base_layer.weight")
    for other in (*others, "base_model.model.lm_head.lora_A.weight"):
        save_file(tensors | {other: torch.ones(3)}, file)
        with pytest.raises(InputError, match=f"tensor '{other}' F32: only A and B .* none of lm_head; merge them with PEFT"):
            Phi.from_pretrained(tmp_path)
    for value, message in ((tensors[name].long(), "I64: only A and B in floating"), (tensors[name] * float("nan"), "NaN")):
        save_file(tensors | {name: value}, file)
        with pytest.raises(InputError, match=f"tensor '{name}' .*{message}"):
            Phi.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        Phi.from_pretrained(tmp_path)


def test_a_cut_file_and_a_foreign_layer_are_refused(tiny, tmp_path):
    add_lora(Phi.from_pretrained(tiny), 4).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model has no such layer"):
        load_lora(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Phi.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------- through train.py


def dpo(out, model, name, *flags):
    rows = out / "pairs.jsonl"
    if not rows.exists():
        write_jsonl(rows, pair_rows(24))
    usual = "--batch-size 4 --micro-batch-size 4 --epochs 1 --eval-every 2 --lr 1e-3 --samples 2 --device cpu"
    limits = "--max-length 256 --max-prompt-length 128"
    files = f"--train {rows} --model {model} --out {out} --name {name}"
    return main(["--stage", "dpo", *f"{usual} {limits} {files}".split(), *flags])


LORA = ("--lora", "4", "--lora-alpha", "8", "--lora-dropout", "0.1")


@pytest.mark.slow
def test_a_run_leaves_adapters_and_the_base_alone(tiny, tmp_path, capsys):
    base = fingerprint(Phi.from_pretrained(tiny))
    assert dpo(tmp_path, tiny, "run", *LORA, "--base", "nf4") == 0
    printed = capsys.readouterr().out
    assert f"Reference: {tiny}, run once before training" in printed
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists() and (run / "tokenizer.json").exists()
    model = Phi.from_pretrained(run)
    assert all(isinstance(layer.base, Linear4bit) for layer in lora_layers(model).values())
    assert any(layer.lora_B.any() for layer in lora_layers(model).values())
    assert fingerprint(Phi.from_pretrained(tiny)) == base
    first, *_, last = [row for row in read_metrics(run) if "loss" in row]
    assert first["drift/absolute"] == 0 and last["drift/absolute"] > 0


@pytest.mark.slow
def test_the_reference_is_the_model_with_its_adapters(tiny, tmp_path, capsys):
    """The second run goes on with the first one's adapters. Its reference is the first run's model: at its first step no
    answer has drifted, which would not be so if the reference were the base, adapters off."""
    assert dpo(tmp_path, tiny, "sft", "--lora", "4") == 0
    assert dpo(tmp_path, tmp_path / "sft", "run", "--lora", "4") == 0
    assert f"Reference: {tmp_path}/sft with its adapters, not the model under them, run once" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run")[0]["drift/absolute"] <= 1e-4


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path):
    """With dropout: what is dropped follows from the seed and the step."""
    assert dpo(tmp_path, tiny, "whole", *LORA) == 0
    assert dpo(tmp_path, tiny, "cut", *LORA) == 0
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{steps_saved(tmp_path / 'cut')[-1]}")
    (tmp_path / "cut" / "results.json").unlink()
    assert main(["--stage", "dpo", "--out", str(tmp_path), "--name", "cut", "--resume"]) == 0
    losses = [[row["loss"] for row in read_metrics(tmp_path / n) if "loss" in row] for n in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert fingerprint(Phi.from_pretrained(tmp_path / "whole")) == fingerprint(Phi.from_pretrained(tmp_path / "cut"))


@pytest.mark.slow
def test_merging_onto_4_bits_moves_the_outputs_a_little(tiny, tmp_path, capsys):
    assert dpo(tmp_path, tiny, "run", *LORA, "--base", "nf4") == 0
    assert main(["--stage", "merge", "--model", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    merged = Phi.from_pretrained(tmp_path / "run-merged")
    assert not lora_layers(merged) and isinstance(merged.model.layers[0].mlp.fc1, Linear4bit)
    gap = (logprobs(merged) - logprobs(Phi.from_pretrained(tmp_path / "run"))).abs()
    assert 1e-3 < gap.max() < 1
    assert main(["--stage", "merge", "--model", str(tmp_path / "run-merged"), "--out", str(tmp_path), "--name", "x"]) == 2
    assert "holds no adapters" in capsys.readouterr().err


def adapters(tiny, directory, **options):
    """A directory with adapters of the tiny Phi and its tokenizer."""
    model = stir(add_lora(Phi.from_pretrained(tiny, **options), 4, alpha=8))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    return model


def merge(directory, out, *flags):
    return main(["--stage", "merge", "--model", str(directory), "--out", str(out), "--name", "merged", *map(str, flags)])


def test_a_merged_model_stands_alone_and_answers_as_the_adapters_did(tiny, tmp_path):
    """Its files are a whole model's, and nothing in them needs the base or the adapters any more."""
    model = adapters(tiny, tmp_path / "adapters")
    assert merge(tmp_path / "adapters", tmp_path) == 0
    run = tmp_path / "merged"
    assert {p.name for p in run.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "run.json",
        "results.json",
    }
    assert read_json(run / "results.json") == {"parent": str(tmp_path / "adapters")}
    assert read_json(run / "config.json")["torch_dtype"] == "float32"
    assert (run / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    merged = Phi.from_pretrained(run)
    torch.testing.assert_close(logprobs(merged), logprobs(model), rtol=1e-5, atol=1e-4)
    assert (logprobs(merged) - logprobs(Phi.from_pretrained(tiny))).abs().min() > 1e-4
    merge_lora(model)
    assert fingerprint(merged) == fingerprint(model)


def test_merging_keeps_the_dtype_that_the_base_is_stored_in(tiny, tmp_path):
    """fp32 files of a bf16 model would be twice as large, and tell nothing more."""
    half = tmp_path / "half"
    Phi.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(half)
    (half / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    model = adapters(half, tmp_path / "adapters", dtype=torch.bfloat16)
    assert merge(tmp_path / "adapters", tmp_path) == 0
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    merge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor)


@pytest.mark.slow
def test_merging_needs_neither_the_rows_of_training_nor_those_held_out(tiny, tmp_path):
    words = ["--stage", "merge", "--model", str(tmp_path / "run"), "--out", str(tmp_path), "--name"]
    assert dpo(tmp_path, tiny, "run", *LORA, "--max-steps", "1") == 0
    (tmp_path / "pairs.jsonl").unlink()
    (tmp_path / "run" / "held_out.jsonl").write_text("{\n")
    assert main([*words, "one"]) == 0
    (tmp_path / "run" / "held_out.jsonl").unlink()
    assert main([*words, "two"]) == 0
    assert fingerprint(Phi.from_pretrained(tmp_path / "one")) == fingerprint(Phi.from_pretrained(tmp_path / "two"))


def test_adapters_that_differ_from_what_is_asked_for_are_refused(tiny, tmp_path, capsys):
    """Going on with adapters keeps their rank, alpha, layers and number format."""
    adapters(tiny, tmp_path / "adapters", base="nf4")
    for flags, message in [
        (("--lora", "8"), "adapters with --lora 4, not 8. Give that, or merge them first: python train.py"),
        (("--lora", "4", "--lora-alpha", "4"), "adapters with --lora-alpha 8.0, not 4.0"),
        (("--lora", "4", "--lora-targets", "fc1"), "adapters with --lora-targets "),
        (("--lora", "4", "--base", "int8"), "holds adapters with --base nf4, not int8"),
    ]:
        assert dpo(tmp_path, tmp_path / "adapters", "bad", *flags, "--overwrite") == 2
        assert message in capsys.readouterr().err
    assert main(["--stage", "quantize", "--to", "nf4", "--model", str(tmp_path / "adapters"), "--out", str(tmp_path)]) == 2
    assert "--stage merge --model" in capsys.readouterr().err


@pytest.mark.slow
def test_without_lora_adapters_are_merged_and_everything_is_tuned(tiny, tmp_path, capsys):
    stir(add_lora(Phi.from_pretrained(tiny), 4)).save_pretrained(tmp_path / "adapters")
    assert dpo(tmp_path, tmp_path / "adapters", "full") == 0
    assert "holds adapters: merged" in capsys.readouterr().out
    assert (tmp_path / "full" / "model.safetensors").exists() and not (tmp_path / "full" / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_quantized_model_is_tuned_through_adapters(tiny, tmp_path, capsys):
    assert main(["--stage", "quantize", "--to", "nf4", "--model", str(tiny), "--out", str(tmp_path), "--name", "q"]) == 0
    assert dpo(tmp_path, tmp_path / "q", "run") == 2
    assert "add --lora 16" in capsys.readouterr().err
    assert dpo(tmp_path, tmp_path / "q", "run", "--lora", "4", "--overwrite") == 0
    model = load_to_tune(tmp_path / "run", stored_settings(tmp_path / "run"))
    assert model.origin.name == str((tmp_path / "q").resolve())
