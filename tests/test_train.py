"""The driver end to end, on a model that trains in seconds: a run's files, resume, kill, signals, bad input, the demo."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rows import pair_rows
from safetensors.torch import load_file, save_file

import demo
from data import Row, Truth, question_key, read_truth, write_truth
from model import Phi
from prepare.rows import load_inputs, rows_to_measure
from quant import Linear4bit
from runtime.files import read_json, write_jsonl
from runtime.runs import load_chat, questions_seen, read_metrics, steps_saved, stored_settings
from runtime.weights import fingerprint
from train import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pairs(tmp_path) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    return tmp_path / "pairs.jsonl"


def flags(stage: str, model: Path, rows: Path, out: Path, *extra: str) -> list[str]:
    usual = "--lr 1e-3 --epochs 2 --batch-size 4 --micro-batch-size 2 --eval-every 5 --device cpu --name run"
    limits = "--max-length 256 --max-prompt-length 128"
    files = ["--model", str(model), "--train", str(rows), "--out", str(out)]
    return ["--stage", stage, *files, *usual.split(), *limits.split(), *extra]


SHORT = ("--max-steps", "1", "--samples", "0")


def curve(run: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run)]


def weights(run: Path) -> str:
    return fingerprint(Phi.from_pretrained(run))


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line(tiny, pairs, tmp_path, monkeypatch, capsys):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    assert main(flags("dpo", tiny, pairs, tmp_path, *SHORT, "--compile")) == 2
    said = capsys.readouterr().err
    assert "error: --compile fails here" in said and "Traceback" not in said


# ------------------------------------------------------------------------------------------------------ what a run leaves


@pytest.mark.slow
def test_a_run_leaves_a_model_metrics_ledger_figure_results_and_its_rows(tiny, pairs, tmp_path, capsys):
    truth = {row["prompt"]: Truth(i % 4 == 0, row["chosen"], {"short": ".{,9}"}) for i, row in enumerate(pair_rows(40))}
    rows = [Row([{"role": "user", "content": prompt}], [], "", {}, truth=known) for prompt, known in truth.items()]
    write_truth(pairs, rows)
    assert main(flags("dpo", tiny, pairs, tmp_path / "out", "--samples", "2")) == 0
    run, printed = tmp_path / "out" / "run", capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "tokenizer.json", "run.json", "results.json", "figures/training.png"):
        assert (run / name).stat().st_size > 0
    (ledger,) = read_json(run / "ledger.json").values()
    assert ledger["rows"] == 40 == ledger["kept"] + sum(ledger["dropped"].values())

    first, *_ = logged = read_metrics(run)
    assert first["preference_loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2: policy and reference are one model
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    evaluations = {row["step"]: row["eval_debiased_accuracy"] for row in logged if "eval_loss" in row}
    results = read_json(run / "results.json")
    best = results["best_step"]
    assert best == max(evaluations, key=evaluations.get)  # the first of equals
    assert weights(run) == weights(run / "checkpoints" / f"step-{best}")
    assert steps_saved(run) == sorted({best, *list(evaluations)[-2:]})  # keep 2 and the best

    # The two sides of the split: the rows held out, with their truth, and a hash of each question that was trained on.
    settings = stored_settings(run)
    inputs = load_inputs(settings, load_chat(tiny, ""))
    measured = rows_to_measure(None, run)
    assert measured.kind == "pairs" and "held out" in measured.where
    assert [row.raw for row in measured.rows] == [pair_rows(40)[int(e.where.split(":")[-1]) - 1] for e in inputs.held_out]
    assert [row.truth for row in measured.rows] == [truth[e.question] for e in inputs.held_out]
    trained_on = [question_key(row) for row in inputs.rows if row.where in {e.where for e in inputs.train}]
    assert len(read_json(run / "questions.json")["trained on"]) == len(trained_on) == questions_seen(run, trained_on)
    assert questions_seen(run, (question_key(row) for row in measured.rows)) == 0
    assert len(read_truth(run / "held_out.jsonl")) == len(inputs.held_out)

    assert {"before", "after", "parent"} <= results.keys() and results["parent"] == str(tiny)
    for part in ("longer answer wins", "clean reward accuracy", "sampled: short", "  right:  ", f"best step {best}"):
        assert part in printed


@pytest.mark.slow
def test_the_reference_is_reused_only_for_the_same_model_and_rows_and_checked_at_step_0(tiny, pairs, tmp_path, capsys):
    out = tmp_path / "out"

    def run(model, *extra):
        status = main(flags("dpo", model, pairs, out, *SHORT, "--overwrite", *extra))
        printed, error = capsys.readouterr()
        return status, printed.count("written to"), printed.count("reused from"), error

    assert run(tiny)[:3] == (0, 2, 0)
    assert run(tiny, "--lr", "5e-4")[:3] == (0, 0, 2)
    assert run(tiny, "--system-prompt", "Be brief.")[:3] == (0, 2, 0)
    assert run(out / "run", "--name", "other")[:3] == (0, 2, 0)
    for file in (out / "reference").iterdir():
        save_file({"logprobs": load_file(file)["logprobs"] + torch.tensor([1.0, 0.0])}, file)
    status, _, _, error = run(tiny)
    assert status == 2 and "at step 0 the answers have drifted" in error and f"Delete {out}/reference" in error


@pytest.fixture
def sft_rows(tmp_path) -> Path:
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    return tmp_path / "sft.jsonl"


@pytest.mark.parametrize("extra", [[], ["--whole-text"]])
def test_sft_on_the_completion_and_on_the_whole_text_both_learn(tiny, sft_rows, tmp_path, extra):
    assert main(flags("sft", tiny, sft_rows, tmp_path, "--max-steps", "8", "--lr", "1e-2", "--samples", "0", *extra)) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "answers"), [([], 2), (["--last-turn-only"], 1)])
def test_dialogues_are_tuned_on_and_measured(tiny, tmp_path, extra, answers):
    rows = []
    for i in range(40):
        said = ["user", f"Say {i}.", "assistant", f"{i}.", "user", "And then?", "assistant", f"{i + 1}."]
        rows.append({"messages": [{"role": r, "content": c} for r, c in zip(said[::2], said[1::2])]})
    write_jsonl(tmp_path / "talk.jsonl", rows)
    assert main(flags("sft", tiny, tmp_path / "talk.jsonl", tmp_path, "--max-steps", "4", "--samples", "2", *extra)) == 0
    run = tmp_path / "run"
    inputs = load_inputs(stored_settings(run), load_chat(tiny, ""))
    assert {e.completions[0].count(inputs.chat.end) for e in inputs.train} == {2 * answers - 1}  # with the user's in between
    assert {len(e.texts) for e in inputs.train} == {1} and (inputs.train[0].learned is None) == (answers == 1)
    assert main(["--stage", "eval", "--model", str(run), "--out", str(tmp_path), "--name", "e", "--samples", "0"]) == 0
    measured, results = read_json(tmp_path / "e" / "eval.json")["results"][0], read_json(run / "results.json")
    assert measured["text"]["loss"]["value"] == pytest.approx(results["after"]["metrics"]["loss per token"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--letter-only"]])
def test_the_multiple_choice_stage(tiny, tmp_path, extra, capsys):
    rows = [
        {"question": f"{i} + 1?", "choices": [str(i), str(i + 1)], "answer": "B", "explanation": "Add."} for i in range(40)
    ]
    write_jsonl(tmp_path / "mcq.jsonl", rows)
    assert main(flags("mcq", tiny, tmp_path / "mcq.jsonl", tmp_path, "--max-steps", "8", "--samples", "2", *extra)) == 0
    assert "sampled: right letter" in capsys.readouterr().out
    results = read_json(tmp_path / "run" / "results.json")
    assert results["after"]["metrics"]["loss per token"] < results["before"]["metrics"]["loss per token"]
    assert rows_to_measure(None, tmp_path / "run").kind == ("mcq letter" if extra else "mcq")


# ------------------------------------------------------------------------------------------------------ killed, resumed


def started(*words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for(process: subprocess.Popen, run: Path, lines: int) -> None:
    """Returns when the run has logged that many lines."""
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < lines:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was stopped"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_stopped_and_resumed_equals_never_stopped_bit_for_bit(tiny, pairs, tmp_path):
    """Killed before its first checkpoint, so it begins again; then stopped by SIGTERM, which saves after the step; then the
    printed command goes on."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    usual = ("--samples", "0", "--epochs", "3")
    assert main(flags("dpo", tiny, pairs, whole.parent, *usual)) == 0

    process = started(*flags("dpo", tiny, pairs, run.parent, *usual))
    wait_for(process, run, 3)
    process.kill()
    process.wait()
    assert steps_saved(run) == [] and not (run / "results.json").exists()

    process = started("--stage", "dpo", "--out", str(run.parent), "--name", "run", "--resume")
    wait_for(process, run, 7)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "Stopped by SIGTERM" in printed
    last = read_metrics(run)[-1]["step"]
    assert steps_saved(run)[-1] == last < curve(whole)[-1]["step"] and not (run / "results.json").exists()

    assert main(shlex.split(printed.splitlines()[-1])[2:]) == 0  # "python train.py ..."
    assert curve(run) == curve(whole)
    assert weights(run) == weights(whole)


def test_a_finished_run_has_nothing_to_resume(tiny, pairs, tmp_path, capsys):
    assert main(flags("dpo", tiny, pairs, tmp_path, *SHORT)) == 0
    before = weights(tmp_path / "run")
    assert main(f"--stage dpo --out {tmp_path} --name run --resume".split()) == 0
    assert f"{tmp_path}/run is finished; nothing to resume." in capsys.readouterr().out
    assert main(flags("dpo", tiny, pairs, tmp_path, "--max-steps", "2")) == 2
    assert "--overwrite" in capsys.readouterr().err and weights(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------------------ gone wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny, pairs, tmp_path, capsys):
    huge = "--lr 1e30 --clip 1e30 --samples 0 --eval-every 1".split()
    assert main(flags("dpo", tiny, pairs, tmp_path, *huge)) == 2
    error = capsys.readouterr().err
    assert "is nan" in error or "is inf" in error or "is -inf" in error
    assert "pairs.jsonl:" in error and "another --name and a lower --lr. (--resume would come to the same step" in error
    assert steps_saved(tmp_path / "run") == [1]  # step 2 is the one that went wrong, and it changed nothing
    saved = Phi.from_pretrained(tmp_path / "run" / "checkpoints" / "step-1")
    assert all(torch.isfinite(p).all() for p in saved.parameters())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train", "absent.jsonl"], "absent.jsonl: No such file or directory"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--model", "no/such/place"], "no such directory"),
        (["--resume"], "no run to resume"),
        (["--max-length", "12", "--max-prompt-length", "11"], "no row is left"),
    ],
)
def test_a_mistake_that_shows_only_later_ends_in_one_clear_line(tiny, pairs, tmp_path, capsys, extra, message):
    assert main(flags("dpo", tiny, pairs, tmp_path / "out", *extra)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


def test_bad_rows_stop_the_run_or_are_left_out_and_counted(tiny, pairs, tmp_path, capsys):
    pairs.write_text(pairs.read_text() + '{"prompt": "x", "chosen": "y"}\nnot json\n')
    assert main(flags("dpo", tiny, pairs, tmp_path)) == 2
    error = capsys.readouterr().err
    assert f'{pairs}:41: "rejected" is missing' in error and f"{pairs}:42: not JSON" in error
    assert main(flags("dpo", tiny, pairs, tmp_path, "--on-bad-row", "skip", *SHORT, "--overwrite")) == 0
    (ledger,) = read_json(tmp_path / "run" / "ledger.json").values()
    assert ledger["rows"] == 42 and ledger["dropped"] == {"bad row": 2} and len(ledger["bad_rows"]) == 2


# -------------------------------------------------------------------------------------------------------------- a dry run


def layers_shown(printed: str) -> dict[str, tuple[str, str]]:
    """{setting: (value, layer)} of the first part of a dry run's output."""
    lines = printed.partition("Settings\n")[2].partition("\n\n")[0].splitlines()
    return {line.split()[0]: (" ".join(line.split()[1:-1]), line.split()[-1]) for line in lines}


def test_a_dry_run_shows_everything_and_writes_nothing(tiny, pairs, tmp_path, capsys):
    assert main(flags("dpo", tiny, pairs, tmp_path / "out", "--dry-run")) == 0
    printed = capsys.readouterr().out
    for part in (
        "40 rows, 40 kept",
        "[<|im_end|>]",
        "chosen (",
        "supervised)",
        "steps an epoch",
        "4 examples a step, in micro-batches of 2",
        "Memory",
        "s for the first step, about 0.",
        " hours) with 6 evaluations and the reference",
        "Nothing was trained.",
    ):
        assert part in printed
    shown = layers_shown(printed)
    assert (shown["lr"], shown["beta"], shown["dtype"]) == (("0.001", "flag"), ("0.3", "default"), ("fp32", "default"))
    assert not (tmp_path / "out").exists()


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_nothing_in_the_rows_steers_the_terminal(tiny, tmp_path, capsys, monkeypatch):
    """A dry run, a run, the data stage and errors show texts, file names and columns of others."""
    monkeypatch.chdir(tmp_path)
    file = f"a{ESCAPES}.jsonl"
    rows = [
        {"prompt": f"{ESCAPES} {i}?", "chosen": f"{i} it is {ESCAPES}", "rejected": f"No, {i}{ESCAPES}"} for i in range(9)
    ]
    write_jsonl(file, [*rows, {ESCAPES: 1}])
    write_jsonl(f"a{ESCAPES}.truth.jsonl", [{"prompt": rows[0]["prompt"], "answer": ESCAPES}])
    words = ["--model", str(tiny), "--train", file, "--on-bad-row", "skip", "--eval-share", "0.4", "--max-steps", "1"]
    assert main(["--stage", "dpo", *words, "--dry-run"]) == 0 and main(["--stage", "dpo", *words]) == 0
    assert main(["--stage", "dpo", *words[:4]]) == 2
    assert main(["--stage", "data", "--sources", f"pairs={file}"]) == 2
    assert main(["--stage", "data", "--sources", f"pairs={file}", "--on-bad-row", "skip"]) == 0
    printed = "".join(capsys.readouterr()).replace("\x1b[A", "")  # a progress bar goes up a line
    assert "\\x1b]0;owned\\x07" in printed and not set(printed) & set("\x1b\x07\x9b\u202e")


# --------------------------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The output directory of a demo whose world has few rows."""
    out = tmp_path_factory.mktemp("demo")
    demo.write_world(out / "demo-seed0", sizes={"sft": 300, "qat": 8, "pairs": 60, "test": 8})
    return out


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_rows_may_not_be_longer_than_the_model_s_window(tiny, tmp_path, capsys, more):
    """Asked for, they are an error before anything is read; the default, Phi-2's window, is lowered."""
    rows = [{"prompt": f"Say {i}", "completion": "a " * (2_000 if i == 3 else 2)} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    words = f"--stage sft --model {tiny} --train {tmp_path}/rows.jsonl --out {tmp_path}/out --name run --device cpu"
    assert main([*words.split(), *more, "--max-length", "2049"]) == 2
    told = f"{tiny} has a window of 1024 tokens; give --max-length 1024 --max-prompt-length 512"
    assert capsys.readouterr().err == f"error: --max-length 2049: {told}\n"
    assert main([*words.split(), "--max-steps", "1", "--samples", "0", *more]) == 0
    printed = capsys.readouterr().out
    assert f"{tiny} has a window of 1,024 tokens: as with --max-length 1024" in printed
    assert "20 rows, 19 kept" in printed and "1 completion does not fit" in printed


@pytest.mark.slow
def test_a_dry_run_of_the_demo_shows_the_layer_of_each_value(small_demo, capsys):
    before = sorted(small_demo.rglob("*"))
    words = ["--out", str(small_demo), "--device", "cpu", "--preset", "80gb", "--lora", "4", "--dry-run"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "The demo's SFT model is not there yet; a real run makes it first" in printed
    shown = layers_shown(printed)
    names = ("lora", "max_length", "lr", "clip")
    wanted = [("4", "flag"), ("2048", "preset"), ("0.002", "demo"), ("1.0", "default")]
    assert [shown[name] for name in names] == wanted
    assert sorted(small_demo.rglob("*")) == before


@pytest.mark.slow
def test_the_demo_runs_sft_first_says_so_and_resumes_it_if_it_was_begun(small_demo, capsys):
    words = ["--out", str(small_demo), "--samples", "4", "--device", "cpu", "--epochs", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    sft, dpo = small_demo / "demo-sft-seed0", small_demo / "demo-dpo"
    assert f"The demo's SFT model comes first: running --stage sft in {sft}/" in printed
    assert printed.index("comes first") < printed.index(f"Model, metrics and figure: {sft}/") < printed.index("Reference:")
    assert "sampled: right method" in printed and "clean reward accuracy" in printed  # from the truth file
    assert "  right:  " in printed
    files = [list(read_json(run / "ledger.json")) for run in (sft, dpo)]
    assert files == [[f"{small_demo}/demo-seed0/{name}.jsonl"] for name in ("sft", "pairs")]
    assert read_json(dpo / "results.json")["parent"] == str(sft)
    assert read_json(sft / "run.json")["settings"]["lr"] == 1.5e-3  # the demo's own values, not those of the DPO command

    # It was stopped in its SFT stage: that goes on from its last checkpoint, with the settings that it was begun with.
    before = read_metrics(sft)
    (sft / "results.json").unlink()
    shutil.rmtree(dpo)
    assert main([*words, "--max-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"The demo's SFT model comes first: resuming --stage sft in {sft}/" in printed
    assert read_metrics(sft) == before and (sft / "results.json").exists() and len(curve(dpo)) == 2

    assert main([*words, "--max-steps", "1", "--overwrite"]) == 0
    assert "comes first" not in capsys.readouterr().out and read_metrics(sft) == before


# ------------------------------------------------------------------------------------------------------------------- QAT


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_quantizing_the_result_of_qat_changes_nothing_and_it_resumes_bit_for_bit(
    tiny, pairs, sft_rows, tmp_path, objective, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, rows = tmp_path / "run", pairs if objective == "dpo" else sft_rows
    asked = ("--objective", objective, "--to", "nf2", "--block", "32", "--samples", "0")
    assert main(flags("qat", tiny, rows, tmp_path, *asked)) == 0
    table = capsys.readouterr().out
    assert "before" in table and "rounded" in table and "after" in table
    quantize = f"--stage quantize --model {run} --out {tmp_path} --to nf2 --block 32"
    assert main(quantize.split()) == 0
    ids = torch.arange(60).view(3, 20)
    trained, quantized = Phi.from_pretrained(run), Phi.from_pretrained(tmp_path / "run-nf2")
    assert isinstance(quantized.model.layers[0].mlp.fc1, Linear4bit)
    assert torch.equal(quantized.model.layers[0].mlp.fc1.dense(), trained.model.layers[0].mlp.fc1.weight)
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids), trained(ids))
    # Training went through the rounding: the loop's evaluation of the best step is that of the rounded weights.
    results = read_json(run / "results.json")
    (best,) = (row for row in read_metrics(run) if row["step"] == results["best_step"] and "eval_loss" in row)
    ours, logged = ("loss per token", "eval_loss") if objective == "sft" else ("reward accuracy", "eval_rewards/accuracies")
    assert results["after"]["metrics"][ours] == pytest.approx(best[logged], rel=1e-5)
    assert results["after"]["metrics"] != results["rounded"]["metrics"]

    # Cut off before its last checkpoint, the run takes the last steps again.
    before, logged = (weights(run), weights(run / "checkpoints" / "step-16")), curve(run)
    shutil.rmtree(run / "checkpoints" / "step-16")
    (run / "results.json").unlink()
    assert main(f"--stage qat --name run --out {tmp_path} --resume".split()) == 0
    assert (weights(run), weights(run / "checkpoints" / "step-16")) == before and curve(run) == logged
    board = EventAccumulator(str(run / "tb")).Reload()
    losses = {row["step"]: row["loss"] for row in logged if "loss" in row}
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert len(shown) == 16 and dict(shown) == pytest.approx(losses, rel=1e-6)  # steps that ran twice are shown once


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["| head -1", ">&- 2>&- <&-", "> ascii.txt"], ids=["head", "closed", "ascii"])
def test_output_that_cannot_be_written_does_not_end_a_run(tiny, pairs, tmp_path, broken):
    words = flags("dpo", tiny, pairs, tmp_path, "--max-steps", "2", "--samples", "2")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = f"{shlex.join([sys.executable, str(ROOT / 'train.py'), *words])} {broken}"
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=True)
    assert (tmp_path / "run" / "results.json").exists()


def test_a_missing_file_of_rows_is_noticed_before_the_demo_is_tuned(small_demo, capsys):
    shutil.rmtree(small_demo / "demo-sft-seed0", ignore_errors=True)
    assert main(["--out", str(small_demo), "--train", "nosuch.jsonl", "--name", "z"]) == 2
    told = capsys.readouterr()
    assert told.err == "error: nosuch.jsonl: no such file\n" and "comes first" not in told.out
    assert not (small_demo / "z").exists() and not (small_demo / "demo-sft-seed0").exists()
