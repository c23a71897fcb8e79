"""A checkpoint in, another one out: --stage quantize and --stage merge.

    python train.py --stage quantize --model DIR --to nf4     4.5 bits a weight, in the layout of bitsandbytes
    python train.py --stage merge --model DIR                 adapters and the model under them as one plain model

int8, NF4 and FP4 load in transformers too.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from data import Example
from lora import base_directory, is_adapter, merge_lora, refuse_adapters
from metrics.text import divergence
from model import Phi, read_config
from prepare.rows import encode_for, rows_to_measure
from quant import FrozenLinear
from runtime import weights
from runtime.files import InputError, first_line, printable, read_json, write_json
from runtime.runs import CHAT_FILES, load_chat, open_run, training_run
from runtime.settings import Merge, Quantize


def run(settings: Quantize | Merge) -> int:
    """--stage quantize or merge; returns the exit status."""
    source = weights.resolve(settings.model, settings.revision)
    target = Path(settings.out) / settings.name
    if settings.stage == "quantize":
        refuse_adapters(source)
    else:
        examples = rows_to_compare(source, settings.data)
    with open_run(settings):
        if settings.stage == "quantize":
            print(printable(f"Quantizing {source} to {settings.to} ..."), flush=True)
            did = quantize_checkpoint(source, target, settings.to, settings.block, settings.device)
            print(quantized_summary(target, settings.to, did))
        else:
            did = {"change": merge_checkpoint(source, target, settings.device, examples)}
            print(printable(merged_summary(source, target, did["change"], len(examples))))
        write_json(target / "results.json", {"parent": str(source), **did})
    return 0


@torch.no_grad()
def quantize_checkpoint(source: Path, target: Path, to: str, block: int = 64, device: str = "cpu") -> dict:
    """Writes the checkpoint in `source` to `target` with its linear layers, but the output layer, in the number format `to`;
    everything else keeps its dtype. Layers are quantized as they are read: memory holds the new model and one old matrix.

    Returns what was done: bytes of the files before and after, weights quantized and their bytes, and each matrix's relative
    error |w~ - w| / |w|.
    """
    if weights.is_quantized(source):
        raise InputError(f"{source} is quantized already; start from the model that it was made of")
    with torch.device("meta"):
        model = Phi(read_config(source))
    weights.load_weights(model, source, stored_dtype(source), device, to, block)
    stored = weights.stored_tensors(source)
    did = {"weights": 0, "bytes of weights": 0, "errors": {}}
    for name, layer in model.named_modules():
        if not isinstance(layer, FrozenLinear):
            continue
        weight = stored[f"{name}.weight"].read(device, torch.float32)
        did["errors"][name] = ((layer.dense() - weight).norm() / weight.norm().clamp(min=1e-38)).item()
        did["weights"] += weight.numel()
        did["bytes of weights"] += sum(x.nbytes for part, x in weights.layer_tensors(layer).items() if part != "bias")

    model.save_pretrained(target)
    for pattern in CHAT_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (source, target)]
    return {"bytes before": sizes[0], "bytes after": sizes[1], **did}


def merge_checkpoint(source: Path, target: Path, device: str, examples: Sequence[Example]) -> dict[str, float] | None:
    """Writes the adapters in `source` and the model under them as one plain model to `target`. Returns how far its outputs
    on the examples are from those of the adapters beside their base (`divergence`), None without examples."""
    dtype = stored_dtype(base_directory(source))
    model = Phi.from_pretrained(source, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, device)
    merged = merge_lora(copy.deepcopy(model))
    change = divergence(model, merged, examples, 8, device) if examples else None
    merged.save_pretrained(target)
    load_chat(source).save(target)
    return change


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a checkpoint's tensors but the quantized ones, whatever its config says; fp32 if there are several."""
    stored = weights.stored_tensors(directory)
    coded = tuple(f"{layer}." for layer in weights.quantized_layers(stored))
    kinds = {tensor.dtype for name, tensor in stored.items() if not name.startswith(coded)}
    return weights.DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def rows_to_compare(source: Path, data: str | None) -> list[Example]:
    """100 rows of `data` or of those that the run of the adapters held out; none if there are none that can be read."""
    if not is_adapter(source):
        raise InputError(f"{source} holds no adapters; there is nothing to merge")
    run = training_run(source)
    if not (data or (run and (run / "held_out.jsonl").exists())):
        return []
    try:
        return encode_for(source, rows_to_measure(data, source).rows[:100])[1]
    except InputError as error:
        if data:
            raise
        print(printable(f"The rows that {run} held out cannot be used: {first_line(error)}"))
        return []  # merging needs none


def quantized_summary(target: Path, to: str, did: dict) -> str:
    worst = sorted(did["errors"].items(), key=lambda item: -item[1])[:3]
    mean = sum(did["errors"].values()) / len(did["errors"])
    theirs = read_json(target / "config.json")["quantization_config"]["quant_method"] == "bitsandbytes"
    note = "" if theirs else f" {to} in this form is this project's own: transformers does not read it."
    sizes = f"{did['bytes before'] / 1e6:,.1f} MB -> {did['bytes after'] / 1e6:,.1f} MB"
    errors = f"mean {mean:.4f}, largest " + ", ".join(f"{error:.4f} ({name})" for name, error in worst)
    return (
        f"{sizes}; {did['weights']:,} weights at {8 * did['bytes of weights'] / did['weights']:.2f} bits\n"
        f"relative error |w~ - w| / |w|: {errors}\n"
        f"Written to {target}/; load it as any other model: its config.json says how it is stored.{note}"
    )


def merged_summary(source: Path, target: Path, change: dict | None, count: int) -> str:
    told = "Give --data FILE.jsonl to see how far the merged model's outputs moved."
    if change:
        told = f"Outputs against those of the adapters beside their base, on {count} examples: KL {change['kl']:.2g} nats"
        told += f" per token, the same likeliest token in {100 * change['top 1']:.2f}%"
    return f"{told}\nWritten to {target}/, one plain model from {source}"
