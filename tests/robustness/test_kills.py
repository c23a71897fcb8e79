"""Whatever the moment at which a run is killed: the same command again, or --resume, ends as if nothing had happened. And
two processes at once never write to the same files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai_server import Server
from rows import pair_rows

import demo
from runtime.files import write_jsonl
from runtime.runs import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TRAINING = "--lr 1e-3 --max-steps 5 --batch-size 4 --micro-batch-size 2 --eval-every 2 --device cpu --samples 2"
LIMITS = "--eval-share 0.3 --max-length 128 --max-prompt-length 64"
STAGES = {
    "sft": ("--stage sft --model MODEL --train SFT", "--resume"),
    "dpo": ("--stage dpo --model MODEL --train PAIRS", "--resume"),
    "lora": ("--stage dpo --model MODEL --train PAIRS --lora 4 --base nf4", "--resume"),
    "adamw8bit": ("--stage dpo --model MODEL --train PAIRS --optimizer adamw8bit --patience 1", "--resume"),
    "qat": ("--stage qat --to nf4 --model MODEL --train SFT", "--resume"),
    "sweep": (
        f"--stage sweep --model MODEL --train PAIRS --grid beta=0.3,0.5 {TRAINING} {LIMITS} --max-steps 3 --samples 0",
        "",
    ),
    "quantize": ("--stage quantize --model MODEL --to nf4", "--overwrite"),
    "eval": ("--stage eval --model MODEL --data SFT --samples 2 --max-new-tokens 8", "--overwrite"),
}


def killed(words: list[str], again: str, tmp_path: Path, long: bool, whole: bool = False) -> int:
    """Runs a command, kills it at many moments and gives it again, with the flags `again`; returns how often it was killed.
    Fails the test unless everything ends as in the run that was not disturbed."""
    kills = 32 if long else 3
    spec = {"command": words, "again": again.split(), "kills": kills, "seed": 0, "directory": str(tmp_path), "whole": whole}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    helper = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py"), str(tmp_path / "spec.json")]
    done = subprocess.run(helper, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 3 and found["differences"] == []
    return found["kills"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_if_nothing_had_happened(tiny, tmp_path, stage, long):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(24)])
    command, again = STAGES[stage]
    files = {"MODEL": str(tiny), "PAIRS": str(tmp_path / "pairs.jsonl"), "SFT": str(tmp_path / "sft.jsonl")}
    words = [files.get(word, word) for word in command.split()]
    if again == "--resume":
        words += f"{TRAINING} {LIMITS}".split()
    killed(words, again, tmp_path, long)


def test_a_killed_build_pays_for_no_answer_twice_and_its_folder_is_whole_or_absent(tmp_path, monkeypatch, long):
    """But for the call in flight, one at most, whose answer a kill can lose. The journals are equal in the end."""
    asked = [
        {"question": f"Why does body {i} fall?", "answer": f"Masses attract each other, number {i}."} for i in range(12)
    ]
    write_jsonl(tmp_path / "physics.jsonl", asked)

    def teach(body: dict) -> str:
        _, explain, answer = body["messages"][-1]["content"].rpartition("Answer: ")
        return (
            f"Step by step: what has a mass falls. The answer is {answer}"
            if explain
            else "Since nothing holds it, it falls."
        )

    server = Server(teach)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    sources = f"arxiv_physics={tmp_path}/physics.jsonl"
    words = ["--stage", "data", "--sources", sources, "--teacher", "m", "--concurrency", "1"]
    kills = killed(words, "--overwrite", tmp_path, long, whole=True)
    server.shutdown()
    server.server_close()
    paid, builds = sum(server.answered.values()), kills + 1
    assert min(server.answered.values()) >= builds
    assert len(server.answered) * builds <= paid <= len(server.answered) * builds + kills


# ------------------------------------------------------------------------------------------------------- two at a time


def train_py(*words: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=os.environ, **pipes)


def test_the_second_of_two_processes_with_one_run_is_told_who_has_it(tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    words = f"--stage dpo --model {tiny} --train {tmp_path}/pairs.jsonl --out {tmp_path} --name run".split()
    words += f"{TRAINING} {LIMITS} --max-steps 20".split()
    first = train_py(*words)
    while len(read_metrics(tmp_path / "run")) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # or it might end before the second one looks
    for more in (["--overwrite"], ["--resume"]):
        second = train_py(*words, *more)
        _, told = second.communicate(timeout=120)
        assert second.returncode == 2
        assert f"error: {tmp_path}/run is in use by process {first.pid} on " in told and told.count("error") == 1
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0 and read_metrics(tmp_path / "run")[-1]["step"] == 20


def test_of_two_demos_at_once_one_tunes_the_sft_model_and_the_other_waits_for_it(tmp_path):
    demo.write_world(tmp_path / "demo-seed0", sizes={"sft": 300, "qat": 8, "pairs": 60, "test": 8})
    words = f"--out {tmp_path} --device cpu --samples 0 --max-steps 1".split()
    both = [train_py(*words, "--name", name) for name in ("a", "b")]
    printed = [one.communicate(timeout=300)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert "".join(printed).count("comes first: running --stage sft") == 1
    assert (tmp_path / "a" / "results.json").exists() and (tmp_path / "b" / "results.json").exists()
