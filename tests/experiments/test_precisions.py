"""The report card: every format against full precision, from the command line."""

import pytest
from rows import pair_rows

from runtime.files import read_json, write_jsonl
from train import main


@pytest.fixture
def card(tmp_path):
    """card(model, name, formats, *flags) -> the rows of a report card by format; the command must succeed."""

    def run(model, name, formats, *flags):
        command = ["--stage", "eval", "--model", str(model), "--out", str(tmp_path), "--name", name, "--device", "cpu"]
        assert main([*command, "--precisions", formats, *map(str, flags)]) == 0
        return {row["format"]: row for row in read_json(tmp_path / name / "eval.json")["rows"]}

    return run


def test_a_card_of_a_run_on_the_rows_that_it_held_out(card, tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    command = ["--stage", "dpo", "--model", str(tiny), "--train", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path)]
    command += "--name run --lr 1e-3 --max-steps 4 --batch-size 8 --samples 0 --device cpu".split()
    assert main(command) == 0
    rows = card(tmp_path / "run", "card", "fp32,bf16,nf4-double,nf2")

    assert rows["fp32"]["KL, nats"] == 0 and rows["fp32"]["same top 1"] == 1
    assert rows["nf2"]["KL, nats"] > 10 * rows["nf4-double"]["KL, nats"] > 10 * rows["bf16"]["KL, nats"] > 0
    widths = [rows[name]["bits per weight"] for name in ("fp32", "bf16", "nf4-double", "nf2")]
    assert widths[:2] == [32, 16] and 4.1 < widths[2] < 4.6 and widths[3] == 2.5
    sizes = [rows[name]["memory, MB"] for name in ("fp32", "nf4-double", "nf2")]
    assert sizes == sorted(sizes, reverse=True)
    # The first row is the model as its own run measured it.
    measured = read_json(tmp_path / "run" / "results.json")["after"]["metrics"]
    assert rows["fp32"]["reward accuracy"] == measured["reward accuracy"]
    assert (tmp_path / "card" / "figures" / "precisions.png").exists()
    assert "| format" in (tmp_path / "card" / "precisions.md").read_text()


def test_a_column_without_a_value_is_left_out(card, tiny, tmp_path, capsys):
    """Rewards need pairs and a parent, choices need questions."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(9))
    assert "reward accuracy" not in card(tiny, "pairs", "int8", "--data", tmp_path / "pairs.jsonl")["int8"]
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "reward accuracy" not in printed and "right option" not in printed
    given = card(tiny, "given", "int8", "--data", tmp_path / "pairs.jsonl", "--reference-model", tiny)
    assert 0 <= given["int8"]["reward accuracy"] <= 1 and "reward accuracy" in capsys.readouterr().out

    questions = [{"question": f"{i} + 1?", "choices": [str(i), str(i + 1), "0"], "answer": "B"} for i in range(9)]
    write_jsonl(tmp_path / "mcq.jsonl", questions)
    assert 0 <= card(tiny, "choices", "int8", "--data", tmp_path / "mcq.jsonl")["int8"]["right option"] <= 1
    assert "right option" in capsys.readouterr().out


def test_a_quantized_model_has_no_card(tiny, tmp_path, capsys):
    command = ["--model", str(tiny), "--to", "nf4", "--out", str(tmp_path), "--name", "q", "--device", "cpu"]
    assert main(["--stage", "quantize", *command]) == 0
    assert main(["--stage", "eval", "--model", str(tmp_path / "q"), "--precisions", "int8", "--out", str(tmp_path)]) == 2
    assert "q is quantized; the card needs the full-precision model" in capsys.readouterr().err
