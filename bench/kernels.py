"""What a step is made of, each part alone, at Phi-2's size: attention, products with a layer, AdamW.

Products are recorded as a CUDA graph, so Python's own time does not count. They go round copies of a layer that together
exceed the card's cache, as a model's layers do.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench import peers
from bench.timing import attempt, copy_speed, medians, rates, row, timed
from bench.workloads import Bench, forward_parts, pairs
from data import Example, collate
from model import PhiConfig, attend, sibling_mask
from quant import quantize_layer
from runtime.flags import settle
from runtime.optimizer import make_optimizer

CACHE = 200_000_000  # bytes; no card's is larger


def attention(bench: Bench) -> list[dict]:
    """Of one block, in bf16, with its backward pass. "ms_new_length": the first call at a new length."""
    config, device = PhiConfig(**bench.full), bench.device
    operations = 3 * forward_parts(config, four_pairs(bench, bench.tokens))[1] / config.num_hidden_layers
    runs = attention_calls(bench, bench.tokens)
    expected = runs["by mask"]()
    made = []
    for name, seconds in medians(runs, bench.repeats, device).items():
        new = sorted(timed(attention_calls(bench, bench.tokens + n)[name], device) for n in (8, 24, 40))
        gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(runs[name](), expected))
        extra = {"ms": 1e3 * seconds, "ms_new_length": 1e3 * new[1], "difference": gap}
        case = f"attention {name}, 4 x {3 * bench.tokens:,} tokens"
        made.append(row(case, "TFLOP/s", operations / seconds / 1e12) | extra)
    return made


def four_pairs(bench: Bench, tokens: int) -> list[Example]:
    return pairs(PhiConfig(**bench.full).vocab_size, 4, (tokens, tokens), (tokens, tokens))


def attention_calls(bench: Bench, tokens: int) -> dict[str, Callable]:
    """{"by mask": run, on CUDA also "by segment": run}; run() -> output and gradients of q, k, v, each [1, n, H, h]."""
    config, batch = PhiConfig(**bench.full), collate(four_pairs(bench, tokens)).to(bench.device)
    H, h, (B, T) = config.num_attention_heads, config.head_size, batch.tokens.shape
    draw = torch.Generator(bench.device).manual_seed(0)
    *inputs, grad = torch.randn(4, 1, B * T, H, h, device=bench.device, generator=draw).bfloat16()
    mask = sibling_mask(batch.segment, grad.dtype)
    for x in inputs:
        x.requires_grad_()

    def by_mask() -> torch.Tensor:
        q, k, v = (x.view(B, T, H, h).transpose(1, 2) for x in inputs)  # [B, H, T, h]
        return attend(q, k, v, mask).transpose(1, 2).reshape(grad.shape)

    def by_segment() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs)  # [1, H, n, h]
        return attend(q, k, v, batch.segments).transpose(1, 2)

    def with_gradients(attended: Callable) -> list[torch.Tensor]:
        y = attended()
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    ways = {"by mask": by_mask} | ({"by segment": by_segment} if bench.device.startswith("cuda") else {})
    return {name: partial(with_gradients, attended) for name, attended in ways.items()}


@torch.no_grad()
def products(bench: Bench) -> list[dict]:
    """In bf16, on a CPU in fp32. "error": the largest, as a share of the largest exact value."""
    device, (columns, features) = bench.device, bench.layer
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    plain = nn.Linear(columns, features, device=device)
    plain.weight.normal_(0, 0.02)
    dense = copy.deepcopy(plain).to(dtype)
    layers = {to: quantize_layer(plain.weight, plain.bias, to) for to in ("int8", "nf4")}
    layers[str(dtype).removeprefix("torch.")] = dense
    theirs, missing = attempt(peers.nf4_layer, plain, unless=bench.no_peers)
    made = [row("copy, read and written", "GB/s", copy_speed(device))]
    for size in bench.rows:
        x = torch.randn(size, columns, device=device, dtype=dtype)
        for name, layer in [*layers.items(), ("nf4 decoded first", layers["nf4"])]:
            product = decoded_first if "decoded" in name else nn.Module.__call__
            note = missing if name == "nf4" else ""
            count = min(16, math.ceil(CACHE / stored(layer)))
            runs = {"ours": round_of(product, layer, x, count)}
            runs["peer"] = None
            if name == "nf4" and theirs:
                runs["peer"], note = attempt(round_of, nn.Module.__call__, theirs, x, count)
            seconds = [s and s / count for s in medians(runs, bench.repeats, device).values()]
            weight = layer.weight if layer is dense else layer.dense()
            exact = F.linear(x.float(), weight.float(), layer.bias.float())
            error = float((product(layer, x) - exact).abs().max() / exact.abs().max())
            amount, unit = (stored(layer), "GB/s") if size <= 16 else (2e-3 * size * columns * features, "TFLOP/s")
            case = f"{name}, {columns:,} x {features:,}, batch {size:,}" + " / bitsandbytes" * (name == "nf4")
            extra = {"us": 1e6 * seconds[0], "error": error}
            made.append(row(case, unit, *rates(amount / 1e9, *seconds), note=note) | extra)
    return made


def decoded_first(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.dense().to(x.dtype), layer.bias.to(x.dtype))


def stored(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def round_of(product: Callable, layer: nn.Module, x: torch.Tensor, count: int) -> Callable:
    """run(): product(copy, x) for so many copies of a layer; on CUDA as one graph."""
    layers = [copy.deepcopy(layer) for _ in range(count)]

    def run() -> None:
        for one in layers:
            product(one, x)

    if not x.is_cuda:
        return run
    run()  # compiles what has to be compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device), torch.cuda.graph(graph):
        run()
    return graph.replay


def optimizers(bench: Bench) -> list[dict]:
    """Steps from the same weights with the same gradients. "difference": of a weight from AdamW's, in learning rates."""
    made, plain = [], None
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(*bench.layer, device=bench.device) for _ in range(4)))
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        settings = settle("dpo", {"optimizer": name}).settings
        optimizer = make_optimizer(model, settings)
        seconds = medians({"": optimizer.step}, bench.repeats, bench.device)[""]
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        plain = weights if plain is None else plain
        state = sum(value.nbytes for values in optimizer.state.values() for value in values.values())
        extra = {"bytes_of_state": state / len(weights), "difference": float((weights - plain).abs().max()) / settings.lr}
        made.append(row(f"{name}, a step of {len(weights) / 1e6:,.1f} M weights", "ms", 1e3 * seconds) | extra)
    return made
