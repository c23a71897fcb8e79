"""Several processes as one job: `torchrun --nproc-per-node 4 train.py ...` starts the same program four times.

Process r of n is *rank* r. torchrun tells each its rank by environment variables, and `job` connects them. Without torchrun
there is one process of rank 0, nothing is connected, and everything here returns what it was given. Every process runs the
same lines; what differs is

    deal(items)        which part of the work is a rank's own
    sum_over_ranks     what they found is put together; so are `gather` (texts), `collect` (what was dealt), `largest`
    is_main()          who writes files and the screen: rank 0
    shard(model)       which rows of every weight a rank keeps (FSDP2)

**Sharding.** A weight W [rows, ...] of a sharded model is a DTensor: rank r keeps rows r c .. (r+1) c - 1, where
c = ceil(rows / n), and the last ranks fewer or none; so do its gradient and AdamW's two moments. The rows of a block are
gathered just before the block runs, forwards and backwards, and dropped right after. A backward pass adds up the ranks'
gradients and leaves each rank the sum of its own rows.

What puts things together is *collective*, a pass of a sharded model too: every rank must do it, and in the same order, or
the others wait. So a rank that has less to do than others goes through the motions (`rounds`), and whatever decides which
lines come next is decided together (`largest`).
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from runtime.files import InputError

# A process that ends closes its connections, which the others notice at once; the limit is for one that hangs. It must be
# longer than anything that one rank does while the others wait, such as writing Phi-2 and its moments, 33 GB, to a disk.
TIMEOUT = datetime.timedelta(minutes=30)
DOWNLOAD = datetime.timedelta(days=1)  # for `main_first`, under which a model may be fetched

_store: dist.Store | None = None  # a few short notes between the processes; torchrun keeps it, so it outlives each of them
_turns = itertools.count()

# ---------------------------------------------------------------------------------------------------- coming and going


def join() -> None:
    """Connects the processes that torchrun started; does nothing in a process that it did not start, or started alone."""
    global _store
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return
    _store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = dist.PrefixStore("group", _store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=TIMEOUT)


def leave() -> None:
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def own_device(device: str | None) -> str | None:
    """`device` in a single process; among several, this one's: cpu, or the GPU with its number on this machine."""
    if size() == 1:
        return device
    kind, _, index = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind != "cuda":
        return kind
    if index:
        raise InputError(f"--device {device}: under torchrun every process takes a GPU of its own; give --device cuda")
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(f"torchrun starts more processes than there are GPUs, {gpus}; lower --nproc-per-node")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


@contextlib.contextmanager
def job() -> Iterator[None]:
    """`join` and `leave` around a whole program. In between only the main process writes to stdout and warns, and the end of
    another process is an InputError."""
    join()
    with contextlib.ExitStack() as stack:
        stack.enter_context(watching())
        if not is_main():
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield
    leave()  # not after an error: the others may wait in a collective, which ends when this process does


def launcher() -> list[str]:
    """The beginning of the command line that started this process, on this machine."""
    if size() == 1:
        return ["python"]
    machines = size() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    several = ["--nnodes", str(machines), "..."] if machines > 1 else []
    return ["torchrun", *several, "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]


@contextlib.contextmanager
def watching(when: str = "") -> Iterator[None]:
    """Turns the error of a collective that another process does not answer into an InputError. `when`: "in step 7"."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors are plain RuntimeErrors that begin with a line of its source; NCCL's and the store's have a class.
        if size() == 1 or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        hangs = "timed out" in str(error).lower()
        what = f"has not answered for {TIMEOUT.seconds // 60} minutes" if hangs else "ended (torchrun says below which)"
        raise InputError(
            f"another process of this job {what}, so rank {rank()} cannot go on{when and ' ' + when}. Nothing half-written "
            "is left; the same command with --resume goes on from the last checkpoint."
        ) from None


def first_to_report() -> bool:
    """True in the process that asks first, else False. When one process fails the others follow, each with an error; only
    the first is the cause."""
    try:
        return _store is None or _store.add("reports", 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


# ----------------------------------------------------------------------------------------------------------------- roles


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def progress(*args, **kwargs) -> tqdm:
    """tqdm, which only the main process shows."""
    return tqdm(*args, **kwargs if is_main() else kwargs | {"disable": True})


def barrier() -> None:
    """Waits for all ranks."""
    sum_over_ranks(torch.zeros(()))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block alone, then all others at once: they find the files that it made there, in the
    cache of the hub or in the run's directory. (It must not hold a collective.)"""
    turn = f"turn/{next(_turns)}"
    if not is_main():
        _store.wait([turn], DOWNLOAD)
    yield
    if is_main() and size() > 1:
        _store.set(turn, "over")


# ---------------------------------------------------------------------------------------------------------- sharing work


def deal(items: Sequence) -> Sequence:
    """This rank's items: of n ranks, the r-th gets items r, r + n, r + 2 n, ... So each has as many as the next or one more,
    and of a list that is sorted by length about the same lengths."""
    return items[rank() :: size()]


def rounds(items: int, per_round: int) -> int:
    """How many rounds of at most `per_round` items a rank needs for its share of `items` dealt ones: the most of any rank.
    Passes of a sharded model are collective, so all ranks run this many, the last perhaps on items that do not count."""
    return math.ceil(math.ceil(items / size()) / per_round)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the ranks' x, the same on all of them."""
    if size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the ranks' gradients, in one collective, of parameters that every rank holds whole (plain data parallel).
    Those of sharded ones were added up in the backward pass, and are left alone."""
    parameters = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if size() == 1 or not parameters:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]))
    for p, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def largest(value: float) -> float:
    """The largest of the ranks' numbers. "Has any rank ...?" is largest(0 or 1)."""
    x = torch.tensor(float(value), dtype=torch.float64)
    if size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def gather(value: Any) -> list:
    """What every rank has, in the order of ranks; anything that JSON can hold."""
    if size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(text)]))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: len(text)] = text
    texts = [torch.zeros_like(padded) for _ in range(size())]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, map(int, lengths), strict=True)]


def collect(own: list) -> list:
    """What the ranks made of items that were dealt, in the order of the items again."""
    hands = gather(own)
    return [hand[i] for i in range(len(hands[0])) for hand in hands if i < len(hand)]


# --------------------------------------------------------------------------------------------------------- sharded models


def shard(model: nn.Module, blocks: Iterable[nn.Module], forward: str, device: str) -> None:
    """Splits the rows of all weights over the ranks, in place; `blocks` are gathered one by one, the rest as one more.

    forward: the method of `model` through which all of its parameters are used. Its argument and result must be what a
    forward pass has, as gathering hangs on it. A weight is whole only in there and in the backward pass: in between, after
    an evaluation too, every parameter is a DTensor, so that nothing can read weights from before the last update.

    A model on the meta device stays there; `model.to_empty(device=...)` then takes memory for a rank's own rows alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed, where FSDP's default is the mean: a loss here is divided by the whole step's count.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else by an operation that gloo does not have
    register_fsdp_forward_method(model, forward)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def own(x: Tensor) -> Tensor:
    """This rank's rows of a tensor, to be read and written."""
    return x.to_local() if isinstance(x, DTensor) else x


def own_rows(x: Tensor) -> tuple[int, int]:
    """(first, last + 1) of the rows that this rank has of a tensor with one or more dimensions."""
    if not isinstance(x, DTensor):
        return 0, len(x)
    share = math.ceil(len(x) / size())
    return min(rank() * share, len(x)), min((rank() + 1) * share, len(x))


def _beside(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether x is a plain tensor whose rows belong to this rank's rows of a sharded parameter, as an optimizer's state."""
    return isinstance(parameter, DTensor) and not isinstance(x, DTensor) and x.ndim > 0


def whole_shape(x: Tensor, beside: Tensor | None = None) -> tuple[int, ...]:
    """The shape of `whole(x, beside)`."""
    return (len(beside), *x.shape[1:]) if _beside(x, beside) else tuple(x.shape)


def whole(x: Tensor, beside: Tensor | None = None) -> Tensor:
    """All rows of a tensor, on every rank; collective, if it is sharded. beside: the sharded parameter, if any, of which a
    plain tensor x has this rank's rows; numbers without a dimension are alike on all ranks."""
    if isinstance(x, DTensor):
        return x.full_tensor()
    if not _beside(x, beside):
        return x
    padded = x.new_zeros(math.ceil(len(beside) / size()), *x.shape[1:])
    padded[: len(x)] = x
    hands = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(hands, padded)
    return torch.cat(hands)[: len(beside)]


@torch.no_grad()
def fill(x: Tensor, stored, first: int = 0, beside: Tensor | None = None) -> None:
    """Copies this rank's rows of x from `stored`, a tensor or a slice of a safetensors file; row 0 of the whole x is its row
    `first`. Of a file, no other rows are read. beside: as of `whole`."""
    begin, end = own_rows(beside if _beside(x, beside) else x)
    if begin < end:
        own(x).copy_(stored[first + begin : first + end])


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of the main process; {} on the others, which hold one at a time."""
    result = {}
    for name, tensor in tensors:
        tensor = whole(tensor.detach())
        if is_main():
            result[name] = tensor.cpu()
    return result
