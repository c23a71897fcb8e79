"""The training loop, the training stages around it, and the driver.

    python train.py --stage dpo                                              the embedded demo: minutes on a laptop
    python train.py --stage dpo --model DIR --train pairs.jsonl              your model, your pairs
    python train.py --stage sft --model microsoft/phi-2 --train sft.jsonl    supervised tuning first
    python train.py --stage dpo ... --dry-run                                look before you train
    python train.py --stage dpo --name NAME --resume                         go on after a kill
    torchrun --nproc-per-node 4 train.py --stage dpo ...                     four GPUs, the same result
    python train.py --help                                                   all stages

`train` is the loop. `run` is a training stage (sft, dpo, mcq, qat): rows and model -> the reference's log-probabilities ->
the loop -> what became of the model. `main` understands the command line and runs the stage's module.
"""

import sys

from runtime import flags

if __name__ == "__main__":  # at once, so that there is one copy of this module, and --help need not wait for torch
    flags.parse_or_exit(sys.argv[1:])
    import train

    sys.exit(train.main(sys.argv[1:]))

import contextlib
import gc
import hashlib
import importlib
import json
import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import demo
import dpo
import sft
from data import ChatML, Example, by_length, collate, coloured, epoch_order, grades, lengths_of
from generate import sample_answers
from lora import add_lora, find_origin, load_lora, lora_layers, merge_lora, refuse_adapters
from metrics.preferences import flips, training_summary
from metrics.text import answer_summary
from model import Phi, all_logprobs, autocast, completion_logprobs, read_config
from prepare.rows import Inputs, load_inputs
from quant import FORMATS, SKIP, Int8Linear, Linear4bit, linear_layers, round_to, train_quantized
from runtime import memory, parallel, runs, weights
from runtime.files import InputError, first_line, printable, whole_file, write_json
from runtime.optimizer import learning_rate, load_optimizer, make_optimizer, save_optimizer
from runtime.settings import LOWER_IS_BETTER, METRICS, TRAINING, Tuning

# -------------------------------------------------------------------------------------------------------------- the loop


def train(
    settings: Tuning,
    run: Path,
    model: Phi,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    reference: "Reference",
    state: dict,
) -> int | None:
    """Runs the steps after state["step"]; returns the signal that stopped the loop, or None when it has come to its end."""
    steps_per_epoch = math.ceil(len(inputs.train) / settings.batch_size)
    total = settings.max_steps or settings.epochs * steps_per_epoch
    metric = settings.metric or METRICS[settings.objective][0]
    with runs.recording(run, settings.stage, state["step"], total) as record, runs.stop_requests() as stop_requested:
        first = state["step"] + 1
        for step in range(first, total + 1):
            # Which examples: a function of the seed, the epoch and the place of the step in it.
            epoch, batch = divmod(step - 1, steps_per_epoch)
            if batch == 0 or step == first:
                order = epoch_order(inputs.train, settings.batch_size, settings.seed, epoch)
            chosen = order[batch]
            examples = [inputs.train[i] for i in chosen]
            expected = None if reference.train is None else reference.train[chosen]  # [examples, 2]

            # Forward, backward, clip, learning rate, step.
            numbers = step_gradients(model, examples, expected, settings, step)
            numbers["grad_norm"] = clip_gradients(model, settings.clip)
            check_step(step, numbers, examples, settings)
            numbers["lr"] = learning_rate(step - 1, total, settings)
            for group in optimizer.param_groups:
                group["lr"] = numbers["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state["step"] = step
            record.step(step, numbers, tokens=sum(map(len, examples)))

            # Evaluate and save now and then; the best step is always saved.
            last, best = step == total, False
            if last or step % settings.eval_every == 0:
                held_out = evaluate(model, inputs.held_out, reference.held_out, settings)
                record.log(step, held_out)
                best = note_best(state, held_out[f"eval_{metric}"], metric)
            stop = stop_requested()
            if best or last or stop or step % (settings.save_every or settings.eval_every) == 0:
                save(settings, run, model, inputs.chat, optimizer, state)
            if stop:
                return stop
            if settings.patience and state["evaluations_since_best"] >= settings.patience:
                record.say(f"Stopping early: no better {metric} in {settings.patience} evaluations.")
                return None
    return None


def step_gradients(
    model: Phi, examples: list[Example], reference: Tensor | None, settings: Tuning, step: int = 1
) -> dict[str, float]:
    """Adds the gradient of one optimizer step's mean loss, in micro-batches; returns the step's metrics.

    The mean is over the whole step: of tokens in SFT, of pairs in DPO. Each micro-batch adds its *sum* divided by the
    step's total, so 1 x 8 and 8 x 1 examples, on one rank or eight, give the same gradient. `reference`: this step's
    log-probabilities [examples, 2] (DPO). InputError names the rows whose loss is not finite.
    """
    model.train()
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + parallel.rank())  # of dropout, the same after a resume
    parts = parallel.deal(by_length(examples), settings.micro_batch_size)  # of similar length: little padding
    units = {"sft": lengths_of(examples).sum().item(), "dpo": len(examples)}[settings.objective]
    sums: dict[str, Tensor] = {}
    not_finite: list[str] = []
    for part in parts:
        weight, indices = (1, part) if part else (0, [0])  # a rank with none left joins in with the first, weight 0
        expected = None if reference is None else reference[indices].to(settings.device)  # [pairs, 2]
        batch = collate([examples[k] for k in indices]).to(settings.device)
        with parallel.watching(f"in step {step}"), autocast(settings.device, settings.dtype):
            logprobs = completion_logprobs(model, batch)  # [N]
        loss, metrics = objective(logprobs, batch.lengths, expected, settings)
        if weight and not math.isfinite(loss.item()):
            not_finite += [examples[k].where for k in indices]
        with parallel.watching(f"in step {step}"):
            (weight * loss / units).backward()
        sums = {name: weight * value + sums.get(name, 0) for name, value in metrics.items()}
    model.eval()
    totals = torch.stack(list(sums.values()))  # [metrics, 2]: sum and count
    if parallel.size() > 1:
        parallel.sum_gradients(model.parameters())
        totals = parallel.sum_over_ranks(totals)
    numbers = {name: (total / count).item() for name, (total, count) in zip(sums, totals.cpu(), strict=True)}
    check_finite("loss", numbers["loss"], not_finite)
    return numbers


def objective(logprobs: Tensor, lengths: Tensor, reference: Tensor | None, settings: Tuning) -> tuple[Tensor, dict]:
    """The summed loss and the metrics {name: [sum, count]} of completions' log-probabilities [N] and lengths [N] in tokens.

    reference [N/2, 2] for DPO, whose completions come as chosen, rejected, chosen, rejected, ...
    """
    if settings.objective == "sft":
        return sft.objective(logprobs, lengths)
    policy, lengths = logprobs.view(-1, 2), lengths.view(-1, 2)
    return dpo.objective(policy, reference, lengths, settings.loss, settings.beta, settings.eps, settings.nll_weight)


def clip_gradients(model: Phi, largest: float) -> float:
    """Scales the gradient down to the norm `largest`, if it is longer; returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return (parallel.whole(norm) if parallel.size() > 1 else norm).item()


def evaluate(model: Phi, examples: list[Example], reference: Tensor | None, settings: Tuning) -> dict[str, float]:
    """The metrics of training over all held-out examples, with the prefix "eval_"."""
    policy = all_logprobs(model, examples, settings.micro_batch_size, settings.device, settings.dtype, "evaluating")
    _, sums = objective(policy.flatten(), lengths_of(examples).flatten(), reference, settings)
    numbers = {f"eval_{name}": (total / count).item() for name, (total, count) in sums.items()}
    if settings.objective == "dpo":
        numbers["eval_debiased_accuracy"] = dpo.debiased_accuracy(numbers["eval_rewards/accuracies"], settings.eps)
    return numbers


def note_best(state: dict, value: float, metric: str) -> bool:
    """Updates the counters after an evaluation at step state["step"]; returns whether it was the best so far."""
    best = state["best_value"]
    if best is None or (value < best if metric in LOWER_IS_BETTER else value > best):
        state |= {"best_step": state["step"], "best_value": value, "evaluations_since_best": 0}
        return True
    state["evaluations_since_best"] += 1
    return False


def save(settings: Tuning, run: Path, model: Phi, chat: ChatML, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes a checkpoint, complete or not at all, and deletes old ones."""
    with runs.checkpoint(run, state, chat) as directory:
        model.save_pretrained(directory)
        save_optimizer(directory, model, optimizer)
    if parallel.is_main():
        runs.prune(run, settings.keep, state["best_step"])


# ----------------------------------------------------------------------------------------------- is the step what it must be


def check_step(step: int, numbers: dict[str, float], examples: list[Example], settings: Tuning) -> None:
    """InputError if the gradient is not finite, or if the first step shows that something is wrong from the start."""
    check_finite("gradient", numbers["grad_norm"], [e.where for e in examples] if parallel.is_main() else [])
    if step == 1 and settings.objective == "dpo" and settings.stage != "qat":  # rounding moves the margin at once
        check_start(numbers, settings)
    if step == 1 and numbers["grad_norm"] == 0:
        raise InputError("the first gradient is exactly 0: no parameter changes the loss. Is the model frozen or all zeros?")


def check_start(numbers: dict[str, float], settings: Tuning) -> None:
    """Before the first step policy and reference are one model: no answer has drifted, z = 0, and the loss is ln 2 (hinge 1,
    IPO 1/(4 beta^2)). InputError if not, for then every later number would be wrong."""
    tolerance = 1e-3 if settings.dtype == "fp32" else 0.5  # rounding, in nats per answer
    expected = dpo.preference_loss(torch.zeros(1), settings.loss, settings.beta, settings.eps).item()
    drift, measured = numbers["drift/absolute"], numbers["preference_loss"]
    if not drift <= tolerance or not abs(measured - expected) <= 4 * tolerance * max(1.0, 1 / settings.beta):
        raise InputError(
            f"at step 0 the answers have drifted {drift:.3g} nats from the reference (must be 0) and the loss is "
            f"{measured:.6f} (must be {expected:.6f}): the reference log-probabilities are not those of the starting model. "
            f"Delete {settings.out}/reference and run again; if it stays, model, tokenizer or dtype differ."
        )


def check_finite(what: str, value: float, where: list[str]) -> None:
    """InputError, on all ranks, if a step's number is not finite. `where`: the rows that this rank found it in."""
    if not math.isfinite(value):
        rows = sum(parallel.gather(where), [])
        raise InputError(
            f"the {what} is {value}; nothing was updated. The batch held {', '.join(rows)}. Look at those rows, or lower "
            "--lr; --resume goes on from the last good checkpoint."
        )


# ----------------------------------------------------------------------------------------------- a training stage, whole


def run(settings: Tuning) -> int:
    """A training stage from its inputs to its report; returns the exit status."""
    check_loss(settings)
    run = Path(settings.out) / settings.name
    with parallel.main_first():
        parent = weights.resolve(settings.model, settings.revision)
    if settings.dry_run:
        dry_run(settings, parent)
        return 0
    if settings.resume and parallel.gather((run / "results.json").exists())[0]:
        print(f"{run} is finished; nothing to resume.")
        return 0
    if parallel.is_main():
        runs.check_name(settings)
    inputs = load_inputs(settings, runs.load_chat(parent, settings.system_prompt or ""))
    print(runs.describe_ledgers(inputs.ledgers))
    print(f"{len(inputs.train):,} to train on, {len(inputs.held_out):,} to evaluate on, no question on both sides")
    phi = read_config(parent)
    peak = memory.watch_peak(settings.device)
    need = memory.check_fits(phi, parent, settings, inputs.train)
    model = load_to_tune(parent, settings)
    with runs.open_run(settings, inputs) as start:
        reference = Reference()
        if settings.objective == "dpo":
            reference = reference_logprobs(settings, model, weights.fingerprint(model), inputs)
        model, optimizer, state = prepare(settings, run, model, parent, start)
        stopped = train(settings, run, model, optimizer, inputs, reference, state)
        if stopped:
            print(f"Stopped by {signal.Signals(stopped).name} and saved. To go on:\n  {runs.resume_command(settings)}")
            return 128 + stopped
        with parallel.main_first():
            if parallel.is_main():
                runs.publish(run, state["best_step"])
        used = peak()
        del model, optimizer
        gc.collect()  # a sharded model holds on to itself

        results = measure_all(settings, run, parent, inputs, reference.held_out)
        results |= {name: state[name] for name in ("best_step", "best_value", "evaluations_since_best")}
        results |= {"parent": str(parent), "memory": {"estimated": need.total, "measured": used}}
        if parallel.is_main():
            print(runs.summary(settings, run, inputs.held_out, results))
            runs.training_figure(run, settings.objective)
            write_json(run / "results.json", results)
    return 0


def check_loss(settings: Tuning) -> None:
    """InputError, before anything is read, if loss, beta and eps make no sense together."""
    if settings.objective == "dpo":
        try:
            dpo.preference_loss(torch.zeros(1), settings.loss, settings.beta, settings.eps)
        except ValueError as error:
            raise InputError(f"--loss {settings.loss}: {error}") from None


def load_to_tune(directory: Path, settings: Tuning) -> Phi:
    """The model that tuning starts from. Its own adapters are what --lora goes on with; without --lora they are merged.

    Several ranks each hold all of a model under --lora, whose weights do not move, and their share of it without.
    """
    if parallel.size() > 1 and settings.lora is None:
        refuse_adapters(directory)
        if weights.is_quantized(directory):
            raise InputError(f"{directory} is quantized, and codes cannot be tuned: add --lora 16")
        return Phi.sharded(directory, settings.device)
    model = load_model(directory, settings)
    adapters = lora_layers(model)
    if settings.lora is None and adapters:
        merge_lora(model)
        print(f"{directory} holds adapters: merged, and all weights are tuned (--lora would go on with them)")
    if settings.lora is None and {Int8Linear, Linear4bit} & {*map(type, model.modules())}:
        raise InputError(
            f"{directory} is quantized, and codes cannot be tuned: add --lora 16, or start from what it was made of"
        )
    if settings.lora is not None and adapters:
        check_goes_on(directory, settings, model)
    elif not Path(settings.model).is_dir():  # adapters are to name the hub's model, not its copy on this machine
        model.origin = replace(model.origin, name=settings.model, revision=settings.revision)
    return model


def load_model(directory: Path, settings: Tuning) -> Phi:
    """A model as a stage trains and measures it: under --lora with its frozen weights as --base says, else in fp32."""
    to = settings.base if settings.base in FORMATS else None
    bf16 = settings.base == "bf16" or (to is not None and settings.dtype == "bf16")
    return Phi.from_pretrained(directory, torch.bfloat16 if bf16 else torch.float32, settings.device, base=to)


def check_goes_on(directory: Path, settings: Tuning, model: Phi) -> None:
    """InputError if the flags ask for other adapters than those that a model has."""
    one = next(iter(lora_layers(model).values()))
    trained_on = find_origin(directory).format or "unrounded"  # `model` has been read as --base says
    if settings.base and trained_on != settings.base and {trained_on, settings.base} & set(FORMATS):
        raise InputError(f"{directory} holds adapters of {trained_on} weights, not of {settings.base}: leave out --base")
    for flag, asked, has in (("lora", settings.lora, one.rank), ("lora-alpha", settings.lora_alpha, one.alpha)):
        if asked is not None and asked != has:
            raise InputError(
                f"{directory} holds adapters with --{flag} {has:g}, which tuning goes on with: give that, or make one plain "
                f"model of it first: python train.py --stage merge --model {directory}"
            )
    if settings.lora_targets:
        raise InputError(f"--lora-targets: {directory} has its adapters already; leave it out")


def prepare(settings: Tuning, run: Path, model: Phi, parent: Path, start: int) -> tuple[Phi, torch.optim.Optimizer, dict]:
    """The model as it is trained, with the weights after step `start`, its optimizer, and the loop's counters."""

    def change_layers(model: Phi) -> None:
        if settings.stage == "qat":
            train_quantized(model, settings.to, settings.block)
        if settings.compile:  # one graph serves all layers, which differ in nothing but their weights, and all lengths
            for block in model.model.layers:
                block.compile(dynamic=True)

    if settings.lora and not lora_layers(model):
        targets = settings.lora_targets or "all-linear"
        add_lora(model, settings.lora, settings.lora_alpha, targets, seed=settings.seed)
    for layer in lora_layers(model).values():
        layer.dropout = settings.lora_dropout
    sharded = parallel.size() > 1 and not settings.lora
    if sharded and (settings.compile or settings.stage == "qat"):  # layers are changed before they are split
        model = Phi.sharded(parent, settings.device, change_layers)
    else:
        change_layers(model)
    model.gradient_checkpointing = settings.gradient_checkpointing
    if not start:
        state = {"step": 0, "best_step": None, "best_value": None, "evaluations_since_best": 0}
        return model, make_optimizer(model, settings), state
    checkpoint = runs.checkpoint_directory(run, start)
    if settings.lora:
        load_lora(model, checkpoint)
    else:
        weights.load_weights(model, checkpoint)
    optimizer = make_optimizer(model, settings)
    load_optimizer(checkpoint, model, optimizer)
    return model, optimizer, runs.read_state(checkpoint)


# --------------------------------------------------------------------------------------------------------- the reference


@dataclass
class Reference:
    """Log-probabilities [E, 2] of both answers of each pair under the starting model, which DPO measures from."""

    train: Tensor | None = None
    held_out: Tensor | None = None


def reference_logprobs(settings: Tuning, model: Phi, fingerprint: str, inputs: Inputs) -> Reference:
    """Runs the starting model once over all pairs, not once a step, since it never changes."""
    with_adapters = " with its adapters, not without them" if lora_layers(model) else ""
    print(f"Reference: {settings.model}{with_adapters}, run once before training")
    train = reference_table(settings, model, fingerprint, inputs.train, "train")
    return Reference(train, reference_table(settings, model, fingerprint, inputs.held_out, "held out"))


def reference_table(settings: Tuning, model: Phi, fingerprint: str, examples: list[Example], label: str) -> Tensor:
    """Log-probabilities [E, 2] of pairs, kept on disk in OUT/reference under a hash of all that they depend on: weights,
    token ids (and so the template and the lengths), and the compute type."""
    device = torch.device(settings.device).type
    pairs = [(e.prompt, e.completions) for e in examples]
    key = json.dumps([fingerprint, settings.dtype, device, torch.__version__, pairs])
    path = Path(settings.out) / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    kept = load_file(path)["logprobs"] if path.exists() else None
    if kept is None:
        size, device, dtype = settings.micro_batch_size, settings.device, settings.dtype
        table = all_logprobs(model, examples, size, device, dtype, f"reference, {label}")
        if parallel.is_main():
            with whole_file(path) as temporary:
                save_file({"logprobs": table}, temporary)
    did = "written to" if kept is None else "reused from"
    print(f"Reference log-probabilities of {len(examples):,} {label} pairs: {did} {path}")
    return table if kept is None else kept


# ------------------------------------------------------------------------------------------------- what became of the model


def measure_all(settings: Tuning, run: Path, parent: Path, inputs: Inputs, reference: Tensor | None) -> dict:
    """{"before": ..., "after": ...}, each with metrics on the held-out examples and answers to the first of their prompts;
    in QAT "rounded" too: the starting model, merely rounded. Rounds a QAT run's published weights to its format."""
    results = {"before": measure(load_model(parent, settings), settings, inputs, reference, policy=reference)}
    if settings.stage == "qat":
        results["rounded"] = measure(round_weights(load_model(parent, settings), settings), settings, inputs, reference)
        with parallel.main_first():
            if parallel.is_main():
                round_weights(Phi.from_pretrained(run), settings).save_pretrained(run)
    results["after"] = measure(load_model(run, settings), settings, inputs, reference)
    return results


@torch.no_grad()
def round_weights(model: Phi, settings: Tuning) -> Phi:
    """Rounds the weights to --to, so that quantizing them later changes nothing any more."""
    for _, layer in linear_layers(model, SKIP):
        layer.weight.data = round_to(layer.weight.data, settings.to, settings.block)
    return model


def measure(model: Phi, settings: Tuning, inputs: Inputs, reference: Tensor | None, policy: Tensor | None = None) -> dict:
    """Metrics on the held-out examples, and answers. `policy`: the model's log-probabilities [E, k], if they are known."""
    examples = inputs.held_out
    if policy is None:
        policy = all_logprobs(model, examples, settings.micro_batch_size, settings.device, settings.dtype, "evaluating")
    lengths = lengths_of(examples)  # [E, k]
    if settings.objective == "dpo":
        metrics = training_summary(policy, reference, lengths, flips(examples), settings.eps)
    else:
        metrics = {"loss per token": -policy.sum().item() / lengths.sum().item()}
    asked = examples[: settings.samples]
    if not asked:
        return {"metrics": metrics, "answers": []}
    room = min(settings.max_length - settings.max_prompt_length, 256)
    answers, ended = sample_answers(model, inputs.chat, [e.prompt for e in asked], room, 1.0, settings.seed)
    graded = {f"sampled: {name}": sum(right) / len(right) for name, right in grades(answers, asked).items()}
    return {"metrics": metrics | answer_summary(answers, ended, asked, inputs.chat) | graded, "answers": answers}


# -------------------------------------------------------------------------------------------------------------- a dry run


def dry_run(settings: Tuning, parent: Path) -> None:
    """Prints what a run would do: settings, rows, two examples, batches, memory, steps and time. Trains nothing."""
    inputs = load_inputs(settings, runs.load_chat(parent, settings.system_prompt or ""))
    print(f"Data\n{runs.describe_ledgers(inputs.ledgers)}")
    for example in inputs.train[:2]:
        print("\n" + coloured(example, inputs.chat, colour=sys.stdout.isatty()))
    batches = epoch_order(inputs.train, settings.batch_size, settings.seed, epoch=0)
    steps = settings.max_steps or settings.epochs * len(batches)
    size = f"{settings.batch_size} examples a step, in micro-batches of {settings.micro_batch_size}"
    print(f"\nBatches\n  {len(batches):,} steps an epoch, {steps:,} in all; {size}")
    phi = read_config(parent)
    need = memory.find_need(phi, parent, settings, inputs.train)
    print(f"\nMemory\n  {need}")
    if need.total > need.free:
        print(f"It will not fit. {memory.way_out(phi, parent, settings, inputs.train)}")
    else:
        seconds = time_step(settings, parent, [inputs.train[i] for i in batches[0]])
        minutes = seconds * steps / 60
        print(f"\nTime\n  {seconds:.2f} s for a step's gradients, about {minutes:,.1f} minutes for {steps:,} steps")
    print("Nothing was trained.")


def describe_settings(settings: Any, origins: dict[str, str]) -> str:
    """A line a setting, with the layer that it comes from: flag, preset, demo or default."""
    values = {name: printable(str(value)) for name, value in asdict(settings).items()}
    return "\n".join(f"  {name:24} {value:40} {origins.get(name, '')}".rstrip() for name, value in values.items())


def time_step(settings: Tuning, parent: Path, examples: list[Example]) -> float:
    """Seconds of one step's gradients, the second time that it runs."""
    model, _, _ = prepare(settings, Path(), load_to_tune(parent, settings), parent, start=0)
    reference = torch.zeros(len(examples), 2) if settings.objective == "dpo" else None
    for _ in range(2):
        began = time.perf_counter()
        step_gradients(model, examples, reference, settings)
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------ the driver

MODULES = dict.fromkeys(TRAINING, "train") | {"data": "prepare.build", "quantize": "convert", "merge": "convert"}
MODULES |= {"eval": "eval", "sweep": "experiments.sweep", "chat": "chat"}  # a stage is run(settings) of its module


def main(argv: list[str]) -> int:
    """Runs a command line; returns 0 if all went well, 2 after an error, 128 + the number of the signal that stopped it."""
    command = flags.parse_or_exit(argv)
    try:
        with parallel.job():
            settings = command.settings
            if getattr(settings, "resume", False):
                settings = runs.resumed_settings(command)
            settings = parallel.on_this_machine(settings)
            with parallel.main_first():  # the demo's files are written once
                *before, last = demo.stages(settings)
            if before and (status := run_before(settings)):
                return status
            if getattr(last, "dry_run", False):
                print(f"Settings\n{describe_settings(last, command.origins)}\n")
            return run_stage(last)
    except (InputError, OSError) as error:
        message, status = f"error: {error}", 2
    except torch.OutOfMemoryError as error:
        advice = "A smaller --micro-batch-size or --max-length, or --gradient-checkpointing, needs less."
        message, status = f"error: {first_line(error)}\n{advice}", 2
    except KeyboardInterrupt:
        message, status = "\nStopped. Nothing half-written is left; --resume goes on from the last checkpoint.", 130
    if parallel.first_to_report():
        print(printable(message), file=sys.stderr)
    return status


def run_before(settings: Any) -> int:
    """Runs the demo's SFT stage, unless another process ran it while this one waited for it."""
    lock = runs.locked(Path(settings.out) / f"demo-seed{settings.seed}", wait=True)
    with lock if parallel.is_main() else contextlib.nullcontext():
        with parallel.main_first():
            *before, _ = demo.stages(settings)
        parallel.gather(None)  # no rank starts the stage while another still looks for its files
        return run_stage(before[0]) if before else 0


def run_stage(settings) -> int:
    module = MODULES[settings.stage]
    if settings.stage == "eval" and settings.precisions:
        module = "experiments.precisions"
    if settings.stage == "sweep" and settings.preset:
        module = "experiments.paper"
    return importlib.import_module(module).run(settings)
