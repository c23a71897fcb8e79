"""How many floating-point operations a step of training needs, and what share of a GPU's peak that is.

A product and a sum are two operations, so the product of a vector with a matrix of n weights takes 2 n, and so does each of
its two gradients, dx and dW (Kaplan et al. 2020, section 2.1: 6 n a token in training). With frozen weights, as under LoRA,
dW is not needed: 4 n. With L layers of width D and V tokens,

    layers       2 N T        N = L (4 D^2 + 2 D I), the weights of the layers' matrices, each of T tokens
    attention    4 L D pairs  q.k and the sum of v, for each pair of tokens of which one sees the other; nothing is frozen
    output       2 V D M      for the M tokens whose logits are needed

are the forward pass, and the whole step takes 3, 3 and 3 times that, or 2, 3 and 2 with frozen weights. Adapters add their
own 3 x 2 r (I + O), less than a hundredth. PaLM's appendix B counts the same, with 12 L D T for attention: it takes every
token to see all T, which is twice what a causal model needs.

Counted is what the loss *needs*, whoever computes it: a shared prompt once, logits where an answer's token is predicted, a
reference that is known beforehand not at all, recomputed activations not at all. So the share of the peak ("model FLOP
utilisation") of two programs compares as their speeds do.
"""

from data import Example
from model import PhiConfig

# Dense bf16 operations a second with fp32 sums, by a part of the card's name, from the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
    "RTX 5090": 209e12,
}


def peak(card: str) -> float | None:
    """Operations a second that a card of this name can do at most in bf16; None if it is not in the table."""
    return next((flops for name, flops in PEAKS.items() if name in card), None)


def forward_parts(config: PhiConfig, examples: list[Example], all_logits: bool = False) -> tuple[int, int, int]:
    """(layers, attention, output) operations of a forward pass. The prompt counts once, and no completion sees its sibling;
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
    """Operations of forward and backward. `frozen`: only adapters are trained; theirs are not counted."""
    layers, attention, output = forward_parts(config, examples)
    return (2 if frozen else 3) * (layers + output) + 3 * attention
