"""The training loop, the training stages around it, and the driver.

    python train.py --stage dpo                                              the embedded demo: minutes on a laptop
    python train.py --stage dpo --model DIR --train pairs.jsonl              your model, your pairs
    python train.py --stage sft --model microsoft/phi-2 --train sft.jsonl    supervised tuning first
    python train.py --stage dpo ... --dry-run                                look before you train
    python train.py --stage dpo --name NAME --resume                         continue after a kill
    torchrun --nproc-per-node 4 train.py --stage dpo ...                     four GPUs, the same result
    python train.py --help                                                   all stages

`train` is the loop. `run` is a training stage (sft, dpo, mcq, qat): rows and model -> the reference's log-probabilities ->
the loop -> the model measured before and after. `main` reads the command line and runs the stage's module.
"""

import os
import sys

from runtime import flags
from runtime.files import Unread

if __name__ == "__main__":  # at once, so that there is one copy of this module, and --help need not wait for torch
    sys.stdout, sys.stderr = Unread(sys.stdout), Unread(sys.stderr)
    flags.parse_or_exit(sys.argv[1:])
    # Batches differ in size, and blocks of fixed size would leave gaps that nothing fits into.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait soon sleep: they may hold a core that others need
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

import demo
import dpo
import sft
from data import ChatML, Example, by_length, collate, epoch_order, grades, lengths_of
from generate import sample_answers
from lora import add_lora, find_origin, load_lora, lora_layers, merge_lora, refuse_adapters
from metrics import tables
from metrics.preferences import flips, training_summary
from model import Phi, all_logprobs, autocast, completion_logprobs, fit_window, read_config
from prepare.rows import Inputs, describe_ledgers, load_inputs, spelled_out
from publish.card import write_card
from quant import FORMATS, SKIP, linear_layers, round_to, train_quantized
from runtime import memory, parallel, runs, weights
from runtime.files import InputError, first_line, printable, whole_file, write_json
from runtime.optimizer import load_optimizer, make_optimizer, save_optimizer
from runtime.settings import LOWER_IS_BETTER, METRICS, TRAINING, Tuning

# -------------------------------------------------------------------------------------------------------------- the loop


def train(
    settings: Tuning, run: Path, model: Phi, optimizer: Optimizer, inputs: Inputs, reference: dict[str, Tensor], state: dict
) -> int | None:
    """Runs the steps after state["step"]; returns the signal that stopped the loop, or None if it came to its end.

    `reference`: for DPO, log-probabilities [E, 2] of inputs.train as "train" and of inputs.held_out as "held out".
    """
    steps_per_epoch = math.ceil(len(inputs.train) / settings.batch_size)
    total = settings.max_steps or settings.epochs * steps_per_epoch
    metric = settings.metric or METRICS[settings.objective][0]
    with runs.recording(run, settings.stage, state["step"], total) as record, runs.stop_requests() as stop_requested:
        first = state["step"] + 1
        for step in range(first, total + 1):
            if settings.patience and state["evaluations_since_best"] >= settings.patience:
                record.bar.write(f"Stopping early: no better {metric} in {settings.patience} evaluations.")
                break

            # Which examples: this depends only on the seed, the epoch and the step's position in it.
            epoch, batch = divmod(step - 1, steps_per_epoch)
            if batch == 0 or step == first:
                order = epoch_order(inputs.train, settings.batch_size, settings.seed, epoch)
            chosen = order[batch]
            examples = [inputs.train[i] for i in chosen]
            expected = reference["train"][chosen] if reference else None  # [examples, 2]

            # Forward, backward, clip, learning rate, step.
            numbers = step_gradients(model, examples, expected, settings, step)
            numbers["grad_norm"] = clip_gradients(model, settings.clip)
            check_finite("gradient", numbers["grad_norm"], [e.where for e in examples] if parallel.is_main() else [])
            if step == 1:
                check_start(numbers, lengths_of(examples).double().mean().item(), settings)
            numbers["lr"] = learning_rate(step - 1, total, settings)
            for group in optimizer.param_groups:
                group["lr"] = numbers["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state["step"] = step
            record.step(step, numbers, tokens=sum(map(len, examples)))

            # Evaluate and save at intervals; the best step is always saved.
            last, best = step == total, False
            if last or step % settings.eval_every == 0:
                held_out = evaluate(model, inputs.held_out, reference.get("held out"), settings)
                record.log(step, held_out)
                best = note_best(state, held_out[f"eval_{metric}"], metric)
            stop = stop_requested()
            if best or last or stop or step % (settings.save_every or settings.eval_every) == 0:
                save(settings, run, model, inputs.chat, optimizer, state)
            if stop:
                return stop
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
    # Dropout draws the same after a resume.
    torch.manual_seed(((settings.seed * 1_000_003 + step) * 1_009 + parallel.rank()) % 2**63)
    parts = parallel.deal(by_length(examples), settings.micro_batch_size)  # of similar length: little padding
    units = {"sft": lengths_of(examples).sum().item(), "dpo": len(examples)}[settings.objective]
    sums: dict[str, Tensor] = {}
    losses: list[Tensor] = []  # of the micro-batches; read at the end, for a GPU must not wait in between
    for part in parts:
        weight, indices = (1, part) if part else (0, [0])  # a rank with none left joins in with the first, weight 0
        expected = None if reference is None else reference[indices].to(settings.device, non_blocking=True)  # [pairs, 2]
        batch = collate([examples[k] for k in indices]).to(settings.device)
        with autocast(settings.device, settings.dtype):
            logprobs = completion_logprobs(model, batch)  # [N]
        loss, metrics = objective(logprobs, batch.lengths, expected, settings)
        losses.append(loss.detach())
        (weight * loss / units).backward()
        sums = {name: weight * value + sums.get(name, 0) for name, value in metrics.items()}
    model.eval()
    totals = torch.stack(list(sums.values()))  # [metrics, 2]: sum and count
    if parallel.size() > 1:
        parallel.sum_gradients(model.parameters())
        totals = parallel.sum_over_ranks(totals)
    numbers = {name: (total / count).item() for name, (total, count) in zip(sums, totals.cpu(), strict=True)}
    not_finite = [part for part, loss in zip(parts, torch.stack(losses).tolist()) if not math.isfinite(loss)]
    check_finite("loss", numbers["loss"], [examples[k].where for part in not_finite for k in part])
    return numbers


def objective(logprobs: Tensor, lengths: Tensor, reference: Tensor | None, settings: Tuning) -> tuple[Tensor, dict]:
    """The summed loss of completions, from log-probabilities [N] and lengths in tokens [N]; metrics {name: [sum, count]}.
    In DPO chosen and rejected completions alternate, and `reference` is [N/2, 2]."""
    if settings.objective == "sft":
        return sft.objective(logprobs, lengths)
    policy, lengths = logprobs.view(-1, 2), lengths.view(-1, 2)
    return dpo.objective(policy, reference, lengths, settings.loss, settings.beta, settings.eps, settings.nll_weight)


def clip_gradients(model: Phi, largest: float) -> float:
    """Scales the gradient down to the norm `largest`, if it is longer; returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return (parallel.whole(norm) if parallel.size() > 1 else norm).item()


def learning_rate(step: int, total: int, settings: Tuning) -> float:
    """Linear warm-up to `lr`, then a cosine or linear decay that would reach 0 one step after the last."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.lr * (0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress)


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


def save(settings: Tuning, run: Path, model: Phi, chat: ChatML, optimizer: Optimizer, state: dict) -> None:
    """Writes a checkpoint, complete or not at all, and deletes old ones."""
    with runs.checkpoint(run, state, chat) as directory:
        model.save_pretrained(directory)
        save_optimizer(directory, model, optimizer)
    if parallel.is_main():
        runs.prune(run, settings.keep, state["best_step"])


# --------------------------------------------------------------------------------------------------------- checks of a step


def check_start(numbers: dict[str, float], tokens: float, settings: Tuning) -> None:
    """InputError if the first step shows that something is wrong: a gradient of 0, or a reference that is another model.

    Before the first step policy and reference are the same: no answer has drifted, and so z = 0 and the loss is ln 2 (hinge
    1, IPO 1/(4 beta^2)). Not so in QAT, where rounding has moved the margin already. What rounding does to an answer's
    tokens, of which there are `tokens` in the mean, has either sign, so it adds up like their square root.
    """
    if numbers["grad_norm"] == 0:
        raise InputError("the first gradient is exactly 0: no parameter changes the loss. Is the model frozen or all zeros?")
    if settings.objective != "dpo" or settings.stage == "qat":
        return
    tolerance = (1e-4 if settings.dtype == "fp32" else 0.06) * math.sqrt(tokens)  # nats an answer
    drift, loss = numbers["drift/absolute"], numbers["preference_loss"]
    if not drift <= tolerance:
        found = f"{drift:.3g} nats from the reference (must be 0; the loss is {loss:.6f}), which is another model's"
        raise InputError(f"at step 0 the answers have drifted {found}. Delete {settings.out}/reference and run again.")


def check_finite(what: str, value: float, where: list[str]) -> None:
    """InputError, on all ranks, if a step's loss or gradient is not finite. `where`: the rows at fault on this rank."""
    if not math.isfinite(value):
        rows = sum(parallel.gather(where), [])
        named = ", ".join(rows[:5]) + (f" and {len(rows) - 5:,} more" if len(rows) > 5 else "")
        way_out = "start another run with another --name and a lower --lr. (--resume would come to the same step again.)"
        raise InputError(f"the {what} is {value}; nothing was updated. The batch held {named}. If they are sound, {way_out}")


# ------------------------------------------------------------------------------------------------ a whole training stage


def run(settings: Tuning) -> int:
    """Runs a training stage, from its inputs to its report; returns the exit status."""
    run = Path(settings.out) / settings.name
    with parallel.main_first():
        parent = weights.resolve(settings.model, settings.revision)
    asked, settings = settings, fit_window(settings, parent)
    if settings.dry_run:
        dry_run(settings, parent)
        return 0
    if settings.resume and parallel.gather((run / "results.json").exists())[0]:
        print(f"{run} is finished; nothing to resume.")
        return 0
    if parallel.is_main() and not settings.resume:
        runs.check_name(settings)
    inputs = load_inputs(settings, runs.load_chat(parent, settings.system_prompt or ""))
    print(describe_ledgers(inputs.ledgers, read_config(parent).max_position_embeddings))
    print(f"{len(inputs.train):,} to train on, {len(inputs.held_out):,} to evaluate on, no question on both sides")
    peak = memory.watch_peak(settings.device)
    need = memory.check_fits(parent, settings, inputs.train)
    model = load_to_tune(parent, settings)
    starting = weights.fingerprint(model) if settings.objective == "dpo" else ""
    with runs.open_run(asked, inputs, parent) as start:
        reference = {}
        if settings.objective == "dpo":  # the starting model never changes, so it runs over all pairs once, not at each step
            with_adapters = " with its adapters, not the model under them" if find_origin(parent).adapters else ""
            print(printable(f"Reference: {settings.model}{with_adapters}, run once before training"))
            for side, examples in (("train", inputs.train), ("held out", inputs.held_out)):
                reference[side] = reference_table(settings, model, starting, examples, side)
        model, optimizer, state = prepare(settings, run, model, start)
        stopped = train(settings, run, model, optimizer, inputs, reference, state)
        if stopped:
            print(f"Stopped by {signal.Signals(stopped).name} and saved. To continue:\n  {runs.resume_command(settings)}")
            return 128 + stopped
        with parallel.main_first():
            if parallel.is_main():
                runs.prune(run, settings.keep, state["best_step"])  # again, in case a kill came between
                runs.publish(run, state["best_step"])
        used = peak()
        del model, optimizer
        gc.collect()  # a sharded model is part of a reference cycle

        results = measure_all(settings, run, parent, inputs, reference.get("held out")) | state
        results |= {"parent": str(parent), "memory": {"estimated": need.total, "measured": used}}
        if parallel.is_main():
            told = tables.summary(settings, run, inputs.held_out, results)
            tables.training_figure(run, settings.objective, results["best_step"], flips(inputs.held_out))
            write_card(run, results)
            write_json(run / "results.json", results)
            print(told)
    return 0


def load_to_tune(directory: Path, settings: Tuning) -> Phi:
    """The model that tuning starts from. --lora continues with the adapters that it has; without --lora they are merged.

    With --lora the weights are frozen and every rank holds all of them; without, every rank holds its share.
    """
    origin = find_origin(directory)
    if settings.lora is None and (origin.format or "quantization_config" in read_config(directory).other):
        raise InputError(f"{directory} is quantized, and codes cannot be tuned: add --lora 16, or start from the original")
    if settings.lora is None and parallel.size() > 1:
        refuse_adapters(directory)
        cuda = settings.device.startswith("cuda")  # a CPU has no LayerNorm of an fp32 x with bf16 weights
        bf16 = cuda and settings.dtype == "bf16" and settings.stage != "qat"  # QAT rounds the fp32 weights
        return Phi.sharded(directory, settings.device, bf16)
    model = load_model(directory, settings)
    if not origin.adapters:
        if not Path(settings.model).is_dir():  # adapters name the hub's model, not its copy on this machine
            model.origin = replace(model.origin, name=settings.model, revision=settings.revision)
    elif settings.lora is None:
        merge_lora(model)
        told = "merged, and all weights are tuned (add --lora to tune the adapters instead)"
        print(printable(f"{directory} holds adapters: {told}"))
    else:
        adapters = lora_layers(model)
        one = next(iter(adapters.values()))
        targets = ",".join(sorted({name.rpartition(".")[2] for name in adapters}))
        trained = {"lora": one.rank, "lora_alpha": one.alpha, "lora_targets": targets}
        if origin.format or settings.base in FORMATS:  # otherwise --base only chooses fp32 or bf16
            trained["base"] = origin.format or "fp32"
        for name, has in trained.items():
            asked, flag = getattr(settings, name), flags.flag_name(name)
            if asked not in (None, has):
                way_out = f"Give that, or merge them first: python train.py --stage merge --model {directory}"
                raise InputError(f"{directory} holds adapters with {flag} {has}, not {asked}. {way_out}")
    return model


def load_model(directory: Path, settings: Tuning) -> Phi:
    """A model as a stage trains and measures it: in the format of --base under --lora, otherwise in fp32."""
    to = settings.base if settings.base in FORMATS else None
    bf16 = settings.base == "bf16" or (to is not None and settings.dtype == "bf16")
    return Phi.from_pretrained(directory, torch.bfloat16 if bf16 else torch.float32, settings.device, base=to)


def prepare(settings: Tuning, run: Path, model: Phi, start: int) -> tuple[Phi, Optimizer, dict]:
    """The model ready for the loop, with its weights after step `start`; its optimizer; and the loop's counters."""
    if settings.lora:
        if not lora_layers(model):
            add_lora(model, settings.lora, settings.lora_alpha, settings.lora_targets or "all-linear", seed=settings.seed)
        for layer in lora_layers(model).values():
            layer.dropout = settings.lora_dropout
    if settings.stage == "qat":
        train_quantized(model, settings.to, settings.block)
    if settings.compile:  # one graph serves all lengths and all layers, which differ only in their weights
        for block in model.model.layers:
            block.compile(dynamic=True)
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


def reference_table(settings: Tuning, model: Phi, fingerprint: str, examples: list[Example], label: str) -> Tensor:
    """Log-probabilities [E, 2] of pairs, kept in OUT/reference under a hash of all that they depend on: the weights, the
    token ids (and with them template and lengths), the compute type, the kind of device, and torch's version."""
    device, dtype = settings.device, settings.dtype
    pairs = [(e.prompt, e.completions) for e in examples]
    key = json.dumps([fingerprint, dtype, torch.device(device).type, torch.__version__, pairs])
    path = Path(settings.out) / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        print(f"Reference log-probabilities of {len(examples):,} {label} pairs: reused from {path}")
        return load_file(path)["logprobs"]
    table = all_logprobs(model, examples, settings.micro_batch_size, device, dtype, f"reference, {label}")
    if parallel.is_main():
        with whole_file(path) as temporary:
            save_file({"logprobs": table}, temporary)
    print(f"Reference log-probabilities of {len(examples):,} {label} pairs: written to {path}")
    return table


# ------------------------------------------------------------------------------------------------------ before and after


def measure_all(settings: Tuning, run: Path, parent: Path, inputs: Inputs, reference: Tensor | None) -> dict:
    """{"before": ..., "after": ...}: metrics on the held-out examples, and answers to the first of their prompts. QAT adds
    "rounded", the starting model after rounding alone, and rounds the published weights to the format."""
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
    """Rounds the weights to --to, in place. Quantizing them later then changes nothing."""
    for _, layer in linear_layers(model, SKIP):
        layer.weight.data = round_to(layer.weight.data, settings.to, settings.block)
    return model


def measure(model: Phi, settings: Tuning, inputs: Inputs, reference: Tensor | None, policy: Tensor | None = None) -> dict:
    """Metrics on the held-out examples, and answers. `policy`: the model's log-probabilities [E, k], if already known."""
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
    if settings.dtype == "bf16":  # the last use of the model: autocast would keep its weights and a copy of them
        model.bfloat16()
    answers, ended = sample_answers(model, inputs.chat, [e.prompt for e in asked], room, 1.0, settings.seed)
    graded = {f"sampled: {name}": sum(right) / len(right) for name, right in grades(answers, asked).items()}
    return {"metrics": metrics | tables.answer_summary(answers, ended, asked, inputs.chat) | graded, "answers": answers}


# -------------------------------------------------------------------------------------------------------------- a dry run


def dry_run(settings: Tuning, parent: Path) -> None:
    """Prints what a run would do: rows, two examples, batches, memory and time. InputError if memory would not suffice."""
    inputs = load_inputs(settings, runs.load_chat(parent, settings.system_prompt or ""))
    print(f"Data\n{describe_ledgers(inputs.ledgers, read_config(parent).max_position_embeddings)}")
    for example in inputs.train[:2]:
        print("\n" + spelled_out(example, inputs.chat))
    batches = epoch_order(inputs.train, settings.batch_size, settings.seed, epoch=0)
    steps = settings.max_steps or settings.epochs * len(batches)
    size = f"{settings.batch_size} examples a step, in micro-batches of {settings.micro_batch_size}"
    print(f"\nBatches\n  {len(batches):,} steps an epoch, {steps:,} in all; {size}")
    print(f"\nMemory\n  {memory.check_fits(parent, settings, inputs.train)}")
    took = time_a_step(settings, parent, inputs)
    spent = (took.training, took.training + took.reference + took.evaluating)
    stepping, total = (f"{s / 60:,.1f} minutes ({s / 3600:,.2f} hours)" for s in spent)
    print(f"\nTime\n  {took.step:.2f} s for the first step, about {stepping} for {steps:,} steps")
    reference = " and the reference" if took.reference else ""
    print(f"  {total} with {took.evaluations} evaluations{reference}, without sampled answers\nNothing was trained.")


@dataclass
class Times:
    """What a run will take, in seconds, by a step that was timed."""

    step: float  # the first step
    token: float  # a forward pass, per token
    training: float  # all steps
    reference: float  # forward passes over all pairs; 0 without a reference
    evaluating: float
    evaluations: int  # "before" and "after" included


def time_a_step(settings: Tuning, parent: Path, inputs: Inputs) -> Times:
    """Times the first step and a forward pass of its examples. The time of all others grows with the tokens."""
    batches = epoch_order(inputs.train, settings.batch_size, settings.seed, epoch=0)
    steps = settings.max_steps or settings.epochs * len(batches)
    model, optimizer, _ = prepare(settings, Path(), load_to_tune(parent, settings), start=0)
    examples, dpo_run = [inputs.train[i] for i in batches[0]], settings.objective == "dpo"
    for _ in range(2):  # the first time also warms up
        began = time.perf_counter()
        optimizer.step()  # with the gradients of the time before
        optimizer.zero_grad(set_to_none=True)
        step_gradients(model, examples, torch.zeros(len(examples), 2) if dpo_run else None, settings)
        clip_gradients(model, settings.clip)
        stepped = time.perf_counter()
        all_logprobs(model, examples, settings.micro_batch_size, settings.device, settings.dtype, "timing")
    trained, held_out, timed = (sum(map(len, some)) for some in (inputs.train, inputs.held_out, examples))
    step, token = stepped - began, (time.perf_counter() - stepped) / timed
    evaluations = math.ceil(steps / settings.eval_every) + 2
    training = step * trained / timed * steps / len(batches)
    return Times(step, token, training, token * trained * dpo_run, token * held_out * evaluations, evaluations)


# ------------------------------------------------------------------------------------------------------------ the driver

MODULES = dict.fromkeys(TRAINING, "train") | {"data": "prepare.build", "quantize": "convert", "merge": "convert"}  # run(...)
MODULES |= {"export": "publish.export", "push": "publish.push", "eval": "eval", "sweep": "experiments.sweep", "chat": "chat"}


def main(argv: list[str]) -> int:
    """Runs a command line; returns 0 on success, 2 after an error, and 128 + its number after a signal."""
    command = flags.parse_or_exit(argv)
    try:
        with parallel.job():
            settings = command.settings
            if getattr(settings, "resume", False):
                settings = runs.resumed_settings(command)
            settings = parallel.on_this_machine(settings)
            with parallel.main_first():  # the demo's files are written once
                *before, last = demo.stages(settings) if getattr(settings, "model", "") == "demo" else [settings]
            if before and (status := run_before(settings)):
                return status
            if getattr(last, "dry_run", False):
                print("Settings")
                for name, value in asdict(last).items():
                    print(f"  {name:24} {printable(str(value)):40} {command.origins.get(name, '')}".rstrip())
                print()
            return run_stage(last)
    except (InputError, OSError, SafetensorError) as error:  # safetensors' is no OSError, even where a disk is full
        message, status = f"error: {error}", 2
    except torch.OutOfMemoryError as error:
        advice = "Lower --micro-batch-size or --max-length, or add --gradient-checkpointing."
        message, status = f"error: {first_line(error)}\n{advice}", 2
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        message, status = f"error: --compile fails here: {first_line(error)}\nIt needs a C++ compiler; or leave it out.", 2
    except KeyboardInterrupt:
        goes_on = "; --resume goes on from the last checkpoint" if command.settings.stage in TRAINING else ""
        message, status = f"\nStopped. Nothing half-written is left{goes_on}.", 130
    if parallel.first_to_report():
        print(printable(message), file=sys.stderr)
    return status


def run_before(settings: Any) -> int:
    """Runs the demo's SFT stage, unless another process has run it while this one waited."""
    for file in (settings.train, settings.eval):
        if file and not file.startswith("hub:") and not Path(file).exists():  # rather now than after minutes of SFT
            raise InputError(f"{file}: no such file")
    lock = runs.locked(Path(settings.out) / f"demo-seed{settings.seed}", wait=True)
    with lock if parallel.is_main() else contextlib.nullcontext():
        with parallel.main_first():
            *before, _ = demo.stages(settings)
        parallel.gather(None)  # no rank starts the stage while another still looks for its files
        if not before:
            return 0
        does, run = "resuming" if before[0].resume else "running", Path(settings.out) / before[0].name
        print(f"The demo's SFT model comes first: {does} --stage sft in {run}/")
        return run_stage(before[0])


def run_stage(settings: Any) -> int:
    module = MODULES[settings.stage]
    if settings.stage == "sweep" and settings.preset:
        module = "experiments.paper"
    return importlib.import_module(module).run(settings)
