"""Examples in no order of length, their log-probabilities from the definition, and a tiny network."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example
from model import Phi, PhiConfig


def unsorted_examples(completions: int, count: int = 7) -> list[Example]:
    """Sorted by length, the seven come in the order 0, 3, 1, 5, 6, 4, 2 (with one completion 0, 3, 1, 6, 5, 4, 2)."""
    draw = random.Random(0)
    examples = []
    for i in range(count):
        sizes = [3 + 5 * i % 11, 2 + 3 * i % 8, 1 + 2 * i % 5][: 1 + completions]
        prompt, *answers = ([draw.randrange(256) for _ in range(size)] for size in sizes)
        examples.append(Example(prompt, answers, where=f"rows.jsonl:{i + 1}"))
    return examples


def plain_logprobs(model: Phi, examples: list[Example]) -> Tensor:
    """log pi(y|x) [examples, completions], each from a forward pass of x and y alone."""
    table = []
    for example in examples:
        for completion in example.completions:
            logits = model(torch.tensor([example.prompt + completion]))[0, len(example.prompt) - 1 : -1]
            table.append(-F.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
    return torch.stack(table).view(len(examples), -1)


VOCABULARY = 64
TINY = dict(vocab_size=VOCABULARY, hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@torch.no_grad()
def make_phi(seed=0, **changes):
    """A tiny Phi at Phi-2's rotary share (8 of a head's 20 dimensions) whose parameters, biases too, are all random."""
    model, generator = Phi(PhiConfig(**{**TINY, **changes})), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_("layernorm.weight" in name, 0.2, generator=generator)
    return model
