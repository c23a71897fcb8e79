"""What does beta do?

DPO looks for the policy with the highest reward that stays close to the reference, and beta is the price of distance:

    maximise  E[r(y)] - beta * KL(pi || pi_ref)        the solution is  pi(y) = pi_ref(y) exp(r(y) / beta) / Z

(Rafailov et al. 2023, eq. 3 and 4.) A world with six answers shows that DPO finds it. A Bradley-Terry judge prefers answer i
to answer j with probability sigmoid(r_i - r_j), and the policy is a table of six logits. The DPO loss is summed over all
pairs and both labels, weighted by how often the judge gives them; its minimum, found by gradient descent, must be that
formula for every beta.

At the optimum z = r_i - r_j. So beta does not change how sure the policy is of a preference. It says how many nats of
log-probability that certainty costs: z / beta.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpo import margin, preference_loss
from lessons.lesson import Claim, print_table
from metrics.intervals import mean
from runtime.files import picture

BETAS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
ANSWERS = 6
WORLDS = 10


@dataclass
class World:
    """Answers with their log-probabilities under the reference and their rewards, both [answers]."""

    reference: Tensor
    reward: Tensor


def draw_world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)
    logits, reward = torch.randn(2, ANSWERS, generator=generator, dtype=torch.float64)
    return World(logits.log_softmax(0), reward)


def optimum(world: World, beta: float) -> Tensor:
    """log pi of eq. 4: [answers]."""
    return (world.reference + world.reward / beta).log_softmax(0)


def fit(world: World, beta: float, tokens: Tensor | float = 1.0) -> Tensor:
    """log pi [answers] at the minimum of the expected DPO loss, found by gradient descent (L-BFGS) from the reference. With
    the answers' tokens [answers] the loss is that of log-probabilities averaged over tokens."""
    first, second = torch.triu_indices(ANSWERS, ANSWERS, offset=1)
    chosen, rejected = torch.cat((first, second)), torch.cat((second, first))  # every pair with both labels
    weight = (world.reward[chosen] - world.reward[rejected]).sigmoid()  # how often the judge gives this label
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        tables = logits.log_softmax(0) / tokens, world.reference / tokens
        both = [torch.stack((table[chosen], table[rejected]), dim=1) for table in tables]
        value = (weight * preference_loss(beta * margin(*both), "sigmoid", beta)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().log_softmax(0)


def divergence(policy: Tensor, reference: Tensor) -> float:
    """KL(pi || pi_ref) in nats, from log-probabilities [answers]."""
    return (policy.exp() * (policy - reference)).sum().item()


def run(figure: Path) -> list[Claim]:
    worlds = [draw_world(seed) for seed in range(WORLDS)]
    fitted = {beta: [fit(world, beta) for world in worlds] for beta in BETAS}
    known = {beta: [optimum(world, beta) for world in worlds] for beta in BETAS}
    error, kl, reward, sure, margins = {}, {}, {}, {}, {}
    for beta in BETAS:
        pairs = list(zip(worlds, fitted[beta]))
        error[beta] = max((p.exp() - q.exp()).abs().max().item() for p, q in zip(fitted[beta], known[beta]))
        kl[beta] = torch.tensor([divergence(p, w.reference) for w, p in pairs])
        reward[beta] = torch.tensor([(p.exp() * w.reward).sum().item() for w, p in pairs])
        sure[beta] = torch.tensor([p.exp()[w.reward.argmax()].item() for w, p in pairs])
        margins[beta] = max((beta * (p - w.reference).diff() - w.reward.diff()).abs().max().item() for w, p in pairs)
    spread = {beta: mean(kl[beta]) for beta in BETAS}
    print_table(
        ["beta", "fit - formula", "KL (nats), mean of 10 worlds", "95%", "E[reward]", "p(best answer)"],
        [
            [f"{beta}", f"{error[beta]:.0e}", kl[beta].mean().item(), f"{spread[beta].low:.3f} to {spread[beta].high:.3f}"]
            + [reward[beta].mean().item(), sure[beta].mean().item()]
            for beta in BETAS
        ],
    )

    with picture(figure, columns=2, size=(11, 4.2)) as (answers, distance):
        draw_answers(answers, worlds[0], [fitted[beta][0] for beta in (0.2, 1.0, 5.0)], (0.2, 1.0, 5.0))
        distance.fill_between(BETAS, [spread[b].low for b in BETAS], [spread[b].high for b in BETAS], alpha=0.3)
        distance.plot(BETAS, [spread[b].value for b in BETAS], "o-", label="KL(pi || pi_ref), nats; band: 95%")
        distance.plot(BETAS, [reward[b].mean() for b in BETAS], "s--", label="mean reward of an answer")
        distance.axhline(0, color="grey", linewidth=0.8)
        distance.set(
            title=f"what beta trades, {WORLDS} worlds", xlabel="beta", ylabel="nats, or units of reward", xscale="log"
        )
        distance.set_xticks(BETAS, BETAS, minor=False)
        distance.legend()

    low, high = BETAS[0], BETAS[-1]
    neighbours = list(zip(BETAS, BETAS[1:]))
    return [
        Claim(
            f"For every beta from {low} to {high}, DPO on a judge's preferences ends at pi_ref * exp(reward / beta) / Z: no "
            f"probability is off by more than {max(error.values()):.0e}.",
            max(error.values()) < 1e-4,
        ),
        Claim(
            f"A larger beta keeps the policy closer to the reference: from beta {low} to {high} the KL falls from "
            f"{spread[low].value:.2f} to {spread[high].value:.3f} nats, and the mean reward falls with it, in every world.",
            all(bool((kl[a] > kl[b]).all() and (reward[a] > reward[b]).all()) for a, b in neighbours),
        ),
        Claim(
            "The margin z of a pair ends at the difference of the two rewards, whatever beta is. What beta changes is how "
            f"far log-probabilities move for it, z / beta: {high / low:.0f} times as far at {low} as at {high}.",
            max(margins.values()) < 1e-2,
        ),
    ]


def draw_answers(axis, world: World, policies: list[Tensor], betas: tuple[float, ...]) -> None:
    """The probabilities of one world's answers, the worst answer first: fitted (bars) and by the formula (dots)."""
    order = world.reward.argsort()
    width = 0.8 / (len(betas) + 1)
    spots = torch.arange(len(order)) - 0.4 + width / 2
    axis.bar(spots, world.reference[order].exp(), width, color="lightgrey", label="reference")
    for k, (beta, policy) in enumerate(zip(betas, policies), start=1):
        axis.bar(spots + k * width, policy[order].exp(), width, label=f"fitted, beta {beta}")
        label = "pi_ref exp(r / beta) / Z" if k == len(betas) else None
        axis.plot(spots + k * width, optimum(world, beta)[order].exp(), "k.", label=label)
    axis.set_xticks(range(len(order)), [f"{reward:.1f}" for reward in world.reward[order]])
    axis.set(title="six answers of one world", xlabel="reward of the answer", ylabel="probability")
    axis.legend()
