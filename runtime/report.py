"""What a person sees of a run: its data before, its table, samples and figure after, and the dry run.

Plain text and one picture; every number comes from eval.py or metrics.jsonl.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from data import ChatML, Example, epoch_order
from inputs import Inputs, add_adapters, load_to_tune
from lora import lora_layers
from metrics.tables import picture
from model import Phi
from runtime import fits, memory
from runtime.files import read_json
from runtime.runs import read_metrics
from runtime.settings import PHI2_COMMAND, Config

# ------------------------------------------------------------------------------------------------------ before training


def describe_inputs(inputs: Inputs) -> str:
    """Where the rows went: the ledger in words, one line a file, and the sizes of the two sides."""
    lines = []
    for name, ledger in inputs.ledgers.items():
        dropped = ", ".join(f"{count:,} {cause}" for cause, count in ledger.dropped.items()) or "none"
        lines.append(
            f"{name}: {ledger.rows:,} rows, {ledger.kept:,} kept ({ledger.trimmed:,} with a trimmed prompt), "
            f"dropped: {dropped}"
        )
        lines += [f"  left out: {reason}" for reason in ledger.bad_rows[:5]]
        if len(ledger.bad_rows) > 5:
            lines.append(f"  ... and {len(ledger.bad_rows) - 5:,} more, all in ledger.json")
    lines.append(f"{len(inputs.train):,} to train on, {len(inputs.eval):,} to evaluate on, no question on both sides")
    return "\n".join(lines)


ROLE_COLOURS = {"system": "33", "user": "34", "assistant": "36"}  # ANSI: yellow, blue, cyan


def coloured(example: Example, chat: ChatML, colour: bool) -> str:
    """An example token by token: the prompt coloured by role, supervised tokens underlined in green and red, control tokens
    inverse. Without colour, every token stands in brackets."""

    def paint(ids: list[int], code: str) -> str:
        if not colour:
            return "".join(f"[{chat.decode([i])}]" for i in ids)
        return "".join(f"\x1b[{code}{';7' if i in chat.control_ids else ''}m{chat.decode([i])}\x1b[0m" for i in ids)

    starts = [i for i, token in enumerate(example.prompt) if token == chat.start] + [len(example.prompt)]
    turns = [example.prompt[i:j] for i, j in zip([0, *starts], starts)]
    roles = [chat.decode(turn[1:]).partition("\n")[0] for turn in turns]
    painted = [paint(turn, ROLE_COLOURS.get(role, "90")) for turn, role in zip(turns, roles)]
    names = ["completion"] if len(example.completions) == 1 else ["chosen", "rejected"]
    lines = [f"prompt ({len(example.prompt)} tokens, no loss), {example.where}", "".join(painted)]
    for name, ids, code in zip(names, example.completions, ("32;4", "31;4")):
        lines += [f"{name} ({len(ids)} tokens, supervised)", paint(ids, code)]
    return "\n".join(lines)


def dry_run(config: Config, inputs: Inputs, objective: Callable, step_gradients: Callable) -> None:
    """Prints what a run would do: config, ledger, two examples, batch shapes, memory, steps and time. Trains nothing."""
    print("Configuration")
    for name, value in asdict(config).items():
        print(f"  {name:24} {value}")
    print("\nData\n" + describe_inputs(inputs))
    for example in inputs.train[:2]:
        print("\n" + coloured(example, inputs.chat, colour=sys.stdout.isatty()))

    batches = epoch_order(inputs.train, config.batch_size, config.seed, epoch=0)
    steps = config.max_steps or config.epochs * len(batches)
    largest = memory.largest_load(inputs.train, config)
    print(f"\nBatches\n  {len(batches):,} steps an epoch, {steps:,} in all")
    cut = f"rows of {config.pack} tokens" if config.pack else f"micro-batches of {config.micro_batch_size}"
    print(f"  {config.batch_size} examples a step, in {cut}")
    print(f"  largest micro-batch: {largest.rows} rows x {largest.width} tokens, {largest.predicted:,} predicted")
    if show_memory(config, inputs):
        show_time(config, inputs, [inputs.train[i] for i in batches[0]], steps, objective, step_gradients)
    print("Nothing was trained.")


def show_memory(config: Config, inputs: Inputs) -> bool:
    """Prints what a training step needs against what is free; returns whether it fits."""
    phi, need = fits.run_need(inputs.parent, config, inputs.train)
    print(f"\nMemory ({memory.parameters(phi):,} parameters), at the moment when a step needs most")
    for name, size in need.parts.items():
        print(f"  {name:24} {size / 1e6:10,.1f} MB")
    print(f"  {'sum':24} {need.total / 1e6:10,.1f} MB, {need.free / 1e6:,.0f} MB are free on {config.device}")
    if need.offloaded:
        print(f"  {'offloaded':24} {need.offloaded / 1e6:10,.1f} MB, {need.host_free / 1e6:,.0f} MB are free on the CPU")
    if not need.fits():
        print(f"It will not fit. {fits.way_out(inputs.parent, config, inputs.train, need)}")
    return need.fits()


def show_time(
    config: Config, inputs: Inputs, examples: list[Example], steps: int, objective: Callable, step_gradients: Callable
) -> None:
    """Prints the time of one step's gradients and what that makes for the whole run."""
    model = load_to_tune(inputs.parent, config)
    add_adapters(model, config)
    model.gradient_checkpointing, model.attention = config.gradient_checkpointing, config.attention
    reference = torch.zeros(len(examples), 2) if config.objective == "dpo" else None
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        step_gradients(model, examples, reference, objective, config)
        seconds = time.perf_counter() - began
    print(f"\nTime\n  {seconds:.2f} s for a step's gradients, about {_duration(seconds * steps)} for {steps:,} steps")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


# ------------------------------------------------------------------------------------------------------- after training


def table(measured: dict[str, dict[str, float]]) -> str:
    """Metrics of several models side by side, {heading: metrics}. Rewards are measured from the model "before", so it has
    none of its own."""
    rows = [("", *measured)]
    for name in measured["after"]:
        own = "reward" in name or name in ("debiased accuracy", "ties")
        cells = ["-" if own and which == "before" else _number(name, m[name]) for which, m in measured.items()]
        rows.append((name, *cells))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {name:{width}}" + "".join(f"  {cell:>8}" for cell in cells) for name, *cells in rows)


def _number(name: str, value: float) -> str:
    return (
        f"{value:.3f}" if "logp" in name or "loss" in name else f"{value:.1f}" if "tokens" in name else f"{100 * value:.1f}%"
    )


def summary(config: Config, run: Path, inputs: Inputs, results: dict) -> str:
    """The end of a run as text: table, three questions with the answers before and after, files, and what to do next."""
    measured = {which: results[which]["metrics"] for which in ("before", "rounded", "after") if which in results}
    lines = [
        "",
        f"{len(inputs.eval):,} held-out examples, best step {results['best_step']} "
        f"(by {config.metric}: {results['best_value']:.4f})",
        table(measured),
    ]
    if config.stage == "qat" and config.objective == "sft":
        full, rounded, after = (measured[which]["loss per token"] for which in ("before", "rounded", "after"))
        share = f" ({100 * (rounded - after) / (rounded - full):.0f}% won back)" if rounded - full > 0.01 else ""
        lines.append(
            f"  Rounding to {config.to} changes the loss by {rounded - full:+.4f} nats per token; after training through "
            f"the rounding {after - full:+.4f} are left{share}."
        )
    before, after = results["before"], results["after"]
    for example, old, new in list(zip(inputs.eval, before["answers"], after["answers"], strict=False))[:3]:
        lines += [
            "",
            " ".join(example.question.split()),
            f"  before: {' '.join(old.split())[:300]}",
            f"  after:  {' '.join(new.split())[:300]}",
        ]
        if "answer" in example.extra:
            lines.append(f"  right:  {example.extra['answer']}")
    weights = "adapter_model.safetensors" if config.lora else "model.safetensors"
    measured, estimated = (results["memory"][which] for which in ("measured", "estimated"))
    if measured:
        lines += ["", f"Peak memory of training: {measured / 1e9:.2f} GB measured, {estimated / 1e9:.2f} GB estimated"]
    lines += ["", f"Model, metrics and figure: {run}/ ({weights}, metrics.jsonl, figures/training.png)"]
    if config.model == "demo" and config.stage == "dpo":
        lines.append(f"The same on Phi-2:\n  {PHI2_COMMAND}")
    return "\n".join(lines)


def describe_reference(config: Config, parent: Path, model: Phi) -> str:
    """What DPO measures rewards from, in words."""
    what = f"{model.origin[0]} with its adapters, not without them" if lora_layers(model) else "the model that is tuned"
    how = "run live, with the adapters off or at those values" if config.lora else "run live, a frozen copy"
    return f"Reference: {parent} ({what}), " + (how if config.reference == "live" else "computed once")


def merge_summary(run: Path, source: Path, change: dict | None, count: int) -> str:
    """What --stage merge did to the outputs."""
    told = "Give --data FILE.jsonl to see how far the merged model's outputs moved."
    if change:
        told = (
            f"Outputs against those of the adapters beside their base, on {count} examples: KL {change['kl']:.2g} nats per "
            f"token, the same likeliest token in {100 * change['top 1']:.2f}%"
        )
    return f"{told}\nWritten to {run}/, one plain model from {source}"


def quantized_summary(config: Config, run: Path, done: dict) -> str:
    """What --stage quantize did: sizes, bits per weight, time, and the layers that lost most."""
    worst = sorted(done["errors"].items(), key=lambda item: -item[1])[:3]
    mean = sum(done["errors"].values()) / len(done["errors"])
    theirs = read_json(run / "config.json")["quantization_config"]["quant_method"] == "bitsandbytes"
    return "\n".join(
        [
            f"{done['bytes before'] / 1e6:,.1f} MB -> {done['bytes after'] / 1e6:,.1f} MB, in {done['seconds']:.1f} s; "
            f"{done['weights']:,} weights at {8 * done['bytes of weights'] / done['weights']:.2f} bits",
            f"relative error |w - w~| / |w|: mean {mean:.4f}, largest "
            + ", ".join(f"{error:.4f} ({name})" for name, error in worst),
            f"Written to {run}/; load it as any other model: its config.json says how it is stored."
            + ("" if theirs else f" {config.to} in this form is this project's own: transformers does not read it."),
        ]
    )


def training_figure(run: Path, config: Config) -> None:
    """figures/training.png: loss, accuracy and rewards over the steps, from metrics.jsonl."""
    rows = read_metrics(run)

    def training(axis, name: str, label: str, colour: str) -> None:
        """A metric of every step, faint, and its mean over 20 steps."""
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = zip(*points, strict=True)
        means = [sum(part) / len(part) for part in (values[max(0, i - 19) : i + 1] for i in range(len(values)))]
        axis.plot(steps, values, color=colour, alpha=0.15, linewidth=0.8)
        axis.plot(steps, means, color=colour, alpha=0.8, linewidth=1.2, label=f"{label}, training (mean of 20 steps)")

    def held_out(axis, name: str, label: str, colour: str) -> None:
        steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
        axis.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=0, label=f"{label}, held out")

    columns, size = (3, (14, 3.8)) if config.objective == "dpo" else (1, (5, 3.8))
    with picture(run / "figures" / "training.png", columns, size) as axes:
        loss, *others = axes
        training(loss, "loss", "loss", "C0")
        held_out(loss, "eval_loss", "loss", "C0")
        loss.set(ylabel="nats per pair" if others else "nats per token")
        if others:
            accuracy, rewards = others
            held_out(loss, "eval_dpo_loss", "DPO loss (eps = 0)", "C2")
            training(accuracy, "rewards/accuracies", "raw", "C0")
            held_out(accuracy, "eval_rewards/accuracies", "raw", "C0")
            held_out(accuracy, "eval_debiased_accuracy", "debiased", "C2")
            accuracy.set(ylabel="reward accuracy", ylim=(0, 1.05))
            for name, colour in (("chosen", "C2"), ("rejected", "C3")):
                training(rewards, f"rewards/{name}", name, colour)
                held_out(rewards, f"eval_rewards/{name}", name, colour)
            rewards.set(ylabel="reward: beta * log-ratio to the reference (nats)")
        for axis in axes:
            axis.set(xlabel="optimizer step")
            axis.legend(fontsize=7)
