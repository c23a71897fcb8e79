"""Runs a command of train.py again and again in forked processes, each killed at another moment, and compares what is left.

    python tests/helpers/killed.py SPEC.json

SPEC holds "command" (without --out and --name), "again" (flags for going on after a kill), "kills" (how many), "seed",
"directory", and "whole": whether OUT/NAME must be complete at any moment or not be there. A kill strikes just before a
file-system event: a file opened for writing, a rename, a directory made, something deleted. The kill points of one command
are spread evenly over all its events, from a random first one. After each kill the command is given again, as a user would,
until it ends well; then model, metrics and results must be those of a run that nobody disturbed. Prints one JSON object:
{"events", "kills", "differences"}.
"""

import json
import os
import random
import shutil
import signal
import sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402

VOLATILE = {"tokens_per_second", "memory", "seconds"}  # what no two runs have in common


def is_event(name: str, arguments: tuple) -> bool:
    if name == "open":
        return isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
    return name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def in_child(words: list[str], directory: Path, kill_at: int | None, count_to: Path | None = None) -> int:
    """Runs a command in a fork; returns its exit status, negative if a signal ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    events = 0

    def watch(name, arguments):
        nonlocal events
        inside = arguments and str(arguments[0]).startswith(str(directory))
        if inside and is_event(name, arguments):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    status = train.main(words)
    if count_to:
        count_to.write_text(str(events))
    os._exit(status)


def content(path: Path) -> object:
    """What is to be equal of a file: JSON without the volatile fields, the bytes of everything else."""

    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in VOLATILE}
        return [without(v) for v in value] if isinstance(value, list) else value

    if path.suffix in (".json", ".jsonl"):
        return (
            [without(json.loads(line)) for line in path.read_text().split("\n") if line]
            if path.suffix == ".jsonl"
            else (without(json.loads(path.read_text())))
        )
    return sha256(path.read_bytes()).hexdigest()


def outcome(run: Path) -> dict[str, object]:
    """The files of a finished run that the stage promises, and the teacher's journal, by name. Paths of its own in them are
    made equal."""
    files = [*run.parent.glob("teacher/*.jsonl")]
    files += [p for p in run.rglob("*") if p.is_file() and "tb" not in p.parts and p.suffix not in (".png", ".log")]
    kept = {}
    for path in files:
        if path.name not in ("run.json", "log.txt") and "optimizer" not in path.name:
            kept[os.path.relpath(path, run)] = json.loads(json.dumps(content(path)).replace(str(run.parent), "OUT"))
    return kept


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    root, name = Path(spec["directory"]), "run"

    def words(directory: Path) -> list[str]:
        return [*spec["command"], "--out", str(directory), "--name", name]

    whole = root / "whole"
    whole.mkdir()
    status = in_child(words(whole), whole, None, root / "events")
    assert status == 0, (whole / "log.txt").read_text()
    expected, events = outcome(whole / name), int((root / "events").read_text())
    draw = random.Random(spec["seed"])
    points = sorted({1 + (draw.randrange(events) + i * events // spec["kills"]) % events for i in range(spec["kills"])})
    differences = []
    for point in points:
        directory = root / f"killed-{point}"
        directory.mkdir()
        if in_child(words(directory), directory, point) != -signal.SIGKILL:
            differences.append(f"event {point}: was not reached")
            continue
        if spec["whole"] and (directory / name).exists() and outcome(directory / name) != expected:
            differences.append(f"event {point}: the kill left a part of {name}")
        again = words(directory) + (spec["again"] if (directory / name / "run.json").exists() else [])
        status = in_child(again, directory, None)
        log = (directory / "log.txt").read_text()
        if status or "Traceback" in log:
            differences.append(f"event {point}: exit status {status}: {log[-600:]}")
        elif (found := outcome(directory / name)) != expected:
            names = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
            differences.append(f"event {point}: other {names}")
        elif left := [p.name for p in (directory / name).rglob(".*.tmp")]:
            differences.append(f"event {point}: left {left}")
        shutil.rmtree(directory)
    print(json.dumps({"events": events, "kills": len(points), "differences": differences}))


if __name__ == "__main__":
    main()
