"""Where a model's weights lie, and what they are called there: hub or directory, safetensors shards, old and new names.

A checkpoint is a directory as on the Hugging Face hub: config.json, tokenizer.json, and model.safetensors or several
shards with model.safetensors.index.json. Only safetensors are read and written: a pickle can run code when it is opened.
"""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.files import InputError, read_json, whole_file, write_json

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them
SHARD_BYTES = 5 * 10**9  # a checkpoint larger than this is written in several files


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: itself, or the local copy of a hub repository (downloaded once, then cached)."""
    path = Path(path_or_repo)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision} makes no sense for the directory {path}")
        return path
    if path.is_file() or len(path.parts) != 2 or path.is_absolute() or path.parts[0] in (".", ".."):
        raise InputError(f"{path_or_repo}: no such directory (a hub name looks like microsoft/phi-2)")
    return hub_snapshot(str(path_or_repo), revision, ["*.json", "*.safetensors"])


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters (lora.py) rather than a whole model."""
    return (directory / ADAPTER_CONFIG).exists() and not (directory / "config.json").exists()


def base_directory(directory: Path) -> Path:
    """The directory of the whole model: the directory itself or, if it holds adapters, that of the model under them."""
    if not is_adapter(directory):
        return directory
    config = read_json(directory / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{directory / ADAPTER_CONFIG}: base_model_name_or_path is missing: whose adapters are these?")
    try:
        return resolve(name, config.get("revision"))
    except InputError as error:
        raise InputError(
            f"{directory} holds adapters of {name}, and {error}. If that model moved, write its place into "
            f"base_model_name_or_path of {directory / ADAPTER_CONFIG}"
        ) from None


def hub_snapshot(repo: str, revision: str | None, patterns: list[str], kind: str = "model") -> Path:
    """The local copy of a hub repository's files like `patterns`, downloaded once, then taken from the cache, also offline.
    `kind`: "model" or "dataset". The copy's directory is named after its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = "--model also takes a directory" if kind == "model" else "--sources also takes NAME=PATH"
    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{repo}: no such directory, and not a hub name, which looks like microsoft/phi-2") from None
    except GatedRepoError:
        raise InputError(f"{repo}: the repository asks for its terms to be accepted on its page, and for HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{repo}: no such directory here and no such repository on the hub (a private one needs HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repo}: the repository has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{repo}: the hub cannot be reached or refuses, and there is no complete local copy; {instead}"
        ) from None
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"{repo}: the download failed ({error}); run the same command again to continue it") from None


def stored_tensors(directory: Path) -> Iterator[tuple[Path, str]]:
    """(file, tensor name) of every tensor of a checkpoint: of the shards in its index, or of model.safetensors."""
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: has no weight_map from tensor names to files")
        shards = sorted({directory / name for name in weight_map.values()})
    else:
        shards = [directory / "model.safetensors"]
    for shard in shards:
        if not shard.is_file():
            pickles = " (it has a pickled pytorch_model*.bin, which is never read)" if list(directory.glob("*.bin")) else ""
            raise InputError(f"{shard}: no such file{pickles}")
        try:
            with safe_open(shard, framework="pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            raise InputError(f"{shard}: not a whole safetensors file ({error}); copy or download it again") from None
        for name in names:
            yield shard, name


OLD_NAMES = (
    ("transformer.embd.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    ("lm_head.ln.", "model.final_layernorm."),
    ("lm_head.linear.", "lm_head."),
    (".ln.", ".input_layernorm."),
    (".mixer.out_proj.", ".self_attn.dense."),
)


def modern_rows(name: str, rows: int) -> list[tuple[str, int, int]]:
    """Where the rows of a stored tensor belong, as (current name, first row, last row + 1): all of them to one tensor, but
    for the older fused `mixer.Wqkv` [3D, ...], whose thirds are q_proj, k_proj and v_proj."""
    for old, new in OLD_NAMES:
        name = name.replace(old, new)
    if ".rotary_emb." in name:  # older files store the rotary frequencies, which are computed here
        return []
    if ".mixer.Wqkv." not in name:
        return [(name, 0, rows)]
    names = [name.replace(".mixer.Wqkv.", f".self_attn.{proj}_proj.") for proj in "qkv"]
    return [(new, i * rows // 3, (i + 1) * rows // 3) for i, new in enumerate(names)]


def modern_tensors(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The parts of a stored tensor under their current names."""
    if tensor.ndim == 0:
        return [(name, tensor)]
    return [(new, tensor[first:end]) for new, first, end in modern_rows(name, len(tensor))]


def save_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Writes model.safetensors, in shards with an index past 5 GB; each file whole or not at all, the index last. What an
    earlier save left in the same directory is removed, or a loader might prefer it."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        with whole_file(directory / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(INDEX)
    for stale in directory.glob("model*.safetensors*"):
        if stale.name not in names:
            stale.unlink()
