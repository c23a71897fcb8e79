"""What do the rank and alpha of LoRA do, and why does the product start at 0?

LoRA trains B [O, r] and A [r, I] beside a frozen matrix W (Hu et al. 2021, eq. 3):  y = W x + (alpha / r) B A x.

    start   B = 0, A random. The product is 0, so the model is still the one that it starts from. With G the gradient of the
            loss for W, the gradient of B is (alpha / r) G A^T and that of A is (alpha / r) B^T G. At the start A has none,
            but B has one, and after a step of B so has A. With both at 0 neither ever gets one.
    rank    B A can be any matrix of rank r, so the error left of an update with singular values s_1 >= s_2 >= ... is at
            best sqrt(s_{r+1}^2 + s_{r+2}^2 + ...) (Eckart and Young 1936). What rank is enough depends on the spectrum.
    alpha   AdamW moves every value of B by about the learning rate, and the r columns of B add up along G. Dividing by r
            undoes that: with one alpha the first step lowers the loss by about as much at every rank. With alpha = r, the
            default here, the factor is 1 and a step at a larger rank goes further: a learning rate that suits rank 8 may be
            too high for rank 64.

A linear layer of 40 inputs and outputs shows all three. The target is the layer plus an update of known singular values; the
loss is the squared error on the 40 unit vectors, so it is the squared Frobenius norm of what is missing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from lessons.lesson import Claim, print_table
from lora import LoraLinear, add_lora
from metrics.intervals import Estimate, mean
from runtime.files import picture
from runtime.optimizer import adamw

SIZE = 40
RANKS = (1, 2, 4, 8, 16, 32)
SPECTRA = {"1/k": 1 / torch.arange(1, SIZE + 1), "0.8^k": 0.8 ** torch.arange(1, SIZE + 1)}  # of the update to learn
SEEDS = 10
ALPHA = 16
RATE = 1e-4  # small, so that one step is a step along the slope
LONG = 100  # steps at a rate of 200 * RATE, to see which starts learn


@dataclass
class Task:
    """An adapted layer and what it should compute for the unit vectors."""

    model: nn.Module
    wanted: Tensor  # [SIZE, SIZE]

    @property
    def layer(self) -> LoraLinear:
        return self.model[0]

    def loss(self) -> Tensor:
        return ((self.model(torch.eye(SIZE)) - self.wanted) ** 2).sum()


def make_task(rank: int, alpha: float, spectrum: str, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.linalg.qr(torch.randn(2, SIZE, SIZE, generator=generator)).Q
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    wanted = model(torch.eye(SIZE)).detach() + (left * SPECTRA[spectrum] @ right.T).T
    return Task(add_lora(model, rank, alpha, seed=seed), wanted)


def best_error(rank: int, spectrum: str) -> float:
    """The relative error of the best approximation of that rank."""
    values = SPECTRA[spectrum]
    return (values[rank:].norm() / values.norm()).item()


def fitted_error(rank: int, spectrum: str, seed: int) -> float:
    """The relative error that is left when A and B are trained to convergence (by L-BFGS)."""
    task = make_task(rank, rank, spectrum, seed)
    trained = [task.layer.lora_A, task.layer.lora_B]
    optimizer = torch.optim.LBFGS(trained, max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = task.loss()
        value.backward()
        return value

    optimizer.step(loss)
    return task.loss().sqrt().item() / SPECTRA[spectrum].norm().item()


def train(task: Task, rate: float, steps: int) -> list[float]:
    """The losses before each of `steps` steps of AdamW, and after the last."""
    optimizer = adamw([{"params": [task.layer.lora_A, task.layer.lora_B]}], lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, task.loss().item()]


def first_fall(rank: int, alpha: float) -> Estimate:
    """1,000 times what the first step takes off the loss, over all seeds."""
    losses = [train(make_task(rank, alpha, "1/k", seed), RATE, steps=1) for seed in range(SEEDS)]
    return mean(torch.tensor([1000 * (before - after) for before, after in losses]))


STARTS = ("A random, B = 0", "both 0", "both random")


def started(start: str) -> Task:
    """An adapter of rank 8 that starts in one of three ways."""
    task = make_task(8, 8, "1/k", seed=0)
    if start == "both 0":
        nn.init.zeros_(task.layer.lora_A)
    if start == "both random":
        nn.init.uniform_(task.layer.lora_B, -0.2, 0.2, torch.Generator().manual_seed(1))
    return task


def first_gradients(task: Task) -> dict[str, float]:
    """How far the output is from the frozen layer's before the first step, and the norms of the first gradients."""
    task.loss().backward()
    x = torch.eye(SIZE)
    moved = (task.model(x) - task.layer.base(x)).norm().item()
    return {
        "output moved by": moved,
        "grad A": task.layer.lora_A.grad.norm().item(),
        "grad B": task.layer.lora_B.grad.norm().item(),
    }


def run(figure: Path) -> list[Claim]:
    best = {name: [best_error(rank, name) for rank in RANKS] for name in SPECTRA}
    fitted = {name: [fitted_error(rank, name, seed=0) for rank in RANKS] for name in SPECTRA}
    falls = {
        f"alpha = {ALPHA}": [first_fall(rank, ALPHA) for rank in RANKS],
        "alpha = rank": [first_fall(rank, rank) for rank in RANKS],
    }
    rows = [[f"{rank}"] for rank in RANKS]
    for name in SPECTRA:
        for row, known, found in zip(rows, best[name], fitted[name]):
            row += [f"{known:.3f}", f"{found:.3f}"]
    for estimates in falls.values():
        for row, e in zip(rows, estimates):
            row.append(f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})")
    header = ["rank", *(text for name in SPECTRA for text in (f"best, s_k = {name}", "fitted"))]
    print("  relative error that a rank leaves, and 1,000 times the fall of the loss in the first step (95%)\n")
    print_table([*header, *falls], rows)

    at_start = {start: first_gradients(started(start)) for start in STARTS}
    learned = {start: train(started(start), 200 * RATE, LONG) for start in STARTS}
    print()
    for start, numbers in at_start.items():
        shown = ", ".join(f"{name} {value:.2g}" for name, value in numbers.items())
        print(f"  {start}: {shown}; loss {learned[start][0]:.2f} at first, {learned[start][-1]:.2f} after {LONG} steps")
    draw(figure, learned, best, fitted, falls)

    lora, zeros = at_start["A random, B = 0"], at_start["both 0"]
    worst = max(found - known for name in SPECTRA for known, found in zip(best[name], fitted[name]))
    fixed, growing = ([e.value for e in estimates] for estimates in falls.values())
    eight = RANKS.index(8)
    return [
        Claim(
            "With B = 0 the adapted layer computes exactly what the frozen one does. A has no gradient yet, but B has; if "
            "both were 0, neither would have one, and nothing would ever be learned.",
            lora["output moved by"] == lora["grad A"] == zeros["grad A"] == zeros["grad B"] == 0
            and lora["grad B"] > 0.01
            and learned["A random, B = 0"][-1] < 0.5 * learned["A random, B = 0"][0]
            and learned["both 0"][-1] == learned["both 0"][0],
        ),
        Claim(
            f"Trained adapters reach the best error of their rank (within {worst:.4f}); rank 8 leaves "
            f"{best['1/k'][eight]:.0%} of an update with singular values 1/k, {best['0.8^k'][eight]:.0%} of one with 0.8^k.",
            worst < 0.02,
        ),
        Claim(
            "With one alpha for all ranks the first step of AdamW lowers the loss by about as much at each of them; with "
            f"alpha = rank, a step at rank 32 does {growing[-1] / growing[0]:.0f} times as much as at rank 1.",
            max(fixed) < 1.5 * min(fixed) and growing[-1] > 15 * growing[0],
        ),
    ]


def draw(figure: Path, learned: dict, best: dict, fitted: dict, falls: dict[str, list[Estimate]]) -> None:
    with picture(figure, columns=3, size=(10.5, 3.3)) as (starts, errors, steps):
        for start, style in zip(STARTS, ("-", "--", ":")):
            starts.plot(learned[start], style, label=start)
        starts.set(title="three starts, rank 8", xlabel="steps of AdamW", ylabel="squared error")
        starts.legend()
        for name in SPECTRA:
            [line] = errors.plot(RANKS, best[name], label=f"best, s_k = {name}")
            errors.plot(RANKS, fitted[name], ".", color=line.get_color(), label="trained")
        errors.set(title="what a rank cannot learn", xlabel="rank", ylabel="relative error", xscale="log", ylim=(0, 1.2))
        errors.legend()
        for (name, estimates), marker in zip(falls.items(), "os"):
            values = [e.value for e in estimates]
            spread = [e.value - e.low for e in estimates], [e.high - e.value for e in estimates]
            steps.errorbar(RANKS, values, spread, fmt=f"{marker}-", capsize=4, label=name)
        steps.set(title="the first step, with 95%", xlabel="rank", xscale="log", yscale="log")
        steps.set_ylabel("fall of the loss x 1,000")
        steps.legend()
        for axis in (errors, steps):
            axis.set_xticks(RANKS, RANKS)
            axis.minorticks_off()
