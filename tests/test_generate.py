"""Answers to many prompts: each is that of its prompt alone, and what is sampled follows seed, temperature and batch. A
step that is recorded as a CUDA graph gives the same tokens, without making the CPU wait."""

import pytest
import torch
from plain import unsorted_examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate as generate_file
from data import ChatML, load_tokenizer
from generate import BUCKET, KVCache, RecordedStep, generate, rows_that_fit, sample, sample_answers, stream
from model import Phi, PhiConfig
from quant import quantize_model
from runtime import memory


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


def test_the_race_draws_from_the_softmax():
    """Pearson's chi-square of 20,000 draws from six probabilities has 5 degrees of freedom: above 20.5 once in 1,000. And
    torch.multinomial draws the same tokens, since it runs the same race."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    many = p.log().expand(20_000, 6)
    tokens = sample(many, 1.0, 1.0, torch.Generator().manual_seed(0))
    expected = 20_000 * p
    assert ((tokens.bincount(minlength=6) - expected) ** 2 / expected).sum() < 20.5
    drawn = torch.multinomial(many.softmax(dim=-1), 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens, drawn[:, 0])


# ------------------------------------------------------------------------------------------------------- a recorded step


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("bucket", [8, 64])
def test_a_recorded_step_gives_the_plain_tokens(model, monkeypatch, settings, bucket):
    """On the CPU, where it is computed with the graph's shapes: prompts of unequal and of equal lengths, buckets that fill
    up, stop tokens."""
    monkeypatch.setattr(generate_file, "BUCKET", bucket)
    for asked in (prompts(), prompts(1) * 3, [[5] * (bucket - 1)], [[5] * bucket, [7]]):
        plain = generate(model, asked, 20, **settings)
        assert generate(model, asked, 20, **settings, graph=True) == plain
        stops = (plain[0][4], plain[-1][2])
        assert generate(model, asked, 20, **settings, stop_tokens=stops, graph=True) == generate(
            model, asked, 20, **settings, stop_tokens=stops
        )


@pytest.mark.parametrize("to", ["int8", "nf4", "nf4-double"])
def test_a_recorded_step_runs_quantized_layers(tiny, to):
    model = quantize_model(Phi.from_pretrained(tiny), to)
    assert generate(model, prompts(), 12, graph=True) == generate(model, prompts(), 12)


def test_a_recorded_answer_may_fill_the_window(tiny):
    model = Phi.from_pretrained(tiny)
    room = model.config.max_position_embeddings
    prompt = [5] * (room - 3)
    assert generate(model, [prompt], 3, graph=True) == generate(model, [prompt], 3)


def test_stop_tokens_are_looked_for_every_16_steps(model):
    (ids,) = generate(model, prompts(1), 40)
    for stop, steps in ((ids[0], 1), (ids[1], 17)):
        assert ids.index(stop) < steps
        assert len(list(stream(model, prompts(1), 40, stop_tokens=(stop,), graph=True))) == steps


SMALL = PhiConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)


class Calls(TorchDispatchMode):
    """The operations that are launched, with the shapes of what they are given and of what they give."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), [tuple(x.shape) for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]))
        return result

    def names(self):
        return {name.split(".")[1] for name, _ in self.seen}


WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "multinomial",
    "unique_dim",
}  # the CPU waits for these


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()  # inference mode would show composite operations, but not what they are made of
def test_every_recorded_step_launches_the_same_and_waits_for_nothing(dtype):
    model, rows = Phi(SMALL).init_weights(0).to(dtype), torch.arange(3)
    cache = KVCache(2 * BUCKET)
    cache.slot, cache.used = slice(0, 9), 9
    model.hidden(torch.randint(300, (3, 9)), cache=cache)
    step, token, made = RecordedStep(model, cache, rows), torch.tensor([1, 2, 3]), []
    for i in range(3):
        with Calls() as calls:
            hidden = step(token, 7 + rows + i, 10 + i)  # [3, D]; the rows have 7, 8 and 9 tokens
            token = sample(model.lm_head(hidden), 1.0, 0.9, torch.Generator())
        made.append(calls.seen)
        assert hidden.dtype == dtype and not calls.names() & WAITING
    assert made[1] == made[2] and len(made[1]) > 50  # the first call also chooses the bucket
    assert all(stored.dtype == dtype for pair in cache.layers.values() for stored in pair)
    with Calls() as calls:
        hidden.sum().item()
    assert calls.names() & WAITING


# ----------------------------------------------------------------------------------------------------------- how many rows


def test_keys_and_values_take_at_most_half_of_the_free_memory(monkeypatch):
    """Phi-2: 2 x 32 layers x 2,560 numbers a slot, 327,680 bytes in bf16; 512 slots take 168 MB."""
    model = Phi(SMALL).bfloat16()
    model.config = PhiConfig()
    monkeypatch.setattr(memory, "resident", lambda: 3_000_000_000)
    for free, rows in (
        (2 * 64 * 512 * 327_680, 64),
        (2 * 64 * 512 * 327_680 - 1, 32),
        (2 * 512 * 327_680, 1),
        (0, 1),
        (-9, 1),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: 3_000_000_000 + free)
        assert rows_that_fit(model, 500) == rows
    assert rows_that_fit(model.float(), 500) == 1
