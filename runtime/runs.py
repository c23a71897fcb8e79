"""What a run leaves on disk, so that it can be killed at any moment and go on as if nothing had happened.

    out/<run>/config.json model.safetensors tokenizer.json     the best model, loads in transformers too
              run.json metrics.jsonl ledger.json tb/ figures/  what was run, and how it went
              checkpoints/step-N/                              model, AdamW's moments and the loop's counters after step N

Training draws no random numbers besides the order of the batches, which follows from (seed, epoch, position); so model,
moments and the step number are the whole state, and a resumed run repeats the uninterrupted one bit for bit on the CPU.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import ChatML
from model import Phi
from runtime import parallel
from runtime.files import InputError, read_json, whole_directory, whole_file, write_json, write_jsonl

MODEL_FILES = (
    "config.json adapter_config.json base.json *.safetensors *.safetensors.index.json tokenizer*.json "
    "special_tokens_map.json"
).split()


def fingerprint(model: Phi) -> str:
    """SHA-256 over the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(parallel.whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_model(directory: Path, model: Phi, chat: ChatML) -> None:
    """Model and tokenizer. Of several ranks the main one writes, and all must call this."""
    model.save_pretrained(directory)
    if not parallel.is_main():
        return
    with whole_file(directory / "tokenizer.json") as temporary:
        chat.tokenizer.save(str(temporary))


def save_checkpoint(run: Path, step: int, model: Phi, chat: ChatML, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Writes checkpoints/step-N, complete or not at all. `state`: the loop's counters, as JSON. Of several ranks the main
    one writes whole tensors, and all must call this; so a run goes on with any number of them."""
    path = run / "checkpoints" / f"step-{step}"
    with whole_directory(path) if parallel.is_main() else contextlib.nullcontext(path) as temporary:
        save_model(temporary, model, chat)
        moments = parallel.gathered((n, parallel.whole(x, beside=p)) for n, x, p in _moments(model, optimizer))
        if parallel.is_main():
            save_file(moments, temporary / "optimizer.safetensors")
            write_json(temporary / "state.json", {"step": step, **state})
    return path


def _moments(model: Phi, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """("exp_avg.lm_head.bias", tensor, parameter): what the optimizer keeps of each trained parameter, as it is. (8-bit
    codes stay codes: the dynamic map has no level at -1, so rounding their values once more would change them.)"""
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield from ((f"{key}.{name}", value, p) for key, value in optimizer.state[p].items())


DTYPES = {"F32": torch.float32, "U8": torch.uint8}  # of an optimizer's state, by the names of safetensors


def load_optimizer(path: Path, model: Phi, optimizer: torch.optim.Optimizer) -> dict:
    """Fills the optimizer's state, in place, from a checkpoint, a rank's own rows alone; returns the loop's counters.
    InputError if the checkpoint is of an optimizer with another state."""
    file = path / "optimizer.safetensors"
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        for name, value, p in _moments(model, optimizer):
            saved = stored.get_slice(name) if name in names else None
            form = (tuple(saved.get_shape()), DTYPES.get(saved.get_dtype())) if saved else None
            if form != (parallel.whole_shape(value, beside=p), value.dtype):
                key, _, parameter = name.partition(".")
                what = f"a {str(form[1]).removeprefix('torch.')} {saved.get_shape()} as" if saved else "no"
                raise InputError(
                    f"{file} holds {what} {key} of {parameter}; resume with the --optimizer that it was written with"
                )
            if value.ndim == 0:
                value.copy_(stored.get_tensor(name))
            else:
                parallel.fill(value, saved, beside=p)
    return read_json(path / "state.json")


def steps_saved(run: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Directories being written begin with a dot and do not count."""
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def prune(run: Path, keep: int, best: int | None) -> None:
    """Deletes all checkpoints but the last `keep` and the best."""
    for step in steps_saved(run)[:-keep]:
        if step != best:
            shutil.rmtree(run / "checkpoints" / f"step-{step}")


def publish(run: Path, step: int) -> None:
    """Copies the model of checkpoint `step` to the run's own directory."""
    source = run / "checkpoints" / f"step-{step}"
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            if file.name != "optimizer.safetensors":
                with whole_file(run / file.name) as temporary:
                    shutil.copyfile(file, temporary)


def read_metrics(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl; a last line cut by a kill is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def truncate_metrics(run: Path, step: int) -> None:
    """Drops what was logged after `step`: those steps will run again."""
    write_jsonl(run / "metrics.jsonl", [row for row in read_metrics(run) if row["step"] <= step])


def cached_logprobs(path: Path, compute) -> tuple[Tensor, bool]:
    """The table stored at `path`, or `compute()` stored there; and whether it was there already. Ranks decide together."""
    missing = parallel.largest(not path.exists())
    if not missing:
        return load_file(path)["logprobs"], True
    table = compute()
    if parallel.is_main():
        with whole_file(path) as temporary:
            save_file({"logprobs": table}, temporary)
    return table, False


def open_run(run: Path, overwrite: bool, resume: bool) -> int:
    """Makes the run's directory ready and returns the step to go on from; InputError rather than losing earlier work."""
    exists = run.exists() and any(run.iterdir())
    if resume:
        if not (run / "run.json").exists():
            raise InputError(f"{run}: there is no run to resume; leave out --resume, or give its --name")
        saved = steps_saved(run)
        return saved[-1] if saved else 0
    if exists and overwrite:
        if not (run / "run.json").exists():
            raise InputError(f"{run}: has no run.json, so it is not a run of this program and is not deleted")
        shutil.rmtree(run)
    elif exists:
        raise InputError(
            f"{run} already holds a run. Continue it with --resume, delete it with --overwrite, or give this "
            "one another --name."
        )
    run.mkdir(parents=True, exist_ok=True)
    return 0
