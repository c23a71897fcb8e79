"""Direct preference optimization: from log-probabilities to a loss and its metrics.

For a prompt x with a chosen answer y_w and a rejected answer y_l, DPO (Rafailov et al. 2023, eq. 7) minimises

    loss = -log sigmoid(z),    z = beta * [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ]

where pi is the policy that is trained and pi_ref the frozen model that it started from. beta * log pi/pi_ref is the
policy's implicit *reward* of an answer, so z is the reward margin, and loss is the logistic regression of "which of the
two was preferred?" on it. A larger beta makes a nat of drift from the reference count more, so less drift is needed:
beta is the strength of the pull towards the reference.

Human and ChatGPT labels are wrong now and then. If each label is flipped with probability eps < 1/2, the losses answer
in different ways (L is a function of z, softplus(-z) = -log sigmoid(z)):

    sigmoid       L = softplus(-z)                                            believes every label
    conservative  L = (1-eps) softplus(-z) + eps softplus(z)                  stops at its minimum, z = ln((1-eps)/eps)
    robust        L = [(1-eps) softplus(-z) - eps softplus(z)] / (1-2 eps)    averaged over flips it *is* the clean loss

What to watch with the robust loss: it has no minimum. Its slope tends to -eps/(1-2 eps) and never to 0, so a pair keeps
pushing its margin for ever, and the loss crosses zero (at z = 1.55 for eps = 0.1) and falls without bound: it is
softplus(-z) - z eps/(1-2 eps). A robust loss far below 0 only says that margins ran away; compare runs by accuracy, by
margin, or by the eps-free loss logged here as `dpo_loss`.

One pair by hand: log-probabilities -12 and -15 under the policy, -13 and -14 under the reference, beta = 0.1:

>>> z = 0.1 * torch.tensor([(-12 - -13) - (-15 - -14)])
>>> [round(loss.item(), 4) for loss in (z, sigmoid_loss(z), conservative_loss(z, 0.1), robust_loss(z, 0.1))]
[0.2, 0.5981, 0.6181, 0.5731]

Letters: P pairs. A table [P, 2] holds a number for the chosen and one for the rejected answer of each pair.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------- losses of z: [P] -> [P], in nats


def sigmoid_loss(z: Tensor) -> Tensor:
    """softplus(-z). DPO, Rafailov et al. 2023, eq. 7."""
    return F.softplus(-z)


def conservative_loss(z: Tensor, eps: float) -> Tensor:
    """(1-eps) softplus(-z) + eps softplus(z). cDPO, Mitchell 2023, eq. 3: cross-entropy with the label smoothed by eps."""
    check_flip_rate(eps)
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z)


def robust_loss(z: Tensor, eps: float) -> Tensor:
    """[(1-eps) softplus(-z) - eps softplus(z)] / (1-2 eps). rDPO, Chowdhury, Kini, Natarajan 2024, eq. 12.

    Unbiased: with probability 1-eps the label is right and the pair's loss is L(z), with eps it is flipped and is L(-z);
    (1-eps) L(z) + eps L(-z) = softplus(-z).
    """
    check_flip_rate(eps)
    return ((1 - eps) * F.softplus(-z) - eps * F.softplus(z)) / (1 - 2 * eps)


def hinge_loss(z: Tensor) -> Tensor:
    """max(0, 1 - z). SLiC-HF, Zhao et al. 2023, eq. 3, as a function of the reward margin."""
    return F.relu(1 - z)


def ipo_loss(z: Tensor, beta: float) -> Tensor:
    """(z/beta - 1/(2 beta))^2. IPO, Azar et al. 2023, eq. 17 (their tau is beta): the log-ratio margin z/beta is pulled to
    1/(2 beta) and no further. Log-ratios are summed over tokens, as in the paper's derivation; TRL averages them."""
    return ((z - 0.5) / beta) ** 2


# To add a loss, write its function of z and add it here. A parameter called beta or eps gets that setting.
LOSSES = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "conservative": conservative_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
}


def options(loss: str) -> list[str]:
    """What a loss takes besides z: "beta", "eps", or nothing."""
    return list(inspect.signature(LOSSES[loss]).parameters)[1:]


def check_flip_rate(eps: float) -> None:
    """ValueError unless eps is in [0, 1/2): labels that are flipped half of the time say nothing."""
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps is {eps}, but a flip rate lies in [0, 0.5)")


def preference_loss(z: Tensor, loss: str = "sigmoid", beta: float = 0.1, eps: float | None = None) -> Tensor:
    """The loss named `loss` of the reward margins z: [P] -> [P].

    ValueError if there is no such loss, beta is not positive, or eps is missing where the loss takes one, given where it
    takes none, or outside [0, 1/2).
    """
    if loss not in LOSSES:
        raise ValueError(f"there is no loss {loss!r}; choose one of {', '.join(LOSSES)}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}, but must be a positive number")
    takes = options(loss)
    if "eps" in takes and eps is None:
        raise ValueError(f"the {loss} loss needs eps, the share of labels that you believe to be flipped, such as 0.1")
    if "eps" not in takes and eps is not None:
        raise ValueError(f"the {loss} loss takes no eps; leave it out")
    values = {"beta": beta, "eps": eps}
    return LOSSES[loss](z, **{name: values[name] for name in takes})


# -------------------------------------------------------------------------------------------------- the objective


def margin(policy: Tensor, reference: Tensor) -> Tensor:
    """log pi/pi_ref (chosen) - log pi/pi_ref (rejected): [P, 2], [P, 2] -> [P], in nats. The reward margin is z = beta times
    this."""
    drift = policy - reference  # [P, 2]
    return drift[:, 0] - drift[:, 1]


def objective(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    loss: str = "sigmoid",
    beta: float = 0.1,
    eps: float | None = None,
    nll_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of P pairs.

    policy, reference: log-probabilities [P, 2] in nats of the chosen and the rejected answers; lengths: their tokens [P, 2].
    loss, beta, eps: see `preference_loss`, which raises ValueError for values that make no sense.

    Returns the *sum* of the pairs' losses (the caller divides by the number of pairs in its whole step, so gradients do
    not depend on how the step was cut into micro-batches) and the metrics as {name: [sum, count]} under TRL's names.

    `nll_weight` adds a pull on the chosen answer, - nll_weight * log pi(y_w|x) / |y_w| (Pang et al. 2024, eq. 2): DPO only
    asks that the margin grows, which it may do while *both* answers become improbable.
    """
    z = beta * margin(policy, reference)  # [P]
    per_pair = preference_loss(z, loss, beta, eps)  # [P]
    nll = -policy[:, 0] / lengths[:, 0]  # [P]
    total = (per_pair + nll_weight * nll).sum()

    with torch.no_grad():
        drift = policy - reference  # log pi / pi_ref  [P, 2]
        metrics = {
            "loss": per_pair + nll_weight * nll,
            "preference_loss": per_pair,
            "dpo_loss": sigmoid_loss(z),
            "nll_loss": nll,
            "rewards/chosen": beta * drift[:, 0],
            "rewards/rejected": beta * drift[:, 1],
            "rewards/margins": z,
            "rewards/accuracies": (z > 0).float(),
            "rewards/ties": (z == 0).float(),
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
            "drift/chosen": drift[:, 0],
            "drift/rejected": drift[:, 1],
            "drift/absolute": drift.abs().mean(dim=1),
        }
        count = torch.full((), float(len(z)), device=z.device)
        return total, {name: torch.stack((values.sum(), count)) for name, values in metrics.items()}


def debiased_accuracy(accuracy: float, eps: float | None) -> float:
    """The accuracy c on clean labels that shows as `accuracy` a on labels flipped at rate eps: a = c(1-eps) + (1-c) eps.

    Above 1, fewer labels contradict the model than the share eps that is assumed to be wrong: by chance, or because eps is
    too large.
    """
    return accuracy if eps is None else (accuracy - eps) / (1 - 2 * eps)
