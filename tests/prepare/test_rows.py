"""Rows as people's files have them: what decides their kind, which fields have a meaning, and the truth file beside them."""

import json

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
