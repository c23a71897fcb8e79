"""Examples in no order of length, and their log-probabilities from the definition, one completion at a time."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example
from model import Phi


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
