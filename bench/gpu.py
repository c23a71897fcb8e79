"""bench.py on a GPU: a random Phi-2 of full size (2.78 B parameters), ours beside TRL, PEFT, bitsandbytes and transformers.

    train       robust DPO: prompts of 512 tokens and completions of 512, so 1,024 a sequence and 1,536 a pair whose prompt
                is run once. Forward, loss, backward, AdamW's step; the reference's log-probabilities known before, for both.
        full    all weights, fp32 in bf16 autocast; with gradient checkpointing and without
        lora    adapters of rank 16 on a bf16 model
        qlora   adapters of rank 16 on an NF4 model, one pair a step, gradient checkpointing
    gpu-decode  greedy decoding of one row in bf16, int8 and NF4: bytes of weights x tokens a second beside a copy in the
                GPU's memory (which reads and writes)
    attention   the LoRA step on pairs of unlike length: a row each or packed, with sdpa or FlexAttention. Ours alone.

Each contender of `train` and `gpu-decode` has a process of its own, so that its memory is free for the next. One that fails
leaves a row that says why. MFU: operations that the loss needs (flops.py) a second / the card's peak in bf16.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

import dpo
from bench import peers
from bench.flops import peak, training_operations
from bench.formats import full_size_phi
from bench.inference import greedy, prompts, read_bytes
from bench.timing import held_bytes, in_worker, medians, peak_bytes, row
from bench.training import BETA, EPS, pairs
from data import Batch, Example, collate, collate_rows, pack_rows
from lora import add_lora
from model import Phi, PhiConfig, completion_logprobs
from runtime.files import InputError, read_json

# Setup: its kind, the pairs of a step, and whether activations are recomputed.
SETUPS = {
    "full fine-tuning": ("full", 4, False),
    "full fine-tuning, checkpointing": ("full", 4, True),
    "LoRA on bf16": ("lora", 4, False),
    "QLoRA on NF4, checkpointing": ("qlora", 1, True),
}
PROMPT, COMPLETION = 512, 512  # tokens
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=512)


# ------------------------------------------------------------------------------------------------------------ training


def pairs_for(directory: Path, count: int, tokens: int) -> list[Example]:
    """`count` pairs with prompts and completions of `tokens` tokens each."""
    vocab_size = read_json(directory / "config.json")["vocab_size"]
    return pairs(vocab_size, count, prompt=(tokens, tokens), completion=(tokens, tokens))


def our_model(kind: str, directory: Path, device: str, checkpointing: bool) -> Phi:
    dtype = torch.float32 if kind == "full" else torch.bfloat16
    model = Phi.from_pretrained(directory, dtype=dtype, device=device, base="nf4" if kind == "qlora" else None)
    if kind != "full":
        add_lora(model, peers.RANK)
    model.gradient_checkpointing = checkpointing
    return model


def our_loss(model: Phi, batch: Batch, reference: torch.Tensor | None, pairs: int) -> torch.Tensor:
    """The step's mean loss; without a reference, the policy's own values stand in for it: a margin of 0."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        logprobs = completion_logprobs(model, batch)
    expected = logprobs.detach() if reference is None else reference
    return dpo.objective(logprobs, expected, batch.lengths, "robust", BETA, EPS, 0.0)[0] / pairs


def our_training(kind: str, directory: Path, device: str, examples: list[Example], checkpointing: bool):
    """(loss() of a new forward pass, the model)."""
    model = our_model(kind, directory, device, checkpointing)
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
        reference = completion_logprobs(model, collate(examples).to(device))  # adapters start as nothing
    return (lambda: our_loss(model, collate(examples).to(device), reference, len(examples))), model


def their_training(kind: str, directory: Path, device: str, examples: list[Example], checkpointing: bool):
    dtype = torch.float32 if kind == "full" else torch.bfloat16
    model = peers.load_phi(directory, device, dtype, base="nf4" if kind == "qlora" else None)
    settings = dict(loss_type="robust", beta=BETA, label_smoothing=EPS, precompute_ref_log_probs=True)
    options = dict(lora=kind != "full", bf16=True, checkpointing=checkpointing)
    trainer = peers.dpo_trainer(model, None, device, **options, **settings)
    if checkpointing:  # its train() would do this
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = peers.with_cached_reference(trainer, peers.dpo_batch(examples, device))

    def loss():
        with trainer.accelerator.autocast():
            return trainer.compute_loss(trainer.model, dict(batch))

    return loss, trainer.model


def train_contender(
    owner: str, kind: str, count: int, checkpointing: bool, directory: str, device: str, repeats: int, tokens: int
) -> dict:
    """Seconds of a step, peak memory in bytes and the first loss of one contender: for a process of its own."""
    examples = pairs_for(Path(directory), count, tokens)
    make = our_training if owner == "ours" else their_training
    loss_of, model = make(kind, Path(directory), device, examples, checkpointing)
    gc.collect()
    held_bytes(device)  # the peak is that of the steps, with all that is held before them
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, first = torch.optim.AdamW(trained, lr=1e-5, fused=True), []

    def step():
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not first:
            first.append(loss.item())

    seconds = medians({owner: step}, repeats, device)[owner]
    return {"seconds": seconds, "bytes": peak_bytes(device), "loss": first[0]}


def attempt(name: str, **arguments) -> tuple[dict | None, str]:
    """(what the worker returned, "") or (None, why it failed)."""
    try:
        return in_worker(name, **arguments), ""
    except InputError as error:
        return None, str(error)


def bench_train(directory: Path, device: str, repeats: int, tokens: int = PROMPT, **shape) -> list[dict]:
    full, rows = full_size_phi(directory, device, **shape), []
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    for name, (kind, count, checkpointing) in SETUPS.items():
        settings = dict(kind=kind, count=count, checkpointing=checkpointing, tokens=tokens, repeats=max(repeats, 5))
        both = [attempt("train", owner=o, directory=str(full), device=device, **settings) for o in ("ours", "TRL")]
        if kind == "full" and all(done for done, _ in both) and abs(both[0][0]["loss"] - both[1][0]["loss"]) > 0.05:
            raise InputError(f"{name}: the losses are {[done['loss'] for done, _ in both]}; that is not the same step")
        rows += training_rows(f"{name}, {count} x {2 * tokens:,} tokens", both, full, settings, card)
    return rows


def training_rows(case: str, both: list[tuple[dict | None, str]], full: Path, settings: dict, card: str) -> list[dict]:
    """Pairs and tokens a second, peak memory and MFU of ours and TRL's."""
    kind, count = settings["kind"], settings["count"]
    examples, most = pairs_for(full, count, settings["tokens"]), peak(card)
    operations = training_operations(PhiConfig.from_dict(read_json(full / "config.json")), examples, frozen=kind != "full")

    def each(value: Callable) -> list[float | None]:
        return [None if done is None else value(done) for done, _ in both]

    failed = "; ".join(f"{owner} failed: {why}" for owner, (_, why) in zip(("ours", "TRL"), both) if why)
    needed = sum(map(len, examples))  # of tokens, the prompt once
    limit = dict(target="<= 8", of="ours") if kind == "qlora" else {}
    share = dict(target=">= 0.45", of="ours") if kind == "full" else {}
    unknown = "" if most else f"the peak of {card} is not in flops.py"
    return [
        row(f"DPO, {case} / TRL", "pairs/s", *each(lambda d: count / d["seconds"]), ">= 1.5", note=failed),
        row("  tokens, the prompt once", "tokens/s", *each(lambda d: needed / d["seconds"])),
        row("  peak memory", "GB", *each(lambda d: d["bytes"] / 1e9), **limit),
        row("  MFU", "-", *each(lambda d: most and operations / d["seconds"] / most), **share, note=unknown),
    ]


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_contender(owner: str, base: str, directory: str, device: str, repeats: int, new_tokens: int) -> dict:
    """Tokens a second at batch 1, bytes of weights a token, and bytes a second of a copy: for a process of its own."""
    coded = None if base == "bf16" else base
    if owner == "ours":
        model = Phi.from_pretrained(directory, dtype=torch.bfloat16, device=device, base=coded)
    else:
        model = peers.load_phi(Path(directory), device, torch.bfloat16, coded).eval()
    ids = prompts(1, 64, model.config.vocab_size)
    run = greedy(model, ids, new_tokens)
    size = read_bytes(model)
    source = torch.ones(min(size, 2**31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = medians({"run": run, "copy": lambda: target.copy_(source)}, max(repeats, 5), device)
    return {"speed": new_tokens / seconds["run"], "bytes": size, "copy": 2 * source.nbytes / seconds["copy"]}


def bench_gpu_decode(directory: Path, device: str, repeats: int, new_tokens: int = 128, **shape) -> list[dict]:
    full, rows = full_size_phi(directory, device, **shape), []
    where = dict(directory=str(full), device=device, repeats=repeats, new_tokens=new_tokens)
    for base in ("bf16", "int8", "nf4"):
        (ours, why), (theirs, their_why) = (attempt("decode", owner=o, base=base, **where) for o in ("ours", "peer"))
        failed = "; ".join(f"{owner} failed: {w}" for owner, w in (("ours", why), ("transformers", their_why)) if w)
        speeds = [done and done["speed"] for done in (ours, theirs)]
        rows.append(row(f"decode {base}, batch 1 / transformers", "tokens/s", *speeds, note=failed))
        if ours:
            read, target = ours["bytes"] * ours["speed"] / 1e9, ">= 0.7" if base == "bf16" else ""
            rows.append(row("  weights read / copy in memory", "GB/s", read, ours["copy"] / 1e9, target))
    return rows


# ----------------------------------------------------------------------------------------------------------- attention


def bench_attention(
    directory: Path, device: str, repeats: int, count: int = 16, row_tokens: int = 4096, **shape
) -> list[dict]:
    """Tokens a second (padding not counted) of four ways to lay out the same pairs, each beside padded rows with sdpa."""
    full = full_size_phi(directory, device, **shape)
    model = our_model("lora", full, device, checkpointing=True)
    scale = row_tokens // 16
    examples = pairs(model.config.vocab_size, count, prompt=(scale // 2, 2 * scale), completion=(scale // 4, 2 * scale))
    examples.sort(key=len)
    packed = [[examples[i] for i in part] for part in pack_rows([len(e) for e in examples], row_tokens)]
    fours = [examples[i : i + 4] for i in range(0, count, 4)]
    batches = {"a row each": [collate(part) for part in fours], "packed": [collate_rows([part]) for part in packed]}

    def step(layout: str, attention: str) -> None:
        model.attention = attention
        for batch in batches[layout]:
            batch = batch.to(device)
            if device.startswith("cuda"):
                our_loss(model, batch, None, count).backward()
            else:  # FlexAttention has no gradients on the CPU
                with torch.no_grad():
                    our_loss(model, batch, None, count)
        model.zero_grad()

    ways = [(layout, attention) for layout in batches for attention in ("sdpa", "flex")]
    runs = {way: lambda way=way: step(*way) for way in ways}
    seconds, needed = medians(runs, repeats, device), sum(map(len, examples))
    base = needed / seconds[ways[0]]
    padding = {name: 1 - needed / sum(b.tokens.numel() for b in parts) for name, parts in batches.items()}
    return [
        row(
            f"LoRA step, {layout}, {attention} / a row each, sdpa",
            "tokens/s",
            needed / seconds[layout, attention],
            base,
            note=f"{padding[layout]:.0%} of its rows is padding",
        )
        for layout, attention in ways[1:]
    ]
