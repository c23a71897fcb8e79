"""A judge is asked in both orders and believed only where it agrees with itself."""

import pytest

from metrics.judge import compare, outcome, summary


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("A", "B", "win"),
        ("B", "A", "loss"),
        ("tie", "tie", "tie"),
        ("A", "A", "inconsistent"),  # always the first
        ("B", "B", "inconsistent"),
        ("A", "tie", "inconsistent"),
        ("tie", "B", "inconsistent"),
        (None, "A", "unjudged"),
        ("A", None, "unjudged"),
    ],
)
def test_outcomes(forward, backward, expected):
    assert outcome(forward, backward) == expected


def test_a_judge_that_likes_the_first_answer_is_never_believed():
    asked = compare(["q"] * 3, ["a", "b", "c"], ["x", "y", "z"], lambda wanted: ["A"] * len(wanted))
    assert asked == ["inconsistent"] * 3
    assert summary(asked, ["a", "b", "c"], ["x", "y", "z"])["win rate"] is None


def test_equal_answers_are_a_tie_and_cost_nothing():
    def ask(wanted):
        assert len(wanted) == 2 and "Answer A:\nlong answer" in wanted[0].messages[1][1]
        assert "Answer B:\nlong answer" in wanted[1].messages[1][1]
        return ["A", "B"]

    made = compare(["q1", "q2"], ["same", "long answer"], ["same", "short"], ask)
    assert made == ["tie", "win"]
    counted = summary(made, ["same", "long answer"], ["same", "short"])
    assert counted["win rate"].value == 1 and counted["win rate"].n == 1
    assert counted["tie"].value == 0.5 and counted["longer answer wins"].value == 1


def test_counts():
    ours, theirs = ["aaa", "a", "aa", "a", "a"], ["b", "bbb", "bb", "b", "b"]
    made = summary(["win", "win", "loss", "inconsistent", "unjudged"], ours, theirs)
    assert made["win rate"].value == pytest.approx(2 / 3)
    assert made["longer answer wins"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert made["inconsistent"].value == made["unjudged"].value == 0.2
