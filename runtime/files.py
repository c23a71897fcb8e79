"""Files that are whole or absent, and errors that are written for people.

A crash in the middle of `open(path, "w")` leaves half a file under its final name, and the next run reads it as if it
were good. So everything here is written beside its final name first and then renamed: on one file system a rename
either happened or did not.

    with whole_file("out/run/model.safetensors") as temporary:      # yields "out/run/.model.safetensors.tmp"
        save(temporary)                                             # the final name appears when the block ends well
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where, and what to type next; `train.py` prints it
    as one line instead of a stack trace."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same directory; renames it to `path` if the block succeeds, deletes it if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """As `whole_file`, for a directory: `path` appears complete or not at all. An older one of that name is replaced."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    old = path.with_name(f".{path.name}.old")
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path) -> dict:
    """One JSON object from a file; InputError (naming the file) if it is absent or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, not one JSON object")
    return value
