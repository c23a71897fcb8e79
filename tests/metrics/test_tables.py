"""Tables that read as text, numbers with their intervals, pictures that are whole or absent."""

import pytest

from metrics.intervals import Estimate
from metrics.tables import decimal, markdown, percent, side_by_side
from runtime.files import picture


def test_a_table():
    made = markdown(["model", "x"], [["a", "1.00"], ["longer name", "-"]])
    assert made.splitlines() == [
        "| model       |    x |",
        "|-------------|-----:|",
        "| a           | 1.00 |",
        "| longer name |    - |",
    ]


def test_text_in_a_cell_is_text():
    """A bar does not end the cell, a tag is none, a newline is a blank, and an escape reaches no terminal."""
    assert markdown(["a"], [["<|im_end|>"]]).splitlines()[2] == "| \\<\\|im_end\\|> |"
    assert markdown(["a"], [["x\n\x1b[31my"]]).splitlines()[2] == r"| x \x1b[31my |"


def test_no_answer_steers_the_terminal_that_shows_a_report():
    said = "\x1b]0;owned\x07\x9b31m\u2028"
    record = {"where": said, "prompt": [{"content": said}], "reference": said, "answers": {said: f"a\n{said}"}}
    shown = side_by_side(record)
    assert not set(shown) & set(said[:1] + "\x07\x9b\u2028") and shown.count("\\x1b]0;owned\\x07\\x9b31m\\u2028") == 5


def test_one_example_has_no_interval():
    assert percent(Estimate(1.0, 0.2, 1.0, 1)) == "100.0%" and decimal(Estimate(1.0, 1.0, 1.0, 1)) == "1.000"


def test_numbers():
    estimate = Estimate(0.5, 0.4, 0.61, 10)
    assert percent(estimate) == "50.0% [40.0, 61.0]" and percent(0.25) == "25.0%" and percent(None) == "-"
    assert decimal(estimate, 2) == "0.50 [0.40, 0.61]" and decimal(12345.6) == "12,346" and decimal(None) == "-"


def test_a_picture_is_whole_or_absent(tmp_path):
    with picture(tmp_path / "figures" / "a.png", columns=2, size=(4, 2)) as axes:
        axes[1].plot([1, 2], [3, 4])
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "b.png", columns=1, size=(4, 2)):
        1 / 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures"]
