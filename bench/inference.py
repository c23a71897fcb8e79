"""Inference, ours beside transformers' and bitsandbytes'.

To decode one row, each weight is read once and used once, so decoding can be no faster than the weights are read. `decode`
shows bytes of weights x tokens a second beside the speed of reading a buffer of the same size, by torch.sum or torch.dot,
whichever is faster, in turn in the same process; keys, values and one row of the embedding, 0.3% here, are not counted. On a
GPU the limit is a copy in its memory, which reads and writes.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import train
from bench import peers
from bench.timing import attempt, in_worker, in_workers, medians, rates, resident, row
from bench.workloads import Bench, full_size_phi, prompts
from generate import generate
from model import Phi, PhiConfig
from quant import FrozenLinear, quantize_4bit, quantize_layer
from runtime.files import InputError


def load_both(directory: Path, device: str) -> tuple[Phi, torch.nn.Module | None, str]:
    """Our model, transformers' or None, and why not."""
    theirs, missing = attempt(peers.load_phi, directory, device=device)
    return Phi.from_pretrained(directory, device=device), theirs and theirs.eval(), missing


def greedy(model, ids: torch.Tensor, new_tokens: int) -> Callable:
    """run() -> the new tokens of each row, as lists: our `generate` or, for any other model, transformers'."""
    if isinstance(model, Phi):
        return lambda: generate(model, ids.tolist(), max_new_tokens=new_tokens)
    padded, mask = ids.to(model.device), torch.ones_like(ids).to(model.device)
    settings = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return lambda: model.generate(padded, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


def both_greedy(ours: Phi, theirs, ids: torch.Tensor, new_tokens: int) -> dict[str, Callable | None]:
    """Both contenders; InputError if they do not generate the same tokens."""
    runs = {"ours": greedy(ours, ids, new_tokens), "peer": theirs and greedy(theirs, ids, new_tokens)}
    if theirs and runs["ours"]() != runs["peer"]():
        raise InputError("the two do not generate the same tokens; their times cannot be compared")
    return runs


@torch.no_grad()
def bench_forward(bench: Bench) -> list[dict]:
    ours, theirs, missing = load_both(bench.directory, bench.device)
    rows, tokens = bench.forward
    ids = prompts(rows, tokens, ours.config.vocab_size).to(bench.device)
    if theirs:
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    runs = {"ours": partial(ours, ids), "peer": theirs and partial(theirs, ids)}
    seconds = medians(runs, max(bench.repeats, 5), bench.device)
    case = f"forward, {rows} x {tokens} tokens / transformers"
    return [row(case, "s", seconds["ours"], seconds["peer"], "<= 1.0", note=missing)]


def bench_generate(bench: Bench) -> list[dict]:
    ours, theirs, missing = load_both(bench.directory, bench.device)
    tokens, new_tokens = bench.answer
    rows = []
    for size in (1, 16):
        runs = both_greedy(ours, theirs, prompts(size, tokens, ours.config.vocab_size), new_tokens)
        seconds = medians(runs, max(bench.repeats, 5), bench.device)
        case, speeds = f"generate, batch {size} / transformers", rates(new_tokens * size, *seconds.values())
        rows.append(row(case, "tokens/s", *speeds, ">= 1.5", note=missing))
    return rows


def read_bytes(model) -> int:
    """Bytes of weights that one step of decoding reads: all but the embedding, of which it reads one row."""
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if "embed_tokens" not in name)


@torch.no_grad()
def bench_decode(bench: Bench) -> list[dict]:
    wide, device = bench.directory / "wide", bench.device
    Phi(PhiConfig(**bench.wide)).init_weights(seed=0).save_pretrained(wide)
    ours, theirs, missing = load_both(wide, device)
    tokens, new_tokens = bench.short_answer
    size = read_bytes(ours)
    buffer = torch.ones(size // 4, device=device)
    runs = both_greedy(ours, theirs, prompts(1, tokens, ours.config.vocab_size), new_tokens)
    runs |= {"sum": buffer.sum, "dot": lambda: torch.dot(buffer, buffer)}
    seconds = medians(runs, max(bench.repeats, 5), device)
    limit = size / min(seconds["sum"], seconds["dot"]) / 1e9
    read = size * new_tokens / seconds["ours"] / 1e9
    case = "decode, {num_hidden_layers} layers, {hidden_size:,} wide, batch 1".format_map(bench.wide)
    note = f"{size / 1e6:,.0f} MB of weights a token; the limit is a read of as many bytes (sum or dot) in turn with it"
    return [
        row(f"{case}, weights read / memory's limit", "GB/s", read, limit, ">= 0.8", note=note),
        row(f"{case} / transformers", "tokens/s", *rates(new_tokens, seconds["ours"], seconds["peer"]), note=missing),
    ]


def copy_speed(size: int, repeats: int, device: str) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]


def decode_contender(contender: str, base: str | None, directory: str, device: str, repeats: int, answer: list[int]) -> dict:
    """Tokens a second at batch 1, bytes of weights a token, and bytes a second of a copy: for a process of its own."""
    load_phi = Phi.from_pretrained if contender == "ours" else peers.load_phi
    model = load_phi(directory, dtype=torch.bfloat16, device=device, base=base).eval()
    tokens, new_tokens = answer
    run = greedy(model, prompts(1, tokens, model.config.vocab_size), new_tokens)
    seconds = medians({"run": run}, repeats, device)["run"]
    size = read_bytes(model)
    return {"speed": new_tokens / seconds, "bytes": size, "copy": copy_speed(min(size, 2**31), repeats, device)}


def bench_gpu_decode(bench: Bench) -> list[dict]:
    rows, how = [], dict(device=bench.device, repeats=max(bench.repeats, 5), answer=bench.answer)
    how["directory"] = str(full_size_phi(bench))
    for base in (None, "int8", "nf4"):
        (ours, theirs), failed = in_workers(decode_contender, "transformers", base=base, **how)
        speeds = [done and done["speed"] for done in (ours, theirs)]
        rows.append(row(f"decode {base or 'bf16'}, batch 1 / transformers", "tokens/s", *speeds, note=failed))
        if ours:
            read, target = ours["bytes"] * ours["speed"] / 1e9, "" if base else ">= 0.7"
            rows.append(row("  weights read / copy in memory", "GB/s", read, ours["copy"] / 1e9, target))
    return rows


@torch.no_grad()
def bench_quant(bench: Bench) -> list[dict]:
    device, (columns, features) = bench.device, bench.layer
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plain = torch.nn.Linear(columns, features, device=device)
    plain.weight.normal_(0, 0.02)
    ours = {to: quantize_layer(plain.weight, plain.bias, to) for to in ("nf4", "int8", "llm.int8")}
    weight, dense = plain.weight.data, copy.deepcopy(plain).to(dtype)
    theirs, missing = attempt(their_layers, plain)
    if theirs:
        packed, state = theirs["quantize"](weight)
        if not torch.equal(packed, ours["nf4"].weight) or not torch.equal(state.absmax, ours["nf4"].absmax):
            raise InputError("the codes of the two differ; their times cannot be compared")
    x = {size: torch.randn(size, columns, device=device, dtype=dtype) for size in (1, 16, 256)}
    which = "plain PyTorch" if device == "cpu" else "our kernel"
    rows = []

    def compare(case: str, own: Callable, peer: Callable | None, note: str = "") -> None:
        seconds = medians({"ours": own, "peer": peer}, max(bench.repeats, 9), device)
        rows.append(row(case, "ms", *(s and 1e3 * s for s in seconds.values()), note=note))

    quantize = theirs and partial(theirs["quantize"], weight)
    compare("quantize to NF4, plain PyTorch / bitsandbytes", partial(quantize_4bit, weight), quantize, missing)
    for name, to in (("int8", "int8"), ("NF4", "nf4")):
        layer, own = ours[to], partial(ours[to], x[1])
        definition = lambda layer=layer: FrozenLinear.product(layer, x[1]) + layer.bias  # noqa: E731 (all of W~ in memory)
        compare(f"{name} layer, batch 1, {which} / its definition", own, definition)
        compare(f"{name} layer, batch 1, {which} / unquantized layer", own, partial(dense, x[1]))
    peer = theirs and partial(theirs["int8"], x[1])
    compare("LLM.int8() layer, batch 1 / bitsandbytes", partial(ours["llm.int8"], x[1]), peer, missing)
    for label in ("bitsandbytes", "bitsandbytes AVX512-BF16"):
        if label == "bitsandbytes" or (theirs and label in theirs):
            for size, one in x.items():
                peer = theirs and partial(theirs[label], one)
                compare(f"NF4 layer, batch {size}, {which} / {label}", partial(ours["nf4"], one), peer, missing)
    if device != "cpu":
        copied = copy_speed(2**28, 9, device)
        for to in ("nf4", "int8"):
            stored = sum(buffer.nbytes for buffer in ours[to].buffers() if buffer is not None)
            read = stored / medians({to: partial(ours[to], x[1])}, 9, device)[to]
            rows.append(row(f"{to} layer, batch 1, bandwidth / copy's", "GB/s", read / 1e9, copied / 1e9))
    return rows


def their_layers(plain: torch.nn.Linear) -> dict[str, Callable]:
    """bitsandbytes' NF4 quantizer, and its layers for the weights of `plain`."""
    import bitsandbytes as bnb

    nf4 = bnb.nn.Linear4bit(plain.in_features, plain.out_features, quant_type="nf4", compress_statistics=False)
    int8 = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False, threshold=0.0)
    for layer in (nf4, int8):
        layer.load_state_dict(plain.state_dict())
        layer.to(plain.weight.device)
    # For evaluation bitsandbytes has a kernel for CPUs with AVX512-BF16. In training mode it runs what other CPUs run.
    quantize = partial(bnb.functional.quantize_4bit, quant_type="nf4")
    layers = {"quantize": quantize, "int8": int8.eval(), "bitsandbytes": copy.deepcopy(nf4).train()}
    if plain.weight.device.type == "cpu" and bnb.functional.has_avx512bf16():
        layers["bitsandbytes AVX512-BF16"] = nf4.eval()
    return layers


def peak_of_train(flags: list[str]) -> int:
    """Peak memory in bytes of this process, which runs `train.py FLAGS`."""
    if train.main(flags):
        raise InputError(f"train.py {' '.join(flags)} failed")
    return resident("VmHWM")


def bench_convert(bench: Bench) -> list[dict]:
    full, rows = full_size_phi(bench), []
    for to in ("nf4", "int8"):
        flags = ["--stage", "quantize", "--model", str(full), "--to", to, "--out", str(bench.directory), "--name", to]
        began = time.perf_counter()
        peak = in_worker(peak_of_train, flags=[*flags, "--device", bench.device])
        rows.append(row(f"quantize full-size Phi-2 (bf16) to {to}", "s", time.perf_counter() - began))
        written = sum(file.stat().st_size for file in (bench.directory / to).glob("*.safetensors"))
        rows.append(row("  size written", "MB", written / 1e6))
        rows.append(row("  peak memory, process included", "MB", peak / 1e6))
    return rows


@torch.no_grad()
def load(directory: str, device: str) -> list[dict]:
    began = time.perf_counter()
    phi = Phi.from_pretrained(directory, torch.bfloat16, device)
    loaded = time.perf_counter()
    if not torch.isfinite(phi(torch.arange(32, device=device)[None])).all():
        raise InputError("the logits are not finite")
    ended = time.perf_counter()
    return [
        row("load full-size Phi-2 (bf16)", "s", loaded - began),
        row("  peak resident memory, process included", "MB", resident("VmHWM") / 1e6),
        row("  first forward pass, 32 tokens", "s", ended - loaded),
    ]


def bench_load(bench: Bench) -> list[dict]:
    return in_worker(load, directory=str(full_size_phi(bench)), device=bench.device)
