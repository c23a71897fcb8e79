"""The fit behind the lesson on flipped labels: minima worked out by hand, and a loss without one."""

import pytest
import torch

from lessons.tuning.flips import first_step, fit, optimum

LABELS = torch.tensor([[1.0, 1.0, 1.0, -1.0]]).double()  # a share of 3/4 prefers the first answer
ONES = torch.ones(1, 4, 1).double()


# 3/4; 0.9 * 0.75 + 0.1 * 0.25; (0.75 - 0.1) / 0.8
@pytest.mark.parametrize("loss, eps, p", [("sigmoid", None, 0.75), ("conservative", 0.1, 0.7), ("robust", 0.1, 0.8125)])
def test_the_minimum_for_a_pair_that_three_of_four_labels_prefer(loss, eps, p):
    assert fit(ONES, LABELS, loss, eps).sigmoid().item() == pytest.approx(p, abs=1e-9)
    assert optimum(torch.tensor(0.75), loss, eps or 0).item() == pytest.approx(p)


def test_the_robust_loss_has_no_minimum_where_labels_agree_more_than_flips_allow():
    assert fit(ONES, LABELS, "robust", 0.3, steps=20).item() == pytest.approx(20, abs=1)  # 3/4 > 1 - 0.3


def test_adamw_divides_the_larger_robust_gradient_out_again():
    plain, robust = first_step("sigmoid", None), first_step("robust", 0.2)
    torch.testing.assert_close(robust["gradient"], plain["gradient"] / 0.6)
    torch.testing.assert_close(robust["step"], plain["step"])
