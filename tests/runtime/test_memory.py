"""Estimated memory: Phi-2 by hand, codes to the byte, real steps within 15%; and what a run that cannot fit is told."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rows import pair_rows

from data import Example
from model import Phi, PhiConfig, add_lora
from quant import FORMATS
from runtime import fits
from runtime.checks import resolve
from runtime.files import InputError, read_json, write_jsonl
from runtime.fits import check_fits
from runtime.memory import (
    CONTEXT,
    Load,
    adapter_parameters,
    coded_bytes,
    estimate,
    kept_bytes,
    largest_load,
    longest_load,
    moment_bytes,
    parameters,
    trained_shapes,
    weight_bytes,
)
from runtime.settings import PRESETS, Config
from train import main

ROOT = Path(__file__).resolve().parents[2]
PHI2 = PhiConfig()


def settings(**flags) -> Config:
    """A complete config on the CPU."""
    return resolve(Config(train="x.jsonl", device="cpu", **flags), {*flags, "train", "device"})


def test_phi_2_by_hand():
    # Embedding 51,200 x 2,560; output layer the same with 51,200 biases; 33 LayerNorms of 2 x 2,560; 32 blocks of
    # 4 x (2,560 x 2,560 + 2,560) + (2,560 x 10,240 + 10,240) + (10,240 x 2,560 + 2,560).
    block = 4 * (2560 * 2560 + 2560) + 2560 * 10240 + 10240 + 10240 * 2560 + 2560
    assert parameters(PHI2) == 2 * 131_072_000 + 51_200 + 33 * 5_120 + 32 * block == 2_779_683_840
    full = settings(stage="sft", micro_batch_size=1, batch_size=2)
    held = estimate(PHI2, full, Load(1, 8, 8, masked=False, several=True))
    assert held["weights"] + held["gradients"] + held["AdamW's moments"] == 16 * 2_779_683_840  # 44.5 GB
    # rank 16: 16 x (4 x (2,560 + 2,560) + 2 x (2,560 + 10,240)) a block
    assert adapter_parameters(PHI2, settings(lora=16)) == 32 * 16 * (4 * 5120 + 2 * 12800) == 23_592_960
    nf4 = weight_bytes(PHI2, settings(lora=16, base="nf4", dtype="bf16"))
    matrices = 32 * (4 * 2560**2 + 2 * 2560 * 10240)
    assert nf4 == matrices // 2 + 4 * matrices // 64 + 2 * (parameters(PHI2) - matrices) + 4 * 23_592_960  # 2.04 GB


@pytest.mark.parametrize("to", FORMATS)
def test_quantized_weights_to_the_byte(tiny, to):
    model = add_lora(Phi.from_pretrained(tiny, base=to), 4)
    held = sum(t.nbytes for t in model.state_dict().values())
    assert held == weight_bytes(model.config, settings(lora=4, base=to))


def test_moments_by_hand():
    eight = settings(stage="sft", optimizer="adamw8bit")
    assert moment_bytes((2560, 10240), eight) == 2 * (2560 * 10240 + 4 * 102_400)  # a scale for each 256
    assert moment_bytes((10240,), eight) == 8 * 10240  # vectors stay in fp32
    assert coded_bytes(4, 8, "int8") == 32 + 16 and coded_bytes(4, 32, "nf4") == 64 + 8
    assert sum(n * torch.Size(s).numel() for n, s in trained_shapes(PHI2, eight)) == 2_779_683_840


# One token of a block with D = 8, two heads of 4 of which one has keys and values (K h = 4), I = 32.
BLOCK = PhiConfig(16, 8, 32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        # fp32, everything trained. x 8 + q 8, k 4, v 4 + attention's output 8 + fc1's output 32, 4 bytes each; 2 heads'
        # statistics, 4 bytes each; inputs: q, k, v and fc1 share one of 8; dense on the CPU has its own of 8; fc2 32.
        (dict(), 4 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 4 * (8 + 8 + 32)),
        (dict(device="cuda"), 4 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 4 * (8 + 32)),  # dense's is attention's output
        # Autocast over fp32 weights: x stays 4 bytes on the CPU, the rest has 2, and each of the four casts LN(x) itself.
        (dict(dtype="bf16"), 4 * 8 + 2 * (8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * (4 * 8 + 8 + 32)),
        # Adapters of rank 3 on 16-bit weights: 2 bytes everywhere. The adapted layers keep their inputs, and r each for B.
        (
            dict(lora=3, base="bf16", dtype="bf16", lora_targets="fc2"),
            2 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * 32 + 2 * 3,
        ),
        (
            dict(lora=3, base="bf16", dtype="bf16", lora_targets="q_proj,v_proj"),
            2 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * 8 + 2 * 3 * 2,
        ),
        (
            dict(lora=3, base="bf16", dtype="bf16", lora_targets="dense"),
            2 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * 8 + 2 * 3,
        ),
        (
            dict(lora=3, base="bf16", dtype="bf16"),
            2 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * (8 + 8 + 32) + 2 * 3 * 6,
        ),
        # With dropout every adapted layer has its own input, and the factors that it was multiplied with.
        (
            dict(lora=3, base="bf16", dtype="bf16", lora_targets="q_proj,fc1,fc2", lora_dropout=0.1),
            2 * (8 + 8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * (2 * 8 + 32) + 2 * 3 * 3 + 2 * (8 + 8 + 32),
        ),
        # CUDA: the LayerNorms of autocast are fp32, and a byte a value says what was dropped.
        (
            dict(lora=3, base="bf16", dtype="bf16", lora_targets="q_proj,fc1,fc2", lora_dropout=0.1, device="cuda"),
            4 * 8 + 2 * (8 + 4 + 4 + 8 + 32) + 4 * 2 + 2 * (2 * 8 + 32) + 2 * 3 * 3 + (8 + 8 + 32),
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) or "fp32" if isinstance(value, dict) else "",
)
def test_what_a_block_keeps_of_a_token_by_hand(flags, value):
    flags = dict(flags)
    device = flags.pop("device", "cpu")
    config = replace(settings(stage="sft", **flags), device=device)
    assert kept_bytes(BLOCK, config, Load(1, 1, 1, masked=False, several=False)) == value
    assert kept_bytes(BLOCK, config, Load(3, 5, 1, masked=False, several=False)) == 15 * value


def saved_by_autograd(model, run) -> int:
    """Bytes of the storages, but the parameters', that a forward pass leaves to the backward pass."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = run()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("targets", [None, "fc2", "q_proj,v_proj", "dense,fc1"])
def test_what_a_block_keeps_is_what_autograd_saves(targets):
    """Of one block more, in whole models of two and of three: what the rest keeps is the same. Left: the two numbers of a
    LayerNorm for each token, which the estimate leaves out."""
    flags = dict(lora=4, lora_targets=targets) if targets else {}
    config, kept = settings(stage="sft", **flags), []
    tokens = torch.arange(2 * 48).view(2, 48)
    for layers in (2, 3):
        phi = PhiConfig(128, 64, 256, num_hidden_layers=layers, num_attention_heads=4, partial_rotary_factor=0.5)
        model = Phi(phi).init_weights(0)
        if targets:
            add_lora(model, 4, targets=targets)
        kept.append(saved_by_autograd(model, lambda model=model: model(tokens)))
    expected = kept_bytes(phi, config, Load(2, 48, 1, masked=False, several=False))
    assert kept[1] - kept[0] == pytest.approx(expected, rel=0.02)


def test_the_largest_micro_batch_is_found():
    pair = lambda n: Example([0] * n, [[1] * 2, [2] * 3])  # noqa: E731
    examples = [pair(n) for n in (1, 10, 20, 30)]
    config = replace(settings(), batch_size=4, micro_batch_size=2)
    assert largest_load(examples, config) == Load(2, 35, 10, masked=True, several=True)  # 20 and 30 tokens of prompt
    assert largest_load(examples, replace(config, pack=60)) == Load(1, 60, 10, masked=True, several=True)
    assert longest_load(replace(config, max_length=100)) == Load(2, 200, 400, masked=True, several=True)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_presets_fit_phi_2_with_the_longest_rows(name, objective):
    if name == "report":
        size = 24  # its authors' GPU is not known; this is what it takes here
    else:
        size = int(name.removesuffix("gb"))
    config = resolve(Config(stage="dpo", preset=name, train="x.jsonl", device="cpu"), {"stage", "preset", "train", "device"})
    config = replace(config, stage=objective, objective=objective, device="cuda")
    assert 1.1 * (sum(estimate(PHI2, config, longest_load(config)).values()) + CONTEXT) < size * 1e9


def test_a_preset_fills_what_is_not_given():
    config = resolve(
        Config(preset="report", train="x.jsonl", device="cpu", lora=8, eps=0.2), {"preset", "train", "device", "lora", "eps"}
    )
    assert (config.model, config.lora, config.eps) == ("rhysjones/phi-2-orange-v2", 8, 0.2)
    assert (config.beta, config.lora_alpha, config.lora_dropout, config.lr) == (0.3, 16, 0.1, 1e-5)
    assert config.system_prompt == "You are a helpful EPFL chatbot." and config.dtype == "fp32"
    other = Config(preset="report", train="x.jsonl", device="cpu", loss="sigmoid")
    assert resolve(other, {"preset", "train", "device", "loss"}).eps is None
    for flags, message in [
        (dict(preset="report", stage="sft"), "--preset report is for --stage dpo"),
        (dict(preset="8gb", stage="qat", to="nf4"), "--preset 8gb trains adapters"),
        (dict(preset="8gb", stage="sweep"), "a sweep has --preset report"),
        (dict(preset="24gb", dtype="fp32"), "--base bf16 needs --dtype bf16"),
    ]:
        with pytest.raises(InputError, match=message):
            resolve(Config(train="x.jsonl", device="cpu", **flags), {*flags, "train", "device"})


# ---------------------------------------------------------------------------------------------------------- measured

STEPS = """
import json, sys
import torch
import fits, loop, memory, optimizer
from runtime.settings import Config
from data import Example
from inputs import add_adapters, load_model
from pathlib import Path
torch.set_num_threads(1)
settings, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
config = Config(objective="dpo", device="cpu", loss="sigmoid", beta=0.1, nll_weight=0.0, lr=1e-5, adam_beta2=0.999,
                warmup_steps=0, batch_size=4, attention="sdpa", **settings)
examples = [Example([3] * 256, [[5 + i] * 64 for i in range(2)]) for _ in range(4)]
fits.LARGE = 0
need, peak = fits.check_fits(directory, config, examples), fits.watch_peak("cpu")
model = load_model(directory, config)
add_adapters(model, config)
model.gradient_checkpointing, model.attention = config.gradient_checkpointing, config.attention
stepper = optimizer.make_optimizer(model, config)
for step in (1, 2):
    loop.step_gradients(model, examples, torch.zeros(4, 2), loop.make_objective(config), config)
    stepper.step()
    stepper.zero_grad(set_to_none=True)
print(json.dumps([need.total, peak()]))
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory) -> Path:
    """22 million parameters, of which most are embeddings, as in small models."""
    directory = tmp_path_factory.mktemp("middling")
    shape = dict(vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8)
    Phi(PhiConfig(**shape, partial_rotary_factor=0.5)).init_weights(0).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    "flags",
    [
        dict(dtype="fp32", micro_batch_size=4),
        dict(dtype="bf16", micro_batch_size=2, lora=16, base="nf4", gradient_checkpointing=True),
    ],
    ids=["full", "qlora"],
)
def test_real_steps_need_what_was_estimated_within_15_percent(middling, flags):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(flags), str(middling)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    estimated, measured = json.loads(done.stdout)
    if measured is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert estimated == pytest.approx(measured, rel=0.15)


# ---------------------------------------------------------------------------------------------------- what does not fit


def fake_phi2(directory: Path) -> Path:
    """The config of a full-size Phi-2; there are no weights, so nothing can have been loaded."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(PHI2.to_dict()))
    return directory


def test_a_run_that_cannot_fit_says_what_would(tmp_path, monkeypatch):
    directory = fake_phi2(tmp_path / "phi")
    examples = [Example([0] * 500, [[1] * 300, [2] * 300])] * 32
    monkeypatch.setattr(fits, "free_bytes", lambda device: 16 * 10**9)
    config = settings(model=str(directory))
    with pytest.raises(InputError, match=r"needs about .* GB on cpu .*16.0 GB are free.\nIt would fit.*\n.*--lora 16"):
        check_fits(directory, config, examples)
    suggested = replace(config, lora=16, gradient_checkpointing=True, micro_batch_size=1)
    assert fits.run_need(directory, suggested, examples)[1].fits(1.1)
    monkeypatch.setattr(fits, "free_bytes", lambda device: 10**9)
    with pytest.raises(InputError, match="No flag makes it fit"):
        check_fits(directory, config, examples)
    monkeypatch.setattr(fits, "free_bytes", lambda device: 60 * 10**9)
    with pytest.raises(InputError, match=r"\n  --micro-batch-size 1") as told:  # mild ones are enough
        check_fits(directory, replace(config, micro_batch_size=8), examples)
    assert "--lora" not in str(told.value)
    with pytest.raises(InputError, match="A resumed run keeps its settings"):
        check_fits(directory, replace(config, micro_batch_size=8, resume=True), examples)


def test_it_is_said_before_anything_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    directory = fake_phi2(tmp_path / "phi")
    (directory / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    monkeypatch.setattr(fits, "free_bytes", lambda device: 16 * 10**9)
    flags = ["--stage", "dpo", "--model", str(directory), "--train", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path)]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "It would fit" in error
    assert main([*flags, *error.splitlines()[-1].split(";")[0].split()]) == 2  # as told, it comes as far as the weights
    assert "model.safetensors" in capsys.readouterr().err


def test_a_run_tells_its_estimate_and_its_peak(tiny, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    flags = (
        f"--stage dpo --model {tiny} --train {tmp_path}/pairs.jsonl --out {tmp_path} --name run --samples 0 --max-steps 2"
    )
    assert main(flags.split()) == 0
    used = read_json(tmp_path / "run" / "results.json")["memory"]
    assert used["estimated"] > 10**8 and (used["measured"] is None or used["measured"] > 10**8)
    assert used["measured"] is None or "Peak memory of training" in capsys.readouterr().out
