"""One job on several processes: `torchrun --nproc-per-node 4 train.py ...` starts the same program four times.

Each process has a *rank*, 0 to n - 1. torchrun passes it in environment variables, and `job` connects the processes. Without
torchrun there is a single process, of rank 0, and every function here returns what it was given. All processes run the same
code on their own share of the work (`deal`), and rank 0 alone writes files and the screen (`is_main`).

**Sharding** (FSDP2). A weight W [rows, ...] of a sharded model is a DTensor. With c = ceil(rows / n), rank r keeps the rows
r c .. (r+1) c - 1, so the last ranks may have fewer or none. Gradients and AdamW's moments are split the same way. The rows
of a block are gathered just before the block runs, forward or backward, and dropped right after. The backward pass adds up
the ranks' gradients and leaves each rank the sum for its own rows. With several machines of several ranks each, every
machine holds all rows, split over its own ranks: rows are gathered within a machine, and only gradients cross the network.

**Collectives.** A function that combines results waits until all ranks have called it, and so does the forward pass of a
sharded model. So every rank must make the same calls in the same order:

    every rank runs the same number of forward passes: one that runs out of examples repeats one with weight 0 (`deal`)
    a branch is taken by all ranks or by none: they agree on the condition first (`gather`)
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from runtime.files import InputError
from runtime.flags import flag_name
from runtime.settings import TRAINING

# How long to wait for a process that hangs; one that ends is noticed at once. It must exceed anything that one rank does
# while the others wait, such as writing Phi-2 and its moments, 33 GB, to a disk.
TIMEOUT = datetime.timedelta(minutes=30)
DOWNLOAD = datetime.timedelta(days=1)  # for `main_first`: the main process may be downloading a model

_store: dist.Store | None = None  # short messages between the processes; torchrun holds it, so it outlives each of them
_turns = itertools.count()

# ------------------------------------------------------------------------------------------------------ start and end


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Wraps a whole program: connects the processes that torchrun started, if any. Inside, only the main process prints and
    warns, and if a process ends too early, the others raise InputError."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = dist.PrefixStore("group", _store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=TIMEOUT)
    with contextlib.ExitStack() as stack:
        if not is_main():
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            yield
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors that quote its source file; NCCL and the store have an error class.
            if size() == 1 or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise
            what = "ended (torchrun names it below)"
            if "timed out" in str(error).lower():
                what = f"has not answered for {TIMEOUT.seconds // 60} minutes"
            goes_on = "No file is half-written; the same command with --resume continues from the last checkpoint."
            raise InputError(f"another process of this job {what}, so rank {dist.get_rank()} stopped. {goes_on}") from None
    # Skipped after an error: the others may be waiting in a collective, which fails once this process has ended.
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def first_to_report() -> bool:
    """True only in the process that asks first. When one process fails, the others fail too; only the first error counts."""
    try:
        return _store is None or _store.add("reports", 1) == 1
    except RuntimeError:  # torchrun itself has ended
        return True


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block alone; then the others run it and find the files that it made, such as a download or
    a file of the run. The block must not contain a collective."""
    turn = f"turn/{next(_turns)}"
    if not is_main():
        _store.wait([turn], DOWNLOAD)
    yield
    if is_main() and size() > 1:
        _store.set(turn, "done")


def on_this_machine(settings: Any) -> Any:
    """A stage's settings with the device of this process and, if it computes, the number type that suits the device.

    InputError if each of several ranks would do what must be done once, or if they do not share a file system.
    """
    once = "" if settings.stage in (*TRAINING, "eval") else f"--stage {settings.stage}"
    for name in ("dry_run", "teacher", "precisions"):
        once = once or (flag_name(name) if getattr(settings, name, None) else "")
    if size() > 1 and once:
        raise InputError(f"{once} is for one process: start it with python instead of torchrun")
    if size() > 1:
        check_shared(Path(settings.out))
    changes = {}
    if hasattr(settings, "device"):
        changes["device"] = own_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if getattr(settings, "dtype", "none") is None:
        bf16 = changes["device"].startswith("cuda") or getattr(settings, "base", None) == "bf16"
        changes["dtype"] = "bf16" if bf16 else "fp32"
    return dataclasses.replace(settings, **changes)


def check_shared(directory: Path) -> None:
    """InputError, on all ranks, if one of them does not see the files that the main process makes in a directory."""
    if is_main():
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory) if is_main() else contextlib.nullcontext() as file:
        name = gather(file and Path(file.name).name)[0]
        missing = [r for r, sees in enumerate(gather((directory / name).exists())) if not sees]
    if missing:
        way_out = "run all machines in a directory that they share, or give --out such a directory"
        raise InputError(f"rank {missing[0]} does not see the files of rank 0 in {directory}: {way_out}")


def own_device(name: str) -> str:
    """The device of this process. Several processes on one machine take a GPU each."""
    if not re.fullmatch(r"cpu|cuda(:[1-9]?[0-9])?", name):
        raise InputError(f"--device {name}: give cpu, cuda, or cuda:1 for the second GPU")
    if name == "cpu":
        return name
    number = name.partition(":")[2]
    several, gpus = size() > 1, torch.cuda.device_count()
    if several and number:
        raise InputError(f"--device {name}: under torchrun each process chooses its own GPU; give --device cuda")
    index = int(os.environ["LOCAL_RANK"] if several else number or 0)
    if index >= gpus:
        raise InputError(f"--device {name}: PyTorch sees {gpus} GPUs here, fewer than this job needs")
    if several:
        torch.cuda.set_device(index)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention would make a new plan for every length
    return f"cuda:{index}" if several else name


# ---------------------------------------------------------------------------------------------------- dividing the work


def deal(items: Sequence, per_round: int) -> list[Sequence]:
    """This rank's items in rounds of at most `per_round`: r, r + n, r + 2n, ..., so from a list sorted by length every rank
    gets short and long items. All ranks get the same number of rounds, some of them empty if necessary."""
    own = items[rank() :: size()]
    return [own[i * per_round : (i + 1) * per_round] for i in range(math.ceil(len(items) / (size() * per_round)))]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over the ranks, returned on every rank."""
    if size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the ranks' gradients of parameters that are not sharded; FSDP has already added up those of sharded ones."""
    parameters = [p for p in parameters if p.requires_grad and not is_dtensor(p)]
    if size() == 1 or not parameters:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]))
    for p, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def gather(value: Any) -> list:
    """The list of the ranks' values, on every rank, in the order of ranks. A value is anything that JSON can hold."""
    if size() == 1:
        return [value]
    text = json.dumps(value).encode()
    longest = torch.tensor(len(text))
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    text = text.ljust(longest)  # blanks at the end give all texts one length
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(texts, own)
    return [json.loads(bytes(text.tolist())) for text in texts]


def collect(own: list) -> list:
    """Undoes `deal`: the ranks' results, one for each item dealt to them, as one list in the order of the items."""
    parts = gather(own)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


# --------------------------------------------------------------------------------------------------------- sharded models


def shards() -> int:
    """How many ranks share the rows of a sharded weight: those of one machine, or all where each machine has only one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    return size() if local == 1 or size() % local else local


def shard(model: nn.Module, blocks: Iterable[nn.Module], forward: str, device: str, bf16: bool = False) -> None:
    """Splits the rows of all weights over the ranks, in place. Each of the `blocks` is gathered by itself, the other weights
    together. A model on the meta device stays there; `model.to_empty(device=...)` then allocates this rank's rows only.
    Weights are whole only during the backward pass and inside `forward`, the name of the method that runs the network.

    `bf16`: blocks whose products are in bf16 are gathered in bf16, half the bytes; gradients are still added up in fp32. x
    stays fp32, and so do the other weights: x starts from the embedding, gradients from the output layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    sizes = {"machines": size() // shards(), "rows": shards()}  # of the mesh: copies of the model, shares of its rows
    if shards() == size():
        del sizes["machines"]
    mesh = init_device_mesh(torch.device(device).type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    low = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**low, cast_forward_inputs=False))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum the gradients. FSDP would take the mean, but here each rank divides its loss by the count of all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo lacks the operation that FSDP would use instead
    register_fsdp_forward_method(model, forward)


def is_dtensor(x: Tensor) -> bool:
    """Whether x is split over the ranks, without the slow import of the class."""
    return hasattr(x, "device_mesh")


def own(x: Tensor) -> Tensor:
    """This rank's rows of a tensor; they share its memory."""
    return x.to_local() if is_dtensor(x) else x


def own_rows(x: Tensor) -> tuple[int, int]:
    """(first, last + 1) of this rank's rows of a tensor."""
    if not is_dtensor(x):
        return 0, len(x)
    share, mine = math.ceil(len(x) / x.device_mesh.size(-1)), x.device_mesh.get_local_rank(-1)
    return min(mine * share, len(x)), min((mine + 1) * share, len(x))


def whole(x: Tensor) -> Tensor:
    """All rows of a tensor, on every rank. Collective if the tensor is sharded."""
    return x.full_tensor() if is_dtensor(x) else x


def whole_on_main(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of the main process. The other ranks help to gather them and return {}."""
    gathered = ((name, whole(x.detach())) for name, x in tensors)  # one at a time: the GPU need not hold them all
    return {name: x.cpu() for name, x in gathered if is_main()}


@torch.no_grad()
def copy_own_rows(x: Tensor, stored) -> None:
    """Copies this rank's rows into x from a tensor or a slice of a safetensors file, and reads no others."""
    begin, end = own_rows(x)
    if begin < end:
        own(x).copy_(stored[begin:end])
