"""The training loop, part by part against its definitions, and two short runs against what their settings promise."""

import math
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from plain import plain_logprobs, unsorted_examples
from rows import pair_rows

from data import ChatML, epoch_order, load_tokenizer
from dpo import robust_loss
from inputs import Inputs, add_adapters, demo_rows, load_chat, load_inputs, reference_tables, run_config
from loop import evaluation, make_objective, micro_batches, note_best, step_gradients, stop_signals, train, update
from model import Phi
from passes import all_logprobs, sample_answers
from runtime.files import InputError, read_json, write_json, write_jsonl
from runtime.optimizer import learning_rate
from runtime.runs import fingerprint, read_metrics, steps_saved
from runtime.settings import Config
from train import main


def config_of(objective: str, **changes) -> Config:
    losses = dict(loss="robust", beta=0.3, eps=0.2, nll_weight=0.5) if objective == "dpo" else {}
    usual = dict(stage=objective, objective=objective, device="cpu", dtype="fp32", micro_batch_size=3)
    return Config(**{**usual, **losses, **changes})


def references(examples) -> torch.Tensor:
    """A log-probability [examples, 2] of its own for every answer."""
    return torch.randn(len(examples), 2, generator=torch.Generator().manual_seed(0)) - 20


def gradient(model: Phi) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------------- one step's loss


def step(model, examples, reference, config):
    model.zero_grad()
    return step_gradients(model, examples, reference, make_objective(config), config), gradient(model)


def test_the_sft_gradient_is_that_of_the_mean_over_the_steps_tokens(tiny):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(1)
    metrics, ours = step(model, examples, None, config_of("sft"))
    model.zero_grad()
    logprobs = plain_logprobs(model, examples)[:, 0]
    loss = -logprobs.sum() / sum(len(e.completions[0]) for e in examples)
    loss.backward()
    torch.testing.assert_close(ours, gradient(model), atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx({"loss": loss.item(), "logps": logprobs.mean().item()}, rel=1e-5)


def test_the_dpo_gradient_is_that_of_the_mean_over_the_steps_pairs(tiny):
    model, examples, config = Phi.from_pretrained(tiny), unsorted_examples(2), config_of("dpo")
    reference = references(examples)
    metrics, ours = step(model, examples, reference, config)
    model.zero_grad()
    policy = plain_logprobs(model, examples)  # [7, 2]
    reward = config.beta * (policy - reference)
    margin = reward[:, 0] - reward[:, 1]
    nll = -policy[:, 0] / torch.tensor([len(e.completions[0]) for e in examples])
    loss = (robust_loss(margin, config.eps) + config.nll_weight * nll).mean()
    loss.backward()
    torch.testing.assert_close(ours, gradient(model), atol=1e-6, rtol=1e-4)
    wanted = {
        "loss": loss,
        "dpo_loss": F.softplus(-margin).mean(),
        "nll_loss": nll.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).float().mean(),
        "logps/rejected": policy[:, 1].mean(),
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx({k: v.item() for k, v in wanted.items()}, rel=1e-4)


def test_a_forward_pass_has_at_most_a_micro_batch_of_rows_of_like_length():
    examples = unsorted_examples(2)
    parts = [part for part, _, _ in micro_batches(examples, config_of("dpo"))]
    assert parts == [[0, 3, 1], [5, 6, 4], [2]]
    batches = [batch for _, batch, _ in micro_batches(examples, config_of("dpo"))]
    assert [batch.tokens.shape[0] for batch in batches] == [3, 3, 1]


@pytest.mark.parametrize("size, named", [(1, [2, 5]), (3, [1, 3, 4])])
def test_the_rows_of_the_passes_whose_loss_is_not_finite_are_named(tiny, size, named):
    """One row a pass: rows 2 and 5 themselves. Three, shortest first: the whole pass of row 4, rows 1, 4 and 2."""
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(2)
    bad = references(examples)
    if size == 1:
        bad[[2, 5], 1] = math.nan
    else:
        bad[3, 0], named = math.inf, [0, 3, 1]
    with pytest.raises(InputError) as error:
        step(model, examples, bad, config_of("dpo", micro_batch_size=size))
    rows = [
        e.where for i, e in enumerate(examples) if f"{e.where}," in str(error.value) or f"{e.where}." in str(error.value)
    ]
    assert rows == [examples[i].where for i in sorted(named)]


# --------------------------------------------------------------------------------------------------------- one whole step


def descent(model) -> torch.optim.Optimizer:
    """Two groups, as AdamW's, that wait for their learning rate."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == matrix]} for matrix in (True, False)]
    return torch.optim.SGD(groups, lr=99.0)


@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_a_step_follows_the_clipped_gradient_by_the_learning_rate(tiny, clip):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(1)
    config = config_of("sft", clip=clip, lr=0.5, warmup_steps=4)
    _, g = step(model, examples, None, config)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    model.zero_grad()
    row = update(model, descent(model), examples, None, make_objective(config), config, step=2, total=9)
    assert row["lr"] == 0.25  # the second of four warm-up steps to 0.5
    assert row["grad_norm"] == pytest.approx(g.norm().item(), rel=1e-4)
    wanted = before - 0.25 * g * min(1.0, clip / g.norm().item())
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), wanted, atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in model.parameters())  # nothing is left for the next step to add to


def test_a_gradient_that_is_not_finite_or_exactly_zero_updates_nothing(tiny):
    model, examples, config = Phi.from_pretrained(tiny), unsorted_examples(1), config_of("sft", lr=0.1, warmup_steps=0)
    before = fingerprint(model)

    def objective_of(loss):
        return lambda logprobs, lengths, reference: (loss(logprobs), {"loss": torch.tensor([0.0, 1.0])})

    infinite = objective_of(lambda logprobs: (logprobs - logprobs.detach()).abs().sqrt().sum())  # 0, of slope 0 / 0
    with pytest.raises(InputError, match="the gradient is nan.*rows.jsonl:1, .*rows.jsonl:7"):
        update(model, descent(model), examples, None, infinite, config, step=5, total=9)
    model.zero_grad()
    nothing = objective_of(lambda logprobs: 0 * logprobs.sum())
    with pytest.raises(InputError, match="the first gradient is exactly 0"):
        update(model, descent(model), examples, None, nothing, config, step=1, total=9)
    assert fingerprint(model) == before


def test_what_dropout_drops_follows_from_the_seed_and_the_step(tiny):
    examples = unsorted_examples(1)

    def norm(seed, step):
        config = config_of("sft", lora=4, lora_dropout=0.5, seed=seed, lr=0.0, warmup_steps=0)
        model = Phi.from_pretrained(tiny)
        add_adapters(model, config_of("sft", lora=4, lora_dropout=0.5))  # the same A's for every seed
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        return update(model, optimizer, examples, None, make_objective(config), config, step, total=9)["grad_norm"]

    assert norm(0, 1) == norm(0, 1)
    assert len({norm(0, 1), norm(1, 1), norm(0, 2)}) == 3


# ----------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("metric, values", [("dpo_loss", [0.7, 0.7, 0.5, 0.6]), ("debiased_accuracy", [0.5, 0.5, 0.8, 0.7])])
def test_the_best_evaluation_by_hand(metric, values):
    state, better, since = {"best_step": None, "best_value": None, "evaluations_since_best": 0}, [], []
    for step, value in zip((5, 10, 15, 20), values):
        better.append(note_best(state, step, value, metric))
        since.append(state["evaluations_since_best"])
    assert better == [True, False, True, False]  # no better than the first is not better
    assert since == [0, 1, 0, 1]
    assert state == {"best_step": 15, "best_value": values[2], "evaluations_since_best": 1}


def test_an_evaluation_measures_the_evaluation_side_from_its_own_table(tiny):
    model, examples, config = Phi.from_pretrained(tiny), unsorted_examples(2), config_of("dpo")
    inputs = Inputs(tiny, ChatML(load_tokenizer(tiny)), train=[], eval=examples, ledgers={})
    with torch.no_grad():
        policy = plain_logprobs(model, examples)
    reference = policy + torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    margin = config.beta * (policy - reference).diff(dim=1)[:, 0].neg()
    made = evaluation(model, inputs, reference, make_objective(config), config)
    accuracy = (margin > 0).float().mean().item()
    assert 0 < accuracy < 1 and made["eval_rewards/accuracies"] == pytest.approx(accuracy)
    assert made["eval_debiased_accuracy"] == pytest.approx((accuracy - 0.2) / (1 - 2 * 0.2))
    assert made["eval_rewards/margins"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert made["eval_preference_loss"] == pytest.approx(robust_loss(margin, 0.2).mean().item(), abs=1e-5)
    supervised = evaluation(model, inputs, None, make_objective(config_of("sft")), config_of("sft"))
    assert set(supervised) == {"eval_loss", "eval_logps"}


# ---------------------------------------------------------------------------------------------------------- Ctrl-C


def test_the_first_signal_is_kept_and_the_second_acts():
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == usual


# ------------------------------------------------------------------------------------------------ what a run starts from


def test_reference_tables_are_kept_by_side_model_and_compute_type(tiny, tmp_path):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(2)
    inputs = Inputs(tiny, ChatML(load_tokenizer(tiny)), train=examples[:5], eval=examples[3:], ledgers={})
    with torch.no_grad():
        wanted = plain_logprobs(model, examples)

    def tables(**changes):
        return reference_tables(config_of("dpo", out=str(tmp_path), **changes), model, inputs)

    for size in (1, 3):  # computed, then read from the disk: the size of a pass does not matter
        train, evaluation = tables(micro_batch_size=size)
        torch.testing.assert_close(train, wanted[:5], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(evaluation, wanted[3:], atol=1e-4, rtol=1e-5)
        assert len(list((tmp_path / "reference").iterdir())) == 2
    assert not torch.equal(tables(dtype="bf16")[0], train)
    model.lm_head.bias.data[0] += 1
    assert not torch.equal(tables()[0], train)
    assert len(list((tmp_path / "reference").iterdir())) == 6


def test_no_question_of_the_demo_is_asked_in_two_stages():
    everything = (("sft", "sft", "sft", 26_000), ("qat", "sft", "sft", 4_000), ("dpo", "dpo", "pairs", 100))
    asked = [
        {row["prompt"] for row in demo_rows(Config(stage=stage, objective=objective, demo_rows=n, flip_rate=0.2), kind)}
        for stage, objective, kind, n in everything
    ]
    assert [len(prompts) for prompts in asked] == [26_000, 4_000, 100]
    assert len(set().union(*asked)) == 30_100
    with pytest.raises(InputError, match="--demo-rows 4001: the demo has 4,000 questions"):
        demo_rows(Config(stage="qat", objective="sft", demo_rows=4_001), "sft")


def test_a_tokenizer_needs_an_embedding_for_its_last_id(tiny, tmp_path):
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    config = read_json(tiny / "config.json")
    for rows in (768, 767):
        write_json(tmp_path / "config.json", {**config, "vocab_size": rows})
        if rows == 768:
            assert max(load_chat(tmp_path, None).tokenizer.get_vocab().values()) == 767
    with pytest.raises(InputError, match="its ids reach 767, the model's embedding has 767 rows"):
        load_chat(tmp_path, None)


def rows_config(tmp_path, **changes):
    usual = dict(stage="sft", objective="sft", eval_share=0.5, max_length=60, max_prompt_length=24, on_bad_row="stop")
    return Config(**{**usual, "train": str(tmp_path / "train.jsonl"), **changes})


def test_both_sides_keep_to_the_limits_and_follow_the_seed(tiny, tmp_path):
    write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": f"Is {'x' * i} {i}?", "completion": "so " + "a " * i} for i in range(40)]
    )

    def sides(**changes):
        inputs = load_inputs(rows_config(tmp_path, **changes), tmp_path / "run", tiny)
        return inputs.train, inputs.eval, inputs.ledgers

    train, evaluation, ledgers = sides()
    (ledger,) = ledgers.values()
    for side in (train, evaluation):
        assert max(len(e.prompt) for e in side) == 24 and max(map(len, side)) <= 60
    assert ledger.kept == len(train) + len(evaluation) < ledger.rows == 40 and 0 < ledger.trimmed < ledger.kept
    assert [e.where for e in sides(seed=1)[1]] != [e.where for e in evaluation] == [e.where for e in sides()[1]]
    whole = sides(whole_text=True)
    for side, before in zip(whole[:2], (train, evaluation)):
        assert [(e.prompt, len(e)) for e in side] == [(b.prompt[:1], len(b)) for b in before]


def test_a_file_for_evaluation_is_read_beside_and_must_not_repeat_a_question(tiny, tmp_path):
    rows = [{"prompt": f"Say {i}", "completion": "So."} for i in range(9)]
    write_jsonl(tmp_path / "train.jsonl", rows[:6])
    write_jsonl(tmp_path / "eval.jsonl", rows[6:])
    config = rows_config(tmp_path, eval=str(tmp_path / "eval.jsonl"))
    inputs = load_inputs(config, tmp_path / "run", tiny)
    assert [e.question for e in inputs.train] == [row["prompt"] for row in rows[:6]]
    assert [e.question for e in inputs.eval] == [row["prompt"] for row in rows[6:]]
    assert [ledger.kept for ledger in inputs.ledgers.values()] == [6, 3]
    write_jsonl(tmp_path / "eval.jsonl", rows[5:])
    with pytest.raises(InputError, match="1 evaluation rows ask a question of the training rows"):
        load_inputs(config, tmp_path / "run", tiny)


# ---------------------------------------------------------------------------------------------------------- whole runs


def run_stage(stage, tiny, tmp_path, rows, flags):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    files = f"--model {tiny} --train {tmp_path}/rows.jsonl --out {tmp_path} --name run --device cpu"
    assert main(["--stage", stage, *files.split(), *flags.split()]) == 0
    return tmp_path / "run"


def test_a_run_takes_its_rows_in_order_and_measures_and_saves_when_it_should(tiny, tmp_path):
    """With a learning rate of next to nothing the model stays what it is, so the mean log-probability of a step's chosen
    answers tells which rows it saw."""
    flags = "--lr 1e-12 --warmup-steps 3 --epochs 2 --batch-size 5 --micro-batch-size 2 --seed 3"
    flags += " --samples 3 --max-length 64 --max-prompt-length 48"
    run = run_stage("dpo", tiny, tmp_path, pair_rows(40), flags + " --eval-every 3 --save-every 5 --keep 2")
    rows, config = read_metrics(run), run_config(run)
    steps = [row for row in rows if "loss" in row]
    inputs = load_inputs(config, run, tiny)
    count = len(inputs.train)
    assert count % 5 and count + len(inputs.eval) == 40
    table = all_logprobs(Phi.from_pretrained(tiny), inputs.train, 8, "cpu", "fp32", "")

    order = [batch for epoch in (0, 1) for batch in epoch_order(inputs.train, 5, 3, epoch)]
    assert [row["step"] for row in steps] == list(range(1, len(order) + 1))
    for row, batch in zip(steps, order):
        assert row["logps/chosen"] == pytest.approx(table[batch, 0].mean().item(), abs=1e-4)
        assert row["logps/rejected"] == pytest.approx(table[batch, 1].mean().item(), abs=1e-4)
        assert row["drift/absolute"] < 1e-4  # from the rows' own lines of the reference table
        assert row["lr"] == learning_rate(row["step"] - 1, len(order), config) and row["tokens_per_second"] > 0
    assert steps[0]["lr"] == pytest.approx(1e-12 / 3) and steps[-1]["lr"] > 0

    last = len(order)
    assert last % 3 and last % 5  # the last step is evaluated and saved whatever its number
    evaluations = [row for row in rows if "eval_loss" in row]
    assert all(row["eval_drift/absolute"] < 1e-4 for row in evaluations)
    evaluated = [row["step"] for row in evaluations]
    assert evaluated == [*range(3, last, 3), last]
    assert rows.index(steps[3]) == 4  # the evaluation after step 3 is logged before step 4
    saved = sorted({3, *range(5, last, 5), last})  # 3 is the best: nothing later is better
    assert steps_saved(run) == [3, *saved[-2:]]
    results = read_json(run / "results.json")
    assert results["best_step"] == 3 and results["best_value"] == evaluations[0]["eval_debiased_accuracy"]
    assert results["before"]["metrics"]["ties"] == 1  # the model before training is the reference
    answers, _ = sample_answers(Phi.from_pretrained(tiny), inputs.chat, inputs.eval[:3], 64 - 48, 1.0, seed=3)
    assert results["before"]["answers"] == answers == results["after"]["answers"]

    # Cut off after step 10, in the second epoch: the rest of it runs again, and the best step is still known.
    shutil.rmtree(run / "checkpoints" / f"step-{last}")
    (run / "results.json").unlink()
    assert main(f"--stage dpo --out {tmp_path} --name run --resume".split()) == 0
    timeless = [[{**row, "tokens_per_second": None} for row in curve] for curve in (rows, read_metrics(run))]
    assert timeless[0] == timeless[1]
    again = read_json(run / "results.json")
    assert [again[name] for name in ("best_step", "best_value")] == [3, results["best_value"]]


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradient_checkpointing_runs_a_block_once_more(tiny, tmp_path, recomputed):
    """One pass to train on, one to evaluate, and the recomputed one."""
    model, examples, runs = Phi.from_pretrained(tiny), unsorted_examples(1), []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: runs.append(1))
    settings = dict(
        batch_size=7, micro_batch_size=7, max_steps=1, eval_every=1, save_every=1, metric="loss", adam_beta2=0.99
    )
    config = config_of("sft", lr=1e-3, warmup_steps=0, gradient_checkpointing=recomputed, **settings)
    inputs = Inputs(tiny, ChatML(load_tokenizer(tiny)), examples, examples, ledgers={})
    train(config, tmp_path, model, inputs, (None, None), 0)
    assert len(runs) == (3 if recomputed else 2)


def test_the_model_that_a_run_leaves_is_the_best_that_it_evaluated(tiny, tmp_path):
    """Twelve rows are soon overfitted: the evaluation loss falls and rises again. No step but the best and the last is
    saved."""
    rows = [{"prompt": f"Say {i}", "completion": f"Here it is: {i * i} of {i}"} for i in range(16)]
    flags = "--lr 3e-3 --max-steps 40 --batch-size 8 --micro-batch-size 4 --eval-every 2 --save-every 100 --patience 3"
    run = run_stage("sft", tiny, tmp_path, rows, flags + " --warmup-steps 0 --samples 0 --eval-share 0.3")
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row}
    results = read_json(run / "results.json")
    best = results["best_step"]
    assert losses[best] == results["best_value"] == min(losses.values())
    assert 2 < best and max(losses) == best + 2 * 3 < 40  # three evaluations without a better one, and it stops
    assert results["after"]["metrics"]["loss per token"] == pytest.approx(losses[best], rel=1e-5)
    config = run_config(run)
    inputs = load_inputs(config, run, tiny)
    before = evaluation(Phi.from_pretrained(tiny), inputs, None, make_objective(config), config)
    assert results["before"]["metrics"]["loss per token"] == pytest.approx(before["eval_loss"], rel=1e-5)
