"""The results of --stage eval as files: tables, answers side by side, a figure, and the same numbers as JSON."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from data import Row
from metrics.intervals import Estimate
from metrics.tables import decimal, markdown, percent, picture, plain
from runtime.files import write_json, write_jsonl, write_text

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


# section: (its name in a result, {heading: (measure, how it is shown)})
TABLES = {
    "Preferences, by the reward's margin over the reference": (
        "rewards",
        {
            "reward accuracy": ("reward accuracy", percent),
            "debiased": ("debiased accuracy", percent),
            "clean labels": ("clean accuracy", percent),
            "ties": ("ties", percent),
            "margin, nats": ("margin", decimal),
            "DPO loss": ("DPO loss", decimal),
            "accuracy, like lengths": ("matched", percent),
            "flip rate": ("flip rate", percent),
        },
    ),
    "What needs no tuning: share of pairs whose chosen answer is ...": (
        "baselines",
        {
            "longer": ("longer wins", percent),
            "shorter": ("shorter wins", percent),
            "likelier, reference": ("reference, sum", percent),
            "per token, reference": ("reference, per token", percent),
            "likelier, model": ("model alone, sum", percent),
            "per token, model": ("model alone, per token", percent),
        },
    ),
    "Reference answers": (
        "text",
        {"loss, nats per token": ("loss", decimal), "perplexity": ("perplexity", decimal)},
    ),
    "Own answers beside the reference answers": (
        "answers",
        {
            "BLEU": ("BLEU", lambda v: decimal(v, 1)),
            "ROUGE-1": ("ROUGE-1", decimal),
            "ROUGE-2": ("ROUGE-2", decimal),
            "ROUGE-L": ("ROUGE-L", decimal),
            "BERTScore F1": ("BERTScore", decimal),
            "answers that end": ("ends", percent),
            "right method": ("right method", percent),
            "method and number": ("right method and number", percent),
        },
    ),
    "Multiple choice: accuracy": (
        "choices",
        {
            "letter": ("letter", percent),
            "option, summed": ("summed", percent),
            "option, per character": ("per char", percent),
            "generated": ("generated", percent),
        },
    ),
    "A judge, asked in both orders": (
        "judge",
        {
            "win rate": ("win rate", percent),
            "tie": ("tie", percent),
            "inconsistent": ("inconsistent", percent),
            "unjudged": ("unjudged", percent),
            "longer wins": ("longer answer wins", percent),
        },
    ),
}


WITH_REFERENCE = {"rewards": "reference", "judge": "judged against"}  # sections that compare with another model


def tables(models: list[dict]) -> list[str]:
    """Every section as a Markdown table with a row a model; columns without any value are left out."""
    made = []
    for title, (section, columns) in TABLES.items():
        part = [m for m in models if section in m]
        shown = {head: (key, show) for head, (key, show) in columns.items() if any(key in r[section] for r in part)}
        if part:
            rows = [[r["model"], *(show(r[section].get(key)) for key, show in shown.values())] for r in part]
            if section in WITH_REFERENCE:
                rows = [[*row, str(r[WITH_REFERENCE[section]])] for row, r in zip(rows, part, strict=True)]
            header = ["model", *shown, *([WITH_REFERENCE[section]] if section in WITH_REFERENCE else [])]
            note = f"\n\nBLEU: sacrebleu, {part[0]['BLEU signature']}" if section == "answers" else ""
            made.append(f"{title}\n\n{markdown(header, rows)}{note}")
    return made + choice_tables([m for m in models if "choices" in m])


def choice_tables(chosen: list[dict]) -> list[str]:
    """What to compare multiple-choice accuracies with, and the accuracy by topic, of the models that have them."""
    if not chosen:
        return []
    methods = list(chosen[0]["choices"])
    shown = {key: head for head, (key, _) in TABLES["Multiple choice: accuracy"][1].items()}
    rows = [
        [m["model"], percent(m["chance"]), percent(m.get("invalid"))]
        + [decimal(m["position bias"].get(method), 2) for method in methods]
        for m in chosen
    ]
    header = ["model", "chance", "invalid answers", *(f"position bias, {shown[method]}" for method in methods)]
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


def text(results: Results) -> str:
    """Tables, notes and failures."""
    lines = [f"{len(results.rows):,} rows: {results.where}.", *results.notes, *(f"Failed: {f}" for f in results.failures)]
    return "\n\n".join([*tables(results.models), "\n".join(f"- {plain(line)}" for line in lines)])


def write(results: Results, run: Path) -> None:
    """All files of the run, each whole, so that what was measured so far is on disk."""
    models = [as_json(model) for model in results.models]
    write_json(
        run / "eval.json",
        {
            "rows": len(results.rows),
            "of": results.where,
            "notes": results.notes,
            "results": models,
            "failed": results.failures,
        },
    )
    write_text(run / "eval.md", f"{text(results)}\n\n![Results](figures/eval.png)\n")
    records = [
        {
            "where": results.rows[i].where,
            "prompt": results.rows[i].messages,
            "reference": results.rows[i].completions[0],
            "answers": {name: part[n] for name, part in results.answers.items()},
        }
        for n, i in enumerate(results.asked)
    ]
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


# section: (title, measures)
PANELS = {
    "rewards": ("preferences", ("reward accuracy", "debiased accuracy", "clean accuracy", "matched", "flip rate")),
    "baselines": (
        "baselines",
        ("longer wins", "shorter wins", "reference, sum", "reference, per token", "model alone, sum"),
    ),
    "choices": ("multiple choice, accuracy", ("letter", "summed", "per char", "generated")),
    "text": ("reference answers, nats per token", ("loss",)),
    "answers": ("own answers", ("ROUGE-1", "ROUGE-2", "ROUGE-L", "BERTScore", "ends")),
}


def figure(models: list[dict], path: Path) -> None:
    """Every section's measures with their intervals, all models in one panel."""
    panels = [(section, *panel) for section, panel in PANELS.items() if any(section in m for m in models)]
    with picture(path, columns=len(panels), size=(5 * len(panels), 3.6)) as axes:
        for axis, (section, title, names) in zip(axes, panels, strict=True):
            shown = [name for name in names if any(name in m.get(section, {}) for m in models)]
            for n, model in enumerate(m for m in models if section in m):
                draw_estimates(axis, shown, model[section], 0.14 * n, f"C{n % 10}", model["model"])
            axis.set_yticks(range(len(shown)), shown)
            axis.set(title=title, xlabel="value and 95% interval", ylim=(len(shown) - 0.3, -0.5))
        axes[0].legend(fontsize=7, loc="lower right")


def draw_estimates(axis, names: list[str], measured: dict, offset: float, colour: str, label: str) -> None:
    """One model's points with intervals, one line a measure."""
    found = [(i + offset, measured[name]) for i, name in enumerate(names) if isinstance(measured.get(name), Estimate)]
    values, places = [e.value for _, e in found], [place for place, _ in found]
    errors = [[max(0.0, gap) for gap in side] for side in zip(*((e.value - e.low, e.high - e.value) for _, e in found))]
    axis.errorbar(values, places, xerr=errors, fmt="o", color=colour, markersize=4, capsize=2, label=label)
