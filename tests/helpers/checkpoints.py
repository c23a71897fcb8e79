"""Checkpoints as the loop writes them, and empty ones."""

from pathlib import Path

import train
from data import ChatML, load_tokenizer
from runtime.flags import settle
from runtime.optimizer import make_optimizer
from runtime.runs import checkpoint_directory

SETTINGS = settle("sft", dict(model="x", train="y", lr=1e-3, adam_beta2=0.99, weight_decay=0.1, keep=9)).settings


def checkpoints(run, *steps):
    """Empty checkpoints of these steps."""
    for step in steps:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)


def save(run, step, model, optimizer=None, **state):
    """The checkpoint of a model, as the loop writes it."""
    chat = ChatML(load_tokenizer(Path(model.origin.name)))
    optimizer = optimizer or make_optimizer(model, SETTINGS)
    train.save(
        SETTINGS, run, model, chat, optimizer, {"step": step, "best_step": None, "evaluations_since_best": 0, **state}
    )
    return checkpoint_directory(run, step)


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
