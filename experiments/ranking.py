"""The runs of a sweep, ranked: what may be compared, what may not, and what the test pairs cannot tell apart.

**What ranks**: the accuracy on clean labels where they are known (the demo), else the debiased accuracy, with one flip rate
for all runs. **What does not**: the robust loss. It falls without bound as a run diverges, and its scale depends on beta and
eps, so the lowest one names the most divergent run.

Two settings are told apart by the test pairs that just one of them orders rightly, b and c of them (McNemar 1947). Were they
equally good, each such pair would favour either with probability 1/2; they differ if so uneven a split, or a worse one, is
less likely than 5%. Settings that cannot be told from the best are marked. The test sees the chance of the test pairs, not
that of training, which --seeds shows; and the best of many is a little lucky.

**Which eps?** With noisy labels a range of eps orders pairs equally well. Among those that cannot be told from the best, the
pick is the one nearest to the flip rate that the best run's margins show (`intervals.estimate_flip_rate`).
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from experiments.sweep import Run, point_name
from metrics.intervals import Estimate, debiased, estimate_flip_rate, mean, share
from metrics.tables import decimal, markdown, percent, picture
from runtime.files import read_json, write_json, write_text
from runtime.runs import read_metrics
from runtime.settings import Config


@dataclass
class Result:
    """One setting, over its seeds."""

    name: str
    point: dict
    right: Tensor  # [seeds, E] which test pairs are ordered as the labels (clean ones, where known) say
    baselines: dict[str, Tensor]  # [E] 1, 1/2 or 0: is the longer answer, or the likelier one, the right one
    measures: dict[str, Estimate]
    own_loss: float
    best_steps: list[int]
    seconds: float
    alike: bool = False  # cannot be told from the best


def collect(runs: list[Run], base: Config) -> tuple[list[Result], dict[str, str]]:
    """The finished settings, best first, and {run: error} of those that failed."""
    grouped: dict[str, list[Run]] = {}
    failed = {}
    for run in runs:
        where = Path(run.config.out) / run.name
        if (where / "test.json").exists():
            grouped.setdefault(point_name(run.point), []).append(run)
        elif (where / "failed.json").exists():
            failed[run.name] = read_json(where / "failed.json")["error"]
    results = [summarise(name, part, base) for name, part in grouped.items()]
    results.sort(key=lambda result: -result.right.double().mean().item())
    for result in results:
        result.alike = cannot_tell(results[0].right, result.right)
    return results, failed


def summarise(name: str, runs: list[Run], base: Config) -> Result:
    """Measures of one setting, means over its seeds; intervals count every test pair once, however many seeds there are."""
    stored = [load_file(Path(run.config.out) / run.name / "margins.safetensors") for run in runs]
    records = [read_json(Path(run.config.out) / run.name / "test.json") for run in runs]
    margin = torch.stack([part["margin"] for part in stored])  # [seeds, E]
    flipped, n = stored[0]["flipped"], margin.shape[1]

    def credit(score: Tensor) -> Tensor:
        """1 where a score speaks for the right answer, 1/2 where it is a tie."""
        return (torch.where(flipped, -score, score).sign() + 1) / 2

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
    measures["DPO loss"] = mean(F.softplus(-base.beta * margin).mean(dim=0))
    if margin[0].any():
        measures["flip rate"] = estimate_flip_rate(margin[0])
    own_loss = sum(record["own loss"] for record in records) / len(records)
    seconds = sum(record["seconds"] for record in records)
    steps = [record["best step"] for record in records]
    return Result(name, runs[0].point, right, baselines, measures, own_loss, steps, seconds)


def cannot_tell(right: Tensor, other: Tensor) -> bool:
    """McNemar's exact test, 95%, on which test pairs two settings order rightly, [seeds, E] each. With several seeds a pair
    speaks once, for the setting that orders it rightly in more of them."""
    gap = right.double().mean(dim=0) - other.double().mean(dim=0)  # [E]
    b, c = int((gap > 0).sum()), int((gap < 0).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))  # of 2^(b+c) equally likely splits, on one side
    return 40 * tail > 2 ** (b + c)  # 2 tail / 2^(b+c) > 0.05, in whole numbers


def pick_eps(results: list[Result], base: Config) -> Result | None:
    """Of the settings that differ in eps alone and cannot be told from the best of them, the one whose eps is nearest to the
    flip rate that the best one's margins show; None if eps was not varied, or all margins are 0."""
    varied = [r for r in results if set(r.point) <= {"eps"}]
    if len(varied) < 2 or "flip rate" not in varied[0].measures:
        return None
    rate = varied[0].measures["flip rate"].value
    alike = [r for r in varied if cannot_tell(varied[0].right, r.right)]
    return min(alike, key=lambda r: abs(r.point.get("eps", base.eps) - rate))


# ------------------------------------------------------------------------------------------------------------ the report


def table(results: list[Result], base: Config) -> str:
    """The settings, best first."""
    clean = all("clean" in r.measures for r in results)
    several = max(len(r.right) for r in results) > 1
    header = ["setting", "", *(["clean accuracy"] if clean else []), *(["of seeds"] if several else [])]
    header += [f"debiased, eps {base.eps or 0:g}", "as labelled", "margin, nats", f"DPO loss, beta {base.beta}"]
    header += ["own loss (not comparable)"]
    header += ["best step", "s"]
    rows = []
    for i, r in enumerate(results):
        seeds = r.right.double().mean(dim=1)
        mark = "best" if i == 0 else "=" if r.alike else ""
        cells = [shown_name(r, results, base), mark, *([percent(r.measures["clean"])] if clean else [])]
        cells += [f"{100 * seeds.min():.1f} to {100 * seeds.max():.1f}%"] if several else []
        cells += [percent(r.measures[name]) for name in ("debiased", "reward accuracy")]
        cells += [decimal(r.measures["margin"], 2), decimal(r.measures["DPO loss"]), f"({r.own_loss:.3f})"]
        rows.append([*cells, "/".join(map(str, r.best_steps)), f"{r.seconds:.0f}"])
    return markdown(header, rows)


def shown_name(result: Result, results: list[Result], base: Config) -> str:
    """The setting; of the defaults, and of a full grid's settings, the values of all flags that are varied."""
    varied = dict.fromkeys(name for r in results for name in r.point if name not in ("train", "pairs"))
    if result.point and all(len(r.point) < 2 for r in results):
        return result.name
    values = ", ".join(f"{name}={result.point.get(name, getattr(base, name))}" for name in varied)
    return values if result.point else f"defaults ({values})" if values else "defaults"


def conclusions(results: list[Result], base: Config) -> list[str]:
    """What the table says, in sentences."""
    best, pairs = results[0], results[0].right.shape[1]
    alike = [r.name for r in results[1:] if r.alike]
    kind = "clean" if "clean" in best.measures else "debiased"
    lines = [
        f"Best by {kind} accuracy on {pairs:,} test pairs: {best.name}, {percent(best.measures[kind])}. "
        + (f"These cannot be told from it (=, McNemar, 95%): {', '.join(alike)}." if alike else "No other equals it.")
    ]
    ruler, start, tuned = (percent(credit.double().mean().item()) for credit in best.baselines.values())
    lines.append(
        f"To compare with: the longer answer is the right one in {ruler} of the pairs; the right answer is the likelier one "
        f"to the starting model in {start}, to the best tuned one in {tuned}. (The table's accuracies are of rewards: how "
        "much likelier tuning made an answer.)"
    )
    if "flip rate" in best.measures:
        lines.append(f"Flip rate of the test labels, by its margins: {percent(best.measures['flip rate'])}.")
    picked = pick_eps(results, base)
    if picked:
        eps = picked.point.get("eps", base.eps)
        lines.append(f"eps = {eps} is picked: of those that cannot be told from the best, the nearest to that rate.")
    lowest = min(results, key=lambda r: r.own_loss)
    lines.append(
        f"The lowest own loss, {lowest.own_loss:.3f}, would pick {lowest.name} ({percent(lowest.measures[kind])}). It is "
        "not comparable: a robust loss has no lower bound and changes its scale with beta and eps, so it names the run that "
        "moved furthest from the reference, not the one that orders pairs best."
    )
    return lines


def report_sweep(sweep: Path, runs: list[Run], base: Config) -> int:
    """Writes and prints sweep.md, sweep.json and the curves; 0, or 2 if a run failed."""
    results, failed = collect(runs, base)
    failures = [f"{name} failed: {error}" for name, error in failed.items()]
    lines = [f"- {line}" for line in (*(conclusions(results, base) if results else []), *failures)]
    text = "\n\n".join([*([table(results, base)] if results else []), "\n".join(lines)])
    rows = [
        {
            "setting": r.name,
            "point": r.point,
            "alike best": r.alike,
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


def curves(runs: list[Run], path: Path) -> None:
    """The held-out curves of all runs in one figure."""
    import matplotlib

    colours = matplotlib.colormaps["turbo"]
    with picture(path, columns=len(CURVES), size=(16, 4.2)) as axes:
        for n, run in enumerate(runs):
            rows = read_metrics(Path(run.config.out) / run.name)
            for axis, metric in zip(axes, CURVES, strict=True):
                points = [(row["step"], row[metric]) for row in rows if metric in row]
                colour = colours((n + 0.5) / len(runs))
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=run.name)
        for axis, (label, title) in zip(axes, CURVES.values(), strict=True):
            axis.set(xlabel="optimizer step", ylabel=label, title=title)
        axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
