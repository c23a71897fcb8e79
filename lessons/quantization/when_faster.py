"""When is a 4-bit layer faster?

A layer times N rows does two things, and cannot take less time than either of them:

    read the weights           bytes of the layer / what memory delivers a second             the same for every N
    multiply and add           2 N I O / what the processor computes a second                 grows with N

The larger of the two is the roofline (Williams et al. 2009). With one row, reading is the limit: each weight is read for
just two operations. 4-bit weights are a seventh of fp32's bytes and could be read in a seventh of the time. With many rows,
arithmetic is the limit, and it is done in fp32 or bf16 whatever the weights are stored in.

But codes have to be decoded first: for each weight a level is looked up and multiplied by its scale. That is done once,
however many rows there are, so its share falls as rows are added. Whether 4 bits save time with one row depends on how fast
a program decodes. `quant_kernels.blockwise_product` decodes with PyTorch's operations on a CPU and with Triton kernels on a
GPU.

Times are medians; formats take turns. With few rows each product goes round copies of the layer, so that weights come from
memory and not from the cache, as they do in a model of many layers. int8 and NF4 compute in fp32 on a CPU and in bf16 on a
GPU. A CPU without instructions for bf16 is slow in it. Memory's speed is the best of several readings and copies of a large
tensor; arithmetic's is the best of several products of the unquantized layer with the most rows.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from bench.kernels import round_of, stored
from bench.timing import copy_speed, medians, timed
from lessons.lesson import Claim, print_table
from quant import quantize_layer
from runtime.files import picture

REPEATS = 5


@dataclass(frozen=True)
class Device:
    name: str
    columns: int  # I and O of the layer
    features: int
    rows: tuple[int, ...]
    dtype: torch.dtype  # in which int8 and NF4 compute
    cache: int  # bytes: copies of a layer together exceed it

    @property
    def dense(self) -> str:  # the unquantized layer of the same dtype
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def this_device() -> Device:
    if torch.cuda.is_available():
        return Device("cuda", 2560, 10240, (1, 4, 16, 64, 512, 4096), torch.bfloat16, 200_000_000)
    return Device("cpu", 1024, 2048, (1, 4, 16, 64, 512), torch.float32, 64_000_000)


def memory_speed(device: str) -> float:
    """Bytes a second, the best of several tries: reading a large tensor, or copying it, counted twice."""
    large = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    reading = min(timed(lambda: large.sum(), device) for _ in range(10))
    return max(large.nbytes / reading, 1e9 * copy_speed(device))


def arithmetic_speed(layer: nn.Linear, device: Device) -> float:
    """Operations a second, the best of several tries."""
    x = torch.randn(device.rows[-1], device.columns, device=device.name, dtype=layer.weight.dtype)
    return 2 * x.numel() * device.features / min(timed(lambda: layer(x), device.name) for _ in range(REPEATS))


def make_layers(device: Device) -> dict[str, nn.Module]:
    plain = nn.Linear(device.columns, device.features, device=device.name)
    bf16 = nn.Linear(device.columns, device.features, device=device.name, dtype=torch.bfloat16)
    quantized = {to: quantize_layer(plain.weight, plain.bias, to) for to in ("int8", "nf4")}
    return {"fp32": plain, "bf16": bf16, **quantized}


def dtype_of(name: str, device: Device) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name, device.dtype)


def copies(name: str, layer: nn.Module, device: Device) -> int:
    """So many that together they exceed the cache; on a CPU two will do for int8 and NF4, which take far longer to decode
    than to read (the table shows how far from the roofline they are)."""
    most = 2 if device.name == "cpu" and name in ("int8", "nf4") else 16
    return min(most, math.ceil(device.cache / stored(layer)))


def seconds_of(layers: dict[str, nn.Module], rows: int, device: Device) -> dict[str, float]:
    """Median seconds of a product with so many rows."""
    counts = {name: copies(name, layer, device) if rows <= 16 else 1 for name, layer in layers.items()}
    x = torch.randn(rows, device.columns, device=device.name)
    runs = {
        name: round_of(nn.Module.__call__, layer, x.to(dtype_of(name, device)), counts[name])
        for name, layer in layers.items()
    }
    return {name: s / counts[name] for name, s in medians(runs, REPEATS, device.name).items()}


@torch.no_grad()
def run(figure: Path) -> list[Claim]:
    device = this_device()
    layers = make_layers(device)
    seconds = {rows: seconds_of(layers, rows, device) for rows in device.rows}
    memory = memory_speed(device.name)
    arithmetic = {layers[name].weight.dtype: arithmetic_speed(layers[name], device) for name in ("fp32", "bf16")}

    def limit(name: str, rows: int) -> float:
        operations = 2 * rows * device.columns * device.features
        return max(stored(layers[name]) / memory, operations / arithmetic[dtype_of(name, device)])

    print_table(
        ["ms, and % of the roofline", "MB", *(f"{rows} row{'s' * (rows > 1)}" for rows in device.rows)],
        [
            [name, f"{stored(layer) / 1e6:.1f}"]
            + [f"{1e3 * s[name]:.3g} ({100 * limit(name, rows) / s[name]:.0f}%)" for rows, s in seconds.items()]
            for name, layer in layers.items()
        ],
    )
    where = torch.cuda.get_device_name() if device.name == "cuda" else f"CPU threads: {torch.get_num_threads()}"
    print(
        f"\n  {where}, a layer of {device.columns:,} x {device.features:,}; memory {memory / 1e9:.3g} GB/s, "
        + ", ".join(f"{rate / 1e9:,.3g} GFLOP/s in {str(dtype)[6:]}" for dtype, rate in arithmetic.items())
    )
    ratio = {rows: {name: s[name] / s[device.dense] for name in layers} for rows, s in seconds.items()}
    with picture(figure, columns=2, size=(11, 4.5)) as (times, ratios):
        for k, name in enumerate(layers):
            times.loglog(device.rows, [1e3 * s[name] for s in seconds.values()], "o-", color=f"C{k}", label=name)
            times.loglog(device.rows, [1e3 * limit(name, rows) for rows in device.rows], ":", color=f"C{k}")
            ratios.loglog(device.rows, [r[name] for r in ratio.values()], "o-", color=f"C{k}", label=name)
        times.set(title=f"time of a layer; dotted: its roofline ({where})", xlabel="rows", ylabel="milliseconds")
        ratios.set(title=f"beside {device.dense}: below 1 is faster", xlabel="rows", ylabel=f"time / time of {device.dense}")
        low, high = (pick(r for of in ratio.values() for r in of.values()) for pick in (min, max))
        ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low / 2 < tick < 2 * high]
        ratios.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        for axis in (times, ratios):
            axis.set_xticks(device.rows, device.rows)
            axis.minorticks_off()
            axis.legend()
    return claims(device, layers, seconds, {rows: r["nf4"] for rows, r in ratio.items()}, memory)


def claims(device: Device, layers: dict, seconds: dict, ratio: dict[int, float], memory: float) -> list[Claim]:
    dense, most, few = device.dense, device.rows[-1], [rows for rows in device.rows if rows <= 64]
    longer = seconds[most][dense] / seconds[1][dense]
    reading = [stored(layers[name]) / memory / seconds[1][name] for name in (dense, "nf4")]  # shares of memory's speed
    smaller = stored(layers[dense]) / stored(layers["nf4"])
    slowest = max(few, key=ratio.get)
    faster = ", ".join(str(rows) for rows, r in ratio.items() if r < 0.9) or "none of these numbers of"
    return [
        Claim(
            f"Rows share the reading of the weights: {most} rows take the {dense} layer {longer:.0f} times as long as one, "
            f"not {most} times. With one row it reads its weights at {100 * reading[0]:.0f}% of memory's speed.",
            longer < most / 3 and reading[0] > 1.5 * reading[1],
        ),
        Claim(
            f"NF4 decodes once for all rows, so its price falls: {ratio[slowest]:.1f} times {dense}'s time with {slowest} "
            f"row{'s' * (slowest > 1)}, {ratio[most]:.1f} times with {most}.",
            ratio[most] < 0.9 * ratio[slowest],
        ),
        Claim(
            f"NF4's layer has {smaller:.1f} times fewer bytes, but with one row it takes {ratio[1]:.1f} times {dense}'s "
            f"time. It reads its codes at {100 * reading[1]:.1f}% of memory's speed: decoding, not memory, is its limit "
            f"here. It is faster by a tenth or more with {faster} rows.",
            reading[1] < 0.5 and ratio[1] > 1.5 / smaller,
        ),
    ]
