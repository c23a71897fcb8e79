"""What is measured: random models and examples of given sizes."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import Example
from model import Phi, PhiConfig

Lengths = tuple[int, int]  # tokens, at least and at most


def shape(width: int, layers: int, heads: int, vocab_size: int = 51200, rotary: float = 0.5) -> dict:
    """Fields of a PhiConfig."""
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
    return sizes | dict(vocab_size=vocab_size, partial_rotary_factor=rotary)


@dataclass(frozen=True)
class Bench:
    """What every case is given: where and how to measure, and how large everything is."""

    directory: Path  # holds the models of `write_models`; a case may add to it
    device: str
    repeats: int = 3  # runs of each contender that count; at least 5 if they are short
    model: dict = field(default_factory=lambda: shape(256, layers=6, heads=8, rotary=0.4))  # of the CPU cases
    wide: dict = field(default_factory=lambda: shape(1024, layers=8, heads=16))  # of `decode`
    full: dict = field(default_factory=dict)  # of the GPU cases: Phi-2
    prompt: Lengths = (100, 166)  # tokens in training steps on the CPU
    completion: Lengths = (45, 190)
    tokens: int = 512  # of each prompt and completion in training steps on a GPU
    forward: tuple[int, int] = (4, 256)  # rows, tokens
    answer: tuple[int, int] = (64, 128)  # `generate` and `gpu-decode`: tokens of the prompt, new tokens
    short_answer: tuple[int, int] = (16, 32)  # `decode`
    layer: tuple[int, int] = (2560, 10240)  # `quant`: features in and out
    world: dict | None = None  # rows in the demo's files; None: as many as usual


def write_models(directory: Path, shape: dict) -> None:
    """A random Phi, and under reference/ a slightly different one, so that no margin is 0."""
    phi = Phi(PhiConfig(**shape)).init_weights(seed=0)
    phi.save_pretrained(directory)
    noise = torch.Generator().manual_seed(1)
    for p in phi.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=noise)
    phi.save_pretrained(directory / "reference")


@torch.no_grad()
def full_size_phi(bench: Bench) -> Path:
    """A Phi-2 of random weights in bf16, written once. Drawn on the device: 2.78 billion values take minutes on a CPU."""
    full = bench.directory / "full"
    if not full.exists():
        with torch.device("meta"):
            phi = Phi(PhiConfig(**bench.full))
        phi.to_empty(device=bench.device)
        phi.to(torch.bfloat16)
        for name, p in phi.named_parameters():
            p.uniform_(-0.03, 0.03) if p.ndim == 2 else p.fill_(name.endswith("layernorm.weight"))
        phi.save_pretrained(full)
    return full


def pairs(vocab_size: int, count: int, prompt: Lengths, completion: Lengths, completions: int = 2) -> list[Example]:
    """Random pairs with lengths drawn from the two ranges, or only the first completion of each. Always the same ones."""
    draw = random.Random(0)

    def ids(lengths: Lengths) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(draw.randint(*lengths))]

    return [Example(ids(prompt), [ids(completion), ids(completion)][:completions]) for _ in range(count)]


def prompts(rows: int, tokens: int, vocab_size: int) -> torch.Tensor:
    """Random token ids [rows, tokens]; the same for the same sizes."""
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(rows))
