"""The preset makes every run of the report's tables, and its verdicts follow from the numbers."""

import json

import torch
from rows import pair_rows

from data import Example
from experiments.claims import FORMATS, answer_claims, better
from experiments.paper import right_text
from experiments.ranking import Result
from metrics.intervals import Estimate
from runtime.files import write_jsonl
from train import main


def result(right):
    return Result("x", {}, torch.tensor(right, dtype=torch.bool)[None], {}, {}, 0.0, [1], 1.0)


def test_verdicts():
    good, bad = result([1] * 90 + [0] * 10), result([1] * 50 + [0] * 50)
    assert better(good, bad) == "held" and better(bad, good) == "did not hold" and better(good, good) == "cannot be told"


def test_verdicts_on_answers():
    def extra(after, nf4):
        scores = {
            f"format {name}": {"BLEU": vars(Estimate(value, 0, 99, 9))} for name, value in zip(FORMATS, (50, 50, nf4, 49))
        }
        return {"ends, before": vars(Estimate(1.0, 0.98, 1, 200)), "ends, after": vars(after), **scores}

    ended, quantized = answer_claims(extra(Estimate(0.1, 0.05, 0.2, 200), 48))
    assert ended.verdict == "held" and quantized.verdict == "held"
    ended, quantized = answer_claims(extra(Estimate(0.99, 0.97, 1, 200), 40))
    assert ended.verdict == "did not hold" and quantized.verdict == "did not hold"


def test_the_right_answer_of_a_flipped_pair_is_the_one_labelled_rejected():
    assert right_text(Example([1], [[2], [3]], extra={"flipped": True}, texts=["wrong", "right"])) == "right"
    assert right_text(Example([1], [[2], [3]], texts=["chosen", "rejected"])) == "chosen"


def test_the_whole_preset_on_a_tiny_model(tiny, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(90))
    flags = ["--stage", "sweep", "--preset", "report", "--model", str(tiny), "--train", str(tmp_path / "pairs.jsonl")]
    flags += [
        "--out",
        str(tmp_path),
        "--name",
        "r",
        "--lr",
        "1e-3",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--eval-every",
        "2",
    ]
    flags += ["--samples", "4", "--device", "cpu"]
    assert main(flags) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    for part in ("## Table 1", "## Table 2", "## Table 3", "## Figure 2", "figures/figure-2.png", "**held**"):
        assert part in text
    names = {path.parent.name for path in (tmp_path / "r").glob("*/test.json")}
    assert {"defaults", "lr=0.0005", "lr=0.003", "lr=0.005", "beta=0.05", "beta=0.1", "beta=0.5"} <= names
    assert {"eps=0.0", "eps=0.05", "eps=0.25"} <= names and len(names) == 13
    sizes = sorted(int(name.removeprefix("pairs=")) for name in names if name.startswith("pairs="))
    files = [(tmp_path / "r" / "data" / f"pairs-{size}.jsonl").read_text().splitlines() for size in sizes]
    assert len(sizes) == 3 and set(files[0]) < set(files[1]) < set(files[2])
    assert len(json.loads((tmp_path / "r" / "defaults" / "test.json").read_text())["checkpoints"]) >= 4
    assert (tmp_path / "r" / "figures" / "figure-2.png").stat().st_size > 10_000
    assert main(flags) == 0  # nothing is run again
    assert capsys.readouterr().out.count("[13/13]") == 3  # begun, done; then done
