"""Inference, ours beside transformers'.

To decode one row, each weight is read once and used once, so decoding can be no faster than the weights are read. `decode`
shows bytes of weights x tokens a second beside the speed of reading a buffer of the same size, by torch.sum or torch.dot,
whichever is faster, in turn in the same process; keys, values and one row of the embedding, 0.3% here, are not counted. On a
GPU the limit is a copy in its memory, which reads and writes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import demo
from bench import peers
from bench.timing import alone, attempt, copy_speed, in_worker, medians, rates, row
from bench.workloads import Bench, full_size_phi, prompts
from data import ChatML
from generate import generate
from model import Phi, PhiConfig
from publish.export import export
from runtime.files import InputError


def load_both(bench: Bench, directory: Path) -> tuple[Phi, torch.nn.Module | None, str]:
    """Our model, transformers' or None, and why not."""
    theirs, missing = attempt(peers.load_phi, directory, device=bench.device, unless=bench.no_peers)
    return Phi.from_pretrained(directory, device=bench.device), theirs and theirs.eval(), missing


def greedy(model, ids: torch.Tensor, new_tokens: int, **how) -> Callable:
    """run() -> the new tokens of each row, as lists: our `generate` or, for any other model, transformers'."""
    if isinstance(model, Phi):
        return lambda: generate(model, ids.tolist(), max_new_tokens=new_tokens, **how)
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
    ours, theirs, missing = load_both(bench, bench.directory)
    rows, tokens = bench.forward
    ids = prompts(rows, tokens, ours.config.vocab_size).to(bench.device)
    if theirs:
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    runs = {"ours": partial(ours, ids), "peer": theirs and partial(theirs, ids)}
    seconds = medians(runs, max(bench.repeats, 5), bench.device)
    return [row(f"forward, {rows} x {tokens} tokens / transformers", "s", *seconds.values(), "<= 1.0", missing)]


def bench_generate(bench: Bench) -> list[dict]:
    ours, theirs, missing = load_both(bench, bench.directory)
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
    ours, theirs, missing = load_both(bench, wide)
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


def bench_serve(bench: Bench) -> Iterator[dict]:
    """One prompt with its answer: by us, by transformers with bitsandbytes, by llama.cpp's server from a GGUF file."""
    wide, (tokens, new_tokens) = bench.directory / "wide", bench.short_answer
    Phi(PhiConfig(**bench.wide)).init_weights(seed=0).save_pretrained(wide)
    ids, threads = prompts(1, tokens, bench.wide["vocab_size"]), torch.get_num_threads()
    chat = ChatML(demo.train_tokenizer([]))
    body = {"prompt": ids[0].tolist(), "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    for base, to in (("nf4", "gguf-q4_0"), ("int8", "gguf-q8_0")):
        file = wide / f"{to}.gguf"
        export(wide, file, to, chat)
        theirs, why = attempt(peers.load_phi, wide, base=base, unless=bench.no_peers)
        ask, missing = attempt(peers.llama_server, file, threads, unless=bench.no_peers)
        runs = {"ours": greedy(Phi.from_pretrained(wide, base=base), ids, new_tokens)}
        runs |= {"bitsandbytes": theirs and greedy(theirs.eval(), ids, new_tokens)}
        runs |= {"llama.cpp": ask and partial(ask, "completion", body)}
        ours, bnb, llama = rates(new_tokens, *medians(runs, max(bench.repeats, 5)).values())
        case = f"serve {base}, {tokens} + {new_tokens} tokens"
        yield row(f"{case} / llama.cpp's server, {to}", "tokens/s", ours, llama, note=missing)
        yield row(f"{case} / transformers + bitsandbytes", "tokens/s", ours, bnb, note=why)


def decode_contender(contender: str, base: str | None, directory: str, bench: Bench) -> dict:
    """Tokens a second by batch, and GB a second of weights at batch 1 and of a copy: for a process of its own."""
    load_phi, device = Phi.from_pretrained if contender == "ours" else peers.load_phi, bench.device
    model = load_phi(directory, dtype=torch.bfloat16, device=device, base=base).eval()
    tokens, new_tokens = bench.answer
    ways = {"": {"graph": False}, ", as a CUDA graph": {"graph": True}} if contender == "ours" else {"": {}}
    speeds = {}
    for size in (1, 16):
        ids = prompts(size, tokens, model.config.vocab_size)
        runs = {f"batch {size}{way}": greedy(model, ids, new_tokens, **how) for way, how in ways.items()}
        speeds |= {case: size * new_tokens / s for case, s in medians(runs, bench.repeats, device).items()}
    best = max(speeds[f"batch 1{way}"] for way in ways)
    return {"tokens/s": speeds, "read": read_bytes(model) * best / 1e9, "copy": copy_speed(device)}


def bench_gpu_decode(bench: Bench) -> Iterator[dict]:
    directory = str(alone(full_size_phi, bench.device, bench=bench))
    for base, target in ((None, ">= 0.7"), ("int8", ""), ("nf4", ">= 0.6")):
        how = dict(base=base, directory=directory, bench=bench)
        ours = alone(decode_contender, bench.device, contender="ours", **how)
        theirs, note = attempt(in_worker, decode_contender, unless=bench.no_peers, contender="transformers", **how)
        for case, speed in ours["tokens/s"].items():
            other = theirs and theirs["tokens/s"][case.partition(",")[0]]
            yield row(f"decode {base or 'bf16'}, {case} / transformers", "tokens/s", speed, other, note=note)
        yield row("  weights read at batch 1 / copy in memory", "GB/s", ours["read"], ours["copy"], target)
