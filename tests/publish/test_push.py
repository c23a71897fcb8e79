"""A push sends the model and nothing else, says in one line what is wrong, and goes on when it is given again."""

import json
import subprocess
import sys

import pytest

from publish.push import files_to_send
from runtime.files import InputError, write_json
from tests.helpers.hub_server import ROOT, hub_environment, hub_to_write_to

TOKEN = "hf_writer"
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
PRIVATE = [
    "held_out.jsonl",
    "held_out.truth.jsonl",
    "questions.json",
    "ledger.json",
    "metrics.jsonl",
    "results.json",
    "run.json",
]
PRIVATE += ["optimizer.safetensors", ".env", "key.txt", ".demo.lock", "checkpoints/step-1/model.safetensors", "tb/events"]


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "my-model"
    for name in (*MODEL, *PRIVATE):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"content of {name}" if not name.endswith(".json") else "{}")
    return directory


def push(directory, endpoint, token, *flags):
    """Exit status, stdout and stderr of the stage in a new process, whose hub is this server."""
    environment = hub_environment(endpoint, directory.parent / "home", offline=False) | {"HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "train.py", "--stage", "push", "--model", str(directory), "--repo", "me/model", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert not token or token not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_only_the_model_is_sent(model):
    assert {file.name for file in files_to_send(model)} == MODEL


def test_there_must_be_a_model_and_adapters_need_a_base_that_others_have(tmp_path, tiny):
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="there is no model in"):
            files_to_send(directory)
    from lora import add_lora
    from model import Phi

    add_lora(Phi.from_pretrained(tiny), rank=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="which only this machine has; merge them"):
        files_to_send(tmp_path)
    config = tmp_path / "adapter_config.json"
    write_json(config, {**json.loads(config.read_text()), "base_model_name_or_path": "microsoft/phi-2"})
    assert [file.name for file in files_to_send(tmp_path)] == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_a_dry_run_lists_names_and_sizes_and_needs_no_hub(model):
    status, said, _ = push(model, "http://127.0.0.1:9", "", "--dry-run")
    assert status == 0 and "5 files, 0.0 MB\nNothing was sent." in said
    assert all(name in said for name in MODEL) and not any(name in said for name in PRIVATE)


@pytest.mark.slow
def test_a_push_makes_the_repository_and_a_second_one_sends_no_large_file_again(model):
    """The connection is cut twice: while a large file is sent, which the library tries again, and at the commit."""
    with hub_to_write_to(TOKEN, cuts=["/store/", "/commit/"]) as (endpoint, repository):
        status, _, error = push(model, endpoint, TOKEN, "--private")
        assert status == 2 and "the upload failed" in error and "the same command goes on" in error
        assert error.count("\n") == 1 and not repository["files"]
        status, said, _ = push(model, endpoint, TOKEN, "--private")
        assert status == 0 and f"Sent: {endpoint}/me/model/commit/" in said and repository["private"]
        assert {*repository["files"]} == MODEL and repository["files"][
            "model.safetensors"
        ] == b"content of model.safetensors"
        assert repository["cuts"] == [] and len(repository["stored"]) == 1
        repository["stored"] = dict.fromkeys(repository["stored"], b"sent before")
        (model / "README.md").write_text("# Better")
        assert push(model, endpoint, TOKEN)[0] == 0 and repository["files"]["README.md"] == b"# Better"
        assert repository["files"]["model.safetensors"] == b"sent before"


@pytest.mark.slow
@pytest.mark.parametrize(
    "token, told",
    [("", "does not know you; make a token"), ("hf_nobody", "does not know you"), ("hf_reader", "may not write to")],
)
def test_what_the_hub_refuses_is_one_line(model, token, told):
    with hub_to_write_to(TOKEN) as (endpoint, repository):
        status, _, error = push(model, endpoint, token)
        assert status == 2 and told in error and error.count("\n") == 1 and not repository["files"]


@pytest.mark.slow
def test_the_hub_cannot_be_reached(model):
    status, _, error = push(model, "http://127.0.0.1:9", TOKEN)
    assert status == 2 and "me/model: the upload failed" in error and error.count("\n") == 1
