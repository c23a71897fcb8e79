"""A checkpoint in, another one out: --stage quantize and --stage merge.

    python train.py --stage quantize --model DIR --to nf4     4.5 bits a weight, in the layout of bitsandbytes
    python train.py --stage merge --model DIR                 adapters and the model under them as one plain model

int8, NF4 and FP4 load in transformers too.
"""

import shutil
from pathlib import Path

import torch

from lora import base_directory, is_adapter, merge_lora, refuse_adapters
from metrics.precisions import sizes
from model import Phi, read_config
from publish.card import write_card
from runtime import weights
from runtime.files import InputError, printable, read_json, write_json
from runtime.runs import CHAT_FILES, load_chat, open_run
from runtime.settings import Merge, Quantize


def run(settings: Quantize | Merge) -> int:
    """--stage quantize or merge; returns the exit status."""
    source = weights.resolve(settings.model, settings.revision)
    target = Path(settings.out) / settings.name
    if settings.stage == "quantize":
        refuse_adapters(source)
    elif not is_adapter(source):
        raise InputError(f"{source} holds no adapters; there is nothing to merge")
    did = {}
    with open_run(settings):
        if settings.stage == "quantize":
            print(printable(f"Quantizing {source} to {settings.to} ..."), flush=True)
            did = quantize_checkpoint(source, target, settings.to, settings.block, settings.device)
            print(quantized_summary(target, settings.to, did))
        else:
            merge_checkpoint(source, target, settings.device)
            print(printable(f"Written to {target}/, one plain model from {source}"))
        write_json(target / "results.json", {"parent": str(source), **did})
        write_card(target)
    return 0


@torch.no_grad()
def quantize_checkpoint(source: Path, target: Path, to: str, block: int = 64, device: str = "cpu") -> dict:
    """Writes the checkpoint in `source` to `target` with its linear layers, but the output layer, in the number format `to`;
    everything else keeps its dtype. Layers are quantized as they are read: memory holds the new model and one old matrix.
    Returns bytes of the files before and after, and the bits of a weight, scales included (the file also has each layer's
    table of levels and its settings, about 0.3 bits a weight of the demo's small layers)."""
    if weights.is_quantized(source):
        raise InputError(f"{source} is quantized already; start from the model that it was made of")
    with torch.device("meta"):
        model = Phi(read_config(source))
    weights.load_weights(model, source, stored_dtype(source), device, to, block)
    model.save_pretrained(target)
    for pattern in CHAT_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    before, after = (sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (source, target))
    return {"bytes before": before, "bytes after": after, "bits per weight": sizes(model)["bits per weight"]}


def merge_checkpoint(source: Path, target: Path, device: str) -> None:
    """Writes the adapters in `source` and the model under them as one plain model to `target`."""
    dtype = stored_dtype(base_directory(source))
    model = Phi.from_pretrained(source, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, device)
    merge_lora(model).save_pretrained(target)
    load_chat(source).save(target)


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a checkpoint's tensors but the quantized ones, whatever its config says; fp32 if there are several."""
    stored = weights.stored_tensors(directory)
    coded = tuple(f"{layer}." for layer in weights.quantized_layers(stored))
    kinds = {tensor.dtype for name, tensor in stored.items() if not name.startswith(coded)}
    return weights.DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def quantized_summary(target: Path, to: str, did: dict) -> str:
    theirs = read_json(target / "config.json")["quantization_config"]["quant_method"] == "bitsandbytes"
    note = "" if theirs else f" {to} in this form is this project's own: transformers does not read it."
    files = f"{did['bytes before'] / 1e6:,.1f} MB -> {did['bytes after'] / 1e6:,.1f} MB"
    return (
        f"{files}; {did['bits per weight']:.2f} bits a weight, scales included\n"
        f"Written to {target}/; load it as any other model: its config.json says how it is stored.{note}"
    )
