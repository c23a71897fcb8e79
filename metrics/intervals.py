"""How sure a number is: 95% confidence intervals, and how noisy a set of preference labels is.

A share k/n gets Wilson's interval (Wilson 1927), the p for which k is not surprising, |k/n - p| <= z sqrt(p(1-p)/n):

    (k/n + z^2/2n  +-  z sqrt(k/n (1 - k/n)/n + z^2/4n^2)) / (1 + z^2/n),    z = 1.96

It is right for small n and for shares near 0 and 1, where k/n +- z sqrt(...) leaves [0, 1]. A mean, or any other number,
gets the percentile bootstrap (Efron 1979): computed anew on examples drawn with replacement, the middle 95% of the results.
Both take the examples as independent; many pairs of one question make the truth less sure than they say.

**The flip rate, if uniform.** Suppose a label is flipped with probability eps, however easy or hard the pair is. Let m be a
model's reward margin of the answer labelled "chosen" over the other. If the *clean* preference follows Bradley and Terry
(1952) in that margin at some slope a,

    p(this label) = (1-eps) sigma(a m) + eps sigma(-a m) = eps + (1-2 eps) sigma(a m)

so however sure the model is, it disagrees with a share eps of the labels: the curve levels off at eps and 1-eps. It is
fitted by maximum likelihood over (eps, a), and the interval holds every eps whose best likelihood is within 1.92 nats of the
best of all (profile likelihood, Wilks 1938). It stands on three assumptions, and the interval knows of none:

    flips are uniform          people mislabel hard pairs. A flip of a pair about which the model is unsure looks like a
                               smaller slope: a true rate of .1 to .4 then reads 0 to .04
    the model is right         where it is surest; otherwise its own errors count as flips, and the estimate is too high
    the pairs were held out    a model that memorized a flipped label agrees with it

So the estimate is the share of labels that contradict the model where it is surest. A model that knows nothing fits every
eps: then the interval is wide.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959964  # of the normal distribution, 95% lie within
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% confidence interval, from `n` examples."""

    value: float
    low: float
    high: float
    n: int


def share(successes: float, n: int) -> Estimate:
    """k of n (k may hold halves, of ties) with Wilson's interval; n > 0."""
    p = successes / n
    centre, spread = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    scale = 1 + Z**2 / n
    return Estimate(p, max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale)), n)


def debiased(estimate: Estimate, eps: float) -> Estimate:
    """The accuracy on clean labels of one measured on labels flipped at rate eps: (a - eps)/(1 - 2 eps) is linear, so the
    interval goes along. Not cut to [0, 1] (`dpo.debiased_accuracy` says what a value above 1 means)."""
    value, low, high = ((x - eps) / (1 - 2 * eps) for x in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high, estimate.n)


def ratio(sums: Tensor, counts: Tensor) -> Estimate:
    """sum(sums) / sum(counts), both [n], such as nats per token, bootstrapped: examples are drawn, not tokens."""
    both, n = torch.stack((sums, counts)).double(), len(sums)  # [2, n]
    generator = torch.Generator().manual_seed(0)
    drawn = [both[:, torch.randint(n, (n,), generator=generator)].sum(dim=1) for _ in range(RESAMPLES)]
    total, count = torch.stack([both.sum(dim=1), *drawn]).unbind(dim=1)  # [1 + RESAMPLES], that of all examples first
    values = total / count
    low, high = values[1:].quantile(values.new_tensor([0.025, 0.975])).tolist()
    return Estimate(values[0].item(), low, high, n)


def mean(values: Tensor) -> Estimate:
    """The mean of values [n], bootstrapped."""
    return ratio(values, torch.ones(len(values)))


def estimate_flip_rate(margins: Tensor) -> Estimate:
    """The rate eps of *uniform* flips among the labels of held-out pairs, from reward margins [n] (chosen minus rejected, in
    any unit). The head of this file says when it is wrong. ValueError without a margin other than 0."""
    margins = margins.double()
    if not margins.any():
        raise ValueError("all margins are 0: there is no model to compare the labels with")
    rates = torch.linspace(0, 0.499, 500, dtype=torch.float64)
    slopes = torch.logspace(-2, 3, 60, dtype=torch.float64) / margins.abs().median().clamp(min=1e-12)
    agree = (slopes[:, None] * margins).sigmoid()  # [60, n]
    profile = [(eps + (1 - 2 * eps) * agree).clamp(min=1e-300).log().sum(dim=1).max() for eps in rates]
    likelihood = torch.stack(profile)  # [500], of the best slope for each rate
    best = int(likelihood.argmax())
    inside = rates[likelihood >= likelihood[best] - Z**2 / 2]
    return Estimate(rates[best].item(), inside.min().item(), inside.max().item(), len(margins))
