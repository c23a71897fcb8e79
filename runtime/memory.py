"""The memory that a training step needs, estimated from shapes before anything is loaded, and measured while it runs.

Training all weights in fp32 takes 16 bytes a parameter, 44.5 GB for Phi-2, whatever the batch:

    weights      4    (2 in bf16, 0.56 in nf4)
    gradients    4 }  of the trained parameters: all, or with --lora the adapters, about 1 in 100
    AdamW        8 }  (2.03 with --optimizer adamw8bit)

The rest grows with n, the tokens of the largest micro-batch, padding included. The forward pass keeps *activations* for the
backward pass. With L blocks of width D, c bytes a value and an MLP four times as wide, a block keeps per token

    x, LN(x), q, k, v, attention's output and its copy for the next product      7 D
    the MLP's hidden layer before and after GELU                                 8 D

in all 15 L n D c bytes. With --gradient-checkpointing a block keeps x alone, and computes the others again when the backward
pass reaches it. *Temporary buffers* live for one operation: logits, products of a backward pass, a decoded weight. The peak
is in the output layer, with all activations; or where the last block's backward pass begins; or at the first block, with all
gradients and one block's activations. The estimate is the largest of the three, without what adds less than 2% (attention
masks, grouped heads). On the CPU it is within 15% of the peaks that tests/runtime/test_memory.py measures; on an H200 it was
within 13% of the three in docs/adapters-and-memory.md and docs/speed.md.
"""

import contextlib
import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from data import Example
from lora import find_origin
from model import LOGIT_CHUNK, PhiConfig, read_config
from runtime import parallel
from runtime.files import InputError
from runtime.flags import flag_name
from runtime.settings import Tuning

# Bits of a weight with its share of the scales: 32 bits for 64 weights; in nf4-double 8, and 32 for 64 x 256.
BITS = {"int8": 8, "llm.int8": 8, "nf4": 4.5, "nf4-double": 4.127, "fp4": 4.5, "int4": 4.5, "nf2": 2.5}
LIBRARIES = 100_000_000  # bytes that a CPU process loads between the estimate and its first steps


def parameters(phi: PhiConfig) -> int:
    """Embedding and output layer, L + 1 LayerNorms, and the blocks' matrices with their biases."""
    D, inner, V, L = phi.hidden_size, phi.intermediate_size, phi.vocab_size, phi.num_hidden_layers
    return 2 * V * D + V + 2 * D * (L + 1) + L * (4 * (D * D + D) + 2 * D * inner + inner + D)


def largest_micro_batch(settings: Tuning, examples: Sequence[Example]) -> int:
    """Its tokens, padding included. Micro-batches hold similar lengths, so all rows may be as long as the longest."""
    longest = min(max(map(len, examples)), settings.max_length * (2 if settings.objective == "dpo" else 1))
    rows = min(settings.micro_batch_size, settings.batch_size, len(examples))
    return rows * longest


def estimate(phi: PhiConfig, settings: Tuning, tokens: int) -> dict[str, int]:
    """The bytes on its device at a step's peak, {what they hold: bytes}. `tokens`: of the largest micro-batch."""
    D, inner, V, L = phi.hidden_size, phi.intermediate_size, phi.vocab_size, phi.num_hidden_layers
    cuda = settings.device.startswith("cuda")
    bf16 = settings.dtype == "bf16"
    full = not settings.lora
    ranks = parallel.shards() if full and parallel.size() > 1 else 1  # which share weights, gradients and moments
    matrices = 4 * D * D + 2 * D * inner  # weights of a block
    c = 2 if bf16 else 4  # bytes of a value in a product
    s = 2 if bf16 and settings.base in ("bf16", *BITS) else 4  # bytes of a weight that is not quantized, and of x
    trained = parameters(phi) if full else L * settings.lora * (10 * D + 2 * inner)  # A [r, I] and B [O, r] of six [O, I]
    weights = s * parameters(phi) / ranks + (0 if full else 4 * trained)
    weights += L * matrices * (BITS.get(settings.base, 8 * s) / 8 - s)
    weights += 4 * 2 * (matrices + V * D) * (ranks > 1)  # two blocks, embedding and output layer are gathered at a time
    gradients = 4 * trained / ranks
    moments = (2.03 if settings.optimizer == "adamw8bit" else 8) * trained / ranks

    block = tokens * ((4 if cuda and bf16 else s) * D + c * (6 * D + 2 * inner))  # on CUDA LN keeps x in fp32
    if not full and "fc2" not in (settings.lora_targets or "fc2"):
        block -= tokens * c * inner  # a frozen matrix without an adapter does not need its input
    if settings.lora_dropout:  # each adapted layer keeps its mask and its own input
        block += tokens * c * (7 * D + inner)
    copies = c * matrices if settings.stage == "qat" or (bf16 and s == 4) else 0  # of a block's weights: rounded, or in bf16
    checkpointing = settings.gradient_checkpointing
    kept = (L + 2) * tokens * s * D if checkpointing else L * block

    head = 4 * V * D * full  # the gradient of the output layer, or of the embedding
    output = head + V * D * (c * (c != s) + 4 * (bf16 and (full or not cuda)))  # bf16 copy, fp32 product
    chunk = LOGIT_CHUNK["cuda" if cuda else "cpu"]
    output += 8 * V * min(tokens, max(1, chunk // V))  # logits of some tokens, and their exponentials
    work = tokens * (3 * c * inner + 16 * D) + 8 * D * inner * (settings.base in BITS or (full and bf16))
    work += 14 * D * inner * (settings.stage == "qat" and cuda)  # rounds a matrix at a time
    several = settings.batch_size > settings.micro_batch_size * parallel.size()
    live = copies * (L if full or not checkpointing else 0)  # frozen weights' are made anew in the backward pass
    output_layer = (gradients * several, kept, live, output)
    last_block = (gradients if several else head, kept + checkpointing * block, copies * (1 if checkpointing else L), work)
    first_block = (gradients, block, copies, max(work, head))
    names = ("gradients", "activations", "copies of weights", "temporary buffers")
    peak = dict(zip(names, max(output_layer, last_block, first_block, key=sum)))
    return {name: int(size) for name, size in {"weights": weights, "AdamW's moments": moments, **peak}.items() if size}


def resident() -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


def most_resident() -> int:
    """The most that it has held (Linux)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def free_bytes(device: str) -> int:
    """The most that this process can hold, what it holds now included. The processes on one CPU share what is free."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // parallel.size() + resident()


def watch_peak(device: str) -> Callable[[], int | None]:
    """Starts watching; returns a function that gives the peak since then: of tensors on CUDA, otherwise of the process. It
    gives None where that cannot be known."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return partial(torch.cuda.max_memory_allocated, device)
    with contextlib.suppress(OSError):  # only Linux has these files
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
        most_resident()
        return most_resident
    return lambda: None


@dataclass
class Need:
    parts: dict[str, int]  # {what they hold: bytes}
    total: int
    free: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        return f"a training step needs about {self.total / 1e9:.1f} GB ({parts}); {self.free / 1e9:.1f} GB are free"


def find_need(directory: Path, settings: Tuning, examples: Sequence[Example]) -> Need:
    """What tuning the model in `directory` needs; on the CPU, the process and the libraries that it will load included."""
    phi = read_config(directory)
    stored = phi.other.get("quantization_config", {})  # the files may hold quantized weights, or adapters of such
    code = "int8" if stored.get("load_in_8bit") else stored.get("code") or stored.get("bnb_4bit_quant_type")
    if settings.lora and not settings.base:
        settings = replace(settings, base=code or find_origin(directory).format)
    parts = estimate(phi, settings, largest_micro_batch(settings, examples))
    if not settings.device.startswith("cuda"):
        parts["process"] = resident() + LIBRARIES
    return Need(parts, sum(parts.values()), free_bytes(settings.device))


def check_fits(directory: Path, settings: Tuning, examples: Sequence[Example]) -> Need:
    """What the run needs. InputError if less is free, with the flags that would help."""
    need = find_need(directory, settings, examples)
    if need.total > need.free:
        raise InputError(f"{need} on {settings.device}.\n{way_out(directory, settings, examples)}")
    if not settings.device.startswith("cuda") and need.total > 10**9:
        # glibc keeps freed blocks of up to 32 MB for later, and a step took twice its tensors. Now it returns those of 1 MB.
        with contextlib.suppress(OSError, AttributeError, TypeError):  # there may be another C library
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    return need


def way_out(directory: Path, settings: Tuning, examples: Sequence[Example]) -> str:
    """The flags with which a run would fit with a tenth to spare. First those that cost only time are tried, then adapters
    and fewer bits, then shorter examples."""
    if settings.resume:
        return "A resumed run keeps its settings, so it needs more free memory."
    mild = {"gradient_checkpointing": True, "micro_batch_size": 1}
    ways = [{"gradient_checkpointing": True}, mild, mild | {"optimizer": "adamw8bit"}]
    if settings.stage != "qat":
        lora = mild | {"lora": settings.lora or 16}
        ways.append(lora)
        if settings.base in (None, "fp32"):
            ways += [lora | {"base": "bf16", "dtype": "bf16"}, lora | {"base": "nf4"}]
    for n in (settings.max_length // 2, settings.max_length // 4, settings.max_length // 8):
        ways.append(ways[-1] | {"max_length": n, "max_prompt_length": min(settings.max_prompt_length, n // 2)})
    for way in ways:
        need = find_need(directory, replace(settings, **way), examples)
        if 1.1 * need.total <= need.free:
            flags = [(flag_name(name), value) for name, value in way.items() if value != getattr(settings, name)]
            words = [name if value is True else f"{name} {value}" for name, value in flags]
            return f"It would fit, with {need.total / 1e9:.1f} GB, if you add\n  {' '.join(words)}"
    return f"No flag makes it fit: with all that save memory it still needs {need.total / 1e9:.1f} GB."
