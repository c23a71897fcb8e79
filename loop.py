"""The one training loop: batches in order, gradients in micro-batches, a step, and what is logged, measured and kept.

It knows nothing of losses, which sft.py and dpo.py make from log-probabilities; those know nothing of optimizers, devices or
files. Under torchrun every rank runs this loop on its share of each step's examples (parallel.py); their gradients are added
up, so that a step is the same whatever the number of ranks.
"""

import contextlib
import copy
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import dpo
import sft
from data import Batch, Example, collate, collate_rows, epoch_order, pack_rows
from inputs import Inputs, add_adapters
from lora import load_lora, starting_point, trained_before
from model import Phi, completion_logprobs
from passes import all_logprobs, autocast, evaluate
from quant import FrozenLinear, compile_missing, train_quantized
from runtime import parallel
from runtime.files import InputError
from runtime.optimizer import Offloaded, learning_rate, make_optimizer
from runtime.runs import load_optimizer, prune, save_checkpoint, truncate_metrics
from runtime.settings import LOWER_IS_BETTER, Config

# ------------------------------------------------------------------------------------------------------------- a step


def make_objective(config: Config) -> Callable:
    """(log-probabilities [N], lengths [N], reference [N] or None) -> (summed loss, {name: [sum, count]})."""
    if config.objective == "sft":
        return lambda logprobs, lengths, reference: sft.objective(logprobs, lengths)
    return lambda logprobs, lengths, reference: dpo.objective(
        logprobs, reference, lengths, config.loss, config.beta, config.eps, config.nll_weight
    )


def compiles(config: Config) -> bool:
    """Whether --compile was asked for and works here; if it does not, one line says so."""
    missing = compile_missing() if config.compile else None
    if missing:
        print(missing)
    return config.compile and not missing


def compile_blocks(model: Phi) -> None:
    """Fuses the operations of each block. One graph serves all layers, which differ in nothing but their weights, and with
    `dynamic` all lengths and batch sizes, but for 1, which has a graph of its own, as has evaluation: each is compiled when
    it is first run.

    InputError if layers are quantized: the compiled graph decodes their weights once and keeps them for the backward pass.
    """
    if any(isinstance(layer, FrozenLinear) for layer in model.modules()):
        raise InputError("--compile would keep the decoded weights of a quantized model in memory; leave it out")
    for block in model.model.layers:
        block.compile(dynamic=True)


def live_reference(model: Phi, config: Config, parent: Path) -> Callable:
    """The starting model, run on every batch: more time than a table, the same numbers. A frozen copy of it or, under LoRA,
    the model itself with its adapters off, or as they were."""
    start = trained_before(model)
    if config.lora:
        frozen, as_it_was = model, starting_point
    else:
        frozen = copy.deepcopy(model) if parallel.size() == 1 else Phi.sharded(parent, config.device)
        as_it_was = lambda model, start: contextlib.nullcontext()  # noqa: E731

    @torch.no_grad()
    def logprobs(batch) -> Tensor:
        with as_it_was(frozen, start), autocast(config.device, config.dtype):
            return completion_logprobs(frozen, batch)

    return logprobs


def micro_batches(examples: list[Example], config: Config) -> Iterator[tuple[list[int], Batch, bool]]:
    """(indices, Batch, True) of each of this rank's forward passes in a step: with --pack one row of several examples, in
    which nothing is padding, else --micro-batch-size rows of like length. A rank that has fewer passes than another one,
    which waits for it in each, makes up for them with (any example, its Batch, False)."""
    if config.pack:
        rows = pack_rows([len(e) for e in examples], config.pack)
        parts, passes = parallel.deal(rows), parallel.rounds(len(rows), 1)
    else:
        own, size = parallel.deal(sorted(range(len(examples)), key=lambda i: len(examples[i]))), config.micro_batch_size
        parts = [own[i : i + size] for i in range(0, len(own), size)]
        passes = parallel.rounds(len(examples), size)
    for i in range(passes):
        part = parts[i] if i < len(parts) else [0]
        chosen = [examples[k] for k in part]
        yield part, collate_rows([chosen]) if config.pack else collate(chosen), i < len(parts)


def step_gradients(
    model: Phi, examples: list[Example], reference: Tensor | Callable | None, objective: Callable, config: Config
) -> dict[str, float]:
    """Adds the gradient of one optimizer step's mean loss, in micro-batches; returns the step's metrics.

    The mean is over the whole step: of tokens in SFT, of pairs in DPO. Each micro-batch adds its *sum* divided by the
    step's total, so 1 x 8 and 8 x 1 examples, packed or not, on one rank or eight, give the same gradient. `reference`:
    this step's table [examples, 2], a live reference, or None. InputError names the rows whose loss is not finite.
    """
    units = sum(len(c) for e in examples for c in e.completions) if config.objective == "sft" else len(examples)
    sums: dict[str, Tensor] = {}
    not_finite = []
    for part, batch, counts in micro_batches(examples, config):
        batch = batch.to(config.device)
        with autocast(config.device, config.dtype):
            logprobs = completion_logprobs(model, batch)  # [N]
        if isinstance(reference, Tensor):
            expected = reference[part].flatten().to(config.device)  # [N]
        else:
            expected = reference(batch) if reference else None
        loss, metrics = objective(logprobs, batch.lengths, expected)
        if counts and not math.isfinite(loss.item()):
            not_finite += [examples[i].where for i in part]
        (loss / units * counts).backward()
        sums = {name: value * counts + sums.get(name, 0) for name, value in metrics.items()}
    totals = parallel.sum_over_ranks(torch.stack(list(sums.values()))).cpu()  # [metrics, 2]: sum and count
    step = {name: (total / count).item() for name, (total, count) in zip(sums, totals, strict=True)}
    check_finite("loss", step["loss"], not_finite)
    parallel.sum_gradients(model.parameters())
    return step


def check_finite(what: str, value: float, where: list[str]) -> None:
    """InputError, on all ranks, if a step's number is not finite. `where`: the rows that this rank found it in."""
    if not math.isfinite(value):
        raise InputError(
            f"the {what} is {value}; nothing was updated. The batch held "
            + ", ".join(sum(parallel.gather(where), []))
            + ". Look at those rows, or lower --lr; --resume goes on from the last good checkpoint."
        )


# ------------------------------------------------------------------------------------------------------------ the loop


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM so that the loop can end after a whole step; a second one acts at once."""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def log(run: Path, board, row: dict) -> None:
    """One line of metrics.jsonl, and the same numbers for TensorBoard, from the main rank."""
    if not parallel.is_main():
        return
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name, value in row.items():
        if name != "step":
            board.add_scalar(name, value, row["step"])


def evaluation(
    model: Phi, inputs: Inputs, reference: Tensor | None, objective: Callable, config: Config
) -> dict[str, float]:
    policy = all_logprobs(model, inputs.eval, config.micro_batch_size, config.device, config.dtype, "evaluating")
    metrics = evaluate(objective, policy, reference, inputs.eval)
    if config.objective == "dpo":
        metrics["eval_debiased_accuracy"] = dpo.debiased_accuracy(metrics["eval_rewards/accuracies"], config.eps)
    return metrics


def note_best(state: dict, step: int, value: float, metric: str) -> bool:
    """Updates the counters after an evaluation; returns whether it was the best so far."""
    best = state["best_value"]
    better = best is None or (value < best if metric in LOWER_IS_BETTER else value > best)
    if better:
        state |= {"best_step": step, "best_value": value, "evaluations_since_best": 0}
    else:
        state["evaluations_since_best"] += 1
    return better


def prepare(
    config: Config, run: Path, model: Phi, parent: Path, start: int
) -> tuple[Phi, torch.optim.Optimizer | Offloaded, dict]:
    """The model as it is trained, with the weights after step `start`, its optimizer, and the loop's counters."""
    compiled = compiles(config)

    def change_layers(model: Phi) -> None:
        if config.stage == "qat":
            train_quantized(model, config.to, config.block, compiled)
        elif compiled:
            compile_blocks(model)

    if parallel.is_sharded(model) and (compiled or config.stage == "qat"):  # layers are changed before they are split
        model = Phi.sharded(parent, config.device, change_layers)
    else:
        change_layers(model)
    model.gradient_checkpointing, model.attention = config.gradient_checkpointing, config.attention
    checkpoint = run / "checkpoints" / f"step-{start}"
    if start and config.lora:
        load_lora(model, checkpoint)
    elif start and parallel.is_sharded(model):
        model.fill(checkpoint)
    elif start:
        model.load_state_dict(Phi.from_pretrained(checkpoint, device=config.device).state_dict(), assign=True)
    optimizer = make_optimizer(model, config)
    state = {"best_step": None, "best_value": None, "evaluations_since_best": 0}
    return model, optimizer, load_optimizer(checkpoint, model, optimizer) if start else state


def open_logs(run: Path, start: int) -> contextlib.AbstractContextManager:
    """TensorBoard's writer, on the main rank; what was logged after step `start` is dropped: those steps will run again."""
    from torch.utils.tensorboard import SummaryWriter

    if not parallel.is_main():
        return contextlib.nullcontext()
    truncate_metrics(run, start)
    return SummaryWriter(str(run / "tb"), purge_step=start + 1)


def train(
    config: Config, run: Path, model: Phi, inputs: Inputs, tables: tuple[Tensor | None, Tensor | None], start: int
) -> tuple[int | None, dict]:
    """The training loop: runs the steps after `start` and returns (the signal that stopped it or None, its counters).

    `model` holds the weights of `inputs.parent`; `tables` the reference's log-probabilities for training and evaluation.
    """
    reference, eval_reference = tables
    add_adapters(model, config)
    if config.reference == "live" and config.objective == "dpo":
        reference = live_reference(model, config, inputs.parent)
    model, optimizer, state = prepare(config, run, model, inputs.parent, start)
    objective = make_objective(config)

    steps_per_epoch = math.ceil(len(inputs.train) / config.batch_size)
    total = config.max_steps or config.epochs * steps_per_epoch
    began, tokens, order = time.perf_counter(), 0, []
    with (
        open_logs(run, start) as board,
        stop_signals() as stopped,
        parallel.progress(
            total=total, initial=start, desc=config.stage, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10
        ) as bar,
    ):
        for step in range(start + 1, total + 1):
            epoch, position = divmod(step - 1, steps_per_epoch)
            if position == 0 or not order:
                order = epoch_order(inputs.train, config.batch_size, config.seed, epoch)
            examples = [inputs.train[i] for i in order[position]]
            table = reference[order[position]] if isinstance(reference, Tensor) else reference

            metrics = update(model, optimizer, examples, table, objective, config, step, total)
            tokens += sum(map(len, examples))
            speed = tokens / (time.perf_counter() - began)
            log(run, board, {"step": step, **metrics, "tokens_per_second": speed})
            shown = {"loss": f"{metrics['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
            if config.objective == "dpo":
                shown["accuracy"] = f"{metrics['rewards/accuracies']:.2f}"
            bar.set_postfix(shown, refresh=False)
            bar.update()

            save = step % config.save_every == 0 or step == total
            if step % config.eval_every == 0 or step == total:
                metrics = evaluation(model, inputs, eval_reference, objective, config)
                log(run, board, {"step": step, **metrics})
                save |= note_best(state, step, metrics[f"eval_{config.metric}"], config.metric)
            stop = int(parallel.largest(stopped[0] if stopped else 0))  # on one rank is on all, after the same step
            if save or stop:
                save_checkpoint(run, step, model, inputs.chat, optimizer, state)
                if parallel.is_main():
                    prune(run, config.keep, state["best_step"])
            if stop:
                return stop, state
            if config.patience and state["evaluations_since_best"] >= config.patience:
                bar.write(f"Stopping early: no better {config.metric} in {config.patience} evaluations.")
                break
    return None, state


def update(
    model: Phi,
    optimizer: torch.optim.Optimizer | Offloaded,
    examples: list[Example],
    reference: Tensor | Callable | None,
    objective: Callable,
    config: Config,
    step: int,
    total: int,
) -> dict[str, float]:
    """Step `step` of `total`, from its examples to the weights after it; its metrics, with the gradient's norm and the
    learning rate."""
    if config.lora_dropout:  # what is dropped follows from seed and step, so that a resumed run drops the same
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + parallel.rank())
    with parallel.watching(f"in step {step}"):
        metrics = step_gradients(model, examples, reference, objective, config)
        grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)).item()
    check_finite("gradient", grad_norm, [e.where for e in examples] if parallel.is_main() else [])
    if step == 1:
        check_first_step(metrics, grad_norm, config)
    lr = learning_rate(step - 1, total, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**metrics, "lr": lr, "grad_norm": grad_norm}


def check_first_step(metrics: dict[str, float], grad_norm: float, config: Config) -> None:
    """Before anything was learned: DPO's margin is 0 and its loss ln 2, and there is a gradient to follow."""
    if config.objective == "dpo" and config.stage != "qat":  # rounding moves the margin before anything is learned
        dpo.check_start(metrics, config.loss, config.beta, config.eps, tolerance=1e-3 if config.dtype == "fp32" else 0.5)
    if grad_norm == 0:
        raise InputError(
            "the first gradient is exactly 0: no parameter influences the loss; is the model frozen or all zeros?"
        )
