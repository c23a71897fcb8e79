"""A checkpoint in, a quantized checkpoint out: one tensor in memory at a time, one shard at a time on disk.

What comes out has bitsandbytes' names and layout (coded.py), so that int8, NF4 and FP4 load in transformers too.
"""

import shutil
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model import Phi, PhiConfig
from quant import linear_layers, quantize_layer
from runtime.coded import checkpoint_config, layer_tensors
from runtime.files import InputError, read_json, whole_file, write_json
from runtime.weights import INDEX, modern_tensors, stored_tensors


@torch.no_grad()
def quantize_checkpoint(source: Path, target: Path, to: str, skip: tuple[str, ...], device: str = "cpu", **options) -> dict:
    """Writes the checkpoint in `source` to `target` with its linear layers, but `skip`, in the format `to`.

    `options` are those of `quant.quantize_layer`: block, double, threshold, compiled. Everything else keeps its dtype. Peak
    memory: one output shard and some copies of the largest matrix. config.json comes last, so that a conversion that was
    interrupted does not load. Returns what it did: bytes before and after, weights quantized, seconds, and errors by layer.
    """
    raw = read_json(source / "config.json")
    if "quantization_config" in raw:
        raise InputError(f"{source} is quantized already; start from the model that it was made of")
    with torch.device("meta"):
        model = Phi(PhiConfig.from_dict(raw, f"{source}/config.json"))
    names = {f"{name}.weight" for name, _ in linear_layers(model, skip)}
    plain = [name for name, _ in linear_layers(model, ()) if f"{name}.weight" not in names]
    done = {"bytes before": 0, "bytes after": 0, "weights": 0, "bytes of weights": 0, "seconds": 0.0, "errors": {}}
    shards: dict[Path, list[str]] = {}
    for shard, name in stored_tensors(source):
        shards.setdefault(shard, []).append(name)

    weight_map, config, dtype = {}, None, None
    with tqdm(total=len(names), desc=f"quantizing to {to}", unit="layer", disable=None) as bar:
        for shard, stored in shards.items():
            tensors: dict[str, Tensor] = {}
            for name in stored:
                with safe_open(shard, framework="pt") as file:
                    loaded = modern_tensors(name, file.get_tensor(name))
                for new_name, tensor in loaded:
                    done["bytes before"] += tensor.nbytes
                    if new_name not in names:
                        tensors[new_name], dtype = tensor.clone(), tensor.dtype  # a view would keep the file mapped
                        continue
                    names.remove(new_name)
                    layer, parts = _quantize(shard, new_name, tensor.to(device), to, options, done)
                    tensors |= parts
                    config = config or checkpoint_config(layer, plain, tensor.dtype)
                    bar.update()
            with whole_file(target / shard.name) as temporary:
                save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard.name)
            done["bytes after"] += sum(t.nbytes for t in tensors.values())
    if names:
        raise InputError(f"{source}: {len(names)} tensors are missing, the first {sorted(names)[0]!r}")
    if len(shards) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": done["bytes after"]}, "weight_map": weight_map})
    for file in [*source.glob("tokenizer*.json"), *source.glob("special_tokens_map.json")]:
        shutil.copyfile(file, target / file.name)
    own = {"torch_dtype": str(dtype).removeprefix("torch."), "quantization_config": config}
    write_json(target / "config.json", {**model.config.to_dict(), **own})
    return done


def _quantize(shard: Path, name: str, weight: Tensor, to: str, options: dict, done: dict):
    """The quantized layer of one matrix and its tensors by their names on disk; adds to the account in `done`."""
    began = time.perf_counter()
    try:
        layer = quantize_layer(weight, None, to, **options)
    except InputError as error:
        raise InputError(f"{shard}: {name} {error}") from None
    done["seconds"] += time.perf_counter() - began
    tensors = {name.removesuffix("weight") + part: tensor.cpu() for part, tensor in layer_tensors(layer).items()}
    done["weights"] += weight.numel()
    done["bytes of weights"] += sum(tensor.nbytes for tensor in tensors.values())
    error = (layer.dense().float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-38)
    done["errors"][name] = error.item()
    return layer, tensors
