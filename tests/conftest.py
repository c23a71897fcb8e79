import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; it is chosen before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

import demo  # noqa: E402
from runtime.files import read_json  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="hundreds of kills and inputs in tests/robustness")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """For the tests and the processes that they start: sums in one order, and no threads waiting for each other, which on a
    busy machine makes products this small 20 times slower."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A directory with the demo's random tiny Phi, cut down to one layer so that a step takes milliseconds."""
    base = demo.write_world(tmp_path_factory.mktemp("tiny"), sizes={"sft": 0, "qat": 0, "pairs": 0, "test": 0}).model
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = load_file(base / "model.safetensors")
    save_file({k: v for k, v in weights.items() if ".layers." not in k or ".layers.0." in k}, base / "model.safetensors")
    return base
