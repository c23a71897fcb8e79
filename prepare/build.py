"""--stage data: from sources to checked data sets.

    out/data/  train-20000.jsonl ... (or train.jsonl)   test.jsonl   mcq-train.jsonl   mcq-test.jsonl   run.json
               ledger.json: origins with their commits, what was left out and why, the rows by source, topic and licence

The folder appears when all of it is written. OUT/teacher/journal.jsonl keeps the teacher's answers and OUT/sources.lock.json
the commits of hub data sets, so after a stop the same command continues.
"""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from data import LETTERS
from prepare import mixture
from prepare.sources import Item, Reading, read_source
from prepare.teacher import ask_all, estimate, open_teacher
from runtime.files import InputError, printable, read_json, whole_directory, write_json, write_jsonl
from runtime.settings import Data


def run(settings: Data) -> int:
    """Builds the data sets. A dry run only says what the teacher would be asked."""
    folder = Path(settings.out) / settings.name
    check_output(folder, settings)
    sizes, shares = sizes_and_shares(settings)
    teacher = open_teacher(settings)

    sources = read_sources(settings)
    items = [item for source in sources.values() for item in source.items]
    jobs = mixture.jobs(items, settings.seed)
    if settings.dry_run:
        requests = [request for job in jobs.values() for _, request in job]
        missing = f"{len(requests):,} answers are missing; --teacher MODEL asks"
        print(estimate(requests, teacher) if teacher else missing)
        return 0
    if teacher:
        for field, job in jobs.items():
            answers = ask_all([request for _, request in job], teacher, field)
            for (item, _), answer in zip(job, answers):
                setattr(item, field, answer or "")
        tokens = teacher.journal.tokens
        print(f"{teacher.model}: {tokens[0]:,} tokens in and {tokens[1]:,} out so far, {teacher.cost(tokens):.2f}")

    left_out = Counter()
    rows = mixture.clean(mixture.make_pairs(items), left_out)
    if settings.match_lengths:
        rows = mixture.match_lengths(rows, settings.seed, left_out)
    train, test = mixture.split(rows, settings.eval_share, settings.seed)
    files = multiple_choice(items, settings)
    if train and test:
        files |= {"test": test} | mixture.mixtures(train, sizes, shares, settings.shares_by, settings.seed)
    if not files:
        raise InputError(f"no pairs are left: {in_words(left_out)}. Sources without pairs of their own need --teacher MODEL")
    if len(rows) + left_out.total() != len(items):
        raise AssertionError(f"the ledger does not add up: {len(rows)} + {left_out} != {len(items)}")

    ledger = {"read": {label: {"from": source.origin, **source.counts} for label, source in sources.items()}}
    ledger |= {"items": len(items), "left out": left_out, "pairs": len(rows)}
    kinds = ("source", "topic", "licence")
    ledger["files"] = {
        name: {"rows": len(part)} | {f"by {kind}": Counter(row[kind] for row in part) for kind in kinds}
        for name, part in files.items()
    }
    with whole_directory(folder) as temporary:
        write_json(temporary / "run.json", {"stage": "data", "settings": asdict(settings)})
        write_json(temporary / "ledger.json", ledger)
        for name, part in files.items():
            write_jsonl(temporary / f"{name}.jsonl", part)
    written = [f"{name}.jsonl ({len(part):,})" for name, part in files.items()]
    print(f"left out: {in_words(left_out)}\nWritten to {folder}/: {', '.join(written)}, ledger.json")
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
