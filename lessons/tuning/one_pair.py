"""How does one pair become a gradient?

A pair of the demo's world goes through the whole of DPO once, by the functions that train.py calls:

    text --encode--> tokens --collate--> one row [prompt | chosen | rejected] --completion_logprobs--> two numbers
         --objective--> the loss --backward--> a gradient for every weight --AdamW--> the model after one step

The network's part in the loss is two numbers, the log-probabilities of the two answers, each the sum over its tokens
(Rafailov et al. 2023, eq. 7). The demo's loss of a pair is the robust one plus an NLL term (dpo.py has the formulas):

    loss = robust(z) + nll_weight * NLL/token
    z    = beta * [log pi/pi_ref (chosen) - log pi/pi_ref (rejected)]

Before the first step policy and reference are the same model: z = 0, and robust(0) = ln 2 = 0.693. The demo's first printed
loss is about 0.86, which is 0.693 + 2 * 0.08, and its first accuracy is 0.00: no margin is above 0 yet, and a tie does not
count as right. The model of this lesson has learned for a few seconds only, so its NLL is larger.
"""

import copy
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import demo
import dpo
import sft
from data import Batch, ChatML, Example, Ledger, collate, encode, epoch_order, load_tokenizer
from lessons.lesson import Claim, print_table
from model import Phi, completion_logprobs, sibling_mask
from prepare.rows import read_rows, spelled_out
from runtime.files import picture
from runtime.flags import settle
from runtime.optimizer import make_optimizer
from runtime.settings import Dpo

STEPS = 60  # of SFT, with 8 answers each: the model knows the form of an answer, but few facts
SYSTEM = "Be brief."


def prepare() -> tuple[Phi, ChatML, Example]:
    """The demo's model after a few steps of SFT, its tokenizer, and a pair that it has not seen."""
    with tempfile.TemporaryDirectory() as folder:
        world = demo.write_world(Path(folder) / "world", sizes={"sft": 8 * STEPS, "qat": 1, "pairs": 1, "test": 1})
        model, chat = Phi.from_pretrained(world.model), ChatML(load_tokenizer(world.model), SYSTEM)
        rows = read_rows(world.sft, "sft", on_bad_row="stop", ledger=Ledger())
    settings = settle("sft", {"model": "demo"}).settings
    [pair] = encode(demo.make_pair_rows(demo.make_questions(1, seed=5), 0.0, seed=0), chat, 1024, 512, Ledger())
    examples = encode(rows, chat, 1024, 512, Ledger())
    optimizer = make_optimizer(model, settings)
    for part in epoch_order(examples, settings.batch_size, seed=0, epoch=0):
        batch = collate([examples[i] for i in part])
        loss, _ = sft.objective(completion_logprobs(model, batch), batch.lengths)
        (loss / batch.lengths.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, chat, pair


@torch.no_grad()
def token_logprobs(model: Phi, batch: Batch) -> list[Tensor]:
    """log p of every token of the chosen and of the rejected answer, in nats."""
    hidden = model.predicting(batch)  # [M, D]
    logprobs = model.lm_head(hidden).log_softmax(-1).gather(1, batch.target[:, None])[:, 0]  # [M]
    return [logprobs[batch.owner == k] for k in range(2)]


@dataclass
class Measured:
    """A pair under a policy and the reference, each number for the chosen and the rejected answer."""

    policy: Tensor  # [2] nats; has a graph back to the model's weights
    loss: Tensor  # of the pair, nats
    metrics: dict[str, float]


def measure(model: Phi, batch: Batch, reference: Tensor | None, settings: Dpo) -> Measured:
    """The loss of the one pair of a batch. Without a reference the policy is its own."""
    policy = completion_logprobs(model, batch)  # [2]
    expected = policy.detach() if reference is None else reference
    given = settings.loss, settings.beta, settings.eps, settings.nll_weight
    loss, sums = dpo.objective(policy.view(1, 2), expected.view(1, 2), batch.lengths.view(1, 2), *given)
    return Measured(policy, loss, {name: (total / count).item() for name, (total, count) in sums.items()})


def slope_by_hand(
    model: Phi, batch: Batch, reference: Tensor, settings: Dpo, where: tuple[int, int], h: float = 0.01
) -> float:
    """d loss / d weight for one weight of the output layer: the weight is moved by h and by -h, and the loss is computed."""
    losses = []
    for step in (h, -h):
        moved = copy.deepcopy(model)
        moved.lm_head.weight.data[where] += step
        losses.append(measure(moved, batch, reference, settings).loss.item())
    return (losses[0] - losses[1]) / (2 * h)


def turns(example: Example, chat: ChatML) -> dict[str, range]:
    """Where the turns of a pair stand in its row: {"system": range(0, 9), ...}."""
    starts = [i for i, token in enumerate(example.prompt) if token == chat.start]
    ends = [*starts[1:], len(example.prompt)]
    names = [chat.decode(example.prompt[start + 1 : end]).partition("\n")[0] for start, end in zip(starts, ends)]
    names, first = [*names, "chosen", "rejected"], len(example.prompt)
    ranges = [*map(range, starts, ends)]
    for completion in example.completions:
        ranges.append(range(first, first + len(completion)))
        first += len(completion)
    return dict(zip(names, ranges))


def run(figure: Path) -> list[Claim]:
    model, chat, pair = prepare()
    settings: Dpo = settle("dpo", {"model": "demo"}).settings
    batch = collate([pair])
    print(spelled_out(pair, chat), "\n")
    for name, part in turns(pair, chat).items():
        segment, position = batch.segment[0, part], batch.position[0, part]
        print(f"  {name:9}  tokens {part[0]:2}-{part[-1]}  segment {segment[0]}  position {position[0]:2}-{position[-1]}")
    print()

    # Forward and backward: from the pair to the gradient of every weight.
    before = measure(model, batch, None, settings)
    reference = before.policy.detach()
    tokens_before = token_logprobs(model, batch)
    before.policy.retain_grad()
    before.loss.backward()
    gradient = model.lm_head.weight.grad
    steepest = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    by_hand = slope_by_hand(model, batch, reference, settings, steepest)
    exact = gradient[steepest].item()

    # One step of the optimizer, at the rate that train.py reaches after its warm-up.
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    make_optimizer(model, settings).step()
    after = measure(model, batch, reference, settings)
    tokens_after = token_logprobs(model, batch)

    sizes, (chosen, rejected) = batch.lengths.tolist(), before.policy.grad.tolist()
    rows = [
        ["tokens", *map(str, sizes)],
        ["log pi = log pi_ref, before the step", *before.policy.tolist()],
        ["reward, beta * (log pi - log pi_ref)", before.metrics["rewards/chosen"], before.metrics["rewards/rejected"]],
        ["d loss / d log pi", chosen, rejected],
        ["log pi after one step", *after.policy.tolist()],
        ["reward after one step", after.metrics["rewards/chosen"], after.metrics["rewards/rejected"]],
    ]
    print_table(["the pair (nats)", "chosen", "rejected"], rows)
    nll, loss = -before.policy[0].item() / sizes[0], before.loss.item()
    print(
        f"\n  z = 0, loss = robust(0) + nll_weight * NLL/token = {before.metrics['preference_loss']:.3f} + "
        f"{settings.nll_weight:.0f} * {nll:.3f} = {loss:.3f}, accuracy {before.metrics['rewards/accuracies']:.2f}, "
        f"ties {before.metrics['rewards/ties']:.2f}"
    )
    print(f"  gradient of one weight of the output layer: {exact:.5f} by backward(), {by_hand:.5f} by moving the weight")
    draw(figure, pair, chat, batch, tokens_before, tokens_after)

    slope = settings.beta / (2 * (1 - 2 * settings.eps))
    z = after.metrics["rewards/margins"]
    return [
        Claim(
            f"The first loss is ln 2 + nll_weight * NLL/token = 0.693 + {settings.nll_weight:.0f} * {nll:.3f} = {loss:.3f}, "
            "and the first accuracy is 0: policy and reference are one model, so z = 0: a tie, which is not counted right.",
            abs(loss - (math.log(2) + settings.nll_weight * nll)) < 1e-4
            and before.metrics["rewards/accuracies"] == 0
            and before.metrics["rewards/ties"] == 1,
        ),
        Claim(
            f"Only the two sums enter the loss. Its slope is -{slope:.2f} - {settings.nll_weight:.0f}/{sizes[0]} in the "
            f"chosen answer's log-probability and {slope:.2f} in the rejected one's; backward() carries these on to every "
            "weight, and moving one weight by hand gives the same slope.",
            abs(rejected - slope) < 1e-4
            and abs(chosen + slope + settings.nll_weight / sizes[0]) < 1e-4
            and abs(by_hand - exact) < 0.03 * abs(exact),
        ),
        Claim(
            f"After one step the chosen answer has gained {after.policy[0] - reference[0]:.2f} nats and the rejected one "
            f"{after.policy[1] - reference[1]:.2f}; z = {z:.2f} is above 0, so the pair counts as right.",
            z > 0 and after.policy[0].item() > reference[0].item() and after.metrics["rewards/accuracies"] == 1,
        ),
    ]


def draw(figure: Path, pair: Example, chat: ChatML, batch: Batch, before: list[Tensor], after: list[Tensor]) -> None:
    """The attention mask of the pair's row, and what a step does to the log-probability of each token."""
    seen = sibling_mask(batch.segment, torch.float32)[0, 0] == 0  # [T, T]
    shade = (seen * (batch.segment[0] + 1)).float()  # 0 unseen, 1 a prompt token is seen, 2 one of chosen, 3 of rejected
    parts = turns(pair, chat)
    with picture(figure, columns=2, size=(13, 5.6)) as (mask, change):
        mask.imshow(shade.where(seen, torch.nan), cmap="viridis_r", vmin=0.3, vmax=3.3, interpolation="nearest")
        middles = [(part.start + part.stop - 1) / 2 for part in parts.values()]
        for part in list(parts.values())[1:]:
            mask.axhline(part.start - 0.5, color="grey", linewidth=0.6)
            mask.axvline(part.start - 0.5, color="grey", linewidth=0.6)
        mask.set_xticks(middles, parts, rotation=30, ha="right")
        mask.set_yticks(middles, parts)
        mask.set(title="the attention mask: who reads whom", xlabel="token that is read", ylabel="token that reads")

        tokens = [chat.decode([token]) for ids in pair.completions for token in ids]
        rows, size = range(len(tokens)), len(pair.completions[0])
        change.barh([k - 0.2 for k in rows], -torch.cat(before), height=0.4, color="lightgrey", label="before the step")
        for start, values, colour, name in ((0, after[0], "tab:green", "chosen"), (size, after[1], "tab:red", "rejected")):
            heights = [start + k + 0.2 for k in range(len(values))]
            change.barh(heights, -values, height=0.4, color=colour, label=f"{name}, after it")
        change.axhline(size - 0.5, color="grey", linewidth=0.6)
        change.set_yticks(rows, tokens, fontsize=7)
        change.invert_yaxis()
        change.set(title="log-probability of each token, before and after one step", xlabel="-log p (nats)", ylabel="token")
        change.legend(loc="upper right")
