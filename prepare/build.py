"""--stage data: from sources to checked data sets.

    out/data/  train-20000.jsonl ... (or train.jsonl)   test.jsonl   mcq-train.jsonl   mcq-test.jsonl   run.json
               ledger.json: origins with their commits, what became of every record, the rows by source, topic and licence
               README.md: the same for people, with what the hub asks of a published set

The folder appears when all of it is written. OUT/teacher/journal.jsonl keeps the teacher's answers and OUT/sources.lock.json
the commits of hub data sets, so after a stop the same command continues.
"""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from data import LETTERS
from prepare import card, mixture
from prepare.sources import Item, Reading, read_source
from prepare.teacher import Request, Teacher, ask_all, estimate, open_teacher
from runtime.files import InputError, printable, read_json, whole_directory, write_json, write_jsonl, write_text
from runtime.runs import check_name
from runtime.settings import Data


def run(settings: Data) -> int:
    """Builds the data sets. A dry run only says what the teacher would be asked."""
    folder = Path(settings.out) / settings.name
    if not settings.dry_run:
        check_name(settings)
        if folder.exists() and not (folder / "run.json").exists() and any(folder.iterdir()):  # hidden files, such as .git
            raise InputError(f"{folder} holds files that the data sets would replace; give these another --name")
    sizes, shares = sizes_and_shares(settings)
    teacher = open_teacher(settings)

    sources = read_sources(settings)
    every = [item for source in sources.values() for item in source.items]
    items = [item for item in every if not mixture.is_empty(item)]
    jobs = mixture.jobs(items, settings.seed, settings.what)
    if settings.dry_run:
        requests = [request for job in jobs.values() for _, request in job]
        missing = f"{len(requests):,} answers are missing; --teacher MODEL asks"
        print(estimate(requests, teacher) if teacher else missing)
        return 0
    if teacher:
        ask(jobs, teacher)

    ledger = {"what": settings.what, "read": {label: read_counts(source) for label, source in sources.items()}}
    rows = training_rows(items, settings, ledger, len(every))
    files = multiple_choice(items, settings, ledger, sum(bool(item.choices) for item in every))
    if rows:
        train, test = mixture.split(rows, settings.eval_share, settings.seed)
        if not train or not test:
            side = "train" if not train else "test"
            raise InputError(f"--eval-share {settings.eval_share} leaves none of {len(rows):,} rows to {side} on; change it")
        files |= {"test": test} | mixture.mixtures(train, sizes, shares, settings.shares_by, settings.seed)
    if not files:
        more = "Sources without pairs of their own need --teacher MODEL"
        raise InputError(f"no {settings.what} are left: {in_words(ledger['rows']['left out'])}. {more}")
    kinds = ("source", "topic", "licence")
    ledger["files"] = {
        name: {"rows": len(part)} | {f"by {kind}": Counter(row[kind] for row in part) for kind in kinds}
        for name, part in files.items()
    }
    with whole_directory(folder) as temporary:
        write_json(temporary / "run.json", {"stage": "data", "settings": asdict(settings)})
        write_json(temporary / "ledger.json", ledger)
        about = card.readme(settings.name, ledger, settings.teacher)
        write_text(temporary / "README.md", f"{card.metadata(ledger)}\n\n{about}")
        for name, part in files.items():
            write_jsonl(temporary / f"{name}.jsonl", part)
    print(f"{about}\nWritten to {folder}/")
    return 0


def ask(jobs: dict[str, list[tuple[Item, Request]]], teacher: Teacher) -> None:
    """Fills the fields of the items with the teacher's answers. Where there is no explanation to prefer, nothing is asked
    that could be rejected."""
    for field, job in jobs.items():
        asked = [(item, request) for item, request in job if field != "rejected" or not mixture.is_bare(item)]
        answers = ask_all([request for _, request in asked], teacher, field)
        for (item, _), answer in zip(asked, answers):
            setattr(item, field, answer or "")
            item.taught.add(field)
    tokens = teacher.journal.tokens
    print(f"{teacher.model}: {tokens[0]:,} tokens in and {tokens[1]:,} out so far, {teacher.cost(tokens):.2f}")


def training_rows(items: list[Item], settings: Data, ledger: dict, read: int) -> list[dict]:
    """The pairs or SFT rows, cleaned and, if asked for, matched in length. Notes what became of all `read` items and, of
    pairs, what gives the chosen answers away."""
    left_out = Counter({"empty question or answer": read - len(items)})
    if settings.what == "pairs" and not settings.teacher:
        for_pairs = [item for item in items if not item.choices]
        left_out["multiple choice alone"] = len(items) - len(for_pairs)
        items = for_pairs
    rows = mixture.clean(mixture.make_rows(items, settings.what, bool(settings.teacher)), left_out)
    stages = {"all": rows}
    if settings.match_lengths:
        rows = mixture.match_lengths(rows, settings.seed, left_out)
        stages["matched"] = rows
    ledger["rows"] = account(read, left_out, len(rows))
    ledger["scores"] = card.scores(stages) if rows and settings.what == "pairs" else []
    return rows


def account(read: int, left_out: Counter, kept: int) -> dict:
    """Where `read` items went, for the ledger."""
    if left_out.total() + kept != read:
        raise AssertionError(f"the ledger does not add up: {kept} + {left_out} != {read}")
    return {"items": read, "kept": kept, "left out": +left_out}


def read_counts(source: Reading) -> dict:
    """What became of the records of a source, for the ledger."""
    licences = Counter(item.licence for item in source.items)
    return {"from": source.origin, **source.counts, "items": len(source.items), "licences": licences, "bad rows": source.bad}


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
        print(printable(f"{source.origin}: {in_words(source.counts)}"))
        if not path:
            pinned[name] = source.origin.rpartition("@")[2]
            write_json(lock, pinned)
        sources[label] = source
    return sources


def multiple_choice(items: list[Item], settings: Data, ledger: dict, read: int) -> dict[str, list[dict]]:
    """mcq-train and mcq-test, each question once, split like the pairs. Notes what became of `read` questions."""
    unique = {}
    left_out = Counter({"empty question, answer or option": read - sum(bool(item.choices) for item in items)})
    for item in (item for item in items if item.choices):
        if len({choice.strip() for choice in item.choices}) < len(item.choices):
            left_out["two options of one text"] += 1
            continue
        row = {"question": item.question, "choices": item.choices, "answer": LETTERS[item.right]}
        row |= {"explanation": item.explanation} | mixture.origin(item)
        key = mixture.row_key({"prompt": mixture.prompt_text(item), **row})
        left_out["the same question with the same options"] += key in unique
        unique.setdefault(key, row)
    ledger["multiple choice"] = account(read, left_out, len(unique))
    train, test = mixture.split(list(unique.values()), settings.eval_share, settings.seed)
    return {"mcq-train": train, "mcq-test": test} if unique else {}


def in_words(counts: Counter) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.most_common() if number) or "nothing"
