"""Sweeps: which runs there are; that they share rows and reference; that finished ones are skipped, failed ones recorded."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rows import pair_rows

from experiments.ranking import Run, better, collect, conclusions, point_name, summarise, table
from experiments.sweep import make_points, parse_grid
from runtime.files import InputError, read_json, write_json, write_jsonl
from runtime.settings import Dpo
from train import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tiny, tmp_path):
    """command(*flags) -> the flags of a sweep over the tiny model and 60 pairs."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))

    def make(*flags):
        fixed = ["--stage", "sweep", "--model", tiny, "--train", tmp_path / "pairs.jsonl", "--out", tmp_path, "--name", "s"]
        fixed += ["--lr", "1e-3", "--epochs", "1", "--batch-size", "8", "--eval-every", "3", "--device", "cpu"]
        return [str(part) for part in (*fixed, *flags)]

    return make


def settings_of(sweep):
    """{setting: the cells of its row} of sweep.md, in the order in which the evaluation rows put them."""
    return {cells[0]: cells for cells in cells_of((sweep / "sweep.md").read_text())[1:]}


def cells_of(text):
    """The cells of a Markdown table, line by line, without the rule under its header."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# ------------------------------------------------------------------------------------------------------------- the plan


def test_a_grid_is_read_with_the_flags_own_types():
    grid = parse_grid(["beta=0.1,0.3", "--batch-size=8,16", "loss=robust", "train=a.jsonl,b.jsonl"])
    assert grid == {"beta": [0.1, 0.3], "batch_size": [8, 16], "loss": ["robust"], "train": ["a.jsonl", "b.jsonl"]}
    assert isinstance(grid["batch_size"][0], int)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nonsense=1"], "'nonsense' is no flag"),
        (["seed=1,2"], "'seed' is no flag"),
        (["to=nf4"], "'to' is no flag"),
        (["max_length=9"], "'max_length' is no flag"),
        (["model=a,b"], "'model' is no flag"),
        (["beta"], "give each flag once"),
        (["beta="], "give each flag once"),
        (["beta=0.1,0.1"], "give each flag once"),
        (["beta=0.1", "beta=0.2"], "give each flag once"),
        (["beta=high"], "--beta: invalid float value: .high."),
        (["batch_size=1.5"], "--batch-size: invalid int value: .1.5."),
        (["gradient_checkpointing=1"], "--gradient-checkpointing: "),
        (["schedule=cosine,wavy"], "--schedule: invalid choice: .wavy."),
    ],
)
def test_a_grid_that_makes_no_sense(texts, message):
    with pytest.raises(InputError, match=message):
        parse_grid(texts)


def test_one_flag_at_a_time_differs_from_the_defaults():
    grid = {"beta": [0.1, 0.3], "eps": [0.0, 0.1]}
    assert make_points(grid, Dpo(beta=0.3, eps=0.1)) == [{}, {"beta": 0.1}, {"eps": 0.0}]


def test_names_are_fit_for_directories():
    assert point_name({}) == "defaults" and point_name({"beta": 0.1, "eps": 0.0}) == "beta=0.1,eps=0.0"
    assert point_name({"train": "some/where/a b.jsonl"}) == "train=a_b" and "/" not in point_name({"model": "a/b"})


# ------------------------------------------------------------------------------------------------------------- the runs


@pytest.mark.slow
def test_a_sweep_ranks_its_runs_and_skips_them_the_second_time(command, tmp_path, capsys):
    flags = command("--grid", "beta=0.1,0.3", "--seeds", "2")
    assert main(flags) == 0
    rows = settings_of(tmp_path / "s")
    assert set(rows) == {"beta=0.1", "defaults (beta=0.3)"}
    evaluated = [float(cells[1].rstrip("%")) for cells in rows.values()]
    assert evaluated == sorted(evaluated, reverse=True)
    runs = [path.parent for path in (tmp_path / "s").glob("*/tested.json")]
    assert len(runs) == 4 and not any((run / "checkpoints").exists() for run in runs)
    assert (tmp_path / "s" / "figures" / "curves.png").stat().st_size > 0
    assert "not comparable" in (tmp_path / "s" / "sweep.md").read_text()
    tables = list((tmp_path / "s" / "reference").iterdir())
    assert len(tables) == 3  # of the training, evaluation and test rows, for all four runs

    before = {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir()}
    assert main(flags) == 0
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir()} == before
    capsys.readouterr()
    assert main([*flags, "--lr", "1e-4"]) == 2
    assert "was started with lr = 0.001, now --lr 0.0001" in capsys.readouterr().err


def test_no_question_is_on_two_sides(command, tmp_path):
    assert main(command("--grid", "beta=0.1,0.3", "--max-steps", "1")) == 0
    sides = [
        {json.loads(line)["prompt"] for line in (tmp_path / "s" / "data" / name).read_text().splitlines()}
        for name in ("test.jsonl", "pairs-train.jsonl", "pairs-eval.jsonl")
    ]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 60


def test_a_run_that_fails_is_recorded_and_the_others_go_on(command, tmp_path, capsys):
    assert main(command("--grid", "lr=1e-3,1e30", "--clip", "1e30")) == 2
    assert list(settings_of(tmp_path / "s")) == ["defaults"]
    assert "- lr=1e+30 failed: InputError: " in (tmp_path / "s" / "sweep.md").read_text()
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "Traceback" not in printed.out + printed.err
    assert "Traceback" in (tmp_path / "s" / "lr=1e+30.log").read_text()


@pytest.mark.slow
def test_data_sets_are_compared_on_given_test_rows(command, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", pair_rows(60)[:30])
    write_jsonl(tmp_path / "b.jsonl", pair_rows(60)[10:50])
    write_jsonl(tmp_path / "test.jsonl", pair_rows(60)[50:])
    flags = command("--grid", f"train={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "--max-steps", "1")
    del flags[flags.index("--train") : flags.index("--train") + 2]
    assert main(flags) == 2 and "give it with --data FILE.jsonl" in capsys.readouterr().err
    assert main([*flags, "--data", str(tmp_path / "pairs.jsonl")]) == 2
    assert "ask a question of the training rows" in capsys.readouterr().err
    assert main([*flags, "--data", str(tmp_path / "test.jsonl")]) == 0
    assert set(settings_of(tmp_path / "s")) == {"defaults", "train=b"}


def test_values_of_a_grid_are_checked_as_those_of_flags_are(command, capsys):
    assert main(command("--grid", "beta=-1")) == 2 and "--beta -1.0: must be positive" in capsys.readouterr().err
    assert main(command("--grid", "eps=0.6")) == 2 and "--eps 0.6: is a flip rate, in [0, 0.5)" in capsys.readouterr().err


def test_a_dry_run_times_a_step_of_each_setting_and_adds_up(command, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(command("--grid", "beta=0.3,0.1", "--seeds", "2", "--dry-run")) == 0
    printed = capsys.readouterr().out
    each = re.findall(r"  (defaults|beta=0.1): 2 x [\d.]+ minutes, [\d.]+ s for the first step\n", printed)
    assert each == ["defaults", "beta=0.1"] and "4 runs and their references: 0." in printed
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        main(command("--preset", "report", "--dry-run"))
    assert "--dry-run does not go with --preset report" in capsys.readouterr().err


def test_a_directory_that_holds_a_run_of_another_stage_is_refused(command, tiny, tmp_path, capsys):
    flags = ["--stage", "quantize", "--model", str(tiny), "--to", "nf4", "--out", str(tmp_path), "--name", "s"]
    assert main([*flags, "--device", "cpu"]) == 0
    before = sorted((tmp_path / "s").iterdir())
    assert main(command("--grid", "beta=0.1,0.3")) == 2
    assert "s holds a run of --stage quantize, not a sweep; give this one another --name" in capsys.readouterr().err
    assert sorted((tmp_path / "s").iterdir()) == before


@pytest.mark.slow
def test_ctrl_c_in_a_run_saves_it_and_the_same_command_goes_on(command, tmp_path):
    flags = command("--grid", "beta=0.1,0.3", "--epochs", "5", "--eval-every", "20")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "s" / "defaults" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and b"the same command goes on" in printed
    assert not (tmp_path / "s" / "defaults" / "tested.json").exists()
    assert main(flags) == 0 and len(settings_of(tmp_path / "s")) == 2, shlex.join(flags)


# ----------------------------------------------------------------------------------------------------------- the ranking


def cannot_tell(a, b):
    return better(a, b) == "cannot be told"


def test_mcnemar_by_hand():
    """20 pairs that both have right; then 8 that only a has right and 1 that only b has. Of 2^9 splits 1 + 9 are as uneven
    on one side: p = 20/512 = 0.039. With 7 to 1 it is 2 (1 + 8)/256 = 0.07, though one side alone is below 5%. With 4 to 0
    it is 2/16 = 0.125."""
    both = [1] * 20
    a, b = torch.tensor([both + [1] * 8 + [0]]).bool(), torch.tensor([both + [0] * 8 + [1]]).bool()
    assert not cannot_tell(a, b) and not cannot_tell(b, a)
    assert cannot_tell(a[:, 1 + 20 :], b[:, 1 + 20 :]) and cannot_tell(b[:, 1 + 20 :], a[:, 1 + 20 :])
    assert cannot_tell(a[:, :24], b[:, :24]) and cannot_tell(a, a)
    assert cannot_tell(a[:, :24].repeat(3, 1), b[:, :24].repeat(3, 1))  # three seeds do not make a pair three pairs
    assert not cannot_tell(a.repeat(3, 1), b.repeat(3, 1))
    assert cannot_tell(torch.cat((a, b)), b)  # one seed of the first is as bad as the second
    many = torch.arange(4000) % 2 == 0
    assert cannot_tell(many[None], ~many[None])  # 2,000 against 2,000: whole numbers that no float holds


@pytest.mark.slow
def test_losses_are_compared_each_with_the_eps_that_it_has(command, tmp_path):
    assert main(command("--grid", "loss=robust,sigmoid,ipo", "--max-steps", "1")) == 0
    runs = [read_json(tmp_path / "s" / name / "run.json") for name in ("defaults", "loss=sigmoid", "loss=ipo")]
    losses = [(run["settings"]["loss"], run["settings"]["eps"]) for run in runs]
    assert losses == [("robust", 0.1), ("sigmoid", None), ("ipo", None)]


@pytest.mark.slow
def test_other_rows_under_the_same_name_are_an_error(command, tmp_path, capsys):
    assert main(command("--grid", "beta=0.1,0.3", "--max-steps", "1")) == 0
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(80))
    assert main(command("--grid", "beta=0.1,0.3,0.5", "--max-steps", "1")) == 2
    assert "holds other rows than this call gives" in capsys.readouterr().err


def write_run(directory, base, seed, margin, point=None, **changes):
    """The record of one run on four test pairs: margins, and what the labels, lengths and the starting model say."""
    run = Run(f"{point or 'd'}-{seed}", point or {}, replace(base, out=str(directory)))
    record = {
        "margin": margin,
        "reference": [1.0, 1.0, -1.0, 0.0],
        "longer": [1, 0, -1, 1],
        "flipped": [False, True, False, False],
        "own loss": -1.0 - seed,
        "validation": 0.5,
    }
    write_json(run.tested, record | changes)
    return run


def test_measures_of_a_setting_by_hand(tmp_path):
    """Two seeds, four pairs of which the second is labelled the wrong way round."""
    base = Dpo(eps=0.25, beta=0.5)
    margins = [2.0, 4.0, 0.0, -3.0], [1.0, -2.0, 1.0, 3.0]
    made = summarise("x", [write_run(tmp_path, base, seed, margin) for seed, margin in enumerate(margins)], base)
    assert made.right.tolist() == [[True, False, False, False], [True, True, True, True]]
    assert made.measures["reward accuracy"].value == pytest.approx((2 + 3) / 8)
    assert made.measures["clean accuracy"].value == 5 / 8
    assert made.measures["debiased accuracy"].value == pytest.approx((5 / 8 - 0.25) / 0.5)
    assert {name: estimate.n for name, estimate in made.measures.items()} == dict.fromkeys(made.measures, 4)
    assert made.measures["margin"].value == pytest.approx((3 + 2 + 1 + 0) / 8)
    losses = [math.log1p(math.exp(-0.5 * m)) for row in margins for m in row]
    assert made.measures["DPO loss"].value == pytest.approx(sum(losses) / 8)
    baselines = {name: credit.tolist() for name, credit in made.baselines.items()}
    assert baselines["longer answer"] == [1, 0.5, 0, 1] and baselines["starting model"] == [1, 0, 0, 0.5]
    assert baselines["tuned model"] == [1, 0, 0, 0]  # the starting model's 1, 1, -1, 0 and the first seed's margins
    assert made.own_loss == -1.5


def test_evaluation_rows_pick_a_setting_and_test_pairs_judge_it(tmp_path):
    base = Dpo(eps=0.25, beta=0.5)
    one = write_run(tmp_path, base, 0, [1.0, -1.0, 1.0, 1.0], {"lr": 1}, validation=0.6, **{"own loss": -99.0})
    two = write_run(tmp_path, base, 0, [-1.0, 1.0, -1.0, 1.0], {"lr": 2}, validation=0.9)
    again = write_run(tmp_path, base, 1, [1.0, -1.0, 1.0, -1.0], {"lr": 2}, validation=0.7)
    unfinished = Run("unfinished", {"lr": 3}, two.settings)
    results = collect([one, two, again, unfinished], base)
    assert [(r.name, len(r.right), r.validation) for r in results] == [("lr=2", 2, 0.8), ("lr=1", 1, 0.6)]
    picked, other = cells_of(table(results, base))[1:]
    assert picked[:3] == ["lr=2", "80.0%", "picked"] and picked[4] == "25.0 to 75.0%"
    assert other[:3] == ["lr=1", "60.0%", "="] and other[4] == "-"  # four pairs show no difference


def test_a_setting_can_be_better_than_the_one_that_was_picked(tmp_path):
    base, known = Dpo(eps=0.25), dict(reference=[0.0] * 9, longer=[0] * 9, flipped=[False] * 9)
    write = dict(known, validation=0.9)
    runs = [
        write_run(tmp_path, base, 0, [-1.0] * 9, {}, **write),
        write_run(tmp_path, base, 0, [1.0] * 9, {"lr": 2}, **known),
    ]
    results = collect(runs, base)
    assert cells_of(table(results, base))[2][2] == "better"
    assert "better: lr=2 (=" in conclusions(results)[0]


def test_without_known_labels_there_is_no_clean_accuracy(tmp_path):
    base = Dpo(eps=None, beta=0.5)
    made = summarise("x", [write_run(tmp_path, base, 0, [0.0] * 4, flipped=None)], base)
    assert not {"clean accuracy", "flip rate"} & set(made.measures)  # nor a flip rate of margins that are all 0
    assert made.measures["debiased accuracy"].value == made.measures["reward accuracy"].value == 0
