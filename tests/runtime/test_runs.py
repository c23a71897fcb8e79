"""What a run leaves on disk: which checkpoints stay, what a kill in the middle of writing leaves, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import checkpoints, tree

import train
from data import Example, Row
from lora import add_lora
from model import Phi
from prepare.rows import Inputs
from runtime.files import InputError, read_json, write_json
from runtime.flags import parse, settle
from runtime.runs import (
    checkpoint_directory,
    load_chat,
    locked,
    open_run,
    questions_seen,
    read_metrics,
    read_state,
    recording,
    resume_command,
    resumed_settings,
    steps_saved,
    stop_requests,
    stored_settings,
    training_run,
    tuned_from,
)

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------------------------ one run


def opened(settings, inputs=None) -> int:
    """Opens a run and leaves it as a stage that was done with it; returns the step to go on from."""
    with open_run(settings, inputs) as step:
        return step


def settings_in(directory, **changes):
    return settle("dpo", dict(model="x", train="y", out=str(directory), name="run", device="cpu") | changes).settings


def test_a_new_run_starts_at_step_0_and_notes_its_settings(tmp_path):
    settings = settings_in(tmp_path / "deep")
    (tmp_path / "deep" / "run").mkdir(parents=True)  # an empty directory holds no run
    assert opened(settings) == 0
    stored = read_json(tmp_path / "deep" / "run" / "run.json")
    assert (stored["stage"], stored["settings"]) == ("dpo", asdict(settings))
    assert stored["versions"]["torch"] == torch.__version__ and stored["versions"]["ranks"] == 1


def test_a_resumed_run_goes_on_from_its_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    opened(settings_in(tmp_path))
    first = tree(run)
    assert opened(settings_in(tmp_path, resume=True)) == 0  # it was killed before its first checkpoint
    checkpoints(run, 9, 10)
    assert opened(settings_in(tmp_path, resume=True)) == 10
    assert steps_saved(run) == [9, 10] and tree(run) == first


def test_what_is_not_a_run_is_neither_resumed_nor_deleted(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for changes, message in (
        ({"overwrite": True}, "has no run.json, so it is not a run of this program"),
        ({}, "has no run.json, so it is not a run of this program; give this one another --name"),
    ):
        with pytest.raises(InputError, match=message):
            opened(settings_in(tmp_path, **changes))
    with pytest.raises(InputError, match="no run to resume"):
        resumed(tmp_path)
    assert {k: v for k, v in tree(tmp_path).items() if "/" in k} == {"run/thesis.txt": b"years of work"}


def test_overwriting_leaves_nothing_of_the_earlier_run(tmp_path):
    opened(settings_in(tmp_path))
    checkpoints(tmp_path / "run", 3)
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a run. Continue it with --resume, delete it with --overwrite, or"):
        opened(settings_in(tmp_path, lr=0.5))
    assert opened(settings_in(tmp_path, lr=0.5, overwrite=True)) == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]
    assert read_json(tmp_path / "run" / "run.json")["settings"]["lr"] == 0.5


def test_an_overwritten_run_is_back_if_the_new_one_fails_before_it_has_saved_anything(tmp_path):
    opened(settings_in(tmp_path))
    checkpoints(tmp_path / "run", 3)
    (tmp_path / "run" / "model.safetensors").write_text("a month of training")
    before = tree(tmp_path / "run")
    with pytest.raises(InputError, match="no such row"), open_run(settings_in(tmp_path, lr=0.5, overwrite=True)):
        assert read_json(tmp_path / "run" / "run.json")["settings"]["lr"] == 0.5  # the new run has the name
        raise InputError("no such row")
    assert tree(tmp_path / "run") == before

    with pytest.raises(KeyboardInterrupt), open_run(settings_in(tmp_path, lr=0.5, overwrite=True)):
        checkpoints(tmp_path / "run", 7)
        raise KeyboardInterrupt
    assert steps_saved(tmp_path / "run") == [7]
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".run.lock"}


def test_a_stage_without_resume_that_fails_leaves_its_name_free(tmp_path):
    quantize = settle("quantize", {"model": "x", "to": "nf4", "out": str(tmp_path), "name": "run"}).settings
    with pytest.raises(OSError, match="disk"), open_run(quantize):
        raise OSError("the disk is full")
    assert not (tmp_path / "run").exists()

    opened(quantize)  # it was there before, and goes on: not this call's to delete
    with pytest.raises(OSError, match="disk"), open_run(SimpleNamespace(**asdict(quantize), stage="sweep", resume=True)):
        raise OSError("the disk is full")
    assert (tmp_path / "run" / "run.json").exists()
    shutil.rmtree(tmp_path / "run")

    opened(settings_in(tmp_path))  # a run in its first steps: no checkpoint, no results
    before = tree(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        opened(quantize)
    with pytest.raises(OSError, match="disk"), open_run(replace(quantize, overwrite=True)):
        raise OSError("the disk is full")
    assert tree(tmp_path / "run") == before


def test_a_run_that_was_killed_while_it_replaced_another_gives_way_to_it(tmp_path):
    """Killed between two file operations, before a checkpoint: the earlier run is back when the name is used again."""
    opened(settings_in(tmp_path))
    checkpoints(tmp_path / "run", 3)
    for killed in ("before the new run.json", "after it"):
        os.replace(tmp_path / "run", tmp_path / ".run.old")
        (tmp_path / "run").mkdir()
        if killed == "after it":
            write_json(tmp_path / "run" / "run.json", {})
        assert opened(settings_in(tmp_path, resume=True)) == 3


def test_what_a_failed_start_left_is_nobodys_run(tmp_path):
    (tmp_path / "run").mkdir()
    for leftover in (".run.json.tmp", "ledger.json", "held_out.jsonl"):
        (tmp_path / "run" / leftover).write_text("{}")
    assert opened(settings_in(tmp_path)) == 0 and (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("flag, file", [("model", "."), ("train", "held_out.jsonl"), ("eval", "deep/rows.jsonl")])
def test_a_run_does_not_overwrite_what_it_reads(tmp_path, flag, file):
    opened(settings_in(tmp_path))
    path = tmp_path / "run" / file
    path.parent.mkdir(exist_ok=True)
    if flag != "model":
        path.write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="--overwrite would delete .*, which this run reads; give it another --name"):
        opened(settings_in(tmp_path, overwrite=True, **{flag: str(path)}))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["under its adapters", "that it was tuned from", "that it was quantized from"])
def test_nor_the_model_that_is_read_with_another(tiny, tmp_path, kind):
    opened(settings_in(tmp_path))
    parent, model = tmp_path / "run", tmp_path / "model"
    Phi.from_pretrained(tiny).save_pretrained(parent)
    if kind == "under its adapters":
        add_lora(Phi.from_pretrained(parent), 2).save_pretrained(model)
    else:
        Phi.from_pretrained(tiny).save_pretrained(model)
        stage = "dpo" if "tuned" in kind else "quantize"
        write_json(model / "run.json", {"stage": stage, "settings": {"model": str(parent)}})
        write_json(model / "results.json", {"parent": str(parent)})
    evaluation = settle("eval", dict(model=[str(model)], data="x", out=str(tmp_path), name="run", overwrite=True)).settings
    before = tree(tmp_path)
    with pytest.raises(InputError, match="--overwrite would delete .*run, which this run reads; give it another --name"):
        opened(evaluation)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("second", [dict(resume=True), dict(overwrite=True), {}])
def test_one_process_at_a_time_writes_to_a_run(tmp_path, second):
    with open_run(settings_in(tmp_path)):
        before = tree(tmp_path)
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on .*, since 20.*Wait until it ends"):
            opened(settings_in(tmp_path, **second))
        assert tree(tmp_path) == before
    assert opened(settings_in(tmp_path, resume=True)) == 0


@pytest.mark.slow
def test_a_process_can_wait_for_the_one_that_holds_a_lock(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "demo")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with locked(tmp_path / "demo", wait=True):
        assert (tmp_path / "made").exists()  # by the child, before it let go
    assert child.wait() == 0


HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from runtime.runs import locked

path = Path(sys.argv[1])
with locked(path):
    print("held", flush=True)
    time.sleep(0.5)
    path.with_name("made").touch()
"""


# ----------------------------------------------------------------------------------------------------- resumed settings


def resumed(directory, *flags):
    return resumed_settings(parse(["--stage", "dpo", "--out", str(directory), "--name", "run", "--resume", *flags]))


def test_a_resumed_run_keeps_its_settings(tmp_path):
    opened(settings_in(tmp_path, beta=0.7, lora=8, overwrite=True))
    got = resumed(tmp_path)
    assert got == settings_in(tmp_path, beta=0.7, lora=8, resume=True)
    assert resumed(tmp_path, "--beta", "0.7") == got  # said again
    assert resumed(tmp_path, "--device", "cuda").device == "cuda"  # it may move to another machine
    shutil.move(tmp_path / "run", tmp_path / "moved" / "run")
    assert resumed(tmp_path / "moved").out == str(tmp_path / "moved")


def test_a_resumed_run_takes_no_other_settings(tmp_path):
    opened(settings_in(tmp_path))
    with pytest.raises(InputError, match="run was started with beta = 0.3, now --beta 0.7: a resumed run keeps"):
        resumed(tmp_path, "--beta", "0.7")
    with pytest.raises(InputError, match="is a run of --stage dpo; give that stage to resume it"):
        resumed_settings(parse(["--stage", "sft", "--out", str(tmp_path), "--name", "run", "--resume"]))
    with pytest.raises(InputError, match="nothing: there is no run to resume"):
        resumed(tmp_path, "--name", "nothing")


def test_only_a_run_that_can_go_on_is_said_to(tmp_path):
    opened(settle("quantize", {"model": "x", "to": "nf4", "out": str(tmp_path), "name": "run"}).settings)
    with pytest.raises(InputError, match="already holds a run. Delete it with --overwrite, or give this one another --name"):
        opened(settings_in(tmp_path))
    with pytest.raises(InputError, match="is a run of --stage quantize; it cannot be resumed; give another --name"):
        resumed(tmp_path)


def edit_run_json(directory, edit):
    stored = read_json(directory / "run" / "run.json")
    write_json(directory / "run" / "run.json", edit(stored))


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    """There run.json held the settings of all stages in one, under "config"."""
    opened(settings_in(tmp_path))
    edit_run_json(tmp_path, lambda stored: {"config": stored["settings"] | {"stage": "dpo", "reference": "cached"}})
    with pytest.raises(InputError, match="run.json: names no stage and settings, so it is .* an earlier version's"):
        resumed(tmp_path)


def test_a_setting_that_is_unknown_or_missing_is_named_in_one_line(tmp_path, capsys):
    command = ["--stage", "dpo", "--out", str(tmp_path), "--name", "run", "--resume"]
    for change, message in (
        (lambda settings: settings | {"sparkle": 3}, "the setting sparkle = 3 is unknown to this version"),
        (lambda settings: {k: v for k, v in settings.items() if k != "beta"}, "the setting beta is missing"),
    ):
        opened(settings_in(tmp_path, overwrite=True))
        edit_run_json(tmp_path, lambda stored, change=change: stored | {"settings": change(stored["settings"])})
        assert train.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/run/run.json: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "name, value",
    [("lr", "x"), ("seed", None), ("loss", "dpo"), ("keep", 1.5), ("epochs", 0), ("train", []), ("metric", "loss")],
)
def test_a_value_that_no_flag_gives_is_named(tmp_path, name, value):
    opened(settings_in(tmp_path))
    edit_run_json(tmp_path, lambda stored: stored | {"settings": stored["settings"] | {name: value}})
    with pytest.raises(InputError, match=f"run.json: .*{name}"):
        resumed(tmp_path)


def test_the_command_that_resumes_names_what_is_not_the_default(tmp_path):
    settings = settings_in("out", name="two words")
    assert resume_command(settings) == "python train.py --stage dpo --name 'two words' --resume"
    assert resume_command(settings_in(tmp_path)).endswith(f"--name run --out {tmp_path} --resume")


def test_a_resumed_run_needs_the_rows_and_the_weights_that_it_began_with(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}')
    model = shutil.copytree(tiny, tmp_path / "model")
    settings = settings_in(tmp_path, train=str(tmp_path / "rows.jsonl"))
    inputs = Inputs(None, [], [], [], {}, {"train": [tmp_path / "rows.jsonl"]})
    with open_run(settings, inputs, model):
        pass
    again = replace(settings, resume=True)
    for file in (tmp_path / "rows.jsonl", model / "model.safetensors"):
        with open_run(again, inputs, model):
            pass
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{file.name} has changed since .*run was started; put it back, or start"):
            with open_run(again, inputs, model):
                pass
        file.write_bytes(content)
    edit_run_json(tmp_path, lambda stored: stored | {"read": [1]})
    with pytest.raises(InputError, match='run.json: "read" is list, not dict'), open_run(again, inputs, model):
        pass


# -------------------------------------------------------------------------------------------- what a model was made from


def test_a_model_knows_its_run_through_the_stages_that_did_not_tune_it(tiny, tmp_path):
    """tiny -> dpo -> quantize: what was trained on and tuned from is that of the DPO run."""
    dpo, coded = tmp_path / "run", tmp_path / "coded"
    rows = [Row([{"role": "user", "content": f"What is {i} {i}?"}], ["4"], f"x:{i}", {}) for i in (2, 3, 4)]
    examples = [Example([1], [[2]], row.where) for row in rows]
    opened(settings_in(tmp_path, system_prompt="Be brief."), Inputs(None, examples[:2], examples[2:], rows, {}))
    write_json(dpo / "results.json", {"parent": str(tiny)})
    opened(settle("quantize", {"model": str(dpo), "to": "nf4", "out": str(tmp_path), "name": "coded"}).settings)
    write_json(coded / "results.json", {"parent": str(dpo)})
    for directory in (dpo, coded):
        assert tuned_from(directory) == tiny
        assert questions_seen(directory, ["what is 3 3", "what is 4 4"]) == 1
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(tiny / name, directory)
        assert load_chat(directory).system_prompt == "Be brief."
        assert load_chat(directory, "").system_prompt != "Be brief."
    assert tuned_from(tiny) is None and questions_seen(tiny, ["what is 3 3"]) == 0
    text = (dpo / "questions.json").read_text()
    assert "what" not in text  # hashes, not the questions themselves


@pytest.mark.parametrize("record", [{}, {"stage": 3}, {"settings": [1]}, {"stage": ["sft"], "config": 7}])
def test_a_foreign_run_json_says_nothing_about_a_model(tiny, tmp_path, record):
    model = shutil.copytree(tiny, tmp_path / "model")
    write_json(model / "run.json", record)
    write_json(model / "results.json", {"parent": 3})
    assert tuned_from(model) is None and load_chat(model).system_prompt is None and questions_seen(model, ["x"]) == 0


def test_a_folder_that_names_itself_as_parent_is_no_endless_loop(tmp_path):
    itself = str(tmp_path / "a")
    opened(settle("quantize", {"model": itself, "to": "nf4", "out": str(tmp_path), "name": "a"}).settings)
    write_json(tmp_path / "a" / "results.json", {"parent": itself})
    assert training_run(tmp_path / "a") is None


def test_a_tokenizer_needs_an_embedding_for_its_last_id(tiny, tmp_path):
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    config = read_json(tiny / "config.json")
    for rows in (768, 767):
        write_json(tmp_path / "config.json", {**config, "vocab_size": rows})
        if rows == 768:
            assert max(load_chat(tmp_path).tokenizer.get_vocab().values()) == 767
    with pytest.raises(InputError, match="its ids reach 767, the model's embedding has 767 rows"):
        load_chat(tmp_path)
    write_json(tmp_path / "config.json", {**config, "vocab_size": "768"})
    with pytest.raises(InputError, match='config.json: "vocab_size" is str, not int'):
        load_chat(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path):
    assert read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    path.write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")  # whole, but nothing says so before its newline
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_line_of_the_metrics_or_a_state_that_is_none_is_named(tiny, tmp_path):
    for line in ("{", "[1]", '{"step": "1"}', '{"loss": 1}', "\x00", "[" * 100_000):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a line of metrics .*; remove it"):
            read_metrics(tmp_path)
    good, path = (
        {"step": 9, "best_step": 9, "best_value": 0.5, "evaluations_since_best": 0},
        checkpoint_directory(tmp_path, 9),
    )
    path.mkdir(parents=True)
    for change in ({"step": None}, {"best_step": "9"}, {"step": 8}, {"best_value": "high"}, {"best_value": []}):
        write_json(path / "state.json", good | change)
        with pytest.raises(InputError, match=r'state\.json: ("(step|best_step|best_value)" is|is of step 8; delete)'):
            read_state(path)
    write_json(path / "state.json", good)
    assert read_state(path) == good
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    write_json(tmp_path / "run.json", {"stage": "sft"})
    write_json(tmp_path / "questions.json", {"trained on": 5})
    with pytest.raises(InputError, match='questions.json: "trained on" is int, not list'):
        questions_seen(tmp_path, ["what is 1"])


def test_steps_that_run_again_are_dropped_from_the_metrics(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"', encoding="utf-8")
    with recording(tmp_path, "dpo", 2, 4):
        pass
    assert read_metrics(tmp_path) == rows[:3]
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:  # as the loop goes on logging
        file.write('{"step": 3}\n')
    assert read_metrics(tmp_path) == [*rows[:3], {"step": 3}]


# ------------------------------------------------------------------------------------------------------------------ Ctrl-C


def test_the_first_signal_is_kept_and_the_second_acts():
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop_requested:
        assert stop_requested() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == usual


# ------------------------------------------------------------------------------------------------------------- one reference


def test_a_model_of_an_earlier_version_brings_its_system_prompt_even_where_its_run_cannot_go_on(tiny, tmp_path):
    run = shutil.copytree(tiny, tmp_path / "run")
    write_json(run / "run.json", {"config": {"stage": "sft", "sparkle": 3, "system_prompt": "Be brief."}})
    assert load_chat(run).system_prompt == "Be brief."
    assert load_chat(run, "Be loud.").system_prompt == "Be loud."
    with pytest.raises(InputError, match="an earlier version's"):
        stored_settings(run)
