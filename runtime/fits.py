"""Whether a run fits into memory, asked before anything is loaded, and if not, the flags under which it would."""

import contextlib
import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import Example
from model import PhiConfig, read_config
from runtime import parallel
from runtime.files import InputError
from runtime.memory import Load, as_loaded, estimate, largest_load, offloaded_bytes
from runtime.settings import Config

LIBRARIES = 130_000_000  # of a CPU process: what it loads and sets aside between the estimate and its first steps
LARGE = 10**9  # from here on `give_back_at_once` is worth its time
ROOM = 1.1  # what is suggested instead of what does not fit must fit with a tenth more

# ------------------------------------------------------------------------------------------------- what there is to have


def status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status, such as VmRSS, what the process has in memory; None where there is none."""
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None


def process_bytes(device: str) -> int:
    """What holds memory besides tensors: on the CPU Python, torch and the data, as they are; on a GPU nothing that its
    allocator counts (CONTEXT is what it does not count)."""
    return 0 if device.startswith("cuda") else (status("VmRSS") or 300_000_000) + LIBRARIES


def free_bytes(device: str) -> int:
    """Memory that a process could still have. On CUDA what its allocator keeps of earlier runs is free for the next one; on
    the CPU files that the system merely caches make room (MemAvailable)."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def watch_peak(device: str) -> Callable[[], int | None]:
    """Begins to watch, and returns a function for the largest number of bytes since: on CUDA what tensors took, on the CPU
    (Linux) what the process had, loading included. None where it cannot be known."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    except OSError:
        return lambda: None
    return lambda: status("VmHWM")


def give_back_at_once() -> None:
    """Makes glibc return every freed block of 1 MB or more to the system at once.

    By default it keeps blocks of up to 32 MB for later, and those that come later often do not fit into the holes: a step
    then had up to twice what its tensors hold. New blocks cost the time to fill them with zeros.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


# --------------------------------------------------------------------------------------------------------- does it fit?

Change = tuple[int, dict]  # (what it costs the run, the flags that change)


def changes(config: Config, examples: Sequence[Example]) -> list[list[Change]]:
    """What would need less memory, flag by flag, in the order in which it is to be tried: first what changes only time and
    memory, then adapters instead of all weights and 16 or 4 bits instead of 32, last shorter examples."""
    slots = [] if config.gradient_checkpointing else [[(1, {"gradient_checkpointing": True})]]
    if config.pack:
        longest = max(map(len, examples))
        slots += [[(1, {"pack": longest})]] if longest < config.pack else []
    elif config.micro_batch_size > 1:
        slots += [[(1, {"micro_batch_size": 1})]]
    if not config.lora:
        slots += [] if config.optimizer == "adamw8bit" else [[(1, {"optimizer": "adamw8bit"})]]
        if config.device.startswith("cuda") and not config.offload_optimizer and parallel.size() == 1:
            slots += [[(2, {"offload_optimizer": True})]]
    if config.stage != "qat":
        adapters = {} if config.lora else {"lora": 16}
        slots.append([(10, adapters)] if adapters else [])
        if config.base in (None, "fp32"):
            bf16 = {} if config.dtype == "bf16" else {"dtype": "bf16"}
            slots[-1] += [(11, adapters | {"base": "bf16"} | bf16), (12, adapters | {"base": "nf4"})]
            slots[-1] += [(13, adapters | {"base": "nf4"} | bf16)] if bf16 else []
    shorter = [(config.max_length >> n, min(config.max_prompt_length, config.max_length >> n + 1)) for n in (1, 2, 3)]
    slots.append([(30 * n, {"max_length": a, "max_prompt_length": b}) for n, (a, b) in enumerate(shorter, start=1)])
    return slots


def as_flags(change: dict) -> str:
    named = {f"--{name.replace('_', '-')}": value for name, value in change.items()}
    return " ".join(name if value is True else f"{name} {value}" for name, value in named.items())


def shortened(examples: Sequence[Example], config: Config) -> list[Example]:
    """About the examples that are left with the config's --max-length and --max-prompt-length: prompts are cut to it."""
    cut = [replace(e, prompt=e.prompt[-config.max_prompt_length :]) for e in examples]
    return [e for e in cut if len(e.prompt) + max(map(len, e.completions)) <= config.max_length]


@dataclass
class Need:
    """Bytes that a run needs and that are free: on its device, and on the CPU for what it offloads."""

    parts: dict[str, int]
    free: int
    offloaded: int = 0
    host_free: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, room: float = 1.0) -> bool:
        has = status("VmRSS") or 0 if "process" in self.parts else 0  # the process is there already
        return room * (self.total - has) <= self.free and room * self.offloaded <= self.host_free


def need(phi: PhiConfig, config: Config, load: Load, free: int, host_free: int) -> Need:
    offloaded = offloaded_bytes(phi, config) if config.offload_optimizer else 0
    return Need(estimate(phi, config, load, process_bytes(config.device)), free, offloaded, host_free)


def run_need(directory: Path, config: Config, examples: Sequence[Example]) -> tuple[PhiConfig, Need]:
    """The model's config, and what the largest step of a run needs."""
    phi = read_config(directory)
    config = as_loaded(directory, phi, config)
    sharers = 1 if config.device.startswith("cuda") else parallel.size()  # several processes on one CPU share its memory
    free = [free_bytes(device) // sharers for device in (config.device, "cpu")]
    return phi, need(phi, config, largest_load(examples, config), *free)


def check_fits(directory: Path, config: Config, examples: Sequence[Example]) -> Need:
    """What the run needs. InputError if that is more than there is, with the fewest and mildest flags under which it would
    fit, with a tenth to spare."""
    _, has = run_need(directory, config, examples)
    if parallel.largest(not has.fits()):
        instead = "A resumed run keeps its settings, so it goes on only where more memory is free."
        if not config.resume:
            instead = way_out(directory, config, examples, has)
        raise InputError(f"{describe(has, config.device)}.\n{instead}")
    if not config.device.startswith("cuda") and has.total > LARGE:
        give_back_at_once()
    return has


def describe(need: Need, device: str) -> str:
    largest = sorted(need.parts.items(), key=lambda part: -part[1])[:4]
    text = f"a training step needs about {need.total / 1e9:.1f} GB on {device} ("
    text += ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest) + f", ...), {need.free / 1e9:.1f} GB are free"
    if need.offloaded:
        text += f"; and {need.offloaded / 1e9:.1f} GB for the offloaded optimizer on the CPU, of {need.host_free / 1e9:.1f}"
    return text


def way_out(directory: Path, config: Config, examples: Sequence[Example], has: Need) -> str:
    """The flags to type, or that there are none."""
    phi = read_config(directory)
    config = as_loaded(directory, phi, config)
    loads: dict[tuple, Load | None] = {}

    def load(changed: Config) -> Load | None:
        key = (changed.micro_batch_size, changed.pack, changed.max_length)
        if key not in loads:
            left = examples if changed.max_length == config.max_length else shortened(examples, changed)
            loads[key] = largest_load(left, changed) if left else None
        return loads[key]

    sets = itertools.product(*([(0, {}), *slot] for slot in changes(config, examples)))
    least = has.total
    for chosen in sorted(sets, key=lambda chosen: sum(cost for cost, _ in chosen)):
        change = {name: value for _, flags in chosen for name, value in flags.items()}
        changed = replace(config, **change)
        if load(changed) is None:
            continue
        would = need(phi, changed, load(changed), has.free, has.host_free)
        if would.fits(ROOM):
            left = len(shortened(examples, changed))
            fewer = f"; {left:,} of {len(examples):,} examples are that short" if "max_length" in change else ""
            again = {} if config.dry_run or config.overwrite else {"overwrite": True}  # its directory has been made
            return f"It would fit, with {would.total / 1e9:.1f} GB, if you add\n  {as_flags(change | again)}{fewer}"
        least = min(least, would.total)
    return f"No flag makes it fit: the least is {least / 1e9:.1f} GB, with adapters, 4 bits, and short examples."
