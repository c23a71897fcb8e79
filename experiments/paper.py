"""--stage sweep --preset report: the report's tables, curves and claims again, with a model of your choice.

    python train.py --stage sweep --preset report                                          the demo, about half an hour
    python train.py --stage sweep --preset report --model DIR --train pairs.jsonl --data test.jsonl

    Table 1   mixtures: the first 20, 30, 40 and 54 parts of the pairs (the report's thousands); 1,350 samples from each, for
              three epochs
    Table 2   learning rate (1/2, 1, 3, 5 and 10 times the recipe's), beta (.05, .1, .3, .5), eps (0, .05, .1, .25), one at a
              time, on the mixture of 40
    Table 3   three models by checkpoints: at a quarter, a half, three quarters and the end of the training
    Figure 2  the curves of all these runs

The defaults are the report's: robust loss, beta 0.3, eps 0.1, three epochs. Every run is made with three seeds, which draw
the samples and their order. What differs, and is meant to: settings are picked on evaluation rows, as these are labelled,
and judged on test questions that no run trained on, by clean labels where they are known; never by the robust loss.

Each claim stands beside what was measured here and a verdict: "held" and "did not hold" only where the difference is beyond
chance (ranking.py says how), else "cannot be told". That two settings are *equal* can never be held.
"""

import platform
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import eval as evaluation
from convert import merge_checkpoint
from data import Ledger, read_truth, write_truth
from experiments import sweep
from experiments.ranking import QUARTERS, Result, Run, better, collect, conclusions, curves, table
from lora import is_adapter
from metrics.intervals import Estimate
from metrics.tables import decimal, markdown, percent
from prepare.rows import read_rows
from runtime.files import InputError, numbered_lines, read_json, write_jsonl, write_text
from runtime.settings import Dpo, Eval, Sweep

PARTS = (20, 30, 40, 54)
TABLE_3 = ({}, {"beta": 0.1}, {"mixture": 20})
CHOSEN = 40  # the report's mixture
SAMPLES = 1350  # drawn from each mixture, or fewer if the smallest has fewer
GRID = {"lr": (0.5, 1, 3, 5, 10), "beta": (0.05, 0.1, 0.3, 0.5), "eps": (0.0, 0.05, 0.1, 0.25)}  # lr: times the recipe's
ANSWERS = 300  # sampled, unless --samples says otherwise
FORMATS = ("fp32", "int8", "nf4", "fp4")  # in which the answers are scored


@dataclass
class Claim:
    """What the report or its authors said, what was measured here, and "held", "did not hold" or "cannot be told"."""

    said: str
    here: str
    verdict: str


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
    """With every seed: the run with the defaults, those on the other mixtures, and the three grids."""
    grid = GRID | {"lr": [float(f"{settings.lr * times:.3g}") for times in GRID["lr"]]}
    planned = sweep.plan(replace(settings, samples=0), grid, directory)  # answers come from `measure_answers`
    rows = read_rows(planned[0].settings.train, "pairs", "stop", Ledger())
    random.Random(settings.seed).shuffle(rows)
    samples = min(SAMPLES, round(len(rows) * PARTS[0] / PARTS[-1]))
    files = {}
    for part in PARTS:
        mixture = rows[: round(len(rows) * part / PARTS[-1])]  # each is the beginning of the next
        for seed in {run.settings.seed for run in planned}:
            drawn = random.Random(seed).sample(mixture, samples)
            path = Path(planned[0].settings.train).with_name(f"mixture-{part}-seed{seed}.jsonl")
            files[part, seed] = sweep.write_rows(path, drawn)

    steps = settings.max_steps or settings.epochs * -(-samples // settings.batch_size)
    quarter, made = max(1, steps // 4), []
    for run in planned:
        for part in (CHOSEN, *(part for part in PARTS if part != CHOSEN and not run.point)):
            point = run.point if part == CHOSEN else {"mixture": part}
            name = run.name if part == CHOSEN else run.name.replace("defaults", f"mixture={part}")
            one = replace(run.settings, name=name, train=files[part, run.settings.seed], eval_every=quarter)
            if point in TABLE_3:  # it keeps its checkpoints until they are measured
                one = replace(one, save_every=quarter, keep=1000)
            made.append(Run(name, point, one, quarters=point in TABLE_3))
    return made


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


def best(said: str, one: Result, others: list[Result], here: str = "") -> Claim:
    """The claim that a setting is better than each of the others; without `here` it shows the best of these beside it."""
    verdicts = {better(one.right, other.right) for other in others}
    verdict = next(verdict for verdict in ("did not hold", "cannot be told", "held") if verdict in verdicts)
    return Claim(said, here or f"{shown(one)}; {shown(max(others, key=lambda r: r.accuracy))}", verdict)


def shown(result: Result) -> str:
    """The accuracy of a setting on the test pairs, with the range of its seeds."""
    return f"{result.name} {spread(result.right)}"


def spread(right: Tensor) -> str:
    """Which pairs are ordered correctly, [seeds, E] -> "98.1% (97.9 to 98.3)": the mean over the seeds, and their range."""
    seeds = 100 * right.double().mean(dim=1)  # [seeds]
    return f"{seeds.mean():.1f}% ({seeds.min():.1f} to {seeds.max():.1f})"


def claims_about_settings(base: Dpo, results: list[Result]) -> list[Claim]:
    """The claims that compare settings; those whose runs all failed are left out."""
    by_name = {result.name: result for result in results}
    default = by_name["defaults"]
    start, tuned = ((default.baselines[name] == 1)[None] for name in ("starting model", "tuned model"))
    said = "Tuning raises the accuracy (Table 3: up to .744, by code that compares logits and labels one position apart)."
    here = f"right answer likelier: starting model {spread(start)}, tuned with the first seed {spread(tuned)}"
    made = [Claim(said, here, better(tuned, start))]

    ten = f"lr={float(f'{10 * base.lr:.3g}')}"
    sayings = {  # about the defaults, and all others of a grid or one setting
        "mixture": "The mixture of 40,000 is best (Table 1: it took this one, not the largest).",
        "lr": "lr = 1e-5, here the recipe's, is best (it took it for its steady curves).",
        "beta": 'beta = 0.3 is best (it took it as "the lowest value" of the loss).',
        "eps": "eps = 0.1 is best (it took it although its loss is not the lowest).",
        ten: "A learning rate of 1e-4, here ten times the recipe's, is too high (one of its theories).",
        "mixture=20": "The model of the 40,000 is better than that of the 20,000 (Table 3: .744 and .6292).",
        "beta=0.1": "With beta = 0.1 the model is as good (Table 3: .743 and .744); a test can only refute it.",
    }
    for name, said in sayings.items():
        others = [r for r in results if r.name == name or (set(r.point) == {name} and r.name != ten)]
        if others:
            made.append(best(said, default, others))
            if name == "beta=0.1" and made[-1].verdict == "held":  # better is not as good
                made[-1].verdict = "did not hold"

    lowest = min(results, key=lambda r: r.own_loss)
    here = f"lowest, {lowest.own_loss:.2f}: {shown(lowest)}; picked on evaluation rows: {shown(results[0])}"
    if others := [r for r in results if r is not lowest]:
        made.append(best("The lowest test loss names the best run (it reached -59, and -241).", lowest, others, here))
    if plain := by_name.get("eps=0.0"):
        robust = next((r for r in results if set(r.point) <= {"eps"} and r is not plain), default)
        here = f"{shown(plain)}; the eps > 0 picked on evaluation rows: {shown(robust)}"
        made.append(best("Assuming that labels are noisy helps (eps > 0).", robust, [plain], here))
    return made


def claims_about_training(default: Result) -> list[Claim]:
    """The claims about the course of the training, from the checkpoints of the run with the defaults."""
    first, *_, last = default.quarters
    here = "; ".join(f"{quarter:.0%}: {spread(right)}" for quarter, right in zip(QUARTERS, default.quarters, strict=True))
    verdicts = {better(earlier, last) for earlier in default.quarters[:-1]}  # is a checkpoint before the end better?
    overfits = "held" if "held" in verdicts else "did not hold" if verdicts == {"did not hold"} else "cannot be told"
    return [
        Claim("Later checkpoints are better (Table 3: .6306 at step 1,000, .744 at the end).", here, better(last, first)),
        Claim("Longer training overfits (another of its theories).", "the same checkpoints", overfits),
    ]


def claim_about_labels(flipped: list[bool]) -> list[Claim]:
    """`flipped`: of the pairs whose labels are known to be right or wrong, is it wrong?"""
    said = "The answer of ChatGPT is always the worse one (so it was labelled as rejected)."
    here = f"{sum(flipped)} of {len(flipped)} labels name the wrong answer"
    return [Claim(said, here, "did not hold" if any(flipped) else "held")] if flipped else []


def claims_about_answers(answers: dict[str, dict[str, Estimate]]) -> list[Claim]:
    """What became of the answers themselves. Neither claim is in the report: its authors' code and data have them."""
    before, after = answers["before"]["ends"], answers["after"]["ends"]
    said = (
        "After DPO the model barely ends its answers (its authors' words; their code taught two <|im_end|> and measured "
        "with one)."
    )
    here = f"answers that end: {percent(before)} before, {percent(after)} after"
    fewer = "held" if after.high < before.low else "did not hold" if after.low > 0.5 else "cannot be told"
    made = [Claim(said, here, fewer)]
    scores = {name: answers[name]["BLEU"] for name in FORMATS}
    here = "BLEU of greedy answers: " + ", ".join(f"{name} {decimal(score, 1)}" for name, score in scores.items())
    enough = 0.95 * scores["fp32"].value
    kept = all(score.low >= enough for score in scores.values())
    lost = any(score.high < enough for score in scores.values())
    said = (
        "Quantization costs at most 5% (a plan in the report; its later repository has BLEU .572 in full precision, .567 in "
        "int8, .565 and .544 in 4 bits)."
    )
    return [*made, Claim(said, here, "held" if kept else "did not hold" if lost else "cannot be told")]


# ---------------------------------------------------------------------------------------------------------- the report


def report(base: Dpo, runs: list[Run], results: list[Result], failed: dict[str, str], answers: dict) -> str:
    """report.md."""
    default = next(r for r in results if not r.point)
    truths = read_truth(runs[0].settings.train).values()
    flipped = [truth.flipped for truth in truths if truth.flipped is not None]
    claims = [
        *claims_about_settings(base, results),
        *claims_about_training(default),
        *claim_about_labels(flipped),
        *claims_about_answers(answers),
    ]
    pairs, seeds = sum(1 for _ in numbered_lines(runs[0].settings.train)), len({run.settings.seed for run in runs})
    flips = f", {sum(flipped) / len(flipped):.0%} of whose labels are flipped" if any(flipped) else ""
    methods = [answers[label]["right method"] for label in ("before", "after") if "right method" in answers[label]]
    graded = " Sampled answers with the right method: {} before, {} after.".format(*map(percent, methods)) if methods else ""
    labels = "clean labels" if "clean accuracy" in default.measures else "as labelled"

    def part(name: str) -> str:
        return table([r for r in results if set(r.point) <= {name}], base)

    parts = [
        "# The report again",
        f"Robust DPO of {base.model}: in every run {pairs:,} pairs{flips}, {base.epochs} epochs; "
        f"{default.right.shape[1]:,} test pairs of questions that no run saw. Defaults: lr {base.lr:g}, beta {base.beta}, "
        f"eps {base.eps}, nll-weight {base.nll_weight}, batches of {base.batch_size}. {len(results)} settings with {seeds} "
        f"seeds each on {base.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}.{graded}",
        "## What was said, and what happened here",
        f"Accuracy on the test pairs ({labels}): the mean over the seeds and, in brackets, their range. Of several others "
        "the best.",
        markdown(["said", "here", "verdict"], [[claim.said, claim.here, f"**{claim.verdict}**"] for claim in claims]),
        '"Held" and "did not hold": the difference is significant by McNemar\'s test on the same pairs, and the ranges of '
        'the seeds do not overlap. Else it "cannot be told".',
        "## Table 1: mixtures, with equally many samples from each",
        part("mixture"),
        "## Table 2: hyperparameters, one at a time",
        *(part(name) for name in GRID),
        "\n".join(f"- {line}" for line in conclusions([r for r in results if "mixture" not in r.point])),
        "## Table 3: models by checkpoints",
        f"Accuracy on the test pairs ({labels}) of the checkpoint at that step; the other tables show each run's best one.",
        markdown(
            ["model", *(f"{quarter:.0%} of its steps" for quarter in QUARTERS)],
            [[r.name, *map(spread, r.quarters)] for r in results if r.quarters is not None],
        ),
        "## Figure 2: the curves",
        "![Curves of all runs](figures/figure-2.png)",
        "The lowest row is what the report compared. Its curves of different beta and eps have different units.",
        *(f"Failed: {name}: {error}" for name, error in failed.items()),
    ]
    return "\n\n".join(parts) + "\n"
