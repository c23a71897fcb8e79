"""From items to data sets: pairs are made, cleaned, split by question, and mixed to a size.

    items --make_pairs--> rows --clean--> rows --split--> test rows
     jobs for the teacher     left out: counted   `-----> training rows --mix--> 20,000 inside 30,000 inside 40,000

Every row that is left out is counted, by reason. All random choices follow from the seed and the row's own text.
"""

import hashlib
import random
from collections import Counter, defaultdict

from data import Row, question_key, split_by_question
from prepare.sources import EECS, Item
from prepare.teacher import Request, explanation, lettered, rejected, topic
from runtime.files import InputError

SHORTEST = 10  # characters of an answer
PAIRS_A_QUESTION = 10
BARE = 40  # characters; a shorter answer needs an explanation before it can be preferred
TOPICS = ("Mathematics", "Physics", "Chemistry", "Biology", "Computer Science", EECS)


def wrong_option(item: Item, seed: int) -> str | None:
    """A random wrong option; None if there are no options."""
    wrong = [choice for choice in item.choices if choice != item.answer]
    return random.Random(f"{seed}\n{item.question}").choice(wrong) if wrong else None


def prompt_text(item: Item) -> str:
    """The question, with its options below it if it has any."""
    question = item.question.strip()
    return f"{question}\n\n{lettered(item.choices)}" if item.choices else question


def jobs(items: list[Item], seed: int) -> dict[str, list[tuple[Item, Request]]]:
    """What to ask the teacher, by the field of the items that the answers go into: explanations of bare answers (an option,
    a number, a word), rejected answers, and topics."""
    bare = [i for i in items if not i.chosen and not i.explanation and (i.choices or len(i.answer) < BARE)]
    one_answer = [i for i in items if not i.rejected]
    return {
        "explanation": [(i, explanation(i.question, i.choices, i.answer)) for i in bare],
        "rejected": [(i, rejected(i.question, i.choices, wrong_option(i, seed))) for i in one_answer],
        "topic": [(i, topic(i.question, TOPICS)) for i in items if not i.topic],
    }


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
        rows.append(row | origin(item))
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
    asking = [Row([{"role": "user", "content": row["question"]}], [], row["question_id"], row) for row in rows]
    train, test = split_by_question(asking, share, seed)
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
