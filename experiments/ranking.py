"""The runs of a sweep, ranked: what may be compared, what may not, and which differences are chance.

**What picks**: the reward accuracy on evaluation rows, as they are labelled, wrong labels included: all that a user has.
**What judges**: the accuracy on test pairs that no run saw, by clean labels where they are known (the demo), else debiased,
with one flip rate for all runs. **What does neither**: the robust loss. It falls without bound as margins run away, and its
scale depends on beta and eps.

Two settings differ if two kinds of chance are ruled out. McNemar's test (1947) is about the choice of test pairs: it counts
those that only one of the settings orders correctly, b for one and c for the other. If both were equally good, each such
pair would favour either with probability 1/2; a split this uneven must have a probability below 5%. And the ranges over the
seeds may not overlap, for training is chance, too: with three seeds each, two equally good settings have ranges that do
not overlap in 1 of 10 cases. With one seed, the second kind of chance is not seen.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metrics.intervals import Estimate
from metrics.preferences import for_the_right, measure_rewards
from metrics.tables import decimal, markdown, percent
from runtime.files import picture, read_json, write_text
from runtime.runs import read_metrics
from runtime.settings import Dpo

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of a run's training
ACCURACY = "eval_rewards/accuracies"


@dataclass
class Run:
    """One training run of a sweep."""

    name: str
    point: dict  # {flag: value} where it differs from the defaults
    settings: Dpo
    quarters: bool = False  # measure it after each of QUARTERS, too

    @property
    def directory(self) -> Path:
        return Path(self.settings.out) / self.name

    @property
    def test(self) -> Path:
        """The test rows, the same for all runs of a sweep."""
        return Path(self.settings.out) / "data" / "test.jsonl"

    @property
    def tested(self) -> Path:
        """What was measured on them; a run that has it is finished."""
        return self.directory / "tested.json"


def point_name(point: dict) -> str:
    """A name that can be a directory's: "defaults", "beta=0.1", "train=mixture-a" for a file of that stem."""
    shown = [f"{name}={Path(value).stem if name == 'train' else value}" for name, value in point.items()]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(shown)) or "defaults"


@dataclass
class Result:
    """One setting, over its seeds."""

    name: str
    point: dict
    right: Tensor  # [seeds, E] which test pairs are ordered correctly, by their clean labels where these are known
    baselines: dict[str, Tensor]  # [E] 1, 1/2 or 0: is the longer answer, or the likelier one, the right one
    measures: dict[str, Estimate]
    own_loss: float
    validation: float  # reward accuracy on the evaluation rows, as labelled
    quarters: Tensor | None = None  # [4, seeds, E] as `right`, after each quarter of the training

    @property
    def accuracy(self) -> float:
        """Share of the test pairs that are ordered correctly, a mean over the seeds."""
        return self.right.double().mean().item()


def collect(runs: list[Run], base: Dpo) -> list[Result]:
    """The settings that have a finished run, in the order in which their evaluation rows put them."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        if run.tested.exists():
            grouped.setdefault(point_name(run.point), []).append(run)
    results = [summarise(name, part, base) for name, part in grouped.items()]
    return sorted(results, key=lambda result: -result.validation)


def summarise(name: str, runs: list[Run], base: Dpo) -> Result:
    """Measures of one setting, means over its seeds; intervals count every test pair once, however many seeds there are."""
    records = [read_json(run.tested) for run in runs]
    margin = torch.tensor([record["margin"] for record in records])  # [seeds, E]
    reference, longer = (torch.tensor(records[0][key]) for key in ("reference", "longer"))  # [E], [E]
    known = records[0]["flipped"]
    flipped = None if known is None else torch.tensor(known)  # [E]

    def credit(score: Tensor) -> Tensor:
        """1 where a score speaks for the right answer, 1/2 where it is a tie."""
        return (for_the_right(score, flipped).sign() + 1) / 2

    right = for_the_right(margin, flipped) > 0  # [seeds, E]
    scores = {"longer answer": longer, "starting model": reference, "tuned model": reference + margin[0]}
    measures = measure_rewards(margin, flipped, base.eps or 0.0, base.beta)
    own_loss, validation = (sum(record[key] for record in records) / len(records) for key in ("own loss", "validation"))
    credits = {key: credit(score) for key, score in scores.items()}
    quarters = torch.tensor([record["quarters"] for record in records]).transpose(0, 1) if runs[0].quarters else None
    return Result(name, runs[0].point, right, credits, measures, own_loss, validation, quarters)


def better(right: Tensor, other: Tensor) -> str:
    """Whether "the first setting orders more test pairs correctly than the second" "held", "did not hold" or "cannot be
    told": the ranges of their seeds overlap, or McNemar's exact test at 95% finds no difference. Arguments: which pairs each
    orders correctly, [seeds, E]. With several seeds, the test counts each pair once, for the setting that got it right in
    more seeds."""
    one, two = right.double().mean(dim=1), other.double().mean(dim=1)  # [seeds]
    overlap = one.min() <= two.max() and two.min() <= one.max()
    gap = right.double().mean(dim=0) - other.double().mean(dim=0)  # [E]
    b, c = int((gap > 0).sum()), int((gap < 0).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))  # of 2^(b+c) equally likely splits, on one side
    if overlap or 40 * tail > 2 ** (b + c):  # 2 tail / 2^(b+c) > 0.05, in whole numbers
        return "cannot be told"
    return "held" if one.min() > two.max() else "did not hold"


# ------------------------------------------------------------------------------------------------------------ the report

MARKS = {"held": "worse", "did not hold": "better", "cannot be told": "="}  # of a setting that the picked one is better than


def table(results: list[Result], base: Dpo) -> str:
    """The settings, in the order of their evaluation rows; all other columns are of the test pairs."""
    varied = dict.fromkeys(name for r in results for name in r.point if name in vars(base) and name != "train")
    values = ", ".join(f"{name}={getattr(base, name)}" for name in varied)
    defaults = f"defaults ({values})" if values else "defaults"
    rows = []
    for i, r in enumerate(results):
        seeds = 100 * r.right.double().mean(dim=1)  # [seeds]
        row = {
            "setting": r.name if r.point else defaults,
            "evaluation": percent(r.validation),
            "on test pairs": MARKS[better(results[0].right, r.right)] if i else "picked",
            "clean accuracy": percent(r.measures.get("clean accuracy")),
            "of seeds": f"{seeds.min():.1f} to {seeds.max():.1f}%" if len(seeds) > 1 else "-",
            f"debiased, eps {base.eps or 0:g}": percent(r.measures["debiased accuracy"]),
            "as labelled": percent(r.measures["reward accuracy"]),
            "margin, nats": decimal(r.measures["margin"], 2),
            f"DPO loss, beta {base.beta}": decimal(r.measures["DPO loss"]),
            "own loss (not comparable)": f"({r.own_loss:.3f})",
        }
        rows.append(row)
    columns = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    return markdown(columns, [[row[name] for name in columns] for row in rows])


def conclusions(results: list[Result]) -> list[str]:
    """What the table says, in sentences."""
    picked, pairs = results[0], results[0].right.shape[1]
    marks: dict[str, list[str]] = {}
    for r in results[1:]:
        marks.setdefault(MARKS[better(picked.right, r.right)], []).append(r.name)
    others = "; ".join(f"{mark}: {', '.join(names)}" for mark, names in marks.items()) or "none"
    kind = "clean accuracy" if "clean accuracy" in picked.measures else "debiased accuracy"
    longer, start, tuned = (percent(credit.double().mean().item()) for credit in picked.baselines.values())
    lines = [
        f"Picked by the accuracy on evaluation rows, as labelled: {picked.name}. On {pairs:,} test pairs: {kind} "
        f"{percent(picked.measures[kind])}. The others, beside it: {others} (=: no significant difference).",
        f"To compare with: the longer answer is the right one in {longer} of the test pairs; the right answer is likelier "
        f"to the starting model in {start}, to the picked one in {tuned}. (The table's accuracies are of rewards: how much "
        "likelier tuning made an answer.)",
    ]
    if "flip rate" in picked.measures:
        rate = percent(picked.measures["flip rate"])
        lines.append(f"Flip rate of the test labels by its margins, if flips do not depend on the pair: {rate}.")
    lowest = min(results, key=lambda r: r.own_loss)
    lines.append(
        f"The lowest own loss, {lowest.own_loss:.3f}, would pick {lowest.name} ({percent(lowest.measures[kind])}). It is "
        "not comparable: a robust loss has no lower bound and changes its scale with beta and eps, so it says how far "
        "margins ran, not how well pairs are ordered."
    )
    return lines


def report_sweep(sweep: Path, runs: list[Run], base: Dpo, failed: dict[str, str]) -> int:
    """Writes and prints sweep.md and the curves; 0, or 2 if a run failed."""
    results = collect(runs, base)
    lines = [
        *(conclusions(results) if results else []),
        *(f"{name} failed: {error}" for name, error in failed.items()),
    ]
    text = "\n\n".join([*([table(results, base)] if results else []), "\n".join(f"- {line}" for line in lines)])
    write_text(sweep / "sweep.md", f"{text}\n\n![Curves](figures/curves.png)\n")
    curves(runs, sweep / "figures" / "curves.png")
    print(f"\n{text}\n\nWritten to {sweep}/: sweep.md, figures/curves.png. Every curve: tensorboard --logdir {sweep}")
    return 2 if failed else 0


CURVES = {  # on evaluation rows
    ACCURACY: "reward accuracy, as labelled",
    "eval_dpo_loss": "DPO loss without eps,\nat the run's own beta (nats)",
    "eval_preference_loss": "own loss, not comparable\nacross beta and eps (nats)",
}


def curves(runs: list[Run], path: Path) -> None:
    """The curves of all finished runs on their evaluation rows: a row for each metric, a column for each flag that is
    varied, a colour for each setting."""
    finished = [run for run in runs if run.tested.exists()]
    flags = list(dict.fromkeys(name for run in finished for name in run.point)) or [""]
    cells = [(metric, flag) for metric in CURVES for flag in flags]
    with picture(path, columns=len(flags), rows=len(CURVES), size=(4.5 * len(flags), 3.5 * len(CURVES))) as axes:
        for axis, (metric, flag) in zip(axes, cells, strict=True):
            colours: dict[str, str] = {}
            for run in finished:
                if set(run.point) <= {flag}:
                    setting = point_name(run.point)
                    label = None if setting in colours else setting  # one entry for all its seeds
                    colour = colours.setdefault(setting, f"C{len(colours)}")
                    points = [(row["step"], row[metric]) for row in read_metrics(run.directory) if metric in row]
                    axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
            axis.set(xlabel="optimizer step", ylabel=CURVES[metric], title=f"{flag}, evaluation rows".lstrip(", "))
            if colours:
                axis.legend(fontsize=7)
