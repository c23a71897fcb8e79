"""--stage data: from sources to checked data sets, and beside them what a person should know about them.

    out/data/  train-20000.jsonl ... (or train.jsonl)   test.jsonl   mcq-train.jsonl   mcq-test.jsonl
               topics_to_review.jsonl   ledger.json   statistics.json   figures/dataset.png   README.md (the data card)

The folder appears when all of it is written. OUT/teacher/journal.jsonl keeps the teacher's answers and OUT/sources.lock.json
the commits of hub data sets, so after a stop the same command continues.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data import LETTERS, load_tokenizer
from metrics.tables import markdown, picture
from prepare import mixture
from prepare.sources import Item, Reading, read_source
from prepare.teacher import ask_all, estimate, open_teacher
from runtime.files import InputError, json_object, numbered_lines, read_json, whole_directory, write_json, write_jsonl
from runtime.settings import Data
from runtime.weights import resolve


def run(settings: Data) -> int:
    """Builds the data sets. A dry run only says what the teacher would be asked."""
    folder = Path(settings.out) / settings.name
    check_output(folder, settings)
    sizes, shares = sizes_and_shares(settings)
    reviewed = reviewed_topics(settings.topics)
    teacher, journal = open_teacher(settings)

    sources = read_sources(settings)
    items = [item for source in sources.values() for item in source.items]
    for item in items:
        item.choices = mixture.shuffled_choices(item, settings.seed)
    jobs = mixture.jobs(items, settings.seed)
    if settings.dry_run:
        requests = [request for job in jobs for request in job.requests]
        missing = f"{len(requests):,} answers are missing; --teacher MODEL asks"
        print(estimate(requests, journal, teacher) if teacher else missing)
        return 0
    if teacher:
        for job in jobs:
            job.fill(ask_all(job.requests, journal, teacher, job.label))
        spent = teacher.cost(journal.tokens)
        print(f"teacher {teacher.model}: {journal.tokens[0]:,} tokens in and {journal.tokens[1]:,} out so far, {spent:.2f}")

    left_out = Counter()
    rows = mixture.clean(mixture.make_pairs(items), left_out)
    rows, review = mixture.review_topics(rows, reviewed, left_out)
    if settings.match_lengths:
        rows = mixture.match_lengths(rows, settings.seed, left_out)
    train, test = mixture.split(rows, settings.eval_share, settings.seed)
    pairs = {}
    if train and test:
        pairs = {"test": test} | mixture.mixtures(train, sizes, shares, settings.shares_by, settings.seed)
    files = pairs | multiple_choice(items, settings)
    if not files:
        raise InputError(f"no pairs are left: {in_words(left_out)}. Sources without pairs of their own need --teacher MODEL")
    ledger = {"read": {name: dict(source.counts) for name, source in sources.items()}, "items": len(items)}
    ledger |= {"left out": dict(left_out), "pairs": len(rows)}
    ledger["files"] = {name: len(part) for name, part in files.items()}
    if len(rows) + left_out.total() != len(items):
        raise AssertionError(f"the ledger does not add up: {ledger}")

    length, unit = token_length(settings)
    statistics = {name: mixture.statistics(part, length) for name, part in pairs.items()}
    described = [mixture.describe(name, part, unit) for name, part in statistics.items()]
    summary = f"left out: {in_words(left_out)}; {len(review):,} pairs without a topic are in topics_to_review.jsonl"
    print(*described, summary, sep="\n")
    with whole_directory(folder) as temporary:
        write_json(temporary / "run.json", {"stage": "data", "settings": asdict(settings)})
        for name, part in files.items():
            write_jsonl(temporary / f"{name}.jsonl", part)
        write_jsonl(temporary / "topics_to_review.jsonl", review)
        write_json(temporary / "ledger.json", ledger)
        write_json(temporary / "statistics.json", {"unit": unit, **statistics})
        if pairs:
            figure(train, test, temporary / "figures" / "dataset.png")
        (temporary / "README.md").write_text(data_card(settings, sources, ledger, described), encoding="utf-8")
    written = [f"{name}.jsonl ({len(part):,})" for name, part in files.items()]
    print(f"Written to {folder}/: {', '.join(written)}, README.md")
    return 0


def check_output(folder: Path, settings: Data) -> None:
    """InputError if the folder holds something that may not be replaced."""
    if settings.dry_run or not folder.exists() or not any(folder.iterdir()):
        return
    if not settings.overwrite:
        raise InputError(f"{folder} already holds data sets. Replace them with --overwrite, or give these another --name.")
    if not (folder / "ledger.json").exists():
        raise InputError(f"{folder}: has no ledger.json, so this program did not make it, and it is not replaced")


def sizes_and_shares(settings: Data) -> tuple[list[int], dict[str, float]]:
    """ "20000,30000" and "epfl=2,mmlu_stem=1" -> [20000, 30000] and {"epfl": 2.0, "mmlu_stem": 1.0}"""
    try:
        sizes = [int(size) for size in settings.sizes.split(",") if size]
        shares = {part.partition("=")[0]: float(part.partition("=")[2]) for part in settings.shares.split(",") if part}
        if not all(0 < value < math.inf for value in (*sizes, *shares.values())):
            raise ValueError("not positive")
    except ValueError as error:
        raise InputError(f"--sizes 20000,30000 and --shares epfl=2,mmlu_stem=1 take positive numbers ({error})") from None
    return sizes, shares


def reviewed_topics(path: str | None) -> dict[str, str]:
    """The topics in a filled-in copy of topics_to_review.jsonl, by the question's `row_key`."""
    topics = {}
    for number, line in numbered_lines(path) if path else ():
        try:
            row = json_object(line)
            topic = topics[mixture.row_key(row)] = row["topic"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a row of topics_to_review.jsonl ({error!r})") from None
        if topic and topic not in (*mixture.TOPICS, "drop"):
            raise InputError(f"{path}:{number}: {topic!r} is none of {', '.join(mixture.TOPICS)}, drop")
    return topics


def read_sources(settings: Data) -> dict[str, Reading]:
    """What each source of --sources gave. The first build pins the commits of hub sets in OUT/sources.lock.json."""
    lock = Path(settings.out) / "sources.lock.json"
    pinned = read_json(lock) if lock.exists() else {}
    sources = {}
    for label in (part.strip() for part in settings.sources.split(",")):
        if label in sources:
            raise InputError(f"--sources names {label} twice")
        name, _, path = label.partition("=")
        source = read_source(name, path, pinned.get(name), settings.on_bad_row)
        print(f"{source.origin}: {in_words(source.counts)}")
        if not path:
            pinned[name] = source.origin.rpartition("@")[2]
            write_json(lock, pinned)
        sources[label] = source
    return sources


def token_length(settings: Data) -> tuple[Callable[[str], int], str]:
    """(text -> length, its unit): tokens of --model's tokenizer, or words without a model."""
    if settings.model is None:
        return mixture.words, "words and signs"
    tokenizer = load_tokenizer(resolve(settings.model, settings.revision))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), "tokens"


def multiple_choice(items: list[Item], settings: Data) -> dict[str, list[dict]]:
    """mcq-train and mcq-test, each question once, split like the pairs."""
    unique = {}
    for item in (item for item in items if item.choices):
        row = {"question": item.question, "choices": item.choices, "answer": LETTERS[item.choices.index(item.answer)]}
        row |= {"explanation": item.explanation} | mixture.origin(item)
        unique[mixture.row_key({"prompt": mixture.prompt_text(item)})] = row
    train, test = mixture.split(list(unique.values()), settings.eval_share, settings.seed)
    return {"mcq-train": train, "mcq-test": test} if unique else {}


def in_words(counts: Counter) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.most_common()) or "nothing"


def figure(train: list[dict], test: list[dict], path: Path) -> None:
    """The rows by source and by topic, training and test stacked: the report's Figure 1."""
    with picture(path, columns=2, size=(12, 4)) as axes:
        for axis, kind in zip(axes, ("source", "topic")):
            in_train, in_test = (Counter(row[kind] for row in rows) for rows in (train, test))
            names = [name for name, _ in (in_train + in_test).most_common()][::-1]
            left = [in_train[name] for name in names]
            axis.barh(names, left, color="C0", label="training")
            axis.barh(names, [in_test[name] for name in names], left=left, color="C1", label="test")
            axis.set(xlabel="pairs", title=f"by {kind}")
        axes[0].legend(fontsize=8)


def data_card(settings: Data, sources: dict[str, Reading], ledger: dict, described: list[str]) -> str:
    """README.md of the output folder."""
    read = [(label.partition("=")[0], s.origin, f"{s.counts['records']:,}") for label, s in sources.items()]
    licences = sorted({(item.source, item.licence) for source in sources.values() for item in source.items})
    files = [(f"{name}.jsonl", f"{rows:,}") for name, rows in ledger["files"].items()]
    parts = [
        "# Preference pairs",
        markdown(("source", "from", "records"), read),
        markdown(("questions of", "licence"), licences),
        markdown(("file", "rows"), files),
        f"The teacher, who wrote missing explanations, rejected answers and topics: {settings.teacher or 'none'}.",
        f"{settings.eval_share:.0%} of the questions are for tests; no question is on both sides. Seed: {settings.seed}.",
        f"Left out: {in_words(Counter(ledger['left out']))}.",
    ]
    if described:
        parts += ["\n".join(["```", *described, "```"]), "![Sources and topics](figures/dataset.png)"]
    return "\n\n".join(parts) + "\n"
