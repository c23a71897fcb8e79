"""The rows of people's data files: JSON lines, a JSON array, CSV or parquet, checked and turned into `data.Row`.

    pairs   {"prompt", "chosen", "rejected"}
    sft     {"prompt", "completion"}, or {"messages"} whose last message is the assistant's
    mcq     {"question", "choices", "answer": letter, "explanation"}, or a question with its options in the text

A prompt is text or a list of {"role", "content"}; a completion is text or a list of one assistant message. A field that is
null is absent. Other fields mean nothing to the program. What is known about the questions may be in a truth file beside the
rows (`data.read_truth`).
"""

import codecs
import contextlib
import csv
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import data
from data import LETTERS, ChatML, Example, Ledger, Row, question_key
from model import read_config
from runtime import runs
from runtime.files import InputError, first_line, json_object, numbered_lines, printable
from runtime.settings import Tuning

SHOWN = 20  # reasons that an error message lists
NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking")  # parts of a message that no row can teach


def _text(value: object, name: str) -> str:
    """Returns `value` if it is a non-empty string."""
    if value is None:
        raise ValueError(f'"{name}" is missing')
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {type(value).__name__}, not text')
    if not value.strip():
        raise ValueError(f'"{name}" is empty')
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f'"{name}" holds half of a surrogate pair, which is no character')
    return value


def _messages(row: dict, name: str, last: str) -> list[dict]:
    """A conversation that ends with the role `last`: text (one user message) or a list of messages, of which only the first
    may be the system's."""
    value = row.get(name)
    if isinstance(value, str) or value is None:
        return [{"role": "user", "content": _text(value, name)}]
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{name}" is neither text nor a list of messages')
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or (role == "system" and i > 0):
            raise ValueError(f'"{name}"[{i}] is no message of the user, the assistant or, as the first, the system')
        if role != "system" or message.get("content") != "":  # an empty system turn is none
            _text(message.get("content"), f"{name}[{i}].content")
        if unlearned := [part for part in NOT_TEXT if message.get(part)]:
            raise ValueError(f'"{name}"[{i}] has {unlearned[0]}, which cannot be learned as text')
    if role != last:
        raise ValueError(f'"{name}" ends with the {role}, not with the {last}')
    if message.get("weight") == 0 or message.get("train") is False:
        raise ValueError(f'"{name}" ends with a message that is not to be learned')
    return [{"role": m["role"], "content": m["content"]} for m in value if m["content"]]


def _reply(row: dict, name: str) -> str:
    """A reply: text, or a list of one assistant message (TRL's conversational form)."""
    messages = _messages(row, name, "assistant")
    if len(messages) > 1:
        raise ValueError(f'"{name}" is a list but not of one message')
    return messages[0]["content"]


def parse_pair(row: dict, where: str = "") -> Row:
    """A preference pair: {"prompt", "chosen", "rejected"}."""
    chosen, rejected = _reply(row, "chosen"), _reply(row, "rejected")
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same text: there is nothing to prefer')
    return Row(_messages(row, "prompt", "user"), [chosen, rejected], where, row)


def parse_sft(row: dict, where: str = "") -> Row:
    """{"prompt", "completion"}, or {"messages"}; the last message is the completion."""
    if row.get("messages") is None:
        return Row(_messages(row, "prompt", "user"), [_reply(row, "completion")], where, row)
    *prompt, last = _messages(row, "messages", "assistant")
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError('"messages" has no user message before the last reply')
    return Row(prompt, [last["content"]], where, row)


def written_options(question: str) -> list[str]:
    """The options in a question's own text, "A. ..." or "A) ..." each on a new line, after "Options:" if that is there.
    Their letters must run A, B, C, ..."""
    _, _, tail = question.rpartition("Options:")
    found = re.findall(r"(?ms)^([A-J])\s*[.)][ \t]*(.*?)(?=^[A-J]\s*[.)]|^Answer:|\Z)", tail)
    if "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        raise ValueError('the options in "question" are not lettered A, B, C, ...')
    return [text.strip() for _, text in found]


def parse_mcq(row: dict, where: str = "", letter_only: bool = False) -> Row:
    """{"question", "choices", "answer": letter, "explanation"}, or the course's form, whose question has the options in its
    text and ends with "Answer:". The reply is the explanation, if there is one, and then "Answer: C"."""
    question, choices = _text(row.get("question"), "question"), row.get("choices")
    if choices is None:
        choices = written_options(question)
    elif not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f'"choices" is not a list of 2 to {len(LETTERS)} texts')
    else:
        options = [f"{letter}. {_text(choice, 'choices')}" for letter, choice in zip(LETTERS, choices)]
        question = "\n".join([f"Question: {question}", "", "Options:", *options, "", "Answer:"])
    letter = row.get("answer")
    if type(letter) is int and 0 <= letter < len(choices):
        letter = LETTERS[letter]
    if letter not in tuple(LETTERS[: len(choices)]):
        raise ValueError(f'"answer" is {str(letter)[:60]!r}, not the letter of an option, nor its number from 0 on')
    explanation = row.get("explanation") or ""
    explanation = _text(explanation, "explanation").strip() if explanation != "" else ""
    reply = letter if letter_only else f"{explanation}\n\nAnswer: {letter}".strip()
    return Row([{"role": "user", "content": question}], [reply], where, row, choices, LETTERS.index(letter))


LETTER = functools.partial(parse_mcq, letter_only=True)
PARSERS = {"pairs": parse_pair, "sft": parse_sft, "mcq": parse_mcq, "mcq letter": LETTER}


def records(path: Path) -> Iterator[tuple[int, object]]:
    """The records of a file with their numbers: the rows of parquet, the elements of a JSON array, or the lines. A line of
    JSON is still bytes (see `parsed`), so that a broken one is an error of its own."""
    try:
        with open(path, "rb") as file:
            start = file.read(100).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            yield from enumerate(read_table(path).to_pylist(), start=1)
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                lines = csv.DictReader(file)
                yield from ((lines.line_num, line) for line in lines)
        elif start == b"[" and path.suffix != ".jsonl":
            yield from enumerate(json.loads(path.read_bytes().decode("utf-8-sig")), start=1)
        else:
            yield from numbered_lines(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, NotImplementedError, RecursionError, csv.Error) as error:  # pyarrow's errors are kinds of these
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({first_line(error)})") from None


def parsed(record: object) -> dict:
    """A record of `records` as an object; ValueError if it is none."""
    if isinstance(record, bytes):
        return json_object(record)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if None in record:  # where csv puts them
        raise ValueError("more cells than the first line has")
    return record


def bad_rows(bad: list[str], total: int, where: str | Path) -> InputError:
    """The error for rows that cannot be used, each "file:line: reason": a line for each reason, with the first places."""
    places: dict[tuple[str, str], list[str]] = {}
    for line in bad:
        file, number, reason = re.fullmatch(r"(?s)(.*?):(\d+): (.*)", line).groups()
        places.setdefault((file, reason), []).append(number)
    lines = [f"{len(bad):,} of {total:,} rows of {where} cannot be used:"]
    for (file, reason), found in list(places.items())[:SHOWN]:
        more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
        lines.append(f"{file}:{', '.join(found[:5])}{more}: {reason}")
    lines += [f"... and {len(places) - SHOWN:,} more reasons"] if len(places) > SHOWN else []
    return InputError("\n  ".join(lines) + "\nCorrect them, or leave them out with --on-bad-row skip.")


def read_rows(path: str | Path, kind: str, on_bad_row: str, ledger: Ledger) -> list[Row]:
    """Reads a file of a `kind` of PARSERS: "pairs", "sft", "mcq" or "mcq letter". Blank lines are not counted.

    Rows that cannot be used are reported as `file:line: reason`: with on_bad_row "stop" in one InputError after the whole
    file was read, with "skip" in `ledger.bad_rows`, counted under `ledger.dropped["bad row"]`.
    """
    rows, bad = [], ledger.bad_rows
    for number, record in records(Path(path)):
        ledger.rows += 1
        where = f"{printable(str(path))}:{number}"
        try:
            row = PARSERS[kind](parsed(record), where)
        except ValueError as error:
            ledger.drop("bad row")
            bad.append(f"{where}: {error}")
            continue
        rows.append(row)
    if not ledger.rows:
        raise InputError(f"{path}: the file holds no rows")
    if bad and on_bad_row == "stop":
        raise bad_rows(bad, ledger.rows, path)
    if truths := data.read_truth(path):
        for row in rows:
            row.truth = truths.get(question_key(row))
    return rows


def kind_of(path: str | Path) -> str:
    """Which of PARSERS a file is for, "pairs", "mcq" or "sft", by the fields of its first readable row."""
    for _, record in records(Path(path)):
        with contextlib.suppress(ValueError):  # reported by `read_rows`
            found = {name for name, value in parsed(record).items() if value is not None}
            if "chosen" in found and "completion" not in found:
                return "pairs"
            return "mcq" if "question" in found and not {"prompt", "messages"} & found else "sft"
    return "sft"


@dataclass
class Inputs:
    """What a training stage learns from and is measured on."""

    chat: ChatML
    train: list[Example]
    held_out: list[Example]
    rows: list[Row]  # of both sides
    ledgers: dict[str, Ledger]  # by file


def load_inputs(settings: Tuning, chat: ChatML) -> Inputs:
    """Reads and checks the rows, splits them by question, and turns them into tokens. InputError if rows are bad, a question
    is on both sides, or no example is left on one."""
    files = [settings.train, settings.eval] if settings.eval else [settings.train]
    ledgers = {file: Ledger() for file in files}
    parts = [read_rows(file, row_kind(settings), settings.on_bad_row, ledgers[file]) for file in files]
    if settings.eval:
        data.check_no_leak(*parts)
    else:
        parts = data.split_by_question(parts[0], settings.eval_share, settings.seed)
        if sum(parts, []) and not all(parts):
            questions = len({question_key(row) for row in sum(parts, [])})
            asked = "one question" if questions == 1 else f"{questions:,} questions, which one side got"
            hint = "give other rows to evaluate on with --eval FILE, or more questions"
            raise InputError(f"{files[0]}: all rows ask {asked}, so they cannot be split; {hint}")
    sides = []
    for side, rows, file in zip(("train", "eval"), parts, (files[0], files[-1])):
        examples = data.encode(rows, chat, settings.max_length, settings.max_prompt_length, ledgers[file])
        if not examples:
            limits = f"--max-length {settings.max_length}, --max-prompt-length {settings.max_prompt_length}"
            causes = [f"{count:,} {cause}" for cause, count in ledgers[file].dropped.items()] + ledgers[file].bad_rows[:1]
            left_out = f"left out of {ledgers[file].rows:,} with {limits}: {', '.join(causes)}"
            raise InputError(f"{file}: no row is left for the {side} side; {left_out}. Give other rows or limits.")
        sides.append([data.supervise_everything(e) for e in examples] if settings.whole_text else examples)
    return Inputs(chat, *sides, [*parts[0], *parts[1]], ledgers)


def row_kind(settings: Tuning) -> str:
    """Which rows a training stage reads, one of PARSERS."""
    if settings.stage == "mcq":
        return "mcq letter" if settings.letter_only else "mcq"
    return "pairs" if settings.objective == "dpo" else "sft"


@dataclass
class Measured:
    """Rows to measure models on."""

    rows: list[Row]
    kind: str  # one of PARSERS
    where: str  # in words
    ledger: Ledger


def rows_to_measure(file: str | None, model: Path | None, letter_only: bool = False, on_bad_row: str = "stop") -> Measured:
    """The rows of `file` or, without one, those that the run of the model in the directory `model` held out."""
    ledger = Ledger()
    if file is None:
        run = runs.training_run(model)
        if run is None or not (run / "held_out.jsonl").exists():
            raise InputError(f"--data FILE.jsonl is missing: {model} is no run of this program with rows that it held out")
        kind = row_kind(runs.stored_settings(run))
        rows = read_rows(run / "held_out.jsonl", kind, "stop", ledger)
        return Measured(rows, kind, f"the rows that {run} held out", ledger)
    kind = kind_of(file)
    if letter_only and kind != "mcq":
        raise InputError(f"--letter-only is for multiple-choice questions, and {file} holds none; leave it out")
    kind = "mcq letter" if letter_only else kind
    return Measured(read_rows(file, kind, on_bad_row, ledger), kind, file, ledger)


def encode_for(directory: Path, rows: list[Row], system_prompt: str | None = None) -> tuple[ChatML, list[Example], Ledger]:
    """The rows that fit a model's window, with its own tokenizer and, unless another is given, the system prompt that it was
    tuned with; the ledger says what became of the others. InputError if none fits."""
    chat, ledger = runs.load_chat(directory, system_prompt), Ledger()
    window = read_config(directory).max_position_embeddings
    examples = [
        example
        for example in data.encode(rows, chat, window, window // 2, ledger)
        if len(example.prompt) + max((len(chat.reply(choice)) for choice in example.choices), default=0) <= window
    ]
    if not examples:
        raise InputError(f"{directory}: none of the {len(rows):,} rows fits into its window of {window:,} tokens")
    return chat, examples, ledger
