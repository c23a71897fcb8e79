"""Text from a model: sampling, the key-value cache, and answers to many prompts.

A token's keys and values depend only on the tokens before it. So they are computed once and kept, and each new token costs
one pass over itself alone:

    prompt     p0 p1 p2            one pass, fills slots 0 1 2 of the cache
    step 1              a0         one pass, fills slot 3, sees slots 0 .. 3
    step 2                 a1      one pass, fills slot 4, sees slots 0 .. 4

Letters: B rows, T tokens, K key-value heads, h head size, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from data import ChatML
from model import Phi
from runtime import parallel


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
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.inference_mode()  # holds while a step is computed; the consumer, between two of them, keeps its own mode
def stream(
    model: Phi, prompts: list[list[int]], max_new_tokens: int, temperature=0.0, top_p=1.0, seed=0, stop_tokens=()
) -> Iterator[Tensor]:
    """Continues each prompt and yields every step's token ids [B], the next step being computed when it is asked for. Ends
    when every row has had a stop token; what a row gets after its own has no meaning.

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
    T = int(length.max())
    ragged = bool((length != T).any())

    cache = KVCache(T + max_new_tokens)
    cache.slot, cache.used = slice(0, T), T
    padded = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)  # [B, T]
    hidden = model.hidden(padded, cache=cache)  # causal: a token never sees the padding to its right
    hidden = hidden[rows, length - 1]  # [B, T, D] -> [B, D], of each row's last token
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = sample(model.lm_head(hidden), temperature, top_p, generator)  # [B]
        yield token
        done |= torch.isin(token, stops)
        if step == max_new_tokens - 1 or done.all():
            return
        position = length + step  # [B]
        mask = None
        cache.used = T + step + 1
        cache.slot = slice(T + step, T + step + 1)
        if ragged:
            cache.slot = (rows, position)
            visible = torch.arange(cache.used, device=device) <= position[:, None]  # [B, used]
            mask = visible[:, None, None]  # [B, 1, 1, used]
        hidden = model.hidden(token[:, None], position[:, None], mask, cache)[:, 0]  # [B, D]


def generate(
    model: Phi, prompts: list[list[int]], max_new_tokens: int, temperature=0.0, top_p=1.0, seed=0, stop_tokens=()
) -> list[list[int]]:
    """`stream` in one go; returns only the new tokens of each prompt, up to and without the first stop token."""
    steps = list(stream(model, prompts, max_new_tokens, temperature, top_p, seed, stop_tokens))
    answers = torch.stack(steps, dim=1).tolist()  # [B, new]
    return [ids[: next((i for i, t in enumerate(ids) if t in stop_tokens), len(ids))] for ids in answers]


def sample_answers(
    model: Phi, chat: ChatML, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int, batch_size=128
) -> tuple[list[str], list[bool]]:
    """One sampled answer to each prompt, as text without the `<|im_end|>`, and whether it ended by itself."""
    stops = tuple(chat.control_ids)
    made = []
    # Ranks share whole batches: what is drawn depends on the batch and its seed, not on who draws it.
    starts = range(0, len(prompts), batch_size)[parallel.rank() :: parallel.size()]
    for start in tqdm(starts, desc="sampling", unit="batch", leave=False, disable=None if parallel.is_main() else True):
        batch = prompts[start : start + batch_size]
        made.append(generate(model, batch, max_new_tokens, temperature, seed=seed + start, stop_tokens=stops))
    if parallel.size() > 1:
        made = parallel.collect(made)
    answers = [ids for batch in made for ids in batch]
    return [chat.decode(ids) for ids in answers], [len(ids) < max_new_tokens for ids in answers]
