"""The benchmark finds the peers, and compares with them before it measures."""

import json

import pytest

from bench import __main__ as bench


def test_small_cases_agree_with_the_peers_and_have_numbers_of_both(tmp_path):
    for name in ("transformers", "trl", "bitsandbytes"):
        pytest.importorskip(name)
    cases = ["forward", "generate", "decode", "sft"]
    assert bench.main(["--small", "--only", *cases, "--json", str(tmp_path / "b.json")]) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert not written["failed"] and all(row["ours"] and row["peer"] for row in written["rows"])
