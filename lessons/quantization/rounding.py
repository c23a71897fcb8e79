"""How can training repair rounding?

Rounded to 2 bits, a weight has one of four values, times the scale of its block. As a function of w, w~ is a staircase: flat
nearly everywhere, so its derivative is 0 and gradient descent would learn nothing. (The largest weight of a block is the
exception: it is the scale.) Quantization-aware training uses the staircase in the forward pass and the derivative of the
slope that it follows in the backward pass, the straight-through estimator (Bengio et al. 2013):

    forward    y = x W~^T + b                          backward    dL/dW := dL/dW~, as if dW~/dW were 1

The optimizer moves the unrounded W. Its small steps add up, until a weight crosses the middle between two levels and its
code changes. So all weights together learn to make up for each other's rounding. `quant.fake_quantize` is the estimator,
`quant.train_quantized` puts it into each linear layer of a network.

Here a small network learns the classes that another network, drawn at random, gives to random points; every batch is new. It
is then rounded to NF2 in blocks of 64 (2.5 bits a weight), and trained further through this rounding. To be fair, it is also
trained further for as many steps without rounding, and rounded at the end. The loss is the cross-entropy on held-out points.
"""

import copy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lessons.lesson import Claim, print_table
from metrics.intervals import Estimate, mean
from quant import fake_quantize, linear_layers, quantize_blockwise, quantize_model, train_quantized
from quant_kernels import unpack
from runtime.files import picture

CODE, BLOCK = "nf2", 64
INPUTS, WIDTH, CLASSES = 16, 64, 4
FIRST, MORE, EVERY = 250, 150, 25  # steps of training, of further training, and between two points of its curve
SEEDS = range(5)
AFTER = ("full precision", "rounded", "trained on, then rounded", "trained through rounding")


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES))


@torch.no_grad()
def batch(teacher: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Points [size, INPUTS] and the classes [size] that the teacher gives them."""
    x = torch.randn(size, INPUTS)
    return x, teacher(x).argmax(dim=1)


@torch.no_grad()
def loss_on(model: nn.Module, held_out: tuple[Tensor, Tensor]) -> float:
    x, classes = held_out
    return F.cross_entropy(model(x), classes).item()


def learn(model: nn.Module, teacher: nn.Module, steps: int, lr: float, held_out: tuple[Tensor, Tensor]) -> list[float]:
    """Trains a model in place; returns its loss before the first and after every EVERY-th step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    curve = [loss_on(model, held_out)]
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - 1) / steps)
        x, classes = batch(teacher, 128)
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
        if step % EVERY == 0:
            curve.append(loss_on(model, held_out))
    return curve


def rounded(model: nn.Module) -> nn.Module:
    return quantize_model(copy.deepcopy(model), CODE, block=BLOCK)


def codes(model: nn.Module) -> Tensor:
    matrices = [layer.weight for _, layer in linear_layers(model)]
    return torch.cat([unpack(quantize_blockwise(w, CODE, BLOCK).packed, 2) for w in matrices])


def one_network(seed: int) -> dict:
    """Losses by the names in AFTER, the curves of further training, and how many codes it changed."""
    torch.manual_seed(seed)
    teacher = network(32)
    for _, layer in linear_layers(teacher):
        layer.weight.data *= 3  # or nearly all points would be of one class
    held_out = batch(teacher, 2048)
    model = network(WIDTH)
    learn(model, teacher, FIRST, 1e-2, held_out)
    before = codes(model)
    losses = [loss_on(model, held_out), loss_on(rounded(model), held_out)]
    longer = copy.deepcopy(model)
    plain = learn(longer, teacher, MORE, 3e-3, held_out)
    through = learn(train_quantized(model, CODE, BLOCK), teacher, MORE, 3e-3, held_out)
    losses += [loss_on(rounded(longer), held_out), loss_on(rounded(model), held_out)]
    changed = (codes(model) != before).float().mean().item()
    return {"losses": dict(zip(AFTER, losses)), "plain": plain, "through": through, "changed": 100 * changed}


def staircase() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, w~, its slope between neighbouring points, the straight-through gradient) of a weight whose block has scale 1."""
    w = torch.linspace(-0.99, 0.99, 397, requires_grad=True)
    blocks = torch.stack((torch.ones_like(w), w), dim=1)  # [n, 2]: a 1 that sets the scale, and the weight
    steps = fake_quantize(blocks, CODE, 2)[:, 1]
    [through] = torch.autograd.grad(steps.sum(), w)
    w, steps = w.detach(), steps.detach()
    return w, steps, steps.diff() / w.diff(), through


def run(figure: Path) -> list[Claim]:
    w, steps, slope, through = staircase()
    runs = [one_network(seed) for seed in SEEDS]
    loss = {name: mean(torch.tensor([r["losses"][name] for r in runs])) for name in AFTER}
    changed = mean(torch.tensor([r["changed"] for r in runs]))
    print_table(
        ["loss, nats", "mean", "95% interval", *(f"seed {seed}" for seed in SEEDS)],
        [
            [name, f"{e.value:.3f}", f"{e.low:.3f}-{e.high:.3f}", *(f"{r['losses'][name]:.3f}" for r in runs)]
            for name, e in loss.items()
        ],
    )
    print(f"\n  {FIRST} steps, then {MORE} more; training through rounding changed {changed.value:.0f}% of the codes")

    with picture(figure, columns=3, size=(15, 4.5)) as (stairs, gradient, curves):
        stairs.plot(w, steps, label="w~, what the forward pass uses")
        stairs.plot(w, w, ":", color="grey", label="w, whose slope the backward pass uses")
        stairs.set(title="a weight rounded to NF2, scale 1", xlabel="w", ylabel="w~")
        stairs.legend()
        flat = slope.clone()
        flat[slope != 0] = float("nan")
        gradient.plot((w[1:] + w[:-1]) / 2, flat, label="true: 0, and undefined at each jump")
        for jump in w[1:][slope != 0].tolist():
            gradient.axvline(jump, color="C0", linestyle=":")
        gradient.plot(w, through, label="straight-through: 1")
        gradient.set(title="derivative of w~", xlabel="w", ylabel="d w~ / d w", ylim=(-0.2, 1.5))
        gradient.legend()
        draw_curves(curves, runs, loss)

    flat_share = (slope == 0).float().mean().item()
    won_back = [
        1 - (r["losses"][AFTER[3]] - r["losses"][AFTER[0]]) / (r["losses"][AFTER[1]] - r["losses"][AFTER[0]]) for r in runs
    ]
    back = mean(torch.tensor(won_back))
    same = max(abs(r["through"][-1] - r["losses"][AFTER[3]]) for r in runs)
    return [
        Claim(
            f"The staircase is flat at {100 * flat_share:.0f}% of the {len(slope)} places tried, so its true gradient "
            f"teaches nothing; the straight-through gradient is {through.mean():.0f} at all of them.",
            flat_share > 0.95 and bool((through == 1).all()),
        ),
        Claim(
            f"Rounding to 2 bits raises the loss from {loss[AFTER[0]].value:.2f} to {loss[AFTER[1]].value:.2f}. Training "
            f"through the rounding wins {100 * back.value:.0f}% of that back ({100 * back.low:.0f} to "
            f"{100 * back.high:.0f}%); as many steps without it, rounded at the end, come to {loss[AFTER[2]].value:.2f}.",
            min(won_back) > 0.5 and loss[AFTER[2]].low > loss[AFTER[3]].high,
        ),
        Claim(
            "What training saw is what is stored: quantized at the end, the network's loss differs by at most "
            f"{same:.1g} nats from that of the last step. For this, {changed.value:.0f}% of the weights moved to another "
            "level than the one that was nearest before.",
            same < 1e-4 and 1 < changed.value < 80,
        ),
    ]


def draw_curves(axis, runs: list[dict], loss: dict[str, Estimate]) -> None:
    x = range(0, MORE + 1, EVERY)
    for name, label, colour in (
        ("through", "trained through rounding (rounded)", "C1"),
        ("plain", "trained on without rounding", "C0"),
    ):
        points = [mean(torch.tensor(values)) for values in zip(*(r[name] for r in runs))]
        axis.plot(x, [p.value for p in points], color=colour, label=label)
        axis.fill_between(x, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.2)
    for name, colour in ((AFTER[1], "C3"), (AFTER[2], "C2")):
        axis.axhline(loss[name].value, color=colour, linestyle="--", label=name)
    axis.set(title=f"{len(SEEDS)} networks, mean and 95% interval", xlabel="steps of further training")
    axis.set(ylabel="held-out loss (nats)", ylim=(0, None))
    axis.legend()
