"""Preference pairs, measured: does the model's reward order them as the labels do, and would their lengths do as well?

With the reward margin m = log pi/pi_ref (chosen) - log pi/pi_ref (rejected), in nats, of every pair (dpo.py has beta on it,
which changes no sign):

    reward accuracy    share of m > 0; a tie, m = 0, is no success and is counted apart. The course (CS-552) and TRL say the
                       same: chosen reward > rejected reward
    debiased accuracy  what that would be on clean labels, if a share eps of these is flipped (`dpo.debiased_accuracy`)
    clean accuracy     on the true labels, where a truth file says which ones are flipped (`data.Truth`)
    margin             mean m; comparable across beta and eps
    DPO loss           mean softplus(-beta m), without any eps: comparable across eps at one beta
    flip rate          of the labels, if flips are uniform, as `intervals.estimate_flip_rate` estimates it from m

Beside it, what needs no training, because an accuracy means nothing alone:

    longer wins        accuracy of always picking the longer answer; equal lengths count one half
    reference, model   accuracy of log pi_ref and of log pi, as a sum over the answer and per token
    matched            reward accuracy on pairs of nearly equal length, where lengths are no help
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import dpo
from data import Example
from metrics.intervals import Estimate, debiased, estimate_flip_rate, mean, share

MATCHED = 0.9  # the shorter answer has at least this share of the longer one's tokens


def flips(examples: Sequence[Example]) -> Tensor | None:
    """Which labels are wrong, [E]; None unless that is known of all of them (`data.Truth`)."""
    known = [e.truth.flipped if e.truth else None for e in examples]
    return None if None in known else torch.tensor(known, dtype=torch.bool)


def for_the_right(score: Tensor, flipped: Tensor | None) -> Tensor:
    """A score [E] of the answer labelled "chosen", with the sign turned where the label is known to be wrong."""
    return score if flipped is None else torch.where(flipped, -score, score)


def accuracy(score: Tensor) -> Estimate:
    """Share of score > 0, [E] or [seeds, E]; the interval counts each of the E examples once."""
    n = score.shape[-1]
    return share((score > 0).sum().item() * n / score.numel(), n)


def longer_wins(lengths: Tensor) -> Tensor:
    """[E]: 1 where the longer of two answers [E, 2] is the chosen one, 1/2 where both are equally long, else 0."""
    return ((lengths[:, 0] - lengths[:, 1]).sign().double() + 1) / 2


def measure_rewards(
    margin: Tensor, flipped: Tensor | None, eps: float | None, beta: float, lengths: Tensor | None = None
) -> dict[str, Estimate]:
    """margin [seeds, E] in nats: means over the seeds, and the flip rate by the first; flipped [E]: is the label wrong, if
    that is known; lengths [E, 2] in tokens of chosen and rejected. A measure that does not apply is left out."""
    made = {"reward accuracy": accuracy(margin)}
    if eps is not None:
        made["debiased accuracy"] = debiased(made["reward accuracy"], eps)
    if flipped is not None:
        made["clean accuracy"] = accuracy(for_the_right(margin, flipped))
    made["ties"] = accuracy(margin == 0)
    made |= {"margin": mean(margin.mean(dim=0)), "DPO loss": mean(dpo.sigmoid_loss(beta * margin).mean(dim=0))}
    if margin[0].any():
        made["flip rate"] = estimate_flip_rate(margin[0])
    if lengths is not None:
        matched = lengths.min(dim=1).values >= MATCHED * lengths.max(dim=1).values  # [E]
        made |= {"matched": accuracy(margin[:, matched])} if matched.any() else {}
    return made


def measure_baselines(
    policy: Tensor, reference: Tensor | None, lengths: Tensor, flipped: Tensor | None
) -> dict[str, Estimate]:
    """What needs no reward: lengths [E, 2] in tokens, and log-probabilities [E, 2] in nats, of chosen and rejected."""
    made = {"longer wins": share(longer_wins(lengths).sum().item(), len(lengths))}
    for name, table in (("reference", reference), ("model alone", policy)):
        if table is not None:
            made[f"{name}, sum"] = accuracy(table[:, 0] - table[:, 1])
            per_token = table / lengths  # [E, 2]
            made[f"{name}, per token"] = accuracy(per_token[:, 0] - per_token[:, 1])
    if flipped is not None:
        made["right answer likelier"] = accuracy(for_the_right(policy[:, 0] - policy[:, 1], flipped))
    return made


def training_summary(
    policy: Tensor, reference: Tensor, lengths: Tensor, flipped: Tensor | None, eps: float | None
) -> dict[str, float]:
    """The few numbers in the table at the end of a training run, without intervals. Shapes as above."""
    margin, own = dpo.margin(policy, reference), policy[:, 0] - policy[:, 1]  # two of [E]
    per_token = policy.sum(dim=0) / lengths.sum(dim=0)  # [2]
    correct = (margin > 0).double()  # [E]
    made = {
        "reward accuracy": correct.mean(),
        "debiased accuracy": dpo.debiased_accuracy(correct.mean(), eps),
        "ties": (margin == 0).double().mean(),
        "longer answer wins": longer_wins(lengths).mean(),
        "chosen likelier": (own > 0).double().mean(),
        "logp per token, chosen": per_token[0],
        "logp per token, rejected": per_token[1],
    }
    if flipped is not None:
        made["clean reward accuracy"] = (for_the_right(margin, flipped) > 0).double().mean()
        made["right answer likelier"] = (for_the_right(own, flipped) > 0).double().mean()
    return {name: float(value) for name, value in made.items()}
