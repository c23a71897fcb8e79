"""Answers to many prompts: each is that of its prompt alone, and what is sampled follows seed, temperature and batch."""

import pytest
from plain import unsorted_examples

from data import ChatML, load_tokenizer
from generate import generate, sample_answers
from model import Phi


@pytest.fixture(scope="module")
def model(tiny):
    return Phi.from_pretrained(tiny)


@pytest.fixture(scope="module")
def chat(tiny):
    return ChatML(load_tokenizer(tiny))


def prompts(count=7):
    return [e.prompt for e in unsorted_examples(1, count)]


def test_greedy_answers_are_those_of_each_prompt_alone(model, chat):
    answers, ended = sample_answers(model, chat, prompts(), 6, 0.0, seed=0, batch_size=2)
    alone = [generate(model, [prompt], 6, stop_tokens=(chat.end,))[0] for prompt in prompts()]
    assert answers == [chat.decode(ids) for ids in alone] and len(set(answers)) > 1
    assert ended == [len(ids) < 6 for ids in alone]


def test_an_answer_that_is_cut_has_not_ended(model, chat, tiny):
    assert sample_answers(model, chat, prompts(2), 1, 0.0, seed=0)[1] == [False, False]
    silent = Phi.from_pretrained(tiny)
    silent.lm_head.bias.data[chat.end] = 1e4
    assert sample_answers(silent, chat, prompts(2), 1, 0.0, seed=0) == (["", ""], [True, True])


def test_what_is_sampled_depends_on_temperature_seed_and_batch(model, chat):
    twice = prompts(1) * 2

    def sampled(temperature, seed, batch_size):
        return sample_answers(model, chat, twice, 8, temperature, seed, batch_size)[0]

    first = sampled(1.0, 0, 1)
    assert first[0] != first[1]  # the second batch does not repeat the draws of the first
    assert sampled(1.0, 0, 1) == first
    assert sampled(1.0, 7, 1)[0] != first[0]
    assert sampled(0.0, 0, 1) == sampled(0.0, 7, 1) != first
    assert sampled(0.3, 0, 1) != first
