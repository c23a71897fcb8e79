"""Training steps, ours beside TRL's.

A step is forward pass, loss and backward pass on the same random model and examples: ours is `train.step_gradients`, TRL's
its trainer's loss. Losses and gradients are compared before anything is timed. The loss is SFT's or robust DPO's, whose
reference log-probabilities are "cached" (known before the step, always so in ours) or "live" (computed in every step, TRL's
default). Adapters (LoRA) have rank 16, on every linear layer but the output layer; in QLoRA on NF4 weights.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import demo
import train
from bench import peers
from bench.timing import attempt, first_step, held_and_peak, in_worker, in_workers, medians, rates, row
from bench.workloads import Bench, Lengths, full_size_phi, pairs
from data import Example
from lora import add_lora
from model import Phi, all_logprobs, read_config
from runtime.files import InputError
from runtime.flags import settle

LOSS = dict(loss="robust", beta=peers.BETA, eps=peers.EPS, nll_weight=0.0)
# How much two steps may differ. bitsandbytes' kernel for CPUs with AVX512-BF16 multiplies in bf16.
TOLERANCE = {"sft": 1e-5, "dpo": 1e-5, "lora": 1e-5, "qlora": 1e-2}


@dataclass(frozen=True)
class Setup:
    """A training step, the same for every contender."""

    kind: str  # sft, dpo, lora, qlora
    directory: str  # of the model
    device: str
    count: int  # examples
    prompt: Lengths
    completion: Lengths
    dtype: str = "fp32"
    checkpointing: bool = False
    reference: str | None = None  # directory of the reference; None: the model itself, without adapters

    @property
    def loading(self) -> dict:
        """Arguments with which a model is loaded."""
        dtype = torch.bfloat16 if self.kind in peers.ADAPTED and self.dtype == "bf16" else torch.float32
        return dict(dtype=dtype, device=self.device, base="nf4" if self.kind == "qlora" else None)

    def examples(self) -> list[Example]:
        vocab_size = read_config(Path(self.directory)).vocab_size
        return pairs(vocab_size, self.count, self.prompt, self.completion, completions=1 if self.kind == "sft" else 2)


def our_step(model: Phi, examples: list[Example], reference: torch.Tensor | None, device: str, dtype="fp32") -> Callable:
    """step() -> loss, of our own loop: DPO's if there is a reference, else SFT's."""
    stage, loss = ("dpo", LOSS) if reference is not None else ("sft", {})
    # No model is loaded by this name, but the demo's would bring its own defaults.
    chosen = dict(model="random", device=device, dtype=dtype, micro_batch_size=len(examples))
    settings = settle(stage, chosen | loss).settings

    def step() -> float:
        model.zero_grad()
        return train.step_gradients(model, examples, reference, settings)["loss"]

    return step


def make_step(contender: str, setup: Setup) -> tuple[Callable, torch.nn.Module]:
    """(step() -> loss, the model) of "ours", "TRL", or "TRL live", whose reference is computed in every step."""
    examples, adapted = setup.examples(), setup.kind in peers.ADAPTED
    load = Phi.from_pretrained if contender == "ours" else peers.load_phi
    model = load(setup.directory, **setup.loading)
    reference = load(setup.reference, **setup.loading) if setup.reference else None
    if contender == "ours":
        how = dict(batch_size=setup.count, device=setup.device, dtype=setup.dtype, label="reference")
        logprobs = None if setup.kind == "sft" else all_logprobs(reference or model, examples, **how)
        if adapted:
            peers.draw_adapters(add_lora(model, peers.RANK))
        model.gradient_checkpointing = setup.checkpointing
        return our_step(model, examples, logprobs, setup.device, setup.dtype), model
    trainer = peers.trl_trainer(model, reference, setup)
    if adapted:
        peers.draw_adapters(trainer.model)
    batch = peers.trl_batch(examples, setup.device)
    if setup.kind != "sft" and contender == "TRL":  # it reads the reference's log-probabilities where it finds them
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        trainer.precompute_ref_logps = True
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def step() -> float:
        trainer.model.zero_grad()
        with trainer.accelerator.autocast():  # its train() would turn it on
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.item()

    return step, trainer.model


def same_steps(ours: tuple[float, dict], theirs: tuple[float, dict], tolerance: float) -> None:
    """InputError unless two training steps, (loss, gradients by name) each, agree: in the loss, and in each gradient, whose
    difference is measured in units of the largest gradient. Prints how close they are."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    if gradients.keys() != their_gradients.keys():
        odd = sorted(gradients.keys() ^ their_gradients.keys())
        raise InputError(f"the two train different parameters: {odd[:3]}")
    largest = max(float(g.norm()) for g in their_gradients.values())
    gap = max(float((gradients[name] - g).norm()) / largest for name, g in their_gradients.items())
    print(f"  loss {loss:.7f} and {their_loss:.7f}; gradients differ by {gap:.1e} of the largest", flush=True)
    if not abs(loss - their_loss) <= tolerance * max(1, abs(loss)) or not gap <= tolerance:
        raise InputError("the two do not compute the same step; their times cannot be compared")


def step_memory(contender: str, setup: Setup) -> float:
    """Peak memory of one step in MB, above what was held before it: for a process of its own."""
    step, _ = make_step(contender, setup)
    held, most, _ = held_and_peak(step, setup.device)
    return (most - held) / 1e6


def compare(bench: Bench, kind: str, titles: dict[str, str], targets: tuple[str, str] = ("", "")) -> list[dict]:
    """Rows of time and peak memory. titles: {peer: the row's}; the targets are for the first of them."""
    where, other = str(bench.directory), str(bench.directory / "reference") if kind == "dpo" else None
    setup = Setup(kind, where, bench.device, 4, bench.prompt, bench.completion, reference=other)
    made = {"ours": (make_step("ours", setup), "")} | {peer: attempt(make_step, peer, setup) for peer in titles}
    both = [contender for contender, _ in made.values() if contender][:2]
    if both[1:]:
        results = [(step(), {name: p.grad for name, p in peers.trained(model).items()}) for step, model in both]
        same_steps(*results, TOLERANCE[kind])
    seconds = medians({name: step and step[0] for name, (step, _) in made.items()}, bench.repeats, bench.device)
    memory = {
        name: in_worker(step_memory, contender=name, setup=setup) if step else (None, why)
        for name, (step, why) in made.items()
    }
    rows, (most, why) = [], memory["ours"]
    for peer, title in titles.items():
        rows.append(row(title, "s", seconds["ours"], seconds[peer], targets[0], made[peer][1]))
        rows.append(row(f"{title}, peak memory", "MB", most, memory[peer][0], targets[1], why or memory[peer][1]))
        targets = ("", "")
    return rows


def bench_sft(bench: Bench) -> list[dict]:
    return compare(bench, "sft", {"TRL": "SFT step / TRL"}, ("<= 0.8", ""))


def bench_dpo(bench: Bench) -> list[dict]:
    ours = "DPO step, reference cached"
    titles = {"TRL live": f"{ours} / TRL, reference live", "TRL": f"{ours} / TRL, reference cached"}
    return compare(bench, "dpo", titles, ("<= 0.25", "<= 0.5"))


def bench_lora(bench: Bench) -> list[dict]:
    title = "{} DPO step, reference cached / TRL + {}, reference live"
    rows = compare(bench, "lora", {"TRL live": title.format("LoRA", "PEFT")})
    return rows + compare(bench, "qlora", {"TRL live": title.format("QLoRA (NF4)", "PEFT + bitsandbytes")})


FULL_SETUPS = {  # kind, pairs in a step, activations recomputed
    "full fine-tuning": ("dpo", 4, False),
    "full fine-tuning, checkpointing": ("dpo", 4, True),
    "LoRA on bf16": ("lora", 4, False),
    "QLoRA on NF4, checkpointing": ("qlora", 1, True),
}


def train_contender(contender: str, setup: Setup, repeats: int) -> tuple[float, int, float]:
    """Seconds of a step with AdamW, peak memory in bytes, and the first loss: for a process of its own."""
    step, model = make_step(contender, setup)
    optimizer = torch.optim.AdamW(peers.trained(model).values(), lr=1e-5, fused=True)
    losses = []

    def update() -> None:
        losses.append(step())
        optimizer.step()

    _, most, seconds = held_and_peak(lambda: medians({"step": update}, repeats, setup.device)["step"], setup.device)
    return seconds, most, losses[0]


def bench_train(bench: Bench) -> list[dict]:
    full, lengths, rows = full_size_phi(bench), (bench.tokens, bench.tokens), []
    for name, (kind, count, checkpointing) in FULL_SETUPS.items():
        setup = Setup(kind, str(full), bench.device, count, lengths, lengths, "bf16", checkpointing)
        both, failed = in_workers(train_contender, "TRL", setup=setup, repeats=max(bench.repeats, 5))
        seconds, memory, losses = zip(*(done or (None, None, None) for done in both))
        if kind == "dpo" and None not in losses and abs(losses[0] - losses[1]) > 0.05:
            raise InputError(f"{name}: the losses are {losses}; that is not the same step")
        case = f"DPO, {name}, {count} x {2 * lengths[0]:,} tokens / TRL"
        rows.append(row(case, "pairs/s", *rates(count, *seconds), ">= 1.5", failed))
        least = "ours <= 8" if kind == "qlora" else ""
        rows.append(row("  peak memory", "GB", *(size and size / 1e9 for size in memory), least))
    return rows


def bench_start(bench: Bench) -> list[dict]:
    """Everything before the first step counts: imports, the demo's rows, the tokenizer."""
    seconds = []
    for i in range(bench.repeats):
        out = bench.directory / f"fresh-{i}"
        if bench.world:
            demo.write_world(out / "demo-seed0", sizes=bench.world)
        flags = ["--stage", "dpo", "--out", str(out), "--device", bench.device]
        seconds.append(first_step(flags, out / "demo-sft-seed0"))
    return [row("start of the demo until its first step (SFT)", "s", statistics.median(seconds), target="ours <= 5")]
