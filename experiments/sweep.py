"""--stage sweep: DPO runs that differ in one flag, on the same data, ranked on one test set that none of them saw.

    python train.py --stage sweep --grid lr=1e-4,2e-4,6e-4 --grid eps=0,0.1,0.2 --seeds 3

    out/<name>/  data/       training, evaluation and test rows, the same for all runs
                 reference/  log-probabilities of the starting model, computed once for all runs that share it
                 RUN/        a run as --stage dpo leaves it, without its checkpoints; test.json, margins.safetensors, log.txt
                 sweep.json sweep.md figures/curves.png      the table and the curves of all runs

Evaluation rows choose a run's best checkpoint; test rows rank the runs (ranking.py). A finished run is skipped
when the command is given again; one that failed is recorded, and the others go on.
"""

import contextlib
import io
import shutil
import tempfile
import time
import traceback
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import dpo
import train
from data import Example, Ledger, Row, check_no_leak, encode, lengths_of, split_by_question, write_truth
from experiments import ranking
from experiments.ranking import Run, point_name
from metrics.preferences import flips, for_the_right
from model import Phi, all_logprobs
from prepare.rows import read_rows
from runtime import runs as runs_on_disk
from runtime.files import InputError, first_line, json_object, numbered_lines, read_json, whole_file, write_json, write_jsonl
from runtime.flags import check_limits, flag_name, parser_of
from runtime.settings import Dpo, Sweep
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
        with tempfile.TemporaryDirectory() as scratch:
            planned = plan(settings, grid, Path(scratch))
        print(f"{len(planned)} runs: " + ", ".join(run.name for run in planned) + "\nNothing was trained.")
        return 0
    directory = open_sweep(settings)
    planned = plan(settings, grid, directory)
    return run_all(planned) or ranking.report_sweep(directory, planned, single(settings))


def open_sweep(settings: Sweep) -> Path:
    """The sweep's directory: a new one, or the one of an earlier call, which goes on."""
    directory = Path(settings.out) / settings.name
    if (directory / "run.json").exists() and not settings.overwrite:
        found = runs_on_disk.stage_of(directory)
        if found != "sweep":
            raise InputError(f"{directory} holds a run of --stage {found}, not a sweep; give this one another --name")
        return directory
    runs_on_disk.open_run(settings)
    return directory


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
        if isinstance(defaults[name], bool):
            raise InputError(f"--grid {text}: a flag without a value cannot be varied; make two sweeps")
        words = [word.strip() for word in values.split(",") if word.strip()]
        parsed = [getattr(parser.parse_args([f"{flag_name(name)}={word}"]), name) for word in words]
        if not parsed or name in grid or len(set(parsed)) < len(parsed):
            raise InputError(f"--grid {text}: give each flag once, with different values: --grid beta=0.1,0.3")
        grid[name] = parsed
    return grid


def make_points(grid: dict[str, list], base: Dpo, full: bool) -> list[dict]:
    """The settings to try, as {flag: value} where they differ from `base`: the defaults first, then one flag at a time, or
    all combinations."""
    if full:
        combinations = [dict(zip(grid, values)) for values in product(*grid.values())]
    else:
        combinations = [{}, *({name: value} for name, values in grid.items() for value in values)]
    points = [{name: v for name, v in point.items() if v != getattr(base, name)} for point in combinations]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def single(settings: Sweep) -> Dpo:
    """The settings that all runs share."""
    return Dpo(**{f.name: getattr(settings, f.name) for f in fields(Dpo)})


def at_point(base: Dpo, point: dict) -> Dpo:
    """The settings of a run at one point. A loss that is varied has an eps where it takes one. InputError if they make no
    sense together."""
    settings = replace(base, **point)
    if "loss" in point and "eps" not in point:
        takes_eps = "eps" in dpo.options(settings.loss)
        settings = replace(settings, eps=(base.eps or 0.1) if takes_eps else None)
    check_limits(settings)
    train.check_loss(settings)
    return settings


def plan(settings: Sweep, grid: dict[str, list], directory: Path) -> list[Run]:
    """The runs. Splits the rows once for all of them and writes them to the sweep's `directory`."""
    base = single(settings)
    points = make_points(grid, base, settings.full_grid)
    configured = [at_point(base, point) for point in points]  # checks all before any runs
    names = [point_name(point) for point in points]
    files = {one.train for one in configured}
    if len(set(names)) < len(names) or len({Path(file).stem for file in files}) < len(files):
        raise InputError("--grid: two settings would have the same name; give the files different names")
    if len(grid.get("train", [])) > 1 and settings.data is None:
        raise InputError("--grid train=... compares data sets on a test set of its own: give it with --data FILE.jsonl")
    parent = str(resolve(settings.model, settings.revision))
    tested = test_rows(settings)
    sides = {file: training_rows(settings, file, directory, tested) for file in files}
    planned = []
    for point, name, one in zip(points, names, configured, strict=True):
        one = replace(one, model=parent, revision=None, out=str(directory), overwrite=False, dry_run=False)
        one = replace(one, train=sides[one.train]["train"], eval=sides[one.train]["eval"])
        for seed in range(settings.seed, settings.seed + settings.seeds):
            full_name = name + (f",seed={seed}" if settings.seeds > 1 else "")
            planned.append(Run(full_name, point, replace(one, seed=seed, name=full_name)))
    write_rows(planned[0].test, tested)  # last: the training rows do not leak
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


def test_rows(settings: Sweep) -> list[Row]:
    """The test rows: --data, or a share of --train's questions that is set aside."""
    if settings.data:
        return read_pairs(settings.data, settings)
    rows = split_by_question(read_pairs(settings.train, settings), settings.eval_share, settings.seed)[1]
    if not rows:
        raise InputError(f"{settings.train}: no question is left to test on; give more rows, or test rows with --data")
    return rows


def training_rows(settings: Sweep, file: str, directory: Path, tested: list[Row]) -> dict[str, str]:
    """Writes the training and evaluation rows of one --train file and returns {"train": path, "eval": path}. They ask no
    question of the test, which was set aside from the same rows or came with --data."""
    rows = read_pairs(file, settings)
    if settings.data is None:
        rows = split_by_question(rows, settings.eval_share, settings.seed)[0]
    if settings.eval:
        evaluation = read_pairs(settings.eval, settings)
    else:
        rows, evaluation = split_by_question(rows, settings.eval_share, settings.seed + 1)
    check_no_leak([*rows, *evaluation], tested)
    start = directory / "data" / Path(file).stem
    return {
        "train": write_rows(start.with_name(f"{start.name}-train.jsonl"), rows),
        "eval": write_rows(start.with_name(f"{start.name}-eval.jsonl"), evaluation),
    }


# ------------------------------------------------------------------------------------------------------------ the runs


def run_all(planned: list[Run]) -> int:
    """Makes and measures every run that is not finished; returns 0, or the status of the signal that stopped a run."""
    check_settings(planned)
    began, made = time.perf_counter(), 0
    for number, run in enumerate(planned, start=1):
        done = run.directory / "test.json"
        if not done.exists():
            print(f"[{number}/{len(planned)}] {run.name} ...", flush=True)
            status = run_one(run)
            if status > 128:
                print("Stopped and saved; the same command goes on.")
                return status
            made += 1
        state = read_json(done if done.exists() else run.directory / "failed.json")
        left = (time.perf_counter() - began) / max(1, made) * (len(planned) - number)
        went = f"FAILED, {state['error']}" if "error" in state else f"reward accuracy {100 * state['accuracy']:.1f}%"
        print(f"[{number}/{len(planned)}] {run.name}: {went}; about {left / 60:.0f} min left", flush=True)
    return 0


def check_settings(planned: list[Run]) -> None:
    """InputError if a run of an earlier call was made with other settings than this call would give it."""
    for run in planned:
        if not (run.directory / "run.json").exists():
            continue
        stored = asdict(runs_on_disk.stored_settings(run.directory))
        for name, value in asdict(run.settings).items():
            if name not in ("resume", "device", "overwrite", "out") and stored[name] != value:
                raise InputError(
                    f"{run.directory} was made with {name} = {stored[name]}, now it would be {value}. Give this sweep "
                    "another --name, or delete the earlier one with --overwrite."
                )


def run_one(run: Run) -> int:
    """Trains (or resumes) and measures one run. What it prints goes to log.txt; an error to failed.json."""
    printed, began = io.StringIO(), time.perf_counter()
    begun, status = (run.directory / "run.json").exists(), 0
    if not begun:
        shutil.rmtree(run.directory, ignore_errors=True)  # it failed before it began
    try:
        with contextlib.redirect_stdout(printed):
            status = train.run(replace(run.settings, resume=begun))
            if not status:
                record = measure_on_test(run)
                write_json(run.directory / "test.json", record | {"seconds": time.perf_counter() - began})
                shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)  # the best one is the run's model
                (run.directory / "failed.json").unlink(missing_ok=True)
    except Exception as error:  # whatever ends one run, the others go on
        write_json(run.directory / "failed.json", {"error": f"{type(error).__name__}: {first_line(error)}"})
        printed.write(traceback.format_exc())
    run.directory.mkdir(parents=True, exist_ok=True)
    with open(run.directory / "log.txt", "a", encoding="utf-8") as log:
        log.write(printed.getvalue())
    return status


def test_examples(run: Run) -> list[Example]:
    """The test pairs as a run's model reads them."""
    settings = run.settings
    chat = runs_on_disk.load_chat(run.directory, settings.system_prompt or "")
    examples = encode(read_pairs(run.test, settings), chat, settings.max_length, settings.max_prompt_length, Ledger())
    if not examples:
        raise InputError(f"{run.test}: no row fits into --max-length {settings.max_length}")
    return examples


def test_reference(settings: Dpo, examples: list[Example]) -> Tensor:
    """Log-probabilities [E, 2] of the test pairs under the starting model, which is in memory only here."""
    parent = train.load_model(Path(settings.model), settings)
    return train.reference_table(settings, parent, fingerprint(parent), examples, "test")


def test_margins(directory: Path, settings: Dpo, examples: list[Example], reference: Tensor) -> Tensor:
    """The log-ratio margins [E] of the test pairs, in nats, of the model in a directory."""
    model = Phi.from_pretrained(directory, device=settings.device)
    policy = all_logprobs(model, examples, settings.micro_batch_size, settings.device, settings.dtype, "testing")
    return dpo.margin(policy, reference)


def measure_on_test(run: Run) -> dict:
    """Measures a run on the test pairs and saves, for each pair, the margin in nats, what the length and the starting model
    say of it, and whether its label is flipped; at every checkpoint, if the run asks for it, the accuracy."""
    settings, examples = run.settings, test_examples(run)
    reference = test_reference(settings, examples)  # [E, 2]
    flipped, lengths = flips(examples), lengths_of(examples)  # [E], [E, 2]
    margin = test_margins(run.directory, settings, examples, reference)  # [E]
    if not margin.isfinite().all():
        raise InputError("the model's log-probabilities of the test pairs are not finite")
    tensors = {
        "margin": margin,
        "reference": reference[:, 0] - reference[:, 1],
        "longer": (lengths[:, 0] - lengths[:, 1]).sign(),
        "flipped": torch.zeros(len(examples), dtype=torch.bool) if flipped is None else flipped,
    }  # all [E], positive where they speak for the answer labelled "chosen"
    with whole_file(run.directory / "margins.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    loss = dpo.preference_loss(settings.beta * margin, settings.loss, settings.beta, settings.eps)
    record = {
        "accuracy": (margin > 0).double().mean().item(),
        "labels known": flipped is not None,
        "best step": read_json(run.directory / "results.json")["best_step"],
        "own loss": loss.double().mean().item(),
    }
    if run.checkpoints:
        record["checkpoints"] = {}
        for step in runs_on_disk.steps_saved(run.directory):
            checkpoint = runs_on_disk.checkpoint_directory(run.directory, step)
            margin = test_margins(checkpoint, settings, examples, reference)
            record["checkpoints"][step] = (for_the_right(margin, flipped) > 0).double().mean().item()
    return record
