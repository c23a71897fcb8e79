"""Quantized layers on disk, by the names and layout of bitsandbytes.

    nf4, fp4    weight uint8 [n/2, 1], weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (JSON in bytes);
                with double quantization also weight.nested_absmax and weight.nested_quant_map
    int8        weight int8 [O, I], SCB fp32 [O], weight_format (0: rows as they are)
    others      as nf4, but weight.quant_state.blockwise__int4: this project's own, which bitsandbytes does not know

and a `quantization_config` in config.json, from which transformers and `Phi.from_pretrained` tell what they have.
"""

import json
import math

import torch
import torch.nn as nn
from torch import Tensor

from levels import CODES, bits, levels, packed_bytes
from quant import FrozenLinear, Int8Linear, Linear4bit, Quantized
from runtime.files import InputError

BITSANDBYTES = ("nf4", "fp4")  # codes, and
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # blocks, that bitsandbytes knows


def layer_tensors(layer: FrozenLinear) -> dict[str, Tensor]:
    """A layer's tensors by their names on disk."""
    bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
    if isinstance(layer, Int8Linear):
        return {"weight": layer.weight, "SCB": layer.SCB, "weight_format": torch.zeros((), dtype=torch.uint8), **bias}
    return to_tensors(layer.quantized) | bias


def to_tensors(q: Quantized) -> dict[str, Tensor]:
    """A quantized matrix by its names on disk; what is not a tensor is JSON in bytes."""
    state = {"quant_type": q.code, "blocksize": q.block, "dtype": _name(q.dtype), "shape": list(q.shape)}
    tensors = {"weight": q.packed, "weight.absmax": q.absmax, "weight.quant_map": levels(q.code, q.packed.device).clone()}
    if q.low is not None:
        tensors["weight.low"] = q.low
    if q.nested_absmax is not None:
        tensors["weight.nested_absmax"] = q.nested_absmax
        tensors["weight.nested_quant_map"] = levels("dynamic8", q.packed.device).clone()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    family = "bitsandbytes" if q.code in BITSANDBYTES else "blockwise"
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.{family}__{q.code}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `to_tensors`; InputError if something is missing, unknown, or does not fit the rest."""
    tensors = dict(tensors)
    try:
        (key,) = [name for name in tensors if name.startswith("weight.quant_state.")]
        state = json.loads(bytes(tensors.pop(key).tolist()))
        code, block, shape, dtype = state["quant_type"], state["blocksize"], state["shape"], getattr(torch, state["dtype"])
        packed, absmax, table = (tensors.pop(name) for name in ("weight", "weight.absmax", "weight.quant_map"))
        low, nested = tensors.pop("weight.low", None), tensors.pop("weight.nested_absmax", None)
        if nested is not None:
            offset = torch.tensor(float(state["nested_offset"]), device=packed.device)
            known = state["nested_blocksize"] == 256 and _is_table(tensors.pop("weight.nested_quant_map"), "dynamic8")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"its quantized weight is incomplete or damaged ({error!r})") from None
    if code not in CODES or not _is_table(table, code):
        raise InputError(f"weight.quant_map is not the table of {code!r}")
    if nested is not None and not known:
        raise InputError("its scales are quantized otherwise than in blocks of 256 with the dynamic map")
    if nested is not None and len(nested) != math.ceil(len(absmax) / 256):
        raise InputError(f"its quantized weight is incomplete or damaged: {len(nested)} scales for {len(absmax)} scales")
    n = math.prod(shape)
    if tensors or block < 1 or packed.nbytes != packed_bytes(n, bits(code)) or len(absmax) != math.ceil(n / block):
        found = f"{packed.nbytes} bytes of codes, {len(absmax)} scales" + (f", {sorted(tensors)}" if tensors else "")
        raise InputError(f"its quantized weight is incomplete or damaged: {found} for {n} values in blocks of {block}")
    packed = packed.contiguous().view(torch.uint8).reshape(-1, 1)
    if nested is None:
        return Quantized(packed, absmax.float(), code, block, tuple(shape), dtype, low)
    return Quantized(packed, absmax, code, block, tuple(shape), dtype, None, nested, offset)


def _is_table(table: Tensor, code: str) -> bool:
    return torch.equal(table.cpu(), levels(code))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def coded_layers(names: list[str]) -> set[str]:
    """The layers of a checkpoint that are stored quantized, told by the names of their tensors."""
    blockwise = {name.partition(".weight.quant_state.")[0] for name in names if ".weight.quant_state." in name}
    return blockwise | {name.removesuffix(".SCB") for name in names if name.endswith(".SCB")}


def layer_from_tensors(tensors: dict[str, Tensor], plain: nn.Linear, config: dict) -> FrozenLinear:
    """The quantized layer to put in the place of `plain`, with its bias: from its tensors on disk, by their names from
    "weight" on, and the checkpoint's `quantization_config`."""
    if "SCB" in tensors:
        codes, scale = tensors.get("weight", torch.empty(0)), tensors["SCB"].float()
        if codes.dtype != torch.int8 or tensors.get("weight_format", torch.zeros(())).item() != 0:
            raise InputError("its int8 weight is not in bitsandbytes' row format, the only one that is read")
        if set(tensors) - {"weight", "SCB", "weight_format"} or codes.shape[:1] != scale.shape:
            raise InputError(
                f"its int8 weight is damaged: {sorted(tensors)}, {len(scale)} scales for {list(codes.shape)} codes"
            )
        threshold = None if config.get("weight_only") else config.get("llm_int8_threshold", 6.0)
        layer = Int8Linear(codes, scale, plain.bias, threshold)
    else:
        layer = Linear4bit(from_tensors(tensors), plain.bias)
    shape, expected = (layer.out_features, layer.in_features), (plain.out_features, plain.in_features)
    if shape != expected:
        raise InputError(f"it holds a matrix of {list(shape)}, the config needs {list(expected)}")
    return layer


def checkpoint_config(layer: FrozenLinear, skip: list[str], dtype: torch.dtype) -> dict:
    """The `quantization_config` of a checkpoint's config.json, from one of its layers, the names of the layers that are not
    quantized, and the dtype of the rest. transformers reads it if bitsandbytes knows the format."""
    if isinstance(layer, Int8Linear):
        # bitsandbytes always rounds the activations too; "weight_only" is for us.
        threshold = 6.0 if layer.threshold is None else layer.threshold
        own = {"load_in_8bit": True, "llm_int8_threshold": threshold, "weight_only": layer.threshold is None}
        return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skip, **own}
    q = layer.quantized
    if q.code not in BITSANDBYTES or q.block not in BLOCKS:
        note = "this project's own format; bitsandbytes has none for it"
        return {"quant_method": "blockwise", "code": q.code, "block": q.block, "note": note}
    return {
        "quant_method": "bitsandbytes",
        "llm_int8_skip_modules": skip,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": q.code,
        "bnb_4bit_use_double_quant": q.nested_absmax is not None,
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
    }
