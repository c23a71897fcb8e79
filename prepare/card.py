"""What a built data set says about itself, on the terminal and in its README.md."""

from pathlib import Path

from metrics.tables import markdown
from prepare import giveaways
from publish.card import plain

HUB = {"MIT": "mit", "Apache-2.0": "apache-2.0", "CC BY-NC 3.0": "cc-by-nc-3.0", "none stated": "unknown"}  # licence names
ABOUT_SCORES = (
    "A score says how often the chosen answer is found without its content: by taking the longer one, by the two lengths "
    "alone, by a bag of words; on questions that it was not fitted on, with its standard error. Guessing reaches 50%."
)


def table(lines: list[dict]) -> str:
    """Dictionaries with the same keys as a Markdown table."""
    cells = [[f"{v:,}" if isinstance(v, int) else plain(str(v)) for v in line.values()] for line in lines]
    return markdown(list(lines[0]), cells)


def scores(stages: dict[str, list[dict]]) -> list[dict]:
    """For each source and each stage of its pairs ("all", "matched"): how many there are, who wrote chosen and rejected, and
    what gives the chosen answers away. More than 20 sources are shown as one."""
    names = sorted({row["source"] for rows in stages.values() for row in rows})
    lines = []
    for group in [{name} for name in names] if len(names) <= 20 else [set(names)]:
        for stage, rows in stages.items():
            part = [row for row in rows if row["source"] in group]
            authors = sorted({f"{row['chosen_by']}, {row['rejected_by']}" for row in part})
            line = {"source": "".join(group) if len(group) == 1 else "all", "stage": stage, "pairs": len(part)}
            found = {name: find(part) for name, find in giveaways.SCORES.items()}
            lines.append(line | {"chosen by, rejected by": "; ".join(authors)} | found)
    return lines


def metadata(ledger: dict) -> str:
    """The YAML that the hub reads: licences, language, tags, and which file is which split. Only names of this program are
    in it, no text of the data."""
    from huggingface_hub import DatasetCardData

    files, ours = ledger["files"], "pairs" not in {label.partition("=")[0] for label in ledger["read"]}
    configs = []
    for name in (name for name in files if "train" in name):
        paths = {"train": f"{name}.jsonl", "test": "mcq-test.jsonl" if name == "mcq-train" else "test.jsonl"}
        configs.append({"config_name": name, "data_files": [{"split": s, "path": path} for s, path in paths.items()]})
    values = DatasetCardData(
        license=sorted({HUB.get(licence, "other") for part in files.values() for licence in part["by licence"]}),
        language="en" if ours else None,
        tags=["dpo" if ledger["what"] == "pairs" else "sft", *(["multiple-choice"] if "mcq-train" in files else [])],
        configs=configs,
    )
    return f"---\n{values.to_yaml()}\n---"


def readme(name: str, ledger: dict, teacher: str | None) -> str:
    """What a data set says about itself: the text that is printed, and its README.md below the `metadata`."""
    sources, left_out = [], []
    for label, read in ledger["read"].items():
        ours = "=" in label and not read["from"].startswith("hub:")
        origin = f"a local copy, {Path(read['from']).name}" if ours else read["from"]
        line = {"source": label.partition("=")[0], "from": origin, "licence": "; ".join(sorted(read["licences"])[:5])}
        sources.append(line | {"records": read["records"], "used": read["used"]})
    for kind in (ledger["rows"], ledger["multiple choice"]):
        left_out += [{"of": kind["items"], "left out": count, "because": why} for why, count in kind["left out"].items()]
    files = [{"file": f"{file}.jsonl", "rows": part["rows"]} for file, part in ledger["files"].items()]
    parts = [f"# {plain(name)}", table(files), "## Sources", table(sources)]
    if ledger["scores"]:
        by = f"The teacher is {plain(teacher)}. " if teacher else ""
        parts += ["## Who wrote the answers, and what gives them away", by + ABOUT_SCORES, table(ledger["scores"])]
    parts += ["## Left out", table(left_out) if left_out else "Nothing."]
    return "\n\n".join(parts) + "\n"
