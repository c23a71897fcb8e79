"""Rewards of three pairs by hand, and the baselines that stand beside them."""

import math

import pytest
import torch

from data import Example, Truth
from dpo import margin
from metrics.preferences import flips, measure_baselines, measure_rewards, training_summary

# log-probabilities of chosen and rejected: margins over the reference are 2, -1 and 0
POLICY = torch.tensor([[-10.0, -15.0], [-20.0, -18.0], [-5.0, -7.0]])
REFERENCE = torch.tensor([[-11.0, -14.0], [-19.0, -18.0], [-6.0, -8.0]])
LENGTHS = torch.tensor([[10, 5], [10, 9], [4, 4]])
FLIPPED = torch.tensor([False, True, False])


def test_rewards_by_hand():
    made = measure_rewards(margin(POLICY, REFERENCE)[None], FLIPPED, 0.1, 0.5, LENGTHS)
    assert made["reward accuracy"].value == pytest.approx(1 / 3)  # 2 > 0; -1 is not, and neither is the tie
    assert made["ties"].value == pytest.approx(1 / 3)
    assert made["debiased accuracy"].value == pytest.approx((1 / 3 - 0.1) / 0.8)
    assert made["clean accuracy"].value == pytest.approx(2 / 3)  # the flipped pair's -1 is +1 for the right answer
    assert made["margin"].value == pytest.approx(1 / 3)
    expected = sum(math.log1p(math.exp(-0.5 * m)) for m in (2, -1, 0)) / 3
    assert made["DPO loss"].value == pytest.approx(expected)
    assert made["matched"].value == 0 and made["matched"].n == 2  # the last two pairs: 9 of 10 tokens, and 4 of 4


def test_baselines_by_hand():
    made = measure_baselines(POLICY, REFERENCE, LENGTHS, FLIPPED)
    assert made["longer wins"].value == pytest.approx((1 + 1 + 0.5) / 3)
    assert made["reference, sum"].value == pytest.approx(2 / 3)  # -11 > -14, -19 < -18, -6 > -8
    assert made["reference, per token"].value == 1  # -1.1 > -2.8, -1.9 > -2, -1.5 > -2
    assert made["model alone, sum"].value == pytest.approx(2 / 3)  # -10 > -15, -20 < -18, -5 > -7
    assert made["model alone, per token"].value == pytest.approx(2 / 3)  # -1 > -3, -2 = -2, -1.25 > -1.75
    assert made["right answer likelier"].value == 1


def test_what_does_not_apply_is_left_out():
    made = measure_rewards(margin(POLICY, POLICY)[None], None, None, 1.0)
    # A model that is its own reference has no margin, so nothing says how noisy the labels are.
    assert not {"debiased accuracy", "clean accuracy", "flip rate"} & set(made)
    assert made["ties"].value == 1 and made["reward accuracy"].value == 0
    assert "reference, sum" not in measure_baselines(POLICY, None, LENGTHS, None)


def test_the_table_of_a_training_run_shows_the_same_numbers():
    made = training_summary(POLICY, REFERENCE, LENGTHS, FLIPPED, eps=0.1)
    assert made["reward accuracy"] == pytest.approx(1 / 3) and made["clean reward accuracy"] == pytest.approx(2 / 3)
    assert made["logp per token, chosen"] == pytest.approx(-35 / 24) and made["longer answer wins"] == pytest.approx(2.5 / 3)
    assert made["logp per token, rejected"] == pytest.approx(-40 / 18) and made["chosen likelier"] == pytest.approx(2 / 3)
    assert made["debiased accuracy"] == pytest.approx((1 / 3 - 0.1) / 0.8) and made["right answer likelier"] == 1
    assert training_summary(POLICY, REFERENCE, LENGTHS, None, eps=None)["debiased accuracy"] == pytest.approx(1 / 3)


def test_the_order_of_the_pairs_changes_nothing():
    order = torch.tensor([2, 0, 1])
    a = measure_rewards(margin(POLICY, REFERENCE)[None], FLIPPED, 0.1, 0.5, LENGTHS)
    b = measure_rewards(margin(POLICY[order], REFERENCE[order])[None], FLIPPED[order], 0.1, 0.5, LENGTHS[order])
    assert {k: v.value for k, v in a.items()} == pytest.approx({k: v.value for k, v in b.items()})


def test_flips_are_known_of_all_pairs_or_of_none():
    right, wrong = (Example([1], [[2], [3]], truth=Truth(flipped=flipped)) for flipped in (False, True))
    assert flips([right, wrong]).tolist() == [False, True]
    assert flips([right, Example([1], [[2], [3]], truth=Truth(answer="2"))]) is None
    assert flips([right, Example([1], [[2], [3]])]) is None
