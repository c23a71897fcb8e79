"""Multiple choice, measured: four ways to read a choice off a model, and what an accuracy hides.

    letter      the likeliest of the replies "A", "B", ...
    summed      the likeliest of the options' own texts as the reply, argmax_i log pi(option_i | question)
    per char    argmax_i log pi(option_i | question) / characters of option_i: a long option is not punished for its length
                (EleutherAI's harness calls the two acc and acc_norm)
    generated   the letter that a greedy answer names; an answer that names none is invalid, and not right

For the first three all replies of a question stand behind its prompt in one row, so the prompt is run once for all of them.
A reply ends with `<|im_end|>`, whose log-probability counts. Chance is the mean of 1/options. *Position bias* is half of
sum_i |share of picks of letter i - share of right answers at letter i|: 0 for a model that picks each place as often as it
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


def topic(example: Example) -> str:
    """The row's topic, under the names that the report's files and the course's use."""
    return str(example.raw.get("topic") or example.raw.get("subject") or "Unknown")


def parse_letter(reply: str, count: int) -> int | None:
    """The option that a reply settles on: the last one it names, or the letter that its last line or its first begins with.
    None if there is none among `count` options."""
    named = NAMED.findall(reply)
    lines = [line for line in reply.splitlines() if line.strip()]
    alone = [found[1] for line in (lines[-1:] + lines[:1]) if (found := ALONE.match(line))]
    letter = (named[-1:] or alone[:1] or [""])[0]
    return LETTERS.index(letter) if letter and letter in LETTERS[:count] else None


def score_options(
    model: Phi, examples: Sequence[Example], chat: ChatML, batch_size: int, device: str, dtype: str
) -> Choices:
    """Picks by the three scored methods. Every example has `choices` and `answer`."""
    made = Choices(
        right=[e.answer for e in examples],
        counts=[len(e.choices) for e in examples],
        topics=[topic(e) for e in examples],
        picks={name: [None] * len(examples) for name in SCORED},
    )
    for count in sorted(set(made.counts)):
        part = [i for i, n in enumerate(made.counts) if n == count]
        asked = [replace(examples[i], completions=replies(examples[i], chat)) for i in part]
        table = all_logprobs(model, asked, batch_size, device, dtype, f"{count} options")  # [E, 2 count]
        for i, (letters, options) in zip(part, table.view(len(part), 2, count), strict=True):  # [count], [count]
            characters = options.new_tensor([len(choice) for choice in examples[i].choices])  # [count]
            scores = {"letter": letters, "summed": options, "per char": options / characters}
            for name, values in scores.items():
                made.picks[name][i] = int(values.argmax())
    return made


def replies(example: Example, chat: ChatML) -> list[list[int]]:
    """Token ids of all letters, then of all options' texts."""
    return [chat.reply(text) for text in (*LETTERS[: len(example.choices)], *example.choices)]


def accuracies(choices: Choices) -> dict[str, Estimate]:
    """Share of right picks by method."""
    pairs = {name: zip(picks, choices.right, strict=True) for name, picks in choices.picks.items()}
    return {name: share(sum(pick == right for pick, right in pair), len(choices.right)) for name, pair in pairs.items()}


def by_topic(choices: Choices, method: str) -> dict[str, Estimate]:
    """Accuracy of one method on the questions of each topic, the largest topic first."""
    hits: dict[str, list[bool]] = {}
    for topic, pick, right in zip(choices.topics, choices.picks[method], choices.right, strict=True):
        hits.setdefault(topic, []).append(pick == right)
    return {topic: share(sum(part), len(part)) for topic, part in sorted(hits.items(), key=lambda item: -len(item[1]))}


def chance(choices: Choices) -> float:
    return sum(1 / count for count in choices.counts) / len(choices.counts)


def invalid(choices: Choices) -> Estimate:
    """Share of generated answers that name no option."""
    picks = choices.picks["generated"]
    return share(picks.count(None), len(picks))


def letter_shares(indices: Sequence[int | None]) -> dict[str, float]:
    """How often each letter stands among the indices; None counts for no letter."""
    counts = Counter(LETTERS[i] for i in indices if i is not None)
    return {letter: counts[letter] / len(indices) for letter in LETTERS if counts[letter]}


def position_bias(choices: Choices, method: str) -> float | None:
    """Half of the summed difference of picked and right letters' shares, over answers that name a letter; None without."""
    valid = [(pick, right) for pick, right in zip(choices.picks[method], choices.right, strict=True) if pick is not None]
    if not valid:
        return None
    picked, right = (letter_shares(side) for side in zip(*valid))
    return sum(abs(picked.get(letter, 0) - right.get(letter, 0)) for letter in LETTERS) / 2


def generated(answers: Sequence[str], examples: Sequence[Example]) -> Choices:
    """The letters that sampled answers name."""
    counts = [len(e.choices) for e in examples]
    picks = [parse_letter(answer, count) for answer, count in zip(answers, counts, strict=True)]
    return Choices([e.answer for e in examples], counts, [topic(e) for e in examples], {"generated": picks})


def summary(scored: Sequence[Choices]) -> dict:
    """Accuracy, position bias and picks by method, accuracy by topic (letters), chance, and the share of invalid answers."""
    made = {"choices": {}, "position bias": {}, "picks": {"right": letter_shares(scored[0].right)}}
    for part in scored:
        made["choices"] |= accuracies(part)
        for method, picks in part.picks.items():
            made["position bias"][method] = position_bias(part, method)
            made["picks"][method] = letter_shares(picks)
            if method == "generated":
                made["invalid"] = invalid(part)
    return made | {"chance": chance(scored[0]), "by topic": by_topic(scored[0], "letter")}
