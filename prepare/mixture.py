"""From items to data sets: pairs are made, cleaned, split by question, mixed to a size, and described.

    items --make_pairs--> rows --clean--> rows --split--> test rows
     jobs for the teacher     left out: counted   `-----> training rows --mix--> 20,000 inside 30,000 inside 40,000

Every row that is left out is counted, by reason. All random choices follow from the seed and the row's own text.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from data import Row, check_no_leak, question_key, split_by_question
from prepare.sources import EECS, Item
from prepare.teacher import Request, explanation, lettered, rejected, topic
from runtime.files import InputError

SHORTEST = 10  # characters of an answer
PAIRS_A_QUESTION = 10
BARE = 40  # characters; a shorter answer needs an explanation before it can be preferred
TOPICS = ("Mathematics", "Physics", "Chemistry", "Biology", "Computer Science", EECS)


# "Answer: C", "hence B", "Option (A)", "So A is your answer", or a letter alone at the end or beginning of a line.
NAMES_A_LETTER = re.compile(
    r"(?m)^\W*[A-E](?:[).:]|\W*$)|\b[A-E]\W*$"
    r"|(?i:\b(?:answers?|ans|options?|choices?|correct|imo|hence|thus|so)(?:[^A-Za-z\n]{0,6}(?:is|are|was|be|should be"
    r"|must be|will be|option|choice))?[^A-Za-z\n]{0,6}[A-E]\b)"
    r"|(?i:\b[A-E]\W+(?:is|was)\s+(?:the\s+|your\s+)?(?:correct|right|ans))"
)


def shuffled_choices(item: Item, seed: int) -> list[str]:
    """The options in random order, because some sets always publish the right one last (SciQ). They keep their order if the
    explanation seems to name one by its letter, as most of AQUA-RAT's do: it would then name the wrong one."""
    if NAMES_A_LETTER.search(item.explanation):
        return item.choices
    return random.Random(f"{seed}\n{item.question}\nchoices").sample(item.choices, len(item.choices))


def wrong_option(item: Item, seed: int) -> str | None:
    """A random wrong option; None if there are no options."""
    wrong = [choice for choice in item.choices if choice != item.answer]
    return random.Random(f"{seed}\n{item.question}").choice(wrong) if wrong else None


def prompt_text(item: Item) -> str:
    """The question, with its options below it if it has any."""
    question = item.question.strip()
    return f"{question}\n\n{lettered(item.choices)}" if item.choices else question


@dataclass
class Job:
    """Requests of one kind to the teacher. The n-th answer goes into `field` of the n-th item."""

    label: str
    field: str
    items: list[Item]
    requests: list[Request]

    def fill(self, answers: list[str | None]) -> None:
        for item, answer in zip(self.items, answers, strict=True):
            setattr(item, self.field, answer or "")


def jobs(items: list[Item], seed: int) -> list[Job]:
    """What the sources lack: explanations of bare answers (an option, a number, a word), rejected answers, and topics."""
    bare = [i for i in items if not i.chosen and not i.explanation and (i.choices or len(i.answer) < BARE)]
    one_answer = [i for i in items if not i.rejected]
    no_topic = [i for i in items if not i.topic]
    rejections = [rejected(i.question, i.choices, wrong_option(i, seed)) for i in one_answer]
    return [
        Job("explanations", "explanation", bare, [explanation(i.question, i.choices, i.answer) for i in bare]),
        Job("rejected answers", "rejected", one_answer, rejections),
        Job("topics", "topic", no_topic, [topic(i.question, TOPICS) for i in no_topic]),
    ]


def origin(item: Item) -> dict:
    """The fields of a row that say what it is about and where it comes from."""
    topic = item.topic or "Unknown"
    return {"topic": topic, "source": item.source, "question_id": item.question_id, "licence": item.licence}


def make_pairs(items: list[Item]) -> list[dict]:
    """Rows for DPO. What is missing stays empty; `clean` leaves such rows out."""
    rows = []
    for item in items:
        chosen = (item.chosen or item.explanation or item.answer).strip()
        row = {"prompt": prompt_text(item), "question": item.question, "chosen": chosen, "rejected": item.rejected.strip()}
        extra = {"data_source": item.data_source} if item.data_source else {}
        rows.append(row | origin(item) | extra)
    return rows


def row_key(row: dict) -> str:
    """Equal for two rows that ask the same question with the same options."""
    return question_key(Row([{"role": "user", "content": row["prompt"]}], [], "", {}))


def clean(rows: list[dict], counts: Counter) -> list[dict]:
    """The rows worth training on; `counts` gets the reasons why the others are left out."""
    kept, seen, asked = [], set(), Counter()
    for row in rows:
        prompt, chosen, rejected = pair = (row["prompt"], row["chosen"], row["rejected"])
        question = row_key(row)
        reasons = {
            "empty question or answer": not prompt.strip() or not chosen,
            "no rejected answer": not rejected,
            f"an answer under {SHORTEST} characters": min(len(chosen), len(rejected)) < SHORTEST,
            "chosen and rejected are the same": chosen == rejected,
            "exact duplicate": pair in seen,
            f"over {PAIRS_A_QUESTION} pairs of one question": asked[question] == PAIRS_A_QUESTION,
        }
        if any(reasons.values()):
            counts[next(reason for reason, holds in reasons.items() if holds)] += 1
        else:
            seen.add(pair)
            asked[question] += 1
            kept.append(row)
    return kept


def review_topics(rows: list[dict], reviewed: dict[str, str], counts: Counter) -> tuple[list[dict], list[dict]]:
    """(rows with the topics that a person filled in, rows still to review). The topic "drop" drops a question."""
    kept = [row for row in rows if reviewed.get(row_key(row)) != "drop"]
    if len(kept) < len(rows):
        counts["dropped in the review of topics"] = len(rows) - len(kept)
    unknown = [i for i, row in enumerate(kept) if row["topic"] == "Unknown"]
    for i in unknown:
        kept[i] = kept[i] | {"topic": reviewed.get(row_key(kept[i])) or "Unknown"}
    review = [kept[i] for i in unknown if kept[i]["topic"] == "Unknown"]
    return kept, [{name: row[name] for name in ("prompt", "source", "question_id")} | {"topic": ""} for row in review]


def gap(row: dict) -> int:
    """How many characters longer the chosen answer is."""
    return len(row["chosen"]) - len(row["rejected"])


def match_lengths(rows: list[dict], seed: int, counts: Counter) -> list[dict]:
    """Within each source, equally many pairs whose chosen answer is the longer one and pairs whose rejected answer is."""
    kept = []
    for source in sorted({row["source"] for row in rows}):
        own = ordered([row for row in rows if row["source"] == source], f"{seed}-lengths")
        longer = [row for row in own if gap(row) > 0]
        shorter = [row for row in own if gap(row) < 0]
        size = min(len(longer), len(shorter))
        counts["left out to match lengths"] += len(longer) + len(shorter) - 2 * size
        kept += [row for row in own if gap(row) == 0] + longer[:size] + shorter[:size]
    return ordered(kept, str(seed))


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, test rows). Near-duplicates of a question (data.question_key) end up on the same side, also a question
    that one source asks with options and another without."""
    asking = [Row([{"role": "user", "content": row["question"]}], [], row["question_id"], {}, raw=row) for row in rows]
    train, test = split_by_question(asking, share, seed)
    check_no_leak(train, test)
    return [row.raw for row in train], [row.raw for row in test]


def ordered(rows: list[dict], salt: str) -> list[dict]:
    """The rows in a random order that depends only on their content and the salt."""
    parts = ("prompt", "chosen", "rejected")
    return sorted(rows, key=lambda row: hashlib.sha256("\n".join((salt, *(row[p] for p in parts))).encode()).digest())


def mix(rows: list[dict], shares: dict[str, float], by: str, seed: str) -> list[dict]:
    """All rows, ordered so that the first n have the groups' shares for every n, as nearly as whole rows allow.

    The n-th row comes from the group that lacks most, share * n - taken, among the groups that have rows left. So the first
    20,000 are also the first of the first 30,000. `by` is "source" or "topic". Without shares all groups have the same; with
    some, groups that are not named stay out.
    """
    groups = defaultdict(list)
    for row in ordered(rows, seed):
        groups[row[by]].append(row)
    unknown = sorted(set(shares) - set(groups))
    if unknown:
        raise InputError(f"--shares: there are no rows of {', '.join(unknown)}; there are {', '.join(sorted(groups))}")
    weights = shares or dict.fromkeys(sorted(groups), 1.0)
    taken = Counter()
    mixed = []
    while left := {name: weights[name] for name in sorted(weights) if taken[name] < len(groups[name])}:
        n = sum(taken[name] for name in left) + 1
        name = max(left, key=lambda name: left[name] / sum(left.values()) * n - taken[name])
        mixed.append(groups[name][taken[name]])
        taken[name] += 1
    return mixed


def mixtures(rows: list[dict], sizes: list[int], shares: dict[str, float], by: str, seed: int) -> dict[str, list[dict]]:
    """{"train-20000": rows, ...}, each inside the next; {"train": all rows} without sizes. InputError for too few."""
    mixed = mix(rows, shares, by, str(seed))
    if sizes and max(sizes) > len(mixed):
        more = "give more sources or smaller sizes"
        raise InputError(f"--sizes {max(sizes)}: the mixture has {len(mixed):,} training rows; {more}")
    return {f"train-{size}": mixed[:size] for size in sizes} or {"train": mixed}


def longer_chosen(rows: list[dict]) -> float:
    """The share of pairs whose longer answer is the chosen one; equal lengths count half."""
    return sum((gap(row) > 0) + (gap(row) == 0) / 2 for row in rows) / len(rows)


def statistics(rows: list[dict], length: Callable[[str], int]) -> dict:
    """What to know about rows before training on them; `length` counts the tokens of a text."""
    lengths = {}
    for name in ("prompt", "chosen", "rejected"):
        values = sorted(length(row[name]) for row in rows)
        median, high = values[len(values) // 2], values[int(0.95 * len(values))]
        lengths[name] = {"median": median, "95%": high, "longest": values[-1]}
    sources = Counter(row["source"] for row in rows)
    by_source = {source: longer_chosen([row for row in rows if row["source"] == source]) for source in sorted(sources)}
    return {
        "rows": len(rows),
        "by source": dict(sources.most_common()),
        "by topic": dict(Counter(row["topic"] for row in rows).most_common()),
        "lengths": lengths,
        "longer answer is the chosen one": longer_chosen(rows),
        "longer answer is the chosen one, by source": by_source,
        "share of rows that repeat a question": 1 - len({row_key(row) for row in rows}) / len(rows),
    }


def words(text: str) -> int:
    """Words and punctuation marks: a stand-in for tokens when there is no tokenizer."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def describe(name: str, stats: dict, unit: str) -> str:
    """The statistics as text."""
    lines = [f"{name}: {stats['rows']:,} pairs"]
    for kind in ("source", "topic"):
        lines.append(f"  by {kind}: " + ", ".join(f"{key} {count:,}" for key, count in stats[f"by {kind}"].items()))
    for part, values in stats["lengths"].items():
        lines.append(f"  {part}, {unit}: " + ", ".join(f"{key} {value:,}" for key, value in values.items()))
    by_source = ", ".join(f"{key} {share:.0%}" for key, share in stats["longer answer is the chosen one, by source"].items())
    lines.append(f"  the longer answer is the chosen one: {stats['longer answer is the chosen one']:.1%} ({by_source})")
    lines.append(f"  rows that repeat a question: {stats['share of rows that repeat a question']:.1%}")
    return "\n".join(lines)
