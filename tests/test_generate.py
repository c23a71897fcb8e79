"""Answers to many prompts: each is that of its prompt alone, and what is sampled follows seed, temperature and batch. A
step that is recorded as a CUDA graph gives the same tokens, without making the CPU wait."""

import pytest
import torch
from plain import make_phi, unsorted_examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate as generate_file
from data import ChatML, load_tokenizer
from generate import BUCKET, KVCache, RecordedStep, generate, output_logits, rows_that_fit, sample, sample_answers, stream
from model import Phi, PhiConfig
from quant import quantize_layer, quantize_model
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


# ----------------------------------------------------------------------------------------------------------- generation

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7]]


@torch.no_grad()
def slow_greedy(model, prompt, steps):
    """No cache: the whole text through the network for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("key_value_heads", [2, 1])
def test_cached_generation_equals_the_uncached_argmax_loop(key_value_heads):
    model = make_phi(num_key_value_heads=key_value_heads)
    expected = [slow_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert generate(model, PROMPTS, 12) == expected  # ragged batch
    assert [generate(model, [prompt], 12)[0] for prompt in PROMPTS] == expected  # one by one
    assert generate(model, [PROMPTS[0], PROMPTS[3]], 12) == [expected[0], expected[3]]  # equal lengths


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_the_output_layer_of_a_few_rows_gives_the_same_logits(rows):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 300), torch.randn(rows, 24)
    torch.testing.assert_close(output_logits(x, layer), x @ layer.weight.T + layer.bias)
    held = quantize_layer(layer.weight, layer.bias, "int8")
    assert output_logits(x, held).equal(held(x)), "a quantized layer has a product of its own"
    layer.bfloat16()
    assert output_logits(x.bfloat16(), layer).equal(layer(x.bfloat16()))


def test_generation_ends_before_the_first_stop_token():
    model = make_phi()
    free = generate(model, PROMPTS, 12)
    stops = (free[0][3], free[2][1])
    cut = [row[: next((i for i, token in enumerate(row) if token in stops), 12)] for row in free]
    assert len(cut[0]) <= 3 and len(cut[2]) <= 1
    assert generate(model, PROMPTS, 12, stop_tokens=stops) == cut
    assert generate(model, PROMPTS[:1], 12, stop_tokens=free[0][:1]) == [[]]


def test_a_batch_ends_with_the_step_in_which_its_last_row_stops():
    """Rows stop in different steps; what one that has stopped gets in the meantime is no stop token again."""
    model = make_phi()
    free = generate(model, PROMPTS[2:], 12)
    stops = (free[0][1], free[1][4])
    first = [next(i for i, token in enumerate(row) if token in stops) for row in free]
    assert first[0] < first[1] < 11 and free[0][first[1]] not in stops
    assert len(list(stream(model, PROMPTS[2:], 12, stop_tokens=stops))) == first[1] + 1


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_generation_in_bf16_follows_the_uncached_argmax(autocast):
    """Up to rounding: each token's logit is the largest, or as good as."""
    model = make_phi() if autocast else make_phi().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answers = generate(model, PROMPTS, 12)
        for prompt, ids in zip(PROMPTS, answers, strict=True):
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert logits.dtype == torch.float32 and (logits.amax(dim=-1) - chosen).max() < 0.05


def test_sampling_is_reproducible_and_a_tiny_nucleus_is_greedy():
    model = make_phi()
    first, again, other = (generate(model, PROMPTS, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    greedy = generate(model, PROMPTS, 12)
    assert first != greedy == generate(model, PROMPTS, 12, temperature=1.0, top_p=1e-6, seed=1)


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [4 / 10, 3 / 10, 2 / 10, 1 / 10]),
        (0.5, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),  # p^2, normalised
        (1.0, 0.6, [4 / 7, 3 / 7, 0, 0]),  # .4 is less than .6, .4 + .3 reaches it
        (1.0, 0.75, [4 / 9, 3 / 9, 2 / 9, 0]),
        (0.5, 0.8, [16 / 25, 9 / 25, 0, 0]),  # the nucleus of the sharpened distribution: 25/30 reaches .8
        (1.0, 0.3, [1, 0, 0, 0]),
        *((1.0, top_p, [1, 0, 0, 0]) for top_p in (0.0, 1e-9, 0.4)),  # at least one; exact sums need no more
        (1.0, 0.7, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 0.9, [4 / 9, 3 / 9, 2 / 9, 0]),
        (0.0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_frequencies_of_sampled_tokens(temperature, top_p, expected):
    order = torch.tensor([2, 0, 3, 1])  # the likeliest token is not the first
    logits = torch.empty(4)
    logits[order] = torch.tensor([4.0, 3.0, 2.0, 1.0]).log() + 5
    generator = torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(20_000, 4), temperature, top_p, generator)
    frequency = (tokens.bincount(minlength=4) / 20_000)[order]
    expected = torch.tensor(expected, dtype=torch.float32)
    assert (frequency - expected).abs().max() < 0.015  # four standard deviations of a frequency near 1/2
    assert frequency[expected == 0].eq(0).all()


def test_a_nucleus_is_cut_where_its_probability_is_reached_in_fp32_too():
    """Two tokens of 1/2 each: the first alone reaches 0.5. And of 1,000 alike in bf16, half do; a running sum in bf16 stands
    still at 1/4, where 1/1,000 is less than half its step, so that all would stay."""
    generator = torch.Generator().manual_seed(0)
    assert len(sample(torch.zeros(100, 2), 1.0, 0.5, generator).unique()) == 1
    tokens = sample(torch.zeros(20_000, 1000, dtype=torch.bfloat16), 1.0, 0.5, generator)
    assert 495 <= len(tokens.unique()) <= 501


@pytest.mark.parametrize("prompts, new", [([], 1), ([[1], []], 1), ([[1]], 0)])
def test_generation_of_nothing_is_refused(prompts, new):
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(make_phi(), prompts, new)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.8, "seed": 3}])
def test_streamed_tokens_are_the_generated_ones(settings):
    model = make_phi()
    free = generate(model, PROMPTS, 12, **settings)
    steps = list(stream(model, PROMPTS, 12, **settings))
    assert all(step.shape == (len(PROMPTS),) for step in steps)
    assert torch.stack(steps, dim=1).tolist() == free
    (alone,) = generate(model, PROMPTS[:1], 12, **settings)
    steps = list(stream(model, PROMPTS[:1], 12, **settings, stop_tokens=(alone[3],)))
    assert [step.item() for step in steps] == alone[: alone.index(alone[3]) + 1]  # up to and with the stop token


def test_a_stream_computes_a_step_when_asked_and_may_be_left_early(monkeypatch):
    model, calls = make_phi(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **more: calls.append(1) or hidden(*args, **more))
    steps = stream(model, PROMPTS, 12)
    assert not calls
    first = next(steps)
    assert len(calls) == 1 and first.tolist() == [row[0] for row in generate(model, PROMPTS, 1)]
    next(steps)
    steps.close()
    assert len(calls) == 3 and next(steps, None) is None
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for _ in stream(model, PROMPTS, 12):
        break
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("grad", [True, False])
def test_the_consumer_of_a_stream_keeps_its_own_mode(grad):
    model, modes = make_phi(), []
    model.model.final_layernorm.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    with torch.set_grad_enabled(grad):
        for _ in stream(model, PROMPTS, 4):
            assert torch.is_grad_enabled() is grad and not torch.is_inference_mode_enabled()
            assert model(torch.tensor([[1, 2]])).requires_grad is grad
            modes.clear()
        with pytest.raises(RuntimeError, match="between"):
            for _ in stream(model, PROMPTS, 4):
                raise RuntimeError("between two steps")
        assert torch.is_grad_enabled() is grad and not torch.is_inference_mode_enabled()
    list(stream(model, PROMPTS, 4))
    assert modes[-4:] == [True] * 4


def test_a_temperature_next_to_0_is_0():
    generator, logits = torch.Generator().manual_seed(0), 100 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    for temperature in (1e-7, 1e-40, 1e-300):
        assert torch.equal(sample(logits, temperature, 0.9, generator), logits.argmax(dim=-1))
