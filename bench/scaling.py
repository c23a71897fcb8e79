"""Does it grow as it should, and how soon does it start? bench.py's cases without a peer.

growth: seconds of a step, fitted with size^k, beside the k of the operations that it needs (flops.py). The two need not be
the same: small sizes leave cores idle, large ones leave the cache. A k well above its operations' is what to look for:
something is done more often than the formula knows of.

start: seconds from the start of `python train.py --stage dpo`, without an SFT model and with one, until the line of the
first step stands in metrics.jsonl. Everything before it counts: imports, the demo's rows, tokenizer, reference pass.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dpo
import sft
from bench.flops import forward_parts, training_operations
from bench.timing import ROOT, exponent, medians, row
from bench.training import BETA, EPS, SHAPE, pairs
from data import Example, collate
from model import Phi, PhiConfig, completion_logprobs
from runtime.files import InputError

VOCAB = 8192
LENGTHS, BATCHES = (256, 512, 1024, 2048), (1, 2, 4, 8)
WIDTHS, DEPTHS = (128, 256, 512), (3, 6, 12)


# -------------------------------------------------------------------------------------------------------------- growth


def training_step(model: Phi, examples: list[Example], device: str) -> Callable:
    """step(): DPO's if the examples are pairs, else SFT's."""

    def step():
        model.zero_grad()
        batch = collate(examples).to(device)
        logprobs = completion_logprobs(model, batch)
        if len(examples[0].completions) == 2:
            expected = logprobs.detach() - 1.0
            loss = dpo.objective(logprobs, expected, batch.lengths, "robust", BETA, EPS, 0.0)[0]
        else:
            loss = sft.objective(logprobs, batch.lengths)[0]
        loss.backward()

    return step


def forward_pass(model: Phi, examples: list[Example], device: str) -> Callable:
    ids = torch.tensor([e.prompt + e.completions[0] for e in examples], device=device)

    @torch.no_grad()
    def run():
        return model(ids)

    return run


def examples_of(length: int, batch: int, completions: int) -> list[Example]:
    """`batch` examples of `length` tokens, half of them the prompt."""
    each = length // 2 // completions
    drawn = pairs(VOCAB, batch, prompt=(length - completions * each,) * 2, completion=(each,) * 2)
    return [Example(e.prompt, e.completions[:completions]) for e in drawn]


def bench_growth(
    directory: Path, device: str, repeats: int, lengths=LENGTHS, batches=BATCHES, widths=WIDTHS, depths=DEPTHS
) -> list[dict]:
    def phi(width: int = 256, layers: int = 6) -> Phi:
        shape = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, vocab_size=VOCAB)
        return Phi(PhiConfig(**(SHAPE | dict(partial_rotary_factor=0.5) | shape))).init_weights(seed=0).to(device)

    one, wide, deep = phi(), {w: phi(width=w) for w in widths}, {n: phi(layers=n) for n in depths}
    middle = lengths[len(lengths) // 2 - 1]
    models = {
        "length": [(n, one, n, 1) for n in lengths],
        "batch": [(b, one, middle, b) for b in batches],
        "width": [(w, model, middle, 1) for w, model in wide.items()],
        "layers": [(n, model, middle, 1) for n, model in deep.items()],
    }
    rows = []
    for what, sizes in models.items():
        for kind, completions in (("forward", 1), ("SFT step", 1), ("DPO step", 2)):
            if kind == "SFT step" and what in ("width", "layers"):
                continue  # as the DPO step
            rows.append(growth(what, kind, completions, sizes, device, repeats))
    return rows


def growth(what: str, kind: str, completions: int, sizes: list[tuple], device: str, repeats: int) -> dict:
    """One row: the exponents of seconds and of operations over `sizes`, (size, model, tokens, rows) each."""
    runs, counts, tokens = {}, [], []
    for size, model, length, batch in sizes:
        examples = examples_of(length, batch, completions)
        make = forward_pass if kind == "forward" else training_step
        runs[size] = make(model, examples, device)
        if kind == "forward":
            counts.append(sum(forward_parts(model.config, examples, all_logits=True)))
        else:
            counts.append(training_operations(model.config, examples))
        tokens.append(sum(map(len, examples)))
    seconds = list(medians(runs, repeats, device).values())
    each = ", ".join(f"{1e6 * s / n:,.3g}" for s, n in zip(seconds, tokens))
    speed = ", ".join(f"{c / s / 1e9:,.3g}" for s, c in zip(seconds, counts))
    note = f"{what} {', '.join(map(str, runs))}: {each} us a token, {speed} Gflop/s"
    case = f"growth of the {kind} with {what}: exponent / its operations'"
    return row(case, "-", exponent(list(runs), seconds), exponent(list(runs), counts), "<= 1.15", note=note)


# --------------------------------------------------------------------------------------------------------------- start


def first_step(flags: list[str], run: Path, limit: float = 120.0) -> float:
    """Seconds from starting `python train.py FLAGS` until run/metrics.jsonl has its first line; then it is ended."""
    metrics = run / "metrics.jsonl"
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stdout=output, stderr=output)
        try:
            while not (metrics.exists() and b'"step": 1,' in metrics.read_bytes()):
                if process.poll() is not None or time.perf_counter() - began > limit:
                    output.seek(0)
                    end = output.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise InputError(f"train.py {' '.join(flags)} came to no first step: {''.join(end)}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def bench_start(directory: Path, device: str, repeats: int) -> list[dict]:
    shared = ["--stage", "dpo", "--device", device]
    fresh, tuned = [], []
    for i in range(repeats):
        out = directory / f"fresh-{i}"
        fresh.append(first_step([*shared, "--out", str(out)], out / "demo-sft-seed0"))
    out = directory / "tuned"
    flags = ["--stage", "sft", "--name", "demo-sft-seed0", "--max-steps", "2", "--out", str(out), "--device", device]
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True, capture_output=True)
    for i in range(repeats):
        tuned.append(first_step([*shared, "--out", str(out), "--name", f"dpo-{i}"], out / f"dpo-{i}"))
    middle = sorted(fresh)[len(fresh) // 2]
    rows = [
        row("start of the demo until its first step (SFT)", "s", middle, target="<= 5", of="ours"),
        row(
            "  with an SFT model until DPO's first step", "s", tuned[0], note="the reference's pass over the pairs included"
        ),
    ]
    if tuned[1:]:
        rows.append(row("  the same again, the reference's table on disk", "s", min(tuned[1:])))
    return rows
