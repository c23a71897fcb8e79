"""From items to data sets: pairs are made, cleaned, split by question, and mixed to a size.

    items --make_rows--> rows --clean--> rows --split--> test rows
     jobs for the teacher    left out: counted   `-----> training rows --mix--> 20,000 inside 30,000 inside 40,000

Every row that is left out is counted, by reason. All random choices follow from the seed and the row's own text.
"""

import hashlib
import json
import math
import random
from collections import Counter, defaultdict

from data import Row, lettered, question_key, split_by_question
from prepare.sources import EECS, Item
from prepare.teacher import Request, argument, attempt, topic
from runtime.files import InputError

SHORTEST = 10  # characters of an answer
PAIRS_A_QUESTION = 10
BIN = 1.5  # the end of a bin of lengths, over its beginning
BARE = 40  # characters; a shorter answer needs an explanation before it can be preferred
TOPICS = ("Mathematics", "Physics", "Chemistry", "Biology", "Computer Science", EECS)


def is_empty(item: Item) -> bool:
    """Whether the question, the answer or an option is blank."""
    return not all(text.strip() for text in (item.question, item.answer, *item.choices))


def is_bare(item: Item) -> bool:
    """Whether the answer (an option, a number, a word) has to be explained before it can be preferred."""
    return not item.chosen and not item.explanation and (bool(item.choices) or len(item.answer) < BARE)


def wrong_option(item: Item, seed: int) -> str | None:
    """A random wrong option; None if there are no options, or all are the same text."""
    wrong = [choice for choice in item.choices if choice.strip() != item.answer.strip()]
    return random.Random(f"{seed}\n{item.question}").choice(wrong) if wrong else None


def prompt_text(item: Item) -> str:
    """The question, with its options below it if it has any."""
    question = item.question.strip()
    return f"{question}\n\n{lettered(item.choices)}" if item.choices else question


def jobs(items: list[Item], seed: int, what: str) -> dict[str, list[tuple[Item, Request]]]:
    """What to ask the teacher, by the field of the items that the answers go into: explanations of bare answers, for pairs
    rejected answers, and topics."""
    made = {
        "explanation": [(i, argument(i.question, i.choices, i.answer)) for i in items if is_bare(i)],
        "rejected": [],
        "topic": [(i, topic(i.question, TOPICS)) for i in items if not i.topic],
    }
    for item in items if what == "pairs" else ():
        if wrong := wrong_option(item, seed):
            made["rejected"].append((item, argument(item.question, item.choices, wrong)))
        elif not item.chosen and not item.choices:
            made["rejected"].append((item, attempt(item.question, item.answer if is_bare(item) else "")))
    return made


def origin(item: Item) -> dict:
    """The fields of a row that say what it is about and where it comes from."""
    topic = item.topic or "Unknown"
    return {"topic": topic, "source": item.source, "question_id": item.question_id, "licence": item.licence}


def make_rows(items: list[Item], what: str, taught: bool) -> list[dict]:
    """Rows for DPO ("pairs") or for SFT. What is missing stays empty, and `clean` leaves such rows out. SFT takes a bare
    answer, too, unless a teacher was asked to explain it and did not."""
    rows = []
    for item in items:
        bare = is_bare(item) and (what == "pairs" or taught)
        good = (item.chosen or item.explanation or ("" if bare else item.answer)).strip()
        by = {"chosen_by": "teacher" if "explanation" in item.taught else "source"}
        by["rejected_by"] = "teacher" if "rejected" in item.taught else "source"
        answers = {"chosen": good, "rejected": item.rejected.strip(), **by} if what == "pairs" else {"completion": good}
        rows.append({"prompt": item.messages or prompt_text(item), "question": item.question} | answers | origin(item))
    return rows


def asking(row: dict, name: str = "prompt") -> Row:
    """A row that asks what the field `name` says, text or messages."""
    said = row[name]
    return Row([{"role": "user", "content": said}] if isinstance(said, str) else said, [], row["question_id"], row)


def row_key(row: dict) -> str:
    """Equal for two rows that ask the same question with the same options."""
    return question_key(asking(row))


def answers_of(row: dict) -> list[str]:
    return [row[name] for name in ("chosen", "rejected", "completion") if name in row]


def clean(rows: list[dict], counts: Counter) -> list[dict]:
    """The rows worth training on; `counts` gets the reasons why the others are left out."""
    kept, seen, asked = [], set(), Counter()
    for row in rows:
        good, bad = answers_of(row)[0], row.get("rejected")
        whole, question = json.dumps([row["prompt"], good, bad]), row_key(row)
        reasons = {
            "no usable explanation of a bare answer": not good,
            "no rejected answer": bad == "",
            f"an answer under {SHORTEST} characters": bad is not None and min(len(good), len(bad)) < SHORTEST,
            "chosen and rejected are the same": good == bad,
            "exact duplicate": whole in seen,
            f"over {PAIRS_A_QUESTION} rows of one question": asked[question] == PAIRS_A_QUESTION,
        }
        if any(reasons.values()):
            counts[next(reason for reason, holds in reasons.items() if holds)] += 1
        else:
            seen.add(whole)
            asked[question] += 1
            kept.append(row)
    return kept


def gap(row: dict) -> int:
    """How many characters longer the chosen answer is."""
    return len(row["chosen"]) - len(row["rejected"])


def match_lengths(rows: list[dict], seed: int, counts: Counter) -> list[dict]:
    """Within each source, and each bin of |gap| and of the longer answer's length, equally many pairs whose chosen answer is
    the longer one and pairs whose rejected answer is. A bin ends at BIN times its beginning."""
    bins = defaultdict(list)
    for row in ordered(rows, f"{seed}-lengths"):
        sizes = (abs(gap(row)), max(len(row["chosen"]), len(row["rejected"])))
        bins[row["source"], *(math.floor(math.log(max(size, 1), BIN)) for size in sizes)].append(row)
    kept = []
    for part in bins.values():
        longer, shorter = [row for row in part if gap(row) > 0], [row for row in part if gap(row) < 0]
        size = min(len(longer), len(shorter))
        counts["left out to match lengths"] += len(longer) + len(shorter) - 2 * size
        kept += [row for row in part if gap(row) == 0] + longer[:size] + shorter[:size]
    return ordered(kept, str(seed))


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, test rows). Near-duplicates of a question (data.question_key) end up on the same side, also a question
    that one source asks with options and another without."""
    questions = [asking(row, "question" if isinstance(row.get("prompt", ""), str) else "prompt") for row in rows]
    train, test = split_by_question(questions, share, f"data {seed}")  # not as a run splits them again, with the same seed
    return [row.raw for row in train], [row.raw for row in test]


def ordered(rows: list[dict], salt: str) -> list[dict]:
    """The rows in a random order that depends only on their content and the salt."""

    def digest(row: dict) -> bytes:
        return hashlib.sha256("\n".join((salt, str(row["prompt"]), *answers_of(row))).encode()).digest()

    return sorted(rows, key=digest)


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
