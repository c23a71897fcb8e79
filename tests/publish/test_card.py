"""A model card says what was done, what came out and what is not known, and leaves alone what a person wrote."""

import json

import pytest
from huggingface_hub import ModelCard

from publish.card import card, code, hub_name, write_card
from runtime.files import write_json
from train import main

TRAINED = {"reward accuracy": 0.75, "longer answer wins": 0.5, "ties": 0.0}


def make_run(directory, stage="dpo", model="microsoft/phi-2", train="hub:ORG/pairs", **settings):
    """The files of a finished run that a card is made from."""
    directory.mkdir(parents=True)
    values = {"model": model, "train": train, "lr": 1e-5, "samples": 16, "lora": None, "lora_dropout": 0.0, **settings}
    write_json(directory / "run.json", {"stage": stage, "settings": values})
    write_json(directory / "config.json", {"model_type": "phi"})
    if stage in ("sft", "dpo"):
        write_json(directory / "ledger.json", {train: {"kept": 1900, "rows": 2000}})
        measured = {"before": {"metrics": TRAINED}, "after": {"metrics": TRAINED}}
        write_json(directory / "results.json", measured | {"best_step": 150})
    else:
        write_json(directory / "results.json", {"parent": str(model)})
    return directory


def test_the_hub_reads_base_data_licence_and_numbers(tmp_path):
    data = ModelCard(card(make_run(tmp_path / "my-dpo"))).data
    assert data.base_model == "microsoft/phi-2" and data.license == "mit" and data.datasets == ["ORG/pairs"]
    assert data.library_name == "transformers" and data.language == "en" and data.tags == ["phi", "dpo"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == TRAINED
    assert data.base_model_relation == "finetune" and data.pipeline_tag == "text-generation"


def test_a_chain_of_runs_is_told_from_its_start(tmp_path):
    sft = make_run(tmp_path / "my-sft", "sft", "rhysjones/phi-2-orange-v2", "/home/me/answers.jsonl")
    dpo = make_run(tmp_path / "my-dpo", "dpo", str(sft), system_prompt="Be brief.\n## Not a heading")
    made = card(make_run(tmp_path / "my-nf4", "quantize", str(dpo), None, to="nf4"))
    assert (
        "- It began as `rhysjones/phi-2-orange-v2`.\n- It was tuned on reference answers (`--stage sft`), `answers.jsonl`"
        in made
    )
    assert "`ORG/pairs`: 1,900 of 2,000 rows.\n- It was quantized (`--stage quantize --to nf4`)." in made
    assert made.index("- sft: lr 1e-05") < made.index("- dpo: lr 1e-05") and "lora_dropout" not in made
    assert "reward accuracy" in made and "- what `--stage quantize` changed: the numbers are from before" in made
    assert "    Be brief.\n    ## Not a heading" in made, "text of others is a block of code"
    assert "/home/me" not in made and str(tmp_path) not in made, "directories of this machine are nobody's business"
    assert "Its licence was not looked up" in made and ModelCard(made).data.license == "other"
    assert ModelCard(made).data.base_model_relation == "quantized"


@pytest.mark.parametrize(
    "file, text, shown",
    [
        ("adapter_config.json", "{}", 'AutoPeftModelForCausalLM.from_pretrained("x")'),
        ("x.gguf", "", "llama-cli -m x.gguf"),
        ("config.json", '{"quantization_config": {"quant_method": "blockwise"}}', "known to the program that made it alone"),
    ],
)
def test_how_to_use_it_depends_on_what_it_is(tmp_path, file, text, shown):
    run = make_run(tmp_path / "x")
    (run / file).write_text(text)
    assert shown in card(run)


def test_names_are_only_names():
    assert hub_name("hub:ORG/set") == hub_name("ORG/set") == "ORG/set"
    assert hub_name("tests/publish") is None, "a directory here"
    assert hub_name("/a/b") is None and hub_name("pairs.jsonl") is None and hub_name(None) is None
    assert code("a/b/`<script>\x1b[2J.jsonl") == "`script  x1b 2J.jsonl`"


def test_a_card_that_a_person_changed_stays(tmp_path, capfd):
    run = make_run(tmp_path / "x")
    write_card(run)
    first = (run / "README.md").read_text()
    (run / "results.json").write_text(json.dumps({**json.loads((run / "results.json").read_text()), "best_step": 7}))
    write_card(run)
    assert "step 7:" in (run / "README.md").read_text(), "our own is replaced"
    for mine in (first.replace("It began", "Once it began"), "# Mine\n", first.rpartition("<!--")[0], ""):
        (run / "README.md").write_text(mine)
        write_card(run)
        assert (run / "README.md").read_text() == mine
        assert "stays" in capfd.readouterr().out


def test_a_run_writes_its_card_and_overwrite_keeps_a_changed_one(tiny, tmp_path):
    command = f"--stage export --model {tiny} --to gguf-f16 --out {tmp_path} --name mine --overwrite".split()
    assert main(command) == 0
    card = tmp_path / "mine" / "README.md"
    assert "written as a GGUF file" in card.read_text() and "llama-cli -m mine.gguf" in card.read_text()
    card.write_text("# Mine")
    assert main(command) == 0 and card.read_text() == "# Mine"
