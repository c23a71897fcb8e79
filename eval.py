"""What is measured about a model: log-probabilities over a data set, preferences, sampled answers.

Every number is a sum over all examples divided by their count, never a mean of batch means, so it does not depend on the
batch size. All of them use the same log-probability as training (`model.completion_logprobs`).
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

import demo
from data import LETTERS, ChatML, Example, collate
from dpo import debiased_accuracy
from model import LOGIT_CHUNK, Phi, completion_logprobs, generate


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """bf16 compute over fp32 weights, or plain fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")


@torch.no_grad()
def all_logprobs(model: Phi, examples: Sequence[Example], batch_size: int, device: str, dtype: str, label: str) -> Tensor:
    """Summed log-probabilities of every completion, in the examples' own order: [E, completions per example], fp32, CPU."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))  # like lengths together: little padding
    table = torch.empty(len(examples), len(examples[0].completions))
    for start in tqdm(range(0, len(order), batch_size), desc=label, unit="batch", leave=False, disable=None):
        part = order[start : start + batch_size]
        batch = collate([examples[i] for i in part]).to(device)
        with autocast(device, dtype):
            table[part] = completion_logprobs(model, batch).view(len(part), -1).cpu()
    return table


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
        mask = None if int(batch.segment.max()) <= 1 else batch.segment
        states = [
            model.hidden(batch.tokens, batch.position, None if mask is None else model.mask(mask)).flatten(0, 1)[
                batch.source
            ]
            for model in (full, other)
        ]  # two of [M, D]
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


def preference_summary(
    policy: Tensor, reference: Tensor, examples: Sequence[Example], eps: float | None
) -> dict[str, float]:
    """How well the rewards of `policy` [E, 2] order chosen and rejected, beside what needs no training at all.

    Rows that say whether their label was flipped (the demo's do) also give accuracies on the clean labels.
    """
    margin = (policy - reference).diff(dim=1)[:, 0].neg()  # log-ratio margin in nats, chosen minus rejected  [E]
    own = policy.diff(dim=1)[:, 0].neg()  # which answer is likelier under the policy alone  [E]
    lengths = completion_lengths(examples).view(-1, 2)
    longer = (lengths[:, 0] - lengths[:, 1]).sign()
    accuracy = (margin > 0).float().mean().item()
    summary = {
        "reward accuracy": accuracy,
        "debiased accuracy": debiased_accuracy(accuracy, eps),
        "ties": (margin == 0).float().mean().item(),
        "longer answer wins": ((longer + 1) / 2).mean().item(),
        "chosen likelier": (own > 0).float().mean().item(),
        "logp per token, chosen": (policy[:, 0].sum() / lengths[:, 0].sum()).item(),
        "logp per token, rejected": (policy[:, 1].sum() / lengths[:, 1].sum()).item(),
    }
    if all("flipped" in e.extra for e in examples):
        truth = torch.tensor([-1.0 if e.extra["flipped"] else 1.0 for e in examples])
        summary["clean reward accuracy"] = (margin * truth > 0).float().mean().item()
        summary["right answer likelier"] = (own * truth > 0).float().mean().item()
    return summary


def choice_accuracy(
    model: Phi, examples: Sequence[Example], chat: ChatML, batch_size: int, device: str, dtype: str
) -> float:
    """Share of multiple-choice questions whose right letter is the likeliest of the options' letters as the whole reply.

    All letters of a question stand in one row behind the prompt, which is run once.
    """
    right = 0
    for count in sorted({e.extra["options"] for e in examples}):
        part = [e for e in examples if e.extra["options"] == count]
        letters = [chat.reply(letter) for letter in LETTERS[:count]]
        asked = [replace(e, completions=letters) for e in part]
        table = all_logprobs(model, asked, batch_size, device, dtype, f"{count} options")  # [E, count]
        right += sum(LETTERS[i] == e.extra["letter"] for i, e in zip(table.argmax(dim=1).tolist(), part, strict=True))
    return right / len(examples)


def sample_answers(
    model: Phi,
    chat: ChatML,
    examples: Sequence[Example],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 128,
) -> list[str]:
    """One sampled answer to each example's prompt, as text without the `<|im_end|>`."""
    stops = tuple(chat.control_ids)
    answers = []
    for start in tqdm(range(0, len(examples), batch_size), desc="sampling", unit="batch", leave=False, disable=None):
        prompts = [e.prompt for e in examples[start : start + batch_size]]
        new = generate(model, prompts, max_new_tokens, temperature, seed=seed + start, stop_tokens=stops)
        answers += [chat.decode(ids) for ids in new]
    return answers


def answer_summary(answers: Sequence[str], examples: Sequence[Example], chat: ChatML) -> dict[str, float]:
    """Mean length of sampled answers, and for the demo, whose rows carry the right answer, how many are right."""
    summary = {"tokens per answer": sum(len(chat.encode_text(a)) for a in answers) / len(answers)}
    if all("letter" in e.extra for e in examples):
        letters = [re.findall(r"\b[A-J]\b", answer)[-1:] for answer in answers]
        right = [found == [e.extra["letter"]] for found, e in zip(letters, examples, strict=True)]
        summary["sampled: right letter"] = sum(right) / len(right)
    elif all("answer" in e.extra for e in examples):
        grades = [demo.grade(answer, e.extra["answer"]) for answer, e in zip(answers, examples, strict=True)]
        summary["sampled: right method"] = sum(method for method, _ in grades) / len(grades)
        summary["sampled: right method and number"] = sum(full for _, full in grades) / len(grades)
    return summary
