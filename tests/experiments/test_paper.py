"""The preset makes every run of the report's tables; its verdicts from results by hand, each with a twin that turns it."""

from pathlib import Path

import torch
from rows import pair_rows

from experiments import paper
from experiments.paper import FORMATS, better, claims_about_answers, claims_about_settings
from experiments.ranking import Result
from metrics.intervals import Estimate
from runtime import flags
from runtime.files import read_json, write_jsonl
from runtime.settings import Dpo
from train import main

E = 200  # test pairs


def result(right, point=None, loss=0.0, rate=0.2, start=0.5, tuned=0.5):
    """A setting that gets a share `right` of the pairs right; `start`, `tuned`: the same by the models' likelihoods."""

    def first(share):
        return torch.arange(E) < share * E

    baselines = {"starting model": first(start).double(), "tuned model": first(tuned).double()}
    measures = {"flip rate": Estimate(rate, 0, 0.5, E)}
    name = ",".join(f"{key}={value}" for key, value in (point or {}).items()) or "defaults"
    return Result(name, point or {}, first(right)[None], baselines, measures, loss)


def answers(before=0.5, after=0.5, fp32=50.0, int8=50.0, nf4=50.0, fp4=50.0):
    """Shares of answers that end, each within 0.1, and BLEU in every format."""
    shares = {"before": before, "after": after}
    made = {label: {"ends": Estimate(share, share - 0.1, share + 0.1, 9)} for label, share in shares.items()}
    scores = zip(FORMATS, (fp32, int8, nf4, fp4), strict=True)
    return made | {name: {"BLEU": Estimate(value, 0, 99, 9)} for name, value in scores}


def verdicts(results, quarters=(0.5, 0.5)):
    """{the beginning of a claim: (verdict, what was measured)}."""
    made = claims_about_settings(Dpo(lr=1e-3, beta=0.3, eps=0.1), results, list(quarters))
    return {claim.split(" (")[0]: (verdict, here) for claim, here, verdict in made}


def test_one_setting_is_better_than_another_only_beyond_chance():
    good, bad = result(0.9), result(0.5)
    assert better(good, bad) == "held" and better(bad, good) == "did not hold" and better(good, good) == "cannot be told"


def test_later_checkpoints_are_better_only_beyond_both_intervals():
    """Of 200 pairs 60% have the interval 53.1 to 66.5%, 80% that of 73.9 to 85.0%, 65% that of 58.2 to 71.3%."""

    def verdict(first, last):
        return verdicts([result(0.5)], (first, 0.1, 0.9, last))["Later checkpoints are better"][0]

    assert verdict(0.6, 0.8) == "held" and verdict(0.8, 0.6) == "did not hold"
    assert verdict(0.6, 0.65) == verdict(0.65, 0.6) == "cannot be told"


def test_a_value_is_the_best_of_its_grid_if_no_other_is_significantly_better():
    claim = "lr = 1e-5, here the recipe's is the best of its grid."
    default, worse, better = result(0.7), result(0.6, {"lr": 2e-3}), result(0.9, {"lr": 3e-3})
    verdict, here = verdicts([default, worse])[claim]
    assert verdict == "held" and "best 0.001" in here
    verdict, here = verdicts([better, default, worse])[claim]
    assert verdict == "did not hold" and "0.001: 70.0%; best 0.003: 90.0%" in here


def test_noise_is_assumed_with_the_best_eps():
    claim = "Assuming that labels are noisy helps"
    plain, robust = result(0.6, {"eps": 0.0}), result(0.9, {"eps": 0.2})
    verdict, here = verdicts([robust, result(0.8), plain])[claim]
    assert verdict == "held" and "eps 0: 60.0%; eps 0.2: 90.0%" in here
    assert verdicts([result(0.8), result(0.8, {"eps": 0.0})])[claim][0] == "cannot be told"
    assert claim not in verdicts([robust, result(0.8)])  # without an eps of 0 there is nothing to compare with


def test_answers_end_less_often_only_beyond_both_intervals():
    for before, after, verdict in ((0.9, 0.6, "held"), (0.9, 0.75, "did not hold"), (0.6, 0.9, "did not hold")):
        assert claims_about_answers(answers(before, after))[0][2] == verdict


def test_every_format_may_lose_5_percent():
    for scores, verdict in (
        (dict(int8=47.5, nf4=47.5, fp4=47.5), "held"),
        (dict(nf4=47.4), "did not hold"),
        (dict(fp4=47.4), "did not hold"),
        (dict(fp32=40.0, int8=50.0), "held"),
    ):
        assert claims_about_answers(answers(**scores))[1][2] == verdict


def test_all_claims_of_a_sweep():
    default = result(0.8, start=0.5, tuned=0.7)
    small, smaller = result(0.75, {"pairs": 50}), result(0.6, {"pairs": 20}, loss=-9.0)
    made = verdicts([default, small, smaller])
    assert made["Tuning raises the accuracy"][0] == "held"
    assert made["A larger mixture is better"] == ("held", "20 pairs 60.0%, all 80.0%")
    assert made["The lowest robust test loss names the best run"][0] == "did not hold"
    turned = verdicts([result(0.8, loss=-10.0, start=0.7, tuned=0.5), small, result(0.8, {"pairs": 20})])
    assert turned["Tuning raises the accuracy"][0] == "did not hold"
    assert turned["A larger mixture is better"][0] == "cannot be told"
    assert turned["The lowest robust test loss names the best run"][0] == "held"
    assert "A larger mixture is better" not in verdicts([default])


def command(tiny, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(45))
    words = ["--stage", "sweep", "--preset", "report", "--model", str(tiny), "--train", str(tmp_path / "pairs.jsonl")]
    words += ["--out", str(tmp_path), "--name", "r", "--samples", "4", "--device", "cpu"]
    return [*words, *"--lr 1e-3 --max-steps 4 --batch-size 8 --eval-every 4".split()]


def test_the_preset_plans_every_run_of_the_reports_tables(tiny, tmp_path):
    runs = {run.name: run for run in paper.make_runs(flags.parse(command(tiny, tmp_path)).settings, tmp_path / "r")}
    sizes = [name for name in runs if name.startswith("pairs=")]
    grids = {"lr=0.0005", "lr=0.003", "lr=0.005", "beta=0.05", "beta=0.1", "beta=0.5", "eps=0.0", "eps=0.05", "eps=0.25"}
    assert runs.keys() == {"defaults", *sizes, *grids} and len(sizes) == 3
    files = [set(Path(runs[name].settings.train).read_text().splitlines()) for name in (*sizes, "defaults")]
    assert files[0] < files[1] < files[2] < files[3]
    assert {name for name, run in runs.items() if run.quarters} == {"defaults", *sizes}


def test_the_whole_preset_on_a_tiny_model(tiny, tmp_path, capsys, monkeypatch):
    """With fewer sizes and values, four runs in all."""
    monkeypatch.setattr(paper, "PARTS", (20, 54))
    monkeypatch.setattr(paper, "GRID", {"lr": (1, 3), "beta": (0.3,), "eps": (0.0, 0.1)})
    assert main(command(tiny, tmp_path)) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    for part in ("## Table 1", "## Table 2", "## Table 3", "## Figure 2", "figures/figure-2.png", "**held**"):
        assert part in text
    names = {path.parent.name for path in (tmp_path / "r").glob("*/tested.json")}
    assert {"defaults", "lr=0.003", "eps=0.0"} < names and len(names) == 4
    assert len(read_json(tmp_path / "r" / "defaults" / "tested.json")["quarters"]) == 4
    measured = read_json(tmp_path / "r" / "formats" / "eval.json")
    assert [one["model"] for one in measured["results"]] == ["fp32", "int8", "nf4", "fp4"]
    bleu = measured["results"][1]["answers"]["BLEU"]["value"]
    assert measured["rows"] == 4 and f"int8 {bleu:.1f} [" in text
    assert (tmp_path / "r" / "figures" / "figure-2.png").stat().st_size > 10_000
    assert main(command(tiny, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.count("[4/4]") == 3 and printed.count("Reference answers") == 2  # nor is anything measured again
