"""Training steps, ours beside TRL's, and how the time of ours grows.

A step is forward pass, loss and backward pass on the same random model and examples: ours is `train.step_gradients`, TRL's
its trainer's loss. Losses and gradients are compared before anything is timed. The loss is SFT's or robust DPO's, whose
reference log-probabilities are "cached" (known before the step, always so in ours) or "live" (computed in every step, TRL's
default). Adapters (LoRA) have rank 16, on every linear layer but the output layer; in QLoRA on NF4 weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import demo
import train
from bench import peers, timing
from bench.timing import alone, attempt, held_and_peak, in_worker, medians, rates, row
from bench.workloads import Bench, Lengths, forward_parts, full_size_phi, pairs, peak, training_operations
from data import Example
from lora import add_lora
from model import Phi, PhiConfig, all_logprobs, read_config
from runtime import memory
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
    """AssertionError unless two training steps, (loss, gradients by name) each, agree: in the loss and in every value of the
    gradients, whose differences are measured in units of the largest one."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    largest = max(float(g.abs().max()) for g in their_gradients.values())
    message = "the two do not compute the same step; their times cannot be compared"
    torch.testing.assert_close(loss, their_loss, rtol=tolerance, atol=tolerance, msg=message)
    torch.testing.assert_close(gradients, their_gradients, rtol=0, atol=tolerance * largest, check_dtype=False, msg=message)


def step_memory(contender: str, setup: Setup) -> float:
    """Peak memory of one step in MB, above what was held before it: for a process of its own."""
    step, _ = make_step(contender, setup)
    held, most, _ = held_and_peak(step, setup.device)
    return (most - held) / 1e6


def compare(bench: Bench, kind: str, titles: dict[str, str], targets: tuple[str, str] = ("", "")) -> list[dict]:
    """Rows of time and peak memory. titles: {peer: the row's}; the targets are for the first of them."""
    where, other = str(bench.directory), str(bench.directory / "reference") if kind == "dpo" else None
    setup = Setup(kind, where, bench.device, 4, bench.prompt, bench.completion, reference=other)
    made = {"ours": (make_step("ours", setup), "")}
    made |= {peer: attempt(make_step, peer, setup, unless=bench.no_peers) for peer in titles}
    both = [contender for contender, _ in made.values() if contender][:2]
    if both[1:]:
        results = [(step(), {name: p.grad for name, p in peers.trained(model).items()}) for step, model in both]
        same_steps(*results, TOLERANCE[kind])
    seconds = medians({name: step and step[0] for name, (step, _) in made.items()}, bench.repeats, bench.device)
    memory = {
        name: attempt(in_worker, step_memory, unless=why, contender=name, setup=setup) for name, (_, why) in made.items()
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


FULL_SETUPS = {  # flags of train.py
    "full fine-tuning": {},
    "full fine-tuning, checkpointing": dict(gradient_checkpointing=True),
    "LoRA on bf16": dict(lora=peers.RANK, base="bf16"),
    "QLoRA on NF4, checkpointing": dict(lora=peers.RANK, base="nf4", gradient_checkpointing=True),
}
TARGETS = {"full fine-tuning": "ours >= 0.45", "full fine-tuning, checkpointing": "ours >= 0.38"}  # of the MFU


def train_contender(contender: str, setup: Setup, repeats: int) -> dict:
    """A step with clipping and AdamW: for a process of its own. "drift": how far an answer's log-probability moves, in nats,
    if it is computed in a batch of one."""
    step, model = make_step(contender, setup)
    trained = list(peers.trained(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    losses = []

    def update() -> None:
        losses.append(step())
        torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()

    _, most, seconds = held_and_peak(lambda: medians({"": update}, repeats, setup.device)[""], setup.device)
    made = {"seconds": seconds, "GB": most / 1e9, "loss": losses[0]}
    if contender == "ours":
        one, all_ = (all_logprobs(model, setup.examples(), n, setup.device, "bf16", "drift") for n in (1, setup.count))
        made |= {"drift": float((one - all_).abs().mean()), **timing.costliest(update, seconds, setup.device)}
    return made


def bench_train(bench: Bench) -> Iterator[dict]:
    full, lengths = alone(full_size_phi, bench.device, bench=bench), (bench.tokens, bench.tokens)
    top = peak(bench.card)
    for name, flags in FULL_SETUPS.items():
        kind = {None: "dpo", "bf16": "lora", "nf4": "qlora"}[flags.get("base")]
        setup = Setup(kind, str(full), bench.device, 4, lengths, lengths, "bf16", flags.get("gradient_checkpointing", False))
        examples, config = setup.examples(), read_config(full)
        tokens = sum(map(len, examples))
        case = f"DPO, {name}, 4 x {tokens // 4:,} tokens"
        how = dict(setup=setup, repeats=bench.repeats)
        ours, failed = attempt(alone, train_contender, bench.device, contender="ours", **how)
        if failed:  # it does not fit on this card; the next one may
            yield row(case, "tokens/s", None, note=failed)
            continue
        theirs, note = attempt(in_worker, train_contender, unless=bench.no_peers, contender="TRL", **how)
        if kind == "dpo" and theirs and abs(ours["loss"] - theirs["loss"]) > 0.05:
            raise InputError(f"{name}: the losses are {ours['loss']} and {theirs['loss']}; that is not the same step")
        numbers = [theirs and theirs[key] for key in ("seconds", "GB")]
        step_settings = settle("dpo", dict(model="random", device=bench.device, dtype="bf16", batch_size=4) | flags).settings
        estimated = sum(memory.estimate(config, step_settings, tokens).values()) / 1e9
        yield row(f"{case} / TRL", "tokens/s", *rates(tokens, ours["seconds"], numbers[0]), ">= 1.5", note) | ours
        yield row("  peak memory / TRL", "GB", ours["GB"], numbers[1], "ours <= 8" if kind == "qlora" else "")
        yield row("  peak memory / estimate", "GB", ours["GB"], estimated, "<= 1.1" if top else "")
        if top:
            share = training_operations(config, examples, frozen=kind in peers.ADAPTED) / top
            yield row("  MFU / TRL", "-", *rates(share, ours["seconds"], numbers[0]), TARGETS.get(name, ""))


def bench_growth(bench: Bench) -> list[dict]:
    """Seconds fitted with size^k, beside the k of the operations. The two may differ, for small sizes leave cores idle and
    large ones leave the cache; but a much larger k of the seconds shows that something is done too often."""

    def phi(**other) -> Phi:
        return Phi(PhiConfig(**bench.growing | other)).init_weights(seed=0).to(bench.device)

    one, length = phi(), bench.lengths[len(bench.lengths) // 2 - 1]
    growing = {  # what grows: (size, model, tokens, rows)
        "length": [(n, one, n, 1) for n in bench.lengths],
        "batch": [(n, one, length, n) for n in bench.batches],
        "width": [(n, phi(hidden_size=n, intermediate_size=4 * n), length, 1) for n in bench.widths],
        "layers": [(n, phi(num_hidden_layers=n), length, 1) for n in bench.depths],
    }
    asked = [(what, kind) for what in growing for kind in ("forward", "SFT step", "DPO step")]
    asked = [pair for pair in asked if pair not in (("width", "SFT step"), ("layers", "SFT step"))]  # as the DPO step
    return [growth(what, kind, growing[what], bench) for what, kind in asked]


def growth(what: str, kind: str, sizes: list[tuple], bench: Bench) -> dict:
    """One row: the exponents of seconds and of operations over `sizes`, (size, model, tokens, rows) each."""
    runs, counts = {}, []
    for size, model, length, batch in sizes:
        completions = 2 if kind == "DPO step" else 1
        half = length // 2 // completions  # of all tokens, the prompt's the other
        examples = pairs(model.config.vocab_size, batch, (length - completions * half,) * 2, (half, half), completions)
        if kind == "forward":
            ids = torch.tensor([e.prompt + e.completions[0] for e in examples], device=bench.device)
            runs[size] = torch.no_grad()(partial(model, ids))
            counts.append(sum(forward_parts(model.config, examples, all_logits=True)))
        else:
            reference = torch.zeros(batch, 2) if completions == 2 else None
            runs[size] = our_step(model, examples, reference, bench.device)
            counts.append(training_operations(model.config, examples))
    seconds = list(medians(runs, bench.repeats, bench.device).values())
    case = f"growth of the {kind} with {what}: exponent / its operations'"
    return row(case, "-", timing.exponent(list(runs), seconds), timing.exponent(list(runs), counts), "<= 1.15")


def bench_start(bench: Bench) -> list[dict]:
    """Everything before the first step counts: imports, the demo's rows, the tokenizer, the reference's pass."""
    first, *others = [bench.directory / f"start-{i}" for i in range(bench.repeats + 1)]
    for out in (first, *others) if bench.world else ():
        demo.write_world(out / "demo-seed0", sizes=bench.world)
    flags = ["--stage", "dpo", "--device", bench.device, "--out"]
    fresh = [timing.first_step([*flags, str(out)], out / "demo-sft-seed0") for out in others]
    sft = ["--stage", "sft", "--name", "demo-sft-seed0", "--max-steps", "2", "--device", bench.device, "--out", str(first)]
    if in_worker(train.main, argv=sft):
        raise InputError("the demo's SFT failed")
    names = [f"dpo-{i}" for i in range(max(bench.repeats, 2))]
    tuned = [timing.first_step([*flags, str(first), "--name", name], first / name) for name in names]
    return [
        row("start of the demo until its first step (SFT)", "s", sorted(fresh)[len(fresh) // 2], target="ours <= 5"),
        row("  with an SFT model until DPO's first step", "s", tuned[0]),
        row("  the same again, the reference's table on disk", "s", min(tuned[1:])),
    ]
