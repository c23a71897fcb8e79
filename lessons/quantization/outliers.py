"""What does LLM.int8() do with outlier features?

Integer products need whole numbers on both sides, so LLM.int8() (Dettmers et al. 2022) rounds the activations too. Each
token has one scale, its largest |x|:

    c = round(127 x / s_x),   s_x = max |x| of the token        so a step is s_x / 127

The paper found that in large language models a few features are 20 times as large as the others, in most tokens. Such a
feature sets s_x, the step grows with it, and what the ordinary features say is rounded away: with s_x = 100 the step is
0.79, and a feature of 0.3 becomes 0.

LLM.int8() takes each feature that reaches 6.0 in any token out of the integer product and multiplies it unrounded:

    y = s_x s_w / 127^2 (c_x C_w^T)  +  x_high W~^T             `quant.llm_int8`

Here the outliers are planted: 4 of 512 features have the same magnitude, with random signs, in all 64 tokens; the others
are drawn from N(0, 1). The error is that of rounding the activations alone, y - x W~^T, divided by the ordinary features'
part of the output (both RMS). The weights' own rounding is the same with the split and without it, and is left out.
"""

from pathlib import Path

import torch
from torch import Tensor

from lessons.lesson import Claim, print_table
from metrics.intervals import Estimate, mean
from quant import Int8Linear, quantize_int8
from runtime.files import picture

TOKENS, FEATURES, OUTLIERS = 64, 512, 4
SIZES = (1.0, 3.0, 5.9, 6.0, 10.0, 20.0, 60.0, 100.0)
THRESHOLDS = (2.0, 2.5, 3.0, 3.5, 4.5, 6.0, 10.0, 30.0, 59.0, 61.0, 100.0)
NEVER = float("inf")
SEEDS = range(5)


def activations(size: float, seed: int) -> Tensor:
    """x fp32 [TOKENS, FEATURES]; the first OUTLIERS features are +size or -size."""
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, FEATURES)
    x[:, :OUTLIERS] = size * x[:, :OUTLIERS].sign()
    return x


def error(x: Tensor, threshold: float) -> float:
    """Of a layer with random weights, as the head of this file defines it."""
    torch.manual_seed(100)
    codes, scale = quantize_int8(torch.randn(FEATURES, FEATURES))
    layer = Int8Linear(codes, scale, bias=None, threshold=threshold)
    exact = x @ layer.dense().T
    ordinary = x[:, OUTLIERS:] @ layer.dense()[:, OUTLIERS:].T
    return ((layer(x) - exact).norm() / ordinary.norm()).item()


def rounded_to_zero(x: Tensor) -> float:
    """The share of the ordinary activations whose code is 0 if nothing is taken out."""
    codes, _ = quantize_int8(x)
    return (codes[:, OUTLIERS:] == 0).float().mean().item()


def taken_out(x: Tensor, threshold: float) -> float:
    """The share of the features that are multiplied unrounded."""
    return (x.abs() >= threshold).any(dim=0).float().mean().item()


def over_seeds(measure, size: float) -> Estimate:
    """In percent."""
    return mean(torch.tensor([100 * measure(activations(size, seed)) for seed in SEEDS]))


def run(figure: Path) -> list[Claim]:
    without = {size: over_seeds(lambda x: error(x, NEVER), size) for size in SIZES}
    split = {size: over_seeds(lambda x: error(x, 6.0), size) for size in SIZES}
    zeros = {size: over_seeds(rounded_to_zero, size) for size in SIZES}
    at_60 = {threshold: over_seeds(lambda x, t=threshold: error(x, t), 60.0) for threshold in THRESHOLDS}
    out = {threshold: over_seeds(lambda x, t=threshold: taken_out(x, t), 60.0) for threshold in THRESHOLDS}

    shown = [[f"{size:g}", *(percent(of[size]) for of in (zeros, without, split))] for size in SIZES]
    print_table(["size of 4 of 512 features", "others that become 0", "error, no split", "error, split at 6"], shown)
    print(f"\n  percent; means of {len(SEEDS)} seeds with 95% intervals. At size 60:\n")
    shown = [[f"{t:g}", percent(out[t]), percent(at_60[t])] for t in THRESHOLDS]
    print_table(["threshold", "features taken out", "error"], shown)

    ticks = (1, 2, 3, 6, 10, 20, 60, 100)
    with picture(figure, columns=2, size=(11, 4)) as (by_size, by_threshold):
        for of, label in (
            (zeros, "ordinary activations that become 0, no split"),
            (without, "error, no split"),
            (split, "error, split at 6"),
        ):
            draw(by_size, of, label)
        by_size.axvline(6, color="grey", linestyle=":")
        by_size.set(title="4 of 512 features are outliers", xlabel="their size, in standard deviations of the others")
        by_size.set(xscale="log", ylabel="percent")
        by_size.set_xticks(ticks, ticks)
        by_size.legend()
        draw(by_threshold, at_60, "error")
        draw(by_threshold, out, "features taken out")
        by_threshold.axvline(6, color="grey", linestyle=":")
        by_threshold.set(title="outliers of 60: what the threshold does", xlabel="threshold", ylabel="percent")
        by_threshold.set(xscale="log", yscale="log", ylim=(0.05, 150))
        by_threshold.set_xticks(ticks[1:], ticks[1:])
        by_threshold.set_yticks((0.1, 1, 10, 100), (0.1, 1, 10, 100))
        by_threshold.legend(loc="upper center")

    return [
        Claim(
            f"Outliers of 100 round {zeros[100].value:.0f}% of the ordinary activations to 0. The ordinary features' part "
            f"of the output is then wrong by {without[100].value:.0f}%; with the split by {split[100].value:.1f}%, not more "
            f"than where there are no outliers ({split[1].value:.1f}%).",
            zeros[100].low > 20 and without[100].low > 10 * split[100].high and split[100].high < 1.2 * split[1].low,
        ),
        Claim(
            f"The split begins at the threshold: outliers of 5.9 cost {split[5.9].value:.2f}% with it and without it, those "
            f"of 6 cost {split[6].value:.2f}% with it.",
            split[5.9] == without[5.9] and split[5.9].low > 1.2 * split[6].high,
        ),
        Claim(
            f"It is cheap, because few features reach 6: {out[6].value:.1f}% are multiplied unrounded. A threshold of 2 "
            f"takes out {out[2].value:.0f}%, and then there is little left to do in integers; one above the outliers takes "
            f"out none, and the error is {at_60[100].value:.0f}%.",
            out[6].high < 1 and out[2].low > 50 and out[100].value == 0 and at_60[100].low > 5 * at_60[6].high,
        ),
    ]


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f}-{estimate.high:.2f})"


def draw(axis, points: dict[float, Estimate], label: str) -> None:
    """A line through the means, in the band of their intervals."""
    [line] = axis.plot(points.keys(), [e.value for e in points.values()], "o-", label=label)
    band = [e.low for e in points.values()], [e.high for e in points.values()]
    axis.fill_between(points.keys(), *band, color=line.get_color(), alpha=0.2)
