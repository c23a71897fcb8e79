"""Whatever the moment at which a run is killed: the same command again, or --resume, ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rows import pair_rows

from runtime.files import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TRAINING = "--lr 1e-3 --max-steps 5 --batch-size 4 --micro-batch-size 2 --eval-every 2 --device cpu --samples 2"
LIMITS = "--eval-share 0.3 --max-length 128 --max-prompt-length 64"
STAGES = {
    "sft": ("--stage sft --model MODEL --train SFT", "--resume"),
    "dpo": ("--stage dpo --model MODEL --train PAIRS", "--resume"),
    "lora": ("--stage dpo --model MODEL --train PAIRS --lora 4 --base nf4", "--resume"),
    "adamw8bit": ("--stage dpo --model MODEL --train PAIRS --optimizer adamw8bit --patience 1", "--resume"),
    "qat": ("--stage qat --to nf4 --model MODEL --train SFT", "--resume"),
    "quantize": ("--stage quantize --model MODEL --to nf4", "--overwrite"),
    "eval": ("--stage eval --model MODEL --data SFT --samples 2 --max-new-tokens 8", "--overwrite"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_if_nothing_had_happened(tiny, tmp_path, stage, long):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(24)])
    command, again = STAGES[stage]
    files = {"MODEL": str(tiny), "PAIRS": str(tmp_path / "pairs.jsonl"), "SFT": str(tmp_path / "sft.jsonl")}
    words = [files.get(word, word) for word in command.split()]
    if again == "--resume":
        words += f"{TRAINING} {LIMITS}".split()
    spec = {"command": words, "again": [again], "kills": 32 if long else 3, "seed": 0, "directory": str(tmp_path)}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    helper = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py"), str(tmp_path / "spec.json")]
    done = subprocess.run(helper, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 3 and found["differences"] == []
