"""What a run leaves on disk: which checkpoints stay, what a kill in the middle of writing leaves, and what is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from data import ChatML, load_tokenizer
from lora import add_lora, lora_layers
from model import Phi
from runtime.files import InputError, read_json
from runtime.optimizer import make_optimizer
from runtime.runs import (
    cached_logprobs,
    fingerprint,
    load_optimizer,
    open_run,
    prune,
    publish,
    read_metrics,
    save_checkpoint,
    steps_saved,
    truncate_metrics,
)
from runtime.settings import Config

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = dict(lr=1e-3, adam_beta2=0.99, weight_decay=0.1)


def checkpoints(run, *steps):
    """Empty checkpoints of these steps."""
    for step in steps:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)


def save(run, step, model, **state):
    chat = ChatML(load_tokenizer(Path(model.origin[0])))
    return save_checkpoint(run, step, model, chat, make_optimizer(model, Config(**SETTINGS)), state)


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ----------------------------------------------------------------------------------------------------- which steps there are


def test_step_10_comes_after_step_9(tmp_path):
    checkpoints(tmp_path, 10, 9, 100)
    assert steps_saved(tmp_path) == [9, 10, 100]
    assert steps_saved(tmp_path / "another") == []


def test_a_directory_that_is_being_written_does_not_count(tmp_path):
    checkpoints(tmp_path, 5)
    for name in (".step-6.tmp", ".step-5.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert steps_saved(tmp_path) == [5]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [10, 11]),
        (2, 9, [9, 10, 11]),
        (2, 11, [10, 11]),
        (1, 8, [8, 11]),
        (9, 8, [8, 9, 10, 11]),
    ],
)
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path, keep, best, left):
    checkpoints(tmp_path, 8, 9, 10, 11)
    prune(tmp_path, keep, best)
    assert steps_saved(tmp_path) == left


# ------------------------------------------------------------------------------------------------------------------ one run


def test_a_new_run_starts_at_step_0(tmp_path):
    assert open_run(tmp_path / "a" / "b", overwrite=False, resume=False) == 0
    assert (tmp_path / "a" / "b").is_dir()
    assert open_run(tmp_path / "a" / "b", overwrite=False, resume=False) == 0  # an empty directory holds no run


def test_a_resumed_run_goes_on_from_its_last_checkpoint(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert open_run(tmp_path, overwrite=False, resume=True) == 0  # it was killed before its first checkpoint
    checkpoints(tmp_path, 9, 10)
    assert open_run(tmp_path, overwrite=False, resume=True) == 10
    assert steps_saved(tmp_path) == [9, 10]


def test_what_is_not_a_run_is_neither_resumed_nor_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no run to resume"):
        open_run(tmp_path, overwrite=False, resume=True)
    with pytest.raises(InputError, match="is not deleted"):
        open_run(tmp_path, overwrite=True, resume=False)
    with pytest.raises(InputError, match="already holds a run"):
        open_run(tmp_path, overwrite=False, resume=False)
    assert tree(tmp_path) == {"thesis.txt": b"years of work"}


def test_overwriting_leaves_nothing_of_the_earlier_run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    checkpoints(tmp_path, 3)
    assert open_run(tmp_path, overwrite=True, resume=False) == 0
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path):
    assert read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    path.write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")  # whole, but nothing says so before its newline
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_steps_that_run_again_are_dropped_from_the_metrics(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"', encoding="utf-8")
    truncate_metrics(tmp_path, 2)
    assert read_metrics(tmp_path) == rows[:3]
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:  # as the loop goes on logging
        file.write('{"step": 3}\n')
    assert read_metrics(tmp_path) == [*rows[:3], {"step": 3}]


# ------------------------------------------------------------------------------------------------------- whole or not at all


def test_a_checkpoint_holds_the_model_the_tokenizer_the_moments_and_the_counters(tiny, tmp_path):
    model = Phi.from_pretrained(tiny)
    path = save(tmp_path, 10, model, best_step=5)
    assert path == tmp_path / "checkpoints" / "step-10"
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "optimizer.safetensors",
        "state.json",
    }
    assert read_json(path / "state.json") == {"step": 10, "best_step": 5}
    keys = ("step", "exp_avg", "exp_avg_sq")
    names = {f"{key}.{name}" for name, _ in model.named_parameters() for key in keys}
    assert set(load_file(path / "optimizer.safetensors")) == names
    assert fingerprint(Phi.from_pretrained(path)) == fingerprint(model)
    assert (path / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


# Writes a checkpoint and is killed, without any chance to clean up, when the last file is about to be written.
DIE = """
import os, signal, sys
from pathlib import Path
import torch
from runtime.runs import save_checkpoint
from runtime.settings import Config
from data import ChatML, load_tokenizer
from model import Phi
from runtime.optimizer import make_optimizer

class Deadly(dict):
    def items(self):
        os.kill(os.getpid(), signal.SIGKILL)

source, run, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model = Phi.from_pretrained(source)
model.lm_head.bias.data += 1
optimizer = make_optimizer(model, Config(lr=1e-3, adam_beta2=0.99, weight_decay=0.1))
optimizer.state[model.lm_head.bias] = Deadly()
save_checkpoint(run, step, model, ChatML(load_tokenizer(source)), optimizer, {})
"""


@pytest.mark.parametrize("step", [9, 10], ids=["the same step again", "the next step"])
def test_killed_in_the_middle_of_a_checkpoint_the_former_one_is_there(tiny, tmp_path, step):
    model = Phi.from_pretrained(tiny)
    before = tree(save(tmp_path, 9, model, best_step=9))
    command = [sys.executable, "-B", "-c", DIE, str(tiny), str(tmp_path), str(step)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    half = tmp_path / "checkpoints" / f".step-{step}.tmp"
    assert (half / "model.safetensors").exists()  # it had really begun to write
    assert steps_saved(tmp_path) == [9] and tree(tmp_path / "checkpoints" / "step-9") == before
    save(tmp_path, step, model)  # the run goes on: the left-over is no obstacle, and goes
    assert steps_saved(tmp_path) == sorted({9, step}) and not half.exists()


def test_an_error_in_the_middle_of_a_checkpoint_leaves_the_former_one_and_no_other(tiny, tmp_path):
    model = Phi.from_pretrained(tiny)
    save(tmp_path, 9, model)
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        save(tmp_path, 10, model, best_step=object())  # cannot be written as JSON: the very last file fails
    with pytest.raises(TypeError):
        save(tmp_path, 9, model, best_step=object())
    assert tree(tmp_path) == before and steps_saved(tmp_path) == [9]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-9"]


# ----------------------------------------------------------------------------------------------------------- the best model


def test_the_published_model_is_the_checkpoint_without_the_moments(tiny, tmp_path):
    best, last = Phi.from_pretrained(tiny), Phi.from_pretrained(tiny)
    last.lm_head.bias.data += 1
    save(tmp_path, 9, best)
    save(tmp_path, 10, last)
    publish(tmp_path, 10)
    publish(tmp_path, 9)  # takes the place of the first
    files = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    assert fingerprint(Phi.from_pretrained(tmp_path)) == fingerprint(best) != fingerprint(last)


def test_published_adapters_take_along_what_their_base_was_quantized_to(tiny, tmp_path):
    model = add_lora(Phi.from_pretrained(tiny, base="nf4"), 4)
    for layer in lora_layers(model).values():
        nn.init.ones_(layer.lora_B)
    save(tmp_path, 3, model)
    publish(tmp_path, 3)
    files = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json"}
    assert fingerprint(Phi.from_pretrained(tmp_path)) == fingerprint(model)


def test_all_files_of_a_model_in_shards_are_published(tmp_path):
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    checkpoints(tmp_path, 4)
    for name in [*names, "optimizer.safetensors", "state.json"]:
        (tmp_path / "checkpoints" / "step-4" / name).write_text(name)
    publish(tmp_path, 4)
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()} == {name: name for name in names}


# -------------------------------------------------------------------------------------------------------- moments come back


def stepped(model, config):
    """An optimizer after one step with gradients that differ from value to value."""
    optimizer = make_optimizer(model, config)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_every_moment_comes_back_in_its_own_place(tiny, tmp_path, kind):
    model, config = Phi.from_pretrained(tiny), Config(optimizer=kind, **SETTINGS)
    first = stepped(model, config)
    path = save_checkpoint(tmp_path, 1, model, ChatML(load_tokenizer(tiny)), first, {"best_step": 1})
    second = make_optimizer(model, config)
    own = {(p, key): value for p in model.parameters() for key, value in second.state[p].items()}
    assert load_optimizer(path, model, second) == {"step": 1, "best_step": 1}
    for p in model.parameters():
        assert first.state[p].keys() == second.state[p].keys()
        for key, value in first.state[p].items():
            assert value.any() and torch.equal(value, second.state[p][key])
            assert second.state[p][key] is own[p, key]  # in place: an optimizer on the CPU has pinned its memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"exp_avg.lm_head.bias": torch.ones(1)}), r"holds a float32 \[1\] as exp_avg of lm_head\.bias"),
        (lambda t: t.update({"step.lm_head.bias": torch.ones(2)}), r"holds a float32 \[2\] as step of lm_head\.bias"),
        (lambda t: t.pop("exp_avg_sq.lm_head.bias"), r"holds no exp_avg_sq of lm_head\.bias"),
        (lambda t: t.update({"step.lm_head.bias": torch.ones((), dtype=torch.float64)}), r"as step of lm_head\.bias"),
    ],
    ids=["a shape that would be spread", "a vector for a number", "none", "another dtype"],
)
def test_moments_of_another_form_are_refused(tiny, tmp_path, change, message):
    model = Phi.from_pretrained(tiny)
    path = save(tmp_path, 1, model)
    tensors = load_file(path / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, path / "optimizer.safetensors")
    with pytest.raises(InputError, match=message):
        load_optimizer(path, model, make_optimizer(model, Config(**SETTINGS)))


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


# ------------------------------------------------------------------------------------------------------------- one reference


def test_a_table_is_computed_once(tmp_path):
    path, calls = tmp_path / "reference" / "table.safetensors", []

    def compute():
        calls.append(1)
        return torch.tensor([[-1.5, -2.5]])

    for expected in (False, True, True):
        table, found = cached_logprobs(path, compute)
        assert table.tolist() == [[-1.5, -2.5]] and found == expected
    assert len(calls) == 1


def test_a_table_that_could_not_be_computed_leaves_no_file(tmp_path):
    path = tmp_path / "table.safetensors"
    with pytest.raises(ZeroDivisionError):
        cached_logprobs(path, lambda: 1 / 0)
    assert not list(tmp_path.iterdir())
