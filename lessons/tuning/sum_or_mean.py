"""Why are log-probabilities summed over an answer's tokens, and not averaged?

DPO's reward of an answer is beta * log pi(y|x)/pi_ref(y|x), with the probability of the whole answer (Rafailov et al. 2023,
eq. 5), and log pi(y|x) is a sum over tokens. Only with the sum does DPO end at the optimum of its objective (eq. 4):

    sum    log pi/pi_ref (y) =       (r(y) + c) / beta      which is  pi = pi_ref exp(r / beta) / Z
    mean   log pi/pi_ref (y) = |y| * (r(y) + c) / beta      each token earns the whole reward, so a long answer moves further

where c makes the probabilities add up to 1. The mean has names: length-normalised DPO (Tulu 3, Lambert et al. 2024), and
without a reference SimPO (Meng et al. 2024, eq. 4), whose authors want the quantity that sampling ranks answers by, and take
a beta of 2 and more. Those are choices. Some tutorials write mean() under DPO's formula without saying so; what they train
has another optimum, and their beta means another thing.

Here, worlds of six answers are fitted both ways (the judge and the fit are those of the lesson beta). The mean gets a beta
that is larger by the answers' mean length, so what is left is the effect of unlike lengths alone.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpo import margin, sigmoid_loss
from lessons.lesson import Claim, print_table
from lessons.tuning.beta import ANSWERS, World, draw_world, fit, optimum
from metrics.intervals import Estimate, mean
from runtime.files import picture

BETA = 0.5
RATIOS = (1, 2, 4, 10)  # tokens of the longest answer over those of the shortest
MIDDLE = 12  # tokens
WORLDS = 10


@dataclass
class Fitted:
    """A world, the tokens of its answers, and log pi [answers] fitted with either log-probability."""

    world: World
    tokens: Tensor  # [answers]
    by_sum: Tensor
    by_mean: Tensor
    beta_of_mean: float


def draw_tokens(ratio: float, seed: int) -> Tensor:
    """Answers of MIDDLE / sqrt(ratio) to MIDDLE * sqrt(ratio) tokens, in a random order: [answers]."""
    exponents = torch.linspace(-0.5, 0.5, ANSWERS, dtype=torch.float64)
    order = torch.randperm(ANSWERS, generator=torch.Generator().manual_seed(seed))
    return (MIDDLE * ratio**exponents).round()[order]


def fit_both(ratio: float, seed: int) -> Fitted:
    world, tokens = draw_world(seed), draw_tokens(ratio, seed)
    beta = BETA * tokens.mean().item()
    return Fitted(world, tokens, fit(world, BETA), fit(world, beta, tokens), beta)


def optimum_of_mean(world: World, beta: float, tokens: Tensor) -> Tensor:
    """log pi_ref + |y| (r + c) / beta, with the c that makes the probabilities add up to 1, by bisection: [answers]."""
    low, high = -world.reward.max(), -world.reward.min()  # all probabilities fall, all rise
    for _ in range(100):
        c = (low + high) / 2
        policy = world.reference + tokens * (world.reward + c) / beta
        low, high = (low, c) if policy.exp().sum() > 1 else (c, high)
    return policy


def token_weights(tokens: list[int], averaged: bool) -> list[float]:
    """d loss / d log p of one token of the chosen and of one token of the rejected answer, for a pair at z = 0."""
    answers = [torch.zeros(size, requires_grad=True) for size in tokens]
    policy = torch.stack([answer.mean() if averaged else answer.sum() for answer in answers])[None]  # [1, 2]
    sigmoid_loss(BETA * margin(policy, policy.detach())).sum().backward()
    return [answer.grad[0].item() for answer in answers]


def distance(p: Tensor, q: Tensor) -> float:
    """The probability that has to be moved to make one policy the other (total variation), from log-probabilities."""
    return (p.exp() - q.exp()).abs().sum().item() / 2


def run(figure: Path) -> list[Claim]:
    fits = {ratio: [fit_both(ratio, seed) for seed in range(WORLDS)] for ratio in RATIOS}
    of_sum, of_mean, other_best, from_formula = {}, {}, {}, 0.0
    for ratio, worlds in fits.items():
        best = [optimum(f.world, BETA) for f in worlds]
        of_sum[ratio] = max(distance(f.by_sum, p) for f, p in zip(worlds, best))
        of_mean[ratio] = mean(torch.tensor([distance(f.by_mean, p) for f, p in zip(worlds, best)]))
        other_best[ratio] = sum(int(f.by_mean.argmax() != p.argmax()) for f, p in zip(worlds, best))
        known = [optimum_of_mean(f.world, f.beta_of_mean, f.tokens) for f in worlds]
        from_formula = max(from_formula, *(distance(f.by_mean, p) for f, p in zip(worlds, known)))
    print("  distance of the fitted policy from the optimum: the probability that is misplaced\n")
    header = ["longest answer / shortest", "sum, largest", f"mean, {WORLDS} worlds", "95%", "another answer is likeliest"]
    rows = []
    for ratio, off in of_mean.items():
        interval = f"{off.low:.3f} to {off.high:.3f}"
        rows.append([f"{ratio}", f"{of_sum[ratio]:.0e}", f"{off.value:.3f}", interval, f"{other_best[ratio]} of {WORLDS}"])
    print_table(header, rows)
    draw(figure, fits[RATIOS[-1]], of_sum, of_mean)

    one, last = of_mean[1], of_mean[RATIOS[-1]]
    short, long = draw_tokens(RATIOS[-1], seed=0).aminmax()
    sizes = [int(short), int(long)]
    summed, averaged = token_weights(sizes, averaged=False), token_weights(sizes, averaged=True)
    pull = -averaged[0] / averaged[1]
    return [
        Claim(
            f"The sum ends at the known optimum in every world (off by at most {max(of_sum.values()):.0e}). The mean does "
            f"so only if all answers have one length; where some are ten times longer, it misplaces {last.value:.0%} of the "
            "probability.",
            max(of_sum.values()) < 1e-4 and one.high < 1e-4 and last.low > 0.05,
        ),
        Claim(
            "The mean ends at log pi/pi_ref = |y| * (r + c) / beta: of two answers with the same reward, the longer one "
            f"moves further, up or down. (The fits agree with this formula within {from_formula:.0e}.)",
            from_formula < 1e-4,
        ),
        Claim(
            f"With the sum every token of a pair pulls equally hard, beta/2 = {summed[1]:.2f} at z = 0. With the mean a "
            f"token of an answer of {sizes[0]} tokens pulls {pull:.1f} times as hard as one of {sizes[1]}.",
            abs(summed[0] + BETA / 2) < 1e-6 and abs(summed[1] - BETA / 2) < 1e-6 and abs(pull - sizes[1] / sizes[0]) < 1e-4,
        ),
    ]


def draw(figure: Path, fits: list[Fitted], of_sum: dict[int, float], of_mean: dict[int, Estimate]) -> None:
    """What every answer gained, beside its reward; and the distances from the optimum."""
    reward = torch.cat([f.world.reward - f.world.reward.mean() for f in fits])
    gained = {"sum": [], "mean": []}
    for f in fits:
        for name, policy in (("sum", f.by_sum), ("mean", f.by_mean)):
            drift = BETA * (policy - f.world.reference)
            gained[name].append(drift - drift.mean())
    with picture(figure, columns=2, size=(11, 4.2)) as (rewards, distances):
        rewards.plot(reward, torch.cat(gained["sum"]), "k.", label="sum")
        tokens = torch.cat([f.tokens for f in fits])
        shown = rewards.scatter(
            reward, torch.cat(gained["mean"]), c=tokens, s=22, marker="^", cmap="viridis_r", label="mean"
        )
        rewards.figure.colorbar(shown, ax=rewards, label="tokens of the answer")
        rewards.set(title=f"what an answer gained, {len(fits)} worlds", xlabel="true reward, less the world's mean")
        rewards.set_ylabel("beta log pi/pi_ref, less its mean")
        rewards.legend()
        values = [off.value for off in of_mean.values()]
        below, above = [off.value - off.low for off in of_mean.values()], [off.high - off.value for off in of_mean.values()]
        distances.errorbar(RATIOS, values, (below, above), fmt="^-", capsize=4, label="mean, with 95%")
        distances.plot(RATIOS, [*of_sum.values()], "k.-", label="sum, the largest of all worlds")
        distances.set(title="distance from the optimum", xlabel="tokens of the longest answer / of the shortest")
        distances.set_ylabel("misplaced probability")
        distances.legend()
