"""What the report did or said, and whether it holds for the runs at hand.

Every claim stands beside what was measured here and a verdict: "held", "did not hold", or "cannot be told" where the
difference is within chance, by McNemar's test on the same test pairs (ranking.py) or by intervals that overlap.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from experiments.ranking import Result, cannot_tell, pick_eps
from experiments.sweep import Run
from metrics.intervals import Estimate, share
from metrics.tables import decimal, percent
from runtime.files import read_json
from runtime.settings import Config

FORMATS = ("fp32", "int8", "nf4", "fp4")  # in which the answers are scored
QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of a run's training, where its checkpoints are


@dataclass
class Claim:
    """What the report did or said, what was measured here, and whether it held."""

    text: str
    here: str
    verdict: str  # "held", "did not hold", "cannot be told"


def better(a: Result, b: Result) -> str:
    """Whether "a orders more test pairs rightly than b" held."""
    if cannot_tell(a.right, b.right):
        return "cannot be told"
    return "held" if a.right.double().mean() > b.right.double().mean() else "did not hold"


def accuracy_of(result: Result) -> str:
    return percent(result.right.double().mean().item())


def claims(base: Config, runs: list[Run], results: list[Result], extra: dict) -> list[Claim]:
    """Each claim with its evidence; settings whose runs failed are left out of it."""
    by_name = {result.name: result for result in results}
    default = by_name["defaults"]
    start, tuned = (
        replace(default, right=(default.baselines[name] == 1)[None]) for name in ("starting model", "tuned model")
    )
    made = [
        Claim(
            "Tuning raises the accuracy (Table 3: .744 and the like, measured without the shift by one; .80 to .85 by its "
            "trainer's own evaluation).",
            f"right answer likelier: starting model {accuracy_of(start)}, tuned {accuracy_of(tuned)}; by the reward "
            f"{accuracy_of(default)}",
            better(tuned, start),
        )
    ]
    sized = [r for r in results if "pairs" in r.point]
    if sized:
        smallest = min(sized, key=lambda r: r.point["pairs"])
        made.append(
            Claim(
                "A larger mixture is better (it compared 20,000, 30,000, 40,000 and 54,000 pairs).",
                f"{smallest.point['pairs']:,} pairs {accuracy_of(smallest)}, all {accuracy_of(default)}",
                better(default, smallest),
            )
        )
    made += [last_checkpoint(runs, default), *best_of_grids(base, results, default)]
    lowest, best = min(results, key=lambda r: r.own_loss), results[0]
    made.append(
        Claim(
            "The lowest robust test loss names the best run (it reached -59, and -241).",
            f"lowest, {lowest.own_loss:.2f}: {lowest.name}, {accuracy_of(lowest)}; best: {best.name}, {accuracy_of(best)}",
            "did not hold" if not cannot_tell(best.right, lowest.right) else "held",
        )
    )
    return [*made, *noise_claims(base, results), *answer_claims(extra)]


def last_checkpoint(runs: list[Run], default: Result) -> Claim:
    """Whether the end of training is better than its first quarter."""
    saved = checkpoints(runs[0])
    first, last = nearest(saved, QUARTERS[0]), nearest(saved, 1.0)
    n = default.right.shape[1]
    early, late = share(first * n, n), share(last * n, n)
    verdict = "held" if late.low > early.high else "did not hold" if late.high < early.low else "cannot be told"
    text = "Later checkpoints are better (Table 3 goes through them)."
    return Claim(text, f"first quarter {percent(early)}, end {percent(late)}", verdict)


def best_of_grids(base: Config, results: list[Result], default: Result) -> list[Claim]:
    """Whether the report's value of each hyperparameter is among the best of its grid."""
    made = []
    for name, theirs in (("lr", "1e-5, here the recipe's"), ("beta", "0.3"), ("eps", "0.1")):
        varied = [r for r in results if set(r.point) == {name}]
        if varied:
            best = max([default, *varied], key=lambda r: r.right.double().mean().item())
            value = best.point.get(name, getattr(base, name))
            verdict = "held" if cannot_tell(best.right, default.right) else "did not hold"
            here = f"{getattr(base, name)}: {accuracy_of(default)}; best {value}: {accuracy_of(best)}"
            made.append(Claim(f"{name} = {theirs} is the best of its grid.", here, verdict))
    return made


def noise_claims(base: Config, results: list[Result]) -> list[Claim]:
    """Whether the robust loss needs its eps."""
    picked, plain = pick_eps(results, base), next((r for r in results if r.point == {"eps": 0.0}), None)
    if picked is None or plain is None:
        return []
    eps, rate = picked.point.get("eps", base.eps), results[0].measures.get("flip rate")
    here = f"eps 0: {accuracy_of(plain)}; eps {eps}: {accuracy_of(picked)}; flip rate by the margins {percent(rate)}"
    return [Claim("Assuming that labels are noisy helps (eps > 0).", here, better(picked, plain))]


def answer_claims(extra: dict) -> list[Claim]:
    """What became of the answers themselves."""
    before, after = (Estimate(**extra[f"ends, {label}"]) for label in ("before", "after"))
    verdict = "held" if after.high < before.low else "did not hold"
    text = "After DPO the model barely ends its answers (its trainer supervised two <|im_end|>, its evaluation one)."
    made = [Claim(text, f"answers that end: {percent(before)} before, {percent(after)} after", verdict)]
    scores = {name: Estimate(**extra[f"format {name}"]["BLEU"]) for name in FORMATS}
    full = scores["fp32"].value
    here = ", ".join(f"{name} {decimal(score, 1)}" for name, score in scores.items())
    kept = all(score.value >= 0.95 * full for score in scores.values())
    text = "Quantization costs little: BLEU .572 in full precision, .567 in int8, .565 and .544 in 4 bits (at most 5% less)."
    return [*made, Claim(text, f"BLEU of greedy answers: {here}", "held" if kept else "did not hold")]


def checkpoints(run: Run) -> dict[float, float]:
    """{share of the training: accuracy on the test} of every checkpoint that was measured."""
    record = read_json(Path(run.config.out) / run.name / "test.json").get("checkpoints", {})
    steps = {int(step): value for step, value in record.items()}
    return {step / max(steps): value for step, value in sorted(steps.items())}


def nearest(saved: dict[float, float], part: float) -> float:
    return saved[min(saved, key=lambda done: abs(done - part))]
