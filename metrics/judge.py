"""A judge: the teacher's model says which of two answers is better, and is not believed where it contradicts itself.

Many judges prefer the first answer whatever it says (Zheng et al. 2023, "Judging LLM-as-a-judge"). So each pair of answers
is shown twice, in both orders:

    win            both times the same answer is better
    tie            both times neither is; two answers that are the same text are a tie, and nobody is asked
    inconsistent   anything else
    unjudged       the judge refused, or said nothing of use

The win rate is wins / (wins + losses), with Wilson's interval. How often the longer answer wins stands beside it: a judge
that likes length says little about truth.
"""

from collections.abc import Callable

from metrics.intervals import Estimate, share
from prepare.teacher import Request, judgement

Ask = Callable[[list[Request]], list[str | None]]


def outcome(forward: str | None, backward: str | None) -> str:
    """What two verdicts, "A", "B" or "tie", say of the answer that stood first in `forward` and second in `backward`."""
    if forward is None or backward is None:
        return "unjudged"
    return {("A", "B"): "win", ("B", "A"): "loss", ("tie", "tie"): "tie"}.get((forward, backward), "inconsistent")


def compare(questions: list[str], ours: list[str], theirs: list[str], ask: Ask) -> list[str]:
    """The outcome for each question, seen from `ours`. Pairs of answers that differ are shown in both orders."""
    pairs = [(q, a, b) for q, a, b in zip(questions, ours, theirs, strict=True) if a != b]
    verdicts = iter(ask([request for q, a, b in pairs for request in (judgement(q, a, b), judgement(q, b, a))]))
    return ["tie" if a == b else outcome(next(verdicts), next(verdicts)) for a, b in zip(ours, theirs, strict=True)]


def summary(outcomes: list[str], ours: list[str], theirs: list[str]) -> dict[str, Estimate | None]:
    """Win rate, shares of ties, contradictions and unjudged, and how often the text with more characters won (equal lengths
    count one half). None where there is nothing to count."""
    wins, losses = outcomes.count("win"), outcomes.count("loss")
    longer = [
        0.5 if len(a) == len(b) else float((len(a) > len(b)) == (o == "win"))
        for o, a, b in zip(outcomes, ours, theirs, strict=True)
        if o in ("win", "loss")
    ]
    made = {"win rate": share(wins, wins + losses) if longer else None}
    made |= {name: share(outcomes.count(name), len(outcomes)) for name in ("tie", "inconsistent", "unjudged")}
    return made | {"longer answer wins": share(sum(longer), len(longer)) if longer else None}
