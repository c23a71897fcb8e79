"""How everything is measured. Contenders take turns in one process, since other programs slow a machine down for seconds at
a time; the result is the median. Memory is the peak above the start, in a process per contender: memory that one has freed,
the next one may use.
"""

import gc
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.files import InputError, first_line
from runtime.memory import watch_peak

ROOT = Path(__file__).resolve().parents[1]


def medians(contenders: dict[Any, Callable | None], repeats: int, device: str = "cpu") -> dict[Any, float | None]:
    """Median seconds of each contender. They take turns, after one round that is not counted. None stays None."""
    seconds = {name: [] for name, run in contenders.items() if run}
    for _ in range(repeats + 1):
        for name in seconds:
            seconds[name].append(timed(contenders[name], device))
    return {name: statistics.median(seconds[name][1:]) if run else None for name, run in contenders.items()}


def timed(run: Callable, device: str) -> float:
    """Seconds of `run()`."""
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def copy_speed(device: str) -> float:
    """GB a second, read and written, of a copy in the device's memory."""
    source = torch.ones(2**31 if device.startswith("cuda") else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, 5, device)["copy"] / 1e9


def rates(amount: float, *seconds: float | None) -> list[float | None]:
    """amount / seconds; None stays None."""
    return [None if s is None else amount / s for s in seconds]


def exponent(sizes: list[float], costs: list[float]) -> float:
    """k of the power law cost ~ size^k that fits best: the slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def held_and_peak(run: Callable, device: str) -> tuple[int, int, Any]:
    """Bytes held before `run()`, the most held while it runs, and what it returns. On a GPU tensors count, on a CPU the
    whole process (Linux)."""
    gc.collect()
    peak = watch_peak(device)
    held = peak()
    result = run()
    return held, peak(), result


def costliest(run: Callable, seconds: float, device: str) -> dict:
    """The five kernels (on a CPU: operations) with the largest shares of a run's time. "busy": all of theirs / `seconds`."""
    on_cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
        timed(run, device)
    events = [event for event in profiled.key_averages() if not event.is_user_annotation]
    cost = {e.key[:100]: e.self_device_time_total if on_cuda else e.self_cpu_time_total for e in events}  # microseconds
    total = sum(cost.values())
    five = sorted(cost, key=cost.get, reverse=True)[:5]
    return {"busy": total / 1e6 / seconds, "kernels": {name: round(cost[name] / total, 4) for name in five}}


def attempt(make: Callable, *args, unless: str = "", **kwargs) -> tuple[Any, str]:
    """(what `make` returns, "") or (None, why it failed, in one line): a missing peer costs its own numbers, no others.
    `unless`: a reason not to try."""
    if unless:
        return None, unless
    try:
        return make(*args, **kwargs), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed; pip install -r requirements-peers.txt"
    except Exception as error:
        return None, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"


def first_step(flags: list[str], run: Path) -> float:
    """Seconds from starting `python train.py FLAGS` to the first line in run/metrics.jsonl. Then the program is ended."""
    metrics, command = run / "metrics.jsonl", [sys.executable, "train.py", *flags]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and '"step": 1,' in metrics.read_text()):
            if process.poll() is not None:
                end = "".join(process.stderr.read().strip().splitlines()[-1:])
                raise InputError(f"train.py {' '.join(flags)} came to no first step: {end}")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        process.kill()
    return seconds


def in_worker(function: Callable, **arguments) -> Any:
    """What a function returns in a new process. InputError, in one line, if it fails or is killed for want of memory."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result, why = pool.submit(attempt, function, **arguments).result()
    except BrokenProcessPool:
        why = "its process was killed; out of memory?"
    if why:
        raise InputError(why)
    return result


def alone(function: Callable, device: str, /, **arguments) -> Any:
    """What a function returns; on CUDA in a new process, whose end frees the card's memory."""
    return in_worker(function, **arguments) if device.startswith("cuda") else function(**arguments)


def row(case: str, unit: str, ours: float | None, peer: float | None = None, target: str = "", note: str = "") -> dict:
    """One line of the table. `target`: "<= 0.25", of the ratio ours / peer, or "ours >= 1.5". `met` says whether it was
    reached, None if there is no target or no number."""
    ratio = ours / peer if ours is not None and peer else None
    value = ours if target.startswith("ours") else ratio
    met = None
    if target and value is not None:
        sign, limit = target.split()[-2:]
        met = value <= float(limit) if sign == "<=" else value >= float(limit)
    return dict(case=case, unit=unit, ours=ours, peer=peer, ratio=ratio, target=target, met=met, note=note)


def table(rows: list[dict]) -> str:
    """The rows as Markdown. Their notes follow, each once, with the first row that it belongs to."""
    lines = ["| case | unit | ours | peer | ours / peer | target |", "|---|---|---:|---:|---:|---|"]
    notes: dict[str, str] = {}
    for r in rows:
        ours, peer = ("-" if r[name] is None else f"{r[name]:,.4g}" for name in ("ours", "peer"))
        ratio = "-" if r["ratio"] is None else f"{r['ratio']:.2f}"
        met = {True: ", met", False: ", missed", None: ""}[r["met"]]
        lines.append(f"| {r['case']} | {r['unit']} | {ours} | {peer} | {ratio} | {r['target'] or '-'}{met} |")
        notes.setdefault(r["note"], r["case"].strip())
    said = [f"- {case}: {note}" for note, case in notes.items() if note]
    return "\n".join([*lines, "", *said] if said else lines)
