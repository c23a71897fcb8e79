"""One pass of a model over a data set: log-probabilities, distances between two models, answers.

Every number is a sum over all examples divided by their count, never a mean of batch means, so it does not depend on the
batch size. All of them use the same log-probability as training (`model.completion_logprobs`).
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import demo
from data import ChatML, Example, collate
from model import LOGIT_CHUNK, Phi, completion_logprobs, generate
from runtime import parallel


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """bf16 compute over fp32 weights, or plain fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")


@torch.no_grad()
def all_logprobs(model: Phi, examples: Sequence[Example], batch_size: int, device: str, dtype: str, label: str) -> Tensor:
    """Summed log-probabilities of every completion, in the examples' own order: [E, completions per example], fp32, CPU.
    Each of several ranks runs its share, and all get the whole table."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))  # like lengths together: little padding
    own = parallel.deal(order)
    table = torch.zeros(len(examples), len(examples[0].completions))
    rounds = range(parallel.rounds(len(order), batch_size))
    for i in parallel.progress(rounds, desc=label, unit="batch", leave=False, disable=None):
        part = own[i * batch_size : (i + 1) * batch_size]
        batch = collate([examples[k] for k in part or order[:1]]).to(device)
        with autocast(device, dtype):
            logprobs = completion_logprobs(model, batch)
        if part:  # else this rank has run out, and only keeps step with those that have not
            table[part] = logprobs.view(len(part), -1).cpu()
    return parallel.sum_over_ranks(table)


@torch.no_grad()
def divergence(full: Phi, other: Phi, examples: Sequence[Example], batch_size: int, device: str) -> dict[str, float]:
    """How far `other` is from `full`, over all predicted tokens of the examples' completions, each a mean over tokens:

    kl      KL(full || other) = sum_v p_v (log p_v - log p'_v), in nats
    top 1   share of tokens whose likeliest successor is the same
    loss    -log p'(the token that follows), in nats
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="comparing", unit="batch", leave=False, disable=None):
        batch = collate([examples[i] for i in order[start : start + batch_size]]).to(device)
        states = [model.predicting(batch) for model in (full, other)]  # two of [M, D]
        chunk = max(1, LOGIT_CHUNK // full.config.vocab_size)
        for h, h_other, target in zip(*(state.split(chunk) for state in states), batch.target.split(chunk), strict=True):
            p, q = full.lm_head(h).float().log_softmax(-1), other.lm_head(h_other).float().log_softmax(-1)  # [m, V]
            kl = (p.exp() * (p - q)).sum()
            agree = (p.argmax(-1) == q.argmax(-1)).sum()
            sums += torch.stack((kl, agree, -q.gather(1, target[:, None]).sum())).double().cpu()
        count += len(batch.target)
    kl, agree, loss = (sums / count).tolist()
    return {"kl": kl, "top 1": agree, "loss": loss}


def completion_lengths(examples: Sequence[Example]) -> Tensor:
    """Tokens of every completion, flattened as in a batch: [N]."""
    return torch.tensor([len(c) for e in examples for c in e.completions])


def evaluate(objective: Callable, policy: Tensor, reference: Tensor | None, examples: Sequence[Example]) -> dict[str, float]:
    """The objective's metrics over a whole data set, under the names of training with the prefix "eval_".

    policy and reference: tables of `all_logprobs`; reference is None for SFT.
    """
    flat_reference = None if reference is None else reference.flatten()
    _, sums = objective(policy.flatten(), completion_lengths(examples), flat_reference)
    return {f"eval_{name}": (value[0] / value[1]).item() for name, value in sums.items()}


def flips(examples: Sequence[Example]) -> Tensor | None:
    """Which labels are flipped, [E], if the rows say so (the demo's do)."""
    if not all("flipped" in e.extra for e in examples):
        return None
    return torch.tensor([bool(e.extra["flipped"]) for e in examples])


def sample_answers(
    model: Phi,
    chat: ChatML,
    examples: Sequence[Example],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 128,
) -> tuple[list[str], list[bool]]:
    """One sampled answer to each example's prompt, as text without the `<|im_end|>`, and whether it ended by itself."""
    stops, made = tuple(chat.control_ids), []
    # Ranks share whole batches: what is drawn depends on the batch and its seed, not on who draws it.
    starts = parallel.deal(range(0, len(examples), batch_size))
    for start in parallel.progress(starts, desc="sampling", unit="batch", leave=False, disable=None):
        prompts = [e.prompt for e in examples[start : start + batch_size]]
        made.append(generate(model, prompts, max_new_tokens, temperature, seed=seed + start, stop_tokens=stops))
    new = [ids for batch in parallel.collect(made) for ids in batch]
    return [chat.decode(ids) for ids in new], [len(ids) < max_new_tokens for ids in new]


def grades(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, list[bool]]:
    """For the demo's questions, whose rows carry the worked answer: which answers have the right method, and which the right
    number too. Nothing for others."""
    if not all("answer" in e.extra and "kind" in e.extra for e in examples):
        return {}
    graded = [demo.grade(answer, e.extra["answer"]) for answer, e in zip(answers, examples, strict=True)]
    return {"right method": [method for method, _ in graded], "right method and number": [full for _, full in graded]}
