"""--stage eval end to end on a tiny model: every kind of rows, several models, a judge, and what goes wrong."""

import json
import shutil

import pytest
from openai_server import Server
from rows import pair_rows

from runtime.files import read_json, write_json, write_jsonl
from train import main


def rows_of(kind: str, count: int = 12) -> list[dict]:
    if kind == "pairs":
        return pair_rows(count)
    if kind == "mcq":
        return [
            {"question": f"{i} + 1?", "choices": [str(i), str(i + 1), "0"][: 2 + i % 2], "answer": "B", "topic": f"t{i % 3}"}
            for i in range(count)
        ]
    return [{"prompt": f"Say {i}", "completion": f"Here it is: {i}"} for i in range(count)]


@pytest.fixture
def run(tiny, tmp_path):
    """run(kind, *flags) -> (exit status, eval.json): one evaluation of the tiny model."""

    def start(kind, *flags, models=(tiny,), name="e"):
        data = tmp_path / f"{kind}.jsonl"
        if not data.exists():
            write_jsonl(data, rows_of(kind))
        command = ["--stage", "eval", "--model", *map(str, models), "--data", str(data), "--out", str(tmp_path)]
        command += ["--name", name, "--device", "cpu", "--max-new-tokens", "8", *flags]
        status = main(command)
        path = tmp_path / name / "eval.json"
        return status, read_json(path) if path.exists() else None

    return start


def numbers(result: dict) -> dict:
    """All values of a model's result, {"section/measure": value}."""
    return {
        f"{section}/{name}": measure["value"]
        for section, part in result.items()
        if isinstance(part, dict)
        for name, measure in part.items()
        if isinstance(measure, dict) and "value" in measure
    }


@pytest.mark.parametrize("kind", ["pairs", "mcq", "sft"])
def test_the_batch_size_changes_no_number(run, tiny, kind):
    extra = ["--reference-model", str(tiny), "--eps", "0.1"] if kind == "pairs" else []
    made = [
        numbers(run(kind, *extra, "--micro-batch-size", size, name=f"e{size}")[1]["results"][0]) for size in ("1", "5", "16")
    ]
    assert len(made[0]) > 4
    assert made[0] == pytest.approx(made[1], rel=1e-4, abs=1e-6) and made[0] == pytest.approx(made[2], rel=1e-4, abs=1e-6)


def test_every_file_is_written_and_every_number_has_its_interval(run, tmp_path, capsys):
    status, made = run("mcq", "--samples", "5")
    assert status == 0 and made["rows"] == 12
    (result,) = made["results"]
    methods = {"letter", "summed", "per char", "generated"}
    assert set(result["choices"]) == methods | {"chance", "position bias", "bias by chance", "invalid"}
    assert result["choices"]["letter"]["n"] == 12 and result["choices"]["generated"]["n"] == 5
    assert result["choices"]["chance"] == pytest.approx((6 / 2 + 6 / 3) / 12) and set(result["by topic"]) == {
        "t0",
        "t1",
        "t2",
    }
    assert "| model" in (tmp_path / "e" / "eval.md").read_text()
    answers = [json.loads(line) for line in (tmp_path / "e" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 and all(len(a["answers"]) == 1 for a in answers)
    printed = capsys.readouterr().out
    assert "| model" in printed and "position bias" in printed and "BLEU: sacrebleu, nrefs:1|" in printed


def test_models_stand_side_by_side(run, tiny, tmp_path):
    other = tmp_path / "other"
    assert main(["--stage", "quantize", "--model", str(tiny), "--to", "nf4", "--out", str(tmp_path), "--name", "other"]) == 0
    status, made = run("pairs", "--samples", "3", models=(tiny, other))
    assert status == 0 and [r["model"] for r in made["results"]] == [str(tiny), str(other)]
    text = (tmp_path / "e" / "eval.md").read_text()
    assert text.count(f"**{tiny}**") == text.count(f"**{other}**") == 3
    assert made["results"][0]["text"]["loss"]["value"] != made["results"][1]["text"]["loss"]["value"]


def test_texts_of_answers_cannot_become_markup(run, tmp_path):
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "```\n# Not a heading", "completion": "````"}])
    assert run("sft", "--samples", "1")[0] == 0
    text = (tmp_path / "e" / "eval.md").read_text()
    assert "\n    ```\n    # Not a heading\n" in text and "\n    ````\n" in text


# ------------------------------------------------------------------------------------------------------------- the judge


@pytest.fixture
def judge(monkeypatch):
    """judge(answer) starts a server that judges by `answer` of a request's body."""
    servers = []

    def start(answer, **settings):
        servers.append(Server(answer, **settings))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def longer(body):
    """The longer of the two answers."""
    _, a, b = body["messages"][-1]["content"].replace("\n\nAnswer B:\n", "\n\nAnswer A:\n").split("\n\nAnswer A:\n")
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


def test_a_judge_s_verdicts_are_counted_and_asked_once(run, judge):
    server = judge(longer)
    status, made = run("sft", "--samples", "4", "--teacher", "m")
    verdict = made["results"][1]
    assert status == 0 and verdict["judged against"] == "the reference answers"
    assert verdict["judge"]["longer answer wins"]["value"] == 1
    calls = sum(server.answered.values())
    assert calls == 8
    assert run("sft", "--samples", "4", "--teacher", "m", "--overwrite")[0] == 0
    assert sum(server.answered.values()) == calls  # all from the journal


def test_every_other_model_is_judged_against_the_first(run, tiny, tmp_path, judge):
    other = tmp_path / "other"
    assert main(["--stage", "quantize", "--model", str(tiny), "--to", "nf2", "--out", str(tmp_path), "--name", "other"]) == 0
    judge(longer)
    status, made = run("sft", "--samples", "6", "--teacher", "m", models=(tiny, other))
    *measured, verdict = made["results"]
    assert status == 0 and len(measured) == 2
    assert (verdict["model"], verdict["judged against"]) == (str(other), str(tiny))
    texts = [json.loads(line)["answers"] for line in (tmp_path / "e" / "answers.jsonl").read_text().splitlines()]
    gaps = [len(answers[str(other)]) - len(answers[str(tiny)]) for answers in texts]
    decided = [gap for gap in gaps if gap]
    assert decided and verdict["judge"]["win rate"]["value"] == sum(gap > 0 for gap in decided) / len(decided)


def test_a_judge_that_is_down_costs_the_judgement_alone(run, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    status, made = run("sft", "--samples", "3", "--teacher", "m")
    assert status == 2 and len(made["results"]) == 1
    error = capsys.readouterr().err
    assert "error: the teacher's server at http://127.0.0.1:9/v1/ cannot be used: " in error
    assert "Traceback" not in error


# ------------------------------------------------------------------------------------------------------------ gone wrong


def test_a_model_that_cannot_be_read_loses_nothing_that_was_measured_before(run, tiny, tmp_path, capsys):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:2000])
    status, made = run("pairs", "--samples", "2", models=(tiny, broken))
    assert status == 2 and [r["model"] for r in made["results"]] == [str(tiny)]
    assert "| model" in (tmp_path / "e" / "eval.md").read_text()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken}/model.safetensors: ") and "Traceback" not in error


def test_a_model_that_is_not_there_is_an_error_before_anything_is_measured(run, tiny, tmp_path, capsys):
    assert run("pairs", "--samples", "2", models=(tiny, tmp_path / "missing")) == (2, None)
    assert "missing: no such directory" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_an_error(run, tiny, tmp_path, capsys):
    small = shutil.copytree(tiny, tmp_path / "small")
    write_json(small / "config.json", {**read_json(tiny / "config.json"), "vocab_size": 700})
    assert run("pairs", models=(small,))[0] == 2
    assert "the tokenizer does not fit the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("sft", ["--eps", "0.1"], "--eps is for preference pairs"),
        ("mcq", ["--reference-model", "x"], "--reference-model is for preference pairs"),
        ("sft", ["--letter-only"], "--letter-only is for multiple-choice"),
        ("pairs", ["--bert", "no/such/model"], "no/such/model"),
    ],
)
def test_flags_that_do_not_go_with_the_rows_are_errors(run, kind, flags, message, capsys):
    assert run(kind, *flags)[0] == 2
    assert message in capsys.readouterr().err


def test_a_broken_file_is_one_clear_error_and_leaves_no_run_behind(run, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}')
    assert run("pairs")[0] == 2 and not (tmp_path / "e").exists()
    error = capsys.readouterr().err
    assert 'pairs.jsonl:1: "rejected" is missing' in error and "Traceback" not in error
    (tmp_path / "pairs.jsonl").unlink()
    assert run("pairs")[0] == 0


def test_a_run_is_measured_on_what_it_held_out_and_warned_of_what_it_was_trained_on(run, tiny, tmp_path, capsys):
    pairs, tuned = tmp_path / "pairs.jsonl", tmp_path / "tuned"
    write_jsonl(pairs, rows_of("pairs"))
    write_jsonl(tmp_path / "pairs.truth.jsonl", [{"prompt": row["prompt"], "flipped": True} for row in rows_of("pairs")])
    command = ["--stage", "dpo", "--model", str(tiny), "--train", str(pairs), "--out", str(tmp_path), "--name", "tuned"]
    assert main([*command, "--max-steps", "1", "--samples", "0", "--device", "cpu"]) == 0
    held_out = (tuned / "held_out.jsonl").read_text().splitlines()
    assert 0 < len(held_out) < 12
    capsys.readouterr()

    # On all rows, twice under one name: the second evaluation does not replace the first.
    status, made = run("pairs", "--samples", "1", models=(tuned,))
    warning = f"Warning: {tuned} was trained on the questions of {12 - len(held_out)} of these 12 rows."
    assert status == 0 and warning in made["notes"] and warning in capsys.readouterr().out
    assert run("pairs", "--samples", "1", models=(tuned,)) == (2, made)
    assert "e already holds a run. Delete it with --overwrite, or give this one another --name" in capsys.readouterr().err

    # On what the run held out, with the truth about those rows: no label is right. Rewards are measured from the parent.
    own = ["--stage", "eval", "--model", str(tuned), "--out", str(tmp_path), "--samples", "0"]
    assert main(own) == 0
    made = read_json(tmp_path / "tuned-eval" / "eval.json")
    assert made["rows"] == len(held_out) and made["of"] == f"the rows that {tuned} held out"
    assert "was trained on" not in capsys.readouterr().out
    (result,) = made["results"]
    rewards = {name: measure["value"] for name, measure in result["rewards"].items()}
    assert result["reference"] == str(tiny)
    assert rewards["clean accuracy"] == pytest.approx(1 - rewards["reward accuracy"] - rewards["ties"])
    assert main(own) == 2  # the name that eval gives by itself is taken too


def test_a_reference_that_reads_other_tokens_is_an_error(run, tiny, tmp_path, capsys):
    other = shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run("pairs", "--reference-model", str(other))[0] == 2
    assert "its tokenizer differs from that of" in capsys.readouterr().err


def test_what_a_reader_must_know_is_written_down(run, tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [*rows_of("pairs"), {"prompt": "no answers"}])
    flags = ["--eps", "0.2", "--on-bad-row", "skip", "--reference-model", str(tiny), "--samples", "3"]
    status, made = run("pairs", *flags)
    text = (tmp_path / "e" / "eval.md").read_text()
    assert status == 0 and made["rows"] == 12
    for note in (
        "1 bad rows were skipped",
        "labels flipped at rate 0.2; DPO loss at beta 0.1",
        "3 of the rows were answered",
    ):
        assert note in text and any(note in line for line in made["notes"])
