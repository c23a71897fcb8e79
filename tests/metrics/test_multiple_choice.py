"""Multiple choice: letters are read from replies, options scored as in a plain forward pass, and bias is counted."""

import math
import random

import pytest
import torch

from data import ChatML, Example, load_tokenizer
from metrics.multiple_choice import bias_by_chance, parse_choice, parse_letter, position_bias, score_options, summary
from model import Phi


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("C", 2),
        (" c", 2),
        ("C.", 2),
        ("(C)", 2),
        ("C) 12 m", 2),
        ("**C**", 2),
        ("Answer: C", 2),
        ("answer: (B)", 1),
        ("**Answer:** B", 1),
        ("The answer is D.", 3),
        ("So the correct option is option B", 1),
        ("Option B is right because of A.", 1),
        ("Answer: D because A is too small", 3),
        ("Answer: A because it acts", 0),
        ("Correct answer - A", 0),
        ("So x = 3: \\boxed{C}", 2),
        (r"The answer is $\boxed{\text{(B)}}$.", 1),
        ("C is correct", 2),
        ("A is the correct answer", 0),
        ("(D) is clearly the right answer, not B", 3),
        ("I think it's B", 1),
        ("I would go with option C.", 2),
        ("Option A is wrong. Option C is right. Option B is wrong.", 2),
        ("Of these, option B fits.", 1),
        ("Option B fits, option C does not.", None),  # which of them?
        ("The answer is B or C.", None),
        ("Neither A nor B is correct", None),
        ("The answer is not A", None),
        ("Answer: F = m a", None),
        ("D. A and B only", 3),
        ("Because 2 + 2 = 4.\n\nAnswer: D", 3),
        ("Answer: A\nNo, wait.\nAnswer: B", 1),
        ("B. it is so\nbecause I say so", 1),
        ("B\nNo, wait.\nC", 2),  # the last line before the first
        ("A) no\nAnswer: C", 2),  # what is named before what stands alone
        ("A force acts on it", None),
        ("Answer: A force acts on it", None),
        ("The answer is a cat", None),
        ("Answer: E", None),  # of four options
        ("", None),
        ("I do not know.", None),
    ],
)
def test_the_letter_of_a_reply(reply, letter):
    assert parse_letter(reply, 4) == letter


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("A", "A"),
        (' "Tie". ', "tie"),
        ("a", "A"),
        ("A is better.", "A"),
        ("Answer A is better than answer B.", "A"),
        ("Verdict: B", "B"),
        ("It is a tie: both are right.", "tie"),
        ("Neither A nor B is better: a tie.", "tie"),
        ("A or B", None),
        ("Answer A: right. Answer B: wrong.", None),
        ("C", None),
    ],
)
def test_the_verdict_of_a_judge(reply, name):
    found = parse_choice(reply, ("A", "B", "tie"))
    assert name == (None if found is None else ("A", "B", "tie")[found])


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("Physics.", 0),
        ("The topic is **computer science**.", 1),
        ("Electrical Engineering and Computer Science", 2),  # in which another name is hidden
        ("Physics or Computer Science", None),
        ("A physical question", None),
        ("", None),
    ],
)
def test_the_topic_that_a_reply_names(reply, index):
    assert parse_choice(reply, ("Physics", "Computer Science", "Electrical Engineering and Computer Science")) == index


def logprob(model, prompt, reply):
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + reply])).log_softmax(-1)[0]
    places = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
    return sum(logprobs[place, token].item() for place, token in zip(places, reply, strict=True))


def questions(chat):
    examples = []
    for i, letter in enumerate("ABCAB"):
        # Neither ascending nor descending in length: batches are sorted by length, and the results must come back in order.
        prompt = chat.prompt([{"role": "user", "content": f"Question {i}" + "?" * (1 + 5 * i % 7)}])
        options = ["9 m", "a much longer option of 12 km", "force"][: 2 + i % 2]
        letter = letter if letter in "AB" or i % 2 else "A"
        known = dict(choices=options, answer="ABC".index(letter), raw={"topic": f"t{i % 2}"})
        examples.append(Example(prompt, [chat.reply(letter)], **known))
    return examples


def test_scores_equal_a_plain_forward_pass_for_each_option(tiny):
    model, chat = Phi.from_pretrained(tiny), ChatML(load_tokenizer(tiny))
    examples = questions(chat)
    scored = score_options(model, examples, chat, 2, "cpu", "fp32")
    for i, e in enumerate(examples):
        options = e.choices
        letters = [logprob(model, e.prompt, chat.reply(letter)) for letter in "ABC"[: len(options)]]
        texts = [logprob(model, e.prompt, chat.reply(text)) for text in options]
        per_char = [score / len(text) for score, text in zip(texts, options, strict=True)]
        for name, scores in (("letter", letters), ("summed", texts), ("per char", per_char)):
            assert scored[name][i] == scores.index(max(scores))
    for size in (1, 5):
        assert score_options(model, examples, chat, size, "cpu", "fp32") == scored


RIGHT = [0, 1, 2, 3]


def question(answer, options=4, **raw):
    return Example([1], [[2]], choices=["x"] * options, answer=answer, raw=raw)


QUESTIONS = [question(0, topic="x"), question(1, topic="x"), question(2, topic="y"), question(3, 2, topic="x")]
ALWAYS_A = {"letter": [0, 0, 0, 0]}


def test_accuracies_chance_and_topics():
    made = summary(QUESTIONS, ALWAYS_A, QUESTIONS, ["A", "B", "no", "no"])
    assert made["choices"]["letter"].value == 0.25 and made["choices"]["generated"].value == 0.5
    assert made["choices"]["chance"] == pytest.approx((3 * 0.25 + 0.5) / 4) and made["choices"]["invalid"].value == 0.5
    assert list(made["by topic"]) == ["x", "y"]  # the largest first
    assert made["by topic"]["x"].value == pytest.approx(1 / 3) and made["by topic"]["y"].value == 0
    assert set(summary(QUESTIONS, ALWAYS_A, [], [])["choices"]) == {"letter", "chance", "position bias", "bias by chance"}


def test_the_topic_goes_by_two_names():
    named = [question(0, topic="Physics", subject="x"), question(0, topic="", subject="Biology"), question(0)]
    assert list(summary(named, {"letter": [0, 0, 0]}, [], [])["by topic"]) == ["Physics", "Biology", "Unknown"]


def test_position_bias():
    assert position_bias([0, 0, 0, 0], RIGHT) == 0.75  # always A, which is right in a quarter
    assert position_bias([1, 0], [0, 1]) == 0  # always wrong, but without a habit
    assert position_bias([0, 0, 1, 2], [0, 0, 0, 1]) == 0.25  # 2, 1, 1 of four beside 3, 1, 0
    assert summary(QUESTIONS, ALWAYS_A, [], [])["choices"]["position bias"] == 0.75


def test_position_bias_by_chance():
    """One question: half of the picks are wrong, and a wrong one has bias 1. Many questions: the picks of a letter are about
    normal, with E|N - n/4| = sqrt(2/pi n 3/16). Where the right letters are drawn as well, the variance is twice that."""
    assert bias_by_chance([2], [0]) == pytest.approx(0.5, abs=0.05)
    normal = 4 * math.sqrt(2 / math.pi * 400 * 3 / 16) / (2 * 400)
    assert bias_by_chance([4] * 400, [0, 1, 2, 3] * 100) == pytest.approx(normal, rel=0.05)
    rng, means = random.Random(0), {}
    for options, n in ((5, 24), (4, 989)):
        sets = [bias_by_chance([options] * n, [rng.randrange(options) for _ in range(n)]) for _ in range(20)]
        means[n] = sum(sets) / len(sets)
    assert means == pytest.approx({24: 0.225, 989: 0.031}, rel=0.1)
