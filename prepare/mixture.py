"""From items to data sets: pairs, cleaned, split by question, mixed to a size, and a picture of what came out.

    items --make_pairs--> rows --clean--> rows --split--> test rows
            teacher            counted            `-----> training rows --mix--> 20,000 inside 30,000 inside 40,000

Every row that is left out is counted with its reason. Nothing is drawn at random but from the seed.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data import LETTERS, Row, check_no_leak, question_key, split_by_question
from metrics.tables import picture
from prepare.sources import Item
from prepare.teacher import Request, explanation, rejected, topic
from runtime.files import InputError, write_json, write_jsonl, write_text

SHORTEST = 10  # characters; a shorter answer is no essay to prefer
PAIRS_A_QUESTION = 10
TOPICS = (
    "Mathematics",
    "Physics",
    "Chemistry",
    "Biology",
    "Computer Science",
    "Electrical Engineering and Computer Science",
)
Ask = Callable[[list[Request], str], list[str | None]]


# --------------------------------------------------------------------------------------------------------------- the pairs


def wrong_option(item: Item, seed: int) -> str | None:
    """One of the wrong options, by the hash of the question; None if there are no options."""
    wrong = [choice for choice in item.choices if choice != item.answer]
    return random.Random(f"{seed}\n{item.question}").choice(wrong) if wrong else None


# "Answer: C", "hence B", "Option (A)", "So A is your answer", or a letter alone at the end or beginning of a line.
NAMES_A_LETTER = re.compile(
    r"(?m)^\W*[A-E](?:[).:]|\W*$)|\b[A-E]\W*$"
    r"|(?i:\b(?:answers?|ans|options?|choices?|correct|imo|hence|thus|so)(?:[^A-Za-z\n]{0,6}(?:is|are|was|be|should be"
    r"|must be|will be|option|choice))?[^A-Za-z\n]{0,6}[A-E]\b)"
    r"|(?i:\b[A-E]\W+(?:is|was)\s+(?:the\s+|your\s+)?(?:correct|right|ans))"
)


def shuffled_choices(item: Item, seed: int) -> list[str]:
    """The options in an order drawn from the seed and the question: the right one must not always be last (SciQ's is).

    An explanation that names an option by its letter (most of AQUA-RAT's do) would then name another one, so those keep
    the order in which they were published. Where in doubt a letter counts as named.
    """
    if NAMES_A_LETTER.search(item.explanation):
        return item.choices
    return random.Random(f"{seed}\n{item.question}\nchoices").sample(item.choices, len(item.choices))


def prompt_text(item: Item) -> str:
    """The question, with its options below it if it has any."""
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices)]
    return "\n".join([item.question.strip(), *([""] if options else []), *options])


def chosen_requests(items: list[Item]) -> list[Item]:
    """The items whose right answer is too bare to be preferred: an option, a number, a word."""
    return [item for item in items if not item.chosen and not item.explanation and (item.choices or len(item.answer) < 40)]


def teach(items: list[Item], ask: Ask, seed: int) -> None:
    """Fills in what the sources lack: explanations of bare answers, rejected answers, topics."""
    bare = chosen_requests(items)
    texts = ask([explanation(item.question, item.choices, item.answer) for item in bare], "explanations")
    for item, text in zip(bare, texts, strict=True):
        item.explanation = text or ""
    alone = [item for item in items if not item.rejected]
    wrong = [rejected(item.question, item.choices, wrong_option(item, seed)) for item in alone]
    for item, text in zip(alone, ask(wrong, "rejected answers"), strict=True):
        item.rejected = text or ""
    untold = [item for item in items if not item.topic]
    texts = ask([topic(item.question, TOPICS) for item in untold], "topics")
    for item, text in zip(untold, texts, strict=True):
        item.topic = "" if text in (None, "Unknown") else text


def requests(items: list[Item], seed: int) -> list[Request]:
    """All requests that `teach` would make, for --dry-run."""
    made: list[Request] = []

    def ask(batch: list[Request], label: str) -> list[None]:
        made.extend(batch)
        return [None] * len(batch)

    teach([Item(**asdict(item)) for item in items], ask, seed)
    return made


def make_pairs(items: list[Item]) -> list[dict]:
    """Rows for DPO: prompt, chosen, rejected, and where they come from. What is missing stays empty; `clean` counts it."""
    return [
        {
            "prompt": prompt_text(item),
            "question": item.question,
            "chosen": (item.chosen or item.explanation or item.answer).strip(),
            "rejected": item.rejected.strip(),
            "topic": item.topic or "Unknown",
            "source": item.source,
            "question_id": item.question_id,
            "licence": item.licence,
            **({"data_source": item.data_source} if item.data_source else {}),
        }
        for item in items
    ]


# ----------------------------------------------------------------------------------------------------------------- cleaning


def clean(rows: list[dict], counts: Counter) -> list[dict]:
    """Leaves out rows that teach nothing; `counts` gets each reason with its number."""
    kept, seen, asked = [], set(), Counter()
    for row in rows:
        key, question = (row["prompt"], row["chosen"], row["rejected"]), row_key(row)
        if not row["prompt"].strip() or not row["chosen"]:
            reason = "empty question or answer"
        elif not row["rejected"]:
            reason = "no rejected answer"
        elif min(len(row["chosen"]), len(row["rejected"])) < SHORTEST:
            reason = f"an answer under {SHORTEST} characters"
        elif row["chosen"] == row["rejected"]:
            reason = "chosen and rejected are the same"
        elif key in seen:
            reason = "exact duplicate"
        elif asked[question] == PAIRS_A_QUESTION:
            reason = f"over {PAIRS_A_QUESTION} pairs of one question"
        else:
            seen.add(key)
            asked[question] += 1
            kept.append(row)
            continue
        counts[reason] += 1
    return kept


def as_row(row: dict, text: str) -> Row:
    return Row([{"role": "user", "content": text}], [], row["question_id"], row)


def row_key(row: dict) -> str:
    """What makes two rows ask the same; with options, the same options."""
    return question_key(as_row(row, row["prompt"]))


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, test rows). Near-duplicates of a question (data.question_key) stay on one side, and so do a question
    with options and the same one without, which another source may have."""
    train, test = split_by_question([as_row(row, row["question"]) for row in rows], share, seed)
    check_no_leak(train, test)
    return [row.extra for row in train], [row.extra for row in test]


def review_topics(rows: list[dict], filled_in: dict[str, str], counts: Counter) -> tuple[list[dict], list[dict]]:
    """(rows with the topics that a person filled in, rows still to review). The topic "drop" drops a question."""
    kept, review = [], []
    for row in rows:
        told = filled_in.get(row_key(row), "").strip()
        if told == "drop":
            counts["dropped in the review of topics"] += 1
            continue
        if row["topic"] == "Unknown" and told:
            row = row | {"topic": told}
        if row["topic"] == "Unknown":
            review.append({name: row[name] for name in ("prompt", "source", "question_id")} | {"topic": ""})
        kept.append(row)
    return kept, review


def match_lengths(rows: list[dict], seed: int, counts: Counter) -> list[dict]:
    """Within each source, as many pairs whose longer answer is the chosen one as pairs whose shorter is."""
    kept = []
    for source in sorted({row["source"] for row in rows}):
        sides = {1: [], 0: [], -1: []}
        for row in ordered([row for row in rows if row["source"] == source], f"{seed}-lengths"):
            gap = len(row["chosen"]) - len(row["rejected"])
            sides[(gap > 0) - (gap < 0)].append(row)
        size = min(len(sides[1]), len(sides[-1]))
        counts["left out to match lengths"] += len(sides[1]) + len(sides[-1]) - 2 * size
        kept += sides[0] + sides[1][:size] + sides[-1][:size]
    return ordered(kept, str(seed))


# ------------------------------------------------------------------------------------------------------------------ mixing


def ordered(rows: list[dict], salt: str) -> list[dict]:
    """The rows in an order that depends on their content and the salt alone."""

    def key(row: dict) -> bytes:
        text = "\n".join((salt, row["prompt"], row["chosen"], row["rejected"]))
        return hashlib.sha256(text.encode()).digest()

    return sorted(rows, key=key)


def mix(rows: list[dict], shares: dict[str, float], by: str, seed: str) -> list[dict]:
    """All rows in an order whose every beginning has the groups' shares as nearly as whole rows allow.

    The n-th row comes from the group that lacks most, share * n - taken, among those that have rows left; so the first
    20,000 are inside the first 30,000. `by` is "source" or "topic". Without any shares all groups have equal ones; with
    some, groups that are not named stay out.
    """
    groups: dict[str, list[dict]] = {}
    for row in ordered(rows, seed):
        groups.setdefault(row[by], []).append(row)
    unknown = set(shares) - set(groups)
    if unknown:
        raise InputError(
            f"--shares: there are no rows of {', '.join(sorted(unknown))}; there are {', '.join(sorted(groups))}"
        )
    weights = {name: shares.get(name, 0.0) if shares else 1.0 for name in sorted(groups)}
    taken, mixed = dict.fromkeys(weights, 0), []
    while True:
        left = {name: weight for name, weight in weights.items() if weight > 0 and taken[name] < len(groups[name])}
        if not left:
            return mixed
        total, n = sum(left.values()), sum(taken[name] for name in left) + 1
        name = max(left, key=lambda name: left[name] / total * n - taken[name])
        mixed.append(groups[name][taken[name]])
        taken[name] += 1


def mixtures(
    rows: list[dict], sizes: list[int], shares: dict[str, float], by: str, seed: int, independent: bool
) -> dict[int, list[dict]]:
    """{size: rows}; nested unless `independent`. InputError if there are too few rows."""
    made, nested = {}, None if independent else mix(rows, shares, by, str(seed))
    for size in sizes:
        order = mix(rows, shares, by, f"{seed}-{size}") if nested is None else nested
        if size > len(order):
            raise InputError(
                f"--sizes {size}: the mixture has {len(order):,} training rows; give more sources or smaller sizes"
            )
        made[size] = order[:size]
    return made


# -------------------------------------------------------------------------------------------------------- what came out


def statistics(rows: list[dict], length: Callable[[str], int]) -> dict:
    """What a careful person wants to know before training; lengths in the unit of `length`."""

    def longer(part: list[dict]) -> float:
        gaps = [len(row["chosen"]) - len(row["rejected"]) for row in part]
        return sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)

    sources = sorted({row["source"] for row in rows})
    lengths = {name: sorted(length(row[name]) for row in rows) for name in ("prompt", "chosen", "rejected")}
    quantiles = {
        name: {"median": values[len(values) // 2], "95%": values[int(0.95 * len(values))], "longest": values[-1]}
        for name, values in lengths.items()
    }
    return {
        "rows": len(rows),
        "by source": dict(Counter(row["source"] for row in rows).most_common()),
        "by topic": dict(Counter(row["topic"] for row in rows).most_common()),
        "lengths": quantiles,
        "longer answer is the chosen one": longer(rows),
        "longer answer is the chosen one, by source": {
            source: longer([row for row in rows if row["source"] == source]) for source in sources
        },
        "share of rows that repeat a question": 1 - len({row_key(row) for row in rows}) / len(rows),
    }


def words(text: str) -> int:
    """Words and signs: what stands for tokens where there is no tokenizer."""
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


def figure(train: list[dict], test: list[dict], path: Path) -> None:
    """The rows by source and by topic, training and test stacked: the report's Figure 1."""
    with picture(path, columns=2, size=(12, 4)) as axes:
        for axis, kind in zip(axes, ("source", "topic")):
            counts = [Counter(row[kind] for row in rows) for rows in (train, test)]
            names = [name for name, _ in (counts[0] + counts[1]).most_common()][::-1]
            axis.barh(names, [counts[0][name] for name in names], color="C0", label="training")
            left = [counts[0][name] for name in names]
            axis.barh(names, [counts[1][name] for name in names], left=left, color="C1", label="test")
            axis.set(xlabel="pairs", title=f"by {kind}")
        axes[0].legend(fontsize=8)


def write_all(directory: Path, made: dict[str, list[dict]], review: list[dict], ledger: dict, card: str) -> None:
    """Every file of the output folder, each whole; the card last."""
    for name, rows in made.items():
        write_jsonl(directory / f"{name}.jsonl", rows)
    write_jsonl(directory / "topics_to_review.jsonl", review)
    write_json(directory / "ledger.json", ledger)
    write_text(directory / "README.md", card)
