"""Text from a model: sampling, the key-value cache, and answers to many prompts.

A token's keys and values depend only on the tokens before it. So they are computed once and kept, and each new token costs
one pass over itself alone:

    prompt     p0 p1 p2            one pass, fills slots 0 1 2 of the cache
    step 1              a0         one pass, fills slot 3, sees slots 0 .. 3
    step 2                 a1      one pass, fills slot 4, sees slots 0 .. 4

On a GPU a step is a thousand short operations, and the CPU takes longer to launch them than the GPU to compute them. There,
a step is recorded once and then launched as a whole (`RecordedStep`, which you can skip).

Letters: B rows, T tokens, K key-value heads, h head size, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from data import ChatML
from model import Phi
from runtime import memory, parallel

BUCKET = 256  # a recorded step sees a multiple of so many slots


class KVCache:
    """Keys and values of every layer, allocated once. Row b holds its tokens 0 .. length-1 without gaps.

    `slot`: where the next tokens go, a slice if it is the same in every row, else (rows, slots). `used`: how many slots hold
    something once those are stored.
    """

    def __init__(self, size: int):
        self.size = size  # slots in a row
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, [B, K, size, h] each
        self.slot: slice | tuple[Tensor, Tensor] = slice(0, 0)
        self.used = 0

    def layer(self, i: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What layer i calls with the keys and values of its new tokens, to get those of all tokens."""
        return lambda k, v: self.store(i, k, v)

    def store(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, K, t, h] of layer i to the slots; returns its first `used` slots [B, K, used, h]."""
        if i not in self.layers:
            self.layers[i] = tuple(new.new_zeros(*k.shape[:2], self.size, k.shape[3]) for new in (k, v))
        for stored, new in zip(self.layers[i], (k, v)):
            if isinstance(self.slot, slice):
                stored[:, :, self.slot] = new
            else:
                rows, slots = self.slot
                stored[rows, :, slots] = new[:, :, 0]
        keys, values = self.layers[i]
        return keys[:, :, : self.used], values[:, :, : self.used]


def output_logits(hidden: Tensor, layer: nn.Module) -> Tensor:
    """The output layer for a few rows: [B, D] -> [B, V]. It is much taller than wide, and on a CPU the product W x^T reads
    such a W up to four times as fast as x W^T does, if x has two rows or more. With many rows the argmax over the transposed
    logits takes back what that saves."""
    few = hidden.device.type == "cpu" and hidden.dtype == torch.float32 and len(hidden) <= 16
    if not few or type(layer) is not nn.Linear:
        return layer(hidden)
    rows = hidden if len(hidden) > 1 else hidden.repeat(2, 1)
    return torch.addmm(layer.bias[:, None], layer.weight, rows.T).T[: len(hidden)]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Next token ids [B] of logits [B, V]: greedy at temperature 0, else from softmax(logits / temperature) restricted to
    the smallest set of likeliest tokens, at least one, whose probabilities reach `top_p` (nucleus sampling, Holtzman et al.
    2020)."""
    if temperature < 1e-6:  # 0, or so near to it that logits / temperature may overflow
        return logits.argmax(dim=-1)
    p = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True)
        before = sorted_p.cumsum(dim=-1).roll(1, dims=-1)  # the probability of all likelier tokens
        before[:, 0] = -1.0  # the likeliest token stays, whatever top_p is
        # The tolerance is for sums that reach top_p but for their rounding.
        p = torch.zeros_like(p).scatter(1, order, sorted_p.where(before < top_p - 1e-6, 0.0))
    # A race: e_i / p_i is exponential with rate p_i, so token i finishes first with probability p_i. torch.multinomial draws
    # the same tokens, but makes the CPU wait while the GPU checks p.
    e = torch.empty_like(p).exponential_(generator=generator)
    return (p / e).argmax(dim=-1)


class RecordedStep:
    """One pass for one new token a row, recorded as a CUDA graph (on the CPU, for tests, computed anew each time).

    A graph repeats the same operations on the same memory. So token and position are copied to where the graph reads them,
    and the step always sees whole buckets of slots, the later ones masked. For the next bucket it is recorded again.
    """

    def __init__(self, model: Phi, cache: KVCache, rows: Tensor):
        self.model, self.cache, self.rows = model, cache, rows
        self.token = torch.zeros_like(rows)[:, None]  # [B, 1]
        self.position = torch.zeros_like(rows)[:, None]  # [B, 1]
        self.graph = None
        self.hidden = None  # the graph's result

    def __call__(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """token, position [B], slots used with this token -> [B, D]. The next call overwrites it."""
        self.token[:, 0] = token
        self.position[:, 0] = position
        end = whole_buckets(used)
        if end != self.cache.used:
            self.cache.slot, self.cache.used = (self.rows, self.position[:, 0]), end  # a view: it follows the position
            return self.record() if token.is_cuda else self.compute()
        if self.graph is None:
            return self.compute()
        self.graph.replay()
        return self.hidden

    def compute(self) -> Tensor:  # [B, D]
        later = torch.arange(self.cache.used, device=self.token.device) > self.position  # [B, used]
        zeros = torch.zeros(later.shape, dtype=self.model.compute_dtype(), device=later.device)
        mask = zeros.masked_fill_(later, float("-inf"))
        return self.model.hidden(self.token, self.position, mask[:, None, None], self.cache)[:, 0]

    def record(self) -> Tensor:
        """Computes the step once, which also compiles Triton's kernels, and then records it. Both on one stream other than
        the present one, since cuBLAS keeps some memory for each."""
        stream, present = recording_stream(self.token.device), torch.cuda.current_stream(self.token.device)
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            hidden = self.compute()
        present.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.hidden = self.compute()
        return hidden


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def whole_buckets(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET


def can_record(model: Phi) -> bool:
    """LLM.int8() chooses columns by what is in them, which the CPU must know; autocast drops copies that a graph reads."""
    on_cuda = model.lm_head.bias.is_cuda and not torch.is_autocast_enabled("cuda")
    return on_cuda and all(getattr(layer, "threshold", None) is None for layer in model.modules())


@torch.inference_mode()  # holds while a step is computed; the consumer, between two of them, keeps its own mode
def stream(
    model: Phi, prompts: list[list[int]], max_new_tokens: int, temperature=0.0, top_p=1.0, seed=0, stop_tokens=(), graph=None
) -> Iterator[Tensor]:
    """Continues each prompt and yields every step's token ids [B], the next step being computed when it is asked for. Ends
    when every row has had a stop token, with `graph` up to 15 steps later; what a row gets after its own has no meaning.
    `graph`: whether a step is a `RecordedStep`; default: if `can_record`.

    Prompts of different lengths run as one batch, padded on the right. Row b's cache has no gaps: its next token is
    written at its own length, over the padding, so positions need no correction and each row sees just its own tokens.
    """
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("generate needs at least one prompt, no empty one, and max_new_tokens >= 1")
    device = model.lm_head.bias.device
    generator = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(stop_tokens, dtype=torch.long, device=device)
    length = torch.tensor([len(p) for p in prompts], device=device)  # [B]
    rows = torch.arange(len(prompts), device=device)
    T = max(map(len, prompts))
    ragged = min(map(len, prompts)) < T

    graph = can_record(model) if graph is None else graph
    cache = KVCache(whole_buckets(T + max_new_tokens) if graph else T + max_new_tokens)
    recorded = RecordedStep(model, cache, rows) if graph else None
    cache.slot, cache.used = slice(0, T), T
    padded = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)  # [B, T]
    hidden = model.hidden(padded, cache=cache)  # causal: a token never sees the padding to its right
    hidden = hidden[rows, length - 1]  # [B, T, D] -> [B, D], of each row's last token
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = sample(output_logits(hidden, model.lm_head), temperature, top_p, generator)  # [B]
        yield token
        done |= torch.isin(token, stops)
        look = not graph or step % 16 == 0  # the CPU waits for the GPU to know whether all are done
        if step == max_new_tokens - 1 or (look and done.all()):
            return
        position = length + step  # [B]
        used = T + step + 1
        if graph:
            hidden = recorded(token, position, used)  # [B, D]
            continue
        mask = None
        cache.slot, cache.used = slice(used - 1, used), used
        if ragged:
            cache.slot = (rows, position)
            visible = torch.arange(used, device=device) <= position[:, None]  # [B, used]
            mask = visible[:, None, None]  # [B, 1, 1, used]
        hidden = model.hidden(token[:, None], position[:, None], mask, cache)[:, 0]  # [B, D]


def generate(
    model: Phi, prompts: list[list[int]], max_new_tokens: int, temperature=0.0, top_p=1.0, seed=0, stop_tokens=(), graph=None
) -> list[list[int]]:
    """`stream` in one go; returns only the new tokens of each prompt, up to and without the first stop token."""
    steps = list(stream(model, prompts, max_new_tokens, temperature, top_p, seed, stop_tokens, graph))
    answers = torch.stack(steps, dim=1).tolist()  # [B, new]
    return [ids[: next((i for i, t in enumerate(ids) if t in stop_tokens), len(ids))] for ids in answers]


def rows_that_fit(model: Phi, size: int) -> int:
    """Rows of `size` slots whose keys and values take at most half of the free memory, rounded down to a power of two, so
    that the batches, and what is sampled in them, seldom depend on it. At least 1; on all ranks the same."""
    config, device = model.config, model.lm_head.bias.device
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * model.compute_dtype().itemsize
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
    fitting = (memory.free_bytes(str(device)) - held) // (2 * slot * whole_buckets(size))
    if parallel.size() > 1:
        fitting = min(parallel.gather(fitting))
    return 1 << max(fitting.bit_length() - 1, 0)


def sample_answers(
    model: Phi, chat: ChatML, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int, batch_size=128
) -> tuple[list[str], list[bool]]:
    """One sampled answer to each prompt, as text without the `<|im_end|>`, and whether it ended by itself. Batches have
    fewer than `batch_size` prompts if memory asks for it."""
    stops = tuple(chat.control_ids)
    made = []
    batch_size = min(batch_size, rows_that_fit(model, max(map(len, prompts), default=0) + max_new_tokens))
    # Ranks share whole batches: what is drawn depends on the batch and its seed, not on who draws it.
    starts = range(0, len(prompts), batch_size)[parallel.rank() :: parallel.size()]
    for start in tqdm(starts, desc="sampling", unit="batch", leave=False, disable=None if parallel.is_main() else True):
        batch = prompts[start : start + batch_size]
        made.append(generate(model, batch, max_new_tokens, temperature, seed=seed + start, stop_tokens=stops))
    if parallel.size() > 1:
        made = parallel.collect(made)
    answers = [ids for batch in made for ids in batch]
    return [chat.decode(ids) for ids in answers], [len(ids) < max_new_tokens for ids in answers]
