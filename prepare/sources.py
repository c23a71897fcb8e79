"""The report's data sets. Each has its own columns; a short function turns one of its records into an `Item`.

    --sources theoremqa            from the Hugging Face hub, downloaded once, then read from the cache
    --sources theoremqa=PATH       a local copy: a parquet, JSON, JSON lines or CSV file, or a directory of them

Where a set changed its columns over the years, both forms are read. A missing column is an error that lists the columns
that were found.
"""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import LETTERS
from runtime.files import InputError, json_object, numbered_lines
from runtime.weights import hub_snapshot


@dataclass
class Item:
    """A question and what its source says about it. What the source does not say is empty."""

    question: str
    answer: str  # the right answer as text: an option, a number, an essay
    choices: list[str] = field(default_factory=list)
    explanation: str = ""
    topic: str = ""
    source: str = ""
    question_id: str = ""
    licence: str = ""
    data_source: str = ""  # Open-Platypus: the set that the row was taken from
    chosen: str = ""  # of a source that has pairs already, like the next
    rejected: str = ""


@dataclass
class Source:
    """Where a data set is and how to read it. `read(record, file)` returns None for a record that the set's rule skips."""

    repo: str  # on the hub; empty if it is not there
    files: tuple[str, ...]  # patterns of file names on the hub; the first that matches any file counts
    licence: str
    read: Callable[[dict, Path], Item | list[Item] | None]
    skips: str = "left out by the source's rule"


EECS = "Electrical Engineering and Computer Science"


def _by_name(groups: dict[str, str]) -> dict[str, str]:
    """{"Physics": "3 15113"} -> {"3": "Physics", "15113": "Physics"}"""
    return {name: group for group, names in groups.items() for name in names.split()}


MMLU = {
    "Mathematics": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics",
    "Biology": "anatomy college_biology high_school_biology",
    "Physics": "astronomy college_physics conceptual_physics high_school_physics",
    "Chemistry": "college_chemistry high_school_chemistry",
    "Computer Science": "college_computer_science computer_security high_school_computer_science machine_learning",
    EECS: "electrical_engineering",
}
MMLU_TOPICS = _by_name(MMLU) | {"high_school_statistics": "Mathematics"}
COURSES = "0 4 5 9 15000 15002 15003 15004 15005 15006 15008 15011 15041 15103 15125 15126 15127"
COURSE_TOPICS = _by_name({"Physics": "3 15113 15107 15116 15115 15118", "Computer Science": COURSES})  # by EPFL's course id
# Open-Platypus's STEM parts by data_source; some cover several topics.
PLATYPUS = {"Mathematics": "MATH/PRM-800K", "Computer Science": "leetcode_ne tigerbot-kaggle"}
PLATYPUS_TOPICS = _by_name(PLATYPUS | {"": "ARB airoboros scibench scienceqa"})


def _subject_topic(subject: str) -> str:
    return MMLU_TOPICS.get(subject, subject.replace("_", " ").capitalize())


def _without_letter(option: str) -> str:
    """ "A)5 km", "a ) 24" and "B. yes" without their letter."""
    return re.sub(r"^\s*[A-Ja-j]\s*[).:]\s*", "", option).strip()


def _right(choices: list[str], letter: str) -> str:
    """The option that a letter names."""
    named = dict(zip(LETTERS, choices)).get(letter.strip().upper())
    if named is None:
        raise ValueError(f"the right option is {letter!r}, but there are {len(choices)}")
    return named


def mmlu_stem(record: dict, file: Path) -> Item:
    """question, choices (list), answer (0-3), subject. MMLU's CSV: choice0 ... choice3, answer (a letter or 0-3), and the
    subject in the file's name."""
    answer = str(record["answer"])
    if "choice0" in record:
        choices = [record[f"choice{i}"] for i in range(4)]
        subject = re.sub(r"_(test|dev|val)$", "", file.stem)
    else:
        choices, subject = list(record["choices"]), record["subject"]
    right = choices[int(answer)] if answer.isdigit() else _right(choices, answer)
    return Item(record["question"], right, choices, topic=_subject_topic(subject))


def theoremqa(record: dict, file: Path) -> Item | None:
    """Question, Answer (text on the hub, a JSON value on GitHub), Picture, field. Questions with a picture are left out."""
    if record["Picture"] is not None:
        return None
    answer = record["Answer"]
    answer = json.dumps(answer) if isinstance(answer, list) else str(answer)
    branch = record.get("field") or ""
    topic = {"Math": "Mathematics", "EECS": EECS}.get(branch, branch)
    return Item(record["Question"], answer, topic=topic, question_id=str(record.get("id", "")))


def math_qa(record: dict, file: Path) -> Item:
    """Problem, Rationale, options (one text: "a ) 24 , b ) 120 , ..."), correct (a letter), category."""
    options = re.split(r"(?:^|,)\s*[a-e]\s*\)", record["options"].strip("[]'\" "))
    choices = [option.strip(" ,") for option in options[1:]]
    right = _right(choices, record["correct"])
    return Item(record["Problem"], right, choices, record["Rationale"].strip("\"' "), topic="Mathematics")


def arxiv_physics(record: dict, file: Path) -> Item:
    """question, answer."""
    return Item(record["question"], record["answer"], topic="Physics")


def open_platypus(record: dict, file: Path) -> Item | None:
    """instruction, input (often empty), output, data_source (kept, because the licence depends on it)."""
    origin = record["data_source"]
    if origin not in PLATYPUS_TOPICS:
        return None
    question = "\n\n".join(text for text in (record["instruction"], record["input"]) if text.strip())
    licence = f"mixed, as of {origin}"
    return Item(question, record["output"], topic=PLATYPUS_TOPICS[origin], licence=licence, data_source=origin)


def sciq(record: dict, file: Path) -> Item:
    """question, distractor1 ... distractor3, correct_answer, support (may be empty)."""
    choices = [record[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return Item(record["question"], choices[3], choices, record["support"] or "")


def aqua_rat(record: dict, file: Path) -> Item:
    """question, options ("A)5 km", five of them), rationale, correct (a letter)."""
    choices = [_without_letter(option) for option in record["options"]]
    return Item(record["question"], _right(choices, record["correct"]), choices, record["rationale"], topic="Mathematics")


def epfl(record: dict, file: Path) -> list[Item]:
    """The course's preference file: question_id, question_complete, course_id, preference: [{A, B, overall: "A" or "B"}].
    Each vote is a pair."""
    known = {"topic": COURSE_TOPICS.get(str(record["course_id"]), ""), "question_id": str(record["question_id"])}
    items = []
    for vote in record["preference"]:
        if vote["overall"] not in ("A", "B"):
            raise ValueError(f'"overall" is {vote["overall"]!r}, neither A nor B')
        chosen, rejected = (vote["A"], vote["B"]) if vote["overall"] == "A" else (vote["B"], vote["A"])
        items.append(Item(record["question_complete"], chosen, chosen=chosen, rejected=rejected, **known))
    return items


def pairs(record: dict, file: Path) -> Item:
    """Your own pairs: prompt, chosen, rejected; topic, source, question_id and licence if you have them."""
    item = Item(record["prompt"], record["chosen"], chosen=record["chosen"], rejected=record["rejected"])
    item.source = record.get("source") or file.stem
    item.topic = "" if record.get("topic", "Unknown") == "Unknown" else record["topic"]
    item.question_id = str(record.get("question_id", ""))
    item.licence = record.get("licence", "")
    return item


def mcq(record: dict, file: Path) -> Item:
    """The course's multiple choice: question ("Question: ... Options: A. ... Answer:"), answer (a letter), and sometimes
    explanation and subject."""
    match = re.match(r"\s*Question:\s*(.*?)\n+Options:\s*\n(.*?)\n*\s*Answer:\s*$", record["question"], re.DOTALL)
    if not match:
        raise ValueError('"question" is not of the form "Question: ... Options: ... Answer:"')
    choices = [_without_letter(option) for option in re.split(r"\n(?=[A-J][).])", match[2])]
    right = _right(choices, record["answer"])
    topic = _subject_topic(str(record.get("subject", "")))
    return Item(match[1].strip(), right, choices, record.get("explanation", ""), topic=topic)


ARXIV = "ArtifactAI/arxiv-physics-instruct-tune-30k"
SOURCES = {
    "mmlu_stem": Source("TIGER-Lab/MMLU-STEM", ("data/*.parquet", "*.json"), "MIT", mmlu_stem),
    "theoremqa": Source("TIGER-Lab/TheoremQA", ("data/*.parquet", "*.json"), "MIT", theoremqa, "needs its picture"),
    "math_qa": Source("kinit/math_qa", ("**/*train*.parquet", "*.parquet"), "Apache-2.0", math_qa),
    "arxiv_physics": Source(ARXIV, ("*.jsonl", "**/*.parquet"), "none stated", arxiv_physics),
    "open_platypus": Source("garage-bAInd/Open-Platypus", ("data/*.parquet",), "mixed", open_platypus, "not a STEM source"),
    "sciq": Source("allenai/sciq", ("data/train-*.parquet",), "CC BY-NC 3.0", sciq),
    "aqua_rat": Source("deepmind/aqua_rat", ("raw/train-*.parquet",), "Apache-2.0", aqua_rat),
    "epfl": Source("", (), "the course's; not public", epfl),
    "pairs": Source("", (), "that of the file", pairs),
    "mcq": Source("", (), "that of the questions", mcq),
}


SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")


def records(path: Path) -> Iterator[tuple[int, dict]]:
    """The records of a file with their numbers (JSON lines: the numbers of the lines). JSON is an array, or an object on
    each line: AQUA-RAT's files with lines are called .json too."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            batches = ParquetFile(path).iter_batches()
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                yield from enumerate(csv.DictReader(file), start=1)
        elif (data := path.read_bytes().removeprefix(codecs.BOM_UTF8)).lstrip().startswith(b"["):
            for number, record in enumerate(json.loads(data), start=1):
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: a JSON {type(record).__name__}, not an object")
                yield number, record
        else:
            for number, line in numbered_lines(path):
                try:
                    yield number, json_object(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: {error}") from None
    except InputError:
        raise
    except (ValueError, NotImplementedError, OSError, csv.Error) as error:  # pyarrow's errors are kinds of these
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from None


@dataclass
class Reading:
    """What one source gave."""

    items: list[Item]
    origin: str  # a path, or repository@commit
    counts: Counter  # the records, and those that were left out, by reason


def _find_files(source: Source, name: str, path: str | None, revision: str | None) -> tuple[list[Path], str]:
    """(the files of a source, where they come from)."""
    if path:
        found = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
        files = [file for file in found if file.suffix in SUFFIXES and file.exists()]
        if not files:
            raise InputError(f"{path}: no such file or directory of {', '.join(s[1:] for s in SUFFIXES)} files")
        return files, path
    if not source.repo:
        raise InputError(f"--sources {name}: this set is not on the hub; give your copy as {name}=PATH")
    folder = hub_snapshot(source.repo, revision, list(source.files), "dataset")
    origin = f"{source.repo}@{folder.name}"
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in source.files)), [])
    if not files:
        raise InputError(f"{origin}: has no file like {' or '.join(source.files)}; give a copy as {name}=PATH")
    return files, origin


def read_source(name: str, path: str | None = None, revision: str | None = None, on_bad_row: str = "stop") -> Reading:
    """Reads a source from the hub, at a `revision`, or from the local copy at `path`.

    InputError names the file and record that lacks a column or cannot be used; with on_bad_row "skip", unusable records are
    counted and left out.
    """
    if name not in SOURCES:
        raise InputError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    files, origin = _find_files(source, name, path, revision)
    reading = Reading([], origin, Counter())
    for file in files:
        for number, record in records(file):
            reading.counts["records"] += 1
            try:
                made = source.read(record, file)
            except KeyError as error:
                found = ", ".join(map(str, record))
                raise InputError(f"{file}:{number}: {name} has no column {error}; found: {found}") from None
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                if on_bad_row == "stop":
                    hint = "correct it, or leave such records out with --on-bad-row skip"
                    raise InputError(f"{file}:{number}: not a record of {name} ({error}); {hint}") from None
                reading.counts["not usable"] += 1
                continue
            if made is None:
                reading.counts[source.skips] += 1
                continue
            for item in made if isinstance(made, list) else [made]:
                item.source = item.source or name
                item.licence = item.licence or source.licence
                item.question_id = item.question_id or f"{name}-{len(reading.items)}"
                reading.items.append(item)
    if not reading.items:
        raise InputError(f"{origin}: has no row of {name}")
    return reading
