"""How bench.py measures: in turn, after a warm-up, medians; memory as a peak above a start; rows with their targets.

A machine that others use slows down for seconds at a time. So what is compared runs in turn in one process, and a case's
number is a ratio: both sides were slowed alike. Memory is measured in a process of its own, because what one contender
has freed, another one need not ask for.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.files import InputError, first_line

ROOT = Path(__file__).resolve().parents[1]


# --------------------------------------------------------------------------------------------------------------- times


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def medians(contenders: dict[object, Callable], repeats: int, device: str = "cpu") -> dict[object, float]:
    """Median seconds of each contender; they take turns, after one round that is not counted."""
    seconds = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, run in contenders.items():
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def exponent(sizes: list[float], costs: list[float]) -> float:
    """k of the power law cost ~ size^k that fits best: the slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


# -------------------------------------------------------------------------------------------------------------- memory


def resident(field: str) -> int:
    """Bytes of this process's memory by /proc (Linux): "VmRSS" now, "VmHWM" the most it ever was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def held_bytes(device: str) -> int:
    """Bytes that are held now; the peak of `peak_bytes` counts from here."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again (Linux)
    return resident("VmRSS")


def peak_bytes(device: str) -> int:
    """The most bytes held since `held_bytes`: of tensors on a GPU, of the whole process on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident("VmHWM")


# ----------------------------------------------------------------------------------------------------------- processes


def in_worker(name: str, **arguments) -> dict:
    """Runs a function of bench.WORKERS in a process of its own; returns the dictionary that it returned. InputError has the
    reason why there is none, in one line: out of memory, a peer that is missing or refuses."""
    command = [sys.executable, "-m", "bench", "--worker", name, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    if done.returncode < 0:
        raise InputError(f"its process was ended by signal {-done.returncode}; out of memory?")
    raise InputError((done.stderr.strip().splitlines() or ["it ended without a message"])[-1][:300])


def work(functions: dict[str, Callable], name: str, arguments: str) -> int:
    """The other side of `in_worker`: prints what the function returns as the last line, or its error in one line."""
    try:
        print(json.dumps(functions[name](**json.loads(arguments))), flush=True)
        return 0
    except torch.OutOfMemoryError:
        print("out of memory", file=sys.stderr)
    except Exception as error:  # whatever a peer raises: the other rows go on
        print(reason(error), file=sys.stderr)
    return 1


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install -r requirements-peers.txt"
    if isinstance(error, InputError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


# ---------------------------------------------------------------------------------------------------------------- rows


def row(
    case: str, unit: str, ours: float | None, peer: float | None = None, target: str = "", of: str = "ratio", note: str = ""
) -> dict:
    """One line of the table. `target`: "<= 0.25" or ">= 1.5", of the "ratio" ours / peer or of "ours" alone; `met` says
    whether it was, None where there is no target or no number."""
    ratio = ours / peer if ours is not None and peer else None
    value = ratio if of == "ratio" else ours
    met = None
    if target and value is not None:
        sign, limit = target.split()
        met = value <= float(limit) if sign == "<=" else value >= float(limit)
    named = target and (target if of == "ratio" else f"ours {target}")
    return dict(case=case, unit=unit, ours=ours, peer=peer, ratio=ratio, target=named, met=met, note=note)


def table(rows: list[dict]) -> str:
    """The rows as Markdown, and their notes below."""
    lines = ["| case | unit | ours | peer | ours / peer | target |", "|---|---|---:|---:|---:|---|"]
    for r in rows:
        ours, peer = ("-" if r[name] is None else f"{r[name]:,.4g}" for name in ("ours", "peer"))
        ratio = "-" if r["ratio"] is None else f"{r['ratio']:.2f}"
        met = {True: ", met", False: ", missed", None: ""}[r["met"]]
        lines.append(f"| {r['case']} | {r['unit']} | {ours} | {peer} | {ratio} | {r['target'] or '-'}{met} |")
    notes = list(dict.fromkeys(f"- {r['case'].strip()}: {r['note']}" for r in rows if r["note"]))
    return "\n".join(lines + ([""] + notes if notes else []))


def same_steps(ours: tuple[float, dict], theirs: tuple[float, dict], tolerance: float) -> None:
    """InputError unless two training steps, (loss, gradients by name) each, agree: the losses and each gradient's
    difference, in units of the largest gradient. Prints how near they are."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    if gradients.keys() != their_gradients.keys():
        odd = sorted(gradients.keys() ^ their_gradients.keys())
        raise InputError(f"the two train different parameters: {odd[:3]}")
    largest = max(float(g.norm()) for g in their_gradients.values())
    gap = max(float((gradients[name].cpu() - g.cpu()).norm()) / largest for name, g in their_gradients.items())
    print(
        f"  loss {loss:.7f} and {their_loss:.7f}; largest difference of a gradient / largest gradient: {gap:.1e}", flush=True
    )
    if not abs(loss - their_loss) <= tolerance * max(1, abs(loss)) or not gap <= tolerance:
        raise InputError("the two do not compute the same step; their times cannot be compared")
