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
pushing its margin for ever, and the loss crosses zero (at z = 1.55 for eps = 0.1) and falls without bound. A run with the
lowest robust loss is the run that diverged most; compare runs by accuracy, by margin, or by the eps-free loss logged
here as `dpo_loss`.

One pair by hand: log-probabilities -12 and -15 under the policy, -13 and -14 under the reference, beta = 0.1:

>>> z = 0.1 * torch.tensor([(-12 - -13) - (-15 - -14)])
>>> [round(loss.item(), 4) for loss in (z, sigmoid_loss(z), conservative_loss(z, 0.1), robust_loss(z, 0.1))]
[0.2, 0.5981, 0.6181, 0.5731]

Letters: P pairs. Completions come in the order chosen, rejected, chosen, rejected, ... , so N = 2P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.files import InputError

# ------------------------------------------------------------------------------------- losses of z: [P] -> [P], in nats


def sigmoid_loss(z: Tensor) -> Tensor:
    """softplus(-z). DPO, Rafailov et al. 2023, eq. 7."""
    return F.softplus(-z)


def conservative_loss(z: Tensor, eps: float) -> Tensor:
    """(1-eps) softplus(-z) + eps softplus(z). cDPO, Mitchell 2023, eq. 3: cross-entropy with the label smoothed by eps."""
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z)


def robust_loss(z: Tensor, eps: float) -> Tensor:
    """[(1-eps) softplus(-z) - eps softplus(z)] / (1-2 eps). rDPO, Chowdhury, Kini, Natarajan 2024, eq. 12.

    Unbiased: with probability 1-eps the label is right and the pair's loss is L(z), with eps it is flipped and is L(-z);
    (1-eps) L(z) + eps L(-z) = softplus(-z).
    """
    return ((1 - eps) * F.softplus(-z) - eps * F.softplus(z)) / (1 - 2 * eps)


def hinge_loss(z: Tensor) -> Tensor:
    """max(0, 1 - z). SLiC-HF, Zhao et al. 2023, eq. 3, as a function of the reward margin."""
    return F.relu(1 - z)


def ipo_loss(z: Tensor, beta: float) -> Tensor:
    """(z/beta - 1/(2 beta))^2. IPO, Azar et al. 2023, eq. 17 (their tau is beta): the log-ratio margin z/beta is pulled to
    1/(2 beta) and no further. Log-ratios are summed over tokens, as in the paper's derivation; TRL averages them."""
    return ((z - 0.5) / beta) ** 2


LOSSES = ("sigmoid", "robust", "conservative", "ipo", "hinge")
LOSSES_WITH_EPS = ("robust", "conservative")


def check_loss(loss: str, beta: float, eps: float | None) -> None:
    """InputError unless `loss` exists, beta > 0, and eps is given exactly where it means something, in [0, 1/2)."""
    if loss not in LOSSES:
        raise InputError(f"--loss {loss}: choose one of {', '.join(LOSSES)}")
    if not 0 < beta < float("inf"):
        raise InputError(f"--beta {beta}: must be a positive number")
    if loss in LOSSES_WITH_EPS and eps is None:
        raise InputError(f"--loss {loss} needs --eps, the share of labels that you believe to be flipped (such as 0.1)")
    if loss not in LOSSES_WITH_EPS and eps is not None:
        raise InputError(f"--loss {loss} has no --eps; it means something for {' and '.join(LOSSES_WITH_EPS)}")
    if eps is not None and not 0 <= eps < 0.5:
        raise InputError(f"--eps {eps}: a flip rate lies in [0, 0.5); at 0.5 the labels say nothing")


def preference_loss(z: Tensor, loss: str, beta: float, eps: float | None) -> Tensor:
    """The loss named `loss` of the margins z [P] -> [P]."""
    check_loss(loss, beta, eps)
    if loss == "sigmoid":
        return sigmoid_loss(z)
    if loss == "robust":
        return robust_loss(z, eps)
    if loss == "conservative":
        return conservative_loss(z, eps)
    return hinge_loss(z) if loss == "hinge" else ipo_loss(z, beta)


# -------------------------------------------------------------------------------------------------- the objective


def objective(
    policy: Tensor, reference: Tensor, lengths: Tensor, loss: str, beta: float, eps: float | None, nll_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of P pairs.

    policy, reference: log-probabilities [2P] in nats, lengths: tokens [2P], all as chosen, rejected, chosen, rejected, ...

    Returns the *sum* of the pairs' losses (the caller divides by the number of pairs in its whole step, so gradients do
    not depend on how the step was cut into micro-batches) and the metrics as {name: [sum, count]} under TRL's names.

    `nll_weight` adds a pull on the chosen answer, - nll_weight * log pi(y_w|x) / |y_w| (Pang et al. 2024, eq. 2): DPO only
    asks that the margin grows, which it may do while *both* answers become improbable.
    """
    chosen, rejected = policy.view(-1, 2).unbind(dim=1)  # [P], [P]
    drift = policy - reference  # log pi / pi_ref  [2P]
    chosen_reward, rejected_reward = (beta * drift).view(-1, 2).unbind(dim=1)
    z = chosen_reward - rejected_reward
    per_pair = preference_loss(z, loss, beta, eps)  # [P]
    nll = -chosen / lengths.view(-1, 2)[:, 0]
    total = (per_pair + nll_weight * nll).sum()

    with torch.no_grad():
        per_pair_metrics = {
            "loss": per_pair + nll_weight * nll,
            "preference_loss": per_pair,
            "dpo_loss": sigmoid_loss(z),
            "nll_loss": nll,
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": z,
            "rewards/accuracies": (z > 0).float(),
            "rewards/ties": (z == 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "drift/chosen": drift.view(-1, 2)[:, 0],
            "drift/rejected": drift.view(-1, 2)[:, 1],
            "drift/absolute": drift.abs().view(-1, 2).mean(dim=1),
        }
        metrics = {
            name: torch.stack((v.sum(), torch.tensor(float(len(v)), device=v.device)))
            for name, v in per_pair_metrics.items()
        }
    return total, metrics


def debiased_accuracy(accuracy: float, eps: float | None) -> float:
    """The accuracy c on clean labels that shows as `accuracy` a on labels flipped at rate eps: a = c(1-eps) + (1-c) eps.

    An estimate from finitely many pairs, so it may leave [0, 1] by chance.
    """
    return accuracy if eps is None else (accuracy - eps) / (1 - 2 * eps)


def check_start(metrics: dict[str, float], loss: str, beta: float, eps: float | None, tolerance: float) -> None:
    """Before the first step policy and reference are one model: no answer has drifted, z = 0, and the loss is ln 2 (robust
    too; hinge 1, IPO 1/(4 beta^2)). InputError if not: then the two differ, and every later number would be wrong.

    `tolerance`: the rounding, in nats per answer, that the compute type allows.
    """
    expected = preference_loss(torch.zeros(1), loss, beta, eps).item()
    drift, measured = metrics["drift/absolute"], metrics["preference_loss"]
    if not drift <= tolerance or not abs(measured - expected) <= 4 * tolerance * max(1.0, 1 / beta):
        raise InputError(
            f"at step 0 the answers have drifted {drift:.3g} nats from the reference (must be 0) and the loss "
            f"is {measured:.6f} (must be {expected:.6f}): the reference log-probabilities are not those of "
            "the starting model. Delete out/reference and run again; if it stays, model, tokenizer or dtype "
            "differ."
        )
