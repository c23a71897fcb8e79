"""The report's data sets, each read from its own columns into one row type.

    --sources theoremqa                    from the Hugging Face hub, downloaded once, then from the cache
    --sources theoremqa=PATH               from a local copy: parquet, JSON, JSON lines or CSV, a file or a directory of them

A reader is one short function from a record, as the set publishes it, to an `Item`; where a set changed its columns over
the years, both forms are read. A column that is not there is an error that says which are.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import LETTERS
from runtime.files import InputError
from runtime.weights import hub_snapshot


@dataclass
class Item:
    """A question and what a source says about it; what it does not say is empty. Course rows come as pairs already."""

    question: str
    answer: str  # the right answer as text: an option's, a number, an essay
    choices: list[str] = field(default_factory=list)
    explanation: str = ""
    topic: str = ""
    source: str = ""
    question_id: str = ""
    licence: str = ""
    data_source: str = ""  # Open-Platypus: the set that the row came from
    chosen: str = ""
    rejected: str = ""
    where: str = ""  # file and record, for messages


@dataclass
class Source:
    """Where a set lives and how it is read. `read` returns None for a record that it leaves out by its own rule, `skips`."""

    repo: str
    files: tuple[str, ...]  # patterns of the files on the hub; the first that matches any is taken
    licence: str
    read: Callable[[dict, str], Item | list[Item] | None]
    skips: str = "left out by the source's rule"


def _without_letter(option: str) -> str:
    """ "A)5 km", "a ) 24" and "B. yes" without their letter."""
    return re.sub(r"^\s*[A-Ja-j]\s*[).:]\s*", "", option).strip()


def _right(choices: list[str], letter: str) -> str:
    place = LETTERS.find(letter.strip().upper()) if len(letter.strip()) == 1 else -1
    if not 0 <= place < len(choices):
        raise ValueError(f"the right option is {letter!r}, but there are {len(choices)}")
    return choices[place]


def mmlu_stem(record: dict, where: str) -> Item:
    """question, choices (list), answer (0-3), subject; or MMLU's CSV: choice0 ... choice3, a letter, subject in the name."""
    if "choice0" in record:
        choices, answer = [record[f"choice{i}"] for i in range(4)], record["answer"]
        right = choices[int(answer)] if answer.isdigit() else _right(choices, answer)
        subject = re.sub(r"_(test|dev|val)$", "", Path(where.rpartition(":")[0]).stem)
    else:
        choices, right, subject = list(record["choices"]), record["choices"][int(record["answer"])], record["subject"]
    return Item(record["question"], right, choices, topic=MMLU_TOPICS.get(subject, subject.replace("_", " ").capitalize()))


def theoremqa(record: dict, where: str) -> Item | None:
    """Question, Answer (text on the hub, its own type on GitHub), Picture, field. Questions with a picture are left out."""
    if record["Picture"] is not None:
        return None
    answer = record["Answer"]
    answer = answer if isinstance(answer, str) else json.dumps(answer) if isinstance(answer, list) else str(answer)
    topic = {"Math": "Mathematics", "EECS": "Electrical Engineering and Computer Science"}.get(record.get("field"))
    return Item(record["Question"], answer, topic=topic or record.get("field") or "", question_id=str(record.get("id", "")))


def math_qa(record: dict, where: str) -> Item:
    """Problem, Rationale, options (one text: "a ) 24 , b ) 120 , ..."), correct (a letter), category."""
    choices = [option.strip(" ,") for option in re.split(r"(?:^|,)\s*[a-e]\s*\)", record["options"].strip("[]'\" "))[1:]]
    right = _right(choices, record["correct"])
    return Item(record["Problem"], right, choices, record["Rationale"].strip("\"' "), topic="Mathematics")


def arxiv_physics(record: dict, where: str) -> Item:
    """question, answer."""
    return Item(record["question"], record["answer"], topic="Physics")


PLATYPUS_STEM = {  # data_source -> topic; the others are not STEM
    "MATH/PRM-800K": "Mathematics",
    "airoboros": "",
    "scienceqa": "",
    "leetcode_ne": "Computer Science",
    "ARB": "",
    "scibench": "",
    "tigerbot-kaggle": "Computer Science",
}


def open_platypus(record: dict, where: str) -> Item | None:
    """instruction, input (often empty), output, data_source: kept, since licences differ by it."""
    origin = record["data_source"]
    if origin not in PLATYPUS_STEM:
        return None
    question = "\n\n".join(text for text in (record["instruction"], record["input"]) if text.strip())
    return Item(
        question, record["output"], topic=PLATYPUS_STEM[origin], licence=f"mixed, as of {origin}", data_source=origin
    )


def sciq(record: dict, where: str) -> Item:
    """question, distractor1 ... distractor3, correct_answer, support (may be empty)."""
    choices = [record[f"distractor{i}"] for i in (1, 2, 3)] + [record["correct_answer"]]
    return Item(record["question"], record["correct_answer"], choices, record["support"] or "")


def aqua_rat(record: dict, where: str) -> Item:
    """question, options ("A)5 km", five of them), rationale, correct (a letter)."""
    choices = [_without_letter(option) for option in record["options"]]
    return Item(record["question"], _right(choices, record["correct"]), choices, record["rationale"], topic="Mathematics")


def epfl(record: dict, where: str) -> list[Item]:
    """The course's preference file: question_id, question_complete, course_id, preference: [{A, B, overall: "A" or "B"}]."""
    items = []
    for vote in record["preference"]:
        if vote["overall"] not in ("A", "B"):
            raise ValueError(f'"overall" is {vote["overall"]!r}, neither A nor B')
        chosen, rejected = (vote["A"], vote["B"]) if vote["overall"] == "A" else (vote["B"], vote["A"])
        item = Item(record["question_complete"], chosen, question_id=str(record["question_id"]))
        item.topic, item.chosen, item.rejected = COURSE_TOPICS.get(str(record["course_id"]), ""), chosen, rejected
        items.append(item)
    return items


def pairs(record: dict, where: str) -> Item:
    """Pairs that someone has made already: prompt, chosen, rejected, and perhaps topic, source, question_id, licence."""
    item = Item(record["prompt"], record["chosen"], chosen=record["chosen"], rejected=record["rejected"])
    item.source = record.get("source") or Path(where.rpartition(":")[0]).stem
    item.topic = "" if record.get("topic", "Unknown") == "Unknown" else record["topic"]
    item.question_id, item.licence = str(record.get("question_id", "")), record.get("licence", "")
    return item


def mcq(record: dict, where: str) -> Item:
    """The authors' and the course's multiple choice: question ("Question: ... Options: A. ... Answer:"), answer (a letter),
    perhaps explanation and subject."""
    match = re.match(r"\s*Question:\s*(.*?)\n+Options:\s*\n(.*?)\n*\s*Answer:\s*$", record["question"], re.DOTALL)
    if not match:
        raise ValueError('"question" is not of the form "Question: ... Options: ... Answer:"')
    choices = [_without_letter(option) for option in re.split(r"\n(?=[A-J][).])", match[2])]
    subject = str(record.get("subject", ""))
    topic = MMLU_TOPICS.get(subject, subject.replace("_", " ").capitalize())
    return Item(match[1].strip(), _right(choices, record["answer"]), choices, record.get("explanation", ""), topic=topic)


MMLU_TOPICS = {
    "abstract_algebra": "Mathematics",
    "college_mathematics": "Mathematics",
    "elementary_mathematics": "Mathematics",
    "high_school_mathematics": "Mathematics",
    "high_school_statistics": "Mathematics",
    "anatomy": "Biology",
    "college_biology": "Biology",
    "high_school_biology": "Biology",
    "astronomy": "Physics",
    "college_physics": "Physics",
    "conceptual_physics": "Physics",
    "high_school_physics": "Physics",
    "college_chemistry": "Chemistry",
    "high_school_chemistry": "Chemistry",
    "college_computer_science": "Computer Science",
    "computer_security": "Computer Science",
    "high_school_computer_science": "Computer Science",
    "machine_learning": "Computer Science",
    "electrical_engineering": "Electrical Engineering and Computer Science",
}
_PHYSICS = ("3", "15113", "15107", "15116", "15115", "15118")
_COMPUTING = ("9", "5", "4", "0", "15006", "15041", "15000", "15103", "15005", "15008", "15125", "15002", "15127", "15011")
COURSE_TOPICS = dict.fromkeys(_PHYSICS, "Physics") | dict.fromkeys(
    (*_COMPUTING, "15003", "15004", "15126"), "Computer Science"
)

SOURCES = {
    "mmlu_stem": Source("TIGER-Lab/MMLU-STEM", ("data/*.parquet", "*.json"), "MIT", mmlu_stem),
    "theoremqa": Source("TIGER-Lab/TheoremQA", ("data/*.parquet", "*.json"), "MIT", theoremqa, "needs its picture"),
    "math_qa": Source("kinit/math_qa", ("**/*train*.parquet", "*.parquet"), "Apache-2.0", math_qa),
    "arxiv_physics": Source(
        "ArtifactAI/arxiv-physics-instruct-tune-30k", ("*.jsonl", "**/*.parquet"), "none stated", arxiv_physics
    ),
    "open_platypus": Source("garage-bAInd/Open-Platypus", ("data/*.parquet",), "mixed", open_platypus, "not a STEM source"),
    "sciq": Source("allenai/sciq", ("data/train-*.parquet",), "CC BY-NC 3.0", sciq),
    "aqua_rat": Source("deepmind/aqua_rat", ("raw/train-*.parquet",), "Apache-2.0", aqua_rat),
    "epfl": Source("", (), "the course's; not public", epfl),
    "pairs": Source("", (), "that of the file", pairs),
    "mcq": Source("", (), "that of the questions", mcq),
}


# ------------------------------------------------------------------------------------------------------ files to records


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:record", columns) of every record of a parquet, JSON, JSON lines or CSV file, counted from 1."""
    try:
        for number, record in enumerate(_READERS[path.suffix](path), start=1):
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: a JSON {type(record).__name__}, not an object")
            yield f"{path}:{number}", record
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from None


def _json(path: Path) -> list:
    """One array, or an object a line under a name that should be .jsonl (AQUA-RAT's files)."""
    text = path.read_text(encoding="utf-8-sig")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]


def _csv(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


_READERS = {".parquet": _parquet, ".json": _json, ".jsonl": _json, ".csv": _csv}


def read_source(
    name: str, path: str | None, counts: dict[str, int], revision: str | None = None, on_bad_row: str = "stop"
) -> tuple[list[Item], str]:
    """(items of a source, where they came from: a path, or repository and commit). `path`: a local copy instead of the hub.

    `counts` gets the number of records read and of those left out, by reason. InputError names the file and record that
    lacks a column or makes no sense; with on_bad_row "skip" the latter are counted and left out.
    """
    if name not in SOURCES:
        raise InputError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    files, origin = _local_files(Path(path)) if path else _hub_files(name, source, revision)
    items = []
    for file in files:
        for where, record in records(file):
            counts["records"] = counts.get("records", 0) + 1
            try:
                made = source.read(record, where)
            except KeyError as error:
                raise InputError(f"{where}: {name} has no column {error}; found: {', '.join(record)}") from None
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                if on_bad_row == "stop":
                    hint = "mend it, or leave such records out with --on-bad-row skip"
                    raise InputError(f"{where}: not a record of {name} ({error}); {hint}") from None
                counts["not usable"] = counts.get("not usable", 0) + 1
                continue
            if made is None:
                counts[source.skips] = counts.get(source.skips, 0) + 1
            for item in made if isinstance(made, list) else [made] if made else []:
                item.source, item.licence = item.source or name, item.licence or source.licence
                item.where, item.question_id = where, item.question_id or f"{name}-{len(items)}"
                items.append(item)
    if not items:
        raise InputError(f"{origin}: holds no row of {name}")
    return items, origin


def _local_files(path: Path) -> tuple[list[Path], str]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    else:
        files = [path]
    if not path.exists() or not files or files[0].suffix not in _READERS:
        raise InputError(f"{path}: no such file or directory of {', '.join(s[1:] for s in _READERS)} files")
    return files, str(path)


def _hub_files(name: str, source: Source, revision: str | None) -> tuple[list[Path], str]:
    if not source.repo:
        raise InputError(f"--sources {name}: this set is not on the hub; give your copy as {name}=PATH")
    folder = hub_snapshot(source.repo, revision, list(source.files), "dataset")
    for pattern in source.files:
        files = sorted(folder.glob(pattern))
        if files:
            return files, f"{source.repo}@{folder.name}"
    raise InputError(
        f"{source.repo}@{folder.name}: has no file like {' or '.join(source.files)}; give a copy as {name}=PATH"
    )
