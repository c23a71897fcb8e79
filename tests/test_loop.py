"""The training loop, part by part against its definitions, and short runs of it against what their settings promise."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain import plain_logprobs, unsorted_examples
from rows import pair_rows

from data import ChatML, Example, by_length, epoch_order, load_tokenizer
from dpo import robust_loss
from generate import sample_answers
from lora import add_lora
from model import Phi, PhiConfig, all_logprobs
from prepare.rows import Inputs, load_inputs
from runtime import parallel
from runtime.files import InputError, read_json, write_jsonl
from runtime.flags import settle
from runtime.optimizer import make_optimizer
from runtime.runs import load_chat, read_metrics, steps_saved, stored_settings
from runtime.weights import fingerprint
from train import (
    check_finite,
    evaluate,
    learning_rate,
    main,
    note_best,
    objective,
    prepare,
    reference_table,
    step_gradients,
    train,
)


def settings_of(stage, **changes):
    usual = dict(model="x", train="rows.jsonl", device="cpu", dtype="fp32", micro_batch_size=3)
    losses = dict(loss="robust", beta=0.3, eps=0.2, nll_weight=0.5) if stage == "dpo" else {}
    return settle(stage, {**usual, **losses, **changes}).settings


def inputs_of(tiny, train, held_out):
    return Inputs(ChatML(load_tokenizer(tiny)), train, held_out, rows=[], ledgers={})


def references(examples) -> torch.Tensor:
    """A log-probability [examples, 2] of its own for every answer."""
    return torch.randn(len(examples), 2, generator=torch.Generator().manual_seed(0)) - 20


def gradient(model: Phi) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------------- one step's loss


def step(model, examples, reference, settings):
    """Metrics and the gradient [parameters] of a step."""
    model.zero_grad()
    return step_gradients(model, examples, reference, settings), gradient(model)


def test_the_sft_gradient_is_that_of_the_mean_over_the_steps_tokens(tiny):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(1)
    metrics, ours = step(model, examples, None, settings_of("sft"))
    model.zero_grad()
    logprobs = plain_logprobs(model, examples)[:, 0]
    loss = -logprobs.sum() / sum(len(e.completions[0]) for e in examples)
    loss.backward()
    torch.testing.assert_close(ours, gradient(model), atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx({"loss": loss.item(), "logps": logprobs.mean().item()}, rel=1e-5)


def test_the_dpo_gradient_is_that_of_the_mean_over_the_steps_pairs(tiny):
    model, examples, settings = Phi.from_pretrained(tiny), unsorted_examples(2), settings_of("dpo")
    reference = references(examples)
    metrics, ours = step(model, examples, reference, settings)
    model.zero_grad()
    policy = plain_logprobs(model, examples)  # [7, 2]
    reward = settings.beta * (policy - reference)
    margin = reward[:, 0] - reward[:, 1]
    nll = -policy[:, 0] / torch.tensor([len(e.completions[0]) for e in examples])
    loss = (robust_loss(margin, settings.eps) + settings.nll_weight * nll).mean()
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


def test_a_forward_pass_has_at_most_a_micro_batch_of_rows_of_similar_length():
    assert parallel.deal(by_length(unsorted_examples(2)), 3) == [[0, 3, 1], [5, 6, 4], [2]]


@pytest.mark.parametrize("size, named", [(1, [2, 5]), (3, [0, 1, 3])])
def test_the_rows_of_the_passes_whose_loss_is_not_finite_are_named(tiny, size, named):
    """One row a pass: rows 2 and 5 themselves. Three, shortest first: the whole pass of row 3, rows 0, 3 and 1."""
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(2)
    bad = references(examples)
    if size == 1:
        bad[[2, 5], 1] = math.nan
    else:
        bad[3, 0] = math.inf
    with pytest.raises(InputError) as error:
        step(model, examples, bad, settings_of("dpo", micro_batch_size=size))
    rows = [
        e.where for i, e in enumerate(examples) if f"{e.where}," in str(error.value) or f"{e.where}." in str(error.value)
    ]
    assert rows == [examples[i].where for i in named]


def test_of_many_rows_that_are_not_finite_five_are_named_and_the_others_counted():
    with pytest.raises(InputError, match="The batch held f:0, f:1, f:2, f:3, f:4 and 1,195 more. If they are sound"):
        check_finite("loss", math.nan, [f"f:{i}" for i in range(1200)])


# -------------------------------------------------------------------------------------- the step does not depend on its cut


def chat_examples(tiny, stage: str) -> list[Example]:
    """Eight examples of all different lengths."""
    chat = ChatML(load_tokenizer(tiny))
    return [
        Example(
            chat.prompt([{"role": "user", "content": f"Question {'x' * i}?"}]),
            [chat.reply("yes " * (i + 1)), chat.reply("no")][: 1 if stage == "sft" else 2],
        )
        for i in range(8)
    ]


def assert_same_step(a: tuple[dict, torch.Tensor], b: tuple[dict, torch.Tensor]) -> None:
    torch.testing.assert_close(a[1], b[1], atol=1e-6, rtol=1e-5)
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-5)


def test_micro_batches_of_one_and_of_eight_give_the_same_gradient_and_metrics(tiny):
    examples, model = chat_examples(tiny, "dpo"), Phi.from_pretrained(tiny)
    reference = references(examples)
    one, eight = (step(model, examples, reference, settings_of("dpo", micro_batch_size=size)) for size in (1, 8))
    assert_same_step(one, eight)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one_with_one_graph_for_all_layers_and_lengths(tiny, tmp_path):
    from torch._dynamo.utils import counters

    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    examples, settings = chat_examples(tiny, "dpo"), settings_of("dpo", micro_batch_size=5)
    shape = dict(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model, reference = Phi(PhiConfig(**shape)).init_weights(0), references(examples)
    eager = step(model, examples, reference, settings)
    counters.clear()
    prepare(replace(settings, compile=True), tmp_path, model, start=0)
    assert_same_step(step(model, examples, reference, settings), eager)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    model.gradient_checkpointing = True
    assert_same_step(step(model, examples, reference, settings), eager)


# --------------------------------------------------------------------------------------------------------- one whole step


def descent(model) -> torch.optim.Optimizer:
    """Two groups, as AdamW's, that wait for their learning rate."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == matrix]} for matrix in (True, False)]
    return torch.optim.SGD(groups, lr=99.0)


def counters_at(step):
    return {"step": step, "best_step": None, "best_value": None, "evaluations_since_best": 0}


def one_step(tiny, run, model, number, **changes):
    """The line of metrics.jsonl of step `number`, the last of a run, which plain gradient descent takes in `model`."""
    examples = unsorted_examples(1)
    settings = settings_of("sft", batch_size=7, max_steps=number, **changes)
    inputs = inputs_of(tiny, examples, examples)
    assert train(settings, run, model, descent(model), inputs, {}, counters_at(number - 1)) is None
    return next(row for row in read_metrics(run) if "loss" in row)


@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_a_step_follows_the_clipped_gradient_by_the_learning_rate(tiny, tmp_path, clip):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(1)
    _, g = step(model, examples, None, settings_of("sft"))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    model.zero_grad()
    row = one_step(tiny, tmp_path, model, 2, clip=clip, lr=0.5, warmup_steps=4)
    assert row["step"] == 2 and row["lr"] == 0.25  # the second of four warm-up steps to 0.5
    assert row["grad_norm"] == pytest.approx(g.norm().item(), rel=1e-4)
    wanted = before - 0.25 * g * min(1.0, clip / g.norm().item())
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), wanted, atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in model.parameters())  # nothing is left for the next step to add to


@pytest.mark.parametrize(
    "number, factor, message",
    [(5, math.nan, r"the gradient is nan.*rows.jsonl:\d, .*rows.jsonl:\d"), (1, 0.0, "the first gradient is exactly 0")],
)
def test_a_gradient_that_is_not_finite_or_exactly_zero_updates_nothing(tiny, tmp_path, number, factor, message):
    model = Phi.from_pretrained(tiny)
    before = fingerprint(model)
    for p in model.parameters():
        p.register_hook(lambda grad: factor * grad)
    with pytest.raises(InputError, match=message):
        one_step(tiny, tmp_path, model, number, lr=0.1, warmup_steps=0)
    assert fingerprint(model) == before
    assert steps_saved(tmp_path) == [] and read_metrics(tmp_path) == []


def test_new_adapters_follow_from_the_seed(tiny, tmp_path):
    first, again, other = (
        prepare(settings_of("sft", lora=4, seed=seed), tmp_path, Phi.from_pretrained(tiny), start=0)[0] for seed in (0, 0, 1)
    )
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_what_dropout_drops_follows_from_the_seed_and_the_step_and_an_evaluation_drops_nothing(tiny):
    examples = unsorted_examples(1)
    model = add_lora(Phi.from_pretrained(tiny), 4, dropout=0.5)

    def drawn(seed, step):
        model.zero_grad()
        step_gradients(model, examples, None, settings_of("sft", lora=4, seed=seed), step)
        return sum(p.grad.abs().sum().item() for p in model.parameters() if p.requires_grad)

    assert drawn(0, 1) == drawn(0, 1)
    assert len({drawn(0, 1), drawn(1, 1), drawn(0, 2)}) == 3
    for p in model.parameters():
        p.data += 0.01 * p.requires_grad
    first, second = (evaluate(model, examples, None, settings_of("sft", lora=4)) for _ in range(2))
    assert first == second and not model.training


# ----------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("metric, values", [("dpo_loss", [0.7, 0.7, 0.5, 0.6]), ("debiased_accuracy", [0.5, 0.5, 0.8, 0.7])])
def test_the_best_evaluation_by_hand(metric, values):
    state, better, since = counters_at(0), [], []
    for number, value in zip((5, 10, 15, 20), values):
        state["step"] = number
        better.append(note_best(state, value, metric))
        since.append(state["evaluations_since_best"])
    assert better == [True, False, True, False]  # no better than the first is not better
    assert since == [0, 1, 0, 1]
    assert state == {"step": 20, "best_step": 15, "best_value": values[2], "evaluations_since_best": 1}


def test_an_evaluation_measures_the_held_out_side_from_its_own_table(tiny):
    model, examples, settings = Phi.from_pretrained(tiny), unsorted_examples(2), settings_of("dpo")
    with torch.no_grad():
        policy = plain_logprobs(model, examples)
    reference = policy + torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    margin = settings.beta * (policy - reference).diff(dim=1)[:, 0].neg()
    made = evaluate(model, examples, reference, settings)
    accuracy = (margin > 0).float().mean().item()
    assert 0 < accuracy < 1 and made["eval_rewards/accuracies"] == pytest.approx(accuracy)
    assert made["eval_debiased_accuracy"] == pytest.approx((accuracy - 0.2) / (1 - 2 * 0.2))
    assert made["eval_rewards/margins"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert made["eval_preference_loss"] == pytest.approx(robust_loss(margin, 0.2).mean().item(), abs=1e-5)
    supervised = evaluate(model, unsorted_examples(1), None, settings_of("sft"))
    assert set(supervised) == {"eval_loss", "eval_logps"}


def test_the_objective_is_a_mean_over_all_tokens_or_over_all_pairs():
    """SFT: 6 nats in 4 tokens. DPO: the margins are 0.5 and -2."""

    def means(logprobs, lengths, reference, settings):
        _, sums = objective(torch.tensor(logprobs), torch.tensor(lengths), reference, settings)
        return {name: (total / count).item() for name, (total, count) in sums.items()}

    assert means([-1.0, -5.0], [1, 3], None, settings_of("sft")) == {"loss": 1.5, "logps": -3.0}
    settings = settings_of("dpo", loss="sigmoid", beta=0.5, eps=None, nll_weight=0.0)
    reference = torch.tensor([[-2.0, -3.0], [-3.0, -5.0]])
    made = means([-1.0, -3.0, -4.0, -2.0], [1, 2, 2, 1], reference, settings)
    assert made["rewards/margins"] == (0.5 - 2) / 2 and made["rewards/accuracies"] == 0.5
    assert made["rewards/chosen"] == 0.0 and made["rewards/rejected"] == 0.75
    assert made["nll_loss"] == (1 / 1 + 4 / 2) / 2


# ---------------------------------------------------------------------------------------------------------- the reference


def test_reference_tables_are_kept_by_side_model_and_compute_type(tiny, tmp_path):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(2)
    inputs = inputs_of(tiny, examples[:5], examples[3:])
    with torch.no_grad():
        wanted = plain_logprobs(model, examples)

    def tables(**changes):
        settings = settings_of("dpo", out=str(tmp_path), **changes)
        sides = ((inputs.train, "train"), (inputs.held_out, "held out"))
        return [reference_table(settings, model, fingerprint(model), *side) for side in sides]

    for size in (1, 3):  # computed, then read from the disk: the size of a pass does not matter
        train, held_out = tables(micro_batch_size=size)
        torch.testing.assert_close(train, wanted[:5], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(held_out, wanted[3:], atol=1e-4, rtol=1e-5)
        assert len(list((tmp_path / "reference").iterdir())) == 2
    inputs.train = [Example(e.prompt, e.completions[::-1]) for e in examples[:5]]  # the same prompts, other answers
    torch.testing.assert_close(tables()[0], wanted[:5].flip(1), atol=1e-4, rtol=1e-5)
    inputs.train = examples[:5]
    assert not torch.equal(tables(dtype="bf16")[0], train)
    model.lm_head.bias.data[0] += 1
    assert not torch.equal(tables()[0], train)
    assert len(list((tmp_path / "reference").iterdir())) == 7


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
    rows, settings = read_metrics(run), stored_settings(run)
    steps = [row for row in rows if "loss" in row]
    inputs = load_inputs(settings, load_chat(tiny, ""))
    count = len(inputs.train)
    assert count % 5 and count + len(inputs.held_out) == 40
    table = all_logprobs(Phi.from_pretrained(tiny), inputs.train, 8, "cpu", "fp32", "")

    order = [batch for epoch in (0, 1) for batch in epoch_order(inputs.train, 5, 3, epoch)]
    assert [row["step"] for row in steps] == list(range(1, len(order) + 1))
    for row, batch in zip(steps, order):
        assert row["logps/chosen"] == pytest.approx(table[batch, 0].mean().item(), abs=1e-4)
        assert row["logps/rejected"] == pytest.approx(table[batch, 1].mean().item(), abs=1e-4)
        assert row["drift/absolute"] < 1e-4  # from the rows' own lines of the reference table
        assert row["lr"] == learning_rate(row["step"] - 1, len(order), settings) and row["tokens_per_second"] > 0
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
    # Both models give the held-out side's reference log-probabilities, so every margin is 0.
    assert results["before"]["metrics"]["ties"] == 1 == results["after"]["metrics"]["ties"]
    prompts = [e.prompt for e in inputs.held_out[:3]]
    answers, _ = sample_answers(Phi.from_pretrained(tiny), inputs.chat, prompts, 64 - 48, 1.0, seed=3)
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
    model, examples, passes = Phi.from_pretrained(tiny), unsorted_examples(1), []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing = recomputed
    settings = settings_of("sft", lr=1e-3, warmup_steps=0, batch_size=7, micro_batch_size=7, max_steps=1, eval_every=1)
    inputs = inputs_of(tiny, examples, examples)
    train(settings, tmp_path, model, make_optimizer(model, settings), inputs, {}, counters_at(0))
    assert len(passes) == (3 if recomputed else 2)


def test_the_model_that_a_run_leaves_is_the_best_that_it_evaluated(tiny, tmp_path):
    """Twelve rows are soon overfitted: the evaluation loss falls and rises again. A later step is saved too."""
    rows = [{"prompt": f"Say {i}", "completion": f"Here it is: {i * i} of {i}"} for i in range(16)]
    flags = "--lr 3e-3 --max-steps 40 --batch-size 8 --micro-batch-size 4 --eval-every 2 --save-every 5 --patience 3"
    run = run_stage("sft", tiny, tmp_path, rows, flags + " --warmup-steps 0 --samples 0 --eval-share 0.3")
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row}
    results = read_json(run / "results.json")
    best = results["best_step"]
    assert losses[best] == results["best_value"] == min(losses.values())
    assert best % 5 and steps_saved(run)[-1] > best
    assert 2 < best and max(losses) == best + 2 * 3 < 40  # three evaluations without a better one, and it stops
    assert results["after"]["metrics"]["loss per token"] == pytest.approx(losses[best], rel=1e-5)
    settings = stored_settings(run)
    before = evaluate(Phi.from_pretrained(tiny), load_inputs(settings, load_chat(tiny, "")).held_out, None, settings)
    assert results["before"]["metrics"]["loss per token"] == pytest.approx(before["eval_loss"], rel=1e-5)


def test_a_run_that_was_killed_after_it_stopped_early_does_not_train_on(tiny, tmp_path):
    rows = [{"prompt": f"Say {i}", "completion": f"Here it is: {i * i} of {i}"} for i in range(16)]
    flags = "--lr 3e-3 --max-steps 40 --batch-size 8 --micro-batch-size 8 --eval-every 2 --patience 1"
    run = run_stage("sft", tiny, tmp_path, rows, flags + " --warmup-steps 0 --samples 0 --eval-share 0.3")
    logged, results = read_metrics(run), read_json(run / "results.json")
    assert logged[-1]["step"] == steps_saved(run)[-1] < 40
    (run / "results.json").unlink()
    assert main(f"--stage sft --out {tmp_path} --name run --resume".split()) == 0
    assert read_metrics(run) == logged
    assert read_json(run / "results.json") | {"memory": None} == results | {"memory": None}
