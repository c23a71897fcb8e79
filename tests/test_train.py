"""The driver end to end, on a model that trains in seconds: resume, kill, signals, bad input, non-finite numbers."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rows import pair_rows

import dpo
import train as driver
from data import ChatML, Example, load_tokenizer
from loop import compile_blocks, make_objective, micro_batches, step_gradients
from model import Phi, PhiConfig
from passes import divergence
from quant import Linear4bit, compile_missing, quantize_model
from runtime.checks import resolve
from runtime.files import InputError, read_json, write_jsonl
from runtime.optimizer import learning_rate
from runtime.runs import fingerprint, read_metrics, steps_saved
from runtime.settings import Config, parse
from train import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pairs(tmp_path) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    return tmp_path / "pairs.jsonl"


def flags(tiny: Path, pairs: Path, out: Path, *extra: str) -> list[str]:
    return [
        "--stage",
        "dpo",
        "--model",
        str(tiny),
        "--train",
        str(pairs),
        "--out",
        str(out),
        "--name",
        "run",
        "--lr",
        "1e-3",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--micro-batch-size",
        "2",
        "--eval-every",
        "5",
        "--samples",
        "2",
        "--device",
        "cpu",
        *extra,
    ]


def curve(run: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run)]


def weights(run: Path) -> str:
    return fingerprint(Phi.from_pretrained(run))


# ------------------------------------------------------------------------------------------------------------- the step


def step_examples(tiny: Path, objective: str) -> list[Example]:
    """Eight examples of all different lengths."""
    chat = ChatML(load_tokenizer(tiny))
    return [
        Example(
            chat.prompt([{"role": "user", "content": f"Question {'x' * i}?"}]),
            [chat.reply("yes " * (i + 1)), chat.reply("no")][: 1 if objective == "sft" else 2],
        )
        for i in range(8)
    ]


def step_config(objective: str, **settings) -> Config:
    losses = dict(loss="robust", beta=0.1, eps=0.1, nll_weight=0.5)
    return Config(objective=objective, device="cpu", dtype="fp32", **losses, **settings)


def one_step(model: Phi, examples: list[Example], config: Config) -> tuple[dict, torch.Tensor]:
    """Metrics and the gradient [parameters] of a step; DPO's reference differs from pair to pair."""
    reference = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) - 20 if config.objective == "dpo" else None
    model.zero_grad()
    metrics = step_gradients(model, examples, reference, make_objective(config), config)
    return metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same_step(a: tuple[dict, torch.Tensor], b: tuple[dict, torch.Tensor]) -> None:
    torch.testing.assert_close(a[1], b[1], atol=1e-6, rtol=1e-5)
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-5)


def test_micro_batches_of_one_and_of_eight_give_the_same_gradient_and_metrics(tiny):
    examples, model = step_examples(tiny, "dpo"), Phi.from_pretrained(tiny)
    one, eight = (one_step(model, examples, step_config("dpo", micro_batch_size=size)) for size in (1, 8))
    assert_same_step(one, eight)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("pack, fewest, most", [(1, 8, 8), (100, 2, 7), (10_000, 1, 1)])
def test_a_packed_step_has_the_gradient_and_metrics_of_one_that_is_not(tiny, objective, pack, fewest, most):
    examples, model = step_examples(tiny, objective), Phi.from_pretrained(tiny)
    config = step_config(objective, micro_batch_size=3, pack=pack)
    parts, batches, _ = zip(*micro_batches(examples, config))
    assert sorted(i for part in parts for i in part) == list(range(8)) and fewest <= len(parts) <= most
    assert all(len(batch.tokens) == 1 and (batch.example >= 0).all() for batch in batches)  # one row, no padding
    assert_same_step(one_step(model, examples, config), one_step(model, examples, replace(config, pack=None)))


def test_a_compiled_step_is_the_eager_one_with_one_graph_for_all_layers_and_lengths(tiny):
    missing = compile_missing()
    if missing:
        pytest.skip(missing)
    from torch._dynamo.utils import counters

    examples = step_examples(tiny, "dpo")
    shape = dict(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config, model = step_config("dpo", micro_batch_size=3), Phi(PhiConfig(**shape)).init_weights(0)
    eager = one_step(model, examples, config)
    counters.clear()
    compile_blocks(model)
    assert_same_step(one_step(model, examples, config), eager)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    model.gradient_checkpointing = True
    assert_same_step(one_step(model, examples, config), eager)
    with pytest.raises(InputError, match="quantized"):
        compile_blocks(quantize_model(Phi.from_pretrained(tiny), "nf4"))


def test_the_learning_rate_rises_linearly_then_falls_to_zero():
    config = Config(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, 12, config) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(8, 12, config) == pytest.approx(0.5)  # half-way down the cosine
    assert learning_rate(12, 12, config) == pytest.approx(0.0)
    config.schedule = "linear"
    assert learning_rate(10, 12, config) == pytest.approx(0.25)


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_a_model_metrics_ledger_figure_and_results(tiny, pairs, tmp_path, capsys):
    assert main(flags(tiny, pairs, tmp_path / "out")) == 0
    run = tmp_path / "out" / "run"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "run.json", "results.json", "figures/training.png"):
        assert (run / name).stat().st_size > 0
    (ledger,) = read_json(run / "ledger.json").values()
    assert ledger["rows"] == 40 == ledger["kept"] + sum(ledger["dropped"].values())
    rows = read_metrics(run)
    first = rows[0]
    assert first["preference_loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2: policy and reference are one model
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    evaluations = {row["step"]: row["eval_debiased_accuracy"] for row in rows if "eval_loss" in row}
    best = read_json(run / "results.json")["best_step"]
    assert best == max(evaluations, key=evaluations.get)  # the first of equals
    assert weights(run) == weights(run / "checkpoints" / f"step-{best}")
    assert steps_saved(run) == sorted({best, *list(evaluations)[-2:]})  # keep 2 and the best
    assert "longer answer wins" in capsys.readouterr().out


def test_the_reference_is_cached_and_reused_only_for_the_same_model_and_data(tiny, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    main(flags(tiny, pairs, out, "--max-steps", "1", "--samples", "0"))
    assert capsys.readouterr().out.count("written to") == 2
    main(flags(tiny, pairs, out, "--max-steps", "1", "--samples", "0", "--overwrite", "--lr", "5e-4"))
    assert capsys.readouterr().out.count("reused from") == 2
    main(flags(tiny, pairs, out, "--max-steps", "1", "--samples", "0", "--overwrite", "--system-prompt", "Be brief."))
    assert capsys.readouterr().out.count("written to") == 2
    main(flags(out / "run", pairs, out, "--max-steps", "1", "--samples", "0", "--name", "other"))
    assert capsys.readouterr().out.count("written to") == 2


def test_a_live_reference_gives_the_same_curve_as_the_cached_one(tiny, pairs, tmp_path):
    """Up to rounding, which differs because the two pad their batches differently; a small lr does not blow it up."""
    small = ["--max-steps", "4", "--samples", "0", "--lr", "1e-5"]
    main(flags(tiny, pairs, tmp_path / "cached", *small))
    main(flags(tiny, pairs, tmp_path / "live", *small, "--reference", "live"))
    for a, b in zip(curve(tmp_path / "cached" / "run"), curve(tmp_path / "live" / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_packed_rows_give_the_same_curve_as_rows_of_their_own(tiny, pairs, tmp_path):
    small = ["--max-steps", "4", "--samples", "0", "--lr", "1e-5"]
    main(flags(tiny, pairs, tmp_path / "alone", *small))
    main(flags(tiny, pairs, tmp_path / "packed", *small, "--pack", "120"))
    for a, b in zip(curve(tmp_path / "alone" / "run"), curve(tmp_path / "packed" / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_sft_on_the_whole_text_and_on_the_completion_both_learn(tiny, tmp_path):
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": f"Say {i}", "completion": f"Here it is: {i}"} for i in range(40)])
    for extra in ([], ["--whole-text"]):
        name = f"run{len(extra)}"
        assert (
            main(
                [
                    "--stage",
                    "sft",
                    "--model",
                    str(tiny),
                    "--train",
                    str(tmp_path / "sft.jsonl"),
                    "--out",
                    str(tmp_path / "out"),
                    "--name",
                    name,
                    "--lr",
                    "1e-2",
                    "--max-steps",
                    "8",
                    "--batch-size",
                    "8",
                    "--device",
                    "cpu",
                    *extra,
                ]
            )
            == 0
        )
        losses = [row["loss"] for row in read_metrics(tmp_path / "out" / name) if "loss" in row]
        assert losses[-1] < losses[0] - 1


def test_early_stopping_ends_a_run_that_does_not_improve(tiny, pairs, tmp_path):
    main(
        flags(
            tiny, pairs, tmp_path, "--lr", "1e-12", "--epochs", "9", "--eval-every", "1", "--patience", "2", "--samples", "0"
        )
    )
    evaluated = [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert evaluated == [1, 2, 3]  # the first is the best so far; two later ones are no better


# ------------------------------------------------------------------------------------------------------ killed, resumed


def test_killed_at_any_moment_and_resumed_equals_never_killed_bit_for_bit(tiny, pairs, tmp_path):
    whole = tmp_path / "whole" / "run"
    assert main(flags(tiny, pairs, whole.parent, "--samples", "0")) == 0

    run = tmp_path / "killed" / "run"
    command = [sys.executable, str(ROOT / "train.py"), *flags(tiny, pairs, run.parent, "--samples", "0")]
    for lines in (3, 9):  # killed after about so many logged lines: before the first checkpoint, and after it
        process = subprocess.Popen(
            command + (["--resume"] if lines > 3 else []), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and len(read_metrics(run)) < lines and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "results.json").exists(), "the run ended before it was killed"
    assert main(flags(tiny, pairs, run.parent, "--samples", "0", "--resume")) == 0
    assert curve(run) == curve(whole)
    assert weights(run) == weights(whole)


def test_sigterm_saves_after_the_step_and_the_printed_command_resumes(tiny, pairs, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *flags(tiny, pairs, tmp_path, "--epochs", "40", "--samples", "0")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while len(read_metrics(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM" in printed
    last = read_metrics(run)[-1]["step"]
    assert steps_saved(run)[-1] == last < 40 * 8
    assert main(shlex.split(printed.splitlines()[-1])[2:]) == 0  # "python train.py ..."
    assert (run / "results.json").exists() and read_metrics(run)[-1]["step"] > last


def test_a_resumed_run_refuses_other_settings(tiny, pairs, tmp_path, capsys):
    assert main(flags(tiny, pairs, tmp_path, "--max-steps", "1")) == 0
    (tmp_path / "run" / "results.json").unlink()
    assert main(flags(tiny, pairs, tmp_path, "--max-steps", "1", "--beta", "0.7", "--resume")) == 2
    assert "beta" in capsys.readouterr().err


def test_an_earlier_run_is_never_overwritten_by_accident(tiny, pairs, tmp_path, capsys):
    assert main(flags(tiny, pairs, tmp_path, "--max-steps", "1")) == 0
    before = weights(tmp_path / "run")
    assert main(flags(tiny, pairs, tmp_path, "--max-steps", "2")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert weights(tmp_path / "run") == before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert main(flags(tiny, pairs, tmp_path, "--name", "precious", "--overwrite")) == 2
    assert (tmp_path / "precious" / "thesis.txt").exists()


# ------------------------------------------------------------------------------------------------------------ gone wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny, pairs, tmp_path, capsys):
    assert main(flags(tiny, pairs, tmp_path, "--lr", "1e30", "--clip", "1e30", "--samples", "0", "--eval-every", "1")) == 2
    error = capsys.readouterr().err
    assert "is nan" in error or "is inf" in error or "is -inf" in error
    assert "pairs.jsonl:" in error
    assert steps_saved(tmp_path / "run") == [1]  # step 2 is the one that went wrong, and it changed nothing
    saved = Phi.from_pretrained(tmp_path / "run" / "checkpoints" / "step-1")
    assert all(torch.isfinite(p).all() for p in saved.parameters())


def test_a_reference_that_is_not_the_starting_model_is_noticed_at_step_0(tiny, pairs, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    assert main(flags(tiny, pairs, tmp_path, "--max-steps", "1", "--samples", "0")) == 0
    for file in (tmp_path / "reference").iterdir():
        save_file({"logprobs": load_file(file)["logprobs"] + torch.tensor([1.0, 0.0])}, file)
    assert main(flags(tiny, pairs, tmp_path, "--max-steps", "1", "--samples", "0", "--overwrite")) == 2
    assert "at step 0 the answers have drifted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train", "absent.jsonl"], "absent.jsonl"),
        (["--loss", "sigmoid", "--eps", "0.1"], "no --eps"),
        (["--loss", "robust"], "needs --eps"),
        (["--eps", "0.5"], "[0, 0.5)"),
        (["--dtype", "fp16"], "overflow"),
        (["--attention", "flex"], "CUDA"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "gpu"], "give cpu, cuda"),
        (["--whole-text"], "does nothing in --stage dpo"),
        (["--flip-rate", "0.1"], "demo"),
        (["--demo-rows", "10"], "demo"),
        (["--max-prompt-length", "4000"], "no room"),
        (["--batch-size", "0"], "positive"),
        (["--pack", "0"], "--pack 0: must be positive"),
        (["--lora", "4", "--base", "nf4", "--compile"], "--compile would keep the decoded weights of --base nf4"),
        (["--metric", "loss"], "robust loss"),
        (["--model", "no/such/place"], "no such directory"),
        (["--eval-share", "1.5"], "between 0 and 1"),
        (["--resume"], "no run to resume"),
        (["--max-length", "12", "--max-prompt-length", "11"], "no row is left"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_clear_line(tiny, pairs, tmp_path, capsys, extra, message):
    assert main(flags(tiny, pairs, tmp_path / "out", *extra)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


def test_bad_rows_stop_the_run_or_are_left_out_and_counted(tiny, pairs, tmp_path, capsys):
    pairs.write_text(pairs.read_text() + '{"prompt": "x", "chosen": "y"}\nnot json\n')
    assert main(flags(tiny, pairs, tmp_path)) == 2
    error = capsys.readouterr().err
    assert f'{pairs}:41: "rejected" is missing' in error and f"{pairs}:42: not JSON" in error
    assert main(flags(tiny, pairs, tmp_path, "--on-bad-row", "skip", "--max-steps", "1", "--overwrite")) == 0
    (ledger,) = read_json(tmp_path / "run" / "ledger.json").values()
    assert ledger["rows"] == 42 and ledger["dropped"] == {"bad row": 2} and len(ledger["bad_rows"]) == 2


def test_a_dry_run_shows_everything_and_writes_nothing(tiny, pairs, tmp_path, capsys):
    assert main(flags(tiny, pairs, tmp_path / "out", "--dry-run")) == 0
    printed = capsys.readouterr().out
    for part in (
        "micro_batch_size",
        "40 rows, 40 kept",
        "[<|im_end|>]",
        "supervised",
        "predicted",
        "MB are free",
        "steps",
        "Nothing was trained",
    ):
        assert part in printed
    assert not (tmp_path / "out").exists()


def test_every_field_of_the_config_is_a_flag_with_help():
    given = ["--stage", "dpo", "--lr", "3e-5", "--batch_size", "7", "--nll-weight", "0.5"]
    config, names = parse(given)
    assert (config.lr, config.batch_size, config.nll_weight) == (3e-5, 7, 0.5)
    assert names == {"stage", "lr", "batch_size", "nll_weight"}
    assert resolve(config, names).loss == "robust"
    with pytest.raises(SystemExit):
        parse(["--learning-rate", "1"])


def test_the_demo_trains_sft_first_says_so_and_keeps_questions_apart(tmp_path, capsys, monkeypatch):
    from runtime.settings import RECIPES

    monkeypatch.setitem(RECIPES, ("demo", "sft"), {**RECIPES["demo", "sft"], "demo_rows": 64, "epochs": 1})
    assert main(["--out", str(tmp_path), "--demo-rows", "80", "--samples", "4", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "There is no SFT model for the demo yet" in printed and "sampled: right method" in printed
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    pairs, corpus = (read(tmp_path / p) for p in ("demo-dpo/data/pairs.jsonl", "demo-sft-seed0/data/sft.jsonl"))
    assert sum(row["flipped"] for row in pairs) == 16
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in corpus}


def test_debiased_accuracy_inverts_the_flips():
    assert dpo.debiased_accuracy(0.95 * 0.8 + 0.05 * 0.2, 0.2) == pytest.approx(0.95)


def test_no_traceback_for_a_missing_directory_from_the_shell(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--model", str(tmp_path / "nothing"), "--train", "x.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 2 and "no such directory" in result.stderr and "Traceback" not in result.stderr
    assert pytest.raises(InputError, driver.find_parent, Config(model=str(tmp_path / "nothing")))


# ------------------------------------------------------------------------------------------------------------------- QAT


def qat_flags(tiny, pairs, out, objective, *extra):
    changed = {"--stage": "qat", "--model": str(tiny)}
    usual = flags(tiny, pairs, out, "--objective", objective, "--to", "nf2", "--block", "32", *extra)
    return [changed.get(before, flag) for before, flag in zip(["", *usual], usual)]


@pytest.fixture
def sft_rows(tmp_path) -> Path:
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    return tmp_path / "sft.jsonl"


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_quantizing_the_result_of_qat_changes_nothing(tiny, pairs, sft_rows, tmp_path, objective, capsys):
    out, rows = tmp_path / "out", pairs if objective == "dpo" else sft_rows
    assert main(qat_flags(tiny, rows, out, objective)) == 0
    table = capsys.readouterr().out
    assert "before" in table and "rounded" in table and "after" in table
    assert main(["--stage", "quantize", "--model", str(out / "run"), "--out", str(out), "--to", "nf2", "--block", "32"]) == 0
    ids = torch.arange(60).view(3, 20)
    trained, quantized = Phi.from_pretrained(out / "run"), Phi.from_pretrained(out / "run-nf2")
    assert isinstance(quantized.model.layers[0].mlp.fc1, Linear4bit)
    assert torch.equal(quantized.model.layers[0].mlp.fc1.dense(), trained.model.layers[0].mlp.fc1.weight)
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids), trained(ids))
    # Training went through the rounding: the loop's evaluation of the best step is that of the rounded weights.
    results = read_json(out / "run" / "results.json")
    (best,) = (row for row in read_metrics(out / "run") if row["step"] == results["best_step"] and "eval_loss" in row)
    ours, logged = ("loss per token", "eval_loss") if objective == "sft" else ("reward accuracy", "eval_rewards/accuracies")
    assert results["after"]["metrics"][ours] == pytest.approx(best[logged], rel=1e-5)
    assert results["after"]["metrics"] != results["rounded"]["metrics"]


def test_qat_resumes_bit_for_bit(tiny, sft_rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(qat_flags(tiny, sft_rows, tmp_path / "a", "sft")) == 0
    assert main(qat_flags(tiny, sft_rows, tmp_path / "b", "sft", "--max-steps", "16", "--save-every", "5")) == 0
    for stale in ("results.json",):
        (tmp_path / "b" / "run" / stale).unlink()
    shutil.rmtree(tmp_path / "b" / "run" / "checkpoints" / f"step-{steps_saved(tmp_path / 'b' / 'run')[-1]}")
    command = ["--stage", "qat", "--name", "run", "--out", str(tmp_path / "b"), "--resume"]
    assert main(command) == 0
    assert weights(tmp_path / "a" / "run") == weights(tmp_path / "b" / "run")
    board = EventAccumulator(str(tmp_path / "b" / "run" / "tb")).Reload()
    logged = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "b" / "run") if "loss" in row}
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert len(shown) == 16 and dict(shown) == pytest.approx(logged, rel=1e-6)  # steps that ran twice are shown once


def test_a_quantized_model_is_not_tuned(tiny, pairs, tmp_path, capsys):
    assert main(["--stage", "quantize", "--model", str(tiny), "--to", "nf4", "--out", str(tmp_path), "--name", "q"]) == 0
    assert main(flags(tmp_path / "q", pairs, tmp_path / "out")) == 2
    assert "is quantized, and codes cannot be tuned" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize("letter_only", [True, False])
def test_the_multiple_choice_stage(tiny, tmp_path, letter_only, capsys):
    rows = [
        {"question": f"{i} + 1?", "choices": [str(i), str(i + 1)], "answer": "B", "explanation": "Add."} for i in range(40)
    ]
    write_jsonl(tmp_path / "mcq.jsonl", rows)
    usual = flags(tiny, tmp_path / "mcq.jsonl", tmp_path / "out", *(["--letter-only"] if letter_only else []))
    assert main([{"--stage": "mcq"}.get(before, flag) for before, flag in zip(["", *usual], usual)]) == 0
    assert "sampled: right letter" in capsys.readouterr().out
    results = read_json(tmp_path / "out" / "run" / "results.json")
    assert results["after"]["metrics"]["loss per token"] < results["before"]["metrics"]["loss per token"]


def test_multiple_choice_needs_questions(tmp_path, capsys):
    assert main(["--stage", "mcq", "--out", str(tmp_path)]) == 2
    assert "--train FILE.jsonl is missing: multiple-choice questions" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the precision report card


def test_the_report_card(tiny, pairs, tmp_path, capsys):
    assert main(flags(tiny, pairs, tmp_path)) == 0
    card = [
        "--stage",
        "eval",
        "--model",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path),
        "--precisions",
        "fp32,bf16,int8,nf4-double,nf2",
    ]
    assert main([*card, "--name", "own"]) == 0
    rows = {row["format"]: row for row in read_json(tmp_path / "own" / "eval.json")["rows"]}
    assert rows["fp32"]["KL"] == 0 and rows["fp32"]["top 1"] == 1 and rows["fp32"]["quantize s"] is None
    assert rows["nf2"]["KL"] > 10 * rows["nf4-double"]["KL"] > 10 * rows["int8"]["KL"] > 0
    widths = [rows[name]["bits per weight"] for name in ("fp32", "bf16", "int8", "nf4-double", "nf2")]
    assert widths[:2] == [32, 16] and 8 < widths[2] < 9 and 4.1 < widths[3] < 4.6 and widths[4] == 2.5
    sizes = [rows[name]["disk"] for name in ("fp32", "int8", "nf2")]
    assert sizes == sorted(sizes, reverse=True)
    # The first row is the model as its own run measured it.
    assert (
        rows["fp32"]["reward accuracy"]
        == read_json(tmp_path / "run" / "results.json")["after"]["metrics"]["reward accuracy"]
    )
    assert (tmp_path / "own" / "figures" / "precisions.png").exists()
    assert "| format |" in (tmp_path / "own" / "precisions.md").read_text().replace(" " * 4, "")
    # On a file, from a model without a parent: no reward accuracy; with one, there is.
    assert (
        main(["--stage", "eval", "--model", str(tiny), "--precisions", "int8", "--data", str(pairs), "--out", str(tmp_path)])
        == 0
    )
    assert "reward accuracy" not in capsys.readouterr().out.rpartition("\n\n")[0].rpartition("int8 ...")[2]
    assert main([*card, "--name", "given", "--data", str(pairs), "--reference-model", str(tiny)]) == 0
    rows = [{"question": f"{i} + 1?", "choices": [str(i), str(i + 1), "0"], "answer": "B"} for i in range(9)]
    write_jsonl(tmp_path / "mcq.jsonl", rows)
    assert main([*card, "--name", "choices", "--data", str(tmp_path / "mcq.jsonl")]) == 0
    assert "right option" in capsys.readouterr().out
    assert 0 <= read_json(tmp_path / "choices" / "eval.json")["rows"][0]["choice accuracy"] <= 1


def test_perplexity_and_kl_by_hand(tiny):
    """Of one predicted token, from the logits of a plain forward pass."""
    full, other = Phi.from_pretrained(tiny), quantize_model(Phi.from_pretrained(tiny), "nf2")
    example = Example([5, 6, 7], [[8]])
    with torch.no_grad():
        p, q = (model(torch.tensor([[5, 6, 7]])).log_softmax(-1)[0, -1] for model in (full, other))
    expected = {"kl": (p.exp() * (p - q)).sum().item(), "top 1": float(p.argmax() == q.argmax()), "loss": -q[8].item()}
    assert divergence(full, other, [example] * 3, batch_size=2, device="cpu") == pytest.approx(expected, rel=1e-4)
