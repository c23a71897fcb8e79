"""LoRA: a frozen matrix with a small trained product beside it.

    y = W x + b + s B A x,     s = alpha / r,     A [r, I],  B [O, r],  r << O, I            (LoRA, Hu et al. 2021, eq. 3)

Tuning changes a matrix by little, and by a matrix of low rank (section 4.1 there): for a 2,560 x 10,240 matrix of Phi-2,
A and B of rank 16 hold 205 thousand values instead of 26 million. Only they have gradients and AdamW's moments. W never
changes, so it may be stored in int8 or 4 bits (QLoRA, Dettmers et al. 2023, eq. 5):  y = dequantize(W) x + b + s B A x.

B starts at 0: before the first step the adapted model *is* the model that it starts from. A starts as in PEFT, uniform in
+-1/sqrt(I). With s = alpha / r the size of a first step does not depend on r.

Files and names are those of the PEFT library; each reads what the other writes. Nothing here knows of Phi: it works on any
nn.Linear and on the quantized layers of quant.py.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from quant import SKIP, FrozenLinear, compute_dtype
from runtime.files import InputError, read_json, whole_file, write_json
from runtime.weights import read_header, resolve

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them
BASE_FORMAT = "base.json"
PREFIX = "base_model.model."  # of PEFT's tensor names: the model inside of its two wrappers


class LoraLinear(nn.Module):
    """y = base(x) + s B A x. The base is a linear layer, plain or quantized; A and B are fp32. In training mode, which a new
    layer takes over from its base, dropout drops inputs of the adapter."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        device = next(iter(base.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        y = self.base(x)
        x = F.dropout(x, self.dropout, self.training).to(compute_dtype(x))
        low = F.linear(x, self.lora_A.to(x.dtype)) * (self.alpha / self.rank)  # [..., r]
        return y + F.linear(low, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """s B A, what the adapter adds to the weight: fp32 [O, I]."""
        return self.alpha / self.rank * (self.lora_B.detach() @ self.lora_A.detach())


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, targets: str = "all-linear", dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Freezes a model and gives new adapters, in place, to the linear layers that `targets` names: "all-linear" for all but
    the output layer, or last parts of their names, "q_proj,v_proj"; returns the model. InputError if a name fits no layer.

    alpha: s = alpha / rank; default the rank, s = 1. `seed` draws the A's.
    """
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, FrozenLinear))}
    known = {name.rpartition(".")[2] for name in layers} - set(SKIP)
    wanted = known if targets == "all-linear" else {part.strip() for part in targets.split(",") if part.strip()}
    for part in sorted(wanted - known):
        raise InputError(f"no layer is called {part!r}; there are {', '.join(sorted(known))}, or all-linear for all of them")
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, base in layers.items():
        if name.rpartition(".")[2] in wanted:
            layer = LoraLinear(base, rank, float(alpha or rank), dropout)
            bound = 1 / math.sqrt(base.in_features)
            layer.lora_A.data.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=draw))
            model.set_submodule(name, layer)
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Replaces each adapted layer, in place, by one of its base's kind that holds W + s B A; returns the model. A quantized
    W is dequantized, added to, and quantized anew, which rounds once more: outputs change a little."""
    for name, layer in lora_layers(model).items():
        merged = layer.base
        if isinstance(merged, FrozenLinear):
            merged = merged.with_weight(merged.dense().float() + layer.delta())
        else:
            merged.weight = nn.Parameter((merged.weight.float() + layer.delta()).to(merged.weight.dtype))
        model.set_submodule(name, merged)
    return model


@dataclass(frozen=True)
class Origin:
    """Where a model's weights came from: what adapters must say of the model that they belong to."""

    name: str  # a directory or a hub name
    revision: str | None  # of the hub
    format: str | None  # the number format that the weights were quantized to on reading
    directory: Path = field(compare=False)  # of the whole model on this machine
    adapters: Path | None = field(default=None, compare=False)  # of the adapters that came with it


def is_adapter(directory: Path) -> bool:  # rather than a whole model
    return (directory / ADAPTER_CONFIG).exists() and not (directory / "config.json").exists()


def base_directory(directory: Path) -> Path:
    """The directory itself or, if it holds adapters, that of the model under them."""
    return find_origin(directory).directory


def refuse_adapters(directory: Path) -> None:
    """InputError if a directory holds adapters where a whole model is needed."""
    if is_adapter(directory):
        raise InputError(f"{directory} holds adapters; merge them first: python train.py --stage merge --model {directory}")


def find_origin(directory: Path, to: str | None = None) -> Origin:
    """The model in a directory or under its adapters. `to`: the format to quantize it to (adapters: default as trained)."""
    if not is_adapter(directory):
        return Origin(str(directory.resolve()), None, to, directory)
    where = directory / ADAPTER_CONFIG
    config = read_json(where)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise InputError(f"{where}: base_model_name_or_path is missing: whose adapters are these?")
    if to is None and (directory / BASE_FORMAT).exists():
        to = read_json(directory / BASE_FORMAT)["format"]
    try:
        return Origin(name, revision, to, resolve(name, revision), directory)
    except InputError as error:
        moved = f"If that model moved, write its new path into base_model_name_or_path of {where}"
        raise InputError(f"{directory} holds adapters of {name}, and {error}. {moved}") from None


def save_lora(model: nn.Module, directory: Path, origin: Origin) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does, and base.json for the number format, for which
    PEFT's config has no field; each file whole or not at all."""
    layers = lora_layers(model)
    one = next(iter(layers.values()))
    tensors = {f"{PREFIX}{n}.{p}.weight": getattr(layer, p) for n, layer in layers.items() for p in ("lora_A", "lora_B")}
    with whole_file(directory / ADAPTER_WEIGHTS) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
    (directory / BASE_FORMAT).unlink(missing_ok=True)  # of an earlier save
    if origin.format:
        write_json(directory / BASE_FORMAT, {"format": origin.format})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"base_model_name_or_path": origin.name, "revision": origin.revision}
    config |= {"r": one.rank, "lora_alpha": one.alpha, "lora_dropout": one.dropout}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    write_json(directory / ADAPTER_CONFIG, config)


# Settings of PEFT under which an adapter computes something else than y = W x + b + s B A x.
UNSUPPORTED = """use_dora use_rslora use_qalora use_bdlora fan_in_fan_out modules_to_save rank_pattern alpha_pattern
    lora_bias target_parameters trainable_token_indices layer_replication alora_invocation_tokens arrow_config kasa_config
    monteclora_config velora_config""".split()


def load_lora(model: nn.Module, directory: Path) -> nn.Module:
    """Gives a model the adapters of a directory in PEFT's format, in place of any that it has, and freezes the rest; returns
    the model. InputError if they are not LoRA as computed here, or do not fit."""
    where, file = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    config = read_json(where)
    unsupported = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        found = ", ".join(unsupported) or config.get("peft_type")
        raise InputError(f"{where}: not plain LoRA ({found}), the one kind read here")
    if not file.is_file():
        raise InputError(f"{file}: no such file; PEFT's older adapter_model.bin is a pickle, which is never read")
    stored = read_header(file)
    model.requires_grad_(False)
    if not stored:
        raise InputError(f"{file}: there are no tensors in it")
    for name in sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in stored}):
        try:
            base = model.get_submodule(name)
            base = getattr(base, "base", base)
            A, B = (stored.pop(f"{PREFIX}{name}.lora_{x}.weight").read(dtype=torch.float32) for x in "AB")
        except (AttributeError, KeyError) as error:
            raise InputError(f"{file}: {name}: no such layer, or half an adapter ({error})") from None
        layer = LoraLinear(base, config["r"], float(config["lora_alpha"]), float(config.get("lora_dropout") or 0))
        if A.shape != layer.lora_A.shape or B.shape != layer.lora_B.shape:
            fitting = f"rank {config['r']} and a layer of {base.in_features} inputs and {base.out_features} outputs"
            raise InputError(f"{file}: {name}: A {list(A.shape)}, B {list(B.shape)} do not fit {fitting}")
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
        model.set_submodule(name, layer)
    if stored:
        raise InputError(f"{file}: unexpected tensors {sorted(stored)[:3]}")
    return model
