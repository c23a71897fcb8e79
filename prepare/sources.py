"""The report's data sets. Each has its own columns; a short function turns one of its records into an `Item`.

    --sources theoremqa            from the Hugging Face hub, downloaded once, then read from the cache
    --sources theoremqa=PATH       a local copy: a parquet, JSON, JSON lines or CSV file, or a directory of them

A missing column is an error that lists the columns that were found.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data import LETTERS
from prepare.rows import bad_rows, parsed, records
from runtime.files import InputError, first_line
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


def _right(choices: list[str], letter: str) -> str:
    """The option that a letter names."""
    named = dict(zip(LETTERS, choices)).get(letter.strip().upper())
    if named is None:
        raise ValueError(f"the right option is {letter!r}, but there are {len(choices)}")
    return named


def _options(value: object) -> list:
    if not isinstance(value, list):
        raise ValueError(f"the options are {type(value).__name__}, not a list")
    return value


def check_text(value: object, name: str) -> str:
    """`value`; ValueError if it is not text."""
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {"missing" if value is None else type(value).__name__}, not text')
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f'"{name}" holds half of a surrogate pair, which is no character')
    return value


def mmlu_stem(record: dict, file: Path) -> Item:
    """question, choices (list), answer (0-3), subject."""
    choices, subject = _options(record["choices"]), record["subject"]
    topic = MMLU_TOPICS.get(subject, subject.replace("_", " ").capitalize())
    right = int(record["answer"])
    if not 0 <= right < len(choices):
        raise ValueError(f"the right option is {right}, but there are {len(choices)}")
    return Item(record["question"], choices[right], choices, topic=topic)


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
    """instruction, input (often empty), output, data_source (the set it was taken from, on which the licence depends)."""
    origin = record["data_source"]
    if origin not in PLATYPUS_TOPICS:
        return None
    question = "\n\n".join(text for text in (record["instruction"], record["input"]) if text.strip())
    licence = f"mixed, as of {origin}"
    return Item(question, record["output"], topic=PLATYPUS_TOPICS[origin], licence=licence)


def sciq(record: dict, file: Path) -> Item:
    """question, distractor1 ... distractor3, correct_answer, support (may be empty)."""
    right = record["correct_answer"]
    # In the order of the alphabet, because the right one would always be the last.
    choices = sorted([record["distractor1"], record["distractor2"], record["distractor3"], right])
    return Item(record["question"], right, choices, record["support"] or "")


def aqua_rat(record: dict, file: Path) -> Item:
    """question, options ("A)5 km", five of them), rationale, correct (a letter)."""
    choices = [re.sub(r"^\s*[A-E]\s*\)", "", option).strip() for option in _options(record["options"])]
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
    prompt, chosen, rejected = (check_text(record[name], name) for name in ("prompt", "chosen", "rejected"))
    item = Item(prompt, chosen, chosen=chosen, rejected=rejected)
    for name in ("topic", "source", "question_id", "licence"):
        setattr(item, name, "" if record.get(name) is None else str(record[name]))
    item.topic = "" if item.topic == "Unknown" else item.topic
    item.source = item.source or file.stem
    return item


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
}


@dataclass
class Reading:
    """What one source gave."""

    items: list[Item]
    origin: str  # a path, or repository@commit
    counts: Counter  # the records, and those that were left out, by reason


def read_source(name: str, path: str | None = None, revision: str | None = None, on_bad_row: str = "stop") -> Reading:
    """Reads a source from the hub, at a `revision`, or from the local copy at `path`.

    InputError names the files and records that lack a column or cannot be used; with on_bad_row "skip", they are counted and
    left out.
    """
    if name not in SOURCES:
        raise InputError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    if path:
        origin, wanted = path, ("*.parquet", "*.json", "*.jsonl", "*.csv")
        found = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
        files = [file for file in found if f"*{file.suffix}" in wanted and file.exists()]
    elif source.repo:
        folder = hub_snapshot(source.repo, revision, list(source.files), "dataset")
        origin, wanted = f"{source.repo}@{folder.name}", source.files
        files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in wanted)), [])
    else:
        raise InputError(f"--sources {name}: this set is not on the hub; give your copy as {name}=PATH")
    if not files:
        raise InputError(f"{origin}: no file like {' or '.join(wanted)} is there; give a copy as {name}=PATH")

    reading, bad = Reading([], origin, Counter()), []
    for file, number, record in ((one, *numbered) for one in files for numbered in records(one)):
        reading.counts["records"] += 1
        wrong = ""
        try:
            record = parsed(record)
            made = source.read(record, file)
            made = [made] if isinstance(made, Item) else made
            for what, said in (one for item in made or () for one in vars(item).items()):
                for text in said if what == "choices" else [said]:
                    check_text(text, what)
        except KeyError as error:
            wrong = f"{name} has no column {error}; found: {', '.join(map(str, record))}"
        except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            wrong = f"not a record of {name} ({first_line(error)})"
        if wrong:
            reading.counts["not usable"] += 1
            bad.append(f"{file}:{number}: {wrong}")
            continue
        if made is None:
            reading.counts[source.skips] += 1
            continue
        for item in made:
            item.source = item.source or name
            item.licence = item.licence or source.licence
            item.question_id = item.question_id or f"{name}-{len(reading.items)}"
            reading.items.append(item)
    if bad and (on_bad_row == "stop" or not reading.items):
        raise bad_rows(bad, reading.counts["records"], origin)
    if not reading.items:
        raise InputError(f"{origin}: has no row of {name}")
    return reading
