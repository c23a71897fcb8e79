"""Phi-2 in plain PyTorch: the network, and the log-probability that it gives to a completion.

    tokens -> embedding -> 32 blocks -> LayerNorm -> output layer -> logits
    block:    x <- x + Attention(LN(x)) + MLP(LN(x))

What sets Phi-2 (Microsoft 2023) apart from GPT-2: attention and MLP run in parallel, on the output of one LayerNorm;
positions enter as rotations of queries and keys, and only the first 32 of a head's 80 dimensions turn; every linear layer
has a bias, the output layer too; and that layer does not share its weights with the embedding.

Parameters are named as in the Hugging Face checkpoint: loading copies by name, and transformers loads what `save_pretrained`
writes. Phi-2's config asks for dropout 0.1; there is none here, or DPO's policy and reference would differ from the start.

Letters: B rows, T tokens, D width, H heads, K key-value heads, h head size, r rotating dimensions of a head, V vocabulary,
M predicted tokens, N completions, E examples.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import quant_kernels
from data import Batch, Example, Segments, by_length, collate
from runtime import parallel
from runtime.files import InputError, printable, read_json

LOGIT_CHUNK = {"cpu": 2**24, "cuda": 2**26}  # logits that exist at a time in log-probabilities: 67 and 268 MB in fp32


@dataclass
class PhiConfig:
    """The fields of config.json that shape the network, with Phi-2's values; all other fields are kept in `other`."""

    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # as many as heads
    partial_rotary_factor: float = 0.4
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    other: dict = field(default_factory=dict)

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        D, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if D % H or H % K:
            raise ValueError(f"hidden_size {D}, num_attention_heads {H}, num_key_value_heads {K} do not divide each other")
        self.head_size = D // H
        self.rotary_size = int(self.head_size * self.partial_rotary_factor)
        if self.rotary_size not in range(2, self.head_size + 1, 2):
            raise ValueError(f"partial_rotary_factor cannot turn {self.rotary_size} of a head's {self.head_size} dimensions")

    @classmethod
    def from_dict(cls, raw: dict) -> "PhiConfig":
        """From the content of a config.json, in any of the forms that it has had. InputError if it is not a Phi's."""
        from runtime.weights import config_from

        return config_from(cls, raw, "config.json")

    def to_dict(self) -> dict:
        """The content of config.json, in the form that every version of transformers reads."""
        from runtime.weights import FIXED

        own = asdict(self)
        return own.pop("other") | own | FIXED | {"model_type": "phi", "architectures": ["PhiForCausalLM"]}


def rotary_angles(position: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles  position * theta^(-2i/r),  i = 0 .. r/2-1  (RoFormer, Su et al. 2021, eq. 15).

    position [B, T], size r -> two tensors [B, 1, T, r/2]. The angles are fp32 whatever the dtype of the result.
    """
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=position.device) / size)  # [r/2]
    angle = position[:, None, :, None].float() * frequency  # [B, 1, T, r/2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns dimensions i and i + r/2 of each head, as a point in the plane, by the i-th angle of the token's position; the
    dimensions from r on stay. So the score of a query and a key depends on the distance of their positions alone.

    x [B, H, T, h], cos and sin [B, 1, T, r/2] -> [B, H, T, h]
    """
    if x.is_cuda and x.shape[2] == 1 and not x.requires_grad and quant_kernels.triton_runs(x.device):
        return quant_kernels.rotate_one(x, cos, sin)
    half = cos.shape[-1]
    left, right, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


def sibling_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom where several completions follow one prompt (the layout is drawn in data.py):

        t sees s  <=>  s <= t, and s is in the prompt or in the segment of t

    segment [B, T] -> [B, 1, T, T], to be added to the scores: 0 where t sees s, else -inf.
    """
    same_segment = segment[:, :, None] == segment[:, None, :]  # [B, T, T]
    seen = same_segment | (segment[:, None, :] == 0)  # [B, T, T], later tokens too
    return torch.zeros((), dtype=dtype, device=seen.device).where(seen.tril(), float("-inf"))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None) -> Tensor:
    """softmax(q k^T / sqrt(h) + mask) v:  q [B, H, T, h], k and v [B, K, S, h] -> [B, H, T, h]. Without a mask a token sees
    itself and all tokens before it."""
    grouped = q.shape[1] != k.shape[1]  # several query heads to a key-value head
    if isinstance(mask, Segments):
        return attend_by_segment(q, k, v, mask)
    causal = mask is None and q.shape[2] > 1  # a single token sees all of the cache
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


@functools.cache
def has_varlen(device: torch.device, head_size: int) -> bool:
    """Whether FlashAttention's kernel runs there: Ampere or newer, heads of a multiple of 8 up to 256."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return ampere and head_size % 8 == 0 and head_size <= 256


def attend_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same for a batch without padding, B = 1, by FlashAttention's kernel for sequences of unequal length (Dao 2023): no
    mask, and no work for what a segment does not see. The last query of a segment sees all of its keys."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [n, H, h], [n, K, h], [n, K, h]
    k, v = (x[segments.seen].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [K, H, h] each
    starts = segments.query_starts, segments.key_starts
    y = varlen_attn(q, k, v, *starts, *segments.longest, window_size=(-1, 0))  # [n, H, h]
    return y.transpose(0, 1)[None]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(h) + mask) v  for each head, with rotated q and k."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_size)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_size)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_size)
        self.dense = nn.Linear(config.num_attention_heads * config.head_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, cache: Callable | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D], under a mask of `attend`."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # [B, H, T, h]
        k = self.k_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # [B, K, T, h]
        v = self.v_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # [B, K, T, h]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache(k, v)  # of all tokens so far
        y = attend(q, k, v, mask)  # [B, H, T, h]
        return self.dense(y.transpose(1, 2).flatten(2))  # [B, T, H h] -> [B, T, D]


class MLP(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, cache: Callable | None = None) -> Tensor:
        normed = self.input_layernorm(x).to(cos.dtype)  # [B, T, D], cast once to the products' dtype
        return x + self.self_attn(normed, cos, sin, mask, cache) + self.mlp(normed)


class Phi(nn.Module):
    """The whole network."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: the backward pass computes a block's activations anew, none are kept
        self.origin = None  # where the weights came from (lora.Origin)
        # nn.Embedding(V, D) would draw random values; on the meta device that imports torch's compiler, seconds of work.
        embedding = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.hidden_size), freeze=False)
        layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "final_layernorm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:  # [B, T] -> logits [B, T, V]
        return self.lm_head(self.hidden(input_ids))

    def hidden(self, tokens: Tensor, position: Tensor | None = None, mask=None, cache=None) -> Tensor:
        """Outputs [B, T, D] of the last LayerNorm for tokens [B, T] at `position` [B, T] (default 0 .. T-1), under a mask of
        `sibling_mask` or causal. `cache` (generate.KVCache) holds the keys and values of earlier tokens."""
        if cache is not None and self.gradient_checkpointing:
            raise ValueError("gradient checkpointing runs a block twice, and would fill the cache twice: turn it off")
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.model.embed_tokens(tokens)  # [B, T, D]
        cos, sin = rotary_angles(position, self.config.rotary_size, self.config.rope_theta, self.compute_dtype())
        again = self.gradient_checkpointing and torch.is_grad_enabled()  # the backward pass will run each block again,
        random = again and any(getattr(layer, "dropout", 0) for layer in self.modules())  # and adapters drop the same inputs
        for i, block in enumerate(self.model.layers):
            if again:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=random)
            else:
                x = block(x, cos, sin, mask, cache and cache.layer(i))
        return self.model.final_layernorm(x)

    def predicting(self, batch: Batch) -> Tensor:
        """The outputs [M, D] of the last LayerNorm that predict the tokens of a batch's completions."""
        if self.compute_dtype() == torch.bfloat16 and has_varlen(batch.tokens.device, self.config.head_size):
            kept = batch.segments.kept
            tokens, position = (x.flatten()[None, kept] for x in (batch.tokens, batch.position))  # [1, n]
            return self.hidden(tokens, position, batch.segments)[0, batch.segments.source]  # [n, D] -> [M, D]
        mask = sibling_mask(batch.segment, self.compute_dtype()) if batch.needs_mask else None
        return self.hidden(batch.tokens, batch.position, mask).flatten(0, 1)[batch.source]  # [B, T, D] -> [M, D]

    def logprobs(self, batch: Batch) -> Tensor:
        """`completion_logprobs`. A method, since the weights of a sharded model are whole only while one of its own runs."""
        head, compute = self.lm_head, self.compute_dtype()
        hidden = self.predicting(batch)  # [M, D]
        weight = head.dense() if hasattr(head, "dense") else head.weight  # a quantized output layer holds codes
        with torch.autocast(weight.device.type, enabled=False):
            logprobs = TokenLogProbs.apply(hidden, weight, head.bias, batch.target, compute)  # [M]
            # Hundreds of tokens sum to -1000 nats and more, where fp32 has steps of 1e-4: the running sum is kept in fp64.
            sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=logprobs.device)
            return sums.index_add(0, batch.owner, logprobs.double()).float()  # [N]

    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products: autocast's where it is on, else that of the weights which are never quantized."""
        norm = self.model.final_layernorm.weight
        kind = norm.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else norm.dtype

    def init_weights(self, seed: int) -> "Phi":
        """Random weights, drawn as transformers draws them: N(0, initializer_range), biases 0, LayerNorm 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, self.config.initializer_range, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, dtype=torch.float32, device="cpu", revision=None, base=None) -> "Phi":
        """The model in a directory or a Hugging Face repository, whatever dtype it is stored in. Adapters (lora.py) come
        with the model under them. `base`: one of quant.FORMATS, to quantize the linear layers as they are read."""
        from lora import find_origin, load_lora
        from runtime.weights import load_weights, resolve

        origin = find_origin(resolve(path_or_repo, revision), base)
        with torch.device("meta"):
            model = cls(read_config(origin.directory))
        model.origin = origin
        load_weights(model, origin.directory, dtype, device, to=origin.format)
        return load_lora(model, origin.adapters).eval() if origin.adapters else model.eval()

    @classmethod
    def sharded(cls, directory: Path, device: str, bf16: bool = False) -> "Phi":
        """A model in fp32 of which this rank reads and holds its rows alone. `bf16`: blocks are gathered in bf16."""
        from runtime.weights import load_weights

        with torch.device("meta"):
            model = cls(read_config(directory))
        parallel.shard(model, model.model.layers, "logprobs", device, bf16)
        load_weights(model.to_empty(device=device), directory)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and the weights, or only the adapters if there are any (PEFT's format). All ranks call this."""
        from lora import lora_layers, save_lora
        from runtime.weights import save_weights

        config = self.config.to_dict()
        if not lora_layers(self):
            save_weights(self, Path(directory), config)
        elif parallel.is_main():
            save_lora(self, Path(directory), self.origin)


def read_config(directory: Path) -> PhiConfig:
    """The config of the model in a directory or, if that holds adapters, of the model under them."""
    from lora import base_directory
    from runtime.weights import config_from

    path = base_directory(directory) / "config.json"
    return config_from(PhiConfig, read_json(path), str(path))


def fit_window(settings: Any, directory: Path) -> Any:
    """A tuning stage's settings with rows no longer than the window of the model in a directory. InputError if longer ones
    were asked for; the default, Phi-2's window, is lowered, and a line says so."""
    window = read_config(directory).max_position_embeddings
    if settings.max_length <= window:
        return settings
    told = f"--max-length {window} --max-prompt-length {window // 2}"
    if settings.max_length != PhiConfig.max_position_embeddings:
        raise InputError(f"--max-length {settings.max_length}: {directory} has a window of {window} tokens; give {told}")
    print(printable(f"{directory} has a window of {window:,} tokens: as with {told}"))
    return replace(settings, max_length=window, max_prompt_length=min(settings.max_prompt_length, window // 2))


def completion_logprobs(model: Phi, batch: Batch) -> Tensor:
    """log pi(completion | prompt) [N] in nats, fp32: the sum over the completion's tokens, `<|im_end|>` included.

    The one log-probability of this project: SFT, DPO, its reference, multiple choice and evaluation all call it. Summed, not
    averaged: DPO's derivation (Rafailov et al. 2023, eq. 5) needs the probability of the whole answer.
    """
    return model.logprobs(batch)


class TokenLogProbs(torch.autograd.Function):
    """log p(target_m) = logit_target - logsumexp(logits), m = 1 .. M, without ever holding all M x V logits: 410 MB in fp32
    for 2,000 of Phi-2's tokens, and as much again for their softmax and their gradient.

    The output layer runs on a chunk of tokens at a time, and once more in the backward pass. With p = softmax(logits),

        d/dlogits = g_m (onehot(target_m) - p),    d/dh = d/dlogits W,    d/dW = (d/dlogits)^T h,    d/db = its sum.

    The factors of the products are rounded to `compute`; everything else, the sums over chunks too, is fp32.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, compute: torch.dtype) -> Tensor:
        """h [M, D], weight [V, D], bias [V], target [M] -> [M] fp32"""
        logprobs = torch.empty(len(h), device=h.device)
        logsumexp = torch.empty_like(logprobs)
        for part, logits in chunks_of_logits(h.to(compute), weight.to(compute), bias):
            logsumexp[part] = logits.logsumexp(dim=-1)
            logprobs[part] = logits.gather(1, target[part, None])[:, 0] - logsumexp[part]
        ctx.save_for_backward(h, weight, bias, target, logsumexp)
        ctx.compute = compute
        return logprobs

    @staticmethod
    def backward(ctx, grad: Tensor):
        h, weight, bias, target, logsumexp = ctx.saved_tensors
        W, x = weight.to(ctx.compute), h.to(ctx.compute)
        grad_h = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for part, logits in chunks_of_logits(x, W, bias):
            p = logits.sub_(logsumexp[part, None]).exp_()  # [m, V]
            d = p.mul_(-grad[part, None]).scatter_add_(1, target[part, None], grad[part, None])  # d/dlogits [m, V]
            grad_bias += d.sum(dim=0)
            d = d.to(ctx.compute)
            grad_h[part] = fp32_product(d, W)
            if grad_weight is not None and d.dtype == torch.float32:
                grad_weight.addmm_(d.T, x[part])  # in place: no second [V, D]
            elif grad_weight is not None:
                grad_weight += fp32_product(d.T, x[part])
        return grad_h, grad_weight, grad_bias, None, None


def chunks_of_logits(h: Tensor, W: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows of h, their logits [m, V] in fp32), a few rows at a time."""
    size = max(1, LOGIT_CHUNK[h.device.type] // len(W))
    for i in range(0, len(h), size):
        part = slice(i, i + size)
        yield part, fp32_product(h[part], W.T).add_(bias)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32: factors of 16 bits are multiplied exactly, and their sum is not rounded to 16 bits."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def autocast(device: str, dtype: str) -> torch.autocast:
    """bf16 products over fp32 weights for dtype "bf16", plain fp32 for "fp32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")


@torch.no_grad()
def all_logprobs(model: Phi, examples: Sequence[Example], batch_size: int, device: str, dtype: str, label: str) -> Tensor:
    """`completion_logprobs` of a whole data set: [E, completions per example] in the examples' order, fp32, on the CPU.
    Several ranks share the work, and each gets the whole table."""
    rounds = parallel.deal(by_length(examples), batch_size)  # similar lengths together: little padding
    table = torch.zeros(len(examples), len(examples[0].completions))
    for part in tqdm(rounds, desc=label, unit="batch", leave=False, disable=None if parallel.is_main() else True):
        batch = collate([examples[k] for k in part or [0]]).to(device)  # a rank with none left joins in with the first
        with autocast(device, dtype):
            logprobs = completion_logprobs(model, batch)
        if part:
            table[part] = logprobs.view(len(part), -1).cpu()
    return parallel.sum_over_ranks(table) if parallel.size() > 1 else table
