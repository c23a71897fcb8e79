"""--stage sweep --preset report: the report's tables, curves and claims again, with a model of your choice.

    python train.py --stage sweep --preset report                                          the demo, about 10 minutes
    python train.py --stage sweep --preset report --model DIR --train pairs.jsonl --data test.jsonl

    Table 1   sizes of the training set: 20, 30, 40 and 54 parts of 54, each inside the next (the report's thousands)
    Table 2   learning rate (1/2, 1, 3, 5 times the recipe's), beta (.05, .1, .3, .5), eps (0, .05, .1, .25), one at a time
    Table 3   models by checkpoints: each size at a quarter, a half, three quarters and the end of its training
    Figure 2  the curves of all these runs

The defaults are the report's: robust loss, beta 0.3, eps 0.1, all rows. What differs, and is meant to: accuracies are on
test questions that no run trained on, of clean labels where they are known, with intervals; a run's best checkpoint is
chosen on evaluation rows, never by its robust loss. The report's own numbers are in the text of its claims.

Each claim stands beside what was measured here and a verdict: "held", "did not hold", or "cannot be told" where the
difference is within chance, by McNemar's test on the same test pairs (ranking.py) or by intervals that overlap.
"""

import platform
import random
from dataclasses import replace
from pathlib import Path

import torch

import eval as evaluation
from convert import merge_checkpoint
from data import Ledger, read_truth, write_truth
from experiments import sweep
from experiments.ranking import QUARTERS, Result, Run, cannot_tell, collect, conclusions, curves, table
from lora import is_adapter
from metrics.intervals import Estimate, share
from metrics.tables import decimal, markdown, percent
from prepare.rows import read_rows
from runtime.files import InputError, numbered_lines, read_json, write_jsonl, write_text
from runtime.settings import Dpo, Eval, Sweep

PARTS = (20, 30, 40, 54)
GRID = {"lr": (0.5, 1, 3, 5), "beta": (0.05, 0.1, 0.3, 0.5), "eps": (0.0, 0.05, 0.1, 0.25)}  # lr: times the recipe's
ANSWERS = 300  # sampled, unless --samples says otherwise
FORMATS = ("fp32", "int8", "nf4", "fp4")  # in which the answers are scored
Claim = tuple[str, str, str]  # what the report did or said; what was measured here; "held", "did not hold", "cannot be told"


def run(settings: Sweep) -> int:
    """Makes all runs, or those that are missing, and writes report.md with its figure; returns the exit status."""
    with sweep.open_sweep(settings) as directory:
        runs = make_runs(settings, directory)
        status, failed = sweep.run_all(runs)
        if status:
            return status
        base = sweep.single(settings)
        results = collect(runs, base)
        if runs[0].name in failed:
            raise InputError(f"the run with the defaults failed ({failed[runs[0].name]}); see {runs[0].directory}.log")
        answers = measure_answers(runs[0], directory, settings.samples or ANSWERS)
        curves(runs, directory / "figures" / "figure-2.png")
        write_text(directory / "report.md", report(base, runs, results, failed, answers))
    print(f"\nWritten to {directory}/: report.md, figures/. Every curve: tensorboard --logdir {directory}")
    return 2 if failed else 0


def make_runs(settings: Sweep, directory: Path) -> list[Run]:
    """The run with the defaults, those with smaller training sets, and the three grids."""
    grid = GRID | {"lr": [float(f"{settings.lr * times:.3g}") for times in GRID["lr"]]}
    default, *varied = sweep.plan(replace(settings, samples=0), grid, directory)  # answers come from `measure_answers`
    rows = read_rows(default.settings.train, "pairs", "stop", Ledger())
    random.Random(settings.seed).shuffle(rows)
    sized = [default]
    for part in PARTS[:-1]:
        count = round(len(rows) * part / PARTS[-1])
        path = Path(default.settings.train).with_name(f"pairs-{count}.jsonl")
        sweep.write_rows(path, rows[:count])  # nested: each is the beginning of the next
        name = f"pairs={count}"
        sized.append(Run(name, {"pairs": count}, replace(default.settings, train=str(path), name=name)))
    for one in sized:  # a checkpoint at each quarter of the training; all are kept until they are measured
        steps = settings.max_steps or settings.epochs * -(-one.point.get("pairs", len(rows)) // settings.batch_size)
        one.settings = replace(one.settings, save_every=max(1, steps // 4), keep=1000)
        one.quarters = True
    return [*sized, *varied]


def measure_answers(run: Run, directory: Path, count: int) -> dict[str, dict[str, Estimate]]:
    """By --stage eval, {"before", "after" or a number format: {measure: Estimate}}: sampled answers to test questions before
    and after tuning, and greedy answers of the tuned model in the report's number formats."""
    settings, file = run.settings, directory / "data" / "answers.jsonl"
    rows = sweep.read_pairs(run.test, settings)[:count]
    right = [row.completions[1 if row.truth and row.truth.flipped else 0] for row in rows]
    write_jsonl(file, [{"prompt": row.messages, "completion": text} for row, text in zip(rows, right, strict=True)])
    write_truth(file, rows)
    tuned = run.directory
    if is_adapter(tuned):
        tuned = directory / "merged"
        merge_checkpoint(run.directory, tuned, settings.device)
    sampled = dict(name="tuning", model=[settings.model, str(run.directory)], temperature=1.0)
    greedy = dict(name="formats", model=[str(tuned)], precisions=",".join(FORMATS), temperature=0.0)
    shared = dict(data=str(file), samples=count, system_prompt=settings.system_prompt or "", out=str(directory))
    shared |= {name: getattr(settings, name) for name in ("seed", "device", "dtype", "micro_batch_size")}
    measured = {}
    for labels, asked in ((("before", "after"), sampled), (FORMATS, greedy)):
        path = directory / asked["name"] / "eval.json"
        if not path.exists() or len(read_json(path)["results"]) < len(labels):
            evaluation.run(Eval(overwrite=True, **asked, **shared))
        for label, result in zip(labels, read_json(path)["results"], strict=True):
            measured[label] = {key: Estimate(**value) for key, value in result["answers"].items()}
    return measured


# ---------------------------------------------------------------------------------------------------------- the claims


def better(a: Result, b: Result) -> str:
    """Whether "a orders more test pairs correctly than b" held."""
    if cannot_tell(a.right, b.right):
        return "cannot be told"
    return "held" if a.accuracy > b.accuracy else "did not hold"


def claims_about_settings(base: Dpo, results: list[Result], quarters: list[float]) -> list[Claim]:
    """The claims about accuracies; settings whose runs failed are left out. `quarters`: the accuracy of the run with the
    defaults after each quarter of its training."""
    default, best, lowest = next(r for r in results if not r.point), results[0], min(results, key=lambda r: r.own_loss)
    shown = {r.name: percent(r.accuracy) for r in results}
    start, tuned = (
        replace(default, right=(default.baselines[name] == 1)[None]) for name in ("starting model", "tuned model")
    )
    claim = (
        "Tuning raises the accuracy (Table 3: .744 and the like, measured without the shift by one; .80 to .85 by its "
        "trainer's own evaluation)."
    )
    here = (
        f"right answer likelier: starting model {percent(start.accuracy)}, tuned {percent(tuned.accuracy)}; by the reward "
    )
    made = [(claim, here + shown[default.name], better(tuned, start))]
    if sized := [r for r in results if "pairs" in r.point]:
        smallest = min(sized, key=lambda r: r.point["pairs"])
        claim = "A larger mixture is better (it compared 20,000, 30,000, 40,000 and 54,000 pairs)."
        here = f"{smallest.point['pairs']:,} pairs {shown[smallest.name]}, all {shown[default.name]}"
        made.append((claim, here, better(default, smallest)))
    n = default.right.shape[1]
    early, late = share(quarters[0] * n, n), share(quarters[-1] * n, n)
    verdict = "held" if late.low > early.high else "did not hold" if late.high < early.low else "cannot be told"
    here = f"first quarter {percent(early)}, end {percent(late)}"
    made.append(("Later checkpoints are better (Table 3 goes through them).", here, verdict))
    for name, theirs in (("lr", "1e-5, here the recipe's"), ("beta", "0.3"), ("eps", "0.1")):
        if varied := [r for r in results if set(r.point) == {name}]:
            top = max([default, *varied], key=lambda r: r.accuracy)
            value = top.point.get(name, getattr(base, name))
            verdict = "held" if cannot_tell(top.right, default.right) else "did not hold"
            here = f"{getattr(base, name)}: {shown[default.name]}; best {value}: {shown[top.name]}"
            made.append((f"{name} = {theirs} is the best of its grid.", here, verdict))
    here = f"lowest, {lowest.own_loss:.2f}: {lowest.name}, {shown[lowest.name]}; best: {best.name}, {shown[best.name]}"
    verdict = "held" if cannot_tell(best.right, lowest.right) else "did not hold"
    made.append(("The lowest robust test loss names the best run (it reached -59, and -241).", here, verdict))
    if plain := next((r for r in results if r.point == {"eps": 0.0}), None):
        robust = max((r for r in results if set(r.point) <= {"eps"} and r is not plain), key=lambda r: r.accuracy)
        eps, rate = robust.point.get("eps", base.eps), best.measures.get("flip rate")
        here = f"eps 0: {shown[plain.name]}; eps {eps}: {shown[robust.name]}; flip rate by the margins {percent(rate)}"
        made.append(("Assuming that labels are noisy helps (eps > 0).", here, better(robust, plain)))
    return made


def claims_about_answers(answers: dict[str, dict[str, Estimate]]) -> list[Claim]:
    """What became of the answers themselves."""
    before, after = answers["before"]["ends"], answers["after"]["ends"]
    claim = "After DPO the model barely ends its answers (its trainer supervised two <|im_end|>, its evaluation one)."
    here = f"answers that end: {percent(before)} before, {percent(after)} after"
    made = [(claim, here, "held" if after.high < before.low else "did not hold")]
    scores = {name: answers[name]["BLEU"] for name in FORMATS}
    here = "BLEU of greedy answers: " + ", ".join(f"{name} {decimal(score, 1)}" for name, score in scores.items())
    kept = all(score.value >= 0.95 * scores["fp32"].value for score in scores.values())
    claim = (
        "Quantization costs little: BLEU .572 in full precision, .567 in int8, .565 and .544 in 4 bits (at most 5% less)."
    )
    return [*made, (claim, here, "held" if kept else "did not hold")]


# ---------------------------------------------------------------------------------------------------------- the report


def report(base: Dpo, runs: list[Run], results: list[Result], failed: dict[str, str], answers: dict) -> str:
    """report.md."""
    default = next(r for r in results if not r.point)

    def part(name: str) -> str:
        return table([r for r in results if set(r.point) <= {name}], base)

    quarters = {run.name: read_json(run.tested)["quarters"] for run in runs if run.quarters and run.name not in failed}
    made = [*claims_about_settings(base, results, quarters[default.name]), *claims_about_answers(answers)]
    pairs = sum(1 for _ in numbered_lines(runs[0].settings.train))
    flipped = [truth.flipped for truth in read_truth(runs[0].settings.train).values() if truth.flipped is not None]
    flips = f", {sum(flipped) / len(flipped):.0%} of whose labels are flipped" if any(flipped) else ""
    methods = [answers[label]["right method"] for label in ("before", "after") if "right method" in answers[label]]
    graded = " Sampled answers with the right method: {} before, {} after.".format(*map(percent, methods)) if methods else ""
    parts = [
        "# The report again",
        f"Robust DPO of {base.model} on {pairs:,} pairs{flips}; {default.right.shape[1]:,} "
        f"test pairs of questions that no run saw. Defaults: lr {base.lr:g}, beta {base.beta}, eps {base.eps}, nll-weight "
        f"{base.nll_weight}, {base.epochs} epochs, batches of {base.batch_size}. {len(results)} runs on {base.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}.{graded}",
        "## What the report did or said, and what happened here",
        markdown(["claim", "here", "verdict"], [[claim, here, f"**{verdict}**"] for claim, here, verdict in made]),
        '"Cannot be told": the difference is within chance (McNemar\'s test on the same pairs, or intervals that overlap).',
        "## Table 1: sizes of the training set",
        part("pairs"),
        "## Table 2: hyperparameters, one at a time",
        *(part(name) for name in GRID),
        "\n".join(f"- {line}" for line in conclusions([r for r in results if "pairs" not in r.point])),
        "## Table 3: models by checkpoints",
        "Accuracy on the test pairs" + (" (clean labels)" if "clean accuracy" in default.measures else ""),
        markdown(
            ["model", *(f"{quarter:.0%} of its steps" for quarter in QUARTERS)],
            [[name, *map(percent, row)] for name, row in quarters.items()],
        ),
        "## Figure 2: the curves",
        "![Curves of all runs](figures/figure-2.png)",
        "The lowest row is what the report compared. Its curves of different beta and eps have different units.",
        *(f"Failed: {name}: {error}" for name, error in failed.items()),
    ]
    return "\n\n".join(parts) + "\n"
