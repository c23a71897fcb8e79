"""The precision report card: one model in several number formats, what each costs in bytes, in speed and in quality.

    python train.py --stage eval --model out/demo-dpo --precisions fp32,bf16,int8,nf4,nf4-double,fp4,int4

Every format is made here from the same full-precision weights, and compared with them on the same held-out rows. Layers
that are not quantized (embeddings, LayerNorms, output layer) stay fp32 in every row but bf16, so that a row differs from
the first one by its format alone.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dpo
from data import ChatML, Example
from eval import check_flags, find_reference
from generate import generate
from lora import refuse_adapters
from metrics.multiple_choice import accuracies, score_options
from metrics.preferences import accuracy, flips, for_the_right
from metrics.tables import markdown
from metrics.text import divergence, perplexity
from model import Phi, all_logprobs
from prepare.rows import encode_for, rows_to_measure
from quant import FrozenLinear, quantize_model
from runtime import runs
from runtime.files import InputError, picture, printable, write_json, write_text
from runtime.settings import Eval
from runtime.weights import is_quantized, resolve

NEW_TOKENS = 64  # per answer when the speed of decoding is measured
BATCH = 16  # examples per forward pass


def run(settings: Eval) -> int:
    """Measures every format of --precisions, prints the table, and writes eval.json, precisions.md and a figure."""
    source = resolve(settings.model[0], settings.revision)
    refuse_adapters(source)
    if is_quantized(source):
        raise InputError(f"{source} is quantized; the card needs the full-precision model that it was made of")
    measured = rows_to_measure(settings.data, source, settings.letter_only, settings.on_bad_row)
    chat, examples, _ = encode_for(source, measured.rows, settings.system_prompt)
    check_flags(settings, measured.kind)
    parent = find_reference(settings, source, chat) if measured.kind == "pairs" else None
    with runs.open_run(settings):
        directory = Path(settings.out) / settings.name
        full = Phi.from_pretrained(source, device=settings.device)
        reference = None  # [E, 2]
        if parent:
            model = Phi.from_pretrained(parent, device=settings.device)
            reference = all_logprobs(model, examples, BATCH, settings.device, "fp32", "reference")
        rows = []
        for name in settings.precisions.split(","):
            print(f"{name} ...", flush=True)
            rows.append(measure_format(name, source, full, chat, examples, reference, settings.device))
        note = (
            f"{source}, {len(examples):,} examples of {measured.where}; decoding {NEW_TOKENS} tokens on {settings.device}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        )
        write_json(directory / "eval.json", {"note": note, "rows": rows})
        write_text(directory / "precisions.md", f"{table(rows)}\n\n{note}\n")
        figure(rows, directory / "figures" / "precisions.png")
        print(f"\n{table(rows)}\n\n{printable(note)}")
        print(f"Written to {directory}/: eval.json, precisions.md, figures/precisions.png")
    return 0


def measure_format(
    name: str, source: Path, full: Phi, chat: ChatML, examples: list[Example], reference: Tensor | None, device: str
) -> dict:
    """A row of the card: the model of `source` in one format ("nf4", "llm.int8", "bf16", ...) beside the `full` one."""
    model = Phi.from_pretrained(source, torch.bfloat16 if name == "bf16" else torch.float32, device)
    if name not in ("fp32", "bf16"):
        quantize_model(model, name)
    row = {"format": name, **sizes(model)}
    likely = [replace(e, completions=e.completions[:1]) for e in examples]  # of a pair, the chosen answer
    measured = divergence(full, model, likely, BATCH, device)
    row |= {"perplexity": perplexity(measured["loss"]), "KL, nats": measured["kl"], "same top 1": measured["top 1"]}
    if reference is not None:
        policy = all_logprobs(model, examples, BATCH, device, "fp32", "rewards")
        row["reward accuracy"] = accuracy(for_the_right(dpo.margin(policy, reference), flips(examples))).value
    if all(e.choices for e in examples):
        row["right option"] = accuracies(score_options(model, examples, chat, BATCH, device, "fp32"))["letter"].value
    prompts = [e.prompt for e in examples[:16]]
    return row | {f"tokens/s, {n}": decode_speed(model, (prompts * n)[:n]) for n in (1, 16)}


def sizes(model: Phi) -> dict[str, float]:
    """Megabytes in memory (a file has a few more), and bits per weight of the linear layers, scales included."""
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e6
    modules = [layer for name, layer in model.named_modules() if name != "lm_head"]
    frozen = [layer for layer in modules if isinstance(layer, FrozenLinear)]
    plain = [layer for layer in modules if isinstance(layer, torch.nn.Linear)]
    stored = sum(x.nbytes for layer in frozen for x in layer.buffers()) + sum(layer.weight.nbytes for layer in plain)
    weights = sum(layer.in_features * layer.out_features for layer in (*frozen, *plain))
    return {"memory, MB": memory, "bits per weight": 8 * stored / weights}


def decode_speed(model: Phi, prompts: list[list[int]], repeats: int = 3) -> float:
    """New tokens per second of greedy decoding, the median of `repeats` after one run that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        generate(model, prompts, NEW_TOKENS)  # ends with the tokens on the CPU, so a GPU's work is done
        seconds.append(time.perf_counter() - began)
    return len(prompts) * NEW_TOKENS / statistics.median(seconds[1:])


COLUMNS = {  # and how their values are shown
    "format": "{}",
    "memory, MB": "{:,.2f}",
    "bits per weight": "{:.2f}",
    "perplexity": "{:.4f}",
    "KL, nats": "{:.2g}",
    "same top 1": "{:.2%}",
    "reward accuracy": "{:.1%}",
    "right option": "{:.1%}",
    "tokens/s, 1": "{:,.0f}",
    "tokens/s, 16": "{:,.0f}",
}


def table(rows: list[dict]) -> str:
    """The card as a table, with the columns that were measured."""
    columns = [name for name in COLUMNS if name in rows[0]]
    return markdown(columns, [[COLUMNS[name].format(row[name]) for name in columns] for row in rows])


def figure(rows: list[dict], path: Path) -> None:
    """Quality against size: KL divergence to full precision over the bytes in memory."""
    with picture(path, columns=1, size=(7, 4)) as (axis,):
        for i, row in enumerate(row for row in rows if row["KL, nats"] > 1e-9):  # full precision is off a logarithmic axis
            look = dict(marker="os^vDPX*"[i % 8], color=f"C{i % 10}", linestyle="none", markersize=8, alpha=0.8)
            axis.plot(row["memory, MB"], row["KL, nats"], label=row["format"], **look)
        axis.set(xlabel="memory (MB)", ylabel="KL to full precision (nats per token)", yscale="log")
        axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
