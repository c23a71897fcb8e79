"""The driver: `python train.py --stage dpo` reads rows, tunes a model, and says what became of it.

    python train.py --stage dpo                                              the embedded demo: minutes on a laptop
    python train.py --stage dpo --model DIR --train pairs.jsonl              your model, your pairs
    python train.py --stage sft --model microsoft/phi-2 --train sft.jsonl    supervised tuning first
    python train.py --stage dpo ... --dry-run                                look before you train
    python train.py --stage dpo --name NAME --resume                         go on after a kill
    python train.py --stage data --sources theoremqa,mmlu_stem=DIR           data sets from the report's sources
    python train.py --stage mcq --model DIR --train mcq-train.jsonl          multiple choice: explain, then the letter
    python train.py --stage quantize --model DIR --to nf4                    a quarter of the size
    python train.py --stage qat --to nf4 --model DIR --train sft.jsonl       tune the rounded weights
    python train.py --stage eval --model A B --data test.jsonl               models side by side, with intervals
    python train.py --stage eval --model DIR --precisions fp32,int8,nf4      what a number format costs and brings
    python train.py --stage sweep --grid beta=0.1,0.3 --grid eps=0,0.1       which setting is best, and which are alike
    python train.py --stage sweep --preset report                            the report's tables, figure and claims
    python train.py --stage chat --model DIR                                 talk to it

Every flag is a field of config.Config. There is one training loop (`train`); it knows nothing of losses, which sft.py and
dpo.py make from log-probabilities, and those know nothing of optimizers, devices or files.
"""

import contextlib
import copy
import json
import math
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import card
import chat
import dpo
import ranking
import report
import sft
import sweep
from build import build_data, open_teacher
from checkpoint import load_optimizer, open_run, prune, publish, save_checkpoint, save_model, truncate_metrics
from checks import resolve
from config import LOWER_IS_BETTER, Config, default_name, parse, resume_command
from convert import quantize_checkpoint
from data import Example, collate, epoch_order
from eval import evaluate_models, gather
from files import InputError, read_json, write_json
from inputs import Inputs, load_chat, load_inputs, reference_tables, trained_system_prompt
from model import Phi, completion_logprobs
from passes import all_logprobs, autocast, completion_lengths, evaluate, flips, sample_answers
from preferences import training_summary
from quant import SKIP, FrozenLinear, compile_missing, linear_layers, round_to, train_quantized
from replicate import replicate
from texts import answer_summary
from weights import resolve as resolve_model

# ------------------------------------------------------------------------------------------------------------- a step


def make_objective(config: Config) -> Callable:
    """(log-probabilities [N], lengths [N], reference [N] or None) -> (summed loss, {name: [sum, count]})."""
    if config.objective == "sft":
        return lambda logprobs, lengths, reference: sft.objective(logprobs, lengths)
    return lambda logprobs, lengths, reference: dpo.objective(
        logprobs, reference, lengths, config.loss, config.beta, config.eps, config.nll_weight
    )


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up to `lr`, then a cosine or linear decay that would reach 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * (0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress)


def make_optimizer(model: Phi, config: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); decay on the matrices only, not on biases and LayerNorms."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)


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


# ---------------------------------------------------------------------------------------------------------- the stages


def settle(config: Config, given: set[str]) -> Config:
    """The settings of a run: the flags and, for the rest, the recipe; with --resume those that the run was started with."""
    if not config.resume:
        return resolve(config, given)
    if config.overwrite or config.dry_run:
        raise InputError("--resume continues a run: it goes with neither --overwrite nor --dry-run")
    run = Path(config.out) / (config.name or default_name(config))
    if not (run / "run.json").exists():
        raise InputError(f"{run}: there is no run to resume; leave out --resume, or give its --name")
    stored = Config(**read_json(run / "run.json")["config"])
    for name in sorted(given - {"resume", "out", "device"}):
        old, new = getattr(stored, name), getattr(config, name)
        if old != new:
            raise InputError(
                f"{run} was started with {name} = {old}, now --{name.replace('_', '-')} {new}: a resumed run keeps "
                "its settings. Leave the flag out, or start another run with another --name."
            )
    return replace(stored, resume=True, overwrite=False, out=config.out, device=config.device or stored.device)


def demo_sft(config: Config) -> Path | None:
    """The demo's SFT model, which its other stages start from; trained now if it is not there (None in a dry run)."""
    name = f"demo-sft-seed{config.seed}"
    path = Path(config.out) / name
    if (path / "results.json").exists():
        print(f"Starting from the demo's SFT model in {path}.")
        return path
    if config.dry_run:
        print("There is no SFT model for the demo yet: a real run makes it first.")
        return None
    begun = (path / "run.json").exists()
    print(f"There is no SFT model for the demo yet: {'resuming' if begun else 'running'} --stage sft first, in {path}.")
    given = {"stage", "name", "out", "seed", "device"}
    stage = Config(stage="sft", name=name, out=config.out, seed=config.seed, device=config.device, resume=begun)
    if run_stage(settle(stage, given)):
        raise InputError("the SFT stage was stopped; run the same command again to continue it")
    return path


def find_parent(config: Config) -> Path | None:
    """Directory of the model to start from; None for the demo's random tiny Phi, which is made where it is needed."""
    if config.model != "demo":
        return resolve_model(config.model, config.revision)
    return None if config.stage == "sft" else demo_sft(config)


def run_stage(config: Config) -> int:
    """Runs one stage from its inputs to its report; returns the exit status."""
    if config.stage == "data":
        build_data(config)
        return 0
    if config.stage == "quantize":
        return quantize_stage(config)
    if config.stage == "eval":
        return eval_stage(config)
    if config.stage == "chat":
        return chat_stage(config)
    run = Path(config.out) / config.name
    if config.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            inputs = load_inputs(config, Path(scratch), find_parent(config))
            report.dry_run(config, inputs, make_objective(config), step_gradients)
        return 0
    if (run / "results.json").exists() and config.resume:
        print(f"{run} is finished; nothing to resume.")
        return 0
    parent = find_parent(config)
    start = begin_run(config)
    inputs = load_inputs(config, run, parent)
    write_json(run / "ledger.json", {name: asdict(ledger) for name, ledger in inputs.ledgers.items()})
    print(report.describe_inputs(inputs))

    model = Phi.from_pretrained(inputs.parent, device=config.device)
    if any(isinstance(layer, FrozenLinear) for layer in model.modules()):
        raise InputError(f"{inputs.parent} is quantized, and codes cannot be tuned; start from the model it was made of")
    tables = reference_tables(config, model, inputs) if config.objective == "dpo" else (None, None)
    stopped, state = train(config, run, model, inputs, tables, start)
    if stopped:
        print(f"Stopped by {signal.Signals(stopped).name} and saved. To go on:\n  {resume_command(config)}")
        return 128 + stopped
    publish(run, state["best_step"])
    del model

    measured = {"before": measure(config, inputs.parent, inputs, tables[1])}
    if config.stage == "qat":
        round_published(config, run, inputs)
        measured["rounded"] = measure(config, inputs.parent, inputs, tables[1], rounded=True)
    measured["after"] = measure(config, run, inputs, tables[1])
    results = {**measured, **state, "parent": str(inputs.parent)}
    report.training_figure(run, config)
    write_json(run / "results.json", results)
    print(report.summary(config, run, inputs, results))
    return 0


def begin_run(config: Config) -> int:
    """Makes the run's directory and writes run.json; returns the step to go on from."""
    run = Path(config.out) / config.name
    start = open_run(run, config.overwrite, config.resume)
    if not config.resume:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(run / "run.json", {"config": asdict(config), "versions": versions})
    return start


@torch.no_grad()
def round_published(config: Config, run: Path, inputs: Inputs) -> None:
    """Rounds the weights of a finished QAT run to its format, so that quantizing them later changes nothing any more."""
    model = Phi.from_pretrained(run)
    round_model(model, config)
    save_model(run, model, inputs.chat)


def round_model(model: Phi, config: Config) -> None:
    for _, layer in linear_layers(model, SKIP):
        layer.weight.data = round_to(layer.weight.data, config.to, config.block)


def measure(config: Config, directory: Path, inputs: Inputs, reference: Tensor | None, rounded: bool = False) -> dict:
    """What the final table says of one model: metrics on the evaluation side, and answers sampled to its first prompts.
    `rounded`: with its weights rounded to the format of `--to` first."""
    model = Phi.from_pretrained(directory, device=config.device)
    if rounded:
        round_model(model, config)
    policy = all_logprobs(model, inputs.eval, config.micro_batch_size, config.device, config.dtype, "evaluating")
    if config.objective == "dpo":
        lengths = completion_lengths(inputs.eval).view(-1, 2)
        metrics = training_summary(policy, reference, lengths, flips(inputs.eval), config.eps)
    else:
        metrics = {"loss per token": -policy.sum().item() / completion_lengths(inputs.eval).sum().item()}
    answers = []
    if config.samples:
        asked = inputs.eval[: config.samples]
        room = config.max_length - config.max_prompt_length
        answers, ended = sample_answers(model, inputs.chat, asked, min(room, 256), 1.0, config.seed)
        metrics |= answer_summary(answers, ended, asked, inputs.chat)
    return {"metrics": metrics, "answers": answers}


def compiles(config: Config) -> bool:
    """Whether --compile was asked for and works here; if it does not, one line says so."""
    missing = compile_missing() if config.compile else None
    if missing:
        print(missing)
    return config.compile and not missing


def quantize_stage(config: Config) -> int:
    """--stage quantize: a checkpoint in, a quantized one out."""
    source, run = find_parent(config), Path(config.out) / config.name
    begin_run(config)
    options = {"threshold": config.threshold} if config.to == "int8" else {"block": config.block, "double": config.double}
    if config.to != "int8":
        options["compiled"] = compiles(config)
    skip = () if config.output_layer else SKIP
    done = quantize_checkpoint(source, run, config.to, skip, config.device, **options)
    write_json(run / "results.json", {**done, "parent": str(source)})
    print(report.quantized_summary(config, run, done))
    return 0


def eval_stage(config: Config) -> int:
    """--stage eval: models side by side, or with --precisions the same model in several number formats."""
    if config.precisions:
        source = find_parent(config)
        begin_run(config)
        card.report_card(config, source, Path(config.out) / config.name, compiles(config))
        return 0
    contest = gather(config, lambda name: find_parent(replace(config, model=name)))
    teacher, journal = open_teacher(config)
    begin_run(config)
    return evaluate_models(config, contest, teacher, journal)


def chat_stage(config: Config) -> int:
    """--stage chat: a conversation in the terminal, or one answer to --prompt."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers alone
        source = find_parent(config)
    chatml = load_chat(source, trained_system_prompt(source) if config.system_prompt is None else config.system_prompt)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    model = Phi.from_pretrained(source, dtype=dtype, device=config.device)
    settings = chat.Settings(None, config.temperature, config.top_p, config.max_new_tokens, config.seed)
    if config.prompt is None:
        return chat.converse(model, chatml, settings, sys.stdin, sys.stdout)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    return chat.answer_once(model, chatml, settings, prompt, sys.stdout)


def sweep_stage(raw: Config, given: set[str]) -> int:
    """--stage sweep: plan, run, rank."""
    grid = sweep.parse_grid(raw.grid or [])
    raw = replace(raw, train=raw.train or grid.get("train", [None])[0])
    resolve(raw, given)  # checks every flag before anything is done
    directory = Path(raw.out) / (raw.name or default_name(raw))
    if raw.overwrite and directory.exists():
        open_run(directory, overwrite=True, resume=False)
    if raw.preset:
        write_json(directory / "run.json", {"config": asdict(raw)})
        return replicate(raw, given, find_parent, run_stage)
    with tempfile.TemporaryDirectory() as scratch:
        where = replace(raw, out=scratch) if raw.dry_run else raw
        base, runs, test = sweep.plan(where, given, grid, lambda config: find_parent(replace(config, out=raw.out)))
    if raw.dry_run:
        print(f"{len(runs)} runs: " + ", ".join(run.name for run in runs) + "\nNothing was trained.")
        return 0
    write_json(directory / "run.json", {"config": asdict(raw)})
    return sweep.run_all(runs, test, run_stage) or ranking.report_sweep(directory, runs, base)


def main(argv: list[str] | None = None) -> int:
    try:
        config, given = parse(argv)
        if config.stage == "sweep":
            return sweep_stage(config, given)
        return run_stage(settle(config, given))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: {str(error).splitlines()[0]}\nA smaller --micro-batch-size or --max-length, or "
            "--gradient-checkpointing, needs less; --dry-run estimates how much.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            "\nStopped between checkpoints; nothing half-written is left. --resume goes on from the last one.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
