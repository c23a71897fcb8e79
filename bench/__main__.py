"""Speed and memory, ours beside the peers', in one run.

    pip install -r requirements-peers.txt
    python -m bench                                   the CPU cases, in 10 minutes on two cores
    python -m bench --only dpo generate               some of them
    python -m bench --device cuda --json bench.json   the GPU cases

    CPU    forward, generate, decode      logits, greedy decoding, decoding beside the memory's speed
           sft, dpo, lora                 training steps: time and peak memory
           quant (GPU too)                quantizing a linear layer, and its products
           growth, start                  time against length, batch, width, depth; until the first step
    GPU    train, gpu-decode              a full-size Phi-2: training steps, decoding in bf16, int8 and NF4

Times are medians. The contenders take turns, so a noisy machine is noisy for both: read the ratios, not the seconds. Memory
is a peak, in a process per contender. Losses, gradients and tokens are compared before anything is timed. Below 1 is better
for seconds and bytes, above 1 for tokens a second; a row with a target says whether it was met. A peer that is not installed
costs its own numbers; a case that fails is reported, and the others go on.
"""

import argparse
import datetime
import platform
import re
import sys
import tempfile
from pathlib import Path

import torch

from bench import inference, training
from bench.timing import attempt, table
from bench.workloads import Bench, write_models
from runtime.files import write_json

ON_CPU = {
    "forward": inference.bench_forward,
    "generate": inference.bench_generate,
    "decode": inference.bench_decode,
    "sft": training.bench_sft,
    "dpo": training.bench_dpo,
    "lora": training.bench_lora,
    "quant": inference.bench_quant,
    "growth": training.bench_growth,
    "start": training.bench_start,
}
ON_GPU = {"train": training.bench_train, "gpu-decode": inference.bench_gpu_decode, "quant": inference.bench_quant}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"


def main(argv: list[str] | None = None, **sizes) -> int:
    """`sizes` replace fields of Bench."""
    as_written, cases = argparse.RawDescriptionHelpFormatter, ON_CPU | ON_GPU
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", nargs="+", choices=cases, metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--json", help="write the rows here too")
    flags = parser.parse_args(argv)
    if flags.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; leave out --device cuda", file=sys.stderr)
        return 2
    rows, failed = [], {}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), flags.device, **sizes)
        write_models(bench.directory, bench.model)
        for name in flags.only or (ON_GPU if flags.device.startswith("cuda") else ON_CPU):
            print(f"{name} ...", flush=True)
            made, why = attempt(cases[name], bench)
            rows += made or []
            if why:
                failed[name] = why
                print(f"error: {name}: {why}", file=sys.stderr, flush=True)
    print(f"\n{hardware(flags.device)}\n\n{table(rows)}")
    if flags.json:
        write_json(flags.json, {"hardware": hardware(flags.device), "rows": rows, "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
