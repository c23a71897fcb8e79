"""Weights on disk: where they are, what they are called, and how they get into a module and out of it.

A checkpoint is a directory as on the Hugging Face hub: config.json, tokenizer.json, and model.safetensors or several shards
with model.safetensors.index.json. Only safetensors are read and written: a pickle can run code when it is opened.

A quantized layer is stored by the names and in the layout of bitsandbytes, which transformers reads:

    nf4, fp4    weight uint8 [n/2, 1], weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (JSON in bytes);
                with double quantization also weight.nested_absmax and weight.nested_quant_map
    int8        weight int8 [O, I], SCB fp32 [O], weight_format (0: plain rows)
    int4, nf2   as nf4, but weight.quant_state.blockwise__int4: this project's own, unknown to bitsandbytes

and config.json then has a `quantization_config`.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant import CODES, SKIP, FrozenLinear, Int8Linear, Linear4bit, Quantized, bits, levels, quantize_layer
from runtime import parallel
from runtime.files import InputError, json_object, read_fields, read_json, whole_file, write_json

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights
SHARD_BYTES = 5 * 10**9  # a checkpoint larger than this is written in several files


# ------------------------------------------------------------------------------------------------------- directory or hub


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: itself, or the local copy of a hub repository (downloaded once, then cached)."""
    path = Path(path_or_repo)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision} makes no sense for the directory {path}")
        return path
    if path.is_file() or len(path.parts) != 2 or path.is_absolute() or path.parts[0] in (".", ".."):
        raise InputError(f"{path_or_repo}: no such directory (a hub name looks like microsoft/phi-2)")
    if path.parent.is_dir():  # of the user's: its name is not sent anywhere
        raise InputError(f"{path_or_repo}: no such directory, looked for in {path.parent.resolve()}")
    return hub_snapshot(str(path_or_repo), revision, ["*.json", "*.safetensors", "*.jinja"])


def hub_snapshot(repo: str, revision: str | None, patterns: list[str], kind: str = "model") -> Path:
    """The local copy of those files of a hub repository that match `patterns`, in a directory named after the commit. It is
    downloaded once and then found in the cache, also offline. `kind`: "model" or "dataset"."""
    from huggingface_hub import errors, snapshot_download

    reasons = {  # the first that fits: a gated repository is also one that is not found
        errors.HFValidationError: "no such directory, and not a hub name, which looks like microsoft/phi-2",
        errors.GatedRepoError: "the repository asks for its terms to be accepted on its page, and for HF_TOKEN",
        errors.RepositoryNotFoundError: "no such directory here and no such repository on the hub (private: set HF_TOKEN)",
        errors.RevisionNotFoundError: f"the repository has no revision {revision!r}",
        errors.LocalEntryNotFoundError: "no complete copy is here, and the hub cannot be reached or refuses; give a path",
    }
    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=patterns))
    except (errors.HTTPError, OSError, ValueError) as error:
        failed = f"the download failed ({error}); run the same command again to continue it"
        reason = next((text for cls, text in reasons.items() if isinstance(error, cls)), failed)
        raise InputError(f"{repo}: {reason}") from None


def hub_names(repo: str, revision: str | None) -> list[str] | None:
    """The names of the files in a data set of the hub; None if the hub does not say (`hub_snapshot` then says why not)."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().list_repo_files(repo, revision=revision, repo_type="dataset")
    except (errors.HTTPError, OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------------- what is stored


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "F32", "BF16", "U8", ...

    def read(self, device: str = "cpu", dtype: torch.dtype | None = None, packed: bool = False) -> Tensor:
        """A copy. The file is opened for this tensor alone, since only closing it gives back the memory it was mapped to.
        InputError if it is not finite, unless it is `packed`: codes that may look like any dtype."""
        with safe_open(self.file, framework="pt") as file:
            tensor = file.get_tensor(self.key).to(device=device, dtype=dtype, copy=True)
        if not packed:
            self.check_finite(tensor)
        return tensor

    def fill(self, tensor: Tensor) -> None:
        """Copies into `tensor`, in place. If it is sharded, only this rank's rows are read."""
        with safe_open(self.file, framework="pt") as file:
            parallel.copy_own_rows(tensor, file.get_slice(self.key))
        self.check_finite(parallel.own(tensor))

    def check_finite(self, tensor: Tensor) -> None:
        # NaN makes both ends NaN, and no temporary of the tensor's size is needed.
        weights = tensor.dtype in DTYPES.values() and tensor.numel()
        if weights and not torch.stack(tensor.detach().aminmax()).isfinite().all():
            raise InputError(f"{self.file}: tensor {self.key!r} holds NaN or infinity; copy or download it again")


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of one safetensors file by its name there."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            return {key: Stored(file, key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name; reads only the headers of the files that its index names, or of its only
    one. InputError if one is absent, or if there are two answers to which tensors are the model's."""
    index, shards = directory / INDEX, [directory / "model.safetensors"]
    if index.is_file():
        if shards[0].is_file():
            raise InputError(f"{directory} holds {shards[0].name} and {INDEX}; move the one away that is not the model's")
        names = read_fields(read_json(index), {"weight_map": dict}, index)["weight_map"].values()
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{index}: {name!r:.60} is not the name of a safetensors file beside it")
        shards = sorted({directory / name for name in names})
    found: dict[str, Stored] = {}
    for shard in shards:
        if not shard.is_file():
            pickles = " (it has a pickled pytorch_model*.bin, which is never read)" if list(directory.glob("*.bin")) else ""
            raise InputError(f"{shard}: no such file{pickles}")
        tensors = read_header(shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise InputError(f"{shard}: tensor {twice[0]!r} is in {found[twice[0]].file} too")
        found |= tensors
    return found


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, matched with the module that they are the parameters of."""

    directory: Path
    plain: dict[str, Stored]  # by parameter
    quantized: dict[str, dict[str, Stored]]  # layer: {"weight": ..., "weight.absmax": ...}, all but the bias
    settings: dict  # config.json's `quantization_config`

    def read_layer(self, name: str, plain: nn.Linear, device: str = "cpu") -> FrozenLinear:
        """The quantized layer that replaces `plain`, with the bias of that. InputError if its tensors are damaged."""
        read = {part: tensor.read(device, packed=part == "weight") for part, tensor in self.quantized[name].items()}
        try:
            return layer_from_tensors(read, plain, self.settings)
        except InputError as error:
            raise InputError(f"{self.directory}: {name}: {error}") from None


def match(module: nn.Module, directory: Path) -> Checkpoint:
    """Finds the tensor of every parameter without reading values. InputError if a name, a shape or a kind does not fit."""
    stored, parameters = stored_tensors(directory), dict(module.named_parameters())
    quantized: dict[str, dict[str, Stored]] = {}
    for layer in quantized_layers(stored):
        names = [name for name in stored if name.startswith(f"{layer}.") and name != f"{layer}.bias"]
        quantized[layer] = {name.removeprefix(f"{layer}."): stored.pop(name) for name in names}
        if parameters.pop(f"{layer}.weight", None) is None or not isinstance(module.get_submodule(layer), nn.Linear):
            raise InputError(f"{directory}: {layer} is stored quantized, but the config has no such linear layer")
    for name, tensor in stored.items():
        label = f"{tensor.file}: tensor {tensor.key!r}"
        if name not in parameters:
            raise InputError(f"{tensor.file}: unexpected tensor {tensor.key!r}; the config names no such parameter")
        if tensor.shape != parameters[name].shape:
            raise InputError(f"{label} has shape {list(tensor.shape)}, the config needs {list(parameters[name].shape)}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{label} holds {tensor.dtype}, not floating-point weights")
    if missing := [name for name in parameters if name not in stored]:
        raise InputError(f"{directory}: {len(missing)} tensors are missing, the first {missing[0]!r}")
    settings, config = {}, directory / "config.json"
    if quantized:
        settings = read_fields(read_json(config), {"quantization_config": dict}, config)["quantization_config"]
    return Checkpoint(directory, {name: stored[name] for name in parameters}, quantized, settings)


@torch.no_grad()
def load_weights(
    module: nn.Module, directory: Path, dtype=torch.float32, device: str = "cpu", to: str | None = None, block: int = 64
) -> None:
    """Fills a module, in place, from a checkpoint, after checking every name, shape and kind (InputError).

    A parameter on the meta device is made in `dtype` on `device` as it is read, so memory never holds more than the weights
    once plus the largest tensor. Any other parameter is filled where it is; of a sharded one a rank reads only its own rows.
    A layer that is stored quantized replaces the nn.Linear of its name.

    `to` quantizes the linear layers, but the output layer, to this number format as they are read, in blocks of `block`.
    """
    checkpoint = match(module, directory)
    if to and checkpoint.quantized:
        raise InputError(f"{directory} is stored quantized already; leave out --base {to}")
    parameters = dict(module.named_parameters())
    for layer in checkpoint.quantized:
        module.set_submodule(layer, checkpoint.read_layer(layer, module.get_submodule(layer), device))

    for name, stored in checkpoint.plain.items():
        if not parameters[name].is_meta:
            stored.fill(parameters[name])
            continue
        layer, _, leaf = name.rpartition(".")
        parent = module.get_submodule(layer)
        tensor = stored.read(device, dtype)
        if to and leaf == "weight" and isinstance(parent, nn.Linear) and layer.rpartition(".")[2] not in SKIP:
            where = f"{stored.file}: {name}"
            module.set_submodule(layer, quantize_layer(tensor, parent.bias, to, block, where))
        else:
            setattr(parent, leaf, nn.Parameter(tensor))


def save_weights(module: nn.Module, directory: Path, config: dict) -> None:
    """Writes a module's weights, then config.json with `config` and how the weights are stored. Of several ranks the main
    one writes, and all must call this."""
    tensors = module.state_dict()
    if parallel.size() > 1:
        tensors = parallel.whole_on_main(tensors.items())
    if not parallel.is_main():
        return
    dtype = next(module.parameters()).dtype
    frozen = {name: layer for name, layer in module.named_modules() if isinstance(layer, FrozenLinear)}
    for name, layer in frozen.items():
        for part in layer.state_dict():
            del tensors[f"{name}.{part}"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer_tensors(layer).items()}
    plain = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    save_tensors(directory, tensors)
    write_json(directory / "config.json", stored_config(config, dtype, next(iter(frozen.values()), None), plain))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights. Of several ranks all must call this."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        tensor = parallel.whole(tensor) if parallel.size() > 1 else tensor
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Writes model.safetensors, or shards with an index past 5 GB, and removes the files of an earlier save. Each file is
    whole or absent. The old index goes first and the new one comes last: shards of two saves are never read as one model."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    (directory / INDEX).unlink(missing_ok=True)
    for file, names in split.filename_to_tensors.items():
        with whole_file(directory / file) as temporary:
            shard = {name: tensors[name].detach().contiguous() for name in names}
            save_file(shard, temporary, metadata={"format": "pt"})
    for stale in directory.glob("model*.safetensors"):
        if stale.name not in split.filename_to_tensors:
            stale.unlink()
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


# ------------------------------------------------------------------------------------------------------- quantized layers

BITSANDBYTES = ("nf4", "fp4")  # codes, and
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # blocks, that bitsandbytes knows


def is_quantized(directory: Path) -> bool:
    """Whether a checkpoint holds quantized layers, whatever its config says."""
    return bool(quantized_layers(stored_tensors(directory)))


def quantized_layers(names: Iterable[str]) -> list[str]:
    """The layers of a checkpoint that are stored quantized, by the names of all its tensors."""
    layers = {name.partition(".weight.quant_state.")[0] for name in names if ".weight.quant_state." in name}
    return sorted(layers | {name.removesuffix(".SCB") for name in names if name.endswith(".SCB")})


def layer_tensors(layer: FrozenLinear) -> dict[str, Tensor]:
    """A layer's tensors by their names on disk."""
    bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
    if isinstance(layer, Int8Linear):
        return {"weight": layer.weight, "SCB": layer.SCB, "weight_format": torch.zeros((), dtype=torch.uint8), **bias}
    return to_tensors(layer.quantized) | bias


def layer_from_tensors(tensors: dict[str, Tensor], plain: nn.Linear, settings: dict) -> FrozenLinear:
    """The quantized layer that replaces `plain`, with its bias. `settings`: the checkpoint's `quantization_config`."""
    expected = [plain.out_features, plain.in_features]
    if "SCB" not in tensors:
        return Linear4bit(from_tensors(tensors, expected), plain.bias)
    codes, scale, form = tensors.get("weight", torch.empty(0)), tensors["SCB"], tensors.get("weight_format", torch.zeros(1))
    if codes.dtype != torch.int8 or form.numel() != 1 or form.item() != 0:
        raise InputError("its int8 weight is not in bitsandbytes' row format, the only one that is read")
    if list(codes.shape) != expected:
        raise InputError(f"it holds a matrix of {list(codes.shape)}, the config needs {expected}")
    more = set(tensors) - {"weight", "SCB", "weight_format"}
    if more or scale.shape != codes.shape[:1] or scale.dtype not in DTYPES.values():
        found = f"scales {list(scale.shape)} {_name(scale.dtype)} for {expected} codes in {sorted(tensors)}"
        raise InputError(f"damaged int8 weight: {found}")
    known = {"llm_int8_threshold": int | float | None, "weight_only": bool | None}
    threshold, weight_only = read_fields(settings, known, "config.json's quantization_config").values()
    threshold = 6.0 if threshold is None else threshold if threshold > 0 else math.inf  # 0: no value is an outlier
    return Int8Linear(codes, scale.float(), plain.bias, None if weight_only else threshold)


def to_tensors(q: Quantized) -> dict[str, Tensor]:
    """A quantized matrix by its names on disk. What is not a tensor becomes JSON in bytes."""
    state = {"quant_type": q.code, "blocksize": q.block, "dtype": _name(q.dtype), "shape": list(q.shape)}
    tensors = {"weight": q.packed, "weight.absmax": q.absmax, "weight.quant_map": levels(q.code).clone()}
    if q.nested_absmax is not None:
        tensors["weight.nested_absmax"] = q.nested_absmax
        tensors["weight.nested_quant_map"] = levels("dynamic8").clone()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    family = "bitsandbytes" if q.code in BITSANDBYTES else "blockwise"
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"weight.quant_state.{family}__{q.code}": text}


def from_tensors(tensors: dict[str, Tensor], expected: list[int]) -> Quantized:
    """The inverse of `to_tensors` for a matrix of `expected` shape; InputError if something is missing, unknown, or does not
    fit the rest."""
    tensors, damaged = dict(tensors), "its quantized weight is incomplete or damaged"
    kinds = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    nested_kinds = {"nested_blocksize": int, "nested_offset": int | float}
    nested, offset, nested_table = tensors.pop("weight.nested_absmax", None), None, levels("dynamic8")
    try:
        (key,) = [name for name in tensors if name.startswith("weight.quant_state.")]
        raw = json_object(bytes(tensors.pop(key).tolist()))
        code, block, dtype, shape = read_fields(raw, kinds, key).values()
        packed, absmax, table = (tensors.pop(name) for name in ("weight", "weight.absmax", "weight.quant_map"))
        if nested is not None:
            size, offset = read_fields(raw, nested_kinds, key).values()
            offset, nested_table = torch.tensor(float(offset), device=packed.device), tensors.pop("weight.nested_quant_map")
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{damaged} ({error if isinstance(error, ValueError) else repr(error)})") from None
    if dtype not in map(_name, DTYPES.values()):
        raise InputError(f"{damaged}: its dtype is {dtype!r:.60}")
    if shape != expected:
        raise InputError(f"it holds a matrix of {shape!r:.60}, the config needs {expected}")
    if code not in CODES or not torch.equal(table.cpu().float(), levels(code)):
        raise InputError(f"weight.quant_map is not the table of {code!r:.60}")
    if nested is not None and (size != 256 or not torch.equal(nested_table.cpu().float(), levels("dynamic8"))):
        raise InputError("its scales are quantized otherwise than in blocks of 256 with the dynamic map")
    n, blocks = math.prod(shape), math.ceil(math.prod(shape) / max(1, block))
    fits = block >= 1 and not tensors and packed.nbytes == math.ceil(n * bits(code) / 8) and absmax.shape == (blocks,)
    fp32, count = (absmax, blocks) if nested is None else (nested, math.ceil(blocks / 256))
    fits = fits and fp32.dtype in DTYPES.values() and fp32.shape == (count,)
    if not (fits and (nested is None or absmax.dtype == torch.uint8)):
        found = f"{packed.nbytes} bytes of codes, {absmax.numel()} scales" + (f", {sorted(tensors)}" if tensors else "")
        raise InputError(f"{damaged}: {found} for {n} values in blocks of {block}")
    packed = packed.contiguous().view(torch.uint8).reshape(-1, 1)
    absmax = absmax.float() if nested is None else absmax
    return Quantized(packed, absmax, code, block, tuple(shape), getattr(torch, dtype), nested_absmax=nested, offset=offset)


def stored_config(config: dict, dtype: torch.dtype, layer: FrozenLinear | None, plain: list[str]) -> dict:
    """The content of config.json with how the weights are stored: their dtype and, if there are quantized layers, of which
    `layer` is one, a `quantization_config`. transformers reads that too, if bitsandbytes knows the format. `plain`: the
    linear layers that are not quantized."""
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "quantization_config")}
    config["torch_dtype"] = _name(dtype)
    if layer is None:
        return config
    how: dict = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": plain}
    if isinstance(layer, Int8Linear):
        # bitsandbytes always rounds the activations too; "weight_only" is for `layer_from_tensors`.
        threshold = {None: 6.0, math.inf: 0.0}.get(layer.threshold, layer.threshold)  # 0: no value is an outlier
        how |= {"load_in_8bit": True, "llm_int8_threshold": threshold, "weight_only": layer.threshold is None}
    elif (q := layer.quantized).code in BITSANDBYTES and q.block in BLOCKS:
        how |= {"load_in_4bit": True, "bnb_4bit_quant_type": q.code, "bnb_4bit_quant_storage": "uint8"}
        how |= {"bnb_4bit_use_double_quant": q.nested_absmax is not None, "bnb_4bit_compute_dtype": _name(dtype)}
    else:
        note = "this project's own format; bitsandbytes has none for it"
        how = {"quant_method": "blockwise", "code": q.code, "block": q.block, "note": note}
    return config | {"quantization_config": how}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------ config.json

FIXED = {"hidden_act": "gelu_new", "tie_word_embeddings": False, "qk_layernorm": False}  # what the network computes


def config_from(cls: type, raw: dict, where: str):
    """A dataclass of numbers, with `other` for all other fields, from the content of Phi's config.json, as any version of
    transformers writes it. InputError if it describes another network."""
    if raw.get("model_type") != "phi":
        raise InputError(f"{where}: model_type is {raw.get('model_type')!r:.60}, not 'phi', the one kind that is read here")
    config = {name: value for name, value in raw.items() if name != "quantization_config" or value is not None}
    read_fields(config, {"quantization_config": dict | None, "torch_dtype": str | None, "dtype": str | None}, where)
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.pop(field, None) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise InputError(f"{where}: rope scaling {kind!r:.60} is not supported, only the default rotary positions")
        for name in ("partial_rotary_factor", "rope_theta"):
            if name in rope:  # transformers 5 reads these first
                config[name] = rope[name]
    config.setdefault("partial_rotary_factor", 0.5)  # transformers' default; Phi-2's own is 0.4
    for name, fixed in FIXED.items():
        if config.get(name, fixed) != fixed:
            raise InputError(f"{where}: {name} = {config[name]!r:.60} is not supported, only {fixed!r} (as in Phi-2)")
    kinds = {f.name: (int, float) if f.type is float else (int,) for f in fields(cls)}
    own = {name: config.pop(name) for name in kinds if name in config}
    for name, value in own.items():
        most = 1024 if name == "num_hidden_layers" else 2**24  # more than any Phi has, and little enough to build
        if name == "num_key_value_heads" and value is None:  # as many as heads
            continue
        if type(value) not in kinds[name] or not 0 < value <= most:
            raise InputError(f"{where}: {name} is {value!r:.60}, not a positive number up to {most:,}")
    try:
        return cls(**own, other=config)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
