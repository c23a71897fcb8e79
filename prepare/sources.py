"""The report's data sets. Each has its own columns; a short function turns one of its records into an `Item`.

    --sources theoremqa            from the Hugging Face hub, downloaded once, then read from the cache
    --sources theoremqa=PATH       a copy: a file or a folder as for --train (prepare/rows.py)
    --sources pairs=PATH           your own pairs, in any form that --train takes

A missing column is an error that lists the columns that were found. Every field is checked where it is read.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data import LETTERS, Ledger
from prepare.forms import as_text, named_options, read_row
from prepare.rows import files_of, read_each
from runtime.files import InputError
from runtime.weights import hub_snapshot


@dataclass
class Item:
    """A question and what its source says about it. What the source does not say is empty."""

    question: str
    answer: str  # the right answer as text: an option, a number, an essay
    choices: list[str] = field(default_factory=list)
    right: int | None = None  # index of the right option; two options may have the same text
    explanation: str = ""
    topic: str = ""
    source: str = ""
    question_id: str = ""
    licence: str = ""
    chosen: str = ""  # of a source that has pairs already, like the next
    rejected: str = ""
    messages: list[dict] = field(default_factory=list)  # the prompt, if it is more than one message of the user
    taught: set[str] = field(default_factory=set)  # the fields that the teacher wrote


@dataclass
class Source:
    """Where a data set is and how to read it. `read(record)` returns nothing of a record that the set's rule skips."""

    repo: str  # on the hub; empty if it is not there
    files: tuple[str, ...]  # patterns of file names on the hub; the first that matches any file counts
    licence: str
    read: Callable[[dict], list[Item]]
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


# Texts that make sense only while the options keep their order: "option B", "the first choice"; in an option also "A and B
# only", "all of the above".
NAMES_A_POSITION = r"(?i:option|choice|answer)s?[\s:(]+[A-J]\b|(?i:first|second|third|fourth|last) (?i:option|choice|answer)"
NAMES_OTHERS = r"\b[A-J]\W*(?:,|and|or|&)\W*[A-J]\b|(?i:\b(?:all|none|both|neither|two) of (?:the|these|those)|the above)"


def text(record: dict, name: str) -> str:
    """A field that has to be text, perhaps an empty one."""
    return as_text(record[name], name, blank=True)


def texts(record: dict, name: str) -> list[str]:
    """The options of a question. Some are empty in published sets; the build counts and leaves out their questions."""
    return [*named_options(record[name], name, blank=True).values()]


def label(record: dict, name: str) -> str:
    """What something is called, as text; empty if it is null or absent."""
    value = record.get(name)
    if isinstance(value, dict):
        raise ValueError(f'"{name}" is an object, not text')
    return "" if value is None else text({name: str(value)}, name)


def option(named: str, names: str, count: int) -> int:
    """The index of the option, of `count`, that a letter or a digit names."""
    names, named = names[:count], named.strip().upper()
    if len(names) < 2 or named not in tuple(names):
        raise ValueError(f"the right option is {named[:20]!r}, but there are {count}: {', '.join(names)}")
    return names.index(named)


def without_letters(options: list[str]) -> list[str]:
    """["A)5 km", " b ) 7 km"] -> ["5 km", "7 km"]; ValueError if a letter does not fit its position."""
    found = [re.match(r"\s*(?:([A-Ja-j])\s*\))?\s*(.*)", option, re.DOTALL) for option in options]
    if any(one[1] and one[1].upper() != LETTERS[i] for i, one in enumerate(found)):
        raise ValueError("the options are not lettered A, B, C, ... in their order")
    return [one[2].strip() for one in found]


def mmlu_stem(record: dict) -> list[Item]:
    """question, choices (list), answer (0-3), subject."""
    choices, subject = texts(record, "choices"), text(record, "subject")
    right = option(label(record, "answer"), "0123456789", len(choices))
    topic = MMLU_TOPICS.get(subject, subject.replace("_", " ").capitalize())
    return [Item(text(record, "question"), choices[right], choices, right, topic=topic)]


def theoremqa(record: dict) -> list[Item]:
    """Question, Answer (text on the hub, a JSON value on GitHub), Picture, field. Questions with a picture are left out."""
    if record["Picture"] not in (None, ""):
        return []
    answer, branch = record["Answer"], label(record, "field")
    answer = json.dumps(answer) if isinstance(answer, list) else label(record, "Answer")
    topic = {"Math": "Mathematics", "EECS": EECS}.get(branch, branch)
    return [Item(text(record, "Question"), answer, topic=topic, question_id=label(record, "id"))]


def math_qa(record: dict) -> list[Item]:
    """Problem, Rationale, options (one text: "a ) 24 , b ) 120 , ..."), correct (a letter), category."""
    options = re.split(r"(?:^|,)\s*(?=[a-e]\s*\))", text(record, "options").strip("[]'\" "))
    choices = without_letters([option.strip(" ,") for option in options if option.strip()])
    right = option(text(record, "correct"), LETTERS, len(choices))
    rationale = text(record, "Rationale").strip("\"' ")
    return [Item(text(record, "Problem"), choices[right], choices, right, rationale, topic="Mathematics")]


def arxiv_physics(record: dict) -> list[Item]:
    """question, answer."""
    return [Item(text(record, "question"), text(record, "answer"), topic="Physics")]


def open_platypus(record: dict) -> list[Item]:
    """instruction, input (often empty), output, data_source (the set it was taken from, on which the licence depends)."""
    origin = text(record, "data_source")
    if origin not in PLATYPUS_TOPICS:
        return []
    parts = (text(record, "instruction"), text(record, "input"))
    question = "\n\n".join(part for part in parts if part.strip())
    return [Item(question, text(record, "output"), topic=PLATYPUS_TOPICS[origin], licence=f"mixed, as of {origin}")]


def sciq(record: dict) -> list[Item]:
    """question, distractor1 ... distractor3, correct_answer, support (may be empty)."""
    choices = [text(record, name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    support = "" if record["support"] is None else text(record, "support")
    order = [0, 1, 2, 3]
    in_order = re.search(NAMES_A_POSITION, support) or re.search(f"{NAMES_A_POSITION}|{NAMES_OTHERS}", "\n".join(choices))
    if not in_order:
        order.sort(key=choices.__getitem__)  # by the alphabet, because the right one would always be the last
    return [Item(text(record, "question"), choices[3], [choices[i] for i in order], order.index(3), support)]


def aqua_rat(record: dict) -> list[Item]:
    """question, options ("A)5 km", five of them), rationale, correct (a letter)."""
    choices = without_letters(texts(record, "options"))
    right = option(text(record, "correct"), LETTERS, len(choices))
    question = re.sub(r"\s*\bOptions\s*:?\s*$", "", text(record, "question"))  # some end with the heading of their options
    return [Item(question, choices[right], choices, right, text(record, "rationale"), topic="Mathematics")]


def epfl(record: dict) -> list[Item]:
    """The course's preference file: question_id, question_complete, course_id, preference: [{A, B, overall: "A" or "B"}].
    Each vote is a pair."""
    question, votes = text(record, "question_complete"), record["preference"]
    known = {"topic": COURSE_TOPICS.get(label(record, "course_id"), ""), "question_id": label(record, "question_id")}
    if not isinstance(votes, list) or not all(isinstance(vote, dict) for vote in votes):
        raise ValueError('"preference" is not a list of votes')
    items = []
    for vote in votes:
        winner = text(vote, "overall")
        if winner not in ("A", "B"):
            raise ValueError(f'"overall" is {winner[:20]!r}, neither A nor B')
        chosen, rejected = (text(vote, name) for name in (winner, "B" if winner == "A" else "A"))
        items.append(Item(question, chosen, chosen=chosen, rejected=rejected, **known))
    return items


def pair(record: dict) -> list[Item]:
    """One of your own pairs, in any form that --train takes; topic, source, question_id and licence if it has them."""
    row = read_row("pairs", record)
    chosen, rejected = row.completions
    item = Item(row.messages[-1]["content"], chosen, chosen=chosen, rejected=rejected)
    item.messages = row.messages if len(row.messages) > 1 else []
    for name in ("topic", "source", "question_id", "licence"):
        setattr(item, name, label(record, name))
    item.topic = "" if item.topic == "Unknown" else item.topic
    return [item]


ARXIV = "ArtifactAI/arxiv-physics-instruct-tune-30k"
SOURCES = {
    "mmlu_stem": Source("TIGER-Lab/MMLU-STEM", ("data/*.parquet", "*.json"), "MIT", mmlu_stem),
    "theoremqa": Source("TIGER-Lab/TheoremQA", ("data/*.parquet", "*.json"), "MIT", theoremqa, "needs its picture"),
    "math_qa": Source("kinit/math_qa", ("**/*train*.parquet", "*.parquet"), "Apache-2.0", math_qa),
    "arxiv_physics": Source(ARXIV, ("*.jsonl", "**/*.parquet"), "none stated", arxiv_physics),
    "open_platypus": Source("garage-bAInd/Open-Platypus", ("data/*.parquet",), "mixed", open_platypus, "not a STEM source"),
    "sciq": Source("allenai/sciq", ("data/train-*.parquet",), "CC BY-NC 3.0", sciq),
    "aqua_rat": Source("deepmind/aqua_rat", ("raw/train-*.parquet",), "Apache-2.0", aqua_rat),
    "epfl": Source("", (), "the course's; not public", epfl, "has no vote"),
    "pairs": Source("", (), "that of the file", pair),
}


@dataclass
class Reading:
    """What one source gave."""

    items: list[Item]
    origin: str  # a path, or repository@commit
    counts: Counter  # the records: those used, and those left out, by reason
    bad: list[str]  # "file:record: reason" of those that cannot be used


def read_source(name: str, path: str | None = None, revision: str | None = None, on_bad_row: str = "stop") -> Reading:
    """Reads a source from the hub, at a `revision`, or from the local copy at `path`.

    InputError names the files and records that lack a column or cannot be used; with on_bad_row "skip", they are counted and
    left out.
    """
    if name not in SOURCES:
        raise InputError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    source, ledger, called = SOURCES[name], Ledger(), name
    if path:
        files, origin = files_of(path), path
        called = Path(path).name.partition(".")[0] if name == "pairs" else name
    elif source.repo:
        folder = hub_snapshot(source.repo, revision, list(source.files), "dataset")
        origin = f"{source.repo}@{folder.name}"
        found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in source.files)), [])
        files = {str(file): file for file in found}
        if not files:
            raise InputError(f"{origin}: no file like {' or '.join(source.files)} is there; give a copy as {name}=PATH")
    else:
        raise InputError(f"--sources {name}: this set is not on the hub; give your copy as {name}=PATH")

    def read(record: dict, where: str) -> list[Item]:
        try:
            return source.read(record)
        except KeyError as error:
            raise ValueError(f"{name} has no column {error}; found: {', '.join(map(str, record))}") from None

    made = read_each(origin, files, read, on_bad_row, ledger)
    items = [item for one in made for item in one]
    if not items:
        raise InputError(f"{origin}: has no row of {name}")
    for i, item in enumerate(items):
        item.source = item.source or called
        item.licence = item.licence or source.licence
        item.question_id = item.question_id or f"{name}-{i}"
    used = sum(map(bool, made))
    counts = {"records": ledger.rows, "used": used, source.skips: len(made) - used, "not usable": len(ledger.bad_rows)}
    return Reading(items, origin, +Counter(counts), ledger.bad_rows)
