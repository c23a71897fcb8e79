"""Speed and memory, ours beside the peers', in one run.

    pip install -r requirements-peers.txt
    python -m bench                                   the CPU cases, in 10 minutes on two cores
    python -m bench --only dpo generate               some of them
    python -m bench --device cuda --json bench.json   the GPU cases, in 8 minutes

    CPU    forward, generate, decode      logits, greedy decoding, decoding beside the memory's speed
           sft, dpo, lora                 training steps: time and peak memory
           quant (GPU too)                quantizing a linear layer, and its products
           growth, start                  time against length, batch, width, depth; until the first step
    GPU    train, attention, gpu-decode   a full-size Phi-2: training steps, packed rows, decoding in bf16, int8 and NF4
    asked  convert, load                  a full-size Phi-2, quantized and loaded

Times are medians of --repeats runs. The contenders take turns, so a noisy machine is noisy for both: read the ratios, not
the seconds. Memory is a peak, in a process per contender. Losses, gradients and tokens are compared before anything is
timed. Below 1 is better for seconds and bytes, above 1 for tokens a second; a row with a target says whether it was met. A
peer that is not installed costs its own numbers; a case that fails is reported, and the others go on.
"""

import argparse
import datetime
import importlib
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.timing import attempt, table
from bench.workloads import SMALL, Bench, write_models
from runtime.files import write_json

ON_CPU = ["forward", "generate", "decode", "sft", "dpo", "lora", "quant", "growth", "start"]
ON_GPU = ["train", "gpu-decode", "attention", "quant"]
MODULES = {  # a case is bench_CASE of its module
    **dict.fromkeys(("forward", "generate", "decode", "quant", "gpu-decode", "convert", "load"), "bench.inference"),
    **dict.fromkeys(("sft", "dpo", "lora", "growth", "start", "train", "attention"), "bench.training"),
}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
        name = f"{name}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"


def main(argv: list[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", nargs="+", choices=MODULES, metavar="CASE", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender that count (default 3)")
    parser.add_argument("--json", help="write the rows here too")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if flags.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; leave out --device cuda", file=sys.stderr)
        return 2
    names = flags.only or (ON_GPU if flags.device.startswith("cuda") else ON_CPU)
    rows, failed = [], {}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), flags.device, flags.repeats, **(SMALL if flags.small else {}))
        write_models(bench.directory, bench.model)
        for name in names:
            print(f"{name} ...", flush=True)
            began = time.perf_counter()
            case = f"bench_{name.replace('-', '_')}"
            made, why = attempt(lambda name=name, case=case: getattr(importlib.import_module(MODULES[name]), case)(bench))
            rows += made or []
            if why:
                failed[name] = why
                print(f"error: {name}: {why}", file=sys.stderr, flush=True)
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{hardware(flags.device)}\n\n{table(rows)}")
    if flags.json:
        write_json(flags.json, {"hardware": hardware(flags.device), "rows": rows, "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
