"""The model card: README.md beside a model, whose first lines the hub reads (base model, data sets, licence, numbers).

It is made from what the run and the runs before it left: run.json, ledger.json, results.json. Its last line is a digest of
the text above. A card that was written or changed by hand has no such line, or another digest, and is never replaced.
"""

import hashlib
import re
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any

from lora import ADAPTER_CONFIG
from metrics.tables import metrics_table
from runtime.files import printable, read_json, write_text
from runtime.runs import lineage, recorded, training_run
from runtime.settings import TRAINING, Adapters, Format, Optimizer, Preference

CARD = "README.md"
DID = {"sft": "tuned on reference answers", "dpo": "tuned on preference pairs", "mcq": "tuned on multiple choice"}
DID |= {"qat": "tuned through the rounding of its weights", "quantize": "quantized", "merge": "merged with its adapters"}
DID |= {"export": "written as a GGUF file"}
LICENCES = dict.fromkeys(("microsoft/phi-1", "microsoft/phi-1_5", "microsoft/phi-2"), "mit")  # as their own cards say
SHAPING = [f.name for part in (Preference, Optimizer, Adapters, Format) for f in fields(part)]
SHAPING += ["max_length", "max_prompt_length", "dtype", "seed"]  # the settings that are told


def write_card(run: Path, results: dict | None = None) -> None:
    """Writes the card of a run that has come to its end, unless there is one by a person. `results`: of a training run."""
    path = run / CARD
    if path.exists() and (text := path.read_text(encoding="utf-8", errors="replace")) != signed(text.rpartition("<!--")[0]):
        print(printable(f"{path} was written or changed by hand and stays; delete it to have a new one."))
        return
    write_text(path, signed(card(run, results)))


def signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}<!-- written by the run; a card with another text is never replaced: {digest} -->\n"


def hub_name(source: Any) -> str | None:
    """ "ORG/NAME" of a model or of data "hub:ORG/NAME" that came from the hub; None of all others."""
    name = str(source).removeprefix("hub:")
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def plain(text: str) -> str:
    """Text of others in one line, without the signs of Markdown, HTML and strings."""
    return re.sub(r"[|<>`\[\]*\\\"]|\s+", " ", printable(text)).strip()


def code(source: Any) -> str:
    """What something is called, without the directories of this machine, as `code` in Markdown."""
    name = hub_name(source) or Path(str(source)).name
    return f"`{plain(name)}`"


def card(run: Path, results: dict | None = None) -> str:
    """The text, without its digest. `results`: of a training run; else those of the run that tuned the model are read."""
    runs, tuned = lineage(run)[::-1], training_run(run)
    trained = [one for one in runs if recorded(one, "stage") in TRAINING]
    base = Path(str(recorded(runs[0], "model")))
    if results is None and tuned and (tuned / "results.json").exists():
        results = read_json(tuned / "results.json")
    demo = (base.parent / "world.json").exists()
    start = "random weights: the embedded demo, which is a toy" if demo else code(base)
    story = [f"- It began as {start}.", *map(what_was_done, runs)]
    if not demo and hub_name(base) not in LICENCES:
        story.append("- Its licence was not looked up: it depends on the model that it began as, and on the data.")
    numbers = results["after"]["metrics"] if results else {}
    licence = "mit" if demo else LICENCES.get(hub_name(base), "other")
    parts = [metadata(run, runs, hub_name(base), licence, numbers), f"# {plain(run.name)}", "\n".join(story)]
    not_measured = ["any public benchmark, and whether answers are true, safe or fair"]
    if results:
        stage = recorded(tuned, "stage")
        measured = {which: results[which]["metrics"] for which in ("before", "rounded", "after") if which in results}
        parts += ["## Settings", "\n".join(map(settings, trained))]
        if prompt := recorded(tuned, "system_prompt"):
            parts += ["The system turn that it was tuned with:", indent(printable(prompt), "    ", lambda line: True)]
        parts += ["## Results", f"On held-out rows, before and after `--stage {stage}`, step {results['best_step']}:"]
        parts.append(indent(metrics_table(measured), "  "))
        if stage == "dpo":
            words = "*longer answer wins*, and *chosen likelier* before tuning"
            parts.append(f"The baselines are in the table: {words}. An accuracy near theirs says little.")
        not_measured.append("questions of another kind than the rows that it was tuned on")
        not_measured += ["answers of its own"] * (not recorded(tuned, "samples"))
    if run != tuned:
        not_measured.append(f"what `--stage {recorded(run, 'stage')}` changed: the numbers are from before")
    parts += ["## What was not measured", "\n".join(f"- {line}" for line in not_measured)]
    return "\n\n".join([*parts, "## How to use it", how_to_use(run)]) + "\n\n"


def what_was_done(run: Path) -> str:
    """A run in a line: what was done to the model, with which data."""
    stage, to, ledger = recorded(run, "stage"), recorded(run, "to"), run / "ledger.json"
    line = f"- It was {DID.get(stage, 'changed')} (`--stage {stage}{f' --to {to}' if to else ''}`)"
    rows = read_json(ledger) if ledger.exists() else {}
    return line + "".join(f", {code(name)}: {one['kept']:,} of {one['rows']:,} rows" for name, one in rows.items()) + "."


def settings(run: Path) -> str:
    """The settings that shaped a training run, in a line."""
    values = {name: recorded(run, name) for name in SHAPING if recorded(run, "lora") or "lora" not in name}
    told = ", ".join(f"{name} {plain(str(value))}" for name, value in values.items() if value is not None)
    return f"- {recorded(run, 'stage')}: {told}"


def metadata(run: Path, runs: list[Path], base: str | None, licence: str, numbers: dict[str, float]) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    stages, kind = [recorded(one, "stage") for one in runs], library(run)
    data = [name for one in runs if (name := hub_name(recorded(one, "train") or ""))]
    where = dict(task_type="text-generation", dataset_type=data[-1] if data else "local", dataset_name="held-out rows")
    shown = [
        EvalResult(**where, metric_type=re.sub(r"\W+", "_", name), metric_name=name, metric_value=round(value, 4))
        for name, value in numbers.items()
    ]
    relation = "adapter" if kind == "peft" else "quantized" if {"quantize", "export"} & {*stages} else "finetune"
    values = ModelCardData(
        language="en",
        license=licence,
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=list(dict.fromkeys(data)) or None,
        tags=["phi", *dict.fromkeys(stages)],
        library_name=kind,
        pipeline_tag="text-generation",
        model_name=plain(run.name),
        eval_results=shown or None,
    )
    return f"---\n{values.to_yaml()}\n---"


def library(run: Path) -> str:
    """The hub's name for the library that loads the model."""
    if any(run.glob("*.gguf")):
        return "gguf"
    return "peft" if (run / ADAPTER_CONFIG).exists() else "transformers"


def how_to_use(run: Path) -> str:
    """Commands and code to paste. The name is that of this directory, or what the hub calls it."""
    name, kind = plain(run.name), library(run)
    if kind == "gguf":
        return f"    llama-cli -m {name}.gguf\n    ollama create {name} -f Modelfile && ollama run {name}"
    stages = [f"    python train.py --stage {stage}" for stage in ("chat --model", "export --to gguf-q8_0 --model")]
    here = "In the program that made it, and from there to llama.cpp:\n\n" + "\n".join(f"{one} {name}" for one in stages)
    if kind == "transformers" and '"blockwise"' in (run / "config.json").read_text(encoding="utf-8"):
        return f"Its number format is known to the program that made it alone:\n\n{stages[0]} {name}"
    cls = "AutoPeftModelForCausalLM" if kind == "peft" else "AutoModelForCausalLM"
    return f'    from {kind} import {cls}\n\n    model = {cls}.from_pretrained("{name}")\n\n{here}'
