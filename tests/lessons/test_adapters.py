"""The gradients of the first step are those of the lesson's head: (alpha / r) G A^T for B, and 0 for A."""

import torch

from lessons.tuning import adapters as lesson


def test_first_gradients_by_the_formula():
    task = lesson.make_task(4, 8.0, "1/k", seed=1)
    error = (task.model(torch.eye(lesson.SIZE)) - task.wanted).detach()  # [inputs, outputs]
    task.loss().backward()
    for_weight = 2 * error.T  # d loss / d W, for the inputs are the unit vectors
    torch.testing.assert_close(task.layer.lora_B.grad, 8 / 4 * for_weight @ task.layer.lora_A.detach().T)
    assert not task.layer.lora_A.grad.any()


def test_best_error_by_hand(monkeypatch):
    """Singular values 4, 3, 0: rank 1 leaves 3 of 5."""
    monkeypatch.setitem(lesson.SPECTRA, "by hand", torch.tensor([4.0, 3.0, 0.0]))
    assert [round(lesson.best_error(rank, "by hand"), 6) for rank in (1, 2)] == [0.6, 0.0]
