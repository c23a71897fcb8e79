"""Where a value comes from, what an earlier run's settings mean, and what a stage may set."""

from dataclasses import asdict, fields

import pytest

import dpo
import quant
from model import Phi, PhiConfig
from runtime.files import InputError
from runtime.flags import default_name, from_stored, settle
from runtime.settings import DEMO, FORMATS, LINEAR_LAYERS, LOSSES, PRESETS, STAGES, TRAINING


def names(stages):
    return {f.name for stage in stages for f in fields(STAGES[stage])}


def test_the_number_of_settings():
    assert len(names(TRAINING)) <= 60 and len(names(STAGES)) <= 100


def test_names_are_those_of_quant_dpo_and_model():
    assert FORMATS == tuple(quant.FORMATS)
    assert LOSSES == {loss: "eps" in dpo.options(loss) for loss in dpo.LOSSES}
    config = PhiConfig(vocab_size=8, hidden_size=20, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    layers = [name.rpartition(".")[2] for name, _ in quant.linear_layers(Phi(config), quant.SKIP)]
    assert list(LINEAR_LAYERS) == layers


def test_a_flag_beats_the_preset_which_beats_the_demo_which_beats_the_default():
    command = settle("dpo", {"preset": "8gb", "lora": 4})
    got = {name: (getattr(command.settings, name), command.origins[name]) for name in ("lora", "max_length", "lr", "clip")}
    assert got == {"lora": (4, "flag"), "max_length": (1024, "preset"), "lr": (2e-3, "demo"), "clip": (1.0, "default")}


def test_without_the_demo_the_values_are_those_for_phi_2():
    assert settle("dpo", {"model": "x", "train": "y"}).settings.lr == 1e-5
    sft, report = settle("sft", {"model": "x"}).settings, settle("dpo", {"preset": "report", "train": "y"})
    assert (sft.epochs, sft.warmup_steps, sft.eval_every) == (1, 20, 200)
    assert report.settings.model == "rhysjones/phi-2-orange-v2" and report.origins["model"] == "preset"
    assert "demo" not in report.origins.values()


def test_every_layer_names_settings_that_exist():
    for stage, layer in DEMO.items():
        assert layer.keys() <= names([stage])
    for preset in PRESETS.values():
        assert preset.keys() <= names(["dpo"])


def test_another_loss_drops_the_eps_that_belongs_to_the_robust_one():
    assert settle("dpo", {"loss": "sigmoid"}).settings.eps is None
    assert settle("dpo", {"loss": "robust"}).settings.eps == 0.2
    assert settle("dpo", {"loss": "conservative", "eps": 0.3}).settings.eps == 0.3


def test_default_names():
    assert default_name(settle("dpo", {"model": "a/b/", "lora": 8, "base": "nf4"}).settings) == "b-dpo-lora-nf4"
    assert default_name(settle("quantize", {"model": "out/x", "to": "nf4-double"}).settings) == "x-nf4-double"
    assert default_name(settle("eval", {"model": ["out/x", "y"]}).settings) == "x-eval"
    assert default_name(settle("sweep", {"preset": "report"}).settings) == "demo-report"
    assert default_name(settle("qat", {"to": "nf2"}).settings) == "demo-qat-nf2"


def stored(**changes):
    return {"stage": "dpo", "settings": asdict(settle("dpo", {"model": "x", "train": "y"}).settings) | changes}


def test_stored_settings_come_back():
    assert from_stored(stored(lr=3e-4), "run.json") == settle("dpo", {"model": "x", "train": "y", "lr": 3e-4}).settings
    by_hand = from_stored(stored(beta=1, lora=4, lora_targets="q_proj, fc1"), "run.json")  # some programs write 1.0 as 1
    assert (by_hand.beta, by_hand.lora_targets) == (1, "q_proj, fc1")


def test_a_setting_that_is_unknown_or_missing_is_named():
    with pytest.raises(InputError, match="run.json: the setting sparkle = 3 is unknown to this version"):
        from_stored(stored(sparkle=3), "run.json")
    cut = stored()
    del cut["settings"]["beta"]
    with pytest.raises(InputError, match="run.json: the setting beta is missing"):
        from_stored(cut, "run.json")


@pytest.mark.parametrize(
    "broken", [{}, {"stage": "dpo"}, {"stage": "dance", "settings": {}}, {"settings": [1]}, {"config": 7}]
)
def test_a_foreign_run_json_is_refused_in_one_line(broken):
    with pytest.raises(InputError, match="x/run.json: names no stage and settings"):
        from_stored(broken, "x/run.json")
