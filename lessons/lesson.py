"""What lessons share: claims that are checked against the numbers just measured, and a table."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Claim:
    """A sentence of a lesson, and whether the numbers measured a moment ago bear it out."""

    sentence: str
    holds: bool


def print_table(header: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Prints rows under their header, in columns: the first to the left, the others to the right."""
    lines = [header, *([cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    for line in lines:
        first, *others = (cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in enumerate(zip(line, widths)))
        print("  " + "  ".join([first, *others]).rstrip())
