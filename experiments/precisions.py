"""The precision report card: one model in several number formats, what each costs in bytes and time and in quality.

    python train.py --stage eval --model out/demo-dpo --precisions fp32,bf16,int8,nf4,nf4-double,fp4,int4

Every format is made here from the same full-precision weights, and compared with them on the same held-out rows. Layers
that are not quantized (embeddings, LayerNorms, output layer) stay fp32 in every row but bf16, so that a row differs from
the first one by its format alone.
"""

import statistics
import tempfile
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
from metrics.preferences import flips, for_the_right
from metrics.tables import markdown
from metrics.text import divergence
from model import Phi, all_logprobs
from prepare.rows import encode_for, rows_to_measure
from quant import FrozenLinear, quantize_model
from runtime import runs
from runtime.files import InputError, picture, write_json, write_text
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
    runs.open_run(settings)
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
    print(f"\n{table(rows)}\n\n{note}\nWritten to {directory}/: eval.json, precisions.md, figures/precisions.png")
    return 0


def in_format(name: str, model: Phi) -> Phi:
    """The model in the format of a row: "nf4", "nf4-double", "llm.int8", "bf16", ... Changes the model that is given."""
    if name in ("fp32", "bf16"):
        return model.to(torch.float32 if name == "fp32" else torch.bfloat16)
    return quantize_model(model, name)


def measure_format(
    name: str, source: Path, full: Phi, chat: ChatML, examples: list[Example], reference: Tensor | None, device: str
) -> dict:
    """A row of the card: the model of `source` in one format, compared with the `full` one."""
    model = Phi.from_pretrained(source, device=device)
    began = time.perf_counter()
    model = in_format(name, model)
    seconds = time.perf_counter() - began
    row = {"format": name, **sizes(model), "quantize s": None if name in ("fp32", "bf16") else seconds}
    likely = [replace(e, completions=e.completions[:1]) for e in examples]  # of a pair, the chosen answer
    measured = divergence(full, model, likely, BATCH, device)
    row |= {"perplexity": torch.tensor(measured["loss"]).exp().item(), "KL": measured["kl"], "top 1": measured["top 1"]}
    row |= {"reward accuracy": None, "choice accuracy": None}
    if reference is not None:
        policy = all_logprobs(model, examples, BATCH, device, "fp32", "rewards")
        margin = for_the_right(dpo.margin(policy, reference), flips(examples))  # [E]
        row["reward accuracy"] = (margin > 0).float().mean().item()
    if all(e.choices for e in examples):
        choices = score_options(model, examples, chat, BATCH, device, "fp32")
        row["choice accuracy"] = accuracies(choices)["letter"].value
    prompts = [e.prompt for e in examples[:16]]
    return row | {f"tokens/s, batch {n}": decode_speed(model, (prompts * n)[:n]) for n in (1, 16)}


def sizes(model: Phi) -> dict[str, float]:
    """Bytes of the safetensors files and in memory, and bits per weight of the linear layers (scales included)."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        disk = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    stored = weights = 0
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            stored += sum(buffer.nbytes for buffer in layer.buffers())
            weights += layer.in_features * layer.out_features
        elif isinstance(layer, torch.nn.Linear) and name != "lm_head":
            stored += layer.weight.nbytes
            weights += layer.weight.numel()
    return {"disk": disk, "memory": memory, "bits per weight": 8 * stored / weights}


def decode_speed(model: Phi, prompts: list[list[int]], repeats: int = 3) -> float:
    """New tokens per second of greedy decoding, the median of `repeats` after one run that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        generate(model, prompts, NEW_TOKENS)  # ends with the tokens on the CPU, so a GPU's work is done
        seconds.append(time.perf_counter() - began)
    return len(prompts) * NEW_TOKENS / statistics.median(seconds[1:])


COLUMNS = {  # heading: (key, how a value is shown)
    "format": ("format", str),
    "disk, MB": ("disk", lambda v: f"{v / 1e6:,.2f}"),
    "memory, MB": ("memory", lambda v: f"{v / 1e6:,.2f}"),
    "bits per weight": ("bits per weight", lambda v: f"{v:.2f}"),
    "quantize, s": ("quantize s", lambda v: f"{v:.2f}"),
    "perplexity": ("perplexity", lambda v: f"{v:.4f}"),
    "KL, nats": ("KL", lambda v: f"{v:.2g}"),
    "same top 1": ("top 1", lambda v: f"{100 * v:.2f}%"),
    "reward accuracy": ("reward accuracy", lambda v: f"{100 * v:.1f}%"),
    "right option": ("choice accuracy", lambda v: f"{100 * v:.1f}%"),
    "tokens/s, 1": ("tokens/s, batch 1", lambda v: f"{v:,.0f}"),
    "tokens/s, 16": ("tokens/s, batch 16", lambda v: f"{v:,.0f}"),
}


def table(rows: list[dict]) -> str:
    """The card as a table; a column without any value is left out."""
    columns = {heading: (key, show) for heading, (key, show) in COLUMNS.items() if any(row[key] is not None for row in rows)}
    cells = [["-" if row[key] is None else show(row[key]) for key, show in columns.values()] for row in rows]
    return markdown(list(columns), cells)


def figure(rows: list[dict], path: Path) -> None:
    """Quality against size: KL divergence to full precision, and perplexity, over the size on disk."""
    with picture(path, columns=2, size=(12, 4)) as (kl, perplexity):
        for i, row in enumerate(rows):
            look = dict(marker="os^vDPX*<>hdp8"[i % 14], color=f"C{i % 10}", linestyle="none", markersize=8, alpha=0.8)
            perplexity.plot(row["disk"] / 1e6, row["perplexity"], label=row["format"], **look)
            if row["KL"] > 1e-9:  # full precision itself has no place on a logarithmic axis
                kl.plot(row["disk"] / 1e6, row["KL"], **look)
        kl.set(xlabel="size on disk (MB)", ylabel="KL to full precision (nats per token)", yscale="log")
        perplexity.set(xlabel="size on disk (MB)", ylabel="perplexity of held-out answers")
        perplexity.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
