"""Markdown tables, numbers with their intervals, and the files of --stage eval: the tables with some answers side by side,
all answers, and the same numbers as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import indent

from data import Row
from metrics.intervals import Estimate
from runtime.files import printable, write_json, write_jsonl, write_text


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
    return " ".join(printable(cell).split()).replace("|", "\\|").replace("<", "\\<")


def percent(value: Estimate | float | None) -> str:
    """ "79.4% [77.2, 81.4]", without brackets for one that has no interval, "-" for none."""
    return _cell(value, lambda x: f"{100 * x:.1f}", "%")


def decimal(value: Estimate | float | None, digits: int = 3) -> str:
    """ "0.105 [0.101, 0.109]"; numbers from 1,000 on without decimals."""
    middle = value.value if isinstance(value, Estimate) else value or 0
    return _cell(value, lambda x: f"{x:,.{0 if abs(middle) >= 1000 else digits}f}")


def _cell(value: Estimate | float | None, text: Callable[[float], str], unit: str = "") -> str:
    if value is None:
        return "-"
    if not isinstance(value, Estimate):
        return text(value) + unit
    interval = f" [{text(value.low)}, {text(value.high)}]" if value.n > 1 else ""
    return text(value.value) + unit + interval


# ---------------------------------------------------------------------------------------------- the results of an evaluation

SHOWN = 10  # prompts whose answers are in eval.md


@dataclass
class Results:
    """What was measured so far."""

    rows: list[Row]
    where: str  # where the rows come from, in words
    asked: list[int]  # rows that the models were asked to answer
    notes: list[str]  # what a reader of the numbers must know
    models: list[dict] = field(default_factory=list)  # {"model": name, section: {measure: Estimate}}
    answers: dict[str, list[str]] = field(default_factory=dict)  # of each model to the rows asked
    failures: list[str] = field(default_factory=list)  # a line each


SECTIONS = {  # as a model's results name them, with the table's title
    "rewards": "Preferences, by the reward's margin over the reference (in nats)",
    "baselines": "What needs no tuning: share of pairs whose chosen answer is longer, or likelier",
    "text": "Reference answers (loss in nats per token)",
    "answers": "The models' answers beside the reference answers",
    "choices": "Multiple choice: accuracy by method, and what to compare it with",
    "by topic": "Multiple choice: accuracy by topic (letter)",
    "judge": "A judge, asked in both orders",
}
DECIMALS = dict.fromkeys("margin,DPO loss,loss,perplexity,ROUGE-1,ROUGE-2,ROUGE-L,BERTScore,position bias".split(","), 3)
DECIMALS |= {"BLEU": 1}  # digits; all other measures are percentages
WITH_REFERENCE = {"rewards": "reference", "judge": "judged against"}  # sections that compare with another model


def section_table(section: str, models: list[dict]) -> str:
    """A section as a Markdown table, a row for each model that has it; columns without any value are left out."""
    part = [m for m in models if section in m]
    measures = list(dict.fromkeys(name for m in part for name, value in m[section].items() if value is not None))
    other = [WITH_REFERENCE[section]] if section in WITH_REFERENCE else []
    lines = [["topic" if section == "by topic" else "model", *measures, *other]]
    for m in part:
        values = [(name, m[section].get(name)) for name in measures]
        cells = [decimal(value, DECIMALS[name]) if name in DECIMALS else percent(value) for name, value in values]
        lines.append([m["model"], *cells, *(str(m[name]) for name in other)])
    if section == "by topic":  # a row for each topic, a column for each model
        lines = list(zip(*lines))
    note = f"\n\nBLEU: sacrebleu, {part[0]['BLEU signature']}" if section == "answers" else ""
    return f"{SECTIONS[section]}\n\n{markdown(lines[0], lines[1:])}{note}"


def as_json(value: object) -> object:
    """Estimates as {"value", "low", "high", "n"}, at any depth."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return value


def report(results: Results) -> str:
    """Tables, notes and failures."""
    sections = [section for section in SECTIONS if any(section in m for m in results.models)]
    lines = [f"{len(results.rows):,} rows: {results.where}.", *results.notes, *(f"Failed: {f}" for f in results.failures)]
    tables = [section_table(section, results.models) for section in sections]
    return "\n\n".join([*tables, "\n".join(f"- {plain(line)}" for line in lines)])


def write(results: Results, run: Path) -> None:
    """Writes eval.json, answers.jsonl and eval.md with what was measured so far."""
    numbers = {"rows": len(results.rows), "of": results.where, "notes": results.notes}
    numbers |= {"results": [as_json(model) for model in results.models], "failed": results.failures}
    write_json(run / "eval.json", numbers)
    records = []
    for n, i in enumerate(results.asked):
        row, answers = results.rows[i], {name: part[n] for name, part in results.answers.items()}
        record = {"where": row.where, "prompt": row.messages, "reference": row.completions[0], "answers": answers}
        records.append(record)
    write_jsonl(run / "answers.jsonl", records)
    write_text(run / "eval.md", "\n\n".join([report(results), *map(side_by_side, records[:SHOWN])]) + "\n")


def side_by_side(record: dict) -> str:
    """A prompt with every model's answer, in Markdown. Texts are indented, so nothing in them becomes markup."""
    prompt = "\n\n".join(message["content"] for message in record["prompt"])
    texts = {"the prompt": prompt, **record["answers"], "the reference answer": record["reference"]}
    parts = [f"**{plain(name)}**\n\n{indent(printable(text), '    ', lambda line: True)}" for name, text in texts.items()]
    return "\n\n".join([f"## {plain(record['where'])}", *parts])
