"""--stage data: a teacher that misbehaves, a kill, flags that make no sense."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hub_server import SHA, hub, hub_environment
from openai_server import Server

from prepare import build
from prepare.build import account, multiple_choice, sizes_and_shares
from prepare.mixture import mixtures
from prepare.sources import Item
from prepare.teacher import open_teacher
from runtime import flags
from runtime.files import InputError, read_json, write_jsonl
from runtime.flags import default_name, from_stored
from runtime.settings import Data
from train import main

ROOT = Path(__file__).resolve().parents[2]


def mmlu(count):
    """Records as TIGER-Lab/MMLU-STEM publishes them."""
    return [
        {
            "question": f"What is {i} + 1?",
            "choices": [str(i), str(i + 1), str(i + 2), str(i + 3)],
            "answer": 1,
            "subject": "",
        }
        for i in range(count)
    ]


def physics(count):
    return [
        {"question": f"Why does body {i} fall?", "answer": f"Because masses attract each other, as Newton found, {i}."}
        for i in range(count)
    ]


def answer(body):
    """A teacher that argues for what it is told to."""
    asked = body["messages"][-1]["content"]
    if body["max_tokens"] == 30:
        return "Unknown" if "3 + 1" in asked else "Mathematics"
    given = asked.partition("Answer: ")[2].partition("\n")[0]
    return f"Step by step one arrives at it, from {asked.split()[2]}. The answer is {given or 'not known'}."


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mmlu.json").write_text(json.dumps(mmlu(60)))
    write_jsonl(tmp_path / "physics.jsonl", physics(40))
    return f"mmlu_stem={tmp_path}/mmlu.json,arxiv_physics={tmp_path}/physics.jsonl"


@pytest.fixture
def serve(monkeypatch):
    server = Server(answer, fault=lambda body, attempt: "500" if attempt == 1 and len(str(body)) % 3 == 0 else None)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    yield server
    server.shutdown()
    server.server_close()


def run(*words):
    settings = flags.parse(["--stage", "data", *map(str, words)]).settings
    settings.name = settings.name or default_name(settings)
    return build.run(settings)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_from_sources_to_mixtures(files, serve, tmp_path, capsys):
    words = ("--sources", files, "--out", tmp_path, "--teacher", "m", "--price", "1,2", "--sizes", "20,60")
    assert run(*words, "--dry-run") == 0
    assert "220 calls of m" in capsys.readouterr().out  # 60 explanations, 100 rejected answers, 60 topics
    assert not serve.answered and not (tmp_path / "data").exists()

    assert run(*words) == 0
    data = tmp_path / "data"
    small, large, test = (lines(data / f"{name}.jsonl") for name in ("train-20", "train-60", "test"))
    assert len(small) == 20 and small == large[:20]
    assert not {r["prompt"] for r in large} & {r["prompt"] for r in test}
    assert {r["licence"] for r in large} == {"MIT", "none stated"}
    ledger = read_json(data / "ledger.json")
    assert ledger["rows"] == {"items": 100, "kept": 100, "left out": {}}
    assert ledger["multiple choice"] == {"items": 60, "kept": 60, "left out": {}}
    read = {"from": f"{tmp_path}/mmlu.json", "records": 60, "used": 60, "items": 60, "licences": {"MIT": 60}, "bad rows": []}
    assert ledger["read"][files.split(",")[0]] == read
    assert ledger["files"]["train-60"]["rows"] == 60
    for kind in ("source", "topic", "licence"):
        assert ledger["files"]["train-60"][f"by {kind}"] == Counter(row[kind] for row in large)
    by = {line["source"]: line["chosen by, rejected by"] for line in ledger["scores"]}
    assert by == {"arxiv_physics": "source, teacher", "mmlu_stem": "teacher, teacher"}
    assert max(serve.answered.values()) == 1

    # Multiple choice: the right option under its letter.
    choices = lines(data / "mcq-train.jsonl") + lines(data / "mcq-test.jsonl")
    assert len(choices) == 60
    assert all(r["choices"]["ABCD".index(r["answer"])] == str(int(r["question"].split()[2]) + 1) for r in choices)

    # Pairs show the options in the same order.
    shown = {r["question"]: r["prompt"] for r in large + test if r["source"] == "mmlu_stem"}
    for r in choices:
        if r["question"] in shown:
            right = r["choices"]["ABCD".index(r["answer"])]
            assert f"\n{r['answer']}. {right}" in shown[r["question"]]

    # run.json says how it was built.
    stored = read_json(data / "run.json")
    assert stored["stage"] == "data" and from_stored(stored, "run.json").sizes == "20,60"

    # A finished folder is not written over; with --overwrite nothing is asked again.
    with pytest.raises(InputError, match="--overwrite"):
        run(*words)
    before = sum(serve.answered.values())
    assert run(*words, "--overwrite") == 0 and sum(serve.answered.values()) == before
    assert lines(data / "train-60.jsonl") == large


def test_a_build_that_was_stopped_goes_on_and_pays_for_nothing_twice(files, serve, tmp_path):
    working = serve.fault
    serve.fault = lambda body, attempt: "quota" if sum(serve.answered.values()) >= 60 else None
    with pytest.raises(InputError, match="answers are missing; the same command asks only for those"):
        run("--sources", files, "--out", tmp_path, "--teacher", "m", "--concurrency", "4")
    assert not (tmp_path / "data").exists() and 60 <= len(serve.answered) < 70
    serve.fault = working
    assert run("--sources", files, "--out", tmp_path, "--teacher", "m") == 0
    assert len(serve.answered) == sum(serve.answered.values()) == 220


def test_a_build_that_lacks_answers_is_an_error_writes_nothing_and_goes_on(files, serve, tmp_path, capsys):
    command = ["--stage", "data", "--sources", files, "--out", str(tmp_path), "--teacher", "m"]
    serve.fault = lambda body, attempt: "<html>Welcome</html>" if "7 + 1" in str(body) else None
    assert main(command) == 2 and not (tmp_path / "data").exists()
    assert "of 60 answers are missing; the same command asks only for those" in capsys.readouterr().err
    serve.fault = lambda body, attempt: None
    assert main(command) == 0 and max(serve.answered.values()) == 1


# A build twice, in a process of its own, whose environment points to another hub.
TWICE = """
import sys
from prepare import build
from runtime import flags
settings = flags.parse(["--stage", "data", "--name", "data", *sys.argv[1:]]).settings
sys.exit(build.run(settings) + build.run(settings))
"""


def test_hub_sources_are_pinned_at_the_first_build(tmp_path):
    published = tmp_path / "physics"
    published.mkdir()
    write_jsonl(published / "arxiv_physics_instruct_30k.jsonl", physics(5))
    command = [sys.executable, "-c", TWICE, "--sources", "arxiv_physics", "--out", str(tmp_path), "--dry-run"]
    with hub({"ArtifactAI/arxiv-physics-instruct-tune-30k": published}) as (endpoint, requests):
        environment = hub_environment(endpoint, tmp_path / "home", offline=False)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.count(f"arxiv-physics-instruct-tune-30k@{SHA}: 5 records") == 2
    assert done.stdout.count("5 answers are missing; --teacher MODEL asks") == 2
    assert read_json(tmp_path / "sources.lock.json") == {"arxiv_physics": SHA}
    assert sum("/revision/" in path for path in requests) == 1  # the second build knows its commit


def test_without_a_teacher_only_pairs_are_left_and_it_says_so(files, tmp_path):
    physics_only = files.partition(",")[2]
    with pytest.raises(InputError, match="no pairs are left: 40 no rejected answer"):
        run("--sources", physics_only, "--out", tmp_path)
    assert not (tmp_path / "data").exists()
    assert run("--sources", physics_only, "--out", tmp_path, "--what", "sft", "--name", "sft") == 0
    row = lines(tmp_path / "sft" / "train.jsonl")[0]
    assert row["completion"].startswith("Because masses") and row["topic"] == "Physics"
    assert "- sft\n" in (tmp_path / "sft" / "README.md").read_text()
    assert run("--sources", files, "--out", tmp_path, "--name", "choices") == 0  # multiple choice needs no teacher
    assert not (tmp_path / "choices" / "test.jsonl").exists() and lines(tmp_path / "choices" / "mcq-test.jsonl")
    left_out = read_json(tmp_path / "choices" / "ledger.json")["rows"]["left out"]
    assert left_out == {"multiple choice alone": 60, "no rejected answer": 40}
    pairs = [{"prompt": f"Why {i}?", "chosen": f"Because of {i} things.", "rejected": "I do not know."} for i in range(30)]
    write_jsonl(tmp_path / "own.jsonl", pairs)
    assert run("--sources", f"pairs={tmp_path}/own.jsonl", "--out", tmp_path) == 0
    assert {r["source"] for r in lines(tmp_path / "data" / "train.jsonl")} == {"own"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--sources is missing"),
        (("--sources", "theorem"), "no source 'theorem'"),
        (("--sources", "epfl"), "epfl=PATH"),
        (("--sources", "sciq=nowhere"), "nowhere: No such file"),
        (("--sources", "sciq=x", "--price", "1,2"), "add --teacher MODEL"),
        (("--sources", "OWN", "--sizes", "20k"), "--sizes 20000,30000"),
        (("--sources", "OWN", "--sizes", "5000"), "has 27 training rows"),
        (("--sources", "OWN", "--shares", "x=1"), "no rows of x"),
        (("--sources", "OWN", "--teacher", "m", "--price", "cheap"), "--price cheap"),
        (("--sources", "OWN", "--teacher", "m", "--budget", 1), "--budget needs --price"),
        (("--sources", "OWN,OWN"), "twice"),
        (("--sources", "OWN", "--lr", 1), "--lr belongs to --stage"),
        (("--sources", "OWN", "--what", "sft", "--match-lengths"), "--match-lengths is for --what pairs"),
        (("--sources", "OWN", "--eval-share", 0.001), "--eval-share 0.001 leaves none of 30 rows to test on"),
    ],
)
def test_flags_that_make_no_sense_are_errors(words, message, tmp_path):
    pairs = [{"prompt": f"Why {i}?", "chosen": f"Because of {i} things.", "rejected": "I do not know."} for i in range(30)]
    write_jsonl(tmp_path / "own.jsonl", pairs)
    words = [str(word).replace("OWN", f"pairs={tmp_path}/own.jsonl") for word in words]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run(*words, "--out", tmp_path)
    assert "\n" not in str(error.value)


def test_the_command_line(tmp_path, capsys):
    """A build ends with status 0, bad input with 2 and one line; a flag of another stage ends the program."""
    pairs = [{"prompt": f"Why {i}?", "chosen": f"Because of {i} things.", "rejected": "I do not know."} for i in range(30)]
    write_jsonl(tmp_path / "own.jsonl", pairs)
    command = ["--stage", "data", "--sources", f"pairs={tmp_path}/own.jsonl", "--out", str(tmp_path)]
    assert main(command) == 0
    assert len(lines(tmp_path / "data" / "train.jsonl")) + len(lines(tmp_path / "data" / "test.jsonl")) == 30
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/data already holds a run.")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--lr", "1"])
    assert stopped.value.code == 2 and "--lr belongs to --stage" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- parts, without a build


def test_a_folder_that_this_program_did_not_make_is_not_replaced(files, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="data has no run.json, so it is not a run of this program"):
        run("--sources", files, "--out", tmp_path, "--overwrite")
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    with pytest.raises(InputError, match="clone holds files that the data sets would replace"):
        run("--sources", files, "--out", tmp_path, "--name", "clone")


def test_the_price_is_in_then_out(tmp_path):
    asking = dict(out=str(tmp_path), teacher="m", budget=2.0, concurrency=3)
    asker = open_teacher(Data(price="0.5,1.5", **asking))
    assert (asker.price, asker.budget, asker.concurrency, asker.model) == ((0.5, 1.5), 2.0, 3, "m")
    assert asker.journal.path == tmp_path / "teacher" / "journal.jsonl"
    for price in ("-1,2", "1,-2", "1", "1,2,3", "a,b", "nan,1", "1,inf"):
        with pytest.raises(InputError, match=f"--price {price}: two numbers"):
            open_teacher(Data(price=price, **asking))


def test_shares_and_sizes():
    rows = [
        {"prompt": f"{s} {i}", "chosen": "a", "rejected": "b", "source": s, "topic": t}
        for s, t in (("a", "Physics"), ("b", "Biology"))
        for i in range(40)
    ]

    def counts(by="source", **given):
        made = mixtures(rows, *sizes_and_shares(Data(**given)), by, seed=0)
        return {name: (len(part), sum(r["source"] == "a" for r in part)) for name, part in made.items()}

    assert counts() == {"train": (80, 40)}
    assert counts(sizes="8,40", shares="a=3,b=1") == {"train-8": (8, 6), "train-40": (40, 30)}
    assert counts(by="topic", sizes="8", shares="Biology=3,Physics=1") == {"train-8": (8, 2)}
    for given in ({"sizes": "0"}, {"shares": "a=-1"}, {"shares": "a"}, {"sizes": "8.5"}, {"shares": "a=nan"}):
        with pytest.raises(InputError, match="take positive numbers"):
            counts(**given)


def test_multiple_choice_keeps_the_explanation_and_each_question_once():
    known = dict(choices=["a", "b", "c"], right=1, explanation="It is so.", source="s")
    items = [Item(f"{i % 20}?", "b", question_id=f"s-{i}", **known) for i in range(30)]
    ledger, settings = {}, Data(eval_share=0.25, seed=0)
    made = multiple_choice([*items, Item("An essay?", "Long.")], settings, ledger, read=31)
    rows = made["mcq-train"] + made["mcq-test"]
    assert sorted(row["question"] for row in rows) == sorted(f"{i}?" for i in range(20))
    assert all(row["answer"] == "B" and row["explanation"] == "It is so." and row["topic"] == "Unknown" for row in rows)
    assert 0 < len(made["mcq-test"]) < 10 and "prompt" not in rows[0]
    left_out = {"empty question, answer or option": 1, "the same question with the same options": 10}
    assert ledger == {"multiple choice": {"items": 31, "kept": 20, "left out": left_out}}
    assert multiple_choice([Item("An essay?", "Long.")], settings, ledger, read=0) == {}


def test_a_question_with_two_options_of_one_text_is_left_out():
    """Its letter would be right and another letter, too."""
    ledger, items = (
        {},
        [Item("Red?", "1/2", ["7/8", "1/2", "1/4", "1/2 "], 3), Item("Red?", "1/2", ["7/8", "1/2", "1/4"], 1)],
    )
    made = multiple_choice(items, Data(eval_share=0.25, seed=0), ledger, read=2)
    assert [row["answer"] for part in made.values() for row in part] == ["B"]
    assert ledger["multiple choice"]["left out"] == {"two options of one text": 1}


def test_a_ledger_that_does_not_add_up_is_a_bug():
    assert account(5, Counter({"a": 2, "b": 0}), 3) == {"items": 5, "kept": 3, "left out": {"a": 2}}
    with pytest.raises(AssertionError, match="does not add up"):
        account(5, Counter({"a": 2}), 2)


def test_what_the_teacher_cannot_explain_is_left_out_and_counted(files, serve, tmp_path):
    """It explains option A of question 5 instead of the right one, argues for the right one when asked for a wrong one of
    question 6, and says nothing of question 7: those pairs are missing, the questions themselves are not."""

    def confused(body):
        asked = body["messages"][-1]["content"]
        wrong = "is 5 + 1" in asked and "Answer: 6" in asked or "is 6 + 1" in asked and "Answer: 7" not in asked
        if body["max_tokens"] == 30 or not wrong and "is 7 + 1" not in asked:
            return answer(body)
        return "The answer is A." if "is 5 + 1" in asked else "The answer is 7." if "is 6 + 1" in asked else "Hm."

    serve.answer = confused
    assert run("--sources", files.partition(",")[0], "--out", tmp_path, "--teacher", "m") == 0
    ledger = read_json(tmp_path / "data" / "ledger.json")
    left_out = {"no usable explanation of a bare answer": 2, "no rejected answer": 1}
    assert ledger["rows"] == {"items": 60, "kept": 57, "left out": left_out}
    assert ledger["multiple choice"]["kept"] == 60
    pairs = lines(tmp_path / "data" / "train.jsonl") + lines(tmp_path / "data" / "test.jsonl")
    assert not {row["question"] for row in pairs} & {f"What is {i} + 1?" for i in (5, 6, 7)}


def test_bad_rows_of_every_source_are_in_the_ledger(tmp_path):
    (tmp_path / "mmlu.json").write_text(
        json.dumps([*mmlu(30), mmlu(1)[0] | {"choices": None}, mmlu(1)[0] | {"question": " "}])
    )
    sources = ("--sources", f"mmlu_stem={tmp_path}/mmlu.json", "--out", tmp_path)
    with pytest.raises(InputError, match="1 of 32 rows of .*mmlu.json cannot be used"):
        run(*sources)
    assert run(*sources, "--on-bad-row", "skip") == 0
    ledger = read_json(tmp_path / "data" / "ledger.json")
    (read,) = ledger["read"].values()
    assert (read["records"], read["used"], read["not usable"]) == (32, 31, 1)
    (reason,) = read["bad rows"]
    assert reason.startswith(f'{tmp_path}/mmlu.json:31: "choices" is not a list of 2 to 10 texts')
    assert ledger["multiple choice"]["left out"] == {"empty question, answer or option": 1}
    assert ledger["rows"]["left out"] == {"empty question or answer": 1, "multiple choice alone": 30}


def test_matched_lengths_are_printed_before_and_after(tmp_path, capsys):
    """Every other chosen answer is longer by 30 characters, the others are shorter by 5: the lengths alone say which."""
    texts = [("x" * 80, "y" * 50) if i % 2 else ("x" * 50, "y" * 55) for i in range(80)]
    texts += [("x" * 60, "y" * 40) if i % 2 else ("x" * 40, "y" * 60) for i in range(80)]
    pairs = [{"prompt": f"{i}?", "chosen": f"{i} {a}", "rejected": f"{i} {b}"} for i, (a, b) in enumerate(texts)]
    write_jsonl(tmp_path / "own.jsonl", pairs)
    assert run("--sources", f"pairs={tmp_path}/own.jsonl", "--out", tmp_path, "--match-lengths") == 0
    before, after = read_json(tmp_path / "data" / "ledger.json")["scores"]
    assert before["longer answer wins"] == after["longer answer wins"].replace("5.6%", "4.0%") == "50.0% ± 4.0%"
    assert before["pairs"] == 160 and after["pairs"] == 80
    assert float(before["lengths alone"][:4]) > 60 > float(after["lengths alone"][:4])
    assert "| own    | matched |    80 |" in capsys.readouterr().out


def test_the_card_says_what_the_hub_asks_and_no_text_of_the_data_gets_into_its_metadata(tmp_path):
    odd = {"licence": "CC0\n---\nlicense: mit", "source": "my | <b>[own]\x1b[2J"}
    pairs = [{"prompt": f"Why {i}?", "chosen": f"Because of {i} things.", "rejected": "I do not know."} for i in range(30)]
    write_jsonl(tmp_path / "own.jsonl", [pairs[0] | odd, *pairs[1:]])
    (tmp_path / "mmlu.json").write_text(json.dumps(mmlu(20)))
    sources = f"pairs={tmp_path}/own.jsonl,mmlu_stem={tmp_path}/mmlu.json"
    assert run("--sources", sources, "--out", tmp_path, "--name", "mine") == 0
    head, text = (tmp_path / "mine" / "README.md").read_text().split("---\n")[1:]
    assert head.startswith("license:\n- mit\n- other\ntags:\n- dpo\n- multiple-choice\nconfigs:\n")
    assert "- config_name: train\n  data_files:\n  - split: train\n    path: train.jsonl\n" in head
    assert "    path: mcq-test.jsonl\n" in head and "CC0" not in head
    assert "a local copy, own.jsonl" in text and str(tmp_path) not in text
    assert "| CC0 --- license: mit; that of the file |" in text and "| my b own x1b 2J |" in text and "\x1b" not in text
    assert "source, source" in text and "too few pairs" in text
    assert "| 50 |       20 | multiple choice alone |" in text
