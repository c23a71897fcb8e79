"""Each source's reader on a hand-made file in the form in which the set is published."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import SHA, hub, lines_printed

from prepare import mixture
from prepare.sources import SOURCES, option, read_source, without_letters
from runtime.files import InputError

RECORDS = {
    "mmlu_stem": {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "elementary_mathematics"},
    "theoremqa": {"Question": "How many?", "Answer": "11760", "Answer_type": "integer", "Picture": None},
    "math_qa": {
        "Problem": "a car drives 3 km in 2 h . how fast ?",
        "Rationale": '"3 / 2 = 1.5 answer : b"',
        "options": "a ) 1 , b ) 1.5 , c ) 1 , 000 , d ) 4 , e ) none",
        "correct": "b",
        "annotated_formula": "divide(3, 2)",
        "linear_formula": "divide(n0,n1)|",
        "category": "physics",
    },
    "arxiv_physics": {"question": "What is a quark?", "answer": "A constituent of hadrons."},
    "open_platypus": {
        "input": "",
        "output": "The answer is 7, since 3 + 4 = 7.",
        "instruction": "Add 3 and 4.",
        "data_source": "MATH/PRM-800K",
    },
    "sciq": {
        "question": "What turns milk to yogurt?",
        "distractor1": "viruses",
        "distractor2": "protozoa",
        "distractor3": "algae",
        "correct_answer": "bacteria",
        "support": "Bacteria ferment the milk.",
    },
    "aqua_rat": {
        "question": "How fast?",
        "options": ["A)5(√3 + 1)", " B ) 6000", "C)600", "D)60000", "E)10"],
        "rationale": "It is so.\nAnswer is A",
        "correct": "A",
    },
    "epfl": {
        "question_id": 7,
        "question_complete": "Why is the sky blue?",
        "course_id": 15113,
        "preference": [
            {"A": "Rayleigh.", "B": "The sea.", "overall": "A", "criteria": {"overall": "A", "correctness": "AB"}},
            {"A": "Paint.", "B": "Scattering.", "overall": "B", "criteria": {"overall": "B", "correctness": "B"}},
        ],
    },
    "pairs": {"prompt": "Why?", "chosen": "Because of this.", "rejected": "No idea.", "topic": "Physics"},
}
EXPECTED = {  # question, answer, choices, explanation, topic
    "mmlu_stem": ("2 + 2?", "4", ["3", "4", "5", "6"], "", "Mathematics"),
    "theoremqa": ("How many?", "11760", [], "", ""),
    "math_qa": (
        "a car drives 3 km in 2 h . how fast ?",
        "1.5",
        ["1", "1.5", "1 , 000", "4", "none"],
        "3 / 2 = 1.5 answer : b",
        "Mathematics",
    ),
    "arxiv_physics": ("What is a quark?", "A constituent of hadrons.", [], "", "Physics"),
    "open_platypus": ("Add 3 and 4.", "The answer is 7, since 3 + 4 = 7.", [], "", "Mathematics"),
    "sciq": (
        "What turns milk to yogurt?",
        "bacteria",
        ["algae", "bacteria", "protozoa", "viruses"],
        "Bacteria ferment the milk.",
        "",
    ),
    "aqua_rat": (
        "How fast?",
        "5(√3 + 1)",
        ["5(√3 + 1)", "6000", "600", "60000", "10"],
        "It is so.\nAnswer is A",
        "Mathematics",
    ),
    "epfl": ("Why is the sky blue?", "Rayleigh.", [], "", "Physics"),
    "pairs": ("Why?", "Because of this.", [], "", "Physics"),
}


def write(path, records):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", ["parquet", "json", "jsonl"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_from_every_form(name, form, tmp_path):
    source = read_source(name, write(tmp_path / f"x.{form}", [RECORDS[name]]))
    item = source.items[0]
    assert (item.question, item.answer, item.choices, item.explanation, item.topic) == EXPECTED[name]
    assert item.licence and item.question_id and item.source == ("x" if name == "pairs" else name)
    assert item.right == (item.choices.index(item.answer) if item.choices else None)
    assert source.counts == {"records": 1, "used": 1} and source.origin.endswith(form)


def test_a_vote_becomes_a_pair_with_the_winner_chosen(tmp_path):
    items = read_source("epfl", write(tmp_path / "x.json", [RECORDS["epfl"]])).items
    assert [(i.chosen, i.rejected, i.question_id) for i in items] == [
        ("Rayleigh.", "The sea.", "7"),
        ("Scattering.", "Paint.", "7"),
    ]


def test_theoremqa_keeps_every_type_of_answer_and_leaves_out_pictures(tmp_path):
    answers = [11760, 0.5, True, [1, 2], "(b)"]
    records = [RECORDS["theoremqa"] | {"Answer": a, "field": "Math", "id": "x.json"} for a in answers]
    records.append(RECORDS["theoremqa"] | {"Picture": "images/basic.jpg"})
    source = read_source("theoremqa", write(tmp_path / "t.json", records))
    assert [i.answer for i in source.items] == ["11760", "0.5", "True", "[1, 2]", "(b)"]
    assert source.items[0].topic == "Mathematics"
    assert source.counts == {"records": 6, "used": 5, "needs its picture": 1}


def test_platypus_keeps_stem_and_the_licence_of_each_row(tmp_path):
    records = [RECORDS["open_platypus"], RECORDS["open_platypus"] | {"data_source": "reclor"}]
    source = read_source("open_platypus", write(tmp_path / "p.parquet", records))
    assert len(source.items) == 1 and source.counts["not a STEM source"] == 1
    assert source.items[0].licence == "mixed, as of MATH/PRM-800K"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sciq", {"drop": "support"}, r"x\.json:1: sciq has no column 'support'; found: question, "),
        ("aqua_rat", {"correct": "F"}, r"x\.json:1: the right option is .F., but there are 5"),
        ("epfl", {"preference": [{"A": "a", "B": "b", "overall": "C"}]}, "neither A nor B"),
        ("mmlu_stem", {"answer": 9}, "the right option is '9', but there are 4: 0, 1, 2, 3"),
        ("theoremqa", {"Answer": {"value": 3}}, r"x\.json:1: .Answer. is an object, not text"),
    ],
)
def test_what_does_not_fit_names_file_record_and_columns(name, change, message, tmp_path):
    record = RECORDS[name] | change
    record.pop(change.get("drop", ""), None)
    with pytest.raises(InputError, match=message):
        read_source(name, write(tmp_path / "x.json", [record]))


BROKEN = {  # a change of a good record that makes it unusable
    "mmlu_stem": [{"choices": "abcd"}, {"choices": ["1", 2, "3", "4"]}, {"answer": -1}, {"answer": None}, {"subject": 7}],
    "theoremqa": [{"Question": None}, {"Question": ["?"]}],
    "math_qa": [{"options": ["1", "2"]}, {"correct": 2}, {"Rationale": None}],
    "arxiv_physics": [{"answer": None}, {"answer": {"text": "x"}}, {"question": "half \ud83d"}],
    "open_platypus": [{"data_source": ["leetcode_ne"]}, {"output": None}, {"input": None}],
    "sciq": [{"distractor1": None}, {"correct_answer": 7}, {"support": ["x"]}],
    "aqua_rat": [{"options": "A)1B)2"}, {"options": [1, 2]}, {"correct": "F"}, {"rationale": None}],
    "epfl": [{"preference": None}, {"preference": ["A"]}, {"preference": [{"A": "a", "B": None, "overall": "B"}]}],
    "pairs": [{"prompt": None}, {"chosen": ["a"]}, {"rejected": 7}],
}


@pytest.mark.parametrize("name", SOURCES)
def test_unusable_fields_are_named_or_counted_in_every_source(name, tmp_path):
    good = RECORDS[name]
    records = [good | change for change in BROKEN[name]] + [{}, 7, [good]]
    for record in records:
        with pytest.raises(InputError, match="leave them out with --on-bad-row skip") as error:
            read_source(name, write(tmp_path / "x.json", [record, good]))
        assert f"1 of 2 rows of {tmp_path}/x.json cannot be used:\n  {tmp_path}/x.json:1: " in str(error.value)
        assert str(error.value).count("\n") == 2
    path = tmp_path / "y.jsonl"
    write(path, [good, *records])
    path.write_bytes(path.read_bytes() + b'{"half": \n\xff\n' + b"[" * 100_000 + b"\n")
    reading = read_source(name, str(path), on_bad_row="skip")
    assert reading.counts == {"records": len(records) + 4, "used": 1, "not usable": len(records) + 3}
    assert len(reading.bad) == len(records) + 3 and all(line.startswith(f"{path}:") for line in reading.bad)
    assert len(reading.items) == len(good.get("preference", "1"))
    with pytest.raises(InputError, match=r"(?s)1 of 1 rows of .*x\.json:1: "):
        read_source(name, write(tmp_path / "x.json", records[:1]), on_bad_row="skip")


def test_own_pairs_may_have_odd_fields_of_their_own(tmp_path):
    (item,) = read("pairs", tmp_path, {"licence": ["MIT"], "topic": 7, "source": None, "question_id": None})
    assert (item.licence, item.topic, item.source, item.question_id) == ("['MIT']", "7", "x", "pairs-0")


def test_records_that_make_no_sense_are_skipped_if_asked(tmp_path):
    records = [RECORDS["aqua_rat"], RECORDS["aqua_rat"] | {"correct": "F"}]
    source = read_source("aqua_rat", write(tmp_path / "x.json", records), on_bad_row="skip")
    assert len(source.items) == 1 and source.counts == {"records": 2, "used": 1, "not usable": 1}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.json", b"[1, 2]", r"x\.json:1, 2: a JSON int, not an object"),
        ("x.json", b"[{", "cannot be read as json"),
        ("x.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("x.jsonl", json.dumps(RECORDS["sciq"]).encode() + b"\n\n{", r"x\.jsonl:3: .*not JSON"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1: a JSON list, not an object"),
        ("x.json", b"[]", "the file holds no rows"),
    ],
)
def test_broken_files_are_named(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_source("sciq", str(tmp_path / file))


JUNK = [None, True, -1, 3.5, 10**400, float("nan"), "", " ", "\x1b[2J", "\ud800", "\u2028", [], {}, [None], [[]], {"a": 1}]


@pytest.mark.parametrize("name", SOURCES)
def test_whatever_stands_in_a_field_the_record_is_used_or_bad(name, tmp_path):
    """Each field in turn holds each kind of junk; what is read is text that can be written."""
    good = RECORDS[name]
    records = [good | {field: junk} for field in good for junk in JUNK]
    records += [good | {"preference": [vote | {f: j}]} for vote in good.get("preference", []) for f in vote for j in JUNK]
    reading = read_source(name, write(tmp_path / "x.json", [good, *records]), on_bad_row="skip")
    assert reading.counts.total() == 2 * (1 + len(records)) and reading.counts["not usable"] == len(reading.bad) > 10
    for item in reading.items:
        texts = [item.question, item.answer, item.explanation, item.topic, item.licence, item.question_id, item.rejected]
        "".join([*texts, *item.choices]).encode()


@pytest.mark.parametrize(("name", "field"), [("mmlu_stem", "choices"), ("aqua_rat", "options")])
def test_a_question_with_an_empty_option_is_left_to_the_build(name, field, tmp_path):
    *most, _ = RECORDS[name][field]
    (item,) = read(name, tmp_path, {field: [*most, ""]})
    assert item.choices[-1] == "" and mixture.is_empty(item)


def test_the_right_option_by_its_letter():
    assert [option(given, "ABC", 2) for given in ("A", " b ", "B")] == [0, 1, 1]
    for given in ("C", "", "AB", "1"):
        with pytest.raises(ValueError, match="there are 2"):
            option(given, "ABC", 2)


def test_letters_before_the_options_have_to_run_in_order():
    assert without_letters(["A)5 km", " b ) 7 km", "C)d) 9", "10"]) == ["5 km", "7 km", "d) 9", "10"]
    with pytest.raises(ValueError, match="not lettered A, B, C"):
        without_letters(["A)5", "C)6"])


def test_options_of_one_text_do_not_move_the_letter(tmp_path):
    """Two cars cover a distance at 60 and 64 km/h, one in an hour more: a question of AQUA-RAT with two right options."""
    record = {"options": ["A)960 km", "B)968 km", "C)960 km", "D)980 km", "E)964 km"], "correct": "C"}
    (item,) = read("aqua_rat", tmp_path, record)
    assert item.right == 2 and item.answer == item.choices[0] == "960 km"


def test_options_of_mmlu_that_name_options_keep_their_order(tmp_path):
    """Which is true of Titan? Its air is thick, and there is more: "A and D", as a question of MMLU has it."""
    choices = ["It alone has a thick atmosphere", "It alone is active", "Its air is mostly hydrocarbons", "A and D"]
    (item,) = read("mmlu_stem", tmp_path, {"choices": choices, "answer": 3})
    assert item.choices == choices and item.choices[item.right] == "A and D"


def test_options_that_name_options_keep_their_order(tmp_path):
    def order(*options, support=""):
        names = ("distractor1", "distractor2", "distractor3", "correct_answer")
        (item,) = read("sciq", tmp_path, dict(zip(names, options, strict=True)) | {"support": support})
        assert item.choices[item.right] == options[3]
        return item.choices

    assert order("red", "blue", "green", "all of the above") == ["red", "blue", "green", "all of the above"]
    assert order("its mass", "its charge", "neither of these", "A and B only")[3] == "A and B only"
    assert order("z", "y", "x", "w", support="As said, option D is right.") == ["z", "y", "x", "w"]
    assert order("z", "y", "x", "w", support="Waves above it answer a question.") == ["w", "x", "y", "z"]


def test_the_heading_of_the_options_is_no_part_of_the_question(tmp_path):
    """A question of AQUA-RAT ends with it: how many dollars must Mr. Depak add to split $419,774 among six friends?"""
    for ending in ("?\nOptions:", "? Options", "?"):
        assert read("aqua_rat", tmp_path, {"question": "How many dollars must he add" + ending})[0].question[-4:] == "add?"


def read(name, tmp_path, *changes):
    return read_source(name, write(tmp_path / "x.json", [RECORDS[name] | change for change in changes])).items


def test_topics_by_field_subject_course_and_origin(tmp_path):
    def topics(name, column, values):
        return [item.topic for item in read(name, tmp_path, *({column: value} for value in values))]

    assert topics("theoremqa", "field", ["EECS", "Math", "Physics", None]) == [
        "Electrical Engineering and Computer Science",
        "Mathematics",
        "Physics",
        "",
    ]
    assert topics("mmlu_stem", "subject", ["machine_learning", "rock_climbing"]) == ["Computer Science", "Rock climbing"]
    # Two votes each: 9 is a course of computer science, 1 is in no list.
    assert topics("epfl", "course_id", [15113, 9, "9", 1]) == [*["Physics"] * 2, *["Computer Science"] * 4, "", ""]
    assert topics("open_platypus", "data_source", ["leetcode_ne", "scibench"]) == ["Computer Science", ""]
    assert topics("pairs", "topic", ["Unknown", "Biology"]) == ["", "Biology"]


def test_a_task_with_an_input_is_asked_with_it(tmp_path):
    assert read("open_platypus", tmp_path, {"input": "3 and 4"})[0].question == "Add 3 and 4.\n\n3 and 4"


def test_own_pairs_are_read_as_training_reads_them(tmp_path):
    (item,) = read("pairs", tmp_path, {"source": "mine", "question_id": 0, "licence": "CC0"})
    assert (item.source, item.question_id, item.licence) == ("mine", "0", "CC0")
    first, second = read("pairs", tmp_path, {}, {})
    assert (first.source, first.licence) == ("x", "that of the file")
    assert (first.question_id, second.question_id) == ("pairs-0", "pairs-1")
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    (item,) = read("pairs", tmp_path, {"prompt": prompt, "chosen": [{"role": "assistant", "content": "So."}]})
    assert (item.question, item.messages, item.chosen) == ("Why?", prompt, "So.")
    with pytest.raises(InputError, match=r'x\.json:1: "chosen" and "rejected" are the same text'):
        read("pairs", tmp_path, {"rejected": "Because of this."})
    with pytest.raises(InputError, match="nowhere.jsonl: "):
        read_source("pairs", "nowhere.jsonl")


def test_a_directory_is_read_in_order_and_json_lines_may_be_called_json(tmp_path):
    write(tmp_path / "b.json", [RECORDS["sciq"] | {"question": "second"}])
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(RECORDS["sciq"] | {"question": "first"}) + "\n\n", "utf-8")
    (tmp_path / "notes.txt").write_text("not a record")
    items = read_source("sciq", str(tmp_path)).items
    assert [item.question for item in items] == ["first", "second"]
    assert items[0].explanation == RECORDS["sciq"]["support"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps(RECORDS["sciq"] | {"question": "one\u2028\u2029\u0085two"}, ensure_ascii=False) + "\n", "utf-8"
    )
    assert [item.question for item in read_source("sciq", str(path)).items] == ["one\u2028\u2029\u0085two"]


def test_unknown_and_private_sources():
    with pytest.raises(InputError, match="no source 'scic'; there are mmlu_stem"):
        read_source("scic")
    with pytest.raises(InputError, match="give your copy as epfl=PATH"):
        read_source("epfl")


@pytest.mark.slow
def test_a_source_comes_from_the_hub_once_at_a_pinned_commit_and_then_offline(tmp_path):
    published = tmp_path / "sciq"
    (published / "data").mkdir(parents=True)
    write(published / "data" / "train-00000-of-00001.parquet", [RECORDS["sciq"]] * 3)
    write(published / "data" / "test-00000-of-00001.parquet", [RECORDS["sciq"]])
    (published / "sciq.py").write_text("a loading script, which is never run")
    code = (
        "import sys; from prepare.sources import *\n"
        "for name in sys.argv[1:]:\n"
        "    name, _, revision = name.partition('@')\n"
        "    try: source = read_source(name, None, revision or None); print(len(source.items), source.origin)\n"
        "    except InputError as error: print('error:', *str(error).split('\\n'))"
    )

    def read(*names, offline=False):
        return lines_printed(code, names, endpoint, tmp_path / "home", offline)

    sets = dict.fromkeys(("allenai/sciq", "TIGER-Lab/TheoremQA", "deepmind/aqua_rat"), published)
    with hub(sets) as (endpoint, requests):
        newest, pinned, broken, moved, missing = read("sciq", f"sciq@{SHA}", "theoremqa", "aqua_rat", "open_platypus")
        assert newest == pinned == f"3 allenai/sciq@{SHA}"  # the training split, and the commit it is
        fetched = {path.rpartition("/")[2] for path in requests if "/resolve/" in path and "sciq" in path}
        assert fetched == {"train-00000-of-00001.parquet"}
        assert "has no column 'Picture'; found: question" in broken
        assert "no file like raw/train-*.parquet is there; give a copy as aqua_rat=PATH" in moved
        assert "no such repository on the hub" in missing
    cached, absent = read(f"sciq@{SHA}", "mmlu_stem", offline=True)
    assert cached == f"3 allenai/sciq@{SHA}"
    assert "the hub cannot be reached or refuses; give a path" in absent


ROOT = Path(__file__).resolve().parents[2]
