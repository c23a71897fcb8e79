"""A disk that is full at any moment of a stage: one line says so, and what was complete before is still there."""

import os
import shutil
import subprocess

import pytest
from rows import pair_rows

from model import Phi
from runtime.files import write_jsonl
from runtime.runs import checkpoint_directory, steps_saved
from train import main


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def leave(disk, free: int) -> None:
    """Fills the disk until `free` bytes are left."""
    (disk / "filler").unlink(missing_ok=True)
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, room - free)))


COMMANDS = {
    "sft": "--stage sft --train SFT --max-steps 6 --save-every 2 --eval-every 2 --samples 0",
    "dpo": "--stage dpo --train PAIRS --max-steps 6 --save-every 2 --eval-every 2 --samples 0",
    "lora": "--stage dpo --train PAIRS --lora 4 --max-steps 6 --eval-every 2 --samples 0",
    "quantize": "--stage quantize --to nf4",
    "eval": "--stage eval --data SFT --samples 2 --max-new-tokens 8",
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_complete(tiny, small_disk, tmp_path, capsys, stage, long):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(24)])
    files = {"PAIRS": str(tmp_path / "pairs.jsonl"), "SFT": str(tmp_path / "sft.jsonl")}
    words = [files.get(word, word) for word in COMMANDS[stage].split()]
    common = ["--model", str(tiny), "--out", str(small_disk), "--name", "run", "--device", "cpu"]
    limits = [] if stage in ("quantize", "eval") else "--max-length 128 --max-prompt-length 64 --eval-share 0.3".split()
    failures = 0
    for free in (0, 10_000, 100_000, 400_000, 1_500_000, 4_000_000)[:: 1 if long else 2]:
        shutil.rmtree(small_disk / "run", ignore_errors=True)
        shutil.rmtree(small_disk / "reference", ignore_errors=True)
        leave(small_disk, free)
        status = main([*words, *common, *limits])
        told = capsys.readouterr().err
        if status:
            failures += 1
            assert status == 2 and "Traceback" not in told
            assert "No space left" in [line for line in told.splitlines() if line.startswith("error: ")][-1]
        for step in steps_saved(small_disk / "run"):
            Phi.from_pretrained(checkpoint_directory(small_disk / "run", step))
    assert failures
