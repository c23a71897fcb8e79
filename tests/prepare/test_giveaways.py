"""What lengths and words alone find, on pairs where the answer is known."""

import random
from collections import Counter

from prepare.giveaways import by_length, by_words, longer_wins
from prepare.mixture import match_lengths


def pair(i, chosen, rejected):
    return {"prompt": f"{i}?", "question": f"{i}?", "chosen": chosen, "rejected": rejected, "source": "s"}


def test_too_few_pairs_give_no_score():
    rows = [pair(i, "longer", "short") for i in range(49)]
    assert longer_wins(rows) == by_length(rows) == by_words(rows) == by_length([]) == "too few pairs"


def test_the_longer_answer_in_three_of_four_pairs():
    """80 pairs: 0.75, with an error of sqrt(0.75 * 0.25 / 80) = 0.0484. Equal lengths count one half."""
    rows = [pair(i, "x" * 30, "x" * 20) if i % 4 else pair(i, "x" * 20, "x" * 30) for i in range(80)]
    assert longer_wins(rows) == by_length(rows) == "75.0% ± 4.8%"
    assert longer_wins([pair(i, "same", "size") for i in range(50)]) == "50.0% ± 7.1%"


def test_a_large_gap_gives_the_answer_away_although_longer_wins_in_half_of_the_pairs():
    """Chosen answers are far longer or a little shorter, so a score of both lengths is always right. No bin has gaps of both
    directions, so matching leaves nothing."""
    draw = random.Random(0)
    rows = []
    for i in range(300):
        length = draw.randint(200, 400)
        chosen, rejected = (length + draw.randint(100, 150), length) if i % 2 else (length, length + draw.randint(1, 20))
        rows.append(pair(i, "x" * chosen, "y" * rejected))
    assert longer_wins(rows) == "50.0% ± 2.9%" and by_length(rows) == "100.0% ± 0.0%"
    assert match_lengths(rows, 0, Counter()) == []


def test_words_that_only_chosen_answers_have():
    rows = [pair(i, f"Therefore option {i}.", f"It is {i}.") for i in range(60)]
    assert by_words(rows) == "100.0% ± 0.0%"
    rows = [pair(i, f"It is {i}.", f"It is {i + 1000}.") for i in range(60)]
    assert by_words(rows) == "50.0% ± 6.5%"  # words that were not seen before say nothing
