"""Atomic file writes, and the one error type whose message is shown to the user.

A crash in the middle of `open(path, "w")` leaves half a file under its final name, and the next run reads it as if it were
good. So everything is written beside its final name and then renamed: on one file system a rename happens or does not.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class InputError(ValueError):
    """Something the user gave cannot be used. The message, in one line, says what, where, and what to type next."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same directory; renames it to `path` if the block succeeds, deletes it if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    """Waits until a file's content is on the disk, so that a name never outlives it through a power cut."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def _beside(path: Path) -> Path:
    """A hidden name in the same directory that no other writer uses. A killed writer leaves it (`runs.remove_leftovers`)."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """As `whole_file`, for a directory: `path` appears complete or not at all. An older one of that name is replaced."""
    path = Path(path)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Deletes a directory; one that is half deleted never has its name."""
    hidden = _beside(path)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256(*files: Path) -> str:
    """Of the files' contents, one after the other, in 64 hex digits."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def json_object(text: bytes) -> dict:
    """The JSON object of a line or a file; ValueError says why there is none."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def read_json(path: str | Path) -> dict:
    """One JSON object from a file; InputError (naming the file) if it is absent or broken."""
    try:
        return json_object(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


class Unread:
    """A text stream that drops what nobody reads any more (`| head -1`, a closed terminal) instead of raising an error."""

    def __init__(self, stream: TextIO | None):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" for what it does not have
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def picture(path: Path, columns: int, size: tuple[float, float], rows: int = 1) -> Iterator[list]:
    """Yields the axes of a new figure, row by row; at the end of the block they are drawn to `path` (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(size)
    axes = figure.subplots(rows, columns, squeeze=False)
    yield list(axes.flat)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
