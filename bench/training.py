"""bench.py's training steps, ours beside TRL's: SFT, DPO, and DPO with LoRA and QLoRA adapters.

A step is forward, loss and backward, without the optimizer, on the same 4 examples and the same random Phi (6 layers, 256
wide, 51,200 tokens, fp32): prompts of 100-166 tokens, completions of 45-190. Loss and gradients are compared first.

    sft     the first completion of each                                       TRL's SFTTrainer
    dpo     robust DPO; the reference "cached" (log-probabilities known         TRL's DPOTrainer, whose default is live
            before the step) or "live" (run in every step)
    lora    the same with adapters of rank 16 on every linear layer but the     + PEFT
            output layer
    qlora   the same on NF4 weights                                             + bitsandbytes
"""

import contextlib
import gc
import random
from collections.abc import Callable
from pathlib import Path

import torch

import dpo
import sft
from bench import peers
from bench.timing import held_bytes, in_worker, medians, peak_bytes, row, same_steps
from data import Example, collate
from lora import add_lora, lora_layers, starting_point
from model import Phi, PhiConfig, completion_logprobs

SHAPE = dict(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    vocab_size=51200,
    partial_rotary_factor=0.4,
)
BETA, EPS = 0.1, 0.1
# How near two steps must be to be compared. bitsandbytes' kernel for CPUs with AVX512-BF16 multiplies in bf16.
TOLERANCE = {"sft": 1e-5, "dpo": 1e-5, "lora": 1e-5, "qlora": 1e-2}


def pairs(vocab_size: int, count: int = 4, seed: int = 0, prompt=(100, 166), completion=(45, 190)) -> list[Example]:
    """Random pairs; the lengths are drawn from the two ranges, ends included."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(vocab_size) for _ in range(n)]  # noqa: E731
    return [Example(ids(draw.randint(*prompt)), [ids(draw.randint(*completion)) for _ in range(2)]) for _ in range(count)]


def write_models(directory: Path, **shape) -> None:
    """A random Phi, and under reference/ one that differs from it a little, so that no margin is 0."""
    phi = Phi(PhiConfig(**(SHAPE | shape))).init_weights(seed=0)
    phi.save_pretrained(directory)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in phi.parameters():
            p += 0.01 * torch.randn(p.shape, generator=noise)
    phi.save_pretrained(directory / "reference")


def examples_of(kind: str, directory: Path) -> list[Example]:
    examples = pairs(SHAPE["vocab_size"])
    return [Example(e.prompt, e.completions[:1]) for e in examples] if kind == "sft" else examples


def adapter_values(model: Phi) -> dict[str, torch.Tensor]:
    """A and B by name, B drawn too: with B = 0 the margins and A's gradients would be 0."""
    draw, values = torch.Generator().manual_seed(2), {}
    for name, layer in lora_layers(model).items():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=draw).mul_(0.01).to(layer.lora_B.device)
        values |= {f"{name}.{part}": getattr(layer, part).detach() for part in ("lora_A", "lora_B")}
    return values


def our_policy(kind: str, directory: Path, device: str) -> Phi:
    if kind not in ("lora", "qlora"):
        return Phi.from_pretrained(directory, device=device)
    model = add_lora(Phi.from_pretrained(directory, device=device, base="nf4" if kind == "qlora" else None), peers.RANK)
    adapter_values(model)
    return model


def our_step(kind: str, reference: str, directory: Path, device: str) -> Callable:
    """step() -> (loss, gradients by name)."""
    model, examples = our_policy(kind, directory, device), examples_of(kind, directory)
    adapted = kind in ("lora", "qlora")
    frozen = None if kind == "sft" else model if adapted else Phi.from_pretrained(directory / "reference", device=device)

    @torch.no_grad()
    def expected(batch) -> torch.Tensor:
        with starting_point(model, {}) if adapted else contextlib.nullcontext():
            return completion_logprobs(frozen, batch)

    cached = expected(collate(examples).to(device)) if reference == "cached" else None

    def step():
        model.zero_grad()
        batch = collate(examples).to(device)
        if kind == "sft":
            loss, units = sft.objective(completion_logprobs(model, batch), batch.lengths)[0], len(batch.target)
        else:
            logprobs = cached if reference == "cached" else expected(batch)
            policy = completion_logprobs(model, batch)
            loss, units = dpo.objective(policy, logprobs, batch.lengths, "robust", BETA, EPS, 0.0)[0], len(examples)
        (loss / units).backward()
        return loss.item() / units, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    return step


def their_step(kind: str, reference: str, directory: Path, device: str) -> Callable:
    """The same by TRL's trainers."""
    adapted = kind in ("lora", "qlora")
    model = peers.load_phi(directory, device, base="nf4" if kind == "qlora" else None)
    if kind == "sft":
        return peers.trainer_step(peers.sft_trainer(model, device), peers.sft_batch(examples_of(kind, directory), device))
    frozen = None if adapted else peers.load_phi(directory / "reference", device)
    loss = dict(loss_type="robust", beta=BETA, label_smoothing=EPS)
    trainer = peers.dpo_trainer(model, frozen, device, lora=adapted, **loss)
    if adapted:
        peers.set_adapters(trainer.model, adapter_values(our_policy(kind, directory, device)))
    batch = peers.dpo_batch(examples_of(kind, directory), device)
    return peers.trainer_step(trainer, peers.with_cached_reference(trainer, batch) if reference == "cached" else batch)


def step_memory(owner: str, kind: str, reference: str, directory: str, device: str) -> dict:
    """Peak memory of one step above what was held before it: for a process of its own."""
    step = (our_step if owner == "ours" else their_step)(kind, reference, Path(directory), device)
    gc.collect()
    held = held_bytes(device)
    step()
    return {"bytes": peak_bytes(device) - held}


def compare(
    kind: str,
    references: list[tuple[str, str]],
    title: str,
    targets: tuple[str, str],
    directory: Path,
    device: str,
    repeats: int,
):
    """Rows of time and peak memory for each (our reference, TRL's); the targets are for the first of them."""
    ours = {ref: our_step(kind, ref, directory, device) for ref in dict.fromkeys(o for o, _ in references)}
    theirs = {ref: their_step(kind, ref, directory, device) for ref in dict.fromkeys(t for _, t in references)}
    same_steps(ours[references[0][0]](), theirs[references[0][1]](), TOLERANCE[kind])
    contenders = {("ours", ref): step for ref, step in ours.items()} | {("TRL", ref): step for ref, step in theirs.items()}
    seconds = medians(contenders, repeats, device)
    where = dict(kind=kind, directory=str(directory), device=device)
    peaks = {c: in_worker("step_memory", owner=c[0], reference=c[1], **where)["bytes"] for c in contenders}
    rows = []
    for our_ref, their_ref in references:
        case = title.format(ours=our_ref, theirs=their_ref)
        a, b = ("ours", our_ref), ("TRL", their_ref)
        rows.append(row(case, "s", seconds[a], seconds[b], targets[0]))
        rows.append(row(f"{case}, peak memory", "MB", peaks[a] / 1e6, peaks[b] / 1e6, targets[1]))
        targets = ("", "")
    return rows


def bench_sft(directory: Path, device: str, repeats: int) -> list[dict]:
    return compare("sft", [("", "")], "SFT step / TRL", ("<= 0.8", ""), directory, device, repeats)


def bench_dpo(directory: Path, device: str, repeats: int) -> list[dict]:
    references = [("cached", "live"), ("live", "live"), ("cached", "cached")]
    title = "DPO step, reference {ours} / TRL, reference {theirs}"
    return compare("dpo", references, title, ("<= 0.25", "<= 0.5"), directory, device, repeats)


def bench_lora(directory: Path, device: str, repeats: int) -> list[dict]:
    rows = []
    for kind, name, owner in (("lora", "LoRA", "TRL + PEFT"), ("qlora", "QLoRA (NF4)", "TRL + PEFT + bitsandbytes")):
        title = f"{name} DPO step, reference {{ours}} / {owner}, reference {{theirs}}"
        rows += compare(kind, [("cached", "live")], title, ("", ""), directory, device, repeats)
    return rows
