"""A checkpoint in, another one out: --stage quantize and --stage merge.

    python train.py --stage quantize --model DIR --to nf4     a quarter of the size, in the layout of bitsandbytes
    python train.py --stage merge --model DIR                 adapters and the model under them as one plain model

int8, NF4 and FP4 load in transformers too.
"""

import copy
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Example
from lora import is_adapter, merge_lora, refuse_adapters
from metrics.text import divergence
from model import Phi, PhiConfig, read_config
from prepare.rows import encode_for, rows_to_measure
from quant import SKIP, linear_layers, quantize_layer
from runtime import weights
from runtime.files import InputError, read_json, write_json
from runtime.runs import load_chat, open_run, save_chat, training_run
from runtime.settings import Merge, Quantize


def run(settings: Quantize | Merge) -> int:
    """--stage quantize or merge; returns the exit status."""
    source = weights.resolve(settings.model, settings.revision)
    target = Path(settings.out) / settings.name
    if settings.stage == "quantize":
        refuse_adapters(source)
        open_run(settings)
        did = quantize_checkpoint(source, target, settings.to, settings.block, settings.device)
        print(quantized_summary(target, settings.to, did))
    else:
        examples = rows_to_compare(source, settings.data)
        open_run(settings)
        did = {"change": merge_checkpoint(source, target, settings.device, examples)}
        print(merged_summary(source, target, did["change"], len(examples)))
    write_json(target / "results.json", {"parent": str(source), **did})
    return 0


@torch.no_grad()
def quantize_checkpoint(source: Path, target: Path, to: str, block: int = 64, device: str = "cpu") -> dict:
    """Writes the checkpoint in `source` to `target` with its linear layers, but the output layer, in the number format `to`.
    Everything else keeps its dtype. Memory holds the new checkpoint and some copies of the largest matrix.

    config.json comes last, so a conversion that was interrupted does not load. Returns what was done: bytes before and
    after, weights quantized and their bytes, seconds, and each matrix's relative error |w~ - w| / |w|.
    """
    if weights.is_quantized(source):
        raise InputError(f"{source} is quantized already; start from the model that it was made of")
    with torch.device("meta"):
        model = Phi(read_config(source))
    stored = weights.stored_tensors(source)
    weights.check_stored(stored, dict(model.named_parameters()), source)
    to_quantize = {f"{name}.weight" for name, _ in linear_layers(model, SKIP)}
    plain = [name for name, _ in linear_layers(model, ()) if f"{name}.weight" not in to_quantize]
    did = {"bytes before": 0, "bytes after": 0, "weights": 0, "bytes of weights": 0, "seconds": 0.0, "errors": {}}
    tensors: dict[str, Tensor] = {}

    for name, tensor in tqdm(stored.items(), desc=f"quantizing to {to}", unit="tensor", disable=None):
        weight = tensor.read()
        did["bytes before"] += weight.nbytes
        parts = {name: weight}
        if name in to_quantize:
            began = time.perf_counter()
            weight = weight.to(device)
            layer = quantize_layer(weight, None, to, block, f"{tensor.file}: {name}")
            did["seconds"] += time.perf_counter() - began
            error = (layer.dense().float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-38)
            did["errors"][name] = error.item()
            config = weights.stored_config(model.config.to_dict(), weight.dtype, layer, plain)
            parts = {name.removesuffix("weight") + part: x.cpu() for part, x in weights.layer_tensors(layer).items()}
            did["weights"] += weight.numel()
            did["bytes of weights"] += sum(x.nbytes for x in parts.values())
        tensors |= parts

    did["bytes after"] = sum(x.nbytes for x in tensors.values())
    weights.save_tensors(target, tensors)
    for file in (*source.glob("tokenizer*.json"), *source.glob("special_tokens_map.json")):
        shutil.copyfile(file, target / file.name)
    write_json(target / "config.json", config)
    return did


def merge_checkpoint(source: Path, target: Path, device: str, examples: Sequence[Example]) -> dict[str, float] | None:
    """Writes the adapters in `source` and the model under them as one plain model to `target`. Returns how far its outputs
    on the examples are from those of the adapters beside their base (`divergence`), None without examples."""
    dtype = torch.bfloat16 if stored_dtype(read_config(source)) == "bfloat16" else torch.float32
    model = Phi.from_pretrained(source, dtype, device)
    merged = merge_lora(copy.deepcopy(model))
    change = divergence(model, merged, examples, 8, device) if examples else None
    merged.save_pretrained(target)
    save_chat(target, load_chat(source))
    return change


def stored_dtype(config: PhiConfig) -> str:
    return config.other.get("dtype") or config.other.get("torch_dtype") or "float32"


def rows_to_compare(source: Path, data: str | None) -> list[Example]:
    """100 rows of `data` or of those that the run of the adapters held out; none if there is neither."""
    if not is_adapter(source):
        raise InputError(f"{source} holds no adapters; there is nothing to merge")
    run = training_run(source)
    found = data or (run and (run / "held_out.jsonl").exists())
    return encode_for(source, rows_to_measure(data, source).rows[:100])[1] if found else []


def quantized_summary(target: Path, to: str, did: dict) -> str:
    worst = sorted(did["errors"].items(), key=lambda item: -item[1])[:3]
    mean = sum(did["errors"].values()) / len(did["errors"])
    theirs = read_json(target / "config.json")["quantization_config"]["quant_method"] == "bitsandbytes"
    note = "" if theirs else f" {to} in this form is this project's own: transformers does not read it."
    sizes = f"{did['bytes before'] / 1e6:,.1f} MB -> {did['bytes after'] / 1e6:,.1f} MB, in {did['seconds']:.1f} s"
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
