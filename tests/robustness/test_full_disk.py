"""A disk that is full at any moment of a stage: one line says so, and what was complete before is still there."""

import os
import shutil
import subprocess

import pytest
from rows import pair_rows

from lora import add_lora
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


SHORT = "--device cpu --samples 0 --eval-every 2 --max-length 128 --max-prompt-length 64 --eval-share 0.3"
COMMANDS = {
    "sft": f"sft --model MODEL --train SFT --max-steps 6 --save-every 2 {SHORT}",
    "dpo": f"dpo --model MODEL --train PAIRS --max-steps 6 --save-every 2 {SHORT}",
    "lora": f"dpo --model MODEL --train PAIRS --lora 4 --max-steps 6 {SHORT}",
    "mcq": f"mcq --model MODEL --train MCQ --max-steps 4 {SHORT}",
    "qat": f"qat --to nf4 --model MODEL --train SFT --max-steps 4 {SHORT}",
    "sweep": f"sweep --model MODEL --train PAIRS --grid beta=0.3,0.5 --max-steps 2 {SHORT}",
    "data": "data --sources mmlu_stem=MMLU",
    "quantize": "quantize --model MODEL --to nf4 --device cpu",
    "merge": "merge --model ADAPTERS --device cpu",
    "eval": "eval --model MODEL --data SFT --samples 2 --max-new-tokens 8 --device cpu",
    "precisions": "eval --model MODEL --data SFT --precisions nf4 --samples 0 --device cpu",
}


@pytest.fixture
def files(tiny, tmp_path) -> dict[str, str]:
    """The paths that the capital words of COMMANDS stand for."""
    pairs = pair_rows(24)
    questions = [{"question": r["prompt"], "choices": [r["chosen"], r["rejected"]], "answer": "A"} for r in pairs]
    published = [q | {"choices": [*q["choices"], "7", "8"], "answer": 0, "subject": ""} for q in questions]
    rows = {"PAIRS": pairs, "MCQ": questions, "MMLU": published}
    rows["SFT"] = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows} | {"MODEL": tiny, "ADAPTERS": tmp_path / "adapters"}
    for name, its in rows.items():
        write_jsonl(paths[name], its)
    add_lora(Phi.from_pretrained(tiny), 4).save_pretrained(paths["ADAPTERS"])
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_complete(files, small_disk, capsys, stage, long):
    words = ["--stage", *COMMANDS[stage].replace("=MMLU", f"={files['MMLU']}").split(), "--out", str(small_disk)]
    words = [files.get(word, word) for word in words]
    failures = 0
    for free in (0, 10_000, 100_000, 400_000, 1_500_000, 4_000_000)[:: 1 if long else 2]:
        shutil.rmtree(small_disk / "run", ignore_errors=True)
        shutil.rmtree(small_disk / "reference", ignore_errors=True)
        leave(small_disk, free)
        status = main([*words, "--name", "run"])
        out, told = capsys.readouterr()
        if status:
            failures += 1
            assert status == 2 and "Traceback" not in told
            said = out if "FAILED" in out else [line for line in told.splitlines() if line.startswith("error: ")][-1]
            assert "No space left" in said
        for step in steps_saved(small_disk / "run"):
            Phi.from_pretrained(checkpoint_directory(small_disk / "run", step))
    assert failures
