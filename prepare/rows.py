"""Data files: where they are, their rows, and what a stage learns from and is measured on.

    pairs.jsonl                       JSON lines, a JSON array (.json), CSV or parquet; each may be gzipped (.gz)
    folder                            all such files in it: the shards of one set
    hub:ORG/NAME, hub:ORG/NAME:SPLIT  a data set of the Hugging Face hub, downloaded once
    hub:ORG/NAME@REVISION             the same at a branch, tag or commit

The fields of a row decide how it is read (forms.py). What is known about the questions may be in a truth file beside the
rows (`data.read_truth`). Every message names the file and the record.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import data
from data import ChatML, Example, Ledger, Row, question_key
from model import read_config
from prepare.forms import RENDERED, kind_of_fields, read_row
from runtime import runs
from runtime.files import InputError, first_line, json_object, numbered_lines, printable
from runtime.settings import Tuning
from runtime.weights import hub_names, hub_snapshot

SHOWN = 20  # reasons that an error message lists
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")  # of data files; of a folder, those with the first that is there
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of Hugging Face, beside the rows
HUB = re.compile(r"hub:(?P<repo>[^@:/]+/[^@:/]+)(@(?P<revision>[^:]+))?(:(?P<split>.+))?")


# ------------------------------------------------------------------------------------------------------- files and records


def files_of(source: str | Path) -> dict[str, Path]:
    """The files that a source names, by what messages call them. InputError if a folder or a data set holds none."""
    if str(source).startswith("hub:"):
        return hub_files(str(source))
    if not Path(source).is_dir():
        return {str(source): Path(source)}
    names = file_names(Path(source))
    tests = [name for name in names if re.search(r"(^|[/_.-])(test|valid|validation|eval|dev)([/_.-]|$)", name)]
    split = "train" if choose_files(names, "train") else ""
    found = choose_files(names, split)
    if not found:
        raise InputError(f"{source}: holds no file that ends in {', '.join(SUFFIXES)}, or in one of these and .gz")
    if 0 < len(mixed := set(tests).intersection(found)) < len(found):
        raise InputError(f"{source}: holds several splits, such as {min(mixed)}; give a file, or a folder with one of them")
    others = choose_files([name for name in names if name not in found and Path(name).name not in ABOUT], split)
    if others:
        raise InputError(f"{source}: holds files in two formats, {found[0]} and {others[0]}; give a folder with one")
    return {f"{source}/{name}": Path(source, name) for name in found}


def file_names(folder: Path) -> list[str]:
    """The files in a folder and in those below it."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}")

    paths = [Path(at, name) for at, _, names in os.walk(folder, onerror=unreadable, followlinks=True) for name in names]
    return [path.relative_to(folder).as_posix() for path in paths]


def choose_files(names: list[str], split: str = "") -> list[str]:
    """Of the names of a data set's files those that a split, if one is given, begins the name or is the folder of; of these,
    the ones in the first format of SUFFIXES, sorted. Hidden files and truth files hold no rows."""
    pool = [name for name in names if not re.search(r"(^|/)\.|\.truth\.jsonl$", name)]
    if split:
        pool = [name for name in pool if re.search(rf"(^|/){re.escape(split)}([-./]|$)", name)]
    for suffix in SUFFIXES:
        if found := [name for name in pool if name.removesuffix(".gz").endswith(suffix)]:
            return sorted(found)
    return []


@functools.cache  # asked once, so that all who read a data set in this process read the same commit
def hub_files(source: str) -> dict[str, Path]:
    """As `files_of` for a data set of the hub: the files of the split that is named, or else of "train", or else its only
    one."""
    named = HUB.fullmatch(source)
    if not named:
        raise InputError(f"{source}: write hub:ORG/NAME, hub:ORG/NAME:SPLIT or hub:ORG/NAME@REVISION:SPLIT")
    repo, revision, split = named["repo"], named["revision"], named["split"]
    names, there = hub_names(repo, revision), "there are"
    if names is None:
        names = file_names(hub_snapshot(repo, revision, [], "dataset"))
        there = "the hub cannot be reached, and on this machine are"
    found = choose_files(names, split or "train")
    splits = sorted({re.sub(r"(-\d+-of-\d+.*)?(\.\w+)+$", "", Path(file).name) for file in choose_files(names)})
    if not found and not split and len(splits) == 1:
        found = choose_files(names)
    if not found:
        there += f" {', '.join(splits[:10]) or 'none'}"
        raise InputError(f"{source}: no split {split or 'train'}; {there}. Name one: hub:{repo}:SPLIT")
    folder = hub_snapshot(repo, revision, found, "dataset")
    return {f"hub:{repo}/{name}": folder / name for name in found}


def records(path: Path) -> Iterator[tuple[int, object]]:
    """The records of a file with their numbers: the rows of parquet, the elements of a JSON array, or the lines. A line of
    JSON is still bytes (see `parsed`), so that a broken one is an error of its own."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    csv.field_size_limit(2**31 - 1)  # a cell may hold a long text
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(100).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            file.seek(0)
            if suffix == ".parquet":
                from pyarrow.parquet import ParquetFile

                batches = ParquetFile(file).iter_batches(1000)  # no more rows at a time become objects
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
            elif suffix == ".csv":
                # Strict, or a quote that is never closed would swallow the rows after it.
                lines, first = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True), 2
                for line in lines:  # an empty cell is an absent field
                    yield first, {name: None if value == "" else value for name, value in line.items()}
                    first = lines.line_num + 1
            elif start == b"[" and suffix != ".jsonl":
                yield from enumerate(json.loads(file.read().decode("utf-8-sig")), start=1)
            else:
                yield from numbered_lines(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except csv.Error as error:
        raise InputError(f"{path}:{first}: the row that begins here is not csv ({error}); look at its quotes") from None
    except (ValueError, NotImplementedError, RecursionError, EOFError, zlib.error) as error:  # some are pyarrow's
        raise InputError(f"{path}: cannot be read as {suffix[1:]} ({first_line(error)})") from None


def parsed(record: object) -> dict:
    """A record of `records` as an object; ValueError if it is none."""
    if isinstance(record, bytes):
        return json_object(record)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if None in record:  # where csv puts them
        raise ValueError("more cells than the first line has")
    return record


def reasons(bad: list[str]) -> list[str]:
    """A line for each reason why rows cannot be used, with the first places. `bad`: "file:record: reason" each."""
    places: dict[tuple[str, str], list[str]] = {}
    for line in bad:
        file, number, reason = re.fullmatch(r"(?s)(.*?):(\d+): (.*)", line).groups()
        places.setdefault((file, reason), []).append(number)
    lines = []
    for (file, reason), found in list(places.items())[:SHOWN]:
        more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
        lines.append(f"{file}:{', '.join(found[:5])}{more}: {reason}")
    return lines + ([f"... and {len(places) - SHOWN:,} more reasons"] if len(places) > SHOWN else [])


def read_each(source: str | Path, files: dict[str, Path], read: Callable, on_bad_row: str, ledger: Ledger) -> list:
    """What `read(record, "file:record")` makes of every record of the files; blank lines are none. `source`: what they are
    called together.

    Where it raises a ValueError, the row cannot be used. Such rows are reported as `file:record: reason`: in one InputError
    after everything was read or, with on_bad_row "skip" and if there are others, in `ledger.bad_rows`, counted under
    `ledger.dropped["bad row"]`.
    """
    made, bad = [], ledger.bad_rows
    for name, file in files.items():
        for number, record in records(file):
            ledger.rows += 1
            where = printable(f"{name}:{number}")
            try:
                made.append(read(parsed(record), where))
            except (ValueError, RecursionError) as error:
                ledger.drop("bad row")
                bad.append(f"{where}: {error}")
    if not ledger.rows:
        raise InputError(f"{source}: the file holds no rows")
    if bad and (on_bad_row == "stop" or not made):
        lines = [f"{len(bad):,} of {ledger.rows:,} rows of {source} cannot be used:", *reasons(bad)]
        skip = ", or leave them out with --on-bad-row skip" if made else ""
        raise InputError("\n  ".join(lines) + f"\nCorrect them{skip}.")
    return made


def read_rows(path: str | Path, kind: str, on_bad_row: str, ledger: Ledger) -> list[Row]:
    """The rows of a file, a folder or a data set of the hub, of a `kind` of `forms.read_row`; see `read_each`."""
    rows = read_each(path, files_of(path), functools.partial(read_row, kind), on_bad_row, ledger)
    for row in rows:
        ledger.forms[row.form] = ledger.forms.get(row.form, 0) + 1
    if truths := data.read_truth(path):
        for row in rows:
            row.truth = truths.get(question_key(row))
    return rows


def kind_of(path: str | Path, letter_only: bool = False) -> str:
    """What the rows of a file are, "pairs", "mcq" or "sft", by the fields of its first readable row."""
    for file in files_of(path).values():
        for _, record in records(file):
            with contextlib.suppress(ValueError):  # reported by `read_rows`
                found = frozenset(name for name, value in parsed(record).items() if value is not None)
                return kind_of_fields(found, letter_only)
    return "sft"


# ------------------------------------------------------------------------------------------------- what a stage reads


@dataclass
class Inputs:
    """What a training stage learns from and is measured on."""

    chat: ChatML
    train: list[Example]
    held_out: list[Example]
    rows: list[Row]  # of both sides
    ledgers: dict[str, Ledger]  # by source
    files: dict[str, list[Path]] = field(default_factory=dict)  # of "train" and, if it was given, "eval"


def load_inputs(settings: Tuning, chat: ChatML) -> Inputs:
    """Reads and checks the rows, splits them by question, and turns them into tokens. InputError if rows are bad, a question
    is on both sides, or no example is left on one."""
    sources = {"train": settings.train} | ({"eval": settings.eval} if settings.eval else {})
    ledgers = {source: Ledger() for source in sources.values()}
    kind = row_kind(settings)
    parts = [read_rows(source, kind, settings.on_bad_row, ledgers[source]) for source in sources.values()]
    if settings.eval:
        data.check_no_leak(*parts)
    else:
        parts = data.split_by_question(parts[0], settings.eval_share, settings.seed)
    sides = []
    for side, rows in zip(("train", "eval"), parts):
        source = sources.get(side, settings.train)
        examples = data.encode(rows, chat, settings.max_length, settings.max_prompt_length, ledgers[source])
        if not examples:
            limits = f"--max-length {settings.max_length}, --max-prompt-length {settings.max_prompt_length}"
            had = f"it had {len(rows):,} (all rows of a question are on one side), and none fits {limits}."
            told = f"{describe_ledgers({source: ledgers[source]}, math.inf)}\nGive other rows or limits, or --eval FILE."
            raise InputError(f"no row is left for the {side} side: {had}\n{told}")
        sides.append([data.supervise_everything(e) for e in examples] if settings.whole_text else examples)
    files = {side: list(files_of(source).values()) for side, source in sources.items()}
    return Inputs(chat, *sides, [*parts[0], *parts[1]], ledgers, files)


def describe_ledgers(ledgers: dict[str, Ledger], window: float) -> str:
    """Where the rows of each file went, in words. `window`: the most tokens that the model takes."""
    lines = []
    for name, ledger in ledgers.items():
        dropped = ", ".join(f"{count:,} {cause}" for cause, count in ledger.dropped.items()) or "none"
        kept = f"{ledger.kept:,} kept with {ledger.tokens:,} tokens ({ledger.trimmed:,} with a trimmed prompt)"
        lines.append(f"{printable(name)}: {ledger.rows:,} rows, {kept}, dropped: {dropped}")
        lines += describe_reading(ledger)
        lines += describe_sizes(ledger, window)
        lines += [f"  left out: {printable(reason)}" for reason in reasons(ledger.bad_rows)]
    return "\n".join(lines)


def describe_reading(ledger: Ledger) -> list[str]:
    """How rows were read, a line for each form."""
    lines = [f"  read as: {form}, {count:,} rows" for form, count in ledger.forms.items()]
    if rendered := sum(count for form, count in ledger.forms.items() if form.endswith(RENDERED)):
        told = "Turns were read from them and end marks removed: the program adds those. --dry-run shows two rows."
        lines.append(f"  Warning: {rendered:,} rows hold ChatML's marks as text. {told}")
    return lines


def describe_sizes(ledger: Ledger, window: float) -> list[str]:
    """How many tokens rows have and, where some were cut or dropped, the limits that would keep them whole, if the model's
    window allows."""
    if not ledger.sizes:
        return []
    size, largest = covering(ledger.sizes, 0.99), covering(ledger.sizes, 1)
    lines = [f"  tokens with the longest answer: 99% of the rows up to {size:,}, all up to {largest:,}"]
    if ledger.unlearned:
        lines.append(f"  {ledger.unlearned:,} answers in dialogues too long to learn whole became part of a prompt")
    if ledger.trimmed or ledger.unlearned or any("does not fit" in cause for cause in ledger.dropped):
        for share, length in ((0.99, size), (1, largest)):
            prompt = covering(ledger.prompts, share)  # it may not be as long as both
            needed = max(length, prompt + data.BIN)
            limits = f"--max-length {needed} --max-prompt-length {prompt}"
            if needed <= window:
                lines.append(f"  {limits} would keep {share:.0%} of the rows whole")
    return lines


def covering(sizes: dict[int, int], share: float) -> int:
    """The least size that at least this share of the rows do not exceed."""
    ordered = sorted(sizes)
    totals = itertools.accumulate(sizes[size] for size in ordered)
    return next(size for size, total in zip(ordered, totals) if total >= share * sum(sizes.values()))


def spelled_out(example: Example, chat: ChatML) -> str:
    """An example token by token, each in brackets, in parts that are learned or not: the first four, and of a part of more
    than 40 tokens the first and the last 20."""
    parts = [(f"prompt ({len(example.prompt)} tokens, no loss), {printable(example.where)}", example.prompt)]
    names = ["completion"] if len(example.completions) == 1 else ["chosen", "rejected"]
    for name, ids in zip(names, example.completions):
        flags = example.learned or [True] * len(ids)
        for learned, pairs in itertools.groupby(zip(flags, ids), key=lambda pair: pair[0]):  # one run, or a dialogue's
            run = [token for _, token in pairs]
            heading = f"{name} ({len(run)} tokens, supervised)" if learned else f"context ({len(run)} tokens, no loss)"
            parts.append((heading, run))
    lines = []
    for heading, ids in parts[:4]:
        tokens = [f"[{chat.decode([i])}]" for i in ids]
        if len(tokens) > 40:
            tokens[20:-20] = [f" ... {len(ids) - 40} tokens ... "]
        lines += [heading, printable("".join(tokens)).replace("\n", "\\n")]
    return "\n".join(lines + [f"... {len(parts) - 4} more parts"] * (len(parts) > 4))


def row_kind(settings: Tuning) -> str:
    """Which rows a training stage reads, a kind of `forms.read_row`."""
    if settings.stage == "mcq":
        return "mcq letter" if settings.letter_only else "mcq"
    if settings.objective == "dpo":
        return "pairs"
    return "sft last" if settings.last_turn_only else "sft"


@dataclass
class Measured:
    """Rows to measure models on."""

    rows: list[Row]
    kind: str  # a kind of `forms.read_row`
    where: str  # in words
    ledger: Ledger


def rows_to_measure(file: str | None, model: Path | None, letter_only: bool = False, on_bad_row: str = "stop") -> Measured:
    """The rows of `file` or, without one, those that the run of the model in the directory `model` held out."""
    ledger, where = Ledger(), file
    if file is None:
        run = runs.training_run(model)
        if run is None or not (run / "held_out.jsonl").exists():
            raise InputError(f"--data FILE.jsonl is missing: {model} is no run of this program with rows that it held out")
        file, where = run / "held_out.jsonl", f"the rows that {run} held out"
        kind = row_kind(runs.stored_settings(run))
    else:
        kind = kind_of(file, letter_only)
        if letter_only and kind != "mcq":
            raise InputError(f"--letter-only is for multiple-choice questions, and {file} holds none; leave it out")
        kind = "mcq letter" if letter_only else kind
    return Measured(read_rows(file, kind, on_bad_row, ledger), kind, where, ledger)


def encode_for(directory: Path, rows: list[Row], system_prompt: str | None = None) -> tuple[ChatML, list[Example], Ledger]:
    """The rows that fit a model's window, with its own tokenizer and, unless another is given, the system prompt that it was
    tuned with; the ledger says what became of the others."""
    chat, ledger = runs.load_chat(directory, system_prompt), Ledger()
    window = read_config(directory).max_position_embeddings
    examples = [
        example
        for example in data.encode(rows, chat, window, window // 2, ledger)
        if len(example.prompt) + max((len(chat.reply(choice)) for choice in example.choices), default=0) <= window
    ]
    return chat, examples, ledger
