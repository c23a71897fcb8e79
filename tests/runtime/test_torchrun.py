"""`torchrun train.py`: the curve of one process on several, a killed rank, and going on with another number of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rows import pair_rows

from runtime.files import read_json, write_jsonl
from runtime.runs import read_metrics, steps_saved
from train import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--batch-size 6 --micro-batch-size 2 --epochs 4 --eval-every 2 --lr 1e-3 --samples 3 --max-length 256 "
    "--max-prompt-length 128"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("out")
    write_jsonl(directory / "pairs.jsonl", pair_rows(25))
    return directory


def command(tiny, out, name, *flags):
    files = f"--model {tiny} --train {out}/pairs.jsonl --out {out} --name {name}"
    return ["--stage", "dpo", *FLAGS.split(), *files.split(), *flags]


def torchrun(ranks, *flags):
    """A running `torchrun --nproc-per-node RANKS train.py FLAGS`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout


def assert_same_curve(run, other):
    """Training and evaluation, at every step: equal to 1e-5, the loss and all other metrics."""
    rows, others = read_metrics(run), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] and len(rows) > 16
    for row, expected in zip(rows, others):
        row.pop("tokens_per_second", None), expected.pop("tokens_per_second", None)
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5), row["step"]


@pytest.fixture(scope="module")
def alone(tiny, out):
    """Runs by one process, in full and with adapters."""
    assert main(command(tiny, out, "alone")) == 0
    assert main(command(tiny, out, "alone-lora", "--lora", "4")) == 0
    return out


def test_two_ranks_sharded_have_the_curve_of_one_process(tiny, alone):
    printed = finished(torchrun(2, *command(tiny, alone, "two", "--optimizer", "adamw")))
    assert_same_curve(alone / "two", alone / "alone")
    ours, theirs = (read_json(alone / name / "results.json") for name in ("two", "alone"))
    assert ours["after"]["metrics"] == pytest.approx(theirs["after"]["metrics"], rel=1e-4, abs=1e-4)
    assert ours["before"]["answers"] == theirs["before"]["answers"]
    assert printed.count("held-out examples") == 1  # one rank speaks


def test_two_ranks_with_adapters_have_the_curve_of_one_process(tiny, alone):
    finished(torchrun(2, *command(tiny, alone, "two-lora", "--lora", "4")))
    assert_same_curve(alone / "two-lora", alone / "alone-lora")


def test_a_killed_rank_ends_the_job_and_four_ranks_go_on(tiny, alone):
    process = torchrun(2, *command(tiny, alone, "killed"))
    run, limit, ranks = alone / "killed", time.monotonic() + 120, []
    while not (len(ranks) == 2 and steps_saved(run)):  # on a slow machine the kill must not come after the last step
        assert process.poll() is None and time.monotonic() < limit, process.stderr.read()
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "another process of this job ended" in line and "--resume continues from the last checkpoint" in line
    assert not (run / "results.json").exists()
    finished(torchrun(4, "--stage", "dpo", "--out", str(alone), "--name", "killed", "--resume"))
    assert_same_curve(run, alone / "alone")


def test_what_is_done_once_is_refused(tmp_path):
    process = torchrun(2, "--stage", "quantize", "--model", str(tmp_path), "--to", "nf4")
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert lines == ["error: --stage quantize is for one process: start it with python instead of torchrun"]
