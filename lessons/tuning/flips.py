"""What does robust DPO buy when labels are wrong?

Let each label be flipped with probability eps. Since softplus(z) = z + softplus(-z), the losses differ by a slope alone:

    sigmoid        softplus(-z)
    conservative   softplus(-z) + eps z                  (cDPO, Mitchell 2023)
    robust         softplus(-z) - eps/(1-2 eps) z        (Chowdhury, Kini, Natarajan 2024)

A pair whose margin z is free, and whose first answer is preferred by a share a of its labels, has its minimum at

    sigmoid  sigma(z) = a        conservative  (1-eps) a + eps (1-a)        robust  (a-eps)/(1-2 eps)

With true preference p, flips make a = (1-eps) p + eps (1-p). So plain DPO finds the right order with margins that are too
small, conservative DPO shrinks them once more, and robust DPO gets p back, but divides the noise in a by 1-2 eps as well. If
a lies outside (eps, 1-eps) it has no minimum at all. Three worlds show what follows:

    a table     margins of single pairs, from 400 labels each
    a line      z = w . x with 8 features, |w| = 2: the squared error of the fitted w, which is bias^2 + variance
    a network   the small demo (small_demo.py): accuracy on clean labels, and the mean margin in nats

A margin that is too small by a factor is repaired by that factor: plain DPO with beta divided by it gives the policy that is
wanted. So robust DPO is for those who need the size of the margin, do not know the factor, and have the labels for it.

The network says the same. At beta 2 robust DPO moves the policy further than plain DPO, which stops early when labels
contradict each other, and with 40% flips that is worth accuracy, too. But a smaller beta does as much for plain DPO, and on
the whole demo at beta 0.1 no difference in accuracy was found (docs/training.md).
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import dpo
from dpo import preference_loss
from lessons.lesson import Claim, print_table
from lessons.tuning.small_demo import COMMON, SmallDemo, logprobs, one_thread, small_demo, tune
from metrics.intervals import Z
from runtime.files import picture
from runtime.optimizer import adamw
from runtime.settings import Dpo

LOSSES = ("sigmoid", "conservative", "robust")
COLOURS = dict(zip(LOSSES, ("tab:blue", "tab:green", "tab:orange")))
RATES = (0.2, 0.4)
REPETITIONS = {100: 100, 300: 100, 1_000: 60, 3_000: 40, 10_000: 12, 30_000: 6}  # by number of labels
SEEDS = (0, 1, 2)


def eps_of(loss: str, rate: float) -> float | None:
    return None if loss == "sigmoid" else rate


def draw_labels(z: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """A label, 1 or -1, for each true margin: Bradley-Terry, then flipped at this rate."""
    preferred = torch.rand(z.shape, generator=generator) < z.sigmoid()
    flipped = torch.rand(z.shape, generator=generator) < rate
    return torch.where(preferred ^ flipped, 1.0, -1.0).double()


def fit(x: Tensor, labels: Tensor, loss: str, eps: float | None, steps: int = 30) -> Tensor:
    """The w [R, D] that minimizes the mean loss of z = label * (w . x), R times at once, for x [R, N, D], labels [R, N].

    Newton's method. The losses differ by a slope, so all have the second derivative sigma(z) sigma(-z). A step is at most 1
    long: a loss without a minimum then runs away by 1 each step, and does not overflow.
    """
    w = x.new_zeros(x.shape[0], x.shape[2])
    for _ in range(steps):
        z = (labels * (x @ w[:, :, None])[:, :, 0]).requires_grad_()  # [R, N]
        slope = torch.autograd.grad(preference_loss(z, loss, 1.0, eps).sum(), z)[0]
        gradient = x.mT @ (labels * slope)[:, :, None]  # [R, D, 1]
        curvature = z.detach().sigmoid() * (-z.detach()).sigmoid()
        hessian = x.mT @ (curvature[:, :, None] * x)  # [R, D, D]
        step = torch.linalg.solve(hessian + 1e-9 * torch.eye(x.shape[2], dtype=x.dtype), gradient)[:, :, 0]
        w = w - step / step.norm(dim=1, keepdim=True).clamp(min=1)
        if step.abs().max() < 1e-9:
            break
    return w


# --------------------------------------------------------------------------------------------------------- a table of pairs


def optimum(a: Tensor, loss: str, eps: float) -> Tensor:
    """sigma(z) at the minimum, for the share a of labels that prefer the first answer."""
    return {"sigmoid": a, "conservative": (1 - eps) * a + eps * (1 - a), "robust": (a - eps) / (1 - 2 * eps)}[loss]


def fit_table(p: Tensor, rate: float, labels: int = 400, repetitions: int = 200) -> dict[str, dict[str, Tensor]]:
    """{loss: {"fitted", "formula"}}, margins [P, repetitions] of pairs with true preferences p [P]: two ways."""
    true = p.logit()[:, None, None].expand(len(p), repetitions, labels)
    drawn = draw_labels(true, rate, torch.Generator().manual_seed(0))  # [P, repetitions, labels]
    share = (drawn > 0).double().mean(dim=2)
    made = {}
    for loss in LOSSES:
        fitted = fit(torch.ones(len(p) * repetitions, labels, 1).double(), drawn.flatten(0, 1), loss, eps_of(loss, rate))
        made[loss] = {"fitted": fitted.view(len(p), repetitions), "formula": optimum(share, loss, rate).logit()}
    return made


# ------------------------------------------------------------------------------------------------------------ a linear world


@dataclass
class Fitted:
    """What became of w, in the mean over the repetitions."""

    error: float  # |w - true|^2, in nats^2 of margin on an average pair, since features have variance 1
    spread: float  # standard error of `error`
    bias: float  # |mean w - true|^2
    size: float  # of w along the true one, as a share of it
    rescaled: float  # the error after multiplying every w with the same, best factor
    accuracy: float  # share of new pairs ordered as the true w orders them


def judge(w: Tensor, true: Tensor) -> Fitted:
    """w [R, D], true [D]. For normal features two directions order a pair differently with probability angle/pi."""
    error = (w - true).square().sum(dim=1)
    cosine = (w @ true) / (w.norm(dim=1) * true.norm())
    factor = (w @ true).sum() / w.square().sum()
    return Fitted(
        error=error.mean().item(),
        spread=error.std().item() / math.sqrt(len(w)),
        bias=(w.mean(dim=0) - true).square().sum().item(),
        size=(w @ true).mean().item() / true.square().sum().item(),
        rescaled=(factor * w - true).square().sum(dim=1).mean().item(),
        accuracy=1 - cosine.clamp(-1, 1).acos().mean().item() / math.pi,
    )


def fit_linear(rate: float) -> dict[str, dict[int, Fitted]]:
    """{loss: {number of labels: what became of w}}. The losses see the same labels."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(8, generator=generator, dtype=torch.float64)
    true *= 2 / true.norm()
    made = {loss: {} for loss in LOSSES}
    for n, repetitions in REPETITIONS.items():
        x = torch.randn(repetitions, n, 8, generator=generator, dtype=torch.float64)
        labels = draw_labels(x @ true, rate, generator)
        for loss in LOSSES:
            made[loss][n] = judge(fit(x, labels, loss, eps_of(loss, rate)), true)
    return made


def crossing(plain: dict[int, Fitted], robust: dict[int, Fitted]) -> float:
    """The number of labels from which on robust DPO's error is the smaller one; infinite if it never is."""
    found = (n for n in plain if all(robust[m].error < plain[m].error for m in plain if m >= n))
    return min(found, default=math.inf)


def first_step(loss: str, eps: float | None) -> dict[str, Tensor]:
    """The gradient at z = 0 in the linear world, and the step that AdamW makes of it: {"gradient", "step"}, [8] each."""
    x = torch.randn(1_000, 8, generator=torch.Generator().manual_seed(0))
    w = torch.nn.Parameter(torch.zeros(8))
    preference_loss(x @ w, loss, 1.0, eps).mean().backward()
    adamw([{"params": [w]}], lr=1e-3).step()
    return {"gradient": w.grad, "step": w.detach()}


# ------------------------------------------------------------------------------------------------------------- the network


@dataclass
class Run:
    accuracy: float  # share of test pairs with clean labels that the reward orders correctly
    margin: float  # of those pairs, mean, in nats
    probability: float  # of the right answer, mean over the test questions


def tune_networks(small: SmallDemo, rate: float, seed: int, settings: dict[str, Dpo]) -> dict[str, Run]:
    """A run for each of the settings, on a third of the pairs that depends on the seed, with labels flipped at `rate`."""
    size = len(small.pair_questions) // len(SEEDS)
    pairs = small.pairs(rate, seed)[seed * size : (seed + 1) * size]
    reference = logprobs(small.model, pairs)
    made = {}
    for name, its in settings.items():
        model = tune(copy.deepcopy(small.model), pairs, reference, replace(its, seed=seed))
        policy = logprobs(model, small.test)
        margin = dpo.margin(policy, small.test_reference)
        made[name] = Run((margin > 0).double().mean().item(), margin.mean().item(), policy[:, 0].exp().mean().item())
    return made


def settings_for(rate: float) -> dict[str, Dpo]:
    common = COMMON | {"lr": 5e-4}
    return {
        "plain, beta 2": Dpo(**common, loss="sigmoid", eps=None, beta=2),
        "robust, beta 2": Dpo(**common, loss="robust", eps=rate, beta=2),
        "plain, beta 0.3": Dpo(**common, loss="sigmoid", eps=None, beta=0.3),
    }


def run(figure: Path) -> list[Claim]:
    linear = {rate: fit_linear(rate) for rate in RATES}
    print("  squared error of the fitted w, and the bias^2 in it; plain rescaled by one factor; accuracy on new pairs")
    print_table(
        [
            "flips, labels",
            "plain",
            "bias^2",
            "conservative",
            "robust",
            "bias^2",
            "plain rescaled",
            "accuracy plain",
            "robust",
        ],
        [
            [f"{rate:.0%} {n:6,}", plain.error, plain.bias, smooth.error, robust.error, robust.bias, plain.rescaled]
            + [plain.accuracy, robust.accuracy]
            for rate, made in linear.items()
            for n, plain, smooth, robust in zip(REPETITIONS, *(made[loss].values() for loss in LOSSES))
        ],
    )
    plain, robust = (first_step(loss, eps_of(loss, 0.2)) for loss in ("sigmoid", "robust"))
    ratio, apart = robust["gradient"] / plain["gradient"], (robust["step"] / plain["step"] - 1).abs().max().item()
    print(f"\n  at z = 0 robust DPO's gradient is {ratio.mean():.4f} times plain DPO's; AdamW's steps differ by {apart:.0e}")

    with one_thread():
        small = small_demo()
        network = {rate: [tune_networks(small, rate, seed, settings_for(rate)) for seed in SEEDS] for rate in RATES}
    means = {(rate, name): average([its[name] for its in runs]) for rate, runs in network.items() for name in runs[0]}
    for (rate, name), one in means.items():
        told = f"accuracy {one.accuracy:.3f}, margin {one.margin:.2f} nats, p(right answer) {one.probability:.3f}"
        print(f"  network, {rate:.0%} flips, {name}: {told}")
    draw(figure, linear, network)
    return claims(linear, means, ratio, apart)


def average(runs: list[Run]) -> Run:
    return Run(**{name: sum(vars(one)[name] for one in runs) / len(runs) for name in vars(runs[0])})


def claims(linear: dict, means: dict, ratio: Tensor, apart: float) -> list[Claim]:
    most = max(REPETITIONS)
    sizes = {(rate, loss): linear[rate][loss][most].size for rate in RATES for loss in LOSSES}
    gaps = [
        max(linear[rate][loss][n].accuracy for loss in LOSSES) - min(linear[rate][loss][n].accuracy for loss in LOSSES)
        for rate in RATES
        for n in REPETITIONS
    ]
    crossings = [crossing(linear[rate]["sigmoid"], linear[rate]["robust"]) for rate in RATES]
    rescaled = [
        linear[rate]["sigmoid"][n].rescaled < 1.1 * linear[rate]["robust"][n].error for rate in RATES for n in REPETITIONS
    ]
    low, high = RATES
    plain, robust, weaker = (
        {rate: means[rate, name] for rate in RATES} for name in ("plain, beta 2", "robust, beta 2", "plain, beta 0.3")
    )
    return [
        Claim(
            f"Wrong labels cost plain DPO the size of its margins: from 30,000 labels, at 20% flips, they have "
            f"{sizes[low, 'sigmoid']:.2f} of the true size, at 40% {sizes[high, 'sigmoid']:.2f}, with robust DPO "
            f"{sizes[low, 'robust']:.2f} and {sizes[high, 'robust']:.2f}; here all losses order answers equally well "
            f"(accuracies within {max(gaps):.3f}).",
            max(gaps) < 0.03
            and abs(sizes[low, "sigmoid"] - 0.42) < 0.04
            and abs(sizes[high, "sigmoid"] - 0.125) < 0.03
            and abs(sizes[low, "robust"] - 1) < 0.1
            and abs(sizes[high, "robust"] - 1) < 0.25,
        ),
        Claim(
            f"The price is variance: robust DPO has the smaller error from {crossings[0]:,} labels on at 20% flips, from "
            f"{crossings[1]:,} on at 40%. Plain DPO times the best factor, which is a smaller beta, does as well; but "
            "only the truth, known here, tells that factor.",
            crossings[0] in (300, 1_000) and crossings[1] in (3_000, 10_000) and all(rescaled),
        ),
        Claim(
            "At z = 0 robust DPO's gradient is plain DPO's times 1/(1-2 eps), which AdamW divides out again. On the network "
            f"at beta 2 it then goes further: with 40% flips margins of {robust[high].margin:.1f} nats and an accuracy of "
            f"{robust[high].accuracy:.2f}, plain {plain[high].margin:.1f} and {plain[high].accuracy:.2f}. But at beta 0.3 "
            f"plain DPO has {weaker[high].margin:.1f} and {weaker[high].accuracy:.2f} (means of three seeds).",
            bool((ratio * (1 - 2 * 0.2) - 1).abs().max() < 1e-3)
            and apart < 1e-3
            and all(robust[rate].margin > 1.1 * plain[rate].margin for rate in RATES)
            and robust[high].accuracy > plain[high].accuracy - 0.05
            and all(weaker[rate].accuracy > robust[rate].accuracy - 0.1 for rate in RATES),
        ),
    ]


def draw(figure: Path, linear: dict, network: dict) -> None:
    p = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    table = fit_table(p, RATES[0])
    with picture(figure, columns=2, rows=2, size=(10, 7.5)) as (pairs, scatter, *lines):
        for loss, colour in COLOURS.items():
            fitted = table[loss]["fitted"]
            pairs.errorbar(
                p.logit(), fitted.mean(dim=1), Z * fitted.std(dim=1), color=colour, marker="o", capsize=3, label=loss
            )
        pairs.plot(p.logit(), p.logit(), color="black", linestyle=":", label="true")
        pairs.set(
            title="a table: 20% flips, 400 labels a pair",
            xlabel="true margin (nats)",
            ylabel="fitted margin, and 95% of fits",
        )
        pairs.legend()
        marks = dict(zip(RATES, "o^"))
        colours = dict(zip(network[RATES[0]][0], ("tab:blue", "tab:orange", "tab:purple")))
        for rate, runs in network.items():
            for name, colour in colours.items():
                x, y = [one[name].margin for one in runs], [one[name].accuracy for one in runs]
                scatter.scatter(x, y, color=colour, marker=marks[rate], label=f"{name}, {rate:.0%} flips")
        scatter.set(
            title="the network, three seeds", xlabel="mean margin on clean pairs (nats)", ylabel="accuracy on clean pairs"
        )
        scatter.legend()
        for axis, (rate, made) in zip(lines, linear.items()):
            for loss, colour in COLOURS.items():
                errors = [one.error for one in made[loss].values()]
                spread = [Z * one.spread for one in made[loss].values()]
                axis.errorbar(list(REPETITIONS), errors, spread, color=colour, marker="o", capsize=3, label=loss)
            rescaled = [one.rescaled for one in made["sigmoid"].values()]
            axis.plot(list(REPETITIONS), rescaled, color="tab:blue", linestyle="--", label="sigmoid, rescaled")
            axis.set(
                title=f"8 features, {rate:.0%} flips",
                xlabel="labels",
                ylabel="squared error of w",
                xscale="log",
                yscale="log",
            )
            axis.legend()
