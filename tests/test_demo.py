"""The embedded world keeps its promises: right answers are right, wrong ones are wrong as announced, nothing repeats, no
label can be guessed from length, and the tokenizer loses nothing."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data import ChatML, Ledger, Row, Truth, encode, load_tokenizer, question_key, read_truth
from demo import (
    CONTROL_TOKENS,
    KINDS,
    MISTAKES,
    NAMES,
    NUMBERS,
    SIZES,
    TINY_PHI,
    grades,
    make_pair_rows,
    make_questions,
    make_sft_rows,
    train_tokenizer,
    write_world,
)
from model import Phi
from prepare.rows import read_rows
from runtime.files import InputError

QUESTIONS = make_questions(5000, seed=0)
ANSWER = re.compile(
    r"(?:[^:=\n]+: )?"  # law
    r"([A-Za-z] = [^=]+) = "  # formula
    r"([0-9][0-9 ()*/+-]*) = "  # substitution
    r"([0-9]+(?: / [0-9]+)?)"  # value, a fraction if it is not a whole number
    r"(?: ([^0-9\s=.][^\s=.]*))?\."  # unit, none for a probability
)


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


def test_the_whole_world_is_distinct_and_shows_the_numbers_that_are_tokens():
    largest = make_questions(sum(SIZES.values()), seed=0)
    assert len({q["prompt"].casefold() for q in largest}) == len(largest) == 40_000
    assert set(map(int, re.findall(r"(?<= )[0-9]+", " ".join(texts(largest))))) <= set(NUMBERS)


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


def grade(text, parts):
    """(right method, right method and number), as metrics.text.grades reads the regexes."""
    return tuple(bool(re.fullmatch(regex, text.strip())) for regex in grades(parts).values())


def grade_by_parts(text, answer):
    """The same by taking both texts apart: the method is right if formula, substitution and unit are those of the answer."""
    right, found = ANSWER.fullmatch(answer), ANSWER.fullmatch(text.strip())
    method = found is not None and found.group(1, 2, 4) == right.group(1, 2, 4)
    return method, method and found[3] == right[3]


def test_grade_right_and_wrong_answers():
    for q in QUESTIONS:
        assert grade(q["answer"], q["parts"]) == (True, True)
        assert grade(q["wrong"], q["parts"]) == (q["mistake"] == "arithmetic", False)


def damaged(text, draw):
    """The text as a weak model might sample it: another character, one less, one more, no law, blanks, more text behind."""
    at, other = draw.randrange(len(text)), draw.choice("0123456789 =:/*+-().abNm^%\n")
    forms = [text, f"  {text}\n", text.partition(": ")[2], text[:at] + other + text[at + 1 :], text[:at] + text[at + 1 :]]
    return draw.choice([*forms, text[:at] + other + text[at:], text[:at], f"{text} {text}"])


def test_the_regexes_grade_as_taking_the_answer_apart_does():
    draw, seen = random.Random(0), Counter()
    for q in QUESTIONS:
        for text in (q["answer"], q["wrong"], draw.choice(QUESTIONS)["answer"]):
            text = damaged(text, draw)
            expected = grade_by_parts(text, q["answer"])
            assert grade(text, q["parts"]) == expected, (text, q["answer"])
            seen[expected] += 1
    assert min(seen[verdict] for verdict in ((True, True), (True, False), (False, False))) > 100


FORCE = ["F = m * a", "7 * 8", "56", "N"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Newton's second law: F = m * a = 7 * 8 = 56 N.", (True, True)),
        ("  F = m * a = 7 * 8 = 56 N.\n", (True, True)),  # the law may be missing, blanks do not count
        ("Newton's second law: F = m * a = 7 * 8 = 48 N.", (True, False)),
        ("Newton's second law: F = m * a = 7 * 8 = 56 J.", (False, False)),
        ("Newton's second law: F = m * a = 7 * 8 = 56.", (False, False)),  # no unit
        ("Newton's second law: F = m * a = 8 * 7 = 56 N.", (False, False)),  # numbers in the wrong order
        ("Newton's second law: F = m * a = 7 * 8 = 56 N. So", (False, False)),
        ("F = m * a = 7 * 8 = 56 N. F = m * a = 7 * 8 = 56 N.", (False, False)),
        ("F = m * a = 7 * 8 = 56 N", (False, False)),  # cut off
        ("56 N.", (False, False)),
        ("", (False, False)),
    ],
)
def test_grade_by_hand(text, expected):
    assert grade(text, FORCE) == expected


def test_grade_of_a_probability():
    parts = ["P = r / ( r + b )", "3 / ( 3 + 5 )", "3 / 8", ""]
    answer = "Chance: P = r / ( r + b ) = 3 / ( 3 + 5 ) = 3 / 8."
    assert grade(answer, parts) == (True, True)
    assert grade(answer[:-1] + " %.", parts) == (False, False)
    assert grade("Chance: P = r / ( r + b ) = 3 / ( 3 + 5 ) = 3 / 9.", parts) == (True, False)


# -------------------------------------------------------------------------------------------------- rows for training


def test_sft_rows():
    rows = make_sft_rows(QUESTIONS, right_share=0.6, seed=0)
    assert rows == make_sft_rows(QUESTIONS, right_share=0.6, seed=0) != make_sft_rows(QUESTIONS, right_share=0.6, seed=1)
    right = [row.completions == [q["answer"]] for q, row in zip(QUESTIONS, rows, strict=True)]
    assert 0.57 < sum(right) / len(right) < 0.63
    for q, row, is_right in zip(QUESTIONS, rows, right):
        completion = q["answer"] if is_right else q["wrong"]
        assert row.raw == {"prompt": q["prompt"], "completion": completion, "topic": q["topic"]}
        assert row.messages == [{"role": "user", "content": q["prompt"]}] and row.truth is None


@pytest.mark.parametrize("flip_rate", [0, 0.1, 0.2503, 0.49])
def test_pair_rows_flip_exactly(flip_rate):
    rows = make_pair_rows(QUESTIONS, flip_rate, seed=0)
    assert sum(row.truth.flipped for row in rows) == round(flip_rate * len(QUESTIONS))
    for q, row in zip(QUESTIONS, rows, strict=True):
        right_first = [q["answer"], q["wrong"]]
        assert row.completions == (right_first[::-1] if row.truth.flipped else right_first)
        assert row.truth == Truth(row.truth.flipped, q["answer"], grades(q["parts"]))
        assert set(row.raw) == {"prompt", "chosen", "rejected", "topic"}  # nothing that gives the truth away


def test_flips_depend_on_the_seed_alone():
    rows = make_pair_rows(QUESTIONS, 0.2, seed=0)
    assert rows == make_pair_rows(QUESTIONS, 0.2, seed=0) != make_pair_rows(QUESTIONS, 0.2, seed=1)


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 1, float("nan")])
def test_pair_rows_refuse_a_senseless_flip_rate(flip_rate):
    with pytest.raises(ValueError, match="flip rate"):
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


def test_vocabulary(tokenizer):
    vocab_size = 768
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


def test_tokenizer_without_texts():
    assert len(train_tokenizer([]).encode(" 56").ids) == 1


def test_tiny_phi_is_a_phi_of_a_million_parameters():
    width, inner, layers = TINY_PHI["hidden_size"], TINY_PHI["intermediate_size"], TINY_PHI["num_hidden_layers"]
    assert TINY_PHI["model_type"] == "phi" and TINY_PHI["hidden_act"] == "gelu_new"
    assert width % TINY_PHI["num_attention_heads"] == 0 and "vocab_size" not in TINY_PHI
    weights = 2 * 768 * width + layers * (4 * width * width + 2 * width * inner)
    assert 0.8e6 < weights < 1.1e6


# ------------------------------------------------------------------------------------------------------ a world on disk

SMALL = {"sft": 40, "qat": 10, "pairs": 50, "test": 20}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("demo") / "world", flip_rate=0.4, sizes=SMALL)


def prompts(path):
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_no_question_is_in_two_files_and_each_has_its_size(world):
    files = {name: prompts(getattr(world, name)) for name in SMALL}
    assert {name: len(set(part)) for name, part in files.items()} == SMALL
    assert sum(files.values(), []) == [q["prompt"] for q in QUESTIONS[: sum(SMALL.values())]]


def test_the_truth_file_says_which_pairs_are_flipped_and_the_pairs_do_not(world):
    for path, count in ((world.pairs, 50), (world.test, 20)):
        truths = read_truth(path)
        assert len(truths) == count and sum(truth.flipped for truth in truths.values()) == round(0.4 * count)
        for row in read_rows(path, "pairs", "stop", Ledger()):
            assert row.completions[row.truth.flipped] == row.truth.answer
            assert set(row.raw) == {"prompt", "chosen", "rejected", "topic"}
    assert read_truth(world.sft) == read_truth(world.qat) == {}


def test_every_question_has_a_key_of_its_own():
    keys = {question_key(Row([{"role": "user", "content": q["prompt"]}], [], "", {})) for q in QUESTIONS}
    assert len(keys) == len(QUESTIONS)


def test_the_model_of_a_world_reads_its_rows(world):
    rows = read_rows(world.pairs, "pairs", "stop", Ledger())
    examples = encode(rows, ChatML(load_tokenizer(world.model)), 1024, 512, Ledger())
    phi = Phi.from_pretrained(world.model)
    assert max(max(e.prompt) for e in examples) < phi.config.vocab_size == 768


def test_a_world_is_written_once_and_never_mixed_with_another(world, tmp_path):
    directory = world.model.parent
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert write_world(directory, flip_rate=0.4) == write_world(directory, flip_rate=0.4, sizes=SMALL) == world
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    for other in (dict(seed=1, flip_rate=0.4), dict(flip_rate=0.2), dict(flip_rate=0.4, sizes={"pairs": 51})):
        with pytest.raises(InputError, match="holds a world with"):
            write_world(directory, **other)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="world.json: no such file"):
        write_world(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_same_settings_write_the_same_bytes_and_nothing_is_left_of_a_failure(world, tmp_path):
    write_world(tmp_path / "again", flip_rate=0.4, sizes=SMALL)
    for path in world.model.parent.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(world.model.parent)).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="flip rate 0.5"):
        write_world(tmp_path / "bad", flip_rate=0.5, sizes=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
