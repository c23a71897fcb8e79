"""Number formats side by side: every format against full precision, from the command line."""

import pytest
import torch
from plain import unsorted_examples
from rows import pair_rows

from metrics.precisions import divergence
from model import Phi
from quant import quantize_model
from runtime.files import read_json, write_jsonl
from train import main


@pytest.fixture
def card(tmp_path):
    """card(model, name, formats, *flags) -> the results by format; the command must succeed."""

    def run(model, name, formats, *flags):
        command = ["--stage", "eval", "--model", str(model), "--out", str(tmp_path), "--name", name, "--device", "cpu"]
        assert main([*command, "--precisions", formats, "--samples", "0", *map(str, flags)]) == 0
        return {made["model"]: made for made in read_json(tmp_path / name / "eval.json")["results"]}

    return run


def test_formats_of_a_run_on_the_rows_that_it_held_out(card, tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    command = ["--stage", "dpo", "--model", str(tiny), "--train", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path)]
    command += "--name run --lr 1e-3 --max-steps 4 --batch-size 8 --samples 0 --device cpu".split()
    assert main(command) == 0
    made = card(tmp_path / "run", "card", "fp32,bf16,nf4-double,nf2")
    rows = {name: one["format"] for name, one in made.items()}

    assert rows["fp32"]["KL, nats"] == 0 and rows["fp32"]["same top 1"] == 1
    assert rows["nf2"]["KL, nats"] > 10 * rows["nf4-double"]["KL, nats"] > 10 * rows["bf16"]["KL, nats"] > 0
    widths = [rows[name]["bits per weight"] for name in ("fp32", "bf16", "nf4-double", "nf2")]
    assert widths[:2] == [32, 16] and 4.1 < widths[2] < 4.6 and widths[3] == 2.5
    sizes = [rows[name]["memory, MB"] for name in ("fp32", "nf4-double", "nf2")]
    assert sizes == sorted(sizes, reverse=True)
    # The first row is the model as its own run measured it.
    measured = read_json(tmp_path / "run" / "results.json")["after"]["metrics"]
    assert made["fp32"]["rewards"]["reward accuracy"]["value"] == measured["reward accuracy"]
    assert made["nf2"]["text"]["loss"]["value"] != made["fp32"]["text"]["loss"]["value"]
    assert (tmp_path / "card" / "figures" / "precisions.png").exists()
    assert "| nf4-double |" in (tmp_path / "card" / "eval.md").read_text()


def test_every_kind_of_rows_can_be_compared_on(card, tiny, tmp_path):
    questions = [{"question": f"{i} + 1?", "choices": [str(i), str(i + 1), "-1"], "answer": "B"} for i in range(9)]
    write_jsonl(tmp_path / "mcq.jsonl", questions)
    made = card(tiny, "choices", "int8", "--data", tmp_path / "mcq.jsonl")["int8"]
    assert 0 <= made["choices"]["letter"]["value"] <= 1 and 0 < made["format"]["KL, nats"] < 0.1


def test_a_quantized_model_cannot_be_compared(tiny, tmp_path, capsys):
    command = ["--model", str(tiny), "--to", "nf4", "--out", str(tmp_path), "--name", "q", "--device", "cpu"]
    assert main(["--stage", "quantize", *command]) == 0
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(9))
    command = ["--model", str(tmp_path / "q"), "--precisions", "int8", "--data", str(tmp_path / "pairs.jsonl")]
    assert main(["--stage", "eval", *command, "--out", str(tmp_path)]) == 2
    assert "q holds adapters or codes; --precisions needs a model in full precision" in capsys.readouterr().err


def test_divergence_is_a_mean_over_tokens_of_short_and_long_answers(tiny):
    """From the logits of a plain forward pass for each first completion."""
    full, other = Phi.from_pretrained(tiny), quantize_model(Phi.from_pretrained(tiny), "nf2")
    examples = unsorted_examples(2)
    kl, agree = [], []
    for e in examples:
        with torch.no_grad():
            ids = torch.tensor([e.prompt + e.completions[0]])
            p, q = (model(ids).log_softmax(-1)[0, len(e.prompt) - 1 : -1] for model in (full, other))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    mean = {name: sum(values) / len(values) for name, values in (("KL, nats", kl), ("same top 1", agree))}
    assert divergence(full, other, examples, batch_size=3, device="cpu") == pytest.approx(mean, rel=1e-4)
    assert 0 < mean["same top 1"] < 1
