"""bench.py's number formats: a linear layer of Phi-2's size beside bitsandbytes', and a whole model converted and loaded.

quant      2,560 to 10,240: quantizing it, and its product with 1, 16 and 256 rows. Peer: bitsandbytes, on the CPU both
           its general code and, where the CPU has it, its AVX512-BF16 kernel
convert    ours alone: --stage quantize of a random full-size Phi-2; time, and peak memory of its process. Only on
           request: --only convert
load       ours alone: a random full-size Phi-2 (2.78 B parameters, bf16, two shards of 5.6 GB, written to a temporary
           directory) is loaded and run; its peak memory. Only on request: --only load
"""

import copy
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import ROOT, medians, row
from model import Phi, PhiConfig
from quant import quantize_4bit, quantize_layer, use_kernels
from runtime.files import InputError


@torch.no_grad()
def bench_quant(directory: Path, device: str, repeats: int) -> list[dict]:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plain = torch.nn.Linear(2560, 10240)
    plain.weight.normal_(0, 0.02)
    fast = {to: quantize_layer(plain.weight, plain.bias, to).to(device) for to in ("nf4", "int8")}
    eager = copy.deepcopy(fast)
    for layer in fast.values():
        print(
            use_kernels(layer, device, compiled=True) or f"  our {layer.format} layer runs {layer.kernel} kernels",
            flush=True,
        )
    theirs = {
        "nf4": bnb.nn.Linear4bit(2560, 10240, quant_type="nf4", compress_statistics=False),
        "int8": bnb.nn.Linear8bitLt(2560, 10240, has_fp16_weights=False, threshold=0.0),
    }
    for to, layer in theirs.items():
        layer.load_state_dict(plain.state_dict())
        theirs[to] = layer.to(device)
    plain = plain.to(device)
    weight = plain.weight.data
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    if not torch.equal(packed, fast["nf4"].weight) or not torch.equal(state.absmax, fast["nf4"].absmax):
        raise InputError("the two do not quantize alike; their times cannot be compared")
    rows = []

    def compare(case: str, ours: Callable, peer: Callable) -> None:
        seconds = medians({"ours": ours, "peer": peer}, max(repeats, 9), device)
        rows.append(row(case, "ms", 1e3 * seconds["ours"], 1e3 * seconds["peer"]))

    def their_quantizer():
        return bnb.functional.quantize_4bit(weight, quant_type="nf4")

    compare("quantize to NF4, plain PyTorch / bitsandbytes", lambda: quantize_4bit(weight), their_quantizer)
    compare("quantize to NF4, compiled / bitsandbytes", lambda: quantize_4bit(weight, compiled=True), their_quantizer)
    one, dtype = torch.randn(1, 2560, device=device), torch.float32 if device == "cpu" else torch.bfloat16
    x, dense = one.to(dtype), plain.to(dtype)
    compare("int8 layer, batch 1, plain PyTorch / unquantized layer", lambda: eager["int8"](x), lambda: dense(x))
    compare("int8 layer, batch 1, our kernel / unquantized layer", lambda: fast["int8"](x), lambda: dense(x))
    compare("NF4 layer, batch 1, our kernel / unquantized layer", lambda: fast["nf4"](x), lambda: dense(x))
    eager["int8"].threshold, peer = 6.0, theirs["int8"].eval()
    compare("LLM.int8() layer, batch 1 / bitsandbytes", lambda: eager["int8"](x), lambda: peer(x))
    # On a CPU with AVX512-BF16 bitsandbytes has a kernel for evaluation; in training mode it runs what other CPUs run.
    modes = {"bitsandbytes": "train"} | ({"bitsandbytes AVX512-BF16": "eval"} if _has_avx512_bf16(device) else {})
    for label, mode in modes.items():
        peer = copy.deepcopy(theirs["nf4"]).train(mode == "train")
        for size in (1, 16, 256):
            x = torch.randn(size, 2560, device=device, dtype=dtype)
            for which, layers in {"plain PyTorch": eager, "our kernel": fast}.items():
                if device != "cpu" or size == 1 or layers is eager:  # on the CPU our kernel is for one row
                    ours, case = layers["nf4"], f"NF4 layer, batch {size}, {which} / {label}"
                    compare(case, lambda ours=ours, x=x: ours(x), lambda peer=peer, x=x: peer(x))
    x = one.to(dtype)
    return rows + (_bandwidth(fast, x, repeats, device) if device != "cpu" else [])


def _has_avx512_bf16(device: str) -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return device == "cpu" and bool(has_avx512bf16())


def _bandwidth(layers: dict, x: torch.Tensor, repeats: int, device: str) -> list[dict]:
    """Bytes of weights that decoding reads in a second, beside a copy in the same run (which reads and writes)."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, 9, device)["copy"]
    rows = []
    for to, layer in layers.items():
        stored = sum(b.nbytes for b in layer.buffers() if b is not None)
        read = stored / medians({to: lambda layer=layer: layer(x)}, 9, device)[to]
        rows.append(row(f"{to} layer, batch 1, bandwidth / copy's", "GB/s", read / 1e9, copied / 1e9))
    return rows


# ---------------------------------------------------------------------------------------------------------- whole models


@torch.no_grad()
def full_size_phi(directory: Path, device: str = "cpu", **shape) -> Path:
    """Writes a full-size Phi-2 of random weights in bf16. `shape`: other fields of the config, for a quick test."""
    full = directory / "full"
    if not full.exists():
        with torch.device("meta"):
            phi = Phi(PhiConfig(**shape))
        phi.to_empty(device=device)
        phi.to(torch.bfloat16)
        for name, p in phi.named_parameters():
            p.fill_(1.0) if "layernorm.weight" in name else p.zero_() if name.endswith("bias") else p.uniform_(-0.03, 0.03)
        phi.save_pretrained(full)
    return full


def in_new_process(code: str) -> tuple[list[str], int]:
    """Runs Python code in a fresh process; the words of its last line and its peak memory in bytes (Linux). Its own VmHWM:
    `ru_maxrss` would count the peak of this process too, from before the new one's memory was its own."""
    peak = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", f"{code}\n{peak}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise InputError(f"a process of this benchmark failed:\n{done.stdout[-2000:]}")
    *_, last, peak = done.stdout.strip().splitlines()
    return last.split(), int(peak) * 1024


def bench_convert(directory: Path, device: str, repeats: int) -> list[dict]:
    """--stage quantize of a full-size Phi-2, each format in a process of its own."""
    full, rows = full_size_phi(directory), []
    for to in ("nf4", "int8"):
        flags = ["--stage", "quantize", "--model", str(full), "--to", to, "--out", str(directory), "--name", to]
        began = time.perf_counter()
        (status,), peak = in_new_process(f"import train; print(train.main({[*flags, '--device', device]!r}))")
        seconds = time.perf_counter() - began
        if status != "0":
            raise InputError(f"train.py {' '.join(flags)} failed")
        written = sum(file.stat().st_size for file in (directory / to).glob("*.safetensors"))
        case = f"quantize full-size Phi-2 (bf16) to {to}"
        rows.append(row(case, "s", seconds))
        rows.append(row("  size written", "MB", written / 1e6))
        rows.append(row("  peak memory, process included", "MB", peak / 1e6))
    return rows


def bench_load(directory: Path, device: str, repeats: int) -> list[dict]:
    """A full-size Phi-2 is loaded and run in a fresh process."""
    full = full_size_phi(directory)
    code = (
        "import time, torch; from model import Phi; began = time.perf_counter(); "
        f"phi = Phi.from_pretrained({str(full)!r}, dtype=torch.bfloat16, device={device!r}); "
        f"loaded = time.perf_counter(); ids = torch.arange(32, device={device!r})[None]; "
        "ok = bool(torch.isfinite(phi(ids)).all()); ended = time.perf_counter(); print(ok, loaded - began, ended - loaded)"
    )
    (ok, load, forward), peak = in_new_process(code)
    stored = sum(f.stat().st_size for f in full.glob("*.safetensors"))
    print(f"  {stored / 1e9:.2f} GB in {len(list(full.glob('*.safetensors')))} shards; logits finite: {ok}", flush=True)
    return [
        row("load full-size Phi-2 (bf16)", "s", float(load)),
        row("  peak resident memory, process included", "MB", peak / 1e6),
        row("  first forward pass, 32 tokens", "s", float(forward)),
    ]
