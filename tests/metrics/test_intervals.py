"""Intervals by hand and by simulation; the flip rate of labels that are flipped at a known rate."""

import math
import random

import pytest
import torch

import demo
from data import ChatML, Ledger, encode, load_tokenizer
from metrics.intervals import debiased, estimate_flip_rate, mean, ratio, share
from model import Phi, all_logprobs
from runtime.flags import settle
from train import step_gradients


def test_wilson_by_hand():
    """k = 8 of n = 10: centre (0.8 + 0.192)/(1.384) = 0.7168, half width 1.96 sqrt(0.016 + 0.0096)/1.384 = 0.2266."""
    estimate = share(8, 10)
    assert (estimate.value, estimate.n) == (0.8, 10)
    assert estimate.low == pytest.approx(0.4902, abs=1e-4) and estimate.high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_stays_within_0_and_1_and_contains_its_share():
    for n in (1, 3, 1000):
        assert share(0, n).low == 0 and 0 < share(0, n).high < 1
        assert share(n, n).high == 1 and 0 < share(n, n).low < 1
        assert share(n / 2, n).low < 0.5 < share(n / 2, n).high


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_wilson_covers_the_truth_in_about_95_of_100_samples(p):
    rng = random.Random(0)
    covered = 0
    for _ in range(500):
        estimate = share(sum(rng.random() < p for _ in range(60)), 60)
        covered += estimate.low <= p <= estimate.high
    assert 0.92 <= covered / 500 <= 0.99


def test_debiasing_is_linear_and_not_cut():
    """a = 0.8 with eps = 0.2 is c = 1; a = 0.5 stays 0.5 at any eps; more than 1 - eps is more than 1."""
    assert debiased(share(80, 100), 0.2).value == pytest.approx(1)
    assert debiased(share(50, 100), 0.3).value == 0.5
    assert debiased(share(90, 100), 0.2).value > 1
    estimate = debiased(share(80, 100), 0.2)
    assert estimate.high - estimate.low == pytest.approx((share(80, 100).high - share(80, 100).low) / 0.6)


def test_the_bootstrap_of_a_mean_is_close_to_its_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    estimate, error = mean(values), 1.96 * values.std().item() / 20
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.high - estimate.low == pytest.approx(2 * error, rel=0.15)
    assert estimate == mean(values)  # the same draws every time


def test_the_bootstrap_takes_the_middle_95_percent():
    """Of 100 zeros and ones, half each, 100 draws give 40 to 60 ones with a probability of 96.5%, 41 to 59 with 94.3%. So
    the middle 95% end at 0.40 or 0.41, and at 0.59 or 0.60; the middle 90% would end at 0.42 and 0.58."""
    estimate = mean(torch.arange(100) % 2)
    assert 0.395 < estimate.low < 0.415 and 0.585 < estimate.high < 0.605 and estimate.n == 100


def test_a_ratio_draws_examples_not_tokens():
    """Two examples, of 1 nat over 1 token and of 0 over 9: both, either alone, so from 0 to 1."""
    estimate = ratio(torch.tensor([1.0, 0.0]), torch.tensor([1, 9]))
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (pytest.approx(0.1), 0, 1, 2)


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    """10 nats over 2 tokens and 1 nat over 8: 11/10, not (5 + 1/8)/2."""
    assert ratio(torch.tensor([10.0, 1.0]), torch.tensor([2, 8])).value == pytest.approx(1.1)


def test_a_bootstrap_of_one_example_knows_nothing_but_it():
    estimate = mean(torch.tensor([3.0]))
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (3, 3, 3, 1)


# ---------------------------------------------------------------------------------------------------------- the flip rate


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("slope", [0.5, 3.0])
def test_the_flip_rate_of_pairs_that_follow_the_model(eps, slope):
    """Margins m ~ N(0, 2), clean preferences with probability sigma(slope m), a share eps of the labels swapped."""
    generator = torch.Generator().manual_seed(int(100 * eps))
    m = 2 * torch.randn(4000, generator=generator)
    agrees = torch.rand(4000, generator=generator) < (slope * m).sigmoid()
    flipped = torch.rand(4000, generator=generator) < eps
    estimate = estimate_flip_rate(torch.where(agrees != flipped, m, -m))
    assert estimate.low <= eps <= estimate.high
    if slope == 3:  # at 0.5 few margins reach the level where the curve shows its eps, and the interval says so
        assert estimate.high - estimate.low < 0.1


def test_the_interval_covers_the_rate_in_about_95_of_100_data_sets():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        m = 2 * torch.randn(400, generator=generator)
        agrees = torch.rand(400, generator=generator) < (2 * m).sigmoid()
        flipped = torch.rand(400, generator=generator) < 0.2
        estimate = estimate_flip_rate(torch.where(agrees != flipped, m, -m))
        covered += estimate.low <= 0.2 <= estimate.high
    assert covered >= 35


def test_the_interval_ends_where_the_likelihood_has_fallen_by_1_92_nats():
    """Of small and of large margins 70 in 100 agree with their labels, so the model is as sure of the small ones. With an
    eps above 0.3 every slope that is large enough fits best, and the likelihood is binomial in eps."""
    m = torch.tensor(([1.0] * 70 + [-1.0] * 30) * 2) * torch.tensor([1.0, 1000.0]).repeat_interleave(100)

    def nats(eps):
        return 140 * math.log(1 - eps) + 60 * math.log(eps)

    estimate = estimate_flip_rate(m)
    assert estimate.value == pytest.approx(0.3, abs=0.001) and estimate.n == 200
    assert nats(0.3) - nats(estimate.high) == pytest.approx(1.92, abs=0.07)  # rates are tried in steps of 0.001
    assert 0.2 < estimate.low < 0.3 - (estimate.high - 0.3)  # below 0.3 the large margins alone say no


def uneven(shape, eps, seed, n=300):
    """Margins [n] of labels whose flips depend on the pair: of clean preferences with probability sigma(2 m), m ~ N(0, 2), a
    label is flipped with probability `shape`(|m|), scaled to a mean of eps and at most one half."""
    generator = torch.Generator().manual_seed(seed)
    m = 2 * torch.randn(n, generator=generator)
    agrees = torch.rand(n, generator=generator) < (2 * m).sigmoid()
    weight = shape(m.abs())
    factor = min((f for f in torch.logspace(-2, 2, 400)), key=lambda f: abs((f * weight).clamp(max=0.5).mean() - eps))
    flipped = torch.rand(n, generator=generator) < (factor * weight).clamp(max=0.5)
    return torch.where(agrees != flipped, m, -m)


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.4])
def test_flips_of_unsure_pairs_do_not_show(eps):
    """People mislabel pairs that are hard. Such flips look like a smaller slope, and the interval excludes the truth."""
    made = [estimate_flip_rate(uneven(lambda size: (-size).exp(), eps, seed)) for seed in range(3)]
    assert all(estimate.value <= 0.04 and estimate.high < eps for estimate in made)


def test_flips_of_sure_pairs_show_too_much():
    estimate = estimate_flip_rate(uneven(lambda size: 1 - (-size / 2).exp(), 0.2, seed=0, n=1500))
    assert estimate.low > 0.2 and estimate.value == pytest.approx(0.28, abs=0.05)


def test_a_model_that_is_sure_and_wrong_counts_its_errors_as_flips():
    """A fifth of the labels is flipped, and on a fifth of the pairs, easy and hard, the model itself is wrong: then
    2 x .2 x .8 = .32 of the labels contradict it however sure it is."""
    generator = torch.Generator().manual_seed(0)
    m = 2 * torch.randn(1500, generator=generator)
    agrees = torch.rand(1500, generator=generator) < (3 * m).sigmoid()
    differs = (torch.rand(1500, generator=generator) < 0.2) != (torch.rand(1500, generator=generator) < 0.2)
    estimate = estimate_flip_rate(torch.where(agrees != differs, m, -m))
    assert 0.2 < estimate.low < 0.32 < estimate.high


def test_the_flip_rate_does_not_depend_on_the_unit_of_the_margins():
    m = torch.randn(500, generator=torch.Generator().manual_seed(1)) + 1
    assert estimate_flip_rate(m) == estimate_flip_rate(1000 * m)


def test_margins_that_know_nothing_leave_a_wide_interval():
    m = torch.randn(300, generator=torch.Generator().manual_seed(2))
    assert estimate_flip_rate(m).high > 0.45
    with pytest.raises(ValueError, match="all margins are 0"):
        estimate_flip_rate(torch.zeros(5))


@pytest.fixture(scope="module")
def clean_margins(tiny):
    """Reward margins, right answer minus wrong one, of 400 held-out demo questions under a model tuned by DPO on 20% flipped
    labels, and a reference that knows nothing."""
    model, chat = Phi.from_pretrained(tiny), ChatML(load_tokenizer(tiny))
    questions = demo.make_questions(900, 0)

    def examples(rows):
        return encode(rows, chat, 512, 256, Ledger())

    train = examples(demo.make_pair_rows(questions[:500], 0.2, 0))
    held_out = examples(demo.make_pair_rows(questions[500:], 0.0, 0))
    flags = dict(loss="robust", beta=0.3, eps=0.2, nll_weight=0.0, micro_batch_size=16, device="cpu", dtype="fp32")
    settings = settle("dpo", flags).settings
    before = all_logprobs(model, held_out, 64, "cpu", "fp32", "")
    reference = all_logprobs(model, train, 64, "cpu", "fp32", "")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for start in range(0, len(train), 16):
        part = slice(start, start + 16)
        step_gradients(model, train[part], reference[part], settings)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (all_logprobs(model, held_out, 64, "cpu", "fp32", "") - before).diff(dim=1)[:, 0].neg()


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_the_flip_rate_of_demo_labels(clean_margins, eps):
    n = len(clean_margins)
    flipped = torch.zeros(n, dtype=torch.bool)
    flipped[random.Random(7).sample(range(n), round(eps * n))] = True
    estimate = estimate_flip_rate(torch.where(flipped, -clean_margins, clean_margins))
    assert estimate.low <= eps <= estimate.high
    assert estimate.high - estimate.low < (0.3 if eps < 0.4 else 0.5)  # near one half, labels say little about their rate
