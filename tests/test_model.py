"""The short way (shared prompt, chunks, cache, slices) gives the numbers of the long way, or of a pencil."""

import math

import pytest
import torch
import torch.nn.functional as F
from plain import TINY, VOCABULARY, make_phi, plain_logprobs, unsorted_examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
from data import Example, collate
from generate import generate
from model import (
    Phi,
    PhiConfig,
    TokenLogProbs,
    all_logprobs,
    completion_logprobs,
    rotary_angles,
    rotate,
    sibling_mask,
)
from runtime.files import InputError


def make_examples(completions, seed=0, prompts=(5, 1, 9)):
    """One example for each prompt length, with `completions` completions of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(VOCABULARY, (n,), generator=generator).tolist()

    def length():
        return int(torch.randint(1, 9, (), generator=generator))

    return [Example(tokens(n), [tokens(length()) for _ in range(completions)]) for n in prompts]


def naive_logprobs(model, examples):
    """Each completion in a row of its own behind its prompt: full logits, log_softmax, gather, sum."""
    result = []
    for example in examples:
        for completion in example.completions:
            row = torch.tensor([example.prompt + completion])  # [1, T]
            logp = model(row).float().log_softmax(dim=-1)[0, :-1]  # [T-1, V]: place t predicts token t+1
            result.append(logp.gather(1, row[0, 1:, None])[len(example.prompt) - 1 :].sum())
    return torch.stack(result)


def gradients(model, logprobs):
    """d (1 * logprobs[0] + 2 * logprobs[1] - 3 * ...)/d parameter for every parameter."""
    weights = torch.tensor([(-1) ** (i // 2) * (i + 1.0) for i in range(len(logprobs))])
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((weights * logprobs).sum(), parameters)))


def assert_same_gradients(got, expected, relative=1e-6):
    largest = max(g.abs().max() for g in expected.values())
    for name in expected:
        assert (got[name] - expected[name]).abs().max() <= relative * largest, name


# ---------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("completions", [1, 2, 4])
@pytest.mark.parametrize("key_value_heads", [2, 1])
def test_shared_prompt_gives_value_and_gradient_of_separate_rows(completions, key_value_heads):
    model, examples = make_phi(num_key_value_heads=key_value_heads), make_examples(completions)
    got, expected = completion_logprobs(model, collate(examples)), naive_logprobs(model, examples)
    assert got.dtype == torch.float32 and got.shape == (3 * completions,)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(model, got), gradients(model, expected))


def test_chunks_of_the_output_layer_do_not_matter(monkeypatch):
    model, batch = make_phi(), collate(make_examples(2))
    whole = completion_logprobs(model, batch)
    whole_gradients = gradients(model, whole)
    assert len(batch.target) > 7
    for tokens in (1, 3, 7):  # a chunk holds that many tokens' logits; the last one fewer
        monkeypatch.setitem(model_file.LOGIT_CHUNK, "cpu", tokens * VOCABULARY)
        chunked = completion_logprobs(model, batch)
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
        assert_same_gradients(gradients(model, chunked), whole_gradients)


def test_a_completion_does_not_see_its_sibling():
    model = make_phi()
    prompt, chosen = [1, 2, 3], [4, 5, 6]
    with torch.no_grad():
        alone = completion_logprobs(model, collate([Example(prompt, [chosen])]))[0]
        first, second = [], []
        for sibling in ([7, 8], [9, 10], [9, 10, 11, 12]):
            first.append(completion_logprobs(model, collate([Example(prompt, [chosen, sibling])]))[0])
            second.append(completion_logprobs(model, collate([Example(prompt, [sibling, chosen])]))[1])
    assert first[0] == first[1]  # other tokens, same lengths: the same bits
    torch.testing.assert_close(torch.stack(first + second), alone.expand(6), rtol=1e-6, atol=1e-6)


def test_gradient_of_one_completion_does_not_depend_on_its_sibling():
    model = make_phi()
    with_one = completion_logprobs(model, collate([Example([1, 2, 3], [[4, 5], [6, 7]])]))[:1]
    with_other = completion_logprobs(model, collate([Example([1, 2, 3], [[4, 5], [8, 9]])]))[:1]
    assert_same_gradients(gradients(model, with_one), gradients(model, with_other))


@pytest.mark.parametrize("completions", [1, 2])
def test_padding_does_not_matter(completions):
    model = make_phi()
    short, long = make_examples(completions, prompts=(2, 30))
    with torch.no_grad():
        alone = completion_logprobs(model, collate([short]))
        batch = collate([short, long])
        together = completion_logprobs(model, batch)
        batch.tokens[batch.segment == -1] = 7  # another token in the padding
        assert (batch.segment == -1).any() and torch.equal(completion_logprobs(model, batch), together)
    torch.testing.assert_close(together[:completions], alone, rtol=1e-6, atol=1e-6)


def plain_varlen_attn(q, k, v, query_starts, key_starts, most_queries, most_keys, *, window_size):
    """What the kernel computes, segment by segment: query i of T sees the first S - T + i + 1 of S keys."""
    assert window_size == (-1, 0) and most_queries == query_starts.diff().max() and most_keys == key_starts.diff().max()
    outputs = []
    for a, b, c, d in zip(query_starts, query_starts[1:], key_starts, key_starts[1:]):
        visible = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))  # [1, H, ., h]
        outputs.append(F.scaled_dot_product_attention(*heads, attn_mask=visible)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("completions", [1, 2, 4])
@pytest.mark.parametrize("key_value_heads", [2, 1])
def test_attention_by_segment_gives_the_mask_s_values_and_gradients(completions, key_value_heads, monkeypatch):
    """The path of a GPU, with the rule of its kernel in plain PyTorch."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen_attn)
    model, batch = make_phi(num_key_value_heads=key_value_heads), collate(make_examples(completions))
    kept, source = batch.segments.kept, batch.segments.source
    tokens, position = batch.tokens.flatten()[None, kept], batch.position.flatten()[None, kept]
    logits = model.lm_head(model.hidden(tokens, position, batch.segments)[0, source])  # [M, V]
    each = logits.log_softmax(dim=-1).gather(1, batch.target[:, None])[:, 0]
    got, expected = torch.zeros(len(batch.lengths)).index_add(0, batch.owner, each), completion_logprobs(model, batch)
    assert tokens.shape == (1, sum(map(len, make_examples(completions))))  # no padding
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, got), gradients(model, expected), relative=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is CUDA's")
def test_on_cuda_in_bf16_attention_by_segment_is_the_normal_path():
    model, batch = make_phi(hidden_size=64).to("cuda", torch.bfloat16), collate(make_examples(2)).to("cuda")
    got = completion_logprobs(model, batch)
    expected = completion_logprobs(model.float(), batch)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.5)


MASK = """
    1.....
    11....
    111...
    1111..
    11..1.
    11...1
""".split()  # a prompt of two tokens, completions of two and one, one token of padding


def test_mask_of_a_row_by_hand():
    segment = torch.tensor([[0, 0, 1, 1, 2, -1]])
    visible = torch.tensor([[mark == "1" for mark in line] for line in MASK])
    mask = sibling_mask(segment, torch.float32)
    assert mask.shape == (1, 1, 6, 6) and torch.equal(mask[0, 0], torch.zeros(6, 6).where(visible, float("-inf")))


def test_probabilities_of_all_answers_of_two_tokens_sum_to_one():
    model = make_phi(vocab_size=16)
    answers = [[a, b] for a in range(16) for b in range(16)]
    with torch.no_grad():
        logp = completion_logprobs(model, collate([Example([1, 2, 3], answers)]))
    assert math.isclose(logp.exp().sum().item(), 1, abs_tol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, batch = make_phi(), collate(make_examples(2))
    plain = gradients(model, completion_logprobs(model, batch))
    model.gradient_checkpointing = True
    assert_same_gradients(gradients(model, completion_logprobs(model, batch)), plain)
    with pytest.raises(ValueError, match="fill the cache twice"):
        generate(model, [[1, 2]], 2)


def test_gradient_checkpointing_runs_each_block_again_in_the_backward_pass_and_only_there():
    model, batch, passes = make_phi(), collate(make_examples(2)), []
    model.gradient_checkpointing = True
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    logprobs = completion_logprobs(model, batch)
    assert len(passes) == 1
    gradients(model, logprobs)
    assert len(passes) == 2
    with torch.no_grad():
        completion_logprobs(model, batch)
    assert len(passes) == 3


def test_bf16_weights_give_fp32_logprobs_and_bf16_gradients():
    model, examples = make_phi().bfloat16(), make_examples(2)
    logprobs = completion_logprobs(model, collate(examples))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, naive_logprobs(model.float(), examples), rtol=0.02, atol=0.1)
    model = model.bfloat16()
    got = gradients(model, completion_logprobs(model, collate(examples)))
    assert all(g.dtype == torch.bfloat16 for g in got.values())
    expected = gradients(model.float(), naive_logprobs(model, examples))
    assert_same_gradients({name: g.float() for name, g in got.items()}, expected, relative=0.05)


@pytest.mark.parametrize("completions", [1, 2])
def test_bf16_autocast_gives_fp32_logprobs_and_gradients(completions):
    model, examples = make_phi(), make_examples(completions)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = completion_logprobs(model, collate(examples))
    assert logprobs.dtype == torch.float32
    exact = naive_logprobs(model, examples)
    torch.testing.assert_close(logprobs, exact, rtol=0.02, atol=0.1)
    got = gradients(model, logprobs)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert_same_gradients(got, gradients(model, exact), relative=0.05)


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_the_output_layer_rounds_its_factors_to_bf16_but_not_their_sum(autocast):
    """As worked out in float64 from the rounded factors. A sum rounded to bf16 would be off by 0.01."""
    model, batch = make_phi() if autocast else make_phi().bfloat16(), collate(make_examples(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, h = completion_logprobs(model, batch), model.predicting(batch)
    weight, bias = model.lm_head.weight.bfloat16().double(), model.lm_head.bias.double()
    logp = F.linear(h.bfloat16().double(), weight, bias).log_softmax(dim=-1).gather(1, batch.target[:, None])[:, 0]
    expected = torch.zeros(len(got), dtype=torch.float64).index_add(0, batch.owner, logp)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_two_thousand_tokens_are_summed_without_rounding_in_between():
    """They sum to about -9,000 nats, where fp32 has steps of 0.001: of a running sum in fp32 the second decimal is wrong."""
    model, generator = make_phi(), torch.Generator().manual_seed(0)
    batch = collate([Example([1], [torch.randint(VOCABULARY, (2000,), generator=generator).tolist()])])
    head = model.lm_head
    each = TokenLogProbs.apply(model.predicting(batch), head.weight, head.bias, batch.target, torch.float32)  # [M]
    assert each.sum() < -8192
    assert completion_logprobs(model, batch).tolist() == [each.double().sum().float().item()]


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation gives."""

    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.values = max(self.values, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), 0)
        return result


def test_no_more_logits_than_a_chunk_are_ever_held(monkeypatch):
    """300 tokens of 7 dimensions, 50 words: 15,000 logits, of which 20 tokens' are made at a time."""
    monkeypatch.setitem(model_file.LOGIT_CHUNK, "cpu", 20 * 50)
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(n, generator=generator).requires_grad_() for n in ((300, 7), (50, 7), (50,)))
    target = torch.randint(50, (300,), generator=generator)
    with LargestTensor() as largest:
        logprobs = TokenLogProbs.apply(h, weight, bias, target, torch.float32)
        torch.autograd.grad(logprobs.sum(), (h, weight, bias))
    assert largest.values == 300 * 7  # h and its gradient


def test_gradients_of_bf16_weights_are_summed_over_the_chunks_in_fp32(monkeypatch):
    """512 chunks of a token whose gradients all point one way: a sum kept in bf16 stands still once it is 256 times the
    next summand."""
    monkeypatch.setitem(model_file.LOGIT_CHUNK, "cpu", 1)
    generator = torch.Generator().manual_seed(0)
    h = (1 + 0.1 * torch.randn(512, 3, generator=generator)).bfloat16()
    weight, bias = torch.zeros(7, 3).bfloat16().requires_grad_(), torch.zeros(7).bfloat16().requires_grad_()
    target = torch.zeros(512, dtype=torch.long)
    got = torch.autograd.grad(TokenLogProbs.apply(h, weight, bias, target, torch.bfloat16).sum(), (weight, bias))
    slope = torch.tensor([6 / 7, *[-1 / 7] * 6])  # onehot - p, alike for all tokens
    for g, expected in zip(got, (slope[:, None] * h.float().sum(dim=0), 512 * slope)):
        torch.testing.assert_close(g.float(), expected, rtol=0.005, atol=0)


def token_logprobs_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((5, 3), (7, 3), (7,)))
    return *(t.requires_grad_() for t in (h, weight, bias)), torch.tensor([0, 6, 3, 3, 1])


def test_token_logprobs_have_value_and_gradient_of_log_softmax_in_float64(monkeypatch):
    monkeypatch.setitem(model_file.LOGIT_CHUNK, "cpu", 2 * 7)
    h, weight, bias, target = token_logprobs_inputs(torch.float32)
    got = TokenLogProbs.apply(h, weight, bias, target, torch.float32)
    h64, weight64, bias64 = (t.detach().double().requires_grad_() for t in (h, weight, bias))
    expected = F.linear(h64, weight64, bias64).log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    outer = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    for g, e in zip(
        torch.autograd.grad(got, (h, weight, bias), outer),
        torch.autograd.grad(expected, (h64, weight64, bias64), outer.double()),
    ):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_token_logprobs_gradient_is_the_slope_of_its_value():
    """Finite differences in fp32, the dtype it computes in: with a step of 0.01 they are good to about 1e-4."""
    h, weight, bias, target = token_logprobs_inputs(torch.float32)
    assert torch.autograd.gradcheck(
        lambda *t: TokenLogProbs.apply(*t, target, torch.float32), (h, weight, bias), eps=1e-2, atol=1e-3
    )


def test_token_logprobs_by_hand():
    """Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. d log p(1) / d bias = onehot - p = -1/8, 6/8, -5/8."""
    h, weight = torch.zeros(1, 2), torch.ones(3, 2)
    bias = torch.tensor([1.0, 2.0, 5.0]).log().requires_grad_()
    logp = TokenLogProbs.apply(h, weight, bias, torch.tensor([1]), torch.float32)
    logp.backward()
    assert math.isclose(logp.item(), math.log(2 / 8), abs_tol=1e-6)
    torch.testing.assert_close(bias.grad, torch.tensor([-1 / 8, 6 / 8, -5 / 8]))


# -------------------------------------------------------------------------------------------------------------- network


def test_rotation_by_hand():
    """size 4, base 10,000: pair (0, 2) turns by 1 radian a place, pair (1, 3) by 1/100; the fifth dimension stays."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0, 7.0]).view(1, 1, 1, 5)
    y = rotate(x, *rotary_angles(torch.tensor([[100]]), 4, 10_000.0, torch.float32))
    expected = [math.cos(100), math.cos(1), math.sin(100), math.sin(1), 7.0]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected), rtol=0, atol=1e-5)
    quarter = rotate(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert quarter.flatten().tolist() == [-4.0, 3.0]  # a quarter turn of the vector (3, 4)


def test_angles_are_made_in_fp32_and_rounded_at_the_end():
    """bf16 holds whole numbers up to 256 only: position 1,999 would be 2,000, turned by one radian more."""
    position = torch.tensor([[1, 257, 1999]])
    exact, rounded = (rotary_angles(position, 32, 10_000.0, dtype) for dtype in (torch.float32, torch.bfloat16))
    for e, r in zip(exact, rounded, strict=True):
        assert r.dtype == torch.bfloat16 and torch.equal(r, e.bfloat16())


def test_position_zero_is_not_turned_and_no_length_changes():
    x = torch.randn(1, 2, 6, 20, generator=torch.Generator().manual_seed(0))
    y = rotate(x, *rotary_angles(torch.arange(6)[None], 8, 10_000.0, torch.float32))
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_score_of_two_tokens_depends_on_their_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 20, generator=generator) for _ in range(2))

    def turned(x, position):
        return rotate(x, *rotary_angles(torch.tensor([[position]]), 8, 10_000.0, torch.float32)).flatten()

    scores = {(m, n): turned(q, m) @ turned(k, n) for m in (3, 50, 1000) for n in (m, m - 1, m - 3)}
    for distance in (0, 1, 3):
        same = torch.stack([scores[m, m - distance] for m in (3, 50, 1000)])
        torch.testing.assert_close(same, same[:1].expand(3), rtol=1e-4, atol=1e-4)
    assert abs(scores[50, 50] - scores[50, 47]) > 0.01


def test_block_is_attention_plus_mlp_of_one_layernorm():
    """One layer, written out with full matrices: x + dense(softmax(q k^T / sqrt(h)) v) + fc2(gelu(fc1(ln(x)))). The base of
    the positions and LayerNorm's eps are others than Phi-2's, so that both must come from the config."""
    phi = make_phi(num_hidden_layers=1, rope_theta=500.0, layer_norm_eps=0.1)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    block, x = phi.model.layers[0], phi.model.embed_tokens(tokens)[0]  # [T, D]
    ln = F.layer_norm(x, (40,), block.input_layernorm.weight, block.input_layernorm.bias, eps=0.1)
    cos, sin = (t[0, 0] for t in rotary_angles(torch.arange(5)[None], 8, 500.0, torch.float32))  # [T, 4]
    heads = []
    for head in range(2):
        rows = slice(20 * head, 20 * head + 20)
        q, k, v = (
            F.linear(ln, p.weight[rows], p.bias[rows])
            for p in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        score = (q @ k.T / math.sqrt(20)).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(score.softmax(dim=-1) @ v)
    attention = F.linear(torch.cat(heads, dim=-1), block.self_attn.dense.weight, block.self_attn.dense.bias)
    inner = F.linear(ln, block.mlp.fc1.weight, block.mlp.fc1.bias)
    gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    y = x + attention + F.linear(gelu, block.mlp.fc2.weight, block.mlp.fc2.bias)
    y = F.layer_norm(y, (40,), phi.model.final_layernorm.weight, phi.model.final_layernorm.bias, eps=0.1)
    torch.testing.assert_close(phi(tokens)[0], F.linear(y, phi.lm_head.weight, phi.lm_head.bias), rtol=1e-5, atol=1e-5)


def test_random_weights_are_as_transformers_starts_them():
    def draw(seed):
        return dict(Phi(PhiConfig(**TINY, initializer_range=0.5)).init_weights(seed).named_parameters())

    for name, p in draw(seed=1).items():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "layernorm" in name:
            assert torch.equal(p, torch.ones(40)), name
        else:
            assert p.std().item() == pytest.approx(0.5, rel=0.1) and abs(p.mean()) < 0.05, name
    same, other = draw(seed=1)["lm_head.weight"], draw(seed=2)["lm_head.weight"]
    assert torch.equal(same, draw(seed=1)["lm_head.weight"]) and not torch.equal(same, other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive number"),
        ({"vocab_size": -1}, "vocab_size is -1, not a positive number"),
        ({"hidden_size": 40.0}, "hidden_size is 40.0, not a positive number"),
        ({"intermediate_size": "48"}, "intermediate_size is '48', not a positive number"),
        ({"num_attention_heads": True}, "num_attention_heads is True, not a positive number"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "do not divide each other"),
        ({"partial_rotary_factor": 0.26}, "cannot turn 5 of a head's 20 dimensions"),
        ({"partial_rotary_factor": 0.01}, "cannot turn 0 of a head's 20 dimensions"),
        ({"partial_rotary_factor": 1.2}, "cannot turn 24 of a head's 20 dimensions"),
    ],
)
def test_sizes_that_make_no_network_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PhiConfig.from_dict({"model_type": "phi", **TINY, **changes})


def test_without_a_number_of_key_value_heads_every_head_has_its_own():
    assert PhiConfig(**TINY).num_key_value_heads == 2


# ------------------------------------------------------------------------------------------------------ a whole data set


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_table_is_in_the_order_of_the_examples(tiny, batch_size):
    """The batches are made of rows sorted by length."""
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(2)
    table = all_logprobs(model, examples, batch_size, "cpu", "fp32", "")
    torch.testing.assert_close(table, plain_logprobs(model, examples), atol=1e-4, rtol=1e-5)
    assert table.dtype == torch.float32 and not table.requires_grad


def test_a_table_in_bf16_is_rounded_a_little(tiny):
    model, examples = Phi.from_pretrained(tiny), unsorted_examples(2)
    low, full = (all_logprobs(model, examples, 3, "cpu", dtype, "") for dtype in ("bf16", "fp32"))
    assert 0 < (low - full).abs().max() < 0.01 * full.abs().max()
