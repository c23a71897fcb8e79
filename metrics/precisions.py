"""Number formats, measured: what one costs in bytes and in quality, beside the same model in full precision.

    memory       of all weights in MB; a file has a few more
    bits         per weight of the linear layers but the output layer, scales included
    KL           KL(full || other) = sum_v p_v (log p_v - log p'_v) in nats, a mean over the predicted tokens
    same top 1   share of these tokens whose likeliest successor is the same

Layers that are not quantized (embeddings, LayerNorms, output layer) stay fp32 in every format but bf16.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import Example, by_length, collate
from model import LOGIT_CHUNK, Phi
from quant import FrozenLinear
from runtime.files import picture


def sizes(model: Phi) -> dict[str, float]:
    """Megabytes in memory, and bits per weight."""
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e6
    modules = [layer for name, layer in model.named_modules() if name != "lm_head"]
    frozen = [layer for layer in modules if isinstance(layer, FrozenLinear)]
    plain = [layer for layer in modules if isinstance(layer, torch.nn.Linear)]
    stored = sum(x.nbytes for layer in frozen for x in layer.buffers()) + sum(layer.weight.nbytes for layer in plain)
    weights = sum(layer.in_features * layer.out_features for layer in (*frozen, *plain))
    return {"memory, MB": memory, "bits per weight": 8 * stored / weights}


@torch.no_grad()
def divergence(full: Phi, other: Phi, examples: Sequence[Example], batch_size: int, device: str) -> dict[str, float]:
    """KL and same top 1 of `other` beside `full` over the first completions of the examples: of a pair, the chosen ones."""
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    examples = [replace(e, completions=e.completions[:1]) for e in examples]
    order = by_length(examples)
    chunk = max(1, LOGIT_CHUNK[torch.device(device).type] // full.config.vocab_size)
    for start in tqdm(range(0, len(order), batch_size), desc="comparing", unit="batch", leave=False, disable=None):
        batch = collate([examples[i] for i in order[start : start + batch_size]]).to(device)
        states = [full.predicting(batch), other.predicting(batch)]  # two of [M, D]
        for h, h_other in zip(*(state.split(chunk) for state in states), strict=True):
            p = full.lm_head(h).float().log_softmax(-1)  # [m, V]
            q = other.lm_head(h_other).float().log_softmax(-1)  # [m, V]
            kl = (p.exp() * (p - q)).sum()
            agree = (p.argmax(-1) == q.argmax(-1)).sum()
            sums += torch.stack((kl, agree)).double().cpu()
        count += len(batch.target)
    kl, agree = (sums / count).tolist()
    return {"KL, nats": kl, "same top 1": agree}


def figure(models: list[dict], path: Path) -> None:
    """Size and quality, a line for each format: bytes in memory, and KL divergence to full precision, of models as `eval`
    measures them."""
    shown = sorted((one for one in models if "format" in one), key=lambda one: -one["format"]["memory, MB"])
    names = [f"{one['model']} ({one['format']['bits per weight']:.2f} bits)" for one in shown]
    panels = {"memory, MB": "Memory (MB)", "KL, nats": "KL to full precision (nats per token)"}
    with picture(path, columns=2, size=(10, 1.2 + 0.35 * len(shown))) as axes:
        for axis, (measure, title) in zip(axes, panels.items(), strict=True):
            for line, one in enumerate(shown):
                if (value := one["format"][measure]) > 1e-9:  # full precision has no KL, and none on a logarithmic axis
                    axis.plot(value, line, marker="o", color="C0")
                    text = f"{value:,.2f}" if value > 0.1 else f"{value:.2g}"
                    axis.annotate(text, (value, line), (7, 0), textcoords="offset points", va="center", fontsize=8)
            axis.set(title=title, yticks=range(len(shown)), ylim=(len(shown) - 0.5, -0.5))
            axis.margins(x=0.15)
        axes[0].set(xlim=(0, None), yticklabels=names)
        axes[1].set(xscale="log", yticklabels=[])
