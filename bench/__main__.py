"""Speed and memory, ours beside the peers', in one run.

    pip install -r requirements-peers.txt
    python -m bench                                   all cases below but the last two, on two CPU cores in 10 minutes
    python -m bench --only dpo generate               some of them
    python -m bench --device cuda --json bench.json   on a GPU, in 8 minutes

    forward, generate, decode        logits, greedy decoding, decoding against the memory's speed     bench_inference.py
    sft, dpo, lora                   training steps: time and peak memory                             bench_training.py
    quant                            quantizing a layer, and its products                             bench_formats.py
    growth, start                    time against length, batch, width, depth; until the first step   bench_scaling.py
    train, gpu-decode, attention     the same questions for a Phi-2 of full size on a GPU             bench_gpu.py
    convert, load                    a Phi-2 of full size, quantized and loaded; only on request      bench_formats.py

Times are medians of --repeats runs with the contenders taking turns, so that a noisy machine is noisy for both; read the
ratios, not the seconds. Memory is a peak, each contender in a process of its own. Losses, gradients and tokens are compared
before anything is timed. Below 1 is better for seconds and bytes, above 1 for tokens a second; a row with a target says
whether it was met. The cases run in the order given; one that fails is reported and the others go on.
"""

import argparse
import datetime
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.formats import bench_convert, bench_load, bench_quant
from bench.gpu import TINY, bench_attention, bench_gpu_decode, bench_train, decode_contender, train_contender
from bench.inference import bench_decode, bench_forward, bench_generate
from bench.scaling import bench_growth, bench_start
from bench.timing import reason, table, work
from bench.training import bench_dpo, bench_lora, bench_sft, step_memory, write_models
from runtime.files import write_json

CASES = {
    "forward": bench_forward,
    "generate": bench_generate,
    "decode": bench_decode,
    "sft": bench_sft,
    "dpo": bench_dpo,
    "lora": bench_lora,
    "quant": bench_quant,
    "growth": bench_growth,
    "start": bench_start,
    "train": bench_train,
    "gpu-decode": bench_gpu_decode,
    "attention": bench_attention,
    "convert": bench_convert,
    "load": bench_load,
}
ON_CPU = ["forward", "generate", "decode", "sft", "dpo", "lora", "quant", "growth", "start"]
ON_GPU = ["train", "gpu-decode", "attention", "quant"]
WORKERS = {"step_memory": step_memory, "train": train_contender, "decode": decode_contender}
# The same code with sizes that mean nothing, for tests.
SMALL = {
    "decode": dict(new_tokens=4, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
    "growth": dict(lengths=(16, 32), batches=(1, 2), widths=(128, 256), depths=(1, 2)),
    "train": dict(tokens=16, **TINY),
    "gpu-decode": dict(new_tokens=4, **TINY),
    "attention": dict(row_tokens=256, **TINY),
}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{(models or [platform.processor()])[0]}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"


def run_cases(
    cases: dict[str, Callable], directory: Path, device: str, repeats: int, small: bool
) -> tuple[list[dict], dict]:
    """The rows of all cases, and {case: why it failed}."""
    rows, failed = [], {}
    for name, case in cases.items():
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        try:
            rows += case(directory, device, repeats, **(SMALL.get(name, {}) if small else {}))
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        except Exception as error:  # the other cases' rows are worth having
            failed[name] = reason(error)
            print(f"error: {name}: {failed[name]}", file=sys.stderr, flush=True)
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender that count (default 3)")
    parser.add_argument("--json", help="write the rows here too")
    for hidden in ("--worker", "--arguments"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.worker:
        return work(WORKERS, flags.worker, flags.arguments)
    if flags.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if flags.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; leave out --device cuda", file=sys.stderr)
        return 2
    names = flags.only or (ON_GPU if flags.device.startswith("cuda") else ON_CPU)
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory))
        cases = {name: CASES[name] for name in names}
        rows, failed = run_cases(cases, Path(directory), flags.device, flags.repeats, flags.small)
    print(f"\n{hardware(flags.device)}\n\n{table(rows)}")
    if flags.json:
        write_json(flags.json, {"hardware": hardware(flags.device), "rows": rows, "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
