"""Markdown tables, numbers with their intervals, and the files of --stage eval: tables, answers side by side, a figure, and
the same numbers as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data import Row
from metrics.intervals import Estimate
from runtime.files import picture, write_json, write_jsonl, write_text


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

SHOWN = 10  # prompts in samples.md


@dataclass
class Results:
    """What was measured so far."""

    rows: list[Row]
    where: str  # that the rows are from
    asked: list[int]  # rows that the models were asked to answer
    notes: list[str]  # what a reader of the numbers must know
    models: list[dict] = field(default_factory=list)  # {"model": name, section: {measure: Estimate}}
    answers: dict[str, list[str]] = field(default_factory=dict)  # of each model to the rows asked
    failures: list[str] = field(default_factory=list)  # a line each


TABLES = {  # section: (title, measures)
    "rewards": (
        "Preferences, by the reward's margin over the reference",
        ["reward accuracy", "debiased accuracy", "clean accuracy", "ties", "margin", "DPO loss", "matched", "flip rate"],
    ),
    "baselines": (
        "What needs no tuning: share of pairs whose chosen answer is ...",
        [
            "longer wins",
            "shorter wins",
            "reference, sum",
            "reference, per token",
            "model alone, sum",
            "model alone, per token",
        ],
    ),
    "text": ("Reference answers", ["loss", "perplexity"]),
    "answers": (
        "Own answers beside the reference answers",
        ["BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BERTScore", "ends", "right method", "right method and number"],
    ),
    "choices": ("Multiple choice: accuracy", ["letter", "summed", "per char", "generated"]),
    "judge": ("A judge, asked in both orders", ["win rate", "tie", "inconsistent", "unjudged", "longer answer wins"]),
}
HEADINGS = {  # of measures whose name does not say enough beside the title
    "debiased accuracy": "debiased",
    "clean accuracy": "clean labels",
    "margin": "margin, nats",
    "matched": "accuracy, like lengths",
    "longer wins": "longer",
    "shorter wins": "shorter",
    "reference, sum": "likelier, reference",
    "reference, per token": "per token, reference",
    "model alone, sum": "likelier, model",
    "model alone, per token": "per token, model",
    "loss": "loss, nats per token",
    "BERTScore": "BERTScore F1",
    "ends": "answers that end",
    "right method and number": "method and number",
    "summed": "option, summed",
    "per char": "option, per character",
    "longer answer wins": "longer wins",
}
DECIMALS = {"margin", "DPO loss", "loss", "perplexity", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BERTScore"}  # others: percentages
WITH_REFERENCE = {"rewards": "reference", "judge": "judged against"}  # sections that compare with another model


def shown(measure: str, value: Estimate | None) -> str:
    """A measure's value in a cell."""
    if measure == "BLEU":
        return decimal(value, 1)
    return decimal(value) if measure in DECIMALS else percent(value)


def sections(models: list[dict]) -> list[str]:
    """Every section as a Markdown table with a row a model; columns without any value are left out."""
    made = []
    for section, (title, measures) in TABLES.items():
        part = [m for m in models if section in m]
        if not part:
            continue
        measures = [name for name in measures if any(name in m[section] for m in part)]
        other = [WITH_REFERENCE[section]] if section in WITH_REFERENCE else []
        cells = [[shown(name, m[section].get(name)) for name in measures] for m in part]
        rows = [[m["model"], *row, *(str(m[name]) for name in other)] for m, row in zip(part, cells)]
        note = f"\n\nBLEU: sacrebleu, {part[0]['BLEU signature']}" if section == "answers" else ""
        header = ["model", *(HEADINGS.get(name, name) for name in measures), *other]
        made.append(f"{title}\n\n{markdown(header, rows)}{note}")
    return made + choice_tables([m for m in models if "choices" in m])


def choice_tables(chosen: list[dict]) -> list[str]:
    """What to compare multiple-choice accuracies with, and the accuracy by topic, of the models that have them."""
    if not chosen:
        return []
    methods = list(chosen[0]["choices"])
    rows = []
    for m in chosen:
        biases = [decimal(m["position bias"].get(method), 2) for method in methods]
        rows.append([m["model"], percent(m["chance"]), percent(m.get("invalid")), *biases])
    header = ["model", "chance", "invalid answers", *(f"position bias, {HEADINGS.get(name, name)}" for name in methods)]
    made = ["Multiple choice: what to compare with\n\n" + markdown(header, rows)]
    topics = list(chosen[0]["by topic"])
    if len(topics) > 1:
        rows = [[topic, *(percent(m["by topic"][topic]) for m in chosen)] for topic in topics]
        header = ["topic", *(m["model"] for m in chosen)]
        made.append("Multiple choice: accuracy by topic (letter)\n\n" + markdown(header, rows))
    return made


def as_json(value: object) -> object:
    """Estimates as {"value", "low", "high", "n"}, at any depth."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return value


def report(results: Results) -> str:
    """Tables, notes and failures."""
    lines = [f"{len(results.rows):,} rows: {results.where}.", *results.notes, *(f"Failed: {f}" for f in results.failures)]
    return "\n\n".join([*sections(results.models), "\n".join(f"- {plain(line)}" for line in lines)])


def write(results: Results, run: Path) -> None:
    """All files of the run, each whole, so that what was measured so far is on disk."""
    numbers = {"rows": len(results.rows), "of": results.where, "notes": results.notes}
    numbers |= {"results": [as_json(model) for model in results.models], "failed": results.failures}
    write_json(run / "eval.json", numbers)
    write_text(run / "eval.md", f"{report(results)}\n\n![Results](figures/eval.png)\n")
    records = []
    for n, i in enumerate(results.asked):
        row, answers = results.rows[i], {name: part[n] for name, part in results.answers.items()}
        record = {"where": row.where, "prompt": row.messages, "reference": row.completions[0], "answers": answers}
        records.append(record)
    write_jsonl(run / "answers.jsonl", records)
    write_text(run / "samples.md", samples(records[:SHOWN]))
    if results.models:
        figure(results.models, run / "figures" / "eval.png")


def samples(records: list[dict]) -> str:
    """The first prompts with every model's answer, in Markdown; the texts are quoted and cannot become markup."""

    def quoted(text: str) -> str:
        fence = "```"
        while fence in text:
            fence += "`"
        return f"{fence}text\n{text}\n{fence}"

    parts = ["# Answers side by side"]
    for record in records:
        parts += [f"## {record['where']}", quoted("\n\n".join(m["content"] for m in record["prompt"]))]
        parts += [f"**{name}**\n\n{quoted(text)}" for name, text in record["answers"].items()]
        parts += [f"**the reference answer**\n\n{quoted(record['reference'])}"]
    return "\n\n".join(parts) + "\n"


PANELS = {  # section: (title, measures)
    "rewards": ("preferences", ("reward accuracy", "debiased accuracy", "clean accuracy", "matched", "flip rate")),
    "baselines": ("baselines", TABLES["baselines"][1][:-1]),
    "choices": ("multiple choice, accuracy", TABLES["choices"][1]),
    "text": ("reference answers, nats per token", ("loss",)),
    "answers": ("own answers", ("ROUGE-1", "ROUGE-2", "ROUGE-L", "BERTScore", "ends")),
}


def figure(models: list[dict], path: Path) -> None:
    """Every section's measures with their intervals, all models in one panel."""
    panels = [(section, *panel) for section, panel in PANELS.items() if any(section in m for m in models)]
    with picture(path, columns=len(panels), size=(5 * len(panels), 3.6)) as axes:
        for axis, (section, title, names) in zip(axes, panels, strict=True):
            names = [name for name in names if any(name in m.get(section, {}) for m in models)]
            for n, model in enumerate(m for m in models if section in m):
                draw_estimates(axis, names, model[section], 0.14 * n, f"C{n % 10}", model["model"])
            axis.set_yticks(range(len(names)), names)
            axis.set(title=title, xlabel="value and 95% interval", ylim=(len(names) - 0.3, -0.5))
        axes[0].legend(fontsize=7, loc="lower right")


def draw_estimates(axis, names: list[str], measured: dict, offset: float, colour: str, label: str) -> None:
    """One model's points with intervals, one line a measure."""
    found = [(i + offset, measured[name]) for i, name in enumerate(names) if isinstance(measured.get(name), Estimate)]
    values, places = [e.value for _, e in found], [place for place, _ in found]
    errors = [[max(0.0, gap) for gap in side] for side in zip(*((e.value - e.low, e.high - e.value) for _, e in found))]
    axis.errorbar(values, places, xerr=errors, fmt="o", color=colour, markersize=4, capsize=2, label=label)
