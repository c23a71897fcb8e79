"""Rows as people's files have them: what decides their kind, which fields have a meaning, and the truth file beside them."""

import csv
import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rows import pair_rows

from data import (
    ChatML,
    Example,
    Ledger,
    Row,
    Truth,
    encode,
    grades,
    load_tokenizer,
    question_key,
    read_truth,
    write_truth,
)
from metrics.preferences import flips
from prepare.rows import kind_of, load_inputs, parse_mcq, parse_pair, parse_sft, read_rows
from runtime.files import InputError, write_jsonl
from runtime.flags import settle
from runtime.runs import load_chat

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
OWN = {"answer": "3", "kind": "motion", "letter": "A", "choices": None, "flipped": "false"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (PAIR, "pairs"),
        ({"prompt": "2 + 2?", "chosen": "4"}, "pairs"),  # `read_rows` says what is missing
        ({"question": "?", "choices": ["a", "b"], "answer": "A"}, "mcq"),
        ({"prompt": "2 + 2?", "completion": "4"}, "sft"),
        ({"messages": []}, "sft"),
        ({"prompt": "2 + 2?", "completion": "4", "type": "question", "label": "chosen"}, "sft"),  # words in values
        ({"prompt": 'Define "question".', "completion": '"chosen" by chance'}, "sft"),
        ({"prompt": "2 + 2?", "completion": "4", "question": "2 + 2?"}, "sft"),  # a field of the user's own
        ({**PAIR, "question": "2 + 2?"}, "pairs"),
    ],
)
def test_the_fields_of_the_first_row_decide_its_kind(tmp_path, row, kind):
    write_jsonl(tmp_path / "rows.jsonl", [row, PAIR])
    assert kind_of(tmp_path / "rows.jsonl") == kind


def test_a_broken_first_line_does_not_decide_the_kind(tmp_path):
    (tmp_path / "rows.jsonl").write_text('not json\n["a list"]\n\n' + json.dumps(PAIR) + "\n")
    assert kind_of(tmp_path / "rows.jsonl") == "pairs"


def test_only_the_format_s_own_fields_have_a_meaning():
    row = parse_pair(PAIR | OWN, "f:1")
    assert row == Row([{"role": "user", "content": "2 + 2?"}], ["4", "5"], "f:1", PAIR | OWN)
    assert (row.choices, row.answer, row.truth) == ([], None, None)
    sft = parse_sft({"prompt": "2 + 2?", "completion": "4", **OWN})
    assert (sft.choices, sft.answer, sft.truth) == ([], None, None)
    mcq = parse_mcq({"question": "?", "choices": ["a", "b"], "answer": "B", "letter": "A", "flipped": True})
    assert (mcq.choices, mcq.answer, mcq.truth) == (["a", "b"], 1, None)


def test_pairs_with_fields_of_their_own_have_no_truth_to_measure(tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [row | OWN for row in pair_rows(9)])
    rows = read_rows(tmp_path / "pairs.jsonl", "pairs", "stop", Ledger())
    examples = encode(rows, ChatML(load_tokenizer(tiny)), 100, 50, Ledger())
    assert {(e.answer, e.truth, *e.choices) for e in examples} == {(None, None)} and len(examples) == 9
    assert flips(examples) is None and grades(["It is 0."] * 9, examples) == {}


def test_a_row_is_written_again_as_it_was_read(tmp_path):
    rows = [PAIR | {"id": 7}, {**PAIR, "prompt": [{"role": "user", "content": "3 + 3?"}]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row.raw for row in read_rows(tmp_path / "rows.jsonl", "pairs", "stop", Ledger())] == rows


SEPARATORS = "\u2028one\u2029two\u0085three\x1c"  # where str.splitlines() cuts


def test_files_of_every_form_keep_every_character(tmp_path):
    rows = [{**PAIR, "prompt": f"{i}{SEPARATORS}?", "chosen": 'a "b",\nc'} for i in range(3)]
    plain = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + plain, encoding="utf-8")
    (tmp_path / "b.json").write_text(plain, encoding="utf-8")
    (tmp_path / "c.json").write_text("\ufeff\n" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | {"when": datetime.date(2024, 1, 2)} for row in rows]), tmp_path / "d.parquet"
    )
    with open(tmp_path / "e.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    for path in sorted(tmp_path.iterdir()):
        assert kind_of(path) == "pairs"
        read = read_rows(path, "pairs", "stop", Ledger())
        assert [row.messages[0]["content"] for row in read] == [row["prompt"] for row in rows]
        assert {row.completions[0] for row in read} == {'a "b",\nc'}
        write_jsonl(tmp_path / "copy.jsonl", [row.raw for row in read])
        assert len(read_rows(tmp_path / "copy.jsonl", "pairs", "stop", Ledger())) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1, {}, [2]]", '(?s)3 of 3 rows .*json:1: a JSON int, not an object\n.*json:2: "chosen" is missing'),
        ("a.json", '[{"prompt": ', "cannot be read as json"),
        ("a.json", "[" * 100_000, "cannot be read as json"),
        ("a.jsonl", "[" * 100_000 + "\n" + "9" * 5_000, "(?s)2 of 2 rows .*jsonl:1: not JSON"),
        ("a.parquet", "PAR1 no", "cannot be read as parquet"),
        ("a.csv", "prompt,chosen,rejected\nQ\na,b,c,d\n", 'csv:2: "chosen" is missing\n.*csv:3: more cells than the first'),
        ("a.csv", "prompt\n" + "a" * 200_000, "cannot be read as csv"),
        ("a.csv", "", "the file holds no rows"),
        ("none.json", None, "none.json: No such file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name, "pairs", "stop", Ledger())


def dialogue(**last):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "so"} | last]}


@pytest.mark.parametrize(
    ("parse", "row", "message"),
    [
        (parse_sft, dialogue(tool_calls=[{"id": "1"}]), r'"messages"\[1\] has tool_calls, which cannot be learned'),
        (parse_sft, dialogue(reasoning_content="because"), "has reasoning_content"),
        (parse_sft, dialogue(content=[{"type": "image"}]), "is list, not text"),
        (parse_sft, dialogue(weight=0), "ends with a message that is not to be learned"),
        (parse_sft, dialogue(train=False), "ends with a message that is not to be learned"),
        (parse_sft, {"messages": 7}, "neither text nor a list"),
        (parse_pair, PAIR | {"chosen": {"role": "assistant", "content": "4"}}, "neither text nor a list"),
        (parse_pair, PAIR | {"prompt": 7}, "neither text nor a list"),
        (
            parse_mcq,
            {"question": "?", "choices": ["a", "b"], "answer": "A", "explanation": ["x"]},
            '"explanation" is list, not',
        ),
        (parse_mcq, {"question": "?", "choices": ["a", "b"], "answer": 2}, "not the letter of an option, nor its number"),
        (parse_mcq, {"question": "?", "choices": ["a", "b"], "answer": True}, "not the letter of an option"),
        (parse_mcq, {"question": "?", "choices": ["a", 2], "answer": "A"}, '"choices" is int, not text'),
    ],
)
def test_fields_of_the_wrong_type_are_named(parse, row, message):
    with pytest.raises(ValueError, match=message):
        parse(row)


def test_what_means_nothing_changes_nothing():
    """Null columns, an empty system turn, marks that keep a message as it is; and 0 is the first option."""
    plain = parse_sft(dialogue())
    assert parse_sft(dialogue(weight=1, train=True, tool_calls=None)).completions == plain.completions
    assert parse_sft({"messages": None, "prompt": "?", "completion": "so"}).completions == plain.completions
    assert parse_sft(dialogue() | {"prompt": None, "completion": None}).messages == plain.messages
    empty = [{"role": "system", "content": ""}, *dialogue()["messages"]]
    assert parse_sft({"messages": empty}).messages == plain.messages
    context = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "no", "weight": 0},
        *dialogue()["messages"],
    ]
    row = parse_sft({"messages": context})
    assert [m["content"] for m in row.messages] == ["?", "no", "?"] and row.completions == ["so"]
    assert [parse_mcq({"question": "?", "choices": ["a", "a", "b"], "answer": i}).answer for i in range(3)] == [0, 1, 2]


def test_a_null_field_does_not_decide_the_kind(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": None, "chosen": None, "prompt": "?", "completion": "so"}])
    assert kind_of(tmp_path / "rows.jsonl") == "sft"


# ---------------------------------------------------------------------------------------------------------- truth files


def test_truth_reaches_the_measures_of_flips_and_answers(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [PAIR, {**PAIR, "prompt": "3 + 3?"}])
    lines = [{"prompt": "2 + 2 ?", "flipped": False, "answer": "4", "grades": {"right": r"(It is )?4\.?"}}]
    lines += [{"prompt": "3 + 3?", "flipped": True, "answer": "6", "grades": {"right": r"(It is )?6\.?", "long": ".{9,}"}}]
    write_jsonl(tmp_path / "pairs.truth.jsonl", lines)

    rows = read_rows(path, "pairs", "stop", Ledger())
    assert rows[0].truth == Truth(False, "4", {"right": r"(It is )?4\.?"})  # the question in other blanks
    examples = encode(rows, ChatML(load_tokenizer(tiny)), 100, 50, Ledger())
    assert torch.equal(flips(examples), torch.tensor([False, True]))
    assert grades([" It is 4.\n", "It is 4."], examples) == {"right": [True, False]}  # not "long", which the first lacks

    write_truth(tmp_path / "copy.jsonl", rows)
    assert read_truth(tmp_path / "copy.jsonl") == read_truth(path)


def test_what_is_not_known_of_all_is_not_measured():
    known, unknown = Example([1], [[2]], truth=Truth(True, "4", {"right": "4"})), Example([1], [[2]])
    assert flips([known, unknown]) is None and grades(["4", "4"], [known, unknown]) == {}
    assert flips([known, Example([1], [[2]], truth=Truth())]) is None
    assert flips([known]).tolist() == [True] and grades([], []) == {}


def test_rows_without_truth_have_no_truth_file(tmp_path):
    write_truth(tmp_path / "rows.jsonl", [parse_pair(PAIR)])
    assert list(tmp_path.iterdir()) == [] and read_truth(tmp_path / "rows.jsonl") == {}


def test_a_conversation_is_a_question_too(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = parse_pair({**PAIR, "prompt": [*messages, {"role": "user", "content": "2 + 2?"}]})
    row.truth = Truth(flipped=True)
    write_truth(tmp_path / "rows.jsonl", [row])
    assert read_truth(tmp_path / "rows.jsonl") == {question_key(row): Truth(flipped=True)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "truth.jsonl:1: not of the form"),
        ("7", "truth.jsonl:1: not of the form"),
        ('{"flipped": true}', "truth.jsonl:1: not of the form"),
        ('{"prompt": 7}', "truth.jsonl:1: not of the form"),
        ('{"prompt": ["?"]}', "truth.jsonl:1: not of the form"),
        ('{"prompt": "?", "grades": {"right": "a{99999999999}"}}', "truth.jsonl:1: not of the form"),
        ("[" * 100_000, "truth.jsonl:1: not of the form"),
        ('{"prompt": "?", "flipped": "false"}', "truth.jsonl:1: not of the form"),
        ('{"prompt": "?", "answer": 4}', "truth.jsonl:1: not of the form"),
        ('{"prompt": "?", "grades": ["4"]}', "truth.jsonl:1: not of the form"),
        ('{"prompt": "?", "grades": {"right": 4}}', "truth.jsonl:1: not of the form"),
        ('{"prompt": "a?"}\n{"prompt": "A", "flipped": true}', "truth.jsonl:2: an earlier line says something else"),
    ],
)
def test_a_truth_file_that_cannot_be_used_is_named(tmp_path, line, message):
    (tmp_path / "rows.truth.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        read_truth(tmp_path / "rows.jsonl")


def test_a_grade_that_is_no_regex_is_named(tmp_path):
    (tmp_path / "pairs.truth.jsonl").write_text('{"prompt": "2+2?", "grades": {"right": "(4"}}\n')
    with pytest.raises(InputError, match="pairs.truth.jsonl:1: not of the form"):
        read_truth(tmp_path / "pairs.jsonl")


# ----------------------------------------------------------------------------------------------- the sides of a training run


def sides(tiny, tmp_path, **changes):
    usual = dict(model=str(tiny), train=str(tmp_path / "train.jsonl"), eval_share=0.5, max_length=60, max_prompt_length=24)
    return load_inputs(settle("sft", usual | changes).settings, load_chat(tiny, changes.get("system_prompt", "")))


def test_both_sides_keep_to_the_limits_and_follow_the_seed(tiny, tmp_path):
    rows = [{"prompt": f"Is {'x' * i} {i}?", "completion": "so " + "a " * i} for i in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    inputs = sides(tiny, tmp_path)
    (ledger,) = inputs.ledgers.values()
    for side in (inputs.train, inputs.held_out):
        assert max(len(e.prompt) for e in side) == 24 and max(map(len, side)) <= 60
    assert ledger.kept == len(inputs.train) + len(inputs.held_out) < ledger.rows == 40 and 0 < ledger.trimmed < ledger.kept
    held = [[e.where for e in sides(tiny, tmp_path, seed=seed).held_out] for seed in (0, 1)]
    assert held[0] == [e.where for e in inputs.held_out] != held[1]
    whole = sides(tiny, tmp_path, whole_text=True)
    for side, before in ((whole.train, inputs.train), (whole.held_out, inputs.held_out)):
        assert [(e.prompt, len(e)) for e in side] == [(b.prompt[:1], len(b)) for b in before]


def test_a_file_for_evaluation_is_read_beside_and_must_not_repeat_a_question(tiny, tmp_path):
    rows = [{"prompt": f"Say {i}", "completion": "So."} for i in range(9)]
    write_jsonl(tmp_path / "train.jsonl", rows[:6])
    write_jsonl(tmp_path / "eval.jsonl", rows[6:])
    inputs = sides(tiny, tmp_path, eval=str(tmp_path / "eval.jsonl"))
    assert [e.question for e in inputs.train] == [row["prompt"] for row in rows[:6]]
    assert [e.question for e in inputs.held_out] == [row["prompt"] for row in rows[6:]]
    assert [ledger.kept for ledger in inputs.ledgers.values()] == [6, 3]
    write_jsonl(tmp_path / "eval.jsonl", rows[5:])
    with pytest.raises(InputError, match="1 evaluation rows ask a question of the training rows"):
        sides(tiny, tmp_path, eval=str(tmp_path / "eval.jsonl"))


def test_rows_that_cannot_be_split_or_are_all_left_out_say_why(tiny, tmp_path):
    rows = [{"prompt": "Like a pirate?", "completion": f"Arr, {i}"} for i in range(9)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError, match="all rows ask one question, so they cannot be split; .* with --eval FILE"):
        sides(tiny, tmp_path)
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "Like a sailor?", "completion": "Ahoy"}])
    assert len(sides(tiny, tmp_path, eval=str(tmp_path / "eval.jsonl")).train) == 9
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "?"}, {"prompt": "!", "completion": "x" * 99}, {"prompt": ""}])
    with pytest.raises(
        InputError, match='left out of 3 with .*: 2 bad row, 1 completion does not fit, .*:1: "completion" is missing'
    ):
        sides(tiny, tmp_path, on_bad_row="skip", eval=str(tmp_path / "eval.jsonl"))
