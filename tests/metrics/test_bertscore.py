"""BERTScore's matching, by hand. Scores of whole texts are compared in tests/parity."""

import sys

import pytest
import torch

from metrics.bertscore import greedy_match, load_encoder
from runtime.files import InputError


def match(candidate, reference, candidate_counts, reference_counts):
    made = (torch.tensor(x) for x in (candidate, reference))
    return greedy_match(*made, torch.tensor(candidate_counts), torch.tensor(reference_counts)).item()


def test_matching_by_hand():
    """Lengths do not count, only directions: candidate (1,0), (0,1); reference (1,0), (3,4)/5, (-1,0). Their cosines are 1,
    0.6, -1 and 0, 0.8, 0."""
    candidate, reference = [[2.0, 0.0], [0.0, 7.0]], [[1.0, 0.0], [3.0, 4.0], [-5.0, 0.0]]
    # P = (1 + 0.8) / 2 = 0.9; R = (1 + 0.8 + 0) / 3 = 0.6; F = 1.08 / 1.5
    assert match(candidate, reference, [True, True], [True, True, True]) == pytest.approx(0.72)
    # Only the candidate's first and the reference's last two count: P = 1; R = (0.8 + 0) / 2 = 0.4; F = 0.8 / 1.4. That 0.8
    # is the cosine with a token that does not count itself.
    assert match(candidate, reference, [True, False], [False, True, True]) == pytest.approx(0.8 / 1.4)


def test_cosines_below_zero_stay_below_zero():
    assert match([[1.0, 0.0]], [[-1.0, 0.0]], [True], [True]) == -1


def test_a_text_in_which_nothing_counts_scores_zero():
    x, y = [[1.0, 0.0]], [[0.6, 0.8]]
    assert match(x, y, [False], [True]) == match(x, y, [True], [False]) == match(x, y, [False], [False]) == 0
    assert match([[1.0, 0.0]], [[0.0, 1.0]], [True], [True]) == 0  # P = R = 0: not 0 / 0


def test_without_transformers_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="^--bert needs the transformers package: pip install transformers$"):
        load_encoder(tmp_path, None, "cpu")
