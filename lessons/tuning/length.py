"""How much of a preference is just length?

In 93% of the report's 2,443 pairs from MMLU-STEM the chosen answer is the longer one, so a model that has only learned to
like long answers looks good. The pairs of this lesson are nothing but lengths: a chosen answer is an explanation of about
600 characters, a rejected one a short reply of about 200. For one question in sixteen it is the other way round: a reply
of about 150 is right, an attempt of about 250 is wrong. Three sets are compared,

    all pairs
    sign matched      as many pairs whose chosen answer is the longer one as pairs whose rejected answer is
    matched in bins   the same within bins of the difference and of the longer answer's length (prepare/mixture.py)

by two scores: "the longer answer wins", and a logistic regression that sees the two lengths alone, each time on questions
that it was not fitted on (prepare/giveaways.py). If lengths say nothing, both score 50%. The second one finds what matching
the signs leaves: sizes that go with one winner. Of the report's own pairs it finds 93%, 87% and 49% (docs/data.md).
"""

from collections import Counter
from pathlib import Path

import torch

from lessons.lesson import Claim, print_table
from metrics.intervals import Estimate, mean
from prepare.giveaways import by_length, longer_wins
from prepare.mixture import BIN, gap, match_lengths
from runtime.files import picture

PAIRS = 2443  # as many as the report's
SEEDS = 10
RARE = 1 / 16  # share of questions whose right answer is the shorter one as a rule


def draw_pairs(seed: int) -> list[dict]:
    """Pairs whose answers are blanks, of the lengths that the head of this file describes."""
    generator = torch.Generator().manual_seed(seed)
    rare = torch.rand(PAIRS, generator=generator) < RARE
    medians = torch.where(rare[:, None], torch.tensor([150.0, 250.0]), torch.tensor([600.0, 200.0]))  # [PAIRS, 2]
    lengths = (medians * (0.4 * torch.randn(PAIRS, 2, generator=generator)).exp()).round().long().clamp(min=10)
    texts = [{"prompt": f"question {k}", "question": f"question {k}", "source": "made up"} for k in range(PAIRS)]
    return [row | {"chosen": " " * a, "rejected": " " * b} for row, (a, b) in zip(texts, lengths.tolist())]


def match_signs(rows: list[dict]) -> list[dict]:
    """As many pairs whose chosen answer is the longer one as pairs whose rejected answer is, and no more."""
    longer = [row for row in rows if gap(row) > 0]
    shorter = [row for row in rows if gap(row) < 0]
    size = min(len(longer), len(shorter))
    return longer[:size] + shorter[:size]


def percentage(score: str) -> float:
    """49.0 from "49.0% ± 2.8%"."""
    return float(score.partition("%")[0])


def run(figure: Path) -> list[Claim]:
    sets = {"all pairs": [], "sign matched": [], "matched in bins": []}
    for seed in range(SEEDS):
        rows = draw_pairs(seed)
        sets["all pairs"].append(rows)
        sets["sign matched"].append(match_signs(rows))
        sets["matched in bins"].append(match_lengths(rows, seed, Counter()))
    kept = {name: sum(map(len, drawn)) / SEEDS for name, drawn in sets.items()}
    longer = {name: mean(torch.tensor([percentage(longer_wins(rows)) for rows in drawn])) for name, drawn in sets.items()}
    alone = {name: mean(torch.tensor([percentage(by_length(rows)) for rows in drawn])) for name, drawn in sets.items()}
    print(f"  accuracy in %, with the 95% interval of the mean of {SEEDS} sets\n")
    columns = [[f"{e.value:.1f} ({e.low:.1f} to {e.high:.1f})" for e in score.values()] for score in (longer, alone)]
    sizes = [f"{size:,.0f}" for size in kept.values()]
    print_table(["", "pairs", "longer answer wins", "lengths alone"], zip(sets, sizes, *columns))
    draw(figure, sets["sign matched"][0], {"longer answer wins": longer, "lengths alone": alone})

    raw, signs, bins = alone.values()
    return [
        Claim(
            f"Here the longer answer wins {longer['all pairs'].value:.0f}% of all pairs, although no answer has any "
            "content: an accuracy means nothing before it is compared with that of the lengths.",
            longer["all pairs"].low > 85 and raw.low > 85,
        ),
        Claim(
            'Matching only who is longer makes "longer wins" 50% and hides the problem: the two lengths alone still find '
            f"{signs.value:.0f}% of the winners.",
            abs(longer["sign matched"].value - 50) < 0.1 and signs.low > 75,
        ),
        Claim(
            f"Matching within bins of both sizes (--match-lengths) leaves {bins.value:.0f}%, close to guessing; the price "
            f"is that {kept['matched in bins'] / PAIRS:.0%} of the pairs are left.",
            abs(bins.value - 50) < 7 and bins.high < signs.low and kept["matched in bins"] < 0.3 * PAIRS,
        ),
    ]


def draw(figure: Path, rows: list[dict], scores: dict[str, dict[str, Estimate]]) -> None:
    """The lengths of sign-matched pairs, on a grid of the bins that matching uses, and the scores of all sets."""
    with picture(figure, columns=2, size=(10.5, 4)) as (lengths, bars):
        for name, colour, sign in (("chosen", "tab:blue", 1), ("rejected", "tab:orange", -1)):
            part = [row for row in rows if sign * gap(row) > 0]
            longest = [max(len(row["chosen"]), len(row["rejected"])) for row in part]
            size = [abs(gap(row)) for row in part]
            lengths.plot(longest, size, ".", color=colour, markersize=5, label=f"{name} answer longer")
        lengths.set(title="sign-matched pairs, on a grid of bins", xscale="log", yscale="log")
        lengths.set(xlabel="characters of the longer answer", ylabel="difference in characters")
        edges = [BIN**k for k in range(4, 20)]
        lengths.set_xticks(edges, [f"{edge:,.0f}" for edge in edges], fontsize=8)
        lengths.set_yticks(edges, [f"{edge:,.0f}" if k % 2 else "" for k, edge in enumerate(edges)], fontsize=8)
        lengths.minorticks_off()
        lengths.set(xlim=(110, 2400), ylim=(1, 4000))
        lengths.legend()

        for k, (name, score) in enumerate(scores.items()):
            values = [e.value for e in score.values()]
            spread = [e.value - e.low for e in score.values()], [e.high - e.value for e in score.values()]
            spots = [spot + 0.4 * k - 0.2 for spot in range(len(score))]
            bars.bar_label(bars.bar(spots, values, 0.36, yerr=spread, capsize=4, label=name), fmt="%.0f", padding=2)
        bars.axhline(50, color="black", linestyle=":", label="guessing")
        bars.set_xticks(range(len(score)), score)
        bars.set(title=f"what lengths give away, {SEEDS} sets", ylabel="accuracy (%), with 95%", ylim=(0, 140))
        bars.set_yticks(range(0, 101, 20))
        bars.legend(loc="upper right")
