"""The driver: `python train.py --stage dpo` reads rows, tunes a model, and says what became of it.

    python train.py --stage dpo                                              the embedded demo: minutes on a laptop
    python train.py --stage dpo --model DIR --train pairs.jsonl              your model, your pairs
    python train.py --stage sft --model microsoft/phi-2 --train sft.jsonl    supervised tuning first
    python train.py --stage dpo ... --dry-run                                look before you train
    python train.py --stage dpo --name NAME --resume                         go on after a kill
    python train.py --stage data --sources theoremqa,mmlu_stem=DIR           data sets from the report's sources
    python train.py --stage mcq --model DIR --train mcq-train.jsonl          multiple choice: explain, then the letter
    python train.py --stage quantize --model DIR --to nf4                    a quarter of the size
    python train.py --stage dpo --lora 16 --base nf4 ...                     QLoRA: adapters on a 4-bit model
    python train.py --stage merge --model DIR                                adapters and their base as one plain model
    python train.py --stage qat --to nf4 --model DIR --train sft.jsonl       tune the rounded weights
    python train.py --stage eval --model A B --data test.jsonl               models side by side, with intervals
    python train.py --stage eval --model DIR --precisions fp32,int8,nf4      what a number format costs and brings
    python train.py --stage sweep --grid beta=0.1,0.3 --grid eps=0,0.1       which setting is best, and which are alike
    python train.py --stage sweep --preset report                            the report's tables, figure and claims
    python train.py --stage chat --model DIR                                 talk to it

Every flag is a field of config.Config. The one training loop is in loop.py.
"""

import contextlib
import copy
import gc
import platform
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import chat
from convert import quantize_checkpoint
from data import Example, Ledger
from eval import evaluate_models, gather
from experiments import precisions as card
from experiments import ranking, sweep
from experiments.paper import replicate
from inputs import (
    Inputs,
    encode_for,
    load_chat,
    load_inputs,
    load_model,
    load_to_tune,
    reference_tables,
    refuse_adapters,
    rows_to_measure,
    trained_system_prompt,
    training_run,
)
from loop import compiles, make_objective, step_gradients, train
from lora import merge_lora
from metrics.preferences import training_summary
from metrics.text import answer_summary
from model import Phi, read_config, stored_dtype
from passes import all_logprobs, completion_lengths, divergence, flips, sample_answers
from prepare.build import build_data, open_teacher
from quant import SKIP, linear_layers, round_to
from runtime import fits, parallel, report
from runtime.checks import resolve, with_preset
from runtime.files import InputError, read_json, write_json
from runtime.runs import open_run, publish, save_model
from runtime.settings import TRAINING, Config, default_name, parse, resume_command
from runtime.weights import is_adapter
from runtime.weights import resolve as resolve_model

# ---------------------------------------------------------------------------------------------------------- the stages


def settle(config: Config, given: set[str]) -> Config:
    """The settings of a run: the flags and, for the rest, the recipe; with --resume those that the run was started with."""
    if not config.resume:
        return resolve(config, given)
    config = with_preset(config, given)
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
    finished, begun = parallel.gather([(path / file).exists() for file in ("results.json", "run.json")])[0]
    if finished:
        print(f"Starting from the demo's SFT model in {path}.")
        return path
    if config.dry_run:
        print("There is no SFT model for the demo yet: a real run makes it first.")
        return None
    print(f"There is no SFT model for the demo yet: {'resuming' if begun else 'running'} --stage sft first, in {path}.")
    given = {"stage", "name", "out", "seed", "device"}
    stage = Config(stage="sft", name=name, out=config.out, seed=config.seed, device=config.device, resume=begun)
    if run_stage(settle(stage, given)):
        raise InputError("the SFT stage was stopped; run the same command again to continue it")
    return path


def find_parent(config: Config) -> Path | None:
    """Directory of the model to start from; None for the demo's random tiny Phi, which is made where it is needed."""
    if config.model != "demo":
        with parallel.main_first():
            return resolve_model(config.model, config.revision)
    return None if config.stage == "sft" else demo_sft(config)


def run_stage(config: Config) -> int:
    """Runs one stage from its inputs to its report; returns the exit status."""
    if config.stage == "data":
        build_data(config)
        return 0
    if config.stage == "quantize":
        return quantize_stage(config)
    if config.stage == "merge":
        return merge_stage(config)
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
    if config.resume and parallel.gather((run / "results.json").exists())[0]:
        print(f"{run} is finished; nothing to resume.")
        return 0
    parent = find_parent(config)
    start = begin_run(config)
    with parallel.main_first():  # it makes the demo's rows and its random tiny Phi
        inputs = load_inputs(config, run, parent)
    if parallel.is_main():
        write_json(run / "ledger.json", {name: asdict(ledger) for name, ledger in inputs.ledgers.items()})
    print(report.describe_inputs(inputs))

    need, peak = fits.check_fits(inputs.parent, config, inputs.train), fits.watch_peak(config.device)
    model = load_to_tune(inputs.parent, config)
    if config.objective == "dpo":
        print(report.describe_reference(config, inputs.parent, model))
    tables = reference_tables(config, model, inputs) if config.objective == "dpo" else (None, None)
    stopped, state = train(config, run, model, inputs, tables, start)
    used_most = peak()
    if stopped:
        print(f"Stopped by {signal.Signals(stopped).name} and saved. To go on:\n  {resume_command(config)}")
        return 128 + stopped
    with parallel.main_first():
        if parallel.is_main():
            publish(run, state["best_step"])
    del model
    gc.collect()  # a sharded model holds on to itself

    measured = {"before": measure(config, inputs.parent, inputs, tables[1])}
    if config.stage == "qat":
        round_published(config, run)
        measured["rounded"] = measure(config, inputs.parent, inputs, tables[1], rounded=True)
    measured["after"] = measure(config, run, inputs, tables[1])
    used = {"estimated": need.total, "measured": used_most}
    results = {**measured, **state, "parent": str(inputs.parent), "memory": used}
    if parallel.is_main():
        report.training_figure(run, config)
        write_json(run / "results.json", results)
    print(report.summary(config, run, inputs, results))
    return 0


def begin_run(config: Config) -> int:
    """Makes the run's directory and writes run.json, on the main rank; returns the step to go on from."""
    run, start = Path(config.out) / config.name, None
    if parallel.is_main():
        start = open_run(run, config.overwrite, config.resume)
        if not config.resume:
            device = config.device if parallel.size() == 1 else torch.device(config.device).type  # each rank has its own
            versions = {"python": platform.python_version(), "torch": torch.__version__, "ranks": parallel.size()}
            write_json(run / "run.json", {"config": asdict(replace(config, device=device)), "versions": versions})
    return parallel.gather(start)[0]


@torch.no_grad()
def round_published(config: Config, run: Path) -> None:
    """Rounds the weights of a finished QAT run to its format, so that quantizing them later changes nothing any more."""
    with parallel.main_first():
        if parallel.is_main():
            model = Phi.from_pretrained(run)
            round_model(model, config)
            model.save_pretrained(run)


def round_model(model: Phi, config: Config) -> None:
    for _, layer in linear_layers(model, SKIP):
        layer.weight.data = round_to(layer.weight.data, config.to, config.block)


def measure(config: Config, directory: Path, inputs: Inputs, reference: Tensor | None, rounded: bool = False) -> dict:
    """What the final table says of one model: metrics on the evaluation side, and answers sampled to its first prompts.
    `rounded`: with its weights rounded to the format of `--to` first."""
    model = load_model(directory, config)
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


def quantize_stage(config: Config) -> int:
    """--stage quantize: a checkpoint in, a quantized one out."""
    source, run = find_parent(config), Path(config.out) / config.name
    refuse_adapters(source)
    begin_run(config)
    options = {"threshold": config.threshold} if config.to == "int8" else {"block": config.block, "double": config.double}
    if config.to != "int8":
        options["compiled"] = compiles(config)
    skip = () if config.output_layer else SKIP
    done = quantize_checkpoint(source, run, config.to, skip, config.device, **options)
    write_json(run / "results.json", {**done, "parent": str(source)})
    print(report.quantized_summary(config, run, done))
    return 0


def merge_stage(config: Config) -> int:
    """--stage merge: adapters and their base in, one plain model out, and how far its outputs moved."""
    source, run = find_parent(config), Path(config.out) / config.name
    if not is_adapter(source):
        raise InputError(f"{source} holds no adapters; there is nothing to merge")
    examples = rows_for_merge(config, source)
    begin_run(config)
    bf16 = stored_dtype(read_config(source)) == "bfloat16"
    model = Phi.from_pretrained(source, torch.bfloat16 if bf16 else torch.float32, config.device)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    change = divergence(model, merged, examples, 8, config.device) if examples else None
    save_model(run, merged, load_chat(source, None))
    write_json(run / "results.json", {"parent": str(source), "change": change})
    print(report.merge_summary(run, source, change, len(examples)))
    return 0


def rows_for_merge(config: Config, source: Path, most: int = 100) -> list[Example]:
    """Rows to see the change of outputs on: --data, or what the run of the adapters held out; none if there is neither."""
    if config.data is None and training_run(source) is None:
        return []
    rows, _, _ = rows_to_measure(config, source, Ledger())
    return encode_for(source, rows[:most], None)[1]


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
    with contextlib.ExitStack() as stack:
        if not parallel.is_main():  # all ranks find the same numbers; those of the others are thrown away
            config = replace(config, out=stack.enter_context(tempfile.TemporaryDirectory()))
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


def check_ranks(config: Config) -> None:
    """InputError if several ranks would do, each for itself, what is to be done once."""
    alone = config.dry_run or config.teacher or config.precisions or config.stage not in (*TRAINING, "eval")
    if parallel.size() > 1 and alone:
        what = "--dry-run" if config.dry_run else f"--stage {config.stage}"
        if config.stage == "eval":
            what += " with --teacher or --precisions"
        raise InputError(f"{what} is for one process: start it with python instead of torchrun")


def main(argv: list[str] | None = None) -> int:
    try:
        with parallel.job():
            config, given = parse(argv)
            check_ranks(config)
            if config.stage == "sweep":
                return sweep_stage(config, given)
            config = settle(config, given)
            return run_stage(replace(config, device=parallel.own_device(config.device)))
    except (InputError, OSError) as error:
        if parallel.first_to_report():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        if parallel.first_to_report():
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
