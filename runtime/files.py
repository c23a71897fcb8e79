"""Atomic file writes, JSON that others wrote, and text of others as it may be shown.

A crash in the middle of `open(path, "w")` leaves half a file under its final name, and the next run reads it as if it were
good. So everything is written beside its final name and then renamed: on one file system a rename happens or does not.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, get_args
from urllib.parse import unquote


class InputError(ValueError):
    """Something the user gave cannot be used. The message, in one line, says what, where, and what to type next."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message as it may be shown; its kind if it has none."""
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__


# Control characters but for tab and newline, signs that turn the direction of writing, line separators, and half characters,
# which file names have. On a terminal they could move the cursor or disguise a text; some cannot be printed at all.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN")  # in the environment
USER = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # and password, in a URL


def redact(text: str) -> str:
    """The text without the environment's keys and without user names and passwords in URLs."""
    values = [os.environ.get(name, "") for name in SECRETS]
    for user in USER.findall(os.environ.get("OPENAI_BASE_URL", "")):
        values += [user.rpartition(":")[2], unquote(user.rpartition(":")[2])]
    for value in values:
        if len(value := value.strip()) >= 7:  # shorter ones, such as "none" and "ollama", are words of a local server
            text = text.replace(value, "***")
    return USER.sub("***", text)


def printable(text: str) -> str:
    """Text that others wrote (data, file names, models, servers) as it may be shown: without secrets, and with control
    characters as escapes, "\\x1b"."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], redact(text.replace("\r\n", "\n")))


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


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half characters as in JSON: \\ud800


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=asdict) + "\n")


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def sha256(*files: Path) -> str:
    """Of the files' contents, one after the other, in 64 hex digits."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, gzipped (.gz) or not, that are not blank, with their numbers; InputError if it cannot be read."""
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
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


def read_fields(value: object, kinds: dict[str, Any], where: str | Path) -> dict:
    """The fields {name: type} of a JSON value that others wrote. InputError if one is missing, infinite, or of another type;
    {"answer": str | None} lets an answer be missing, which makes it None."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}, not an object")
    for name, kind in kinds.items():
        found = value.get(name)
        flag_for_number = type(found) is bool and bool not in (kind, *get_args(kind))  # to Python True is an int
        endless = type(found) in (int, float) and not abs(found) < 1e30  # NaN, infinity, and what fp32 makes infinite
        allowed = kind | int if float in (kind, *get_args(kind)) else kind  # to JSON 1 and 1.0 are one number
        if flag_for_number or endless or not isinstance(found, allowed):
            wrong = "missing" if found is None else f"{found!s:.30}" if endless else type(found).__name__
            raise InputError(f'{where}: "{name}" is {wrong}, not {getattr(kind, "__name__", kind)}')
    return {name: value.get(name) for name in kinds}


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
