"""Rows of multiple choice: options in a list or in the question's text, what is taught, and what is refused."""

import json

import pytest

from data import (
    Example,
    lengths_of,
)
from prepare.forms import read_row, written_options
from prepare.rows import kind_of
from runtime.files import InputError

# -------------------------------------------------------------------------------------------------------- multiple choice


def mcq(**change):
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": "B", "explanation": "It is so.", "topic": "x"}
    return {name: value for name, value in (row | change).items() if value is not None}


def test_multiple_choice_explains_first_and_ends_with_the_letter():
    row = read_row("mcq", mcq())
    assert row.messages == [{"role": "user", "content": "Question: Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer:"}]
    assert row.completions == ["It is so.\n\nAnswer: B"] and row.raw == mcq()
    assert row.choices == ["red", "blue"] and row.answer == 1
    assert read_row("mcq", mcq(explanation=None)).completions == ["Answer: B"]
    assert read_row("mcq letter", mcq()).completions == ["B"]
    course = {"question": "Question: Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer:", "answer": "B", "explanation": "So."}
    assert read_row("mcq", course).choices == ["red", "blue"] and read_row("mcq", course).answer == 1
    assert read_row("mcq", course).messages == row.messages and read_row("mcq", course).completions == ["So.\n\nAnswer: B"]


def test_options_are_read_from_a_question_s_text():
    assert written_options("A. is no option\nOptions:\nA)167 sec\nB) 190 sec\nand more\nC)390\n\nAnswer:") == [
        "167 sec",
        "190 sec\nand more",
        "390",
    ]


def test_options_without_a_heading_and_the_last_of_several_headings():
    assert written_options("Which?\nA. red\nB. blue\nAnswer:") == ["red", "blue"]
    assert written_options("Options:\nA. no\nOptions:\nA. red\nB. blue") == ["red", "blue"]
    assert written_options("Which?") == []


def test_an_explanation_is_stripped_and_ten_options_have_letters():
    assert read_row("mcq", mcq(explanation="  So.\n")).completions == ["So.\n\nAnswer: B"]
    ten = [str(i) for i in range(10)]
    assert read_row("mcq", mcq(choices=ten, answer="J")).messages[0]["content"].endswith("\nJ. 9\n\nAnswer:")


def test_the_kind_of_a_file_is_seen_from_its_first_row(tmp_path):
    for row, kind in ((mcq(), "mcq"), ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs"), ({"messages": []}, "sft")):
        (tmp_path / "rows.jsonl").write_text("\ufeff\n" + json.dumps(row))
        assert kind_of(tmp_path / "rows.jsonl") == kind
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Which question was chosen?", "completion": "The first."}))
    assert kind_of(tmp_path / "rows.jsonl") == "sft"  # the fields say so, not the words
    with pytest.raises(InputError, match="No such file"):
        kind_of(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "C"}, "not the letter of an option"),
        ({"answer": "blue"}, "not the letter of an option"),
        ({"answer": ""}, "not the letter of an option"),
        ({"choices": ["red"]}, "2 to 10 texts"),
        ({"choices": list("abcdefghijk")}, "2 to 10 texts"),
        ({"choices": "red or blue"}, "2 to 10 texts"),
        ({"choices": []}, "2 to 10 texts"),
        ({"question": "Which?", "choices": None}, "not the letter of an option"),
        ({"choices": ["red", ""]}, '"choices" is empty'),
        ({"question": None}, '"question" is missing'),
        ({"question": "Options:\nA. x\nC. y", "choices": None}, "not lettered A, B, C"),
    ],
)
def test_multiple_choice_rows_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        read_row("mcq", mcq(**change))


def test_lengths_are_those_of_the_completions():
    examples = [Example([1, 2], [[3], [4, 5]]), Example([6], [[7, 8, 9], [1]])]
    assert lengths_of(examples).tolist() == [[1, 2], [3, 1]]
