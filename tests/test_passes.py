"""Forward passes over a data set: every row keeps its own number, and answers follow seed, temperature and batch."""

import pytest
import torch
from plain import plain_logprobs, unsorted_examples

from data import ChatML, Example, load_tokenizer
from loop import make_objective
from model import Phi, generate
from passes import all_logprobs, completion_lengths, divergence, evaluate, flips, grades, sample_answers
from quant import quantize_model
from runtime.settings import Config


@pytest.fixture(scope="module")
def model(tiny):
    return Phi.from_pretrained(tiny)


@pytest.fixture(scope="module")
def chat(tiny):
    return ChatML(load_tokenizer(tiny))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_table_is_in_the_order_of_the_examples(model, batch_size):
    """The batches are made of rows sorted by length."""
    examples = unsorted_examples(2)
    table = all_logprobs(model, examples, batch_size, "cpu", "fp32", "")
    torch.testing.assert_close(table, plain_logprobs(model, examples), atol=1e-4, rtol=1e-5)
    assert table.dtype == torch.float32 and not table.requires_grad


def test_bf16_rounds_the_products_a_little(model):
    examples = unsorted_examples(2)
    low, full = (all_logprobs(model, examples, 3, "cpu", dtype, "") for dtype in ("bf16", "fp32"))
    assert 0 < (low - full).abs().max() < 0.01 * full.abs().max()


def test_divergence_weighs_tokens_alike_in_short_and_long_answers(model):
    other, examples = quantize_model(Phi.from_pretrained(model.origin[0]), "nf2"), unsorted_examples(2)
    kl, agree, loss = [], [], []
    for e in examples:
        for completion in e.completions:
            with torch.no_grad():
                p, q = (m(torch.tensor([e.prompt + completion])).log_softmax(-1)[0] for m in (model, other))
            p, q = p[len(e.prompt) - 1 : -1], q[len(e.prompt) - 1 : -1]
            kl += (p.exp() * (p - q)).sum(-1).tolist()
            agree += (p.argmax(-1) == q.argmax(-1)).tolist()
            loss += (-q[range(len(completion)), completion]).tolist()
    mean = {name: sum(values) / len(values) for name, values in (("kl", kl), ("top 1", agree), ("loss", loss))}
    assert divergence(model, other, examples, batch_size=3, device="cpu") == pytest.approx(mean, rel=1e-4)
    assert 0 < mean["top 1"] < 1


def test_lengths_and_flips_of_examples():
    examples = [Example([1, 2], [[3], [4, 5]], extra={"flipped": 0}), Example([6], [[7, 8, 9], [1]], extra={"flipped": 1})]
    assert completion_lengths(examples).tolist() == [1, 2, 3, 1]
    assert flips(examples).tolist() == [False, True]
    assert flips([*examples, Example([1], [[2], [3]])]) is None


def test_evaluation_is_a_mean_over_all_tokens_or_over_all_pairs():
    """SFT: 6 nats in 4 tokens. DPO: the margins are 0.5 and -2."""
    answers = [Example([1], [[2]]), Example([1], [[2, 3, 4]])]
    made = evaluate(make_objective(Config(objective="sft")), torch.tensor([[-1.0], [-5.0]]), None, answers)
    assert made == {"eval_loss": 1.5, "eval_logps": -3.0}

    objective = make_objective(Config(objective="dpo", loss="sigmoid", beta=0.5, nll_weight=0.0))
    pairs = [Example([1], [[2], [3, 4]]), Example([1], [[2, 3], [4]])]
    policy, reference = torch.tensor([[-1.0, -3.0], [-4.0, -2.0]]), torch.tensor([[-2.0, -3.0], [-3.0, -5.0]])
    made = evaluate(objective, policy, reference, pairs)
    assert made["eval_rewards/margins"] == (0.5 - 2) / 2 and made["eval_rewards/accuracies"] == 0.5
    assert made["eval_rewards/chosen"] == 0.0 and made["eval_rewards/rejected"] == 0.75
    assert made["eval_nll_loss"] == (1 / 1 + 4 / 2) / 2


# -------------------------------------------------------------------------------------------------------------- answers


def test_greedy_answers_are_those_of_each_prompt_alone(model, chat):
    asked = unsorted_examples(1)
    answers, ended = sample_answers(model, chat, asked, 6, 0.0, seed=0, batch_size=2)
    alone = [generate(model, [e.prompt], 6, stop_tokens=(chat.end,))[0] for e in asked]
    assert answers == [chat.decode(ids) for ids in alone] and len(set(answers)) > 1
    assert ended == [len(ids) < 6 for ids in alone]


def test_an_answer_that_is_cut_has_not_ended(model, chat, tiny):
    asked = unsorted_examples(1, count=2)
    assert sample_answers(model, chat, asked, 1, 0.0, seed=0)[1] == [False, False]
    silent = Phi.from_pretrained(tiny)
    silent.lm_head.bias.data[chat.end] = 1e4
    assert sample_answers(silent, chat, asked, 1, 0.0, seed=0) == (["", ""], [True, True])


def test_what_is_sampled_depends_on_temperature_seed_and_batch(model, chat):
    twice = unsorted_examples(1, count=1) * 2

    def sampled(temperature, seed, batch_size):
        return sample_answers(model, chat, twice, 8, temperature, seed, batch_size)[0]

    first = sampled(1.0, 0, 1)
    assert first[0] != first[1]  # the second batch does not repeat the draws of the first
    assert sampled(1.0, 0, 1) == first
    assert sampled(1.0, 7, 1)[0] != first[0]
    assert sampled(0.0, 0, 1) == sampled(0.0, 7, 1) != first
    assert sampled(0.3, 0, 1) != first


def test_grades_tell_the_method_from_the_number():
    answer = "Force: F = m * a = 7 * 8 = 56 N."
    examples = [Example([1], [], extra={"answer": answer, "kind": "force"})] * 3
    answers = [answer, "Force: F = m * a = 7 * 8 = 57 N.", "Force: F = m + a = 7 + 8 = 15 N."]
    assert grades(answers, examples) == {
        "right method": [True, True, False],
        "right method and number": [True, False, False],
    }
    assert grades(answers, [*examples[:2], Example([1], [])]) == {}
