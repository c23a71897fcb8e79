"""Rows as people's files have them: where they are, what decides their kind, what is said of them, and their truth file."""

import csv
import datetime
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub_server import SHA, hub, lines_printed
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
from model import read_config
from prepare.forms import read_row
from prepare.rows import (
    choose_files,
    covering,
    describe_ledgers,
    describe_sizes,
    encode_for,
    files_of,
    kind_of,
    load_inputs,
    read_rows,
    rows_to_measure,
)
from runtime.files import InputError, write_jsonl
from runtime.flags import settle
from runtime.runs import load_chat

ROOT = Path(__file__).resolve().parents[2]
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
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
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
        ("a.json", "[1, {}, [2]]", '(?s)3 of 3 rows .*json:1: a JSON int, not an object\n.*json:2: "prompt" is missing'),
        ("a.json", '[{"prompt": ', "cannot be read as json"),
        ("a.json", "[" * 100_000, "cannot be read as json"),
        ("a.jsonl", "[" * 100_000 + "\n" + "9" * 5_000, "(?s)2 of 2 rows .*jsonl:1: not JSON"),
        ("a.parquet", "PAR1 no", "cannot be read as parquet"),
        (
            "a.csv",
            "prompt,chosen,rejected\nQ\na,b,c,d\n",
            'csv:2: "chosen" is missing.*\n.*csv:3: more cells than the first',
        ),
        ("a.csv", 'prompt,chosen\nQ,A\nQ,"A\nQ,"A"\n', "a.csv:3: the row that begins here is not csv"),
        ("a.csv", "", "the file holds no rows"),
        ("a.jsonl.gz", "not gzipped", r"a\.jsonl\.gz: Not a gzipped file"),
        ("none.json", None, "none.json: No such file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name, "pairs", "stop", Ledger())


def test_a_gzipped_file_that_was_cut_is_named(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\n" * 99)[:-9])
    with pytest.raises(InputError, match="a.csv.gz: cannot be read as csv"):
        read_rows(tmp_path / "a.csv.gz", "pairs", "stop", Ledger())


def test_a_row_of_csv_is_named_by_its_first_line_and_may_be_long(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\n"Two\nlines",{long},no\nQ,same,same\n')
    ledger = Ledger()
    [row] = read_rows(tmp_path / "a.csv", "pairs", "skip", ledger)
    assert row.where.endswith("a.csv:2") and row.completions[0] == long
    assert "a.csv:4: " in ledger.bad_rows[0]


def test_a_folder_of_several_splits_or_with_files_that_are_missing_is_refused(tmp_path):
    """A model must not be tuned on the rows that are to test it."""
    row = json.dumps(PAIR) + "\n"
    for name in ("train_prefs-0.jsonl", "test_prefs-0.jsonl"):
        (tmp_path / name).write_text(row)
    with pytest.raises(
        InputError, match="holds several splits, such as test_prefs-0.jsonl; give a file, or a folder with one"
    ):
        files_of(tmp_path)
    (tmp_path / "test_prefs-0.jsonl").unlink()
    (tmp_path / "more.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="more.jsonl: No such file"):
        read_rows(tmp_path, "pairs", "stop", Ledger())


def test_a_folder_holds_rows_in_one_format(tmp_path):
    """Beside them may be what the hub keeps about a set, what is known about the questions, and other splits."""
    row = json.dumps(PAIR) + "\n"
    for name in ("train-0.jsonl", "train-0.truth.jsonl", "dataset_info.json", "test.json"):
        (tmp_path / name).write_text(row)
    assert list(files_of(tmp_path)) == [f"{tmp_path}/train-0.jsonl"]
    (tmp_path / "train-1.json.gz").write_bytes(gzip.compress(row.encode()))
    with pytest.raises(InputError, match="files in two formats, train-0.jsonl and train-1.json.gz; give a folder"):
        files_of(tmp_path)


def test_a_folder_is_read_shard_by_shard_and_its_records_are_named(tmp_path):
    (tmp_path / "set" / "more").mkdir(parents=True)
    shards = {"b.jsonl": [PAIR], "a.jsonl": [PAIR, {"prompt": "?"}], "more/c.jsonl": [PAIR], ".hidden.jsonl": [PAIR]}
    for name, rows in shards.items():
        write_jsonl(tmp_path / "set" / name, rows)
    (tmp_path / "set" / "notes.txt").write_text("no rows")
    ledger = Ledger()
    rows = read_rows(tmp_path / "set", "pairs", "skip", ledger)
    folder = tmp_path / "set"
    assert [row.where for row in rows] == [f"{folder}/a.jsonl:1", f"{folder}/b.jsonl:1", f"{folder}/more/c.jsonl:1"]
    assert ledger.bad_rows[0].startswith(f'{folder}/a.jsonl:2: "chosen" is missing')
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no file that ends in .parquet, .jsonl"):
        files_of(tmp_path / "empty")


def test_which_files_of_a_data_set_are_a_split():
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]
    assert choose_files([*names, "train.json", "README.md"], "train") == names[:2]
    assert choose_files(names, "test") == names[2:]
    assert choose_files(["train.jsonl", "train.truth.jsonl", ".cache/train.jsonl", "data/._train.jsonl"]) == ["train.jsonl"]
    preferences = ["data/train_prefs-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"]
    assert choose_files(preferences, "train") == [] and choose_files(preferences, "train_prefs") == preferences[:1]
    folders = ["helpful/test.jsonl.gz", "helpful/train.jsonl.gz", "harmless/train.jsonl.gz"]
    assert (
        choose_files(folders, "train") == [folders[2], folders[1]] and choose_files(folders, "helpful/train") == folders[1:2]
    )


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_read_once_and_then_without_a_connection(tmp_path):
    published = tmp_path / "published"
    for name in ("train_prefs", "test_prefs"):
        (published / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([PAIR, PAIR | {"prompt": name}])
        pyarrow.parquet.write_table(table, published / "data" / f"{name}-00000-of-00001.parquet")
    (published / "dataset_infos.json").write_text("{}")
    code = (
        "import sys; from data import Ledger; from prepare.rows import *\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(*(row.where for row in read_rows(name, 'pairs', 'stop', Ledger())))\n"
        "    except InputError as error: print('error:', error)"
    )

    def read(*names, offline=False):
        return lines_printed(code, names, endpoint, tmp_path / "home", offline)

    where = "hub:o/prefs/data/train_prefs-00000-of-00001.parquet"
    with hub({"o/prefs": published}) as (endpoint, requests):
        found, pinned, none, missing = read(
            "hub:o/prefs:train_prefs", f"hub:o/prefs@{SHA}:train_prefs", "hub:o/prefs", "hub:o/absent"
        )
        assert found == pinned == f"{where}:1 {where}:2"
        assert none == "error: hub:o/prefs: no split train; there are test_prefs, train_prefs. Name one: hub:o/prefs:SPLIT"
        assert missing.startswith("error: o/absent: no such directory here and no such repository on the hub")
        fetched = {path.rpartition("/")[2] for path in requests if "/resolve/" in path}
        assert fetched == {"train_prefs-00000-of-00001.parquet"}
    cached, other, absent = read("hub:o/prefs:train_prefs", "hub:o/prefs:test_prefs", "hub:o/absent", offline=True)
    assert cached == found
    assert other.startswith("error: ") and "the hub cannot be reached" in other
    assert "no complete copy is here, and the hub cannot be reached or refuses" in absent
    with pytest.raises(InputError, match="hub:: write hub:ORG/NAME, hub:ORG/NAME:SPLIT"):
        files_of("hub:")


def test_how_rows_were_read_is_counted_and_said(tmp_path):
    dialogues = {
        name: [{"role": "user", "content": "?"}, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")
    }
    write_jsonl(tmp_path / "a.jsonl", [PAIR, dialogues, PAIR | {"chosen": "4<|im_end|>"}, PAIR, {"prompt": "?"}])
    ledger = Ledger()
    read_rows(tmp_path / "a.jsonl", "pairs", "skip", ledger)
    told = describe_ledgers({"a.jsonl": ledger}, 2048)
    for line in (
        "  read as: prompt, chosen, rejected, 2 rows",
        "  read as: chosen, rejected (two dialogues with a shared prompt), 1 rows",
        "  read as: prompt, chosen, rejected, in ChatML, 1 rows",
        "  Warning: 1 rows hold ChatML's marks as text.",
        f'  left out: {tmp_path}/a.jsonl:5: "chosen" is missing: the fields are prompt; the nearest form is prompt, ',
    ):
        assert line in told


def test_rows_to_measure_that_are_all_bad_say_why(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "?"}] * 3)
    with pytest.raises(InputError, match="(?s)3 of 3 rows of .*a.jsonl:1, 2, 3: .* is missing"):
        rows_to_measure(str(tmp_path / "a.jsonl"), None, on_bad_row="skip")


def test_the_limits_that_rows_need_are_said_where_rows_are_cut():
    ledger = Ledger(rows=100, sizes={64: 90, 96: 9, 640: 1}, prompts={32: 99, 640: 1})
    assert [covering(ledger.sizes, share) for share in (0.5, 0.9, 0.91, 0.99, 0.995)] == [64, 64, 96, 96, 640]
    assert describe_sizes(ledger, 2048) == ["  tokens with the longest answer: 99% of the rows up to 96, all up to 640"]
    ledger.drop("completion does not fit")
    assert describe_sizes(ledger, 2048)[1:] == [
        "  --max-length 96 --max-prompt-length 32 would keep 99% of the rows whole",
        "  --max-length 672 --max-prompt-length 640 would keep 100% of the rows whole",  # a prompt is shorter than both
    ]


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
    write_truth(tmp_path / "rows.jsonl", [read_row("pairs", PAIR)])
    assert list(tmp_path.iterdir()) == [] and read_truth(tmp_path / "rows.jsonl") == {}


def test_a_conversation_is_a_question_too(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = read_row("pairs", {**PAIR, "prompt": [*messages, {"role": "user", "content": "2 + 2?"}]})
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
    with pytest.raises(
        InputError, match="(?s)no row is left for the .* side: it had 0 .*Give other rows or limits, or --eval FILE"
    ):
        sides(tiny, tmp_path)
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "Like a sailor?", "completion": "Ahoy"}])
    assert len(sides(tiny, tmp_path, eval=str(tmp_path / "eval.jsonl")).train) == 9
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "?"}, {"prompt": "!", "completion": "x" * 99}, {"prompt": ""}])
    with pytest.raises(InputError, match="(?s)no row is left .*, dropped: 2 bad row, 1 completion does not fit\n") as error:
        sides(tiny, tmp_path, on_bad_row="skip", eval=str(tmp_path / "eval.jsonl"), out=str(tmp_path), name="run")
    reason = '"completion" is missing: the fields are prompt; the nearest form is prompt, completion'
    assert f"\n  left out: {tmp_path}/train.jsonl:1, 3: {reason}\n" in str(error.value)
    assert "--max-prompt-length 32 would keep 100% of the rows whole" in str(error.value)


def test_a_prompt_may_take_half_of_the_window_to_be_measured_on(tiny):
    """A longer one is cut to that half."""
    window = read_config(tiny).max_position_embeddings
    _, (example,), _ = encode_for(tiny, [Row([{"role": "user", "content": "q " * window}], ["so"], "f:1", {})])
    assert len(example.prompt) == window // 2
