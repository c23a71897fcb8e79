"""Inference, ours beside transformers' and bitsandbytes'.

To decode one row, each weight is read once and used once, so decoding can be no faster than the weights are read. `decode`
shows bytes of weights x tokens a second beside the speed of reading a buffer of the same size, by torch.sum or torch.dot,
whichever is faster, in turn in the same process; keys, values and one row of the embedding, 0.3% here, are not counted. On a
GPU the limit is a copy in its memory, which reads and writes.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench import peers
from bench.timing import attempt, in_workers, medians, rates, row
from bench.workloads import Bench, full_size_phi, prompts
from generate import generate
from model import Phi, PhiConfig
from quant import quantize_4bit, quantize_layer
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
    return [row(f"forward, {rows} x {tokens} tokens / transformers", "s", *seconds.values(), "<= 1.0", missing)]


def bench_generate(bench: Bench) -> list[dict]:
    ours, theirs, missing = load_both(bench.directory, bench.device)
    tokens, new_tokens = bench.answer
    rows = []
    for size in (1, 16):
        runs = both_greedy(ours, theirs, prompts(size, tokens, ours.config.vocab_size), new_tokens)
        speeds = rates(new_tokens * size, *medians(runs, max(bench.repeats, 5), bench.device).values())
        rows.append(row(f"generate, batch {size} / transformers", "tokens/s", *speeds, ">= 1.5", missing))
    return rows


def read_bytes(model) -> int:
    """Bytes of weights that one step of decoding reads: all but the embedding, of which it reads one row."""
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if "embed_tokens" not in name)


@torch.no_grad()
def bench_decode(bench: Bench) -> list[dict]:
    wide = bench.directory / "wide"
    Phi(PhiConfig(**bench.wide)).init_weights(seed=0).save_pretrained(wide)
    ours, theirs, missing = load_both(wide, bench.device)
    tokens, new_tokens = bench.short_answer
    size = read_bytes(ours)
    buffer = torch.ones(size // 4, device=bench.device)
    runs = both_greedy(ours, theirs, prompts(1, tokens, ours.config.vocab_size), new_tokens)
    runs |= {"sum": buffer.sum, "dot": lambda: torch.dot(buffer, buffer)}
    seconds = medians(runs, max(bench.repeats, 5), bench.device)
    limit = size / min(seconds["sum"], seconds["dot"]) / 1e9
    read = size * new_tokens / seconds["ours"] / 1e9
    case = "decode, {num_hidden_layers} layers, {hidden_size:,} wide, batch 1".format_map(bench.wide)
    note = f"{size / 1e6:,.0f} MB of weights a token; the limit is a read of as many bytes (sum or dot) in turn with it"
    return [
        row(f"{case}, weights read / memory's limit", "GB/s", read, limit, ">= 0.8", note),
        row(f"{case} / transformers", "tokens/s", *rates(new_tokens, seconds["ours"], seconds["peer"]), note=missing),
    ]


def decode_contender(contender: str, base: str | None, directory: str, device: str, repeats: int, answer: list[int]) -> dict:
    """Tokens a second at batch 1, and GB a second of weights and of a copy in memory: for a process of its own."""
    load_phi = Phi.from_pretrained if contender == "ours" else peers.load_phi
    model = load_phi(directory, dtype=torch.bfloat16, device=device, base=base).eval()
    tokens, new_tokens = answer
    size = read_bytes(model)
    source = torch.ones(min(size, 2**31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = greedy(model, prompts(1, tokens, model.config.vocab_size), new_tokens)
    seconds = medians({"run": run, "copy": lambda: target.copy_(source)}, repeats, device)
    read, copied = size * new_tokens / seconds["run"], 2 * source.nbytes / seconds["copy"]
    return {"tokens/s": new_tokens / seconds["run"], "read": read / 1e9, "copy": copied / 1e9}


def bench_gpu_decode(bench: Bench) -> list[dict]:
    rows, how = [], dict(device=bench.device, repeats=max(bench.repeats, 5), answer=bench.answer)
    how["directory"] = str(full_size_phi(bench))
    for base in (None, "int8", "nf4"):
        (ours, theirs), failed = in_workers(decode_contender, "transformers", base=base, **how)
        speeds = [done and done["tokens/s"] for done in (ours, theirs)]
        rows.append(row(f"decode {base or 'bf16'}, batch 1 / transformers", "tokens/s", *speeds, note=failed))
        if ours:
            target = "" if base else ">= 0.7"
            rows.append(row("  weights read / copy in memory", "GB/s", ours["read"], ours["copy"], target))
    return rows


@torch.no_grad()
def bench_quant(bench: Bench) -> list[dict]:
    device, (columns, features) = bench.device, bench.layer
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plain = torch.nn.Linear(columns, features, device=device)
    plain.weight.normal_(0, 0.02)
    ours = {to: quantize_layer(plain.weight, plain.bias, to) for to in ("nf4", "int8", "llm.int8")}
    weight, dense = plain.weight.data, copy.deepcopy(plain).to(dtype)
    theirs, missing = attempt(peers.layers, plain)
    theirs = theirs or {}
    if theirs:
        packed, state = theirs["quantize"](weight)
        if not torch.equal(packed, ours["nf4"].weight) or not torch.equal(state.absmax, ours["nf4"].absmax):
            raise InputError("the codes of the two differ; their times cannot be compared")
    x = {size: torch.randn(size, columns, device=device, dtype=dtype) for size in (1, 16, 256)}
    rows = []

    def compare(case: str, own: Callable, peer: Callable | None, given: torch.Tensor, note: str = "") -> None:
        runs = {"ours": partial(own, given), "peer": peer and partial(peer, given)}
        seconds = medians(runs, max(bench.repeats, 9), device)
        rows.append(row(case, "ms", *(s and 1e3 * s for s in seconds.values()), note=note))

    compare("quantize to NF4, plain PyTorch / bitsandbytes", quantize_4bit, theirs.get("quantize"), weight, missing)
    compare("int8 layer, batch 1, plain PyTorch / unquantized layer", ours["int8"], dense, x[1])
    compare("LLM.int8() layer, batch 1 / bitsandbytes", ours["llm.int8"], theirs.get("int8"), x[1], missing)
    which = "plain PyTorch" if device == "cpu" else "our kernel"
    for label in ["bitsandbytes", *(name for name in theirs if name.startswith("bitsandbytes "))]:
        for size, given in x.items():
            compare(f"NF4 layer, batch {size}, {which} / {label}", ours["nf4"], theirs.get(label), given, missing)
    return rows
