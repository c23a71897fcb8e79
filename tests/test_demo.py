"""The embedded world keeps its promises: right answers are right, wrong ones are wrong as announced, nothing repeats, no
label can be guessed from length, and the tokenizer loses nothing."""

import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from demo import (
    ANSWER,
    CONTROL_TOKENS,
    KINDS,
    MISTAKES,
    MOST_QUESTIONS,
    NAMES,
    NUMBERS,
    TINY_PHI,
    grade,
    make_pair_rows,
    make_questions,
    make_sft_rows,
    train_tokenizer,
)

QUESTIONS = make_questions(5000, seed=0)


def texts(questions):
    return [q[part] for q in questions for part in ("prompt", "answer", "wrong")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(texts(QUESTIONS[:1000]))


def value_of(substitution):
    """Python's own arithmetic, in exact fractions."""
    return eval(re.sub(r"[0-9]+", r"Fraction(\g<0>)", substitution), {"Fraction": Fraction})


def formula_of(text):
    return ANSWER.fullmatch(text)[1]


# ---------------------------------------------------------------------------------------------------------- the world


def test_table_is_well_formed():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 16
    assert len(set(NAMES)) == len(NAMES)
    for kind in KINDS:
        letters = set(re.findall(r"[A-Za-z]", kind.right.split(" = ")[1]))
        assert len(set(kind.wordings)) == len(kind.wordings) >= 3
        assert len(set(kind.units)) == len(kind.units) >= 2
        assert kind.right not in kind.wrong and len(set(kind.things)) == len(kind.things)
        for wording in kind.wordings:  # each gives all quantities of the formula, a name and a thing
            assert set(re.findall(r"{(\w+)}", wording)) == letters | {"who", "thing"}
        for formula in kind.wrong:
            assert set(re.findall(r"[A-Za-z]", formula.split(" = ")[1])) <= letters


def test_questions_are_distinct_and_depend_on_the_seed_alone():
    assert len({q["prompt"].casefold() for q in QUESTIONS}) == len(QUESTIONS) == 5000
    assert make_questions(5000, seed=0) == QUESTIONS
    assert make_questions(100, seed=0) == QUESTIONS[:100]
    prompts = {q["prompt"] for q in QUESTIONS}
    assert sum(q["prompt"] in prompts for q in make_questions(1000, seed=1)) < 100


def test_largest_world_is_distinct_and_the_next_one_refused():
    largest = make_questions(MOST_QUESTIONS, seed=0)
    assert len({q["prompt"].casefold() for q in largest}) == MOST_QUESTIONS
    assert set(map(int, re.findall(r"(?<= )[0-9]+", " ".join(texts(largest))))) <= set(NUMBERS)
    for count in (-1, MOST_QUESTIONS + 1):
        with pytest.raises(ValueError, match="choose between 0 and"):
            make_questions(count, seed=0)


def test_kinds_and_mistakes_have_their_shares():
    kinds = Counter(q["kind"] for q in QUESTIONS)
    assert set(kinds) == {kind.name for kind in KINDS}
    assert all(0.75 < n * len(KINDS) / len(QUESTIONS) < 1.25 for n in kinds.values())
    mistakes = Counter(q["mistake"] for q in QUESTIONS)
    assert all(abs(mistakes[name] / len(QUESTIONS) - share) < 0.03 for name, share in MISTAKES.items())


def test_arithmetic_of_right_answers_and_of_wrong_formulas():
    for q in QUESTIONS:
        answers = [q["answer"], q["wrong"]] if q["mistake"] == "formula" else [q["answer"]]
        for text in answers:
            _, substitution, value, _ = ANSWER.fullmatch(text).groups()
            assert value_of(substitution) == Fraction(value.replace(" ", "")), text


def test_substitution_puts_the_numbers_of_the_question_into_the_formula():
    kinds = {kind.name: kind for kind in KINDS}
    for q in QUESTIONS:
        for text in (q["answer"], q["wrong"]):
            formula, substitution, _, _ = ANSWER.fullmatch(text).groups()
            assert formula in (kinds[q["kind"]].right, *kinds[q["kind"]].wrong)
            numbers = {}
            for term, shown in zip(formula.split()[2:], substitution.split(), strict=True):
                assert numbers.setdefault(term, shown) == shown  # one letter, one number
                assert not term.isalpha() or re.search(rf" {shown}\b", q["prompt"])
                assert term.isalpha() or term == shown


def test_wrong_answers_are_wrong_in_the_announced_part_only():
    part = {"formula": 0, "unit": 3, "arithmetic": 2}
    for q in QUESTIONS:
        right, wrong = ANSWER.fullmatch(q["answer"]).groups(), ANSWER.fullmatch(q["wrong"]).groups()
        if q["mistake"] == "formula":
            assert right[0] != wrong[0] and right[2] != wrong[2] and right[3] == wrong[3]
        else:
            assert [i for i in range(4) if right[i] != wrong[i]] == [part[q["mistake"]]]


def test_length_does_not_give_the_right_answer_away():
    differences = [len(q["answer"]) - len(q["wrong"]) for q in QUESTIONS]
    longer_wins = sum((d > 0) + (d == 0) / 2 for d in differences) / len(differences)
    assert 0.4 < longer_wins < 0.6


# ------------------------------------------------------------------------------------------------------------ grading


def test_grade_right_and_wrong_answers():
    for q in QUESTIONS:
        assert grade(q["answer"], q["answer"]) == (True, True)
        assert grade(q["wrong"], q["answer"]) == (q["mistake"] == "arithmetic", False)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Newton's second law: F = m * a = 7 * 8 = 56 N.", (True, True)),
        ("  F = m * a = 7 * 8 = 56 N.\n", (True, True)),  # the law may be missing, blanks do not count
        ("Newton's second law: F = m * a = 7 * 8 = 48 N.", (True, False)),
        ("Newton's second law: F = m * a = 7 * 8 = 56 J.", (False, False)),
        ("Newton's second law: F = m * a = 7 * 8 = 56.", (False, False)),  # no unit
        ("Newton's second law: F = m * a = 8 * 7 = 56 N.", (False, False)),  # numbers in the wrong places
        ("Newton's second law: F = m * a = 7 * 8 = 56 N. So", (False, False)),
        ("F = m * a = 7 * 8 = 56 N. F = m * a = 7 * 8 = 56 N.", (False, False)),
        ("F = m * a = 7 * 8 = 56 N", (False, False)),  # cut off
        ("56 N.", (False, False)),
        ("", (False, False)),
    ],
)
def test_grade_by_hand(text, expected):
    assert grade(text, "Newton's second law: F = m * a = 7 * 8 = 56 N.") == expected


def test_grade_of_a_probability():
    answer = "Chance: P = r / ( r + b ) = 3 / ( 3 + 5 ) = 3 / 8."
    assert grade(answer, answer) == (True, True)
    assert grade(answer[:-1] + " %.", answer) == (False, False)
    assert grade("Chance: P = r / ( r + b ) = 3 / ( 3 + 5 ) = 3 / 9.", answer) == (True, False)


def test_grade_refuses_an_answer_that_it_cannot_read():
    with pytest.raises(ValueError, match="not a worked answer"):
        grade("56 N.", "56 N.")


# -------------------------------------------------------------------------------------------------- rows for training


def test_sft_rows():
    rows = make_sft_rows(QUESTIONS, right_share=0.6, seed=0)
    assert rows == make_sft_rows(QUESTIONS, right_share=0.6, seed=0) != make_sft_rows(QUESTIONS, right_share=0.6, seed=1)
    assert 0.57 < sum(row["right"] for row in rows) / len(rows) < 0.63
    for q, row in zip(QUESTIONS, rows, strict=True):
        assert set(row) == {"prompt", "completion", "kind", "topic", "right"}
        assert row["prompt"] == q["prompt"] and row["completion"] == (q["answer"] if row["right"] else q["wrong"])
    assert all(row["right"] for row in make_sft_rows(QUESTIONS, right_share=1, seed=0))
    assert not any(row["right"] for row in make_sft_rows(QUESTIONS, right_share=0, seed=0))
    with pytest.raises(ValueError, match="share"):
        make_sft_rows(QUESTIONS, right_share=1.1, seed=0)


@pytest.mark.parametrize("flip_rate", [0, 0.1, 0.2503, 0.49])
def test_pair_rows_flip_exactly(flip_rate):
    rows = make_pair_rows(QUESTIONS, flip_rate, seed=0)
    assert sum(row["flipped"] for row in rows) == round(flip_rate * len(QUESTIONS))
    for q, row in zip(QUESTIONS, rows, strict=True):
        right_first = (q["answer"], q["wrong"])
        assert (row["chosen"], row["rejected"]) == (right_first[::-1] if row["flipped"] else right_first)
        assert set(row) == {"prompt", "chosen", "rejected", "kind", "topic", "mistake", "answer", "flipped"}
        assert all(row[name] == q[name] for name in ("prompt", "kind", "topic", "mistake", "answer"))


def test_flips_depend_on_the_seed_alone():
    rows = make_pair_rows(QUESTIONS, 0.2, seed=0)
    assert rows == make_pair_rows(QUESTIONS, 0.2, seed=0) != make_pair_rows(QUESTIONS, 0.2, seed=1)


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 1, float("nan")])
def test_pair_rows_refuse_a_senseless_flip_rate(flip_rate):
    with pytest.raises(ValueError, match="flip_rate"):
        make_pair_rows(QUESTIONS, flip_rate, seed=0)


# ------------------------------------------------------------------------------------------------ tokenizer and network


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "F = m * a",
        "Zoë misst 5 µm², naïve",
        "力は質量と加速度の積",
        "قوة 12 نيوتن",
        "🚀👩‍🔬 \t\r\n\n  x\u00a0y",
        "\x00\x7f\ufeff\U0010ffff",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_character_of_the_basic_plane_survives(tokenizer):
    text = "".join(chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("vocab_size", [640, 768])
def test_vocabulary(vocab_size):
    tokenizer = train_tokenizer(texts(QUESTIONS[:500]), vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == list(range(vocab_size - 3, vocab_size))
    assert [tokenizer.encode(token).ids for token in CONTROL_TOKENS] == [[i] for i in range(vocab_size - 3, vocab_size)]
    assert all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    for number in NUMBERS:
        assert len(tokenizer.encode(f" {number}").ids) == 1


def test_numbers_and_signs_are_tokens_of_their_own_in_every_text(tokenizer):
    for text in texts(QUESTIONS[1000:1500]):
        tokens = tokenizer.encode(text).tokens
        for word in re.findall(r"(?<= )(?:[0-9]+|[*/+=()-])(?![^ .,?])", text):
            assert "Ġ" + word in tokens
    tokens = tokenizer.encode("Ohm's law: U = R * I = 7 * 8 = 56 V.").tokens
    assert tokens[-11:] == "ĠR Ġ* ĠI Ġ= Ġ7 Ġ* Ġ8 Ġ= Ġ56 ĠV .".split()


def test_questions_and_answers_are_short(tokenizer):
    held_out = make_questions(1000, seed=1)
    assert max(len(tokenizer.encode(q["prompt"]).ids) for q in held_out) <= 48
    assert max(len(tokenizer.encode(q[part]).ids) for q in held_out for part in ("answer", "wrong")) <= 28


def test_tokenizer_is_the_same_in_another_process_and_from_its_file(tokenizer):
    script = (
        "from demo import *; print(train_tokenizer([q[p] for q in make_questions(5000, 0)[:1000] "
        "for p in ('prompt', 'answer', 'wrong')]).to_str())"
    )
    root = Path(__file__).resolve().parent.parent
    other = subprocess.run([sys.executable, "-B", "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout
    assert other.strip() == tokenizer.to_str()
    assert Tokenizer.from_str(other).encode("Mia <|im_end|>").ids == tokenizer.encode("Mia <|im_end|>").ids


def test_tokenizer_without_texts_and_without_room():
    assert len(train_tokenizer([]).encode(" 56").ids) == 1
    with pytest.raises(ValueError, match="at least 512"):
        train_tokenizer([], vocab_size=511)
    smallest = train_tokenizer(texts(QUESTIONS[:100]), vocab_size=512)
    assert all(len(smallest.encode(f" {number}").ids) == 1 for number in NUMBERS)


def test_tiny_phi_is_a_phi_of_a_million_parameters():
    width, inner, layers = TINY_PHI["hidden_size"], TINY_PHI["intermediate_size"], TINY_PHI["num_hidden_layers"]
    assert TINY_PHI["model_type"] == "phi" and TINY_PHI["hidden_act"] == "gelu_new"
    assert width % TINY_PHI["num_attention_heads"] == 0 and "vocab_size" not in TINY_PHI
    weights = 2 * 768 * width + layers * (4 * width * width + 2 * width * inner)
    assert 0.8e6 < weights < 1.1e6
