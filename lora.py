"""LoRA: a frozen matrix with a small trained product beside it.

    y = W x + b + s B A x,     s = alpha / r,     A [r, I],  B [O, r],  r << O, I            (LoRA, Hu et al. 2021, eq. 3)

Tuning moves a matrix by little, and by a matrix of low rank (section 4.1 there): r = 16 holds an adapter of Phi-2's 2,560 x
10,240 matrices in 205 thousand values instead of 26 million. Only A and B have gradients and AdamW's moments, so what
training needs beside the weights shrinks a hundredfold; and since W never moves, it may be stored in int8 or 4 bits (QLoRA,
Dettmers et al. 2023, eq. 5):  y = dequantize(W) x + b + s B A x, with the gradient flowing through the dequantized W.

B starts at 0: before the first step the adapted model *is* the model that it starts from. A starts as PEFT starts it,
uniform in +-1/sqrt(I). With s = alpha / r the size of a first step does not depend on r.

Files and names are those of the PEFT library, which reads what is written here and the other way round. Nothing here knows
of Phi: it works on any nn.Linear, and on the quantized layers of quant.py.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import SKIP, FrozenLinear, Int8Linear, compute_dtype, quantize_layer
from runtime.files import InputError, read_json, whole_file, write_json
from runtime.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PREFIX = "base_model.model."  # of PEFT's tensor names: the model inside of its two wrappers


class LoraLinear(nn.Module):
    """y = base(x) + s B A x. The base is a linear layer, plain or quantized; A, B are fp32. `on` False: the base alone."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout, self.on = base, rank, alpha, dropout, True
        device = next(iter(base.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        y = self.base(x)
        if not self.on:
            return y
        if self.dropout and torch.is_grad_enabled():  # in training steps; never while something is measured
            x = F.dropout(x, self.dropout)
        x = x.to(compute_dtype(x))
        low = F.linear(x, self.lora_A.to(x.dtype)) * (self.alpha / self.rank)  # [..., r]
        return y + F.linear(low, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """s B A, what the adapter adds to the weight: fp32 [O, I]."""
        return self.alpha / self.rank * (self.lora_B.detach() @ self.lora_A.detach())


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def target_layers(model: nn.Module, targets: str) -> dict[str, nn.Module]:
    """The layers that `targets` names: "all-linear", which is all linear layers but the output layer, or last parts of their
    names, "q_proj,v_proj". InputError if one of them names no layer."""
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, FrozenLinear))}
    if targets == "all-linear":
        return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] not in SKIP}
    wanted = [part.strip() for part in targets.split(",") if part.strip()]
    known = sorted({name.rpartition(".")[2] for name in layers})
    for part in wanted:
        if part not in known:
            raise InputError(
                f"no layer is called {part!r}; there are {', '.join(known)}, or all-linear for all but {SKIP[0]}"
            )
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in wanted}


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, targets: str = "all-linear", dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Freezes a model and gives its `targets` (see `target_layers`) new adapters, in place; returns the model.

    alpha: s = alpha / rank; default the rank, s = 1. `seed` draws the A's.
    """
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, base in target_layers(model, targets).items():
        layer = LoraLinear(base, rank, float(alpha or rank), dropout)
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=draw)
        layer.lora_A.data.copy_(start)
        model.set_submodule(name, layer)
    return model


# ------------------------------------------------------------------------------------------------------ the two models


@contextlib.contextmanager
def starting_point(model: nn.Module, start: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model is the one that tuning started from, DPO's reference: its adapters are off, or, if they had been
    trained before, hold the values in `start`, {name: tensor} as `trained_before` returned them."""
    layers, parameters = lora_layers(model), dict(model.named_parameters())
    now = {name: parameters[name].data for name in start}
    for layer in layers.values():
        layer.on = bool(start)
    for name, value in start.items():
        parameters[name].data = value
    try:
        yield
    finally:
        for layer in layers.values():
            layer.on = True
        for name, value in now.items():
            parameters[name].data = value


def trained_before(model: nn.Module) -> dict[str, Tensor]:
    """Copies of A and B by parameter name; nothing if every B is 0, as in new adapters."""
    layers = lora_layers(model)
    if not any(layer.lora_B.any() for layer in layers.values()):
        return {}
    return {
        f"{name}.{p}": getattr(layer, p).detach().clone() for name, layer in layers.items() for p in ("lora_A", "lora_B")
    }


# ------------------------------------------------------------------------------------------------------ one plain model


@torch.no_grad()
def merge_lora(model: nn.Module) -> dict[str, LoraLinear]:
    """Replaces each adapted layer by one of its base's own kind that holds W + s B A, in place. Returns the layers as they
    were, from which `unmerge_lora` restores the model exactly.

    A quantized W is dequantized, added to, and quantized anew, which rounds once more: outputs change a little.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, _merged(layer))
    return layers


def unmerge_lora(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """The inverse of `merge_lora`, bit for bit: puts the adapted layers back."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def _merged(layer: LoraLinear) -> nn.Module:
    base = layer.base
    if isinstance(base, Int8Linear):
        return quantize_layer(base.dense() + layer.delta(), base.bias, "int8", threshold=base.threshold)
    if isinstance(base, FrozenLinear):
        q = base.quantized
        weight = (base.dense().float() + layer.delta()).to(q.dtype)
        return quantize_layer(weight, base.bias, q.code, q.block, q.nested_absmax is not None)
    merged = type(base)(base.in_features, base.out_features, base.bias is not None, device="meta")
    merged.weight = nn.Parameter((base.weight.float() + layer.delta()).to(base.weight.dtype))
    merged.bias = base.bias
    return merged


# ---------------------------------------------------------------------------------------------------------- PEFT's files


def save_lora(
    model: nn.Module, directory: Path, base: str, revision: str | None = None, base_format: str | None = None
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does; each file whole or not at all.

    base: directory or hub name of the model that the adapters belong to; base_format: the number format that it was
    quantized to on loading, which goes into base.json, since PEFT's config has no field for it.
    """
    layers = lora_layers(model)
    one = next(iter(layers.values()))
    tensors = {f"{PREFIX}{n}.{p}.weight": getattr(layer, p) for n, layer in layers.items() for p in ("lora_A", "lora_B")}
    with whole_file(directory / ADAPTER_WEIGHTS) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
    if base_format:
        write_json(directory / "base.json", {"format": base_format})
    else:  # an earlier save's would be taken for this one's
        (directory / "base.json").unlink(missing_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": one.rank,
        "lora_alpha": int(one.alpha) if one.alpha == int(one.alpha) else one.alpha,
        "lora_dropout": one.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, config)


# Settings of PEFT under which an adapter computes something else than y = W x + b + s B A x.
UNSUPPORTED = (
    "use_dora use_rslora use_qalora use_bdlora fan_in_fan_out modules_to_save rank_pattern alpha_pattern lora_bias "
    "target_parameters trainable_token_indices layer_replication alora_invocation_tokens arrow_config kasa_config "
    "monteclora_config velora_config"
).split()


def load_lora(model: nn.Module, directory: Path) -> nn.Module:
    """Gives a model the adapters of a directory in PEFT's format, in place, and freezes the rest; returns the model.

    InputError if they are not LoRA as computed here, or do not fit the model.
    """
    where, config = directory / ADAPTER_CONFIG, read_json(directory / ADAPTER_CONFIG)
    unsupported = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        raise InputError(
            f"{where}: not plain LoRA ({', '.join(unsupported) or config.get('peft_type')}), the one kind read here"
        )
    tensors = read_adapter(directory)
    model.requires_grad_(False)
    names = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    for name in names:
        try:
            base = model.get_submodule(name)
            if isinstance(base, LoraLinear):  # the same adapters with other values, as a resumed run has
                base = base.base
            A, B = (tensors.pop(f"{PREFIX}{name}.{part}.weight").float() for part in ("lora_A", "lora_B"))
        except (AttributeError, KeyError) as error:
            raise InputError(f"{directory / ADAPTER_WEIGHTS}: {name}: no such layer, or half an adapter ({error})") from None
        if A.shape != (config["r"], base.in_features) or B.shape != (base.out_features, config["r"]):
            raise InputError(
                f"{directory / ADAPTER_WEIGHTS}: {name}: A {list(A.shape)}, B {list(B.shape)} do not fit rank {config['r']} "
                f"and a layer of {base.in_features} inputs and {base.out_features} outputs"
            )
        layer = LoraLinear(base, config["r"], float(config["lora_alpha"]), float(config.get("lora_dropout") or 0))
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
        model.set_submodule(name, layer)
    if tensors or not names:
        raise InputError(f"{directory / ADAPTER_WEIGHTS}: unexpected tensors or none at all: {sorted(tensors)[:3]}")
    return model


def read_adapter(directory: Path) -> dict[str, Tensor]:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: no such file; PEFT's older adapter_model.bin is a pickle, which is never read")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def base_format(directory: Path) -> str | None:
    """The number format that the base of a directory's adapters was quantized to on loading; None if it was not."""
    path = directory / "base.json"
    return read_json(path)["format"] if path.exists() else None
