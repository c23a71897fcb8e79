"""LoRA: a frozen matrix with a small trained product beside it.

    y = W x + b + s B A x,     s = alpha / r,     A [r, I],  B [O, r],  r << O, I            (LoRA, Hu et al. 2021, eq. 3)

Tuning changes a matrix by little, and by a matrix of low rank (section 4.1 there): for a 2,560 x 10,240 matrix of Phi-2,
A and B of rank 16 hold 205 thousand values instead of 26 million. Only they have gradients and AdamW's moments. W never
changes, so it may be stored in int8 or 4 bits (QLoRA, Dettmers et al. 2023, eq. 5):  y = dequantize(W) x + b + s B A x.

B starts at 0: before the first step the adapted model *is* the model that it starts from. A starts as in PEFT, uniform in
+-1/sqrt(I). With one alpha for all r, s = alpha / r makes the first step about as large at every rank;
the default alpha is r, and then a larger rank wants a lower learning rate.

Files and names are those of the PEFT library; each reads what the other writes. Nothing here knows of Phi: it works on any
nn.Linear and on the quantized layers of quant.py.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from quant import FORMATS, SKIP, FrozenLinear, compute_dtype
from runtime.files import InputError, read_fields, read_json, whole_file, write_json
from runtime.weights import DTYPES, Stored, read_header, resolve

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
        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))  # [N, I]
        y = self.base(rows)  # [N, O]
        low = F.dropout(rows, self.dropout, self.training) @ self.lora_A.to(rows.dtype).T  # [N, r]
        y.addmm_(low, self.lora_B.to(rows.dtype).T, alpha=self.alpha / self.rank)  # in place: no second [N, O]
        return y.view(*x.shape[:-1], -1)

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
    there_are = f"there are {', '.join(sorted(known))}, or all-linear for all of them"
    for part in sorted(wanted - known):
        raise InputError(f"no layer is called {part!r}; {there_are}")
    if not wanted:
        raise InputError(f"{targets!r} names no layer; {there_are}")
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


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters rather than a whole model. InputError if it holds both, since programs differ in
    what they make of that."""
    found = [(directory / name).exists() for name in (ADAPTER_CONFIG, "config.json")]
    if all(found):
        raise InputError(f"{directory} holds adapters ({ADAPTER_CONFIG}) and a model (config.json): move one of them away")
    return found[0]


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
    config, _ = read_adapters(directory)
    name, revision = config["base_model_name_or_path"], config["revision"]
    if to is None and (file := directory / BASE_FORMAT).exists():
        to = read_fields(read_json(file), {"format": str}, file)["format"]
        if to not in FORMATS:
            raise InputError(f"{file}: there is no format {to!r:.60}; formats are {', '.join(FORMATS)}")
    try:
        return Origin(name, revision, to, resolve(name, revision), directory)
    except InputError as error:
        moved = f"If that model moved, write its new path into base_model_name_or_path of {directory / ADAPTER_CONFIG}"
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


KINDS = {"base_model_name_or_path": str, "revision": str | None, "r": int, "lora_alpha": int | float}
KINDS |= {"lora_dropout": int | float | None, "target_modules": list | str | None, "bias": str | None}
# PEFT's other settings under which y = W x + b + s B A x:
HARMLESS = """peft_type peft_version task_type auto_mapping inference_mode init_lora_weights exclude_modules runtime_config
    layers_to_transform layers_pattern megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config
    qalora_group_size ensure_weight_tying""".split()
INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")  # starts of A and B that leave W as it is


def read_adapters(directory: Path) -> tuple[dict, dict[str, dict[str, Stored]]]:
    """The fields of adapter_config.json, and A and B of each layer, {layer: {"A": ..., "B": ...}}, without reading their
    values. InputError if they are not LoRA as computed here."""
    where, file = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    raw = read_json(where)
    config = read_fields(raw, KINDS, where)
    other = [name for name, value in raw.items() if value and name not in KINDS and name not in HARMLESS]
    other += ["bias"] * (config["bias"] not in (None, "none"))
    if raw.get("peft_type") != "LORA" or other:
        found = ", ".join(other) or raw.get("peft_type")
        raise InputError(f"{where}: not plain LoRA ({found!s:.200}), the one kind read here")
    if (start := raw.get("init_lora_weights")) not in INITIAL:
        way_out = "save them with PEFT's path_initial_model_for_weight_conversion, or merge them there"
        raise InputError(f"{where}: init_lora_weights {start!r:.60} changes the weights under the adapters; {way_out}")
    if config["r"] < 1 or not 0 <= (config["lora_dropout"] or 0) < 1:
        raise InputError(f"{where}: r = {config['r']}, lora_dropout = {config['lora_dropout']} make no sense")
    if not file.is_file():
        raise InputError(f"{file}: no such file; PEFT's older adapter_model.bin is a pickle, which is never read")
    layers: dict[str, dict[str, Stored]] = {}
    for name, tensor in read_header(file).items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not match or match[1].rpartition(".")[2] in SKIP or tensor.dtype not in DTYPES:
            known = f"only A and B in floating point are read, none of {', '.join(SKIP)}; merge them with PEFT"
            raise InputError(f"{file}: tensor {name!r:.200} {tensor.dtype}: {known} (merge_and_unload)")
        layers.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in layers.items():
        if len(pair) < 2:
            raise InputError(f"{file}: {name} has half an adapter, only lora_{next(iter(pair))}")
    if not layers:
        raise InputError(f"{file}: there are no tensors in it")
    return config | {"part": bool(raw.get("layers_to_transform") or raw.get("exclude_modules"))}, layers


def load_lora(model: nn.Module, directory: Path) -> nn.Module:
    """Gives a model the adapters of a directory in PEFT's format, in place of any that it has, and freezes the rest; returns
    the model. InputError if they are not LoRA as computed here, or do not fit."""
    config, adapters = read_adapters(directory)
    file, rank, targets = directory / ADAPTER_WEIGHTS, config["r"], config["target_modules"]
    model.requires_grad_(False)
    bases = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, FrozenLinear))}
    bases |= {name: layer.base for name, layer in lora_layers(model).items()}
    for name, pair in adapters.items():
        if (base := bases.get(name)) is None:
            raise InputError(f"{file}: {name}: the model has no such layer")
        if pair["A"].shape != (rank, base.in_features) or pair["B"].shape != (base.out_features, rank):
            fitting = f"rank {rank} and a layer of {base.in_features} inputs and {base.out_features} outputs"
            shapes = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
            raise InputError(f"{file}: {name}: {shapes} do not fit {fitting}")
    if isinstance(targets, list) and not config["part"]:  # which layers of a kind, or a regex: the tensors alone tell
        named = {name for name in bases if any(name == target or name.endswith(f".{target}") for target in targets)}
        if differ := sorted(named ^ adapters.keys()):
            raise InputError(f"{file}: {differ[0]}: target_modules in {ADAPTER_CONFIG} and the tensors disagree")
    for name, pair in adapters.items():
        layer = LoraLinear(bases[name], rank, float(config["lora_alpha"]), float(config["lora_dropout"] or 0))
        for part in "AB":
            getattr(layer, f"lora_{part}").data.copy_(pair[part].read(dtype=torch.float32))
        model.set_submodule(name, layer)
    return model
