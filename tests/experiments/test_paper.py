"""The preset makes every run of the report's tables; its verdicts from results by hand, each with a twin that turns it."""

from pathlib import Path

import pytest
import torch
from rows import pair_rows

from experiments import paper
from experiments.paper import (
    FORMATS,
    claim_about_labels,
    claims_about_answers,
    claims_about_settings,
    claims_about_training,
)
from experiments.ranking import Result
from metrics.intervals import Estimate
from runtime import flags
from runtime.files import read_json, write_jsonl
from runtime.runs import read_metrics
from runtime.settings import Dpo
from train import main

E = 200  # test pairs


def right(*shares):
    """Which test pairs are ordered correctly, [seeds, E]: with each seed the first of them, so many."""
    return torch.stack([torch.arange(E) < share * E for share in shares])


def result(share, point=None, loss=0.0, start=0.5, tuned=0.5, quarters=None):
    """A setting that gets a share of the pairs right with its only seed (or a tuple of shares, one for each seed); `start`,
    `tuned`: the same by the models' likelihoods."""
    shares = share if isinstance(share, tuple) else (share,)
    baselines = {"starting model": right(start)[0].double(), "tuned model": right(tuned)[0].double()}
    name = ",".join(f"{key}={value}" for key, value in (point or {}).items()) or "defaults"
    return Result(name, point or {}, right(*shares), baselines, {}, loss, validation=max(shares), quarters=quarters)


def answers(before=0.5, after=0.5, fp32=50.0, int8=50.0, nf4=50.0, fp4=50.0):
    """Shares of answers that end, each within 0.1, and BLEU in every format, each within 1."""
    shares = {"before": before, "after": after}
    made = {label: {"ends": Estimate(share, share - 0.1, share + 0.1, 9)} for label, share in shares.items()}
    scores = zip(FORMATS, (fp32, int8, nf4, fp4), strict=True)
    return made | {name: {"BLEU": Estimate(value, value - 1, value + 1, 9)} for name, value in scores}


def verdicts(*results):
    """{what was said, up to its full stop or bracket: (verdict, what was measured)}."""
    made = claims_about_settings(Dpo(lr=1e-3, beta=0.3, eps=0.1), list(results))
    return {claim.said.split(" (")[0].rstrip("."): (claim.verdict, claim.here) for claim in made}


def test_the_best_of_a_grid_must_be_better_than_each_of_the_others():
    """Of 200 pairs, 140 and 120 differ beyond chance (McNemar: 2/2^20), 140 and 138 do not (2/2^2)."""
    said = "beta = 0.3 is best"
    default, worse, near, best = (result(share, {"beta": share}) for share in (0.7, 0.6, 0.69, 0.9))
    default.name, default.point = "defaults", {}
    assert verdicts(default, worse)[said] == (
        "held",
        "defaults 70.0% (70.0 to 70.0); beta=0.6 60.0% (60.0 to 60.0)",
    )
    assert verdicts(default, worse, near)[said][0] == "cannot be told"
    assert verdicts(default, worse, near, best)[said][0] == "did not hold"
    assert said not in verdicts(default)


def test_seeds_that_overlap_leave_a_difference_in_doubt():
    """All of one setting's seeds must beat all of the other's: 70 and 80% against 50 and 75% do not."""
    said, point = "The model of the 40,000 is better than that of the 20,000", {"mixture": 20}
    assert verdicts(result((0.7, 0.8)), result((0.5, 0.75), point))[said][0] == "cannot be told"
    assert verdicts(result((0.7, 0.8)), result((0.5, 0.65), point))[said][0] == "held"
    assert verdicts(result((0.5, 0.65)), result((0.7, 0.8), point))[said][0] == "did not hold"


def test_ten_times_the_rate_is_no_rival_in_the_grid_but_has_its_own_claim():
    made = verdicts(result(0.7), result(0.6, {"lr": 2e-3}), result(0.1, {"lr": 1e-2}))
    assert made["lr = 1e-5, here the recipe's, is best"][0] == "held"
    assert "lr=0.002" in made["lr = 1e-5, here the recipe's, is best"][1]
    assert made["A learning rate of 1e-4, here ten times the recipe's, is too high"][0] == "held"


def test_that_two_settings_are_equal_is_never_held():
    said = "With beta = 0.1 the model is as good"
    for other, verdict in ((0.7, "cannot be told"), (0.5, "did not hold"), (0.9, "did not hold")):
        assert verdicts(result(0.7), result(other, {"beta": 0.1}))[said][0] == verdict


def test_the_lowest_loss_names_the_best_run_only_if_it_beats_every_other():
    said = "The lowest test loss names the best run"
    assert verdicts(result(0.7), result(0.6, {"eps": 0.25}, loss=-9.0))[said][0] == "did not hold"
    assert verdicts(result(0.7), result(0.9, {"eps": 0.25}, loss=-9.0))[said][0] == "held"
    assert verdicts(result(0.7), result(0.7, {"eps": 0.25}, loss=-9.0))[said][0] == "cannot be told"


def test_noise_is_assumed_with_the_eps_that_evaluation_rows_pick():
    said = "Assuming that labels are noisy helps"
    picked, plain = result(0.9, {"eps": 0.25}), result(0.6, {"eps": 0.0})
    verdict, here = verdicts(picked, result(0.8), plain)[said]
    assert verdict == "held" and "eps=0.0 60.0%" in here and "eps=0.25 90.0%" in here
    assert verdicts(result(0.8), result(0.8, {"eps": 0.0}))[said][0] == "cannot be told"
    assert said not in verdicts(picked, result(0.8))  # without an eps of 0 there is nothing to compare with


def test_tuning_is_judged_by_what_the_models_find_likelier():
    said = "Tuning raises the accuracy"
    assert verdicts(result(0.8, start=0.5, tuned=0.7))[said][0] == "held"
    assert verdicts(result(0.8, start=0.7, tuned=0.5))[said][0] == "did not hold"


def test_the_course_of_the_training():
    """Later is better if the end beats the first quarter; it overfits if any quarter beats the end."""

    def judged(*shares):
        later, overfits = claims_about_training(result(0.5, quarters=torch.stack([right(share) for share in shares])))
        return later.verdict, overfits.verdict

    assert judged(0.5, 0.6, 0.7, 0.8) == ("held", "did not hold")
    assert judged(0.5, 0.9, 0.9, 0.8) == ("held", "held")
    assert judged(0.8, 0.8, 0.8, 0.8) == ("cannot be told", "cannot be told")
    assert judged(0.8, 0.7, 0.6, 0.5) == ("did not hold", "held")


def test_one_flipped_label_refutes_that_the_answer_of_chatgpt_is_always_worse():
    assert claim_about_labels([False, True, False])[0].verdict == "did not hold"
    assert claim_about_labels([False, False])[0].verdict == "held" and claim_about_labels([]) == []


def test_answers_end_less_often_only_beyond_both_intervals():
    for before, after, verdict in ((0.9, 0.6, "held"), (0.9, 0.75, "did not hold"), (0.5, 0.4, "cannot be told")):
        assert claims_about_answers(answers(before, after))[0].verdict == verdict


def test_every_format_may_lose_5_percent():
    for scores, verdict in (
        (dict(int8=49, nf4=49, fp4=49), "held"),
        (dict(nf4=47.5), "cannot be told"),
        (dict(fp4=46), "did not hold"),
        (dict(fp32=40.0, int8=50.0), "held"),
    ):
        assert claims_about_answers(answers(**scores))[1].verdict == verdict


def command(tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(45))
    words = ["--stage", "sweep", "--preset", "report", "--model", str(tiny), "--train", str(tmp_path / "pairs.jsonl")]
    words += ["--out", str(tmp_path), "--name", "r", "--samples", "4", "--device", "cpu"]
    return [*words, *"--lr 1e-3 --max-steps 4 --batch-size 8 --eval-every 4".split()]


def test_the_preset_plans_every_run_of_the_reports_tables(tiny, tmp_path):
    runs = {run.name: run for run in paper.make_runs(flags.parse(command(tiny, tmp_path)).settings, tmp_path / "r")}
    rates = {"lr=0.0005", "lr=0.003", "lr=0.005", "lr=0.01"}
    settings = {"defaults", *(f"mixture={part}" for part in (20, 30, 54)), *rates}
    settings |= {"beta=0.05", "beta=0.1", "beta=0.5", "eps=0.0", "eps=0.05", "eps=0.25"}
    assert runs.keys() == {f"{name},seed={seed}" for name in settings for seed in (0, 1, 2)}
    assert {run.settings.epochs for run in runs.values()} == {3}

    def rows(name):
        return Path(runs[name].settings.train).read_text().splitlines()

    samples = [rows(name) for name in runs]
    assert {len(lines) for lines in samples} == {len(set(samples[0]))}  # equally many in every run, none twice
    assert rows("eps=0.0,seed=1") == rows("defaults,seed=1") != rows("defaults,seed=2")
    kept = {name for name, run in runs.items() if run.quarters}
    assert kept == {f"{name},seed={seed}" for name in ("defaults", "beta=0.1", "mixture=20") for seed in (0, 1, 2)}


@pytest.mark.slow
def test_the_whole_preset_on_a_tiny_model(tiny, tmp_path, capsys, monkeypatch):
    """With fewer mixtures and values, four runs in all."""
    monkeypatch.setattr(paper, "PARTS", (20, 40))
    monkeypatch.setattr(paper, "GRID", {"lr": (1, 3), "beta": (0.3,), "eps": (0.0, 0.1)})
    flags = [*command(tiny, tmp_path), "--seeds", "1"]
    assert main(flags) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    for part in ("## Table 1", "## Table 2", "## Table 3", "## Figure 2", "figures/figure-2.png", "**cannot be told**"):
        assert part in text
    names = {path.parent.name for path in (tmp_path / "r").glob("*/tested.json")}
    assert names == {"defaults", "mixture=20", "lr=0.003", "eps=0.0"}
    record = read_json(tmp_path / "r" / "defaults" / "tested.json")
    assert [len(quarter) for quarter in record["quarters"]] == [len(record["margin"])] * 4
    evaluated = [row["eval_rewards/accuracies"] for row in read_metrics(tmp_path / "r" / "defaults") if "eval_loss" in row]
    assert record["validation"] == max(evaluated)
    measured = read_json(tmp_path / "r" / "formats" / "eval.json")
    assert [one["model"] for one in measured["results"]] == ["fp32", "int8", "nf4", "fp4"]
    bleu = measured["results"][1]["answers"]["BLEU"]["value"]
    assert measured["rows"] == 4 and f"int8 {bleu:.1f} [" in text
    assert (tmp_path / "r" / "figures" / "figure-2.png").stat().st_size > 10_000
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("[4/4]") == 3 and printed.count("Reference answers") == 2  # nor is anything measured again
