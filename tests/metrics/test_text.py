"""Loss and perplexity by tokens; BLEU and ROUGE of answers that can be counted by hand."""

import math

import pytest
import torch

from data import ChatML, Example, Truth, grades, load_tokenizer
from metrics.tables import answer_summary
from metrics.text import likelihood, similarity


def bleu(answers, references):
    return similarity(answers, references)[0]["BLEU"]


def test_perplexity_is_by_tokens_not_a_mean_of_means():
    """6 nats over 2 tokens, 2 nats over 6: one nat a token; the mean of the answers' means would be 1.67."""
    made = likelihood(torch.tensor([-6.0, -2.0]), torch.tensor([2, 6]))
    assert made["loss"].value == pytest.approx(1) and made["perplexity"].value == pytest.approx(math.e)
    assert made["perplexity"].low == pytest.approx(math.exp(made["loss"].low))


def test_a_perplexity_beyond_all_numbers_is_infinite():
    made = likelihood(torch.tensor([-1e4, -2.0]), torch.tensor([2, 2]))
    assert made["perplexity"].value == math.inf and made["loss"].value == 2500.5


def test_bleu_by_hand():
    """6 words of 7 match, 5 of 6 pairs, 4 of 5, 3 of 4; both are 7 words long, so there is no brevity penalty."""
    made, signature = similarity(["the cat sat on the mat today"], ["the cat sat on the mat yesterday"])
    assert made["BLEU"].value == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    assert "tok:13a" in signature and "version:" in signature


def test_bleu_of_equal_and_of_foreign_texts():
    same = bleu(["a b c d e"] * 3, ["a b c d e"] * 3)
    assert same.value == pytest.approx(100) and same.low == pytest.approx(100)
    assert bleu(["x y z"], ["a b c"]).value == 0
    assert bleu([""], ["a b c"]).value == 0


def test_rouge_by_hand():
    """One word of two is found, of four that there are: P 1/2, R 1/4, F 1/3. The pair "b a" is not in order."""
    made, _ = similarity(["a x"], ["a b c d"])
    assert made["ROUGE-1"].value == pytest.approx(1 / 3) and made["ROUGE-2"].value == 0
    turned, _ = similarity(["b a"], ["a b"])
    assert turned["ROUGE-1"].value == 1 and turned["ROUGE-L"].value == pytest.approx(0.5)


def test_order_does_not_matter():
    answers, references = ["a b c d e", "x", "the answer"], ["a b c d f", "y x", "an answer"]
    one, _ = similarity(answers, references)
    two, _ = similarity(answers[::-1], references[::-1])
    assert {k: v.value for k, v in one.items()} == pytest.approx({k: v.value for k, v in two.items()})


def test_words_are_compared_as_they_stand_in_each_pair():
    """ "running" is not "run"; two words of two are found of four, and one of one: (2/3 + 1)/2."""
    assert similarity(["running"], ["run"])[0]["ROUGE-1"].value == 0
    made = similarity(["a b", "x"], ["a b c d", "x"])[0]["ROUGE-1"]
    assert made.value == pytest.approx((2 / 3 + 1) / 2) and made.n == 2


def test_the_interval_of_bleu_is_around_it_and_within_0_and_100():
    answers = [f"the cat sat on the mat number {i}" for i in range(20)]
    references = [answer if i % 2 else "no word in common with it" for i, answer in enumerate(answers)]
    score = bleu(answers, references)
    assert 0 <= score.low < score.value < score.high <= 100 and score.n == 20
    assert score.high - score.low > 5


def test_the_table_of_a_training_run_counts_answers(tiny):
    chat = ChatML(load_tokenizer(tiny))
    examples = [Example([1], [[2]], choices=["x", "y", "z"], answer=right) for right in range(3)]
    answers = ["A", "Answer: C", "Answer: C"]
    made = answer_summary(answers, [True, False, False], examples, chat)
    assert made["tokens per answer"] == sum(len(chat.encode_text(answer)) for answer in answers) / 3
    assert made["answers that end"] == pytest.approx(1 / 3) and made["sampled: right letter"] == pytest.approx(2 / 3)
    assert "sampled: right letter" not in answer_summary(answers, [True] * 3, [Example([1], [[2]])] * 3, chat)


def test_a_grade_is_a_regex_that_matches_the_whole_answer():
    truth = Truth(grades={"method": r"F = m \* a = \d+ N\.", "method and number": r"F = m \* a = 56 N\."})
    examples = [Example([1], [[2]], truth=truth)] * 4
    answers = [" F = m * a = 56 N.\n", "F = m * a = 57 N.", "F = m + a = 56 N.", "F = m * a = 56 N. Or not."]
    assert grades(answers, examples) == {
        "method": [True, True, False, False],
        "method and number": [True, False, False, False],
    }
    assert grades(answers, [*examples[:3], Example([1], [[2]])]) == {}  # not known of all
