"""What is measured: random models and examples of given sizes, and how many operations they need.

A product and a sum are two operations, so a vector times a matrix of n weights takes 2 n of them, and so does each of its
two gradients, dx and dW (Kaplan et al. 2020, section 2.1: 6 n a token in training). Frozen weights need no dW: 4 n. With L
layers of width D, an MLP of width I, V tokens in the vocabulary and T in the text, a forward pass takes

    layers       2 N T        N = L (4 D^2 + 2 D I), the weights in the layers' matrices
    attention    4 L D pairs  q.k and the sum of v, for each pair of tokens of which one sees the other
    output       2 V D M      M tokens whose logits are needed

A training step takes 3 times that; with frozen weights 2, 3 and 2 times. Adapters, less than a hundredth, are left out. Only
what the loss *needs* counts: a shared prompt once, logits where an answer's token is predicted, no reference known before,
no recomputed activations. So the share of a GPU's peak ("model FLOP utilization", MFU) ranks programs as their speeds do.
"""

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
    growing: dict = field(default_factory=lambda: shape(256, layers=6, heads=8, vocab_size=8192))  # of `growth`
    full: dict = field(default_factory=dict)  # of the GPU cases: Phi-2
    prompt: Lengths = (100, 166)  # tokens in training steps on the CPU
    completion: Lengths = (45, 190)
    tokens: int = 512  # of each prompt and completion in attention and training steps on a GPU
    forward: tuple[int, int] = (4, 256)  # rows, tokens
    answer: tuple[int, int] = (64, 128)  # `generate` and `gpu-decode`: tokens of the prompt, new tokens
    short_answer: tuple[int, int] = (16, 32)  # `decode`
    layer: tuple[int, int] = (2560, 10240)  # `products` and `optimizers`: features in and out
    rows: tuple[int, ...] = (1, 16, 256)  # `products`
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)  # `growth`, like the next three
    batches: tuple[int, ...] = (1, 2, 4, 8)
    widths: tuple[int, ...] = (128, 256, 512)
    depths: tuple[int, ...] = (3, 6, 12)
    world: dict | None = None  # rows in the demo's files; None: as many as usual
    no_peers: str = ""  # why they are not measured, if they are not
    card: str = ""  # the GPU's name, or the CPU's


TINY = shape(64, layers=2, heads=2, vocab_size=1024)
# --small: a case takes seconds, and its numbers mean nothing.
SMALL = dict(repeats=1, model=TINY, wide=TINY, growing=TINY, full=TINY, prompt=(5, 9), completion=(3, 8), tokens=16)
SMALL |= dict(forward=(2, 16), answer=(4, 4), short_answer=(4, 4), layer=(128, 256), rows=(1, 16, 64), lengths=(16, 32))
SMALL |= dict(batches=(1, 2), widths=(32, 64), depths=(1, 2), world={"sft": 300, "qat": 0, "pairs": 100, "test": 0})


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
        with torch.device(bench.device):
            phi = Phi(PhiConfig(**bench.full)).bfloat16()
        for p in phi.parameters():
            if p.ndim == 2:
                p.uniform_(-0.03, 0.03)
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


# Dense bf16 operations a second with fp32 sums, by a part of the card's name, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PEAKS |= {"RTX 4090": 165e12, "RTX 4060": 30e12}


def peak(card: str) -> float | None:
    """The most operations a second that a card of this name can do in bf16; None if it is not in the table."""
    return next((flops for name, flops in PEAKS.items() if name in card), None)


def forward_parts(config: PhiConfig, examples: list[Example], all_logits: bool = False) -> tuple[int, int, int]:
    """(layers, attention, output) operations of a forward pass. The prompt counts once, and no completion sees its sibling.
    `all_logits`: the output layer runs on every token, not only where one of a completion is predicted."""
    L, D = config.num_hidden_layers, config.hidden_size
    weights = L * (4 * D * D + 2 * D * config.intermediate_size)
    layers = attention = output = 0
    for e in examples:
        T, sizes = len(e), [len(c) for c in e.completions]
        seen = T * (T + 1) // 2 - sum(a * b for i, a in enumerate(sizes) for b in sizes[:i])
        layers += 2 * weights * T
        attention += 4 * L * D * seen
        output += 2 * config.vocab_size * D * (T if all_logits else sum(sizes))
    return layers, attention, output


def training_operations(config: PhiConfig, examples: list[Example], frozen: bool = False) -> int:
    """Operations of forward and backward pass. `frozen`: only adapters are trained, whose own operations are not counted."""
    layers, attention, output = forward_parts(config, examples)
    return (2 if frozen else 3) * (layers + output) + 3 * attention
