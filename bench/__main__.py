"""Speed and memory, ours beside the peers', in one run.

    pip install -r requirements-peers.txt
    python -m bench                                   the CPU cases, in 10 minutes on two cores
    python -m bench --only dpo generate               some of them
    python -m bench --device cuda --json bench.json   the GPU cases; --quick leaves out the peers
    python -m bench --small                           the GPU cases in tiny on a CPU, to see what they print

    CPU    forward, generate, decode      logits, greedy decoding, decoding beside the memory's speed
           serve                          NF4 and int8 beside llama.cpp's Q4_0 and Q8_0, and bitsandbytes
           sft, dpo, lora                 training steps: time and peak memory
           products (GPU too)             1 to 6,144 rows times a layer in 16 or 32 bits, int8 and NF4
           growth, start                  time against length, batch, width, depth; until the first step
    GPU    attention, optimizers          by segment and by mask; AdamW with moments in fp32 and in 8 bits
           gpu-decode, train              a full-size Phi-2: decoding, and DPO steps

Every row is printed as a line of JSON as soon as it is known, and at the end all of them as a table. Times are medians. The
contenders take turns, so a noisy machine is noisy for both: read the ratios, not the seconds. Memory is a peak, in a process
per contender. A peer that is not installed costs its own numbers, a case that fails is reported, and the others go on. What
uses a GPU runs in a process of its own; this one holds none of its memory. docs/speed.md explains rows and targets.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench import inference, kernels, training
from bench.timing import alone, attempt, in_worker, table
from bench.workloads import SMALL, Bench, write_models
from runtime.files import write_json

ON_CPU = {
    "forward": inference.bench_forward,
    "generate": inference.bench_generate,
    "decode": inference.bench_decode,
    "serve": inference.bench_serve,
    "sft": training.bench_sft,
    "dpo": training.bench_dpo,
    "lora": training.bench_lora,
    "products": kernels.products,
    "growth": training.bench_growth,
    "start": training.bench_start,
}
ON_GPU = {
    "attention": kernels.attention,
    "products": kernels.products,
    "optimizers": kernels.optimizers,
    "gpu-decode": inference.bench_gpu_decode,
    "train": training.bench_train,
}
ON_A_GPU = {"rows": (1, 8, 64, 512, 6144), "repeats": 5}  # fields of Bench


def card(device: str) -> str:
    """The name of a GPU, or of the CPU with its threads."""
    if device.startswith("cuda"):
        return in_worker(torch.cuda.get_device_name, device=device)
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def run_case(case: Callable, bench: Bench, stamp: dict, rows: list[dict]) -> None:
    """Prints a case's rows and adds them to `rows`, one by one: those before an error are kept."""
    for made in alone(case, bench.device, bench=bench) if case.__module__ == kernels.__name__ else case(bench):
        rows.append(made | stamp)
        print(json.dumps(rows[-1]), flush=True)


def main(argv: list[str] | None = None) -> int:
    as_written, cases = argparse.RawDescriptionHelpFormatter, ON_CPU | ON_GPU
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", nargs="+", choices=cases, metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--quick", action="store_true", help="without the peers")
    parser.add_argument("--small", action="store_true", help="the GPU cases in tiny sizes, on any device")
    parser.add_argument("--json", help="write the rows here too")
    flags = parser.parse_args(argv)
    on_gpu = flags.device.startswith("cuda")
    sizes = SMALL if flags.small else ON_A_GPU if on_gpu else {}
    if on_gpu and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; leave out --device cuda", file=sys.stderr)
        return 2
    # Batches differ in size, and blocks of fixed size would leave gaps; for the processes that are started from here.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows, failed = [], {}
    stamp = {"card": card(flags.device), "torch": torch.__version__, "date": str(datetime.date.today())}
    with tempfile.TemporaryDirectory() as directory:
        no_peers = "left out by --quick" if flags.quick else ""
        bench = Bench(Path(directory), flags.device, no_peers=no_peers, card=stamp["card"], **sizes)
        write_models(bench.directory, bench.model)
        for name in flags.only or (ON_GPU if on_gpu or flags.small else ON_CPU):
            print(f"{name} ...", flush=True)
            _, why = attempt(run_case, cases[name], bench, stamp, rows)
            if why:
                failed[name] = why
                print(f"error: {name}: {why}", file=sys.stderr, flush=True)
    hardware = f"{stamp['card']}; torch {stamp['torch']}, Python {platform.python_version()}, {stamp['date']}"
    print(f"\n{hardware}\n\n{table(rows)}")
    if flags.json:
        write_json(flags.json, {"hardware": hardware, "rows": rows, "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
