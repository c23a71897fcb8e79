"""Two equally likely answers whose rewards differ by beta ln 3: the optimum is 3/4 and 1/4, KL = ln 2 - H(1/4)."""

import math

import pytest
import torch

from lessons.tuning import beta as lesson


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_optimum_of_two_answers_by_hand(beta):
    world = lesson.World(torch.tensor([0.5, 0.5]).double().log(), torch.tensor([beta * math.log(3), 0]).double())
    policy = lesson.optimum(world, beta)
    torch.testing.assert_close(policy.exp(), torch.tensor([0.75, 0.25]).double())
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert lesson.divergence(policy, world.reference) == pytest.approx(by_hand)
