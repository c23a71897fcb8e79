"""The supervised loss is the cross-entropy per answer token of the whole step, however the step was cut."""

import math

import pytest
import torch
import torch.nn.functional as F

from data import Example, collate
from model import Phi, PhiConfig, completion_logprobs
from sft import objective

LENGTHS = (1, 9, 3, 6, 2, 12, 4, 5)  # a mean of means would weigh these answers' tokens very differently


def make_phi():
    config = PhiConfig(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return Phi(config).init_weights(seed=0)


def make_examples():
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            torch.randint(64, (4,), generator=generator).tolist(), [torch.randint(64, (n,), generator=generator).tolist()]
        )
        for n in LENGTHS
    ]


def step(batch_size):
    """Loss, gradient and metrics of one optimizer step over all examples, in micro-batches of `batch_size`."""
    model, examples, loss, sums = make_phi(), make_examples(), 0.0, {}
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        total, metrics = objective(completion_logprobs(model, batch), batch.lengths)
        (total / sum(LENGTHS)).backward()
        loss += total.item() / sum(LENGTHS)
        sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
    return loss, {name: p.grad for name, p in model.named_parameters()}, sums


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    largest = max(g.abs().max() for g in b[1].values())
    for name in b[1]:
        assert (a[1][name] - b[1][name]).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_batch_of_eight_equals_eight_of_one(batch_size):
    whole, cut = step(8), step(batch_size)
    assert_same(whole, cut)
    for name, value in whole[2].items():
        torch.testing.assert_close(cut[2][name], value, rtol=1e-6, atol=0)


def test_loss_and_gradient_are_those_of_torch_cross_entropy():
    model, logits, targets = make_phi(), [], []
    for example in make_examples():
        row = torch.tensor([example.prompt + example.completions[0]])
        logits.append(model(row)[0, len(example.prompt) - 1 : -1])
        targets.append(row[0, len(example.prompt) :])
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))  # the mean over all answer tokens
    loss.backward()
    assert_same(step(8), (loss.item(), {name: p.grad for name, p in model.named_parameters()}))


def test_loss_and_metrics_by_hand():
    """Two answers, of probability 1/2 in one token and 1/8 in three: every token costs ln 2."""
    total, metrics = objective(torch.tensor([1 / 2, 1 / 8]).log(), torch.tensor([1, 3]))
    assert total.item() == pytest.approx(4 * math.log(2))
    assert metrics["loss"].tolist() == pytest.approx([4 * math.log(2), 4])  # per token
    assert metrics["logps"].tolist() == pytest.approx([-4 * math.log(2), 2])  # per answer
