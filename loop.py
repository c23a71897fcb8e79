"""The one training loop: batches in order, gradients in micro-batches, a step, and what is logged, measured and kept.

It knows nothing of losses, which sft.py and dpo.py make from log-probabilities; those know nothing of optimizers, devices or
files.
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
from tqdm import tqdm

import dpo
import sft
from checkpoint import load_optimizer, prune, save_checkpoint, truncate_metrics
from config import LOWER_IS_BETTER, Config
from data import Example, collate, epoch_order
from files import InputError
from inputs import Inputs
from model import Phi, completion_logprobs
from optimizer import learning_rate, make_optimizer
from passes import all_logprobs, autocast, evaluate
from quant import compile_missing, train_quantized

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


def live_reference(model: Phi, config: Config) -> Callable:
    """A frozen copy of the starting model, run on every batch: more memory and time, the same numbers."""
    frozen = copy.deepcopy(model)

    @torch.no_grad()
    def logprobs(batch) -> Tensor:
        with autocast(config.device, config.dtype):
            return completion_logprobs(frozen, batch)

    return logprobs


def step_gradients(
    model: Phi, examples: list[Example], reference: Tensor | Callable | None, objective: Callable, config: Config
) -> dict[str, float]:
    """Adds the gradient of one optimizer step's mean loss, in micro-batches; returns the step's metrics.

    The mean is over the whole step: of tokens in SFT, of pairs in DPO. Each micro-batch adds its *sum* divided by the
    step's total, so 1 x 8 and 8 x 1 examples give the same gradient. `reference`: this step's table [examples, 2], a live
    reference, or None. InputError names the rows of a micro-batch whose loss is not finite.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    units = sum(len(c) for e in examples for c in e.completions) if config.objective == "sft" else len(examples)
    sums: dict[str, Tensor] = {}
    for start in range(0, len(order), config.micro_batch_size):
        part = order[start : start + config.micro_batch_size]
        batch = collate([examples[i] for i in part]).to(config.device)
        with autocast(config.device, config.dtype):
            logprobs = completion_logprobs(model, batch)  # [N]
        if isinstance(reference, Tensor):
            expected = reference[part].flatten().to(config.device)  # [N]
        else:
            expected = reference(batch) if reference else None
        loss, metrics = objective(logprobs, batch.lengths, expected)
        check_finite("loss", loss.item(), [examples[i] for i in part])
        (loss / units).backward()
        sums = {name: value + sums.get(name, 0) for name, value in metrics.items()}
    return {name: (value[0] / value[1]).item() for name, value in sums.items()}


def check_finite(what: str, value: float, examples: list[Example]) -> None:
    if not math.isfinite(value):
        raise InputError(
            f"the {what} is {value}; nothing was updated. The batch held "
            + ", ".join(e.where for e in examples)
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
    """One line of metrics.jsonl, and the same numbers for TensorBoard."""
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


def train(
    config: Config, run: Path, model: Phi, inputs: Inputs, tables: tuple[Tensor | None, Tensor | None], start: int
) -> tuple[int | None, dict]:
    """The training loop: runs the steps after `start` and returns (the signal that stopped it or None, its counters).

    `model` holds the weights of `inputs.parent`; `tables` the reference's log-probabilities for training and evaluation.
    """
    from torch.utils.tensorboard import SummaryWriter

    reference, eval_reference = tables
    if config.reference == "live" and config.objective == "dpo":
        reference = live_reference(model, config)
    if config.stage == "qat":
        train_quantized(model, config.to, config.block, compiles(config))
    objective = make_objective(config)
    model.gradient_checkpointing, model.attention = config.gradient_checkpointing, config.attention
    state = {"best_step": None, "best_value": None, "evaluations_since_best": 0}
    if start:
        checkpoint = run / "checkpoints" / f"step-{start}"
        trained = Phi.from_pretrained(checkpoint, device=config.device)
        model.load_state_dict(trained.state_dict(), assign=True)
    optimizer = make_optimizer(model, config)
    if start:
        state = load_optimizer(checkpoint, model, optimizer)
    truncate_metrics(run, start)
    board = SummaryWriter(str(run / "tb"), purge_step=start + 1)

    steps_per_epoch = math.ceil(len(inputs.train) / config.batch_size)
    total = config.max_steps or config.epochs * steps_per_epoch
    began, tokens, order = time.perf_counter(), 0, []
    with (
        stop_signals() as stopped,
        tqdm(
            total=total, initial=start, desc=config.stage, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10
        ) as bar,
    ):
        for step in range(start + 1, total + 1):
            epoch, position = divmod(step - 1, steps_per_epoch)
            if position == 0 or not order:
                order = epoch_order(inputs.train, config.batch_size, config.seed, epoch)
            examples = [inputs.train[i] for i in order[position]]
            table = reference[order[position]] if isinstance(reference, Tensor) else reference

            metrics = step_gradients(model, examples, table, objective, config)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
            check_finite("gradient", grad_norm, examples)
            if step == 1:
                check_first_step(metrics, grad_norm, config)
            lr = learning_rate(step - 1, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            tokens += sum(map(len, examples))
            speed = tokens / (time.perf_counter() - began)
            log(run, board, {"step": step, **metrics, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed})
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
            stop = stopped[0] if stopped else None
            if save or stop:
                save_checkpoint(run, step, model, inputs.chat, optimizer, state)
                prune(run, config.keep, state["best_step"])
            if stop:
                return stop, state
            if config.patience and state["evaluations_since_best"] >= config.patience:
                tqdm.write(f"Stopping early: no better {config.metric} in {config.patience} evaluations.")
                break
    board.close()
    return None, state


def check_first_step(metrics: dict[str, float], grad_norm: float, config: Config) -> None:
    """Before anything was learned: DPO's margin is 0 and its loss ln 2, and there is a gradient to follow."""
    if config.objective == "dpo" and config.stage != "qat":  # rounding moves the margin before anything is learned
        dpo.check_start(metrics, config.loss, config.beta, config.eps, tolerance=1e-3 if config.dtype == "fp32" else 0.5)
    if grad_norm == 0:
        raise InputError(
            "the first gradient is exactly 0: no parameter influences the loss; is the model frozen or all zeros?"
        )
