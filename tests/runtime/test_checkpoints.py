"""Checkpoints: which ones stay, what a kill in the middle of writing leaves, and which one becomes the run's model."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from checkpoints import SETTINGS, checkpoints, save, tree
from safetensors.torch import load_file, save_file

from lora import add_lora, lora_layers
from model import Phi
from runtime.files import InputError, read_json
from runtime.optimizer import load_optimizer, make_optimizer
from runtime.runs import (
    prune,
    publish,
    read_state,
    remove_leftovers,
    steps_saved,
)
from runtime.weights import fingerprint

ROOT = Path(__file__).resolve().parents[2]


# ----------------------------------------------------------------------------------------------------- which steps there are


def test_step_10_comes_after_step_9(tmp_path):
    checkpoints(tmp_path, 10, 9, 100)
    assert steps_saved(tmp_path) == [9, 10, 100]
    assert steps_saved(tmp_path / "another") == []


def test_a_directory_that_is_being_written_does_not_count(tmp_path):
    checkpoints(tmp_path, 5)
    for name in (".step-6.tmp", ".step-5.old.tmp", "step-5 copy"):
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


# ------------------------------------------------------------------------------------------------------- whole or not at all


CHAT = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_a_checkpoint_holds_the_model_the_tokenizer_the_moments_and_the_counters(tiny, tmp_path):
    model = Phi.from_pretrained(tiny)
    path = save(tmp_path, 10, model, best_step=5)
    assert path == tmp_path / "checkpoints" / "step-10"
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        *CHAT,
        "optimizer.safetensors",
        "state.json",
    }
    assert read_json(path / "state.json") == {"step": 10, "best_step": 5, "evaluations_since_best": 0}
    keys = ("step", "exp_avg", "exp_avg_sq")
    names = {f"{key}.{name}" for name, _ in model.named_parameters() for key in keys}
    assert set(load_file(path / "optimizer.safetensors")) == names
    assert fingerprint(Phi.from_pretrained(path)) == fingerprint(model)
    assert (path / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


# Writes a checkpoint and is killed, without any chance to clean up, when the last file is about to be written.
DIE = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
import train
from data import ChatML, Example, Row, load_tokenizer
from model import Phi
from prepare.rows import Inputs
from runtime.optimizer import make_optimizer
from runtime.flags import settle

class Deadly(dict):
    def items(self):
        os.kill(os.getpid(), signal.SIGKILL)

source, run, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model = Phi.from_pretrained(source)
model.lm_head.bias.data += 1
settings = settle("sft", {"model": "x", "train": "y"}).settings
optimizer = make_optimizer(model, settings)
optimizer.state[model.lm_head.bias] = Deadly()
train.save(settings, run, model, ChatML(load_tokenizer(source)), optimizer, {"step": step, "best_step": None})
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [9, 10], ids=["the same step again", "the next step"])
def test_killed_in_the_middle_of_a_checkpoint_the_former_one_is_there(tiny, tmp_path, step):
    model = Phi.from_pretrained(tiny)
    before = tree(save(tmp_path, 9, model, best_step=9))
    command = [sys.executable, "-B", "-c", DIE, str(tiny), str(tmp_path), str(step)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (half,) = (tmp_path / "checkpoints").glob(f".step-{step}.*.tmp")
    assert (half / "model.safetensors").exists()  # it had really begun to write
    assert steps_saved(tmp_path) == [9] and tree(tmp_path / "checkpoints" / "step-9") == before
    save(tmp_path, step, model)  # the run goes on: the leftover is no obstacle
    remove_leftovers(tmp_path)
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
    assert files == {"config.json", "model.safetensors", *CHAT}
    assert fingerprint(Phi.from_pretrained(tmp_path)) == fingerprint(best) != fingerprint(last)


def test_published_adapters_take_along_what_their_base_was_quantized_to(tiny, tmp_path):
    model = add_lora(Phi.from_pretrained(tiny, base="nf4"), 4)
    for layer in lora_layers(model).values():
        nn.init.ones_(layer.lora_B)
    save(tmp_path, 3, model)
    publish(tmp_path, 3)
    files = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "base.json", *CHAT}
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


def stepped(model, settings):
    """An optimizer after one step with gradients that differ from value to value."""
    optimizer = make_optimizer(model, settings)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_every_moment_comes_back_in_its_own_place(tiny, tmp_path, kind):
    model, settings = Phi.from_pretrained(tiny), replace(SETTINGS, optimizer=kind)
    first = stepped(model, settings)
    path = save(tmp_path, 1, model, first, best_step=1)
    second = make_optimizer(model, settings)
    own = {(p, key): value for p in model.parameters() for key, value in second.state[p].items()}
    load_optimizer(path, model, second)
    assert read_state(path) == {"step": 1, "best_step": 1, "best_value": None, "evaluations_since_best": 0}
    for p in model.parameters():
        assert first.state[p].keys() == second.state[p].keys()
        for key, value in first.state[p].items():
            assert value.any() and torch.equal(value, second.state[p][key])
            assert second.state[p][key] is own[p, key]  # in place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"exp_avg.lm_head.bias": torch.ones(1)}), r"has exp_avg as F32 \[1\] for lm_head\.bias"),
        (lambda t: t.update({"step.lm_head.bias": torch.ones(2)}), r"has step as F32 \[2\] for lm_head\.bias"),
        (lambda t: t.pop("exp_avg_sq.lm_head.bias"), r"has no exp_avg_sq for lm_head\.bias"),
        (
            lambda t: t.update({"step.lm_head.bias": torch.ones((), dtype=torch.float64)}),
            r"has step as F64 \[\] for lm_head\.bias",
        ),
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
        load_optimizer(path, model, make_optimizer(model, SETTINGS))
    (path / "optimizer.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match="optimizer.safetensors: not a whole safetensors file"):
        load_optimizer(path, model, make_optimizer(model, SETTINGS))
