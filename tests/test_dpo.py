"""Each loss is the formula it claims to be, the robust one undoes label flips, and gradient descent on it finds the
optimum that is known in closed form."""

import contextlib
import doctest
import math

import pytest
import torch
import torch.nn.functional as F

import dpo
from dpo import (
    LOSSES,
    conservative_loss,
    debiased_accuracy,
    hinge_loss,
    ipo_loss,
    margin,
    objective,
    options,
    preference_loss,
    robust_loss,
    sigmoid_loss,
)
from runtime.files import InputError
from runtime.flags import parse, settle
from train import check_start

GRID = torch.linspace(-30, 30, 241, dtype=torch.float64)
EPS = [0.0, 0.01, 0.05, 0.1, 0.25, 0.4, 0.49]


def eps_of(loss):
    return 0.1 if "eps" in options(loss) else None


def slope(loss, z):
    z = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(z), z)[0].item()


def value(loss, z):
    return loss(torch.tensor(z, dtype=torch.float64)).item()


# -------------------------------------------------------------------------------------------------------------- losses


def test_hand_worked_pair_of_the_docstring():
    result = doctest.testmod(dpo)
    assert result.attempted >= 2 and result.failed == 0


@pytest.mark.parametrize("eps", EPS)
def test_robust_loss_averaged_over_flips_is_the_clean_loss(eps):
    average = (1 - eps) * robust_loss(GRID, eps) + eps * robust_loss(-GRID, eps)
    torch.testing.assert_close(average, F.softplus(-GRID), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("eps", EPS)
def test_conservative_loss_is_the_flipped_average_of_the_clean_one_and_robust_a_rescaled_difference(eps):
    right, wrong = F.softplus(-GRID), F.softplus(GRID)
    torch.testing.assert_close(conservative_loss(GRID, eps), (1 - eps) * right + eps * wrong)
    torch.testing.assert_close((1 - 2 * eps) * robust_loss(GRID, eps), (1 - eps) * right - eps * wrong)


@pytest.mark.parametrize("z, expected", [(0, 0.6931), (1, 0.1883), (2, -0.1231), (5, -0.6183), (100, -12.5)])
def test_robust_loss_at_eps_one_tenth(z, expected):
    assert abs(value(lambda z: robust_loss(z, 0.1), float(z)) - expected) < 5e-5


@pytest.mark.parametrize("z", [-5.0, -1.0, 0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("eps", EPS)
def test_slopes(z, eps):
    sigmoid = 1 / (1 + math.exp(z))  # sigma(-z)
    assert math.isclose(slope(sigmoid_loss, z), -sigmoid)
    assert math.isclose(slope(lambda z: conservative_loss(z, eps), z), -(sigmoid - eps), abs_tol=1e-12)
    assert math.isclose(slope(lambda z: robust_loss(z, eps), z), -(sigmoid + eps / (1 - 2 * eps)))


@pytest.mark.parametrize("eps", EPS)
def test_robust_slope_at_zero_and_far_out(eps):
    assert math.isclose(slope(lambda z: robust_loss(z, eps), 0.0), -1 / (2 * (1 - 2 * eps)))
    far_out = slope(lambda z: robust_loss(z, eps), 500.0)
    assert math.isclose(far_out, -eps / (1 - 2 * eps), abs_tol=1e-12)  # never vanishes


@pytest.mark.parametrize("eps, zero", [(0.05, 2.0930), (0.1, 1.5458), (0.25, 0.7645)])
def test_robust_loss_crosses_zero(eps, zero):
    assert value(lambda z: robust_loss(z, eps), zero - 5e-5) > 0 > value(lambda z: robust_loss(z, eps), zero + 5e-5)


def test_robust_loss_of_the_report_s_run_needs_a_senseless_margin():
    """A loss of -59 at eps = .1 is reached where -z eps / (1 - 2 eps) = -z/8 = -59: z = 472, beyond any certainty."""
    assert value(lambda z: robust_loss(z, 0.1), 472.0) == pytest.approx(-59)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.25, 0.4])
def test_conservative_loss_has_its_minimum_at_the_log_odds_of_the_labels(eps):
    lowest = math.log((1 - eps) / eps)
    assert eps != 0.1 or abs(lowest - 2.197) < 5e-4
    assert abs(slope(lambda z: conservative_loss(z, eps), lowest)) < 1e-12
    entropy = -(1 - eps) * math.log(1 - eps) - eps * math.log(eps)
    assert math.isclose(value(lambda z: conservative_loss(z, eps), lowest), entropy)
    assert (conservative_loss(GRID, eps) >= entropy - 1e-12).all()


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_ipo_loss_has_its_minimum_zero_at_one_half_and_is_a_parabola_of_the_log_ratio(beta):
    assert value(lambda z: ipo_loss(z, beta), 0.5) == slope(lambda z: ipo_loss(z, beta), 0.5) == 0
    assert math.isclose(value(lambda z: ipo_loss(z, beta), 0.0), 1 / (4 * beta**2))
    log_ratio = GRID / beta
    torch.testing.assert_close(ipo_loss(GRID, beta), (log_ratio - 1 / (2 * beta)) ** 2)  # eq. 17


def test_hinge_loss_by_hand():
    assert [value(hinge_loss, z) for z in (-1.0, 0.0, 0.25, 1.0, 9.0)] == [2, 1, 0.75, 0, 0]


def test_every_loss_but_ipo_and_hinge_is_ln_2_at_zero():
    at_zero = {loss: preference_loss(torch.zeros(1), loss, 0.1, eps_of(loss)).item() for loss in LOSSES}
    expected = {"sigmoid": math.log(2), "robust": math.log(2), "conservative": math.log(2), "hinge": 1, "ipo": 25}
    assert at_zero == pytest.approx(expected)
    zero = torch.zeros(1, dtype=torch.float64)
    assert [robust_loss(zero, eps).item() for eps in EPS] == pytest.approx([math.log(2)] * len(EPS))


def test_without_flips_robust_and_conservative_are_plain_dpo():
    assert torch.equal(robust_loss(GRID, 0.0), sigmoid_loss(GRID))
    assert torch.equal(conservative_loss(GRID, 0.0), sigmoid_loss(GRID))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_huge_margins_are_finite(loss):
    z = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = preference_loss(z, loss, 0.1, eps_of(loss))
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "loss, beta, eps, message",
    [
        ("dpo", 0.1, None, "there is no loss 'dpo'; choose one of sigmoid, robust, conservative, ipo, hinge"),
        ("sigmoid", 0.0, None, "beta is 0.0, but must be a positive number"),
        ("sigmoid", -0.1, None, "beta is -0.1"),
        ("sigmoid", math.nan, None, "beta is nan"),
        ("sigmoid", math.inf, None, "beta is inf"),
        ("robust", 0.1, None, "the robust loss needs eps"),
        ("conservative", 0.1, None, "the conservative loss needs eps"),
        ("sigmoid", 0.1, 0.1, "the sigmoid loss takes no eps"),
        ("sigmoid", 0.1, 0.0, "the sigmoid loss takes no eps"),
        ("ipo", 0.1, 0.1, "the ipo loss takes no eps"),
        ("hinge", 0.1, 0.1, "the hinge loss takes no eps"),
        ("robust", 0.1, 0.5, "eps is 0.5, but a flip rate lies in"),
        ("conservative", 0.1, 0.9, "eps is 0.9, but a flip rate lies in"),
        ("robust", 0.1, -0.1, "eps is -0.1, but a flip rate lies in"),
        ("robust", 0.1, math.nan, "eps is nan, but a flip rate lies in"),
    ],
)
def test_senseless_settings_are_refused(loss, beta, eps, message):
    with pytest.raises(ValueError) as error:
        preference_loss(torch.zeros(1), loss, beta, eps)
    assert str(error.value).startswith(message)
    if eps is not None:  # the command line says it by the names of its flags
        with pytest.raises(InputError, match="--loss|--beta|--eps"):
            parse(["--stage", "dpo", "--loss", loss, f"--beta={beta}", f"--eps={eps}"])


@pytest.mark.parametrize("eps", [-0.1, 0.5, 0.7, math.nan])
@pytest.mark.parametrize("loss", [robust_loss, conservative_loss])
def test_a_loss_by_itself_refuses_what_is_no_flip_rate(loss, eps):
    with pytest.raises(ValueError, match="a flip rate lies in"):
        loss(torch.zeros(1), eps)


def test_sensible_settings_are_accepted():
    for loss in LOSSES:
        flags = [] if eps_of(loss) is None else ["--eps", str(eps_of(loss))]
        assert parse(["--stage", "dpo", "--loss", loss, *flags]).settings.eps == eps_of(loss)
    assert parse(["--stage", "dpo", "--loss", "robust", "--eps", "0"]).settings.eps == 0


# ----------------------------------------------------------------------------------------------------------- objective

# Four pairs: chosen, rejected. The first is the docstring's, the second a tie, the third ranked wrongly.
POLICY = torch.tensor([[-12.0, -15.0], [-20.0, -30.0], [-9.0, -4.0], [-7.0, -8.0]])
REFERENCE = torch.tensor([[-13.0, -14.0], [-21.0, -31.0], [-8.0, -8.0], [-7.0, -7.0]])
LENGTHS = torch.tensor([[4, 5], [10, 8], [3, 2], [7, 7]])


def means(metrics):
    return {name: (value[0] / value[1]).item() for name, value in metrics.items()}


def test_the_margin_by_hand():
    """Pair 3: -9 - -8 = -1 for the chosen answer, -4 - -8 = 4 for the rejected one."""
    assert margin(POLICY, REFERENCE).tolist() == [2, 0, -5, 1]


def test_metrics_of_two_pairs_by_hand():
    """Drifts +1, -1 | +1, +1; z = 0.1 * 2 and 0: one pair right, one tie."""
    total, metrics = objective(POLICY[:2], REFERENCE[:2], LENGTHS[:2], "robust", 0.1, 0.1, nll_weight=0.0)
    robust, plain = 0.573138, 0.598139  # the docstring's, with two more digits
    assert total.item() == pytest.approx(robust + math.log(2), abs=2e-6)
    assert all(value[1] == 2 for value in metrics.values())
    assert means(metrics) == pytest.approx(
        {
            "loss": (robust + math.log(2)) / 2,
            "preference_loss": (robust + math.log(2)) / 2,
            "dpo_loss": (plain + math.log(2)) / 2,
            "nll_loss": (12 / 4 + 20 / 10) / 2,
            "rewards/chosen": (0.1 + 0.1) / 2,
            "rewards/rejected": (-0.1 + 0.1) / 2,
            "rewards/margins": (0.2 + 0) / 2,
            "rewards/accuracies": 1 / 2,
            "rewards/ties": 1 / 2,
            "logps/chosen": -16,
            "logps/rejected": -22.5,
            "drift/chosen": 1,
            "drift/rejected": 0,
            "drift/absolute": 1,
        },
        abs=2e-6,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_one_batch_of_four_equals_four_batches_of_one(loss):
    """Loss, gradient and metrics, once the sums are divided by the step's pairs."""

    def step(parts):
        policy, sums, loss_sum = POLICY.clone().requires_grad_(), {}, 0.0
        for part in parts:
            total, metrics = objective(policy[part], REFERENCE[part], LENGTHS[part], loss, 0.3, eps_of(loss), 0.5)
            (total / 4).backward()
            loss_sum += total.item() / 4
            sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
        return loss_sum, policy.grad, means(sums)

    whole, cut = step([slice(0, 4)]), step([slice(i, i + 1) for i in range(4)])
    assert whole[0] == pytest.approx(cut[0], rel=1e-6) and whole[2] == pytest.approx(cut[2], rel=1e-6)
    assert whole[0] == pytest.approx(whole[2]["loss"], rel=1e-6)
    assert torch.equal(whole[1], cut[1])  # a pair's gradient is its own, so here not a bit differs


def test_nll_weight_adds_the_chosen_answer_s_loss_per_token():
    plain, _ = objective(POLICY, REFERENCE, LENGTHS, "sigmoid", 0.1, None, nll_weight=0.0)
    pulled, metrics = objective(POLICY, REFERENCE, LENGTHS, "sigmoid", 0.1, None, nll_weight=2.0)
    assert (pulled - plain).item() == pytest.approx(2 * (12 / 4 + 20 / 10 + 9 / 3 + 7 / 7), rel=1e-5)
    assert means(metrics)["loss"] == pytest.approx(pulled.item() / 4)
    assert means(metrics)["preference_loss"] == pytest.approx(plain.item() / 4)


def test_gradient_is_beta_times_the_slope_up_for_chosen_and_down_for_rejected():
    """d loss / d log pi(y_w) = -beta sigma(-z) = - d loss / d log pi(y_l): Rafailov et al. 2023, section 4."""
    policy = POLICY.clone().requires_grad_()
    total, _ = objective(policy, REFERENCE, LENGTHS, "sigmoid", 0.1, None, nll_weight=0.0)
    total.backward()
    z = 0.1 * torch.tensor([2.0, 0.0, -5.0, 1.0])
    expected = torch.stack((-0.1 * torch.sigmoid(-z), 0.1 * torch.sigmoid(-z)), dim=1)
    torch.testing.assert_close(policy.grad, expected)


def test_debiased_accuracy_by_hand():
    assert debiased_accuracy(0.82, 0.1) == pytest.approx(0.9)  # .9 * .9 + .1 * .1 = .82
    assert debiased_accuracy(0.5, 0.1) == pytest.approx(0.5)
    assert debiased_accuracy(0.7, None) == 0.7


def test_debiased_accuracy_recovers_the_clean_one_from_flipped_labels():
    generator = torch.Generator().manual_seed(0)
    n, clean = 200_000, 0.8
    for eps in (0.1, 0.25, 0.4):
        right = torch.rand(n, generator=generator) < clean
        flipped = torch.rand(n, generator=generator) < eps
        observed = (right != flipped).float().mean().item()
        sigma = 0.5 / math.sqrt(n) / (1 - 2 * eps)
        assert abs(debiased_accuracy(observed, eps) - clean) < 4 * sigma < abs(observed - clean)


@pytest.mark.parametrize("loss", LOSSES)
def test_start_with_policy_equal_to_reference_is_accepted_and_any_other_refused(loss):
    def start(policy):
        _, metrics = objective(policy, REFERENCE, LENGTHS, loss, 0.1, eps_of(loss), nll_weight=0.0)
        flags = {"loss": loss, "beta": 0.1, "eps": eps_of(loss), "dtype": "fp32"}
        check_start(means(metrics) | {"grad_norm": 1.0}, 10, settle("dpo", flags).settings)

    start(REFERENCE)
    start(REFERENCE + 1e-4)
    with pytest.raises(InputError, match="at step 0 the answers have drifted"):
        start(POLICY)
    with pytest.raises(InputError):
        start(REFERENCE + torch.tensor([0.05, 0.0]))  # z = 0.005 everywhere: the loss alone would not show it
    cancelling = REFERENCE + torch.tensor([[10.0, 0], [0, 10], [0, 0], [0, 0]])  # z = +1 and -1: their mean is 0
    with pytest.raises(InputError):
        start(cancelling)
    with pytest.raises(InputError):
        start(torch.full_like(REFERENCE, math.nan))


@pytest.mark.parametrize(
    "loss, beta, eps", [("sigmoid", 20, None), ("robust", 1, 0.45), ("ipo", 0.01, None), ("hinge", 9, None)]
)
def test_where_the_loss_is_steep_rounding_is_no_drift(loss, beta, eps):
    """Each answer of 100 tokens is 9e-4 nats from its reference, as in fp32 it may be; a hundred times as far it may not."""
    settings = settle("dpo", {"loss": loss, "beta": beta, "eps": eps, "dtype": "fp32"}).settings
    sway = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for size, accepted in ((9e-4, True), (9e-2, False)):
        _, metrics = objective(REFERENCE + size * sway, REFERENCE, LENGTHS, loss, beta, eps, nll_weight=0.0)
        with contextlib.nullcontext() if accepted else pytest.raises(InputError):
            check_start(means(metrics) | {"grad_norm": 1.0}, 100, settings)


@pytest.mark.parametrize("dtype, most", [("fp32", 1e-3), ("bf16", 0.6)])
def test_longer_answers_may_round_further_from_the_reference(dtype, most):
    """By the square root of their tokens: what 100 tokens may drift, 25 may not."""
    settings = settle("dpo", {"dtype": dtype}).settings
    numbers = {"grad_norm": 1.0, "drift/absolute": 0.99 * most, "preference_loss": math.log(2)}
    check_start(numbers, 100, settings)
    with pytest.raises(InputError, match="drifted"):
        check_start(numbers, 25, settings)


# --------------------------------------------------------------------------------------------------- a two-answer world

# A prompt with two answers, a and b. The policy is one number, the logit of a; Bradley and Terry's annotators, who see
# rewards that differ by r, prefer a with probability sigma(r); a label is then flipped with probability eps. The
# KL-bounded optimum is known (Rafailov et al. 2023, eq. 4): pi proportional to pi_ref exp(reward / beta), so its logit
# is that of the reference plus r / beta.


def tune(loss, r, beta, flip_rate, eps, reference_logit):
    """Gradient descent on the exact expected loss, no sampling; returns the policy's logit."""
    a_preferred = 1 / (1 + math.exp(-r))
    a_labelled = a_preferred * (1 - flip_rate) + (1 - a_preferred) * flip_rate
    share = torch.tensor([a_labelled, 1 - a_labelled], dtype=torch.float64)
    logit = torch.tensor(reference_logit, dtype=torch.float64, requires_grad=True)

    def logp(logit):  # of chosen, rejected, chosen, rejected, for the labels "a wins" and "b wins"
        a, b = F.logsigmoid(logit), F.logsigmoid(-logit)
        return torch.stack((a, b, b, a))

    reference = logp(logit).detach()
    for _ in range(500):
        z = beta * (logp(logit) - reference).view(2, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        expected_loss = share @ preference_loss(z, loss, beta, eps)
        (gradient,) = torch.autograd.grad(expected_loss, logit)
        with torch.no_grad():
            logit -= 4 / beta**2 * gradient  # 1/4 beta^2 bounds the curvature of softplus(beta x)
    return logit.item()


@pytest.mark.parametrize("r", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_with_true_labels_converges_to_the_reference_times_exp_reward_over_beta(r, beta):
    logit = tune("sigmoid", r, beta, flip_rate=0.0, eps=None, reference_logit=0.7)
    assert logit == pytest.approx(0.7 + r / beta, abs=1e-6)


@pytest.mark.parametrize("r", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_with_flipped_labels_robust_converges_to_the_same_point_and_the_others_fall_short(r, eps):
    beta, reference_logit = 0.5, 0.7
    optimum = reference_logit + r / beta
    assert tune("robust", r, beta, eps, eps, reference_logit) == pytest.approx(optimum, abs=1e-6)

    preferred = 1 / (1 + math.exp(-r))
    labelled = preferred * (1 - eps) + (1 - preferred) * eps
    believed = reference_logit + math.log(labelled / (1 - labelled)) / beta  # where plain DPO takes the labels' word
    assert tune("sigmoid", r, beta, eps, None, reference_logit) == pytest.approx(believed, abs=1e-6)
    assert abs(believed - reference_logit) < 0.9 * abs(optimum - reference_logit)
    doubted = tune("conservative", r, beta, eps, eps, reference_logit)  # smooths labels that are already smooth
    assert abs(doubted - reference_logit) < abs(believed - reference_logit)


def test_a_larger_beta_holds_the_policy_nearer_to_the_reference():
    logits = [tune("sigmoid", 1.0, beta, 0.0, None, reference_logit=0.7) for beta in (0.1, 0.3, 1.0)]
    assert [logit - 0.7 for logit in logits] == pytest.approx([10, 10 / 3, 1], abs=1e-6)
