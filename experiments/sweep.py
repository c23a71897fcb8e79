"""--stage sweep: DPO runs that differ in one flag, on the same data, ranked on one test set that none of them saw.

    python train.py --stage sweep --grid lr=1e-4,2e-4,6e-4 --grid eps=0,0.1,0.2 --seeds 3

    out/<name>/  data/       training, evaluation and test rows, the same for all runs
                 reference/  log-probabilities of the starting model, computed once for all runs that share it
                 RUN/        a run as --stage dpo leaves it, without its checkpoints, and its tested.json
                 RUN.log     what the run printed
                 sweep.md figures/curves.png      the table and the curves of all runs

Evaluation rows choose a run's best checkpoint and pick a setting; test rows judge it (ranking.py). A finished run is skipped
when the command is given again; if one fails, the others go on.
"""

import contextlib
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

import dpo
import train
from data import ChatML, Example, Ledger, Row, check_no_leak, encode, lengths_of, split_by_question, write_truth
from experiments import ranking
from experiments.ranking import ACCURACY, QUARTERS, Run, point_name
from metrics.preferences import flips, for_the_right
from model import Phi, all_logprobs
from prepare.rows import read_rows
from runtime import runs as runs_on_disk
from runtime.files import InputError, first_line, json_object, numbered_lines, read_json, write_json, write_jsonl
from runtime.flags import Command, check_limits, check_loss, flag_name, parser_of
from runtime.runs import read_metrics
from runtime.settings import LOSSES, Dpo, Sweep
from runtime.weights import fingerprint, resolve

# With other rows, or the same rows cut differently, runs could not be compared pair by pair. To compare two models, use
# --stage eval.
NOT_VARIED = (
    "model name out resume overwrite dry_run device seed eval eval_share on_bad_row system_prompt max_length "
    "max_prompt_length dtype base preset"
).split()


def run(settings: Sweep) -> int:
    """Plans, makes and ranks the runs; returns the exit status."""
    grid = parse_grid(settings.grid)
    if settings.train is None:  # the flags see to it that the grid has some
        settings = replace(settings, train=grid["train"][0])
    if settings.dry_run:
        with tempfile.TemporaryDirectory() as directory:
            dry_run(plan(settings, grid, Path(directory)))
        return 0
    with open_sweep(settings) as directory:
        planned = plan(settings, grid, directory)
        status, failed = run_all(planned)
        return status or ranking.report_sweep(directory, planned, single(settings), failed)


@contextlib.contextmanager
def open_sweep(settings: Sweep) -> Iterator[Path]:
    """The sweep's directory: a new one, or the one of an earlier call, which goes on."""
    directory = Path(settings.out) / settings.name
    goes_on = (directory / "run.json").exists() and not settings.overwrite
    if goes_on and (found := runs_on_disk.recorded(directory, "stage")) != "sweep":
        raise InputError(f"{directory} holds a run of --stage {found}, not a sweep; give this one another --name")
    with runs_on_disk.open_run(replace(settings, resume=goes_on)):
        yield directory


# ------------------------------------------------------------------------------------------------------------- the plan


def parse_grid(texts: list[str]) -> dict[str, list]:
    """["beta=0.1,0.3", "train=a.jsonl"] -> {"beta": [0.1, 0.3], "train": ["a.jsonl"]}, in the flags' own types."""
    defaults = {f.name: f.default for f in fields(Dpo) if f.name not in NOT_VARIED}
    parser = parser_of("dpo")
    grid = {}
    for text in texts:
        flag, _, values = text.partition("=")
        name = flag.strip().lstrip("-").replace("-", "_")
        if name not in defaults:
            raise InputError(f"--grid {text}: {flag!r} is no flag of --stage dpo that can be varied")
        words = [word.strip() for word in values.split(",") if word.strip()]
        parsed = [getattr(parser.parse_args([f"{flag_name(name)}={word}"]), name) for word in words]
        if not parsed or name in grid or len(set(parsed)) < len(parsed):
            raise InputError(f"--grid {text}: give each flag once, with different values: --grid beta=0.1,0.3")
        grid[name] = parsed
    return grid


def make_points(grid: dict[str, list], base: Dpo) -> list[dict]:
    """The settings to try, as {flag: value} where they differ from `base`: the defaults first, then one flag at a time."""
    return [{}, *({name: value} for name, values in grid.items() for value in values if value != getattr(base, name))]


def single(settings: Sweep) -> Dpo:
    """The settings that all runs share."""
    return Dpo(**{f.name: getattr(settings, f.name) for f in fields(Dpo)})


def plan(settings: Sweep, grid: dict[str, list], directory: Path) -> list[Run]:
    """The runs. Splits the rows once for all of them and writes them to the sweep's `directory`. InputError if settings make
    no sense together."""
    base = single(settings)
    configured = []
    for point in make_points(grid, base):  # all are checked before any runs
        one = replace(base, **point)
        if "loss" in point:  # it has an eps where it takes one
            one.eps = (base.eps or 0.1) if LOSSES[one.loss] else None
        check_limits(one)
        check_loss(one)
        configured.append((point, one))
    files = {one.train for _, one in configured}
    if len({Path(file).stem for file in files}) < len(files):
        raise InputError("--grid train=...: two files have the same name; rename one")
    if len(grid.get("train", [])) > 1 and settings.data is None:
        raise InputError("--grid train=... compares data sets on a test set of its own: give it with --data FILE.jsonl")
    parent = str(resolve(settings.model, settings.revision))
    sides = {file: split_rows(settings, file, directory / "data") for file in files}
    planned = []
    for point, one in configured:
        one = replace(one, **sides[one.train], model=parent, revision=None, out=str(directory), overwrite=False)
        for seed in range(settings.seed, settings.seed + settings.seeds):
            name = point_name(point) + (f",seed={seed}" if settings.seeds > 1 else "")
            planned.append(Run(name, point, replace(one, seed=seed, name=name)))
    return planned


def write_rows(path: Path, rows: list[Row]) -> str:
    """Writes a file of the sweep. InputError if it holds other rows already: runs on those compare with no new one."""
    lines = [row.raw for row in rows]
    if path.exists() and [json_object(line) for _, line in numbered_lines(path)] != lines:
        raise InputError(f"{path} holds other rows than this call gives. Give this sweep another --name, or --overwrite it.")
    write_truth(path, rows)
    write_jsonl(path, lines)
    return str(path)


def read_pairs(path: str | Path, settings: Dpo) -> list[Row]:
    return read_rows(path, "pairs", settings.on_bad_row, Ledger())


def split_rows(settings: Sweep, file: str, data: Path) -> dict[str, str]:
    """Writes the training and evaluation rows of one --train file and the test rows, those of --data or a share of the
    file's questions that is set aside. No question is on two sides. Returns {"train": path, "eval": path}."""
    rows = read_pairs(file, settings)
    if settings.data:
        tested = read_pairs(settings.data, settings)
    else:
        rows, tested = split_by_question(rows, settings.eval_share, settings.seed)
    if not tested:
        raise InputError(f"{file}: no question is left to test on; give more rows, or test rows with --data")
    if settings.eval:
        evaluation = read_pairs(settings.eval, settings)
    else:
        rows, evaluation = split_by_question(rows, settings.eval_share, settings.seed + 1)
    check_no_leak([*rows, *evaluation], tested)
    write_rows(data / "test.jsonl", tested)  # the same for every file
    sides = {"train": rows, "eval": evaluation}
    return {side: write_rows(data / f"{Path(file).stem}-{side}.jsonl", part) for side, part in sides.items()}


# ------------------------------------------------------------------------------------------------------------ the runs


def run_all(planned: list[Run]) -> tuple[int, dict[str, str]]:
    """Makes and measures every run that is not finished. Returns the status of the signal that stopped a run, or 0, and
    {run: error} of the runs that failed. InputError if an earlier call made one with other settings."""
    every = {f.name: "flag" for f in fields(Dpo)}
    for run in planned:
        if (run.directory / "run.json").exists():
            runs_on_disk.resumed_settings(Command(run.settings, every))
    failed = {}
    for number, run in enumerate(planned, start=1):
        label = f"[{number}/{len(planned)}] {run.name}"
        if not run.tested.exists():
            print(f"{label} ...", flush=True)
            try:
                status = run_one(run)
            except Exception as error:  # whatever ends one run, the others go on
                failed[run.name] = f"{type(error).__name__}: {first_line(error)}"
                print(f"{label}: FAILED, {failed[run.name]}", flush=True)
                continue
            if status:
                print("Stopped and saved; the same command goes on.")
                return status, failed
        shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)  # the best one is the run's model
        print(f"{label}: reward accuracy {100 * read_json(run.tested)['accuracy']:.1f}%", flush=True)
    return 0, failed


def dry_run(planned: list[Run]) -> None:
    """Prints what the runs would take, by a timed step of each setting, and their sum."""
    print("Time, without the answers that are sampled")
    seeds = len({run.settings.seed for run in planned})
    spent, once = 0.0, {}
    for run in planned[::seeds]:  # one of each setting
        settings, parent = run.settings, Path(run.settings.model)
        chat = runs_on_disk.load_chat(parent, settings.system_prompt or "")
        took = train.time_a_step(settings, parent, train.load_inputs(settings, chat))
        testing = took.token * sum(map(len, read_test(run, chat)))
        seconds = took.training + took.evaluating + testing
        spent += seeds * seconds
        once[settings.train] = took.reference + testing  # of the starting model: shared by the runs on the same rows
        print(f"  {point_name(run.point)}: {seeds} x {seconds / 60:,.1f} minutes, {took.step:.2f} s for the first step")
    spent += sum(once.values())
    print(f"{len(planned)} runs and their references: {spent / 60:,.1f} minutes ({spent / 3600:,.2f} hours)")
    print("Nothing was trained.")


def read_test(run: Run, chat: ChatML) -> list[Example]:
    """The test pairs as the model reads them. InputError if none fits."""
    settings = run.settings
    examples = encode(read_pairs(run.test, settings), chat, settings.max_length, settings.max_prompt_length, Ledger())
    if not examples:
        raise InputError(f"{run.test}: no row fits into --max-length {settings.max_length}")
    return examples


def run_one(run: Run) -> int:
    """Trains (or resumes) and measures one run; what it prints goes to RUN.log."""
    begun = (run.directory / "run.json").exists()
    with open(run.directory.with_name(f"{run.name}.log"), "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            status = train.run(replace(run.settings, resume=begun))
            if not status:
                write_json(run.tested, measure_on_test(run))
            return status
        except Exception:
            traceback.print_exc(file=log)
            raise


def measure_on_test(run: Run) -> dict:
    """For each test pair the margin in nats, and what the starting model and the lengths say of it, all positive where they
    speak for the answer labelled "chosen"; whether its label is flipped (None if that is not known); the run's own loss; and
    its reward accuracy on the evaluation rows, as labelled. For a run with `quarters`, which pairs it orders correctly after
    each quarter of the training, [4][E]."""
    settings = run.settings
    examples = read_test(run, runs_on_disk.load_chat(run.directory, settings.system_prompt or ""))
    parent = train.load_model(Path(settings.model), settings)
    reference = train.reference_table(settings, parent, fingerprint(parent), examples, "test")  # [E, 2]
    del parent  # one model in memory

    def margins(directory: Path) -> Tensor:  # [E]
        model = Phi.from_pretrained(directory, device=settings.device)
        policy = all_logprobs(model, examples, settings.micro_batch_size, settings.device, settings.dtype, "testing")
        return dpo.margin(policy, reference)

    margin, flipped, lengths = margins(run.directory), flips(examples), lengths_of(examples)  # [E], [E], [E, 2]
    if not margin.isfinite().all():
        raise InputError("the model's log-probabilities of the test pairs are not finite")
    loss = dpo.preference_loss(settings.beta * margin, settings.loss, settings.beta, settings.eps)  # [E]
    evaluated = {row["step"]: row[ACCURACY] for row in read_metrics(run.directory) if ACCURACY in row}
    record = {
        "accuracy": (margin > 0).double().mean().item(),
        "own loss": loss.double().mean().item(),
        "validation": evaluated[read_json(run.directory / "results.json")["best_step"]],
        "margin": margin.tolist(),
        "reference": (reference[:, 0] - reference[:, 1]).tolist(),
        "longer": (lengths[:, 0] - lengths[:, 1]).sign().tolist(),
        "flipped": None if flipped is None else flipped.tolist(),
    }
    if run.quarters:
        record["quarters"] = []
        saved = runs_on_disk.steps_saved(run.directory)
        for quarter in QUARTERS:
            step = min(saved, key=lambda step: abs(step / saved[-1] - quarter))
            score = for_the_right(margins(runs_on_disk.checkpoint_directory(run.directory, step)), flipped)
            record["quarters"].append((score > 0).tolist())
    return record
