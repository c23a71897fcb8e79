"""Multiple choice, measured: four ways to read a choice off a model, and what an accuracy hides.

    letter      the likeliest of the replies "A", "B", ...
    summed      the likeliest of the options' own texts as the reply, argmax_i log pi(option_i | question)
    per char    argmax_i log pi(option_i | question) / characters of option_i: a long option is not punished for its length
                (EleutherAI's harness calls the two acc and acc_norm)
    generated   the letter that a greedy answer names; an answer that names none is invalid, and not right

For the first three all replies of a question stand behind its prompt in one row, so the prompt is run once for all of them.
A reply ends with `<|im_end|>`, whose log-probability counts. Chance is the mean of 1/options. *Position bias* is half of
sum_i |share of picks of letter i - share of right answers at letter i|: 0 for a model that picks each letter as often as it
is right; for one that always says the same, 1 less the share of questions where that is right (3/4 of four options).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data import LETTERS, ChatML, Example
from metrics.intervals import Estimate, share
from model import Phi, all_logprobs

SCORED = ("letter", "summed", "per char")
# "Answer: C", "the answer is (C)", "Option C is right"; not "Answer: A force acts".
NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b)[\s*]*(?:(?i:is|option|choice)\b[\s*]*|[:=][\s*]*)*"
    r"[(\[*]*([A-J])\b(?!['\u2019]|\s+(?!is\b)[a-z])"
)
ALONE = re.compile(r"[\s(\[*]*([A-J])(?:[).:\]*]|\s*$)")  # "C", "(C)", "C) 12 m"


@dataclass
class Choices:
    """The picks of one model: indices of options by method, None where an answer names no option."""

    right: list[int]
    counts: list[int]  # options of each question
    topics: list[str]
    picks: dict[str, list[int | None]]


def unanswered(examples: Sequence[Example], methods: Sequence[str]) -> Choices:
    """No picks yet, for examples with `choices` and `answer`. Topics go by the report's name or the course's."""
    topics = [str(e.raw.get("topic") or e.raw.get("subject") or "Unknown") for e in examples]
    picks = {name: [None] * len(examples) for name in methods}
    return Choices([e.answer for e in examples], [len(e.choices) for e in examples], topics, picks)


def parse_letter(reply: str, count: int) -> int | None:
    """The option that a reply chooses: the last one it names, or the letter that its last line or its first begins with.
    None if there is none among `count` options."""
    named = NAMED.findall(reply)
    lines = [line for line in reply.splitlines() if line.strip()]
    alone = [found[1] for line in (lines[-1:] + lines[:1]) if (found := ALONE.match(line))]
    letter = (named[-1:] or alone[:1] or [""])[0]
    return LETTERS.index(letter) if letter and letter in LETTERS[:count] else None


def score_options(
    model: Phi, examples: Sequence[Example], chat: ChatML, batch_size: int, device: str, dtype: str
) -> Choices:
    """Picks by the three scored methods."""
    made = unanswered(examples, SCORED)
    for count in sorted(set(made.counts)):
        part = [i for i, n in enumerate(made.counts) if n == count]
        asked = []
        for i in part:
            replies = (*LETTERS[:count], *examples[i].choices)
            asked.append(replace(examples[i], completions=[chat.reply(text) for text in replies]))
        table = all_logprobs(model, asked, batch_size, device, dtype, f"{count} options")  # [E, 2 count]
        for i, (letters, options) in zip(part, table.view(len(part), 2, count), strict=True):  # [count], [count]
            characters = options.new_tensor([len(choice) for choice in examples[i].choices])  # [count]
            scores = {"letter": letters, "summed": options, "per char": options / characters}
            for name, values in scores.items():
                made.picks[name][i] = int(values.argmax())
    return made


def generated(answers: Sequence[str], examples: Sequence[Example]) -> Choices:
    """The letters that sampled answers name."""
    made = unanswered(examples, ())
    made.picks["generated"] = [parse_letter(answer, count) for answer, count in zip(answers, made.counts, strict=True)]
    return made


def accuracies(choices: Choices) -> dict[str, Estimate]:
    """Share of right picks by method."""
    pairs = {name: zip(picks, choices.right, strict=True) for name, picks in choices.picks.items()}
    return {name: share(sum(pick == right for pick, right in pair), len(choices.right)) for name, pair in pairs.items()}


def by_topic(choices: Choices) -> dict[str, Estimate]:
    """Accuracy by letter on the questions of each topic, the largest topic first."""
    hits: dict[str, list[bool]] = {}
    for topic, pick, right in zip(choices.topics, choices.picks["letter"], choices.right, strict=True):
        hits.setdefault(topic, []).append(pick == right)
    return {topic: share(sum(part), len(part)) for topic, part in sorted(hits.items(), key=lambda item: -len(item[1]))}


def position_bias(picks: Sequence[int], right: Sequence[int]) -> float:
    """Half of the summed difference between the picked and the right letters' shares."""
    picked, expected = Counter(picks), Counter(right)
    return sum(abs(picked[i] - expected[i]) for i in picked | expected) / (2 * len(right))


def summary(scored: Choices, answered: Choices | None) -> dict:
    """Accuracies by method, the share of sampled answers that name no option, chance, the position bias of the letters, and,
    if there are several topics, the accuracy by topic."""
    made = accuracies(scored)
    if answered:
        picks = answered.picks["generated"]
        made |= accuracies(answered) | {"invalid": share(picks.count(None), len(picks))}
    made["chance"] = sum(1 / count for count in scored.counts) / len(scored.counts)
    made["position bias"] = position_bias(scored.picks["letter"], scored.right)
    topics = by_topic(scored)
    return {"choices": made} | ({"by topic": topics} if len(topics) > 1 else {})
