"""Matching the signs of three longer and one shorter chosen answer keeps one of each; ties are left out."""

from lessons.tuning.length import match_signs, percentage
from prepare.giveaways import score


def test_match_signs_keeps_as_many_of_either_sign():
    rows = [
        {"chosen": "a" * chosen, "rejected": "b" * rejected} for chosen, rejected in ((3, 1), (2, 1), (4, 4), (1, 2), (9, 1))
    ]
    assert match_signs(rows) == [rows[0], rows[3]]


def test_percentage_reads_what_a_score_writes():
    assert percentage(score([1.0] * 60 + [0.0] * 40)) == 60.0
