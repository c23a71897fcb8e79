"""Preference pairs, measured: does the model's reward order them as the labels do, and would a ruler do as well?

With the reward margin m = log pi/pi_ref (chosen) - log pi/pi_ref (rejected), in nats, of every pair (dpo.py has beta on it,
which changes no sign):

    reward accuracy    share of m > 0; a tie, m = 0, is no success and is counted apart. The course (CS-552) and TRL say the
                       same: chosen reward > rejected reward
    debiased accuracy  what that would be on clean labels, if a share eps of these is flipped (`dpo.debiased_accuracy`)
    clean accuracy     on the true labels, where the rows tell which were flipped (the demo's do)
    margin             mean m; comparable across beta and eps
    DPO loss           mean softplus(-beta m), without any eps: comparable across eps at one beta
    flip rate          of the labels, as `intervals.estimate_flip_rate` makes of m

Beside it, what needs no training, because an accuracy means nothing alone:

    longer, shorter    accuracy of "the longer answer wins" and of its opposite; equal lengths count one half
    reference          accuracy of log pi_ref, as a sum over the answer and per token
    matched            reward accuracy on pairs of nearly equal length, where a ruler is of no use
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.intervals import Estimate, debiased, estimate_flip_rate, mean, share

MATCHED = 0.9  # the shorter answer has at least this share of the longer one's tokens


def accuracy(score: Tensor) -> Estimate:
    """Share of score > 0, [E]."""
    return share((score > 0).sum().item(), len(score))


def measure_rewards(
    policy: Tensor, reference: Tensor, lengths: Tensor, flipped: Tensor | None, eps: float | None, beta: float
) -> dict[str, Estimate]:
    """policy, reference: log-probabilities [E, 2] in nats of chosen and rejected; lengths [E, 2] in tokens; flipped [E]: is
    the label wrong, if that is known. A measure that does not apply is left out."""
    margin = (policy - reference).diff(dim=1)[:, 0].neg()  # [E]
    made = {"reward accuracy": accuracy(margin)}
    if eps is not None:
        made["debiased accuracy"] = debiased(made["reward accuracy"], eps)
    if flipped is not None:
        made["clean accuracy"] = accuracy(torch.where(flipped, -margin, margin))
    made |= {
        "ties": share((margin == 0).sum().item(), len(margin)),
        "margin": mean(margin),
        "DPO loss": mean(F.softplus(-beta * margin)),
    }
    if margin.any():
        made["flip rate"] = estimate_flip_rate(margin)
    matched = matched_lengths(lengths)
    if matched.any():
        made["matched"] = accuracy(margin[matched])
    return made


def measure_baselines(
    policy: Tensor, reference: Tensor | None, lengths: Tensor, flipped: Tensor | None
) -> dict[str, Estimate]:
    """What needs no reward: lengths, and log-probabilities as they are. Shapes as in `measure_rewards`."""
    longer = (lengths[:, 0] - lengths[:, 1]).sign()  # [E]
    wins = ((longer + 1) / 2).sum().item()
    made = {"longer wins": share(wins, len(longer)), "shorter wins": share(len(longer) - wins, len(longer))}
    for name, table in (("reference", reference), ("model alone", policy)):
        if table is not None:
            made[f"{name}, sum"] = accuracy(table.diff(dim=1)[:, 0].neg())
            made[f"{name}, per token"] = accuracy((table / lengths).diff(dim=1)[:, 0].neg())
    if flipped is not None:
        own = policy.diff(dim=1)[:, 0].neg()
        made["right answer likelier"] = accuracy(torch.where(flipped, -own, own))
    return made


def matched_lengths(lengths: Tensor) -> Tensor:
    """Which pairs [E] have answers of nearly equal lengths [E, 2]."""
    return lengths.min(dim=1).values >= MATCHED * lengths.max(dim=1).values


def training_summary(
    policy: Tensor, reference: Tensor, lengths: Tensor, flipped: Tensor | None, eps: float | None
) -> dict[str, float]:
    """The few of these numbers that the table at the end of a training run shows. Shapes as in `measure_rewards`."""
    rewards = measure_rewards(policy, reference, lengths, flipped, eps, beta=1.0)
    baselines = measure_baselines(policy, None, lengths, flipped)
    per_token = policy.sum(dim=0) / lengths.sum(dim=0)  # [2]
    made = {
        "reward accuracy": rewards["reward accuracy"],
        "debiased accuracy": rewards.get("debiased accuracy", rewards["reward accuracy"]),
        "ties": rewards["ties"],
        "longer answer wins": baselines["longer wins"],
        "chosen likelier": baselines["model alone, sum"],
    }
    made = {name: estimate.value for name, estimate in made.items()}
    made |= {"logp per token, chosen": per_token[0].item(), "logp per token, rejected": per_token[1].item()}
    if flipped is not None:
        made["clean reward accuracy"] = rewards["clean accuracy"].value
        made["right answer likelier"] = baselines["right answer likelier"].value
    return made
