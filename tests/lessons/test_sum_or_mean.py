"""The optimum of averaged log-probabilities satisfies what it is made from, and for answers of one length is DPO's own."""

import pytest
import torch

from lessons.tuning.beta import draw_world, optimum
from lessons.tuning.sum_or_mean import BETA, draw_tokens, optimum_of_mean, token_weights


def test_optimum_of_the_mean():
    world, tokens = draw_world(3), draw_tokens(10, seed=3)
    policy = optimum_of_mean(world, 2.0, tokens)
    assert policy.exp().sum().item() == pytest.approx(1)
    z = 2.0 * ((policy - world.reference) / tokens).diff()
    torch.testing.assert_close(z, world.reward.diff())  # the margins are the judge's

    alike = torch.full_like(tokens, 7)
    torch.testing.assert_close(optimum_of_mean(world, 7 * 0.5, alike), optimum(world, 0.5))


def test_weight_of_a_token_by_hand():
    """d softplus(-z) / dz = -1/2 at z = 0."""
    assert token_weights([2, 5], averaged=False) == pytest.approx([-BETA / 2, BETA / 2])
    assert token_weights([2, 5], averaged=True) == pytest.approx([-BETA / 4, BETA / 10])
