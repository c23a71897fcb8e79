"""The runs of a sweep, ranked: what may be compared, what may not, and which differences are chance.

**What ranks**: the accuracy on clean labels where they are known (the demo), else the debiased accuracy, with one flip rate
for all runs. **What does not**: the robust loss. It falls without bound as a run diverges, and its scale depends on beta and
eps, so the lowest one names the most divergent run.

McNemar's test (1947) compares two settings by the test pairs that only one of them orders correctly, b for one and c for the
other. If both were equally good, each such pair would favour either with probability 1/2; they differ significantly if a
split this uneven has a probability below 5%. Settings that do not differ significantly from the best are marked. The test
knows the chance in the choice of test pairs, not the chance in training, which --seeds shows; and the best of many settings
was a little lucky.

**Which eps?** With noisy labels a range of eps orders pairs equally well. Among those that do not differ significantly from
the best, the pick is the one nearest to the flip rate that the best run's margins show (`intervals.estimate_flip_rate`).
"""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import dpo
from metrics.intervals import Estimate, debiased, estimate_flip_rate, mean, share
from metrics.preferences import for_the_right
from metrics.tables import decimal, markdown, percent
from runtime.files import picture, read_json, write_json, write_text
from runtime.runs import read_metrics
from runtime.settings import Dpo


@dataclass
class Run:
    """One training run of a sweep."""

    name: str
    point: dict  # {flag: value} where it differs from the defaults
    settings: Dpo
    checkpoints: bool = False  # measure all of them on the test rows, not just the best one

    @property
    def directory(self) -> Path:
        return Path(self.settings.out) / self.name

    @property
    def test(self) -> Path:
        """The test rows, the same for all runs of a sweep."""
        return Path(self.settings.out) / "data" / "test.jsonl"


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
    best_steps: list[int]
    seconds: float
    tied: bool = False  # does not differ significantly from the best

    @property
    def accuracy(self) -> float:
        """Share of the test pairs that are ordered correctly, a mean over the seeds."""
        return self.right.double().mean().item()


def collect(runs: list[Run], base: Dpo) -> tuple[list[Result], dict[str, str]]:
    """The finished settings, best first, and {run: error} of those that failed."""
    grouped: dict[str, list[Run]] = {}
    failed = {}
    for run in runs:
        where = run.directory
        if (where / "test.json").exists():
            grouped.setdefault(point_name(run.point), []).append(run)
        elif (where / "failed.json").exists():
            failed[run.name] = read_json(where / "failed.json")["error"]
    results = [summarise(name, part, base) for name, part in grouped.items()]
    results.sort(key=lambda result: -result.accuracy)
    for result in results:
        result.tied = cannot_tell(results[0].right, result.right)
    return results, failed


def summarise(name: str, runs: list[Run], base: Dpo) -> Result:
    """Measures of one setting, means over its seeds; intervals count every test pair once, however many seeds there are."""
    stored = [load_file(run.directory / "margins.safetensors") for run in runs]
    records = [read_json(run.directory / "test.json") for run in runs]
    margin = torch.stack([part["margin"] for part in stored])  # [seeds, E]
    flipped, n = stored[0]["flipped"], margin.shape[1]

    def credit(score: Tensor) -> Tensor:
        """1 where a score speaks for the right answer, 1/2 where it is a tie."""
        return (for_the_right(score, flipped).sign() + 1) / 2

    right = credit(margin) == 1  # [seeds, E]
    baselines = {
        "longer answer": credit(stored[0]["longer"]),
        "starting model": credit(stored[0]["reference"]),
        "tuned model": credit(stored[0]["reference"] + margin[0]),
    }
    raw = share((margin > 0).double().mean().item() * n, n)
    measures = {"reward accuracy": raw, "debiased": debiased(raw, base.eps or 0.0)}
    if records[0]["labels known"]:
        measures["clean"] = share(right.double().mean().item() * n, n)
    measures["margin"] = mean(margin.mean(dim=0))
    measures["DPO loss"] = mean(dpo.sigmoid_loss(base.beta * margin).mean(dim=0))
    if margin[0].any():
        measures["flip rate"] = estimate_flip_rate(margin[0])
    own_loss = sum(record["own loss"] for record in records) / len(records)
    seconds = sum(record["seconds"] for record in records)
    steps = [record["best step"] for record in records]
    return Result(name, runs[0].point, right, baselines, measures, own_loss, steps, seconds)


def cannot_tell(right: Tensor, other: Tensor) -> bool:
    """Whether McNemar's exact test at 95% finds no difference between two settings: which test pairs each orders correctly,
    [seeds, E]. With several seeds, each test pair counts once, for the setting that got it right in more seeds."""
    gap = right.double().mean(dim=0) - other.double().mean(dim=0)  # [E]
    b, c = int((gap > 0).sum()), int((gap < 0).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))  # of 2^(b+c) equally likely splits, on one side
    return 40 * tail > 2 ** (b + c)  # 2 tail / 2^(b+c) > 0.05, in whole numbers


def pick_eps(results: list[Result], base: Dpo) -> Result | None:
    """Among the settings that differ in eps alone and do not differ significantly from the best of them, the one whose eps
    is nearest to the flip rate that the best one's margins show; None if eps was not varied, or all margins are 0."""
    varied = [r for r in results if set(r.point) <= {"eps"}]
    if len(varied) < 2 or "flip rate" not in varied[0].measures:
        return None
    rate = varied[0].measures["flip rate"].value
    tied = [r for r in varied if cannot_tell(varied[0].right, r.right)]
    return min(tied, key=lambda r: abs(r.point.get("eps", base.eps) - rate))


# ------------------------------------------------------------------------------------------------------------ the report


def table(results: list[Result], base: Dpo) -> str:
    """The settings, best first."""
    clean = all("clean" in r.measures for r in results)
    several = max(len(r.right) for r in results) > 1
    header = ["setting", "", *(["clean accuracy"] if clean else []), *(["of seeds"] if several else [])]
    header += [f"debiased, eps {base.eps or 0:g}", "as labelled", "margin, nats", f"DPO loss, beta {base.beta}"]
    header += ["own loss (not comparable)", "best step", "s"]
    rows = []
    for i, r in enumerate(results):
        seeds = r.right.double().mean(dim=1)
        mark = "best" if i == 0 else "=" if r.tied else ""
        cells = [shown_name(r, results, base), mark, *([percent(r.measures["clean"])] if clean else [])]
        cells += [f"{100 * seeds.min():.1f} to {100 * seeds.max():.1f}%"] if several else []
        cells += [percent(r.measures[name]) for name in ("debiased", "reward accuracy")]
        cells += [decimal(r.measures["margin"], 2), decimal(r.measures["DPO loss"]), f"({r.own_loss:.3f})"]
        rows.append([*cells, "/".join(map(str, r.best_steps)), f"{r.seconds:.0f}"])
    return markdown(header, rows)


def shown_name(result: Result, results: list[Result], base: Dpo) -> str:
    """The setting; of the defaults, and of a full grid's settings, the values of all flags that are varied."""
    varied = dict.fromkeys(name for r in results for name in r.point if name not in ("train", "pairs"))
    if result.point and all(len(r.point) < 2 for r in results):
        return result.name
    values = ", ".join(f"{name}={result.point.get(name, getattr(base, name))}" for name in varied)
    return values if result.point else f"defaults ({values})" if values else "defaults"


def conclusions(results: list[Result], base: Dpo) -> list[str]:
    """What the table says, in sentences."""
    best, pairs = results[0], results[0].right.shape[1]
    tied = [r.name for r in results[1:] if r.tied]
    kind = "clean" if "clean" in best.measures else "debiased"
    equal = f"Not significantly worse (=, McNemar, 95%): {', '.join(tied)}."
    lines = [
        f"Best by {kind} accuracy on {pairs:,} test pairs: {best.name}, {percent(best.measures[kind])}. "
        + (equal if tied else "All others are significantly worse.")
    ]
    longer, start, tuned = (percent(credit.double().mean().item()) for credit in best.baselines.values())
    lines.append(
        f"To compare with: the longer answer is the right one in {longer} of the pairs; the right answer is likelier "
        f"to the starting model in {start}, to the best tuned one in {tuned}. (The table's accuracies are of rewards: how "
        "much likelier tuning made an answer.)"
    )
    if "flip rate" in best.measures:
        lines.append(f"Flip rate of the test labels, by its margins: {percent(best.measures['flip rate'])}.")
    picked = pick_eps(results, base)
    if picked:
        eps = picked.point.get("eps", base.eps)
        lines.append(
            f"eps = {eps} is picked: of those that are not significantly worse than the best, the nearest to that rate."
        )
    lowest = min(results, key=lambda r: r.own_loss)
    lines.append(
        f"The lowest own loss, {lowest.own_loss:.3f}, would pick {lowest.name} ({percent(lowest.measures[kind])}). It is "
        "not comparable: a robust loss has no lower bound and changes its scale with beta and eps, so it names the run that "
        "moved furthest from the reference, not the one that orders pairs best."
    )
    return lines


def report_sweep(sweep: Path, runs: list[Run], base: Dpo) -> int:
    """Writes and prints sweep.md, sweep.json and the curves; 0, or 2 if a run failed."""
    results, failed = collect(runs, base)
    failures = [f"{name} failed: {error}" for name, error in failed.items()]
    lines = [f"- {line}" for line in (*(conclusions(results, base) if results else []), *failures)]
    text = "\n\n".join([*([table(results, base)] if results else []), "\n".join(lines)])
    rows = [
        {
            "setting": r.name,
            "point": r.point,
            "tied with the best": r.tied,
            "own loss, not comparable": r.own_loss,
            "best steps": r.best_steps,
            "seconds": r.seconds,
            **{name: asdict(estimate) for name, estimate in r.measures.items()},
        }
        for r in results
    ]
    write_json(sweep / "sweep.json", {"base": asdict(base), "results": rows, "failed": failed})
    write_text(sweep / "sweep.md", f"{text}\n\n![Curves](figures/curves.png)\n")
    if results:
        curves([run for run in runs if run.name not in failed], sweep / "figures" / "curves.png")
    print(f"\n{text}\n\nWritten to {sweep}/: sweep.md, sweep.json, figures/curves.png; a directory a run.")
    print(f"Every curve: tensorboard --logdir {sweep}")
    return 2 if failed else 0


CURVES = {  # metric: (label, title)
    "eval_rewards/accuracies": ("reward accuracy, as labelled", "held out"),
    "eval_dpo_loss": ("DPO loss without eps (nats)", "held out, at each run's own beta"),
    "eval_preference_loss": ("own loss (nats)", "held out; not comparable across beta and eps"),
}


def plot_metric(axis: Any, run: Run, metric: str, **look: Any) -> None:
    """A metric of a run over its steps."""
    points = [(row["step"], row[metric]) for row in read_metrics(run.directory) if metric in row]
    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run.name, **look)


def curves(runs: list[Run], path: Path) -> None:
    """The held-out curves of all runs in one figure."""
    import matplotlib

    colours = matplotlib.colormaps["turbo"]
    with picture(path, columns=len(CURVES), size=(16, 4.2)) as axes:
        for n, run in enumerate(runs):
            for axis, metric in zip(axes, CURVES, strict=True):
                plot_metric(axis, run, metric, color=colours((n + 0.5) / len(runs)))
        for axis, (label, title) in zip(axes, CURVES.values(), strict=True):
            axis.set(xlabel="optimizer step", ylabel=label, title=title)
        axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
