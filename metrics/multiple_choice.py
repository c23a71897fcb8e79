"""Multiple choice, measured: four ways to read a choice off a model, and what an accuracy hides.

    letter      the likeliest of the replies "A", "B", ...
    summed      the likeliest of the options' own texts as the reply, argmax_i log pi(option_i | question)
    per char    argmax_i log pi(option_i | question) / characters of option_i: a long option is not punished for its length
                (EleutherAI's harness calls the two acc and acc_norm)
    generated   the letter that a greedy answer chooses; an answer that chooses none is invalid, and not right

For the first three all replies of a question stand behind its prompt in one row, so the prompt is run once for all of them.
A reply ends with `<|im_end|>`, whose log-probability counts. Chance is the mean of 1/options. *Position bias* is half of
sum_i |share of picks of letter i - share of right answers at letter i|: 0 for a model that picks each letter as often as it
is right; for one that always says the same, 1 less the share of questions where that is right (3/4 of four options). Few
questions make it large by chance: one that draws its letters from a hat scores about .22 on 24 questions with five options,
.03 on 989 with four. So that figure for the questions at hand stands beside it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from data import LETTERS, ChatML, Example
from metrics.intervals import Estimate, share
from model import Phi, all_logprobs

SCORED = ("letter", "summed", "per char")
# A letter that is a name. A and I are words, too: "A force acts" names nothing. Nor do "B or C" and "F = m a".
LETTER = (
    r"\b([B-HJ]|[AI](?!\s+(?!(?:is|because|since|as|for)\b)[a-z]))\b"
    r"(?!['\u2019]|\s*[+=^]|\)?\s*(?:,|/|and|or)\s*[A-J]\b)"
)
# How a reply says which one it means, from the plainest way to the vaguest. Where one way names several, the last counts.
SAYS = [
    # "Answer: C", "the correct option is option B"
    r"(?:boxed|(?i:\b(?:answer|option|choice|verdict)))(?:\s*[:=\u2013-]|\s+(?:is|was|must be)\b)"
    rf"(?:[\s:=]|(?i:is|option|choice|answer|therefore|thus|clearly)\b){{0,9}}{LETTER}",
    # "C is correct", "A is clearly the better answer"; not "neither A nor B is better"
    rf"(?<!\bor )(?<!\bnor )(?<!\band ){LETTER}[).]? is (?:\w+ly |much |far |more |the |an? ){{0,9}}"
    r"(?:better|best|correct|right|answer)\b",
    # "I think it's B"
    rf"(?i:\b(?:it is|it['\u2019]s|prefer|choose|pick|go with|say)(?: option| answer| choice)?)\s+{LETTER}",
]
MENTIONED = rf"(?i:\b(?:answer|option|choice))\s+{LETTER}"  # counts if no other is mentioned
ALONE = re.compile(r"\s*([A-J])(?:[).:\]]|\s*$)")  # "C", "C) 12 m"


def parse_choice(reply: str, names: Sequence[str]) -> int | None:
    """The index of the one of `names` (letters, or words such as "tie") that a reply of any form chooses: by how it says so
    (`SAYS`), by the only one that it mentions, or by the letter that its last line or its first begins with. None if there
    is none, or if that letter is not among `names`."""
    said = re.sub(r"\\boxed\s*\{", "boxed: ", reply)
    said = re.sub(r"\\[a-z]+\s*\{|[*$\"`{}(\[]", "", said)  # \text{C}, **C**, (C
    bare = said.strip(" \t\n.:)]'").casefold()
    found = [name for name in names if name.casefold() == bare]
    if "A" in names:
        found = found or next(filter(None, (re.findall(way, said)[-1:] for way in SAYS)), [])
    if not found:
        words = [name for name in names if len(name) > 1 and re.search(rf"(?i)\b{re.escape(name)}\b", said)]
        found = [word for word in words if not any(word in other and word != other for other in words)]
    if not found and "A" in names:
        lines = [line for line in said.splitlines() if line.strip()]
        alone = [start[1] for line in (lines[-1:] + lines[:1]) if (start := ALONE.match(line))]
        found = sorted(set(re.findall(MENTIONED, said))) or alone[:1]
    return list(names).index(found[0]) if len(found) == 1 and found[0] in names else None


def parse_letter(reply: str, count: int) -> int | None:
    """The index of the option, of `count`, whose letter a reply chooses; None if there is none."""
    return parse_choice(reply, LETTERS[:count])


def score_options(
    model: Phi, examples: Sequence[Example], chat: ChatML, batch_size: int, device: str, dtype: str
) -> dict[str, list[int]]:
    """Picks by the three scored methods: the index of an option for each example."""
    picks = {name: [0] * len(examples) for name in SCORED}
    for count in sorted({len(e.choices) for e in examples}):
        part = [i for i, e in enumerate(examples) if len(e.choices) == count]
        asked = []
        for i in part:
            replies = (*LETTERS[:count], *examples[i].choices)
            asked.append(replace(examples[i], completions=[chat.reply(text) for text in replies]))
        table = all_logprobs(model, asked, batch_size, device, dtype, f"{count} options")  # [E, 2 count]
        for i, (letters, options) in zip(part, table.view(len(part), 2, count), strict=True):  # [count], [count]
            characters = options.new_tensor([len(choice) for choice in examples[i].choices])  # [count]
            scores = {"letter": letters, "summed": options, "per char": options / characters}
            for name, values in scores.items():
                picks[name][i] = int(values.argmax())
    return picks


def accuracy(picks: Sequence[int | None], examples: Sequence[Example]) -> Estimate:
    """Share of right picks; None picks nothing."""
    return share(sum(pick == e.answer for pick, e in zip(picks, examples, strict=True)), len(examples))


def position_bias(picks: Sequence[int], right: Sequence[int]) -> float:
    """Half of the summed difference between the picked and the right letters' shares."""
    picked, expected = Counter(picks), Counter(right)
    return sum(abs(picked[i] - expected[i]) for i in picked | expected) / (2 * len(right))


def bias_by_chance(counts: Sequence[int], right: Sequence[int]) -> float:
    """The mean position bias, over 500 draws, of a picker that takes each of a question's options with equal probability."""
    drawn = torch.rand(500, len(counts), generator=torch.Generator().manual_seed(0))
    picks = (drawn * torch.tensor(counts)).long()  # [500, questions]
    gaps = [((picks == i).sum(dim=1) - right.count(i)).abs().double().mean().item() for i in range(max(counts))]
    return sum(gaps) / (2 * len(right))


def summary(
    examples: Sequence[Example], picks: dict[str, list[int]], asked: Sequence[Example], answers: Sequence[str]
) -> dict:
    """Accuracies by method, that of sampled answers to the examples `asked`, the share of these that name no option, chance,
    the position bias of the letters beside that of chance, and, if there are several topics, the accuracy by topic (by
    letter, the largest topic first)."""
    made = {name: accuracy(its, examples) for name, its in picks.items()}
    if asked:
        named = [parse_letter(answer, len(e.choices)) for answer, e in zip(answers, asked, strict=True)]
        made |= {"generated": accuracy(named, asked), "invalid": share(named.count(None), len(named))}
    counts, right = [len(e.choices) for e in examples], [e.answer for e in examples]
    made["chance"] = sum(1 / count for count in counts) / len(counts)
    made["position bias"] = position_bias(picks["letter"], right)
    made["bias by chance"] = bias_by_chance(counts, right)
    topics: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        topics.setdefault(str(e.raw.get("topic") or e.raw.get("subject") or "Unknown"), []).append(i)
    by_topic = {
        topic: accuracy([picks["letter"][i] for i in part], [examples[i] for i in part])
        for topic, part in sorted(topics.items(), key=lambda item: -len(item[1]))
    }
    return {"choices": made} | ({"by topic": by_topic} if len(by_topic) > 1 else {})
