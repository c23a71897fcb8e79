"""A run where what only Linux has is missing: a stand-in for Windows, on which no test runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rows import pair_rows

from runtime.files import read_json, write_jsonl

ROOT = Path(__file__).resolve().parents[2]

# No sysconf and no /proc; fsync takes only files that are open for writing; a C library must be named.
WITHOUT_LINUX = """
import ctypes, fcntl, os, runpy
from pathlib import Path
import psutil  # it knows each system by itself

del os.sysconf
sync, read, write = os.fsync, Path.read_text, Path.write_text

def fsync(file):
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    sync(file)

def here(method):
    def on_this_system(path, *args, **kwargs):
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return method(path, *args, **kwargs)
    return on_this_system

class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        super().__init__(name, *args, **kwargs)

os.fsync, Path.read_text, Path.write_text, ctypes.CDLL = fsync, here(read), here(write), CDLL
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_dpo_run_needs_nothing_that_only_linux_has(tiny, tmp_path):
    """And files are UTF-8, whatever the system writes by default: here ASCII."""
    rows = [row | {"chosen": row["chosen"] + " \u03bb = 3 \u00b5m"} for row in pair_rows(25)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    where = f"--model {tiny} --train {tmp_path}/pairs.jsonl --out {tmp_path} --name run"
    flags = f"--stage dpo {where} --max-steps 2 --samples 2 --max-length 256 --max-prompt-length 128"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, "-c", WITHOUT_LINUX, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "run" / "results.json")
    assert results["memory"]["measured"] is None and results["memory"]["estimated"] > 0
    assert "\u03bb = 3 \u00b5m" in (tmp_path / "run" / "held_out.jsonl").read_text(encoding="utf-8")
