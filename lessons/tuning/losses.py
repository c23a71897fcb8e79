"""What do the five losses do with a pair, and why does one of them fall without bound?

All are functions of z, the reward margin of a pair. Their slope says how hard a pair still pushes once its margin is z:

    sigmoid        pushes less and less, and always in the direction of its label
    conservative   has a minimum at z = ln((1-eps)/eps), and pushes a larger margin back
    robust         never stops: far to the right its slope is -eps/(1-2 eps)
    hinge          stops at z = 1
    ipo            has its minimum at z = 1/2, whatever beta is, and pushes back the harder the further z goes

So a mean robust loss of -241, as the report saw with eps = 0.25, is not a bug. There each nat of margin is worth half a nat
of loss, and a mean margin of about 480 gives that number. It says how far the model has run, not how good it is.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from dpo import preference_loss
from lessons.lesson import Claim, print_table
from runtime.files import picture

EPS = 0.1
BETA = 0.3
SHOWN = {"sigmoid": None, "conservative": EPS, "robust": EPS, "hinge": None, "ipo": None}  # name: eps


def slope(z: Tensor, loss: str, eps: float | None) -> Tensor:
    """The derivative of a loss: [P] -> [P]."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(preference_loss(z, loss, BETA, eps).sum(), z)[0]


def root(function, low: float, high: float) -> float:
    """Where a falling function of z crosses zero, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(torch.tensor([middle], dtype=torch.float64)) > 0 else (low, middle)
    return low


def run(figure: Path) -> list[Claim]:
    z = torch.linspace(-6, 6, 481, dtype=torch.float64)
    far = torch.tensor([-50.0, 0.0, 1.0, 50.0], dtype=torch.float64)
    starts = {name: preference_loss(far, name, BETA, eps)[1].item() for name, eps in SHOWN.items()}
    print_table(
        ["loss", "at z=0", "slope at -50", "at 0", "at 1", "at 50"],
        [[name, starts[name], *slope(far, name, eps).tolist()] for name, eps in SHOWN.items()],
    )

    crossings = {eps: root(lambda z, eps=eps: preference_loss(z, "robust", BETA, eps), 0, 10) for eps in (0.05, 0.1, 0.25)}
    minimum = root(lambda z: -slope(z, "conservative", EPS), 0, 10)
    deep = root(lambda z: preference_loss(z, "robust", BETA, 0.25) + 241, 0, 1000)
    print("\n  robust loss crosses zero at", ", ".join(f"z = {z:.3f} (eps {eps})" for eps, z in crossings.items()))
    print(f"  conservative loss has its minimum at z = {minimum:.3f}; a loss of -241 at eps 0.25 needs z = {deep:.0f}")

    with picture(figure, columns=2, size=(11, 4)) as (values, slopes):
        for name, eps in SHOWN.items():
            label = name if eps is None else f"{name}, eps {eps}"
            values.plot(z, preference_loss(z, name, BETA, eps), label=label)
            slopes.plot(z, slope(z, name, eps), label=label)
        values.axhline(math.log(2), color="grey", linestyle=":")
        values.text(5.1, math.log(2) + 0.15, "ln 2", color="grey")
        values.set(title="loss", xlabel="reward margin z (nats)", ylabel="loss (nats)", ylim=(-2, 6))
        slopes.set(title="slope: how hard a pair pushes", xlabel="reward margin z (nats)", ylabel="d loss / d z")
        slopes.set_ylim(-2.5, 0.5)
        slopes.legend(loc="lower right")

    return [
        Claim(
            "At z = 0, where every run starts, the sigmoid, conservative and robust losses are ln 2 = 0.693; hinge is 1, "
            "and IPO is 1/(4 beta^2).",
            all(abs(starts[name] - math.log(2)) < 1e-9 for name in ("sigmoid", "conservative", "robust"))
            and starts["hinge"] == 1
            and abs(starts["ipo"] - 1 / (4 * BETA**2)) < 1e-9,
        ),
        Claim(
            f"The conservative loss stops at its minimum, z = ln((1-eps)/eps) = {minimum:.2f}; the robust loss crosses zero "
            f"at z = {crossings[EPS]:.2f} and goes on falling by eps/(1-2 eps) = {EPS / (1 - 2 * EPS)} for each nat.",
            abs(minimum - math.log((1 - EPS) / EPS)) < 1e-6
            and abs(slope(far, "robust", EPS)[3].item() + EPS / (1 - 2 * EPS)) < 1e-9,
        ),
        Claim(
            f"A loss of -241 at eps 0.25 is a margin of {deep:.0f}: it tells how far the model ran from the reference, so "
            "losses at different eps or beta cannot be ranked.",
            abs(deep - 482) < 1,
        ),
    ]
