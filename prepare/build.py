"""--stage data: sources in, checked data sets out, with everything that a person should know about them beside them.

    out/data/  train-20000.jsonl ... (or train.jsonl)   test.jsonl   mcq-train.jsonl   mcq-test.jsonl
               topics_to_review.jsonl   ledger.json   statistics.json   figures/dataset.png   README.md (the data card)

The teacher's answers are in OUT/teacher/journal.jsonl and the commits of hub data sets in OUT/sources.lock.json, both kept
for later runs. The folder appears when all of it is written; a build that was stopped is started again by the same command.
"""

import json
from collections import Counter
from pathlib import Path

from data import LETTERS, load_tokenizer
from prepare import mixture
from prepare.sources import Item, read_source
from prepare.teacher import Journal, Teacher, ask_all, estimate
from runtime.files import InputError, read_json, whole_directory, write_json
from runtime.settings import Config
from runtime.weights import resolve


def build_data(config: Config) -> None:
    """Builds the data sets of a config, or says what it would ask the teacher in a dry run."""
    run = Path(config.out) / config.name
    check_output(run, config)
    counts: dict[str, Counter] = {}
    items, origins = read_sources(config, counts)
    for label, count in counts.items():
        print(f"{origins[label]}: " + ", ".join(f"{number:,} {what}" for what, number in count.items()))
    for item in items:
        item.choices = mixture.shuffled_choices(item, config.seed)
    told = filled_in(config)
    if not asked(config, items):
        return

    left_out = Counter()
    rows = mixture.clean(mixture.make_pairs(items), left_out)
    rows, review = mixture.review_topics(rows, told, left_out)
    if config.match_lengths:
        rows = mixture.match_lengths(rows, config.seed, left_out)
    train, test = mixture.split(rows, config.eval_share, config.seed)
    choices = multiple_choice(items, config)
    if not (train and test) and not choices:
        raise InputError(
            f"no pairs are left: {describe_counts(left_out)}. Sources without pairs of their own need --teacher MODEL"
        )
    made = ({"test": test, **mixed(config, train)} if train and test else {}) | choices
    ledger = {"read": {name: dict(count) for name, count in counts.items()}, "items": len(items), "left out": dict(left_out)}
    ledger |= {"files": {name: len(part) for name, part in made.items()}, "pairs": len(train) + len(test)}
    if ledger["pairs"] + sum(left_out.values()) != len(items):
        raise AssertionError(f"the ledger does not add up: {ledger}")

    length, unit = token_length(config)
    stats = {name: mixture.statistics(part, length) for name, part in made.items() if name not in choices}
    for name, part in stats.items():
        print(mixture.describe(name, part, unit))
    print(f"left out: {describe_counts(left_out)}; {len(review):,} pairs without a topic are in topics_to_review.jsonl")
    with whole_directory(run) as folder:
        write_json(folder / "run.json", {"config": vars(config)})
        write_json(folder / "statistics.json", {"unit": unit, **stats})
        if stats:
            mixture.figure(train, test, folder / "figures" / "dataset.png")
        mixture.write_all(
            folder, made, review, ledger, data_card(config, counts, origins, left_out, made, stats, unit, items)
        )
    print(f"Written to {run}/: " + ", ".join(f"{name}.jsonl ({len(part):,})" for name, part in made.items()) + ", README.md")


def check_output(run: Path, config: Config) -> None:
    """InputError rather than writing over an earlier build that nobody asked to delete."""
    if config.dry_run or not run.exists() or not any(run.iterdir()):
        return
    if not config.overwrite:
        raise InputError(f"{run} already holds data sets. Replace them with --overwrite, or give these another --name.")
    if not (run / "ledger.json").exists():
        raise InputError(f"{run}: has no ledger.json, so this program did not make it, and it is not replaced")


def asked(config: Config, items: list[Item]) -> bool:
    """Lets the teacher, if there is one, fill in what the items lack; in a dry run says what that would take: False."""
    teacher, journal = open_teacher(config)
    if config.dry_run:
        wanted = mixture.requests(items, config.seed)
        without = f"{len(wanted):,} answers are missing; --teacher MODEL asks"
        print(estimate(wanted, journal, teacher) if teacher else without)
        return False
    if teacher:
        mixture.teach(items, lambda requests, label: ask_all(requests, journal, teacher, label), config.seed)
        spent = teacher.cost(journal.tokens)
        print(f"teacher {teacher.model}: {journal.tokens[0]:,} tokens in and {journal.tokens[1]:,} out so far, {spent:.2f}")
    return True


def read_sources(config: Config, counts: dict[str, Counter]) -> tuple[list[Item], dict[str, str]]:
    """All items, and where each source came from. Commits of the hub are pinned in OUT/sources.lock.json."""
    lock = Path(config.out) / "sources.lock.json"
    pinned = read_json(lock) if lock.exists() else {}
    items, origins = [], {}
    for label in (part.strip() for part in config.sources.split(",")):
        name, _, path = label.partition("=")
        if label in counts:
            raise InputError(f"--sources names {label} twice")
        counts[label] = Counter()
        more, origins[label] = read_source(name, path or None, counts[label], pinned.get(name), config.on_bad_row)
        items += more
        if not path:
            pinned[name] = origins[label].rpartition("@")[2]
            write_json(lock, pinned)
    return items, origins


def open_teacher(config: Config) -> tuple[Teacher | None, Journal]:
    journal = Journal.open(Path(config.out) / "teacher" / "journal.jsonl")
    if not config.teacher:
        return None, journal
    try:
        price = tuple(float(value) for value in config.price.split(",")) if config.price else (0.0, 0.0)
        if len(price) != 2 or min(price) < 0:
            raise ValueError
    except ValueError:
        raise InputError(f"--price {config.price}: two numbers, per million tokens in and out, such as 0.5,1.5") from None
    if config.budget is not None and not config.price:
        raise InputError("--budget needs --price IN,OUT: per million tokens in and out")
    return Teacher(config.teacher, config.concurrency, price, config.budget), journal


def filled_in(config: Config) -> dict[str, str]:
    """Topics by question from a filled-in copy of topics_to_review.jsonl."""
    if not config.topics:
        return {}
    told = {}
    try:
        lines = Path(config.topics).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{config.topics}: {error.strerror}") from None
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            row = json.loads(line)
            key, value = mixture.row_key({"prompt": row["prompt"], "question_id": ""}), row["topic"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{config.topics}:{number}: not a row of topics_to_review.jsonl ({error!r})") from None
        if value.strip() and value.strip() not in (*mixture.TOPICS, "drop"):
            raise InputError(f"{config.topics}:{number}: {value!r} is none of {', '.join(mixture.TOPICS)}, drop")
        told[key] = value
    return told


def mixed(config: Config, train: list[dict]) -> dict[str, list[dict]]:
    """{"train-20000": rows, ...}, or {"train": rows} with all of them."""
    try:
        shares = {
            name: float(share) for name, _, share in (p.partition("=") for p in filter(None, config.shares.split(",")))
        }
        sizes = [int(size) for size in filter(None, config.sizes.split(","))]
        if min([*shares.values(), *sizes], default=1) <= 0:
            raise ValueError("not positive")
    except ValueError as error:
        raise InputError(f"--sizes 20000,30000 and --shares epfl=2,mmlu_stem=1 take positive numbers ({error})") from None
    if not sizes:
        return {"train": mixture.mix(train, shares, config.shares_by, str(config.seed))}
    made = mixture.mixtures(train, sizes, shares, config.shares_by, config.seed, config.independent)
    return {f"train-{size}": rows for size, rows in made.items()}


def multiple_choice(items: list[Item], config: Config) -> dict[str, list[dict]]:
    """mcq-train and mcq-test, split as the pairs are."""
    rows = []
    for item in items:
        if not item.choices:
            continue
        row = {"prompt": mixture.prompt_text(item), "question": item.question, "choices": item.choices}
        row |= {
            "answer": LETTERS[item.choices.index(item.answer)],
            "explanation": item.explanation,
            "topic": item.topic or "Unknown",
        }
        rows.append(row | {"source": item.source, "question_id": item.question_id, "licence": item.licence})
    unique = list({mixture.row_key(row): row for row in rows}.values())
    if not unique:
        return {}
    train, test = mixture.split(unique, config.eval_share, config.seed)
    for row in unique:
        del row["prompt"]  # --stage mcq makes its own of question and choices
    return {"mcq-train": train, "mcq-test": test}


def token_length(config: Config):
    """(text -> length, its unit): tokens of --model's tokenizer, or words and signs without a model."""
    if config.model == "demo":
        return mixture.words, "words and signs"
    tokenizer = load_tokenizer(resolve(config.model, config.revision))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), "tokens"


def describe_counts(counts: Counter) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.most_common()) or "nothing"


def data_card(config: Config, counts, origins, left_out: Counter, made, stats, unit: str, items: list[Item]) -> str:
    """README.md of the output folder."""
    lines = ["# Preference pairs", "", "| source | from | records |", "|---|---|---:|"]
    for label, count in counts.items():
        lines.append(f"| {label.partition('=')[0]} | {origins[label]} | {count['records']:,} |")
    terms = sorted({(item.source, item.licence) for item in items})
    lines += ["", "| questions of | licence |", "|---|---|", *(f"| {source} | {licence} |" for source, licence in terms)]
    lines += ["", "| file | rows |", "|---|---:|", *(f"| {name}.jsonl | {len(rows):,} |" for name, rows in made.items())]
    teacher = (
        f"{config.teacher} (explanations of bare answers, rejected answers, topics)" if config.teacher else "none was asked"
    )
    lines += ["", f"Teacher: {teacher}. Seed {config.seed}; {config.eval_share:.0%} of the questions are for tests, and no"]
    lines += ["question stands on both sides. Left out:", ""]
    lines += [f"- {number:,} {reason}" for reason, number in left_out.most_common()] or ["- nothing"]
    lines += ["", "```", *(mixture.describe(name, part, unit) for name, part in stats.items()), "```", ""]
    return "\n".join([*lines, *(["![Sources and topics](figures/dataset.png)", ""] if stats else [])])
