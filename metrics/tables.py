"""Results for people: tables that read well as text and as Markdown, numbers with their intervals, pictures.

`figures/` is written by code alone, so every picture has its axes named and its numbers in a file beside it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from metrics.intervals import Estimate
from runtime.files import whole_file


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width: the first to the left, the others to the right."""
    lines = [[plain(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(cells: Sequence[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *others]) + " |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([text(lines[0]), rule, *(text(line) for line in lines[1:])])


def plain(cell: str) -> str:
    """A cell in one line, without characters that steer a terminal, and with nothing that Markdown or HTML would act on."""
    text = "".join(c if c.isprintable() else " " for c in cell)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def percent(value: Estimate | float | None) -> str:
    """ "79.4% [77.2, 81.4]", without brackets for one that has no interval, "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, Estimate) and value.n > 1:
        return f"{100 * value.value:.1f}% [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * number(value):.1f}%"


def decimal(value: Estimate | float | None, digits: int = 3) -> str:
    """ "0.105 [0.101, 0.109]"; numbers from 1,000 on without decimals."""
    if value is None:
        return "-"
    digits = 0 if abs(number(value)) >= 1000 else digits
    if isinstance(value, Estimate) and value.n > 1:
        return f"{value.value:,.{digits}f} [{value.low:,.{digits}f}, {value.high:,.{digits}f}]"
    return f"{number(value):,.{digits}f}"


def number(value: Estimate | float) -> float:
    return value.value if isinstance(value, Estimate) else value


@contextlib.contextmanager
def picture(path: Path, columns: int, size: tuple[float, float], rows: int = 1) -> Iterator[list]:
    """Yields the axes of a new figure, row by row; at the end of the block they are drawn to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    try:
        yield list(axes.flat)
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
        figure.tight_layout()
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
