"""Results as people see them: Markdown tables, numbers with their intervals, the files of --stage eval (tables with some
answers side by side, all answers, the same numbers as JSON), and what a training run says and draws at its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

from torch import Tensor

from data import ChatML, Example, Row
from metrics.intervals import Estimate
from metrics.multiple_choice import parse_letter
from runtime.files import picture, printable, write_json, write_jsonl, write_text
from runtime.runs import read_metrics
from runtime.settings import METRICS


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


def decimal(value: Estimate | float | None, digits: int = 3, scale: int = 1, unit: str = "") -> str:
    """ "0.105 [0.101, 0.109]", without brackets for one that has no interval, "-" for none; numbers from 1,000 on without
    decimals."""
    if value is None:
        return "-"
    numbers = [value.value, value.low, value.high] if isinstance(value, Estimate) else [value]
    digits = 0 if abs(numbers[0]) >= 1000 else digits
    middle, *ends = (f"{scale * x:,.{digits}f}" for x in numbers)
    return middle + unit + (f" [{', '.join(ends)}]" if ends and value.n > 1 else "")


def percent(value: Estimate | float | None) -> str:
    """ "79.4% [77.2, 81.4]" """
    return decimal(value, 1, 100, "%")


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


SECTIONS = {  # as a model's results name them, with the table's title
    "format": "Number formats: weights in memory, and outputs beside those of full precision (KL in nats per token)",
    "rewards": "Preferences, by the reward's margin over the reference (in nats)",
    "baselines": "What needs no tuning: share of pairs whose chosen answer is longer, or likelier",
    "text": "Reference answers (loss in nats per token)",
    "answers": "The models' answers beside the reference answers",
    "choices": "Multiple choice: accuracy by method, and what to compare it with",
    "by topic": "Multiple choice: accuracy by topic (letter)",
    "judge": "A judge, asked in both orders",
}
DECIMALS = dict.fromkeys(
    "margin,DPO loss,loss,perplexity,ROUGE-1,ROUGE-2,ROUGE-L,BERTScore,position bias,bias by chance".split(","), 3
)
DECIMALS |= {"BLEU": 1, "memory, MB": 2, "bits per weight": 2, "KL, nats": 6}  # digits; other measures are percentages
UNIFORM = (
    "Flip rate, if uniform: of flips that do not depend on how hard a pair is. People mislabel hard pairs, and such flips "
    "hardly show here; where the model is sure and wrong, its errors count as flips."
)
WITH_REFERENCE = {"rewards": "reference", "judge": "judged against"}  # sections that compare with another model


def section_table(section: str, models: list[dict]) -> str:
    """A section as a Markdown table, a row for each model that has it; columns without any value are left out."""
    part = [m for m in models if section in m]
    measures = list(dict.fromkeys(name for m in part for name, value in m[section].items() if value is not None))
    other = [WITH_REFERENCE[section]] if section in WITH_REFERENCE else []
    titles = ["flip rate, if uniform" if name == "flip rate" else name for name in measures]
    lines = [["topic" if section == "by topic" else "model", *titles, *other]]
    for m in part:
        values = [(name, m[section].get(name)) for name in measures]
        cells = [decimal(value, DECIMALS[name]) if name in DECIMALS else percent(value) for name, value in values]
        lines.append([m["model"], *cells, *(str(m[name]) for name in other)])
    if section == "by topic":  # a row for each topic, a column for each model
        lines = list(zip(*lines))
    notes = [f"BLEU: sacrebleu, {part[0]['BLEU signature']}"] if section == "answers" else []
    notes += [UNIFORM] if "flip rate" in measures else []
    return "\n\n".join([SECTIONS[section], markdown(lines[0], lines[1:]), *notes])


def report(results: Results) -> str:
    """Tables and notes."""
    sections = [section for section in SECTIONS if any(section in m for m in results.models)]
    lines = [f"{len(results.rows):,} rows: {results.where}.", *results.notes]
    tables = [section_table(section, results.models) for section in sections]
    return "\n\n".join([*tables, "\n".join(f"- {plain(line)}" for line in lines)])


def write(results: Results, run: Path) -> None:
    """Writes eval.json, answers.jsonl and eval.md with what was measured so far."""
    about = {"rows": len(results.rows), "of": results.where, "notes": results.notes}
    write_json(run / "eval.json", about | {"results": results.models})
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


# ---------------------------------------------------------------------------------------------- the end of a training run


def metrics_table(measured: dict[str, dict[str, float]]) -> str:
    """Metrics of several models side by side, {heading: metrics}. Rewards are measured from the model "before", so it has
    none of its own."""
    rows = [("", *measured)]
    for name in measured["after"]:
        reward = "reward" in name or name in ("debiased accuracy", "ties")
        cells = ["-" if reward and which == "before" else _number(name, m[name]) for which, m in measured.items()]
        rows.append((name, *cells))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {name:{width}}" + "".join(f"  {cell:>8}" for cell in cells) for name, *cells in rows)


def _number(name: str, value: float) -> str:
    if "logp" in name or "loss" in name:
        return f"{value:.3f}"
    return f"{value:.1f}" if "tokens" in name else f"{100 * value:.1f}%"


def answer_summary(answers: list[str], ended: list[bool], examples: Sequence[Example], chat: ChatML) -> dict[str, float]:
    """The few numbers about sampled answers that the table at the end of a training run shows."""
    tokens = sum(len(chat.encode_text(answer)) for answer in answers)
    summary = {"tokens per answer": tokens / len(answers), "answers that end": sum(ended) / len(answers)}
    if all(e.choices for e in examples):
        right = [parse_letter(answer, len(e.choices)) == e.answer for answer, e in zip(answers, examples, strict=True)]
        summary["sampled: right letter"] = sum(right) / len(right)
    return summary


def summary(settings: Any, run: Path, examples: list[Example], results: dict) -> str:
    """The end of a run as text: a table, three questions with the answers before and after, files, and what to do next."""
    kinds = [which for which in ("before", "rounded", "after") if which in results]
    metric = settings.metric or METRICS[settings.objective][0]
    lines = [
        "",
        f"{len(examples):,} held-out examples, best step {results['best_step']} (by {metric}: {results['best_value']:.4f})",
        metrics_table({which: results[which]["metrics"] for which in kinds}),
    ]
    lines += _showpieces(examples, results["before"]["answers"], results["after"]["answers"])
    used = results["memory"]
    if used["measured"]:
        sizes = f"{used['measured'] / 1e9:.2f} GB measured, {used['estimated'] / 1e9:.2f} GB estimated"
        lines += ["", f"Peak memory of training: {sizes}"]
    weights = "adapter_model.safetensors" if settings.lora else "model.safetensors"
    lines += ["", f"Model, metrics and figure: {run}/ ({weights}, metrics.jsonl, figures/training.png)"]
    return "\n".join(lines)


def _showpieces(examples: list[Example], before: list[str], after: list[str]) -> list[str]:
    """Three questions with both answers and, where a truth file grades them, their marks: three that tuning put right, with
    how many there are, and how many it spoiled."""
    asked = list(zip(examples, before, after, strict=False))
    if not asked:
        return []
    lines = []
    if all(example.truth and example.truth.grades for example, _, _ in asked):
        changes = [("✗" not in _marks(example, old), "✗" not in _marks(example, new)) for example, old, new in asked]
        corrected = [one for one, change in zip(asked, changes) if change == (False, True)]
        spoiled = changes.count((True, False))
        names = ", ".join(asked[0][0].truth.grades)
        told = f"Of {len(asked):,} answers tuning put {len(corrected):,} right and {spoiled:,} wrong, by all marks."
        lines = ["", f"{told} Marks: {names}."]
        asked = corrected + asked
    for example, old, new in asked[:3]:
        lines += [
            "",
            _one_line(example.question),
            f"  before: {_marks(example, old)}{_one_line(old)[:300]}",
            f"  after:  {_marks(example, new)}{_one_line(new)[:300]}",
        ]
        if example.truth and example.truth.answer:
            lines.append(f"  right:  {' ' * len(_marks(example, old))}{_one_line(example.truth.answer)}")
    return lines


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _marks(example: Example, answer: str) -> str:
    """ "✓✗ ": which grades of the truth file an answer has, in their order; "" where none are known."""
    passed = example.truth.grade(answer) if example.truth else {}
    return "".join("✗✓"[has] for has in passed.values()) + " " * bool(passed)


PANELS = {  # of figures/training.png: {title: {a metric's name in the log: in the legend}}
    "sft": {"Loss (nats per token)": {"loss": "loss"}},
    "dpo": {
        "Preference loss without the NLL term (nats per pair)": {"preference_loss": "own", "dpo_loss": "DPO (eps = 0)"},
        "Reward accuracy (share of pairs)": {"rewards/accuracies": "as labelled", "debiased_accuracy": "debiased"},
        "NLL of the chosen answers (nats per token)": {"nll_loss": "NLL"},
        "Rewards: beta x log-ratio to the reference (nats)": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    },
}


def training_figure(run: Path, objective: str, best_step: int | None, flipped: Tensor | None) -> None:
    """figures/training.png: the metrics of every step, faint, their means over 20 steps, and dots for the held-out rows.
    `flipped` [E]: whether the labels of these are wrong, if that is known."""
    rows, panels, columns = read_metrics(run), PANELS[objective], min(2, len(PANELS[objective]))
    levels = {"dpo_loss": (math.log(2), "ln 2, the DPO loss before the first step")}  # by the metric that they belong to
    if flipped is not None:
        right = 1 - flipped.double().mean().item()
        levels["rewards/accuracies"] = (right, f"{100 * right:.1f}% of the held-out labels are right")
    lines = len(panels) // columns
    with picture(run / "figures" / "training.png", columns, (5.5 * columns, 3.8 * lines), lines) as axes:
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for colour, (name, label) in zip(("C0", "C3"), curves.items()):
                steps, y = ([row[key] for row in rows if name in row] for key in ("step", name))
                if steps:
                    means = [sum(y[max(0, i - 19) : i + 1]) / min(i + 1, 20) for i in range(len(y))]
                    axis.plot(steps, y, color=colour, alpha=0.15, linewidth=0.8)
                    axis.plot(steps, means, color=colour, alpha=0.8, label=f"{label}, training (mean of 20 steps)")
                dots = [(row["step"], row[f"eval_{name}"]) for row in rows if f"eval_{name}" in row]
                look = dict(color=colour, marker="o", markersize=4, linewidth=0, label=f"{label}, held out")
                axis.plot(*zip(*dots), **look)
            for level, text in (levels[name] for name in curves if name in levels):
                axis.axhline(level, color="black", linestyle="--", linewidth=0.8, label=text)
            if best_step is not None:
                axis.axvline(best_step, color="black", linestyle=":", linewidth=0.8, label=f"best step, {best_step}")
            axis.set(title=title, xlabel="optimizer step")
            axis.legend(fontsize=7)
