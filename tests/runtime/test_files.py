"""A file is whole or absent, whatever happens while it is written; errors name the file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import (
    InputError,
    first_line,
    printable,
    read_fields,
    read_json,
    redact,
    whole_directory,
    whole_file,
    write_json,
    write_jsonl,
    write_text,
)
from runtime.runs import remove_leftovers

ROOT = Path(__file__).resolve().parents[2]


def run_and_die(script, path):
    """Runs `script` in another process, which kills itself without any chance to clean up (kill -9)."""
    script = f"import os, signal, sys; from runtime.files import *; {script}"
    process = subprocess.run([sys.executable, "-B", "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def tree(directory):
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------- one file


def test_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("complete")
        assert not path.exists() and temporary.parent == path.parent
    assert tree(tmp_path) == {"new/a.txt": "complete"}


def test_crash_inside_the_block_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half of the n")
        1 / 0
    assert tree(tmp_path) == {"a.txt": "old"}


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with open(path) as reader:
        write_text(path, "new")
        assert reader.read() == "old"  # the new one took its name, not its place
    assert path.read_text() == "new"


def test_crash_before_anything_was_written_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt"):
        1 / 0
    assert tree(tmp_path) == {}


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Or a loss of power after the rename could leave an empty file under its final name."""
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_text(tmp_path / "a.txt", "complete")
    assert order == ["fsync", "replace"]


def test_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    run_and_die(
        """
with whole_file(sys.argv[1]) as temporary:
    file = open(temporary, "w")
    file.write("half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)""",
        path,
    )
    assert path.read_text() == "old"
    assert "half of the n" in tree(tmp_path).values()  # it had really begun to write
    write_text(path, "new")
    assert path.read_text() == "new"
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"a.txt": "new"}


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """Whoever is done last has its whole content there; so too for a directory."""
    with whole_file(tmp_path / "a.txt") as one, whole_file(tmp_path / "a.txt") as other:
        one.write_text("one")
        other.write_text("other")
    assert tree(tmp_path) == {"a.txt": "one"}
    with whole_directory(tmp_path / "run") as one, whole_directory(tmp_path / "run") as other:
        (one / "1").write_text("one")
        (other / "2").write_text("other")
    assert tree(tmp_path) == {"a.txt": "one", "run/1": "one"}


# ------------------------------------------------------------------------------------------------------- a directory


def test_directory_replaces_the_older_one_as_a_whole(tmp_path):
    path = tmp_path / "run"
    for name in ("first", "second"):
        with whole_directory(path) as temporary:
            (temporary / name).write_text(name)
            assert not (path / name).exists()
    assert tree(tmp_path) == {"run/second": "second"}


def test_crash_inside_the_block_leaves_the_old_directory_and_no_temporary(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_directory(path) as temporary:
        (temporary / "a.txt").write_text("half of the n")
        1 / 0
    assert tree(tmp_path) == {"run/a.txt": "old"} and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_directory_of_several_levels_appears_with_all_of_them(tmp_path):
    path = tmp_path / "out" / "run" / "checkpoints" / "step-1"
    with whole_directory(path) as temporary:
        (temporary / "tb").mkdir()
        (temporary / "tb" / "a.txt").write_text("complete")
        assert temporary.parent == path.parent and temporary.name.startswith(".")
    assert tree(tmp_path) == {"out/run/checkpoints/step-1/tb/a.txt": "complete"}
    assert [p.name for p in path.parent.iterdir()] == ["step-1"]


def test_kill_in_the_middle_of_a_write_leaves_the_old_directory(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "a.txt").write_text("old")
    run_and_die(
        """
with whole_directory(sys.argv[1]) as temporary:
    (temporary / "b.txt").write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)""",
        path,
    )
    assert tree(path) == {"a.txt": "old"}
    with whole_directory(path) as temporary:
        (temporary / "a.txt").write_text("new")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"run/a.txt": "new"}  # b.txt of the killed process is not in it


# --------------------------------------------------------------------------------------------------------------- JSON


def test_json_comes_back_as_it_went(tmp_path):
    value = {"name": "Zoë", "numbers": [1, 2.5, None], "nested": {"力": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Zoë" in (tmp_path / "a.json").read_text(encoding="utf-8")  # readable, not \u00eb
    write_jsonl(tmp_path / "a.jsonl", [value, {"text": "two\nlines"}])
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [value, {"text": "two\nlines"}]


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b"", "not readable as JSON"),
        (b'{"half": ', "not readable as JSON"),
        (b'{"latin-1": "\xe9"}', "not readable as JSON"),
        (b"[1, 2]", "not readable as JSON (a JSON list, not an object)"),
        (b"7", "not readable as JSON (a JSON int, not an object)"),
    ],
)
def test_json_that_cannot_be_used_is_an_error_that_names_the_file(tmp_path, content, reason):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: {reason}")


def test_text_files_end_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"é": 2}])
    assert (tmp_path / "a.jsonl").read_bytes() == '{"a": 1}\n{"é": 2}\n'.encode()
    write_jsonl(tmp_path / "a.jsonl", [])
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_the_first_line_of_an_error():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"  # an error without a message is told by its kind
    assert issubclass(InputError, ValueError)


def test_directory_in_place_of_a_json_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match="not readable as JSON") as error:
        read_json(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_half_a_character_is_written_as_json_writes_it(tmp_path):
    write_json(tmp_path / "a.json", {"text": "\ud83d, half of an emoji"})
    assert read_json(tmp_path / "a.json") == {"text": "\ud83d, half of an emoji"}


KINDS = {"name": str, "count": int, "share": int | float, "note": str | None, "on": bool | None}


def test_known_fields_of_foreign_json():
    fields = {"name": "a", "count": 3, "share": 0.5, "on": True}
    assert read_fields(fields | {"other": 7}, KINDS, "x.json") == fields | {"note": None}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "a JSON list, not an object"),
        ({}, '"name" is missing, not str'),
        ({"name": 7}, '"name" is int, not str'),
        ({"name": "a", "count": 3.0}, '"count" is float, not int'),
        ({"name": "a", "count": True}, '"count" is bool, not int'),
        ({"name": "a", "count": 3, "share": "0.5"}, '"share" is str, not int | float'),
        ({"name": "a", "count": 3, "share": 1, "note": ["x"]}, '"note" is list, not str | None'),
        ({"name": "a", "count": 3, "share": 1, "on": 1}, '"on" is int, not bool | None'),
    ],
)
def test_fields_of_another_type_are_named(value, message):
    with pytest.raises(InputError) as error:
        read_fields(value, KINDS, "x.json:2")
    assert str(error.value) == f"x.json:2: {message}"


# ------------------------------------------------------------------------------------------------------- text of others


def test_text_of_others_cannot_steer_a_terminal():
    text = "Zo\u00eb\t\u529b\n\x1b]0;owned\x07\x1b[2J\x9b31m\r\x7f\x85\u2028\u202e\ud83d"
    assert printable(text) == "Zo\u00eb\t\u529b\n\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\r\\x7f\\x85\\u2028\\u202e\\ud83d"
    assert printable("two\r\nlines") == "two\nlines"
    assert first_line(OSError("\x1b[2J\nmore")) == "\\x1b[2J"


def test_keys_and_passwords_are_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:hunter%32two@example.org/v1")
    assert redact("key sk-secret-1, hunter%32two and hunter2two") == "key ***, *** and ***"
    assert printable("at http://you:pass@[::1]:80/v1") == "at http://***@[::1]:80/v1"
    assert redact("a@b.org: see https://example.org/@x") == "a@b.org: see https://example.org/@x"
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # what local servers are given
    assert redact("none of these") == "none of these"
