"""--stage sweep --preset report: the report's tables, its curves and its claims again, at the scale of the chosen model.

    python train.py --stage sweep --preset report                                          the demo, within half an hour
    python train.py --stage sweep --preset report --model DIR --train pairs.jsonl --data test.jsonl

    Table 1   sizes of the training set: 20, 30, 40 and 54 parts of 54, each inside the next (the report's thousands)
    Table 2   learning rate (1/2, 1, 3, 5 times the recipe's), beta (.05, .1, .3, .5), eps (0, .05, .1, .25), one at a time
    Table 3   models by checkpoints: each size at a quarter, a half, three quarters and the end of its training
    Figure 2  the curves of all these runs

The defaults are the report's: robust loss, beta 0.3, eps 0.1, all rows. What differs, and is meant to: accuracies are on
test questions that no run trained on, of clean labels where they are known, with intervals; a run's best checkpoint is
chosen on evaluation rows, never by its robust loss. The report's own numbers are in the text of its claims.
"""

import platform
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data import Ledger, encode, read_rows
from experiments import sweep
from experiments.claims import FORMATS, QUARTERS, checkpoints, claims, nearest
from experiments.precisions import in_format
from experiments.ranking import Result, collect, conclusions, table
from experiments.sweep import Run
from inputs import load_chat
from metrics import text as texts
from metrics.intervals import Estimate, share
from metrics.tables import markdown, percent, picture
from model import Phi
from passes import all_logprobs, completion_lengths, grades, sample_answers
from runtime.files import read_json, write_json, write_text
from runtime.runs import read_metrics
from runtime.settings import Config, default_name

PARTS = (20, 30, 40, 54)
GRID = {"lr": (0.5, 1, 3, 5), "beta": (0.05, 0.1, 0.3, 0.5), "eps": (0.0, 0.05, 0.1, 0.25)}  # lr: times the recipe's
ANSWERS = 300  # sampled, at most
NEW_TOKENS = 256


def replicate(raw: Config, given: set[str], find: Callable[[Config], Path], run_stage: Callable[[Config], int]) -> int:
    """Makes all runs, or those that are missing, and writes report.md with its figures. Returns the exit status."""
    directory = Path(raw.out) / (raw.name or default_name(raw))
    base, runs, test = make_runs(raw, given, find)
    status = sweep.run_all(runs, test, run_stage)
    if status:
        return status
    results, failed = collect(runs, base)
    by_name = {result.name: result for result in results}
    if "defaults" not in by_name:
        print(f"error: the run with the defaults failed: {failed.get('defaults')}")
        return 2
    print("sampling and quantizing ...", flush=True)
    extra = measure_more(base, runs[0], test, directory)
    figure_2(runs, failed, directory / "figures")
    write_text(directory / "report.md", report(base, runs, results, failed, extra))
    print(f"\nWritten to {directory}/: report.md, figures/. Every curve: tensorboard --logdir {directory}")
    return 2 if failed else 0


# ------------------------------------------------------------------------------------------------------------ the runs


def make_runs(raw: Config, given: set[str], find: Callable[[Config], Path]) -> tuple[Config, list[Run], Path]:
    """The defaults, the three grids around them, and the smaller training sets."""
    raw = replace(raw, loss="robust", beta=raw.beta or 0.3, eps=0.1 if raw.eps is None else raw.eps)
    given = given | {"loss", "beta", "eps"}
    lr = sweep.defaults(raw, given)[0].lr
    grid = {**GRID, "lr": [float(f"{lr * times:.3g}") for times in GRID["lr"]]}
    base, runs, test = sweep.plan(raw, given, grid, find)
    rows = read_rows(runs[0].config.train, "pairs", "stop", Ledger())
    random.Random(raw.seed).shuffle(rows)
    sized = []
    for part in PARTS[:-1]:
        count = round(len(rows) * part / PARTS[-1])
        path = Path(runs[0].config.train).with_name(f"pairs-{count}.jsonl")
        sweep.write_rows(path, rows[:count])  # nested: each is the beginning of the next
        name = f"pairs={count}"
        sized.append(Run(name, {"pairs": count}, replace(runs[0].config, train=str(path), name=name)))
    sized = [with_checkpoints(run) for run in (runs[0], *sized)]
    return base, [*sized, *runs[1:]], test


def with_checkpoints(run: Run) -> Run:
    """The run, with a checkpoint at each quarter of its training, all kept until they are measured."""
    rows = sum(1 for _ in open(run.config.train, encoding="utf-8"))
    steps = run.config.max_steps or run.config.epochs * -(-rows // run.config.batch_size)
    return replace(run, config=replace(run.config, save_every=max(1, steps // 4), keep=1000), checkpoints=True)


@torch.no_grad()
def measure_more(base: Config, run: Run, test: Path, directory: Path) -> dict:
    """Sampled answers before and after tuning, and the tuned model in the report's number formats; kept in more.json."""
    path = directory / "more.json"
    if path.exists():
        return read_json(path)
    tuned, config = Path(run.config.out) / run.name, run.config
    chat = load_chat(tuned, config.system_prompt)
    rows = read_rows(test, "pairs", config.on_bad_row, ledger := Ledger())
    examples = encode(rows, chat, config.max_length, config.max_prompt_length, ledger)
    asked = examples[: max(1, min(ANSWERS, base.samples))]
    extra = {"answers": len(asked)}
    for label, source in (("before", Path(config.model)), ("after", tuned)):
        model = Phi.from_pretrained(source, device=config.device)
        answers, ended = sample_answers(model, chat, asked, NEW_TOKENS, 1.0, config.seed)
        extra[f"ends, {label}"] = asdict(share(sum(ended), len(ended)))
        right = grades(answers, asked).get("right method")
        extra[f"method, {label}"] = asdict(share(sum(right), len(right))) if right else None
    for name in FORMATS:
        model = in_format(name, Phi.from_pretrained(tuned, device=config.device), False)
        answers, _ = sample_answers(model, chat, asked, NEW_TOKENS, 0.0, config.seed)
        bleu, _ = texts.bleu(answers, [right_text(e) for e in asked])
        likely = [replace(e, completions=e.completions[:1]) for e in asked]
        logprobs = all_logprobs(model, likely, config.micro_batch_size, config.device, "fp32", name)[:, 0]
        loss = texts.likelihood(logprobs, completion_lengths(likely))["loss"]
        extra[f"format {name}"] = {"BLEU": asdict(bleu), "loss": asdict(loss)}
    write_json(path, extra)
    return extra


def right_text(example) -> str:
    """The answer that is right: the chosen one, or the other one where the row says that its label is flipped."""
    return example.texts[1 if example.extra.get("flipped") else 0]


# ---------------------------------------------------------------------------------------------------------- the report


def table_3(runs: list[Run], failed: dict[str, str]) -> str:
    """Accuracy of each training set's model at each quarter of its training."""
    rows = []
    for run in runs:
        if run.checkpoints and run.name not in failed:
            saved = checkpoints(run)
            rows.append([run.name, *(percent(nearest(saved, quarter)) for quarter in QUARTERS)])
    return markdown(["model", *(f"{quarter:.0%} of its steps" for quarter in QUARTERS)], rows)


def report(base: Config, runs: list[Run], results: list[Result], failed: dict[str, str], extra: dict) -> str:
    """report.md."""
    default = next(r for r in results if not r.point)

    def part(names: set[str]) -> str:
        return table([r for r in results if not r.point or set(r.point) <= names], base)

    model = "the demo's model" if base.model == "demo" else base.model
    train = sum(1 for _ in open(runs[0].config.train, encoding="utf-8"))
    made = claims(base, runs, results, extra)
    pairs, minutes = default.right.shape[1], sum(r.seconds for r in results) / 60
    flips = f", {base.flip_rate:.0%} of whose labels are flipped" if base.flip_rate else ""
    method = [Estimate(**extra[f"method, {label}"]) for label in ("before", "after") if extra.get(f"method, {label}")]
    answers = (
        f" Sampled answers with the right method: {percent(method[0])} before, {percent(method[1])} after." if method else ""
    )
    parts = [
        "# The report again",
        f"Robust DPO of {model} on {train:,} pairs{flips}; {pairs:,} test pairs of questions that no run saw. Defaults: lr "
        f"{base.lr:g}, beta {base.beta}, eps {base.eps}, nll-weight {base.nll_weight}, {base.epochs} epochs, batches "
        f"of {base.batch_size}. {len(results)} runs, {minutes:.0f} minutes on {base.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}.{answers}",
        "## What the report did or said, and what happened here",
        markdown(["claim", "here", "verdict"], [[c.text, c.here, f"**{c.verdict}**"] for c in made]),
        '"Cannot be told": the difference is within chance (McNemar\'s test on the same pairs, or intervals that overlap).',
        "## Table 1: sizes of the training set",
        part({"pairs"}),
        "## Table 2: hyperparameters, one at a time",
        part({"lr"}),
        part({"beta"}),
        part({"eps"}),
        "\n".join(f"- {line}" for line in conclusions([r for r in results if "pairs" not in r.point], base)),
        "## Table 3: models by checkpoints",
        "Accuracy on the test pairs" + (" (clean labels)" if "clean" in default.measures else ""),
        table_3(runs, failed),
        "## Figure 2: the curves",
        "![Curves of all runs](figures/figure-2.png)",
        "The lower row is what the report compared. Its curves of different beta and eps have different units.",
        *([f"Failed: {name}: {error}" for name, error in failed.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def figure_2(runs: list[Run], failed: dict[str, str], figures: Path) -> None:
    """Held-out accuracy and own loss over the training, a column for what was varied."""
    columns = {"pairs": "training pairs", **{name: name for name in GRID}}
    with picture(figures / "figure-2.png", columns=len(columns), rows=2, size=(18, 7)) as axes:
        for n, (name, label) in enumerate(columns.items()):
            shown = [r for r in runs if r.name not in failed and (not r.point or set(r.point) == {name})]
            for run in shown:
                rows = read_metrics(Path(run.config.out) / run.name)
                for axis, metric in ((axes[n], "eval_rewards/accuracies"), (axes[n + len(columns)], "eval_preference_loss")):
                    points = [(row["step"], row[metric]) for row in rows if metric in row]
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run.name)
            axes[n].set(title=label, ylabel="reward accuracy, held out, as labelled", xlabel="optimizer step")
            axes[n].legend(fontsize=7)
            axes[n + len(columns)].set(ylabel="own robust loss, held out (not comparable)", xlabel="optimizer step")
