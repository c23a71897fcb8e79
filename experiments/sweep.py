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
import json
import re
import shutil
import time
import traceback
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import demo
from data import Example, Ledger, Row, check_no_leak, encode, parse_pair, read_rows, split_by_question
from dpo import LOSSES_WITH_EPS, preference_loss
from inputs import QUESTIONS, load_chat, load_model, reference_table
from model import Phi
from passes import all_logprobs, completion_lengths, flips
from runtime.checks import resolve
from runtime.files import InputError, first_line, read_json, whole_file, write_json, write_jsonl
from runtime.runs import fingerprint, steps_saved
from runtime.settings import Config, default_name

TEST_PAIRS = 3_000  # of the demo, at most
# Other rows, or the same rows cut otherwise, could not be compared pair by pair; two models can, by --stage eval.
NOT_VARIED = (
    "stage model name out resume overwrite dry_run device seed eval eval_share on_bad_row system_prompt max_length "
    "max_prompt_length demo_rows flip_rate dtype attention base"
).split()
SWEEP_ONLY = {"grid", "full_grid", "seeds", "preset", "data", "name", "overwrite", "dry_run"}


@dataclass
class Run:
    """One training run of a sweep."""

    name: str
    point: dict  # {flag: value} where it differs from the defaults
    config: Config
    checkpoints: bool = False  # measure all of them on the test rows, not just the best one


# ------------------------------------------------------------------------------------------------------------- the plan


def parse_grid(texts: list[str]) -> dict[str, list]:
    """["beta=0.1,0.3", "train=a.jsonl"] -> {"beta": [0.1, 0.3], "train": ["a.jsonl"]}, of the flags' own types."""
    types, grid = typing.get_type_hints(Config), {}
    known = {f.name for f in fields(Config) if "dpo" in f.metadata["stages"]} - set(NOT_VARIED)
    for text in texts:
        flag, _, values = text.partition("=")
        name = flag.strip().lstrip("-").replace("-", "_")
        if name not in known:
            raise InputError(f"--grid {text}: {flag!r} is no flag of --stage dpo that can be varied")
        kind = next(t for t in (*typing.get_args(types[name]), types[name]) if t is not type(None))
        if kind is bool:
            raise InputError(f"--grid {text}: a flag without a value cannot be varied; make two sweeps")
        try:
            parsed = [kind(value.strip()) for value in values.split(",") if value.strip()]
        except ValueError:
            raise InputError(f"--grid {text}: the values of {flag} are {kind.__name__}s") from None
        allowed = next(f.metadata["choices"] for f in fields(Config) if f.name == name)
        if allowed and not set(parsed) <= set(allowed):
            raise InputError(f"--grid {text}: the values of {flag} are {', '.join(allowed)}")
        if not parsed or name in grid or len(set(parsed)) < len(parsed):
            raise InputError(f"--grid {text}: give each flag once, with different values: --grid beta=0.1,0.3")
        grid[name] = parsed
    return grid


def make_points(grid: dict[str, list], base: Config, full: bool) -> list[dict]:
    """The settings to try, as {flag: value} where they differ from `base`: the defaults first, then one flag at a time, or
    all combinations."""
    if full:
        combinations = [dict(zip(grid, values)) for values in product(*grid.values())]
    else:
        combinations = [{}, *({name: value} for name, values in grid.items() for value in values)]
    points = [{name: v for name, v in point.items() if v != getattr(base, name)} for point in combinations]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def point_name(point: dict) -> str:
    """A name that can be a directory's: "defaults", "beta=0.1", "train=mixture-a" for a file of that stem."""
    shown = [f"{name}={Path(value).stem if name == 'train' else value}" for name, value in point.items()]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(shown)) or "defaults"


def defaults(raw: Config, given: set[str]) -> tuple[Config, Config, set[str]]:
    """The settings that all runs share, complete; and the flags of a single run as they were given."""
    own = replace(raw, stage="dpo", grid=None, full_grid=False, seeds=1, preset=None, data=None)
    flags = (given - SWEEP_ONLY) | {"stage"}
    return resolve(own, flags), own, flags


def at_point(own: Config, base: Config, point: dict) -> Config:
    """The flags of a run at one point. A loss that is varied has an eps where it needs one."""
    config = replace(own, **point)
    if "loss" in point and "eps" not in point:
        config.eps = (base.eps or 0.1) if config.loss in LOSSES_WITH_EPS else None
    return config


def plan(
    raw: Config, given: set[str], grid: dict[str, list], find: Callable[[Config], Path]
) -> tuple[Config, list[Run], Path]:
    """The defaults of all runs, the runs, and the file of test rows; splits the rows, once for all runs.

    `raw` and `given` are as `config.parse` returned them; `find` gives the directory of a config's model.
    """
    sweep = Path(raw.out) / (raw.name or default_name(raw))
    base, own, flags = defaults(raw, given)
    points = make_points(grid, base, raw.full_grid)
    configs = [resolve(at_point(own, base, point), flags | set(point)) for point in points]  # all, before any runs
    names = [point_name(point) for point in points]
    files = {config.train for config in configs if config.train}
    if len(set(names)) < len(names) or len({Path(file).stem for file in files}) < len(files):
        raise InputError("--grid: two settings would have the same name; give the files different names")
    tested, sides, parents, runs = test_rows(raw, base, grid, sweep), {}, {}, []
    for point, name, config in zip(points, names, configs, strict=True):
        if config.train not in sides:
            sides[config.train] = training_rows(config, sweep, tested, set_aside=raw.data is None)
        if config.model not in parents:
            parents[config.model] = str(find(config))
        own_rows = dict(train=sides[config.train][0], eval=sides[config.train][1])
        own_rows |= dict(demo_rows=None, flip_rate=None, eval_share=None)
        config = replace(config, model=parents[config.model], out=str(sweep), overwrite=False, dry_run=False, **own_rows)
        config = replace(config, samples=config.samples if "samples" in given else 0)
        for seed in range(raw.seed, raw.seed + raw.seeds):
            full_name = name + (f",seed={seed}" if raw.seeds > 1 else "")
            runs.append(Run(full_name, point, replace(config, seed=seed, name=full_name)))
    return base, runs, Path(write_rows(sweep / "data" / "test.jsonl", tested))  # last: the training rows do not leak


def write_rows(path: Path, rows: list[Row]) -> str:
    """Writes a file of the sweep. InputError if it holds other rows already: runs on those compare with no new one."""
    before = path.read_bytes() if path.exists() else None
    lines = [as_dict(row) for row in rows]
    if before is not None and before != "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode():
        raise InputError(f"{path} holds other rows than this call gives. Give this sweep another --name, or --overwrite it.")
    write_jsonl(path, lines)
    return str(path)


def as_dict(row: Row) -> dict:
    return {"prompt": row.messages, "chosen": row.completions[0], "rejected": row.completions[1], **row.extra}


def demo_pairs(first: int, count: int, config: Config, salt: int) -> list[Row]:
    """Rows of the demo's questions from the `first` of those for DPO on."""
    start = QUESTIONS["dpo"][0] + first
    made = demo.make_pair_rows(demo.make_questions(start + count, config.seed)[start:], config.flip_rate, config.seed + salt)
    return [Row(*parse_pair(row)[:2], "demo", parse_pair(row)[2]) for row in made]


def test_rows(raw: Config, base: Config, grid: dict[str, list], sweep: Path) -> list[Row]:
    """The test rows: --data, or questions that are set aside: the demo's unused ones, or a share of --train's."""
    if raw.data:
        return read_rows(raw.data, "pairs", base.on_bad_row, Ledger())
    if len(grid.get("train", [])) > 1:
        raise InputError("--grid train=... compares data sets on a test set of its own: give it with --data FILE.jsonl")
    if base.train is None:
        count = min(TEST_PAIRS, demo.MOST_QUESTIONS - QUESTIONS["dpo"][0] - base.demo_rows)
        if count < 200:
            raise InputError(f"--demo-rows {base.demo_rows}: at most 9,800, or too few questions are left to test on")
        return demo_pairs(base.demo_rows, count, base, salt=1)
    pairs = read_rows(base.train, "pairs", base.on_bad_row, Ledger())
    rows = split_by_question(pairs, base.eval_share or 0.2, base.seed)[1]
    if not rows:
        raise InputError(f"{base.train}: no question is left to test on; give more rows, or test rows with --data")
    return rows


def training_rows(config: Config, sweep: Path, tested: list[Row], set_aside: bool) -> tuple[str, str]:
    """The files of training and evaluation rows of one config, without the questions of the test, which were `set_aside`
    from the same rows or came with --data."""
    if config.train is None:
        stem, rows = "pairs", demo_pairs(0, config.demo_rows, config, salt=0)
    else:
        stem, rows = Path(config.train).stem, read_rows(config.train, "pairs", config.on_bad_row, Ledger())
        if set_aside:
            rows = split_by_question(rows, config.eval_share or 0.2, config.seed)[0]
    if config.eval:
        evaluation = read_rows(config.eval, "pairs", config.on_bad_row, Ledger())
    else:
        rows, evaluation = split_by_question(rows, config.eval_share or 0.2, config.seed + 1)
    check_no_leak([*rows, *evaluation], tested)
    return tuple(
        write_rows(sweep / "data" / f"{stem}-{side}.jsonl", part) for side, part in (("train", rows), ("eval", evaluation))
    )


# ------------------------------------------------------------------------------------------------------------ the runs


def run_all(runs: list[Run], test: Path, run_stage: Callable[[Config], int]) -> int:
    """Makes and measures every run that is not finished; returns 0, or the status of the signal that stopped a run."""
    check_settings(runs)
    references: dict[str, Tensor] = {}
    began, made = time.perf_counter(), 0
    for number, run in enumerate(runs, start=1):
        where = Path(run.config.out) / run.name
        if not (where / "test.json").exists():
            print(f"[{number}/{len(runs)}] {run.name} ...", flush=True)
            status = run_one(run, where, test, run_stage, references)
            if status > 128:
                print("Stopped and saved; the same command goes on.")
                return status
            made += 1
        state = read_json(where / "test.json") if (where / "test.json").exists() else read_json(where / "failed.json")
        left = (time.perf_counter() - began) / max(1, made) * (len(runs) - number)
        print(f"[{number}/{len(runs)}] {run.name}: {one_line(state)}; about {left / 60:.0f} min left", flush=True)
    return 0


def one_line(state: dict) -> str:
    return f"FAILED, {state['error']}" if "error" in state else f"reward accuracy {100 * state['accuracy']:.1f}%"


def check_settings(runs: list[Run]) -> None:
    """InputError if a run of an earlier call was made with other settings than this call would give it."""
    for run in runs:
        path = Path(run.config.out) / run.name / "run.json"
        stored = read_json(path)["config"] if path.exists() else {}
        for name, value in asdict(run.config).items():
            if name not in ("resume", "device", "overwrite", "out") and stored.get(name, value) != value:
                raise InputError(
                    f"{path.parent} was made with {name} = {stored[name]}, now it would be {value}. Give this sweep another "
                    "--name, or delete the earlier one with --overwrite."
                )


def run_one(run: Run, where: Path, test: Path, run_stage: Callable[[Config], int], references: dict[str, Tensor]) -> int:
    """Trains (or resumes) and measures one run. What it prints goes to log.txt; an error to failed.json."""
    printed, began = io.StringIO(), time.perf_counter()
    begun, status = (where / "run.json").exists(), 0
    if not begun:
        shutil.rmtree(where, ignore_errors=True)  # it failed before it began
    config = replace(run.config, resume=begun)
    try:
        with contextlib.redirect_stdout(printed):
            status = run_stage(config)
            if not status:
                record = measure_on_test(run, where, test, references)
                write_json(where / "test.json", record | {"seconds": time.perf_counter() - began})
                shutil.rmtree(where / "checkpoints", ignore_errors=True)  # the best one is the run's model
                (where / "failed.json").unlink(missing_ok=True)
    except Exception as error:  # whatever one run dies of, the others go on
        write_json(where / "failed.json", {"error": f"{type(error).__name__}: {first_line(error)}"})
        printed.write(traceback.format_exc())
    where.mkdir(parents=True, exist_ok=True)
    with open(where / "log.txt", "a", encoding="utf-8") as log:
        log.write(printed.getvalue())
    return status


def test_reference(config: Config, examples: list[Example]) -> Tensor:
    """Log-probabilities [E, 2] of the test pairs under the starting model, which is in memory only here."""
    parent = load_model(Path(config.model), config)
    return reference_table(config, parent, fingerprint(parent), examples, "test")


def measure_on_test(run: Run, where: Path, test: Path, references: dict[str, Tensor]) -> dict:
    """What the test pairs say of a run, saved: the margins in nats of each pair, what a ruler and the starting model would
    say of it, and whether its label is flipped; at every checkpoint, if the run asks for it, the accuracy."""
    config = run.config
    chat = load_chat(where, config.system_prompt)
    rows = read_rows(test, "pairs", config.on_bad_row, ledger := Ledger())
    examples = encode(rows, chat, config.max_length, config.max_prompt_length, ledger)
    if not examples:
        raise InputError(f"{test}: no row fits into --max-length {config.max_length}")
    if config.model not in references:
        references[config.model] = test_reference(config, examples)
    reference, flipped = references[config.model], flips(examples)

    def margins(directory: Path) -> Tensor:
        model = Phi.from_pretrained(directory, device=config.device)
        policy = all_logprobs(model, examples, config.micro_batch_size, config.device, config.dtype, "testing")
        return (policy - reference).diff(dim=1)[:, 0].neg()  # [E]

    tensors = {
        "margin": margins(where),
        "reference": reference.diff(dim=1)[:, 0].neg(),
        "longer": completion_lengths(examples).view(-1, 2).diff(dim=1)[:, 0].neg().sign(),
        "flipped": torch.zeros(len(examples), dtype=torch.bool) if flipped is None else flipped,
    }  # all [E], positive where they speak for the answer labelled "chosen"
    if not tensors["margin"].isfinite().all():
        raise InputError("the model's log-probabilities of the test pairs are not finite")
    with whole_file(where / "margins.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    loss = preference_loss(config.beta * tensors["margin"], config.loss, config.beta, config.eps)
    record = {
        "accuracy": (tensors["margin"] > 0).double().mean().item(),
        "labels known": flipped is not None,
        "best step": read_json(where / "results.json")["best_step"],
        "own loss": loss.double().mean().item(),
    }
    if run.checkpoints:
        signed = {
            step: torch.where(tensors["flipped"], -m, m)
            for step in steps_saved(where)
            for m in [margins(where / "checkpoints" / f"step-{step}")]
        }
        record["checkpoints"] = {step: (m > 0).double().mean().item() for step, m in signed.items()}
    return record
