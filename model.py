"""Phi-2 in plain PyTorch: network, weights in and out (adapters of lora.py too), log-probabilities, generation.

Phi-2 (Microsoft 2023) is a decoder-only transformer whose block computes attention and MLP *in parallel* from one
LayerNorm, x <- x + Attention(LN(x)) + MLP(LN(x)); rotary positions turn only the first part of each head (32 of 80
dimensions); every linear layer, the output layer too, has a bias; input and output embeddings are not tied.

Parameter names and config.json are those of the Hugging Face checkpoints, so loading is a dictionary copy and what
`save_pretrained` writes loads in transformers.

There are no dropout layers. Phi-2's config asks for dropout 0.1, but DPO compares a policy with its reference, and with
dropout the two would differ before the first step; the fields are kept and written back, never applied.

Letters: B rows, T tokens, D width, H heads, K key-value heads, h head size, V vocabulary, M predicted tokens, N completions.
"""

import functools
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data import Batch
from lora import add_lora as add_lora
from lora import base_format, load_lora, lora_layers, save_lora
from lora import merge_lora as merge_lora
from lora import unmerge_lora as unmerge_lora
from quant import SKIP, FrozenLinear, compute_dtype, quantize_layer, use_kernels
from runtime import parallel
from runtime.coded import checkpoint_config, coded_layers, layer_from_tensors, layer_tensors
from runtime.files import InputError, read_json, write_json
from runtime.weights import (
    ADAPTER_CONFIG,
    base_directory,
    is_adapter,
    modern_rows,
    modern_tensors,
    resolve,
    save_tensors,
    stored_tensors,
)

LOGIT_CHUNK = 2**24  # logits alive at a time in `completion_logprobs`: 64 MB in fp32


# ------------------------------------------------------------------------------------------------------------- config


@dataclass
class PhiConfig:
    """The fields of config.json that the network depends on; the rest of the file travels along in `other`."""

    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    partial_rotary_factor: float = 0.4
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    other: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for f in fields(self):
            value, wanted = getattr(self, f.name), (int, float) if f.type is float else int
            if f.name != "other" and (not isinstance(value, wanted) or isinstance(value, bool) or value <= 0):
                raise InputError(f"{f.name} is {value!r}, not a positive number")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads} and "
                f"num_key_value_heads {self.num_key_value_heads} do not divide each other"
            )
        if self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size:
            raise InputError(
                f"partial_rotary_factor {self.partial_rotary_factor} turns {self.rotary_size} of a head's "
                f"{self.head_size} dimensions; an even number of them is needed"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "PhiConfig":
        """Reads the current form (model_type "phi") and the older one ("phi-msft", with n_embd, n_layer, ...).

        InputError if it is not Phi or asks for something that this network does not compute.
        """
        raw = dict(raw)
        if raw.get("model_type") not in ("phi", "phi-msft"):
            raise InputError(f"{where}: model_type is {raw.get('model_type')!r}, not 'phi': this is not a Phi-1/1.5/2 model")
        if "n_embd" in raw:
            raw = _modern_fields(raw)
        for field_name in ("rope_parameters", "rope_scaling"):  # current, older transformers
            rope = raw.pop(field_name, None) or {}
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
            if kind != "default":
                raise InputError(f"{where}: rope scaling {kind!r} is not supported, only the default rotary positions")
            for name in ("partial_rotary_factor", "rope_theta"):
                if name in rope:
                    raw.setdefault(name, rope[name])
        raw.setdefault("partial_rotary_factor", 0.5)  # transformers' default; Phi-2's own is 0.4
        for name, supported in {"qk_layernorm": False, "tie_word_embeddings": False, "hidden_act": "gelu_new"}.items():
            if raw.get(name, supported) != supported:
                raise InputError(f"{where}: {name} = {raw[name]!r} is not supported, only {supported!r} (as in Phi-2)")
        known = {f.name for f in fields(cls)} - {"other"}
        other = {name: raw.pop(name) for name in sorted(set(raw) - known)}
        try:
            return cls(**raw, other=other)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def to_dict(self) -> dict:
        """The content of config.json, in the form that every version of transformers reads."""
        own = asdict(self)
        other = {name: value for name, value in own.pop("other").items() if name not in ("dtype", "torch_dtype")}
        return {
            **other,
            **own,
            "model_type": "phi",
            "architectures": ["PhiForCausalLM"],
            "hidden_act": "gelu_new",
            "tie_word_embeddings": False,
            "qk_layernorm": False,
        }


def _modern_fields(old: dict) -> dict:
    """The older Phi-2 config's names in the current ones."""
    if not all(isinstance(old.get(name), int) and old[name] > 0 for name in ("n_embd", "n_head")):
        raise InputError("n_embd and n_head must be positive numbers")
    head_size = old["n_embd"] // old["n_head"]
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
        "activation_function": "hidden_act",
    }
    new = {names.get(k, k): v for k, v in old.items() if k != "rotary_dim" and v is not None}
    new.setdefault("intermediate_size", 4 * old["n_embd"])
    new["partial_rotary_factor"] = old.get("rotary_dim", head_size) / head_size
    return new


# ------------------------------------------------------------------------------------------------------------ network


def rotary_angles(position: Tensor, size: int, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/size), i = 0 .. size/2-1 (RoFormer, Su et al. 2021, eq. 15), built in fp32.

    position [B, T] -> two tensors [B, 1, T, h], laid out for `rotate`: cos, cos, 1 ... 1 and -sin, sin, 0 ... 0, so that the
    dimensions of a head from `size` on stay as they are.
    """
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=position.device) / size)  # [size/2]
    angle = position[:, None, :, None].float() * frequency  # [B, 1, T, size/2]
    cos, sin, rest = angle.cos(), angle.sin(), (0, head_size - size)
    cos = F.pad(torch.cat((cos, cos), dim=-1), rest, value=1.0)  # [B, 1, T, h]
    sin = F.pad(torch.cat((-sin, sin), dim=-1), rest, value=0.0)  # [B, 1, T, h]
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    """Turns the first `size` dimensions of each head, in pairs (i, i + size/2), by its position's angles; leaves the rest:
    (left, right) -> (left cos - right sin, right cos + left sin).

    x [B, H, T, h], cos and sin [B, 1, T, h] of `rotary_angles` -> [B, H, T, h]
    """
    left, right, rest = x.split((size // 2, size // 2, x.shape[-1] - size), dim=-1)
    return torch.addcmul(x * cos, torch.cat((right, left, rest), dim=-1), sin)


def sibling_mask(example: Tensor, segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Who attends to whom in the shared-prompt layout: to earlier tokens of the same example, if they stand in one's own
    segment or in the prompt.

        query t may see key s  <=>  t >= s, example_t = example_s, and (segment_s = segment_t or segment_s = 0)

    example and segment [B, T] -> additive mask [B, 1, T, T], 0 where t may see s, -inf where not. Padding has the number -1
    in both: it sees padding, so that no row of the softmax is empty.
    """
    same_example, same_segment = (x[:, :, None] == x[:, None, :] for x in (example, segment))  # two of [B, T, T]
    index = torch.arange(segment.shape[1], device=segment.device)
    allowed = (index[:, None] >= index) & same_example & (same_segment | (segment[:, None, :] == 0))
    return torch.zeros((), dtype=dtype, device=segment.device).where(allowed, float("-inf"))[:, None]


def sibling_block_mask(example: Tensor, segment: Tensor):
    """The same rule for FlexAttention, which skips the 128x128 blocks where nothing is allowed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b, h, query, key):
        own, other = segment[b, query], segment[b, key]
        return (query >= key) & (example[b, query] == example[b, key]) & ((own == other) | (other == 0))

    B, T = segment.shape
    return create_block_mask(allowed, B, None, T, T, device=segment.device)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask, grouped: bool) -> Tensor:
    """FlexAttention is fast only when compiled: by itself here on CUDA, or as part of a block that is compiled. On the CPU
    it runs as plain PyTorch."""
    from torch.nn.attention.flex_attention import flex_attention

    alone = q.is_cuda and not torch.compiler.is_compiling()
    attend = _compiled_flex_attention() if alone else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=grouped)


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once. Row b holds its tokens 0 .. length-1 without gaps."""

    keys: Tensor  # [layers, B, K, T, h]
    values: Tensor  # [layers, B, K, T, h]
    slot: slice | tuple[Tensor, Tensor]  # where the next tokens go: the same slots in every row, or (rows, slots), both [B]
    used: int  # slots that hold something once they are stored

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, K, t, h] to the slots; returns this layer's first `used` slots [B, K, used, h]."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(self.slot, slice):
            keys[:, :, self.slot], values[:, :, self.slot] = k, v
        else:
            rows, slots = self.slot
            # An indexed write does not convert: under autocast the turned keys are fp32, the cache is not.
            keys[rows, :, slots], values[rows, :, slots] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(values.dtype)
        return keys[:, :, : self.used], values[:, :, : self.used]


@functools.cache
def _on_intel() -> bool:
    """Whether this is an Intel CPU, on which MKL's product of a matrix and one or two rows reads at the memory's speed."""
    info = Path("/proc/cpuinfo")
    return "Intel" in (info.read_text() if info.exists() else platform.processor())


class Linear(nn.Linear):
    """y = x W^T + b. For the few rows of a decoding step on the CPU, W is cut into slices of about 512 KB that run as one
    batched product: MKL's own product of a large matrix and a few rows leaves most of the memory bandwidth unused."""

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        weight, rows = self.weight, x.numel() // x.shape[-1]
        if rows > 16 or x.is_cuda or weight.dtype != torch.float32 or torch.is_grad_enabled() or (rows <= 2 and _on_intel()):
            return super().forward(x)
        slices = math.gcd(len(weight), 2 ** int(math.log2(max(1, weight.numel() // 2**17))))
        if slices == 1:
            return super().forward(x)
        columns = x.reshape(rows, -1).T.expand(slices, -1, -1)  # [slices, I, rows]
        y = torch.baddbmm(self.bias.view(slices, -1, 1), weight.view(slices, -1, weight.shape[1]), columns)
        return y.view(-1, rows).T.reshape(*x.shape[:-1], -1)  # [slices, O/slices, rows] -> [..., O]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(h) + mask) v for every head, with rotary positions."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        D, h = config.hidden_size, config.head_size
        self.head_size, self.rotary_size = h, config.rotary_size
        self.q_proj = Linear(D, config.num_attention_heads * h)
        self.k_proj = Linear(D, config.num_key_value_heads * h)
        self.v_proj = Linear(D, config.num_key_value_heads * h)
        self.dense = Linear(config.num_attention_heads * h, D)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask, store=None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. `mask`: None for causal, an additive Tensor, or a BlockMask. `store`: see KVCache."""
        q, k, v = (
            proj(x).view(*x.shape[:2], -1, self.head_size).transpose(1, 2)  # [B, H or K, T, h]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(torch.cat((q, k), dim=1), *rotary, self.rotary_size).split((q.shape[1], k.shape[1]), dim=1)
        if store is not None:
            k, v = store(k, v)
        grouped = q.shape[1] != k.shape[1]
        if mask is None or isinstance(mask, Tensor):
            causal = mask is None and (store is None or q.shape[2] > 1)  # one token sees all of its cache
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        else:
            out = _flex_attention(q, k, v, mask, grouped)
        return self.dense(out.transpose(1, 2).flatten(2))  # [B, H, T, h] -> [B, T, D]


class MLP(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask, store=None) -> Tensor:  # [B, T, D] -> [B, T, D]
        normed = self.input_layernorm(x)
        return x + self.self_attn(normed, rotary, mask, store) + self.mlp(normed)


class Backbone(nn.Module):
    """The modules whose names start with "model." in the checkpoint."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        # Weights are loaded or drawn later; nn.Embedding's own draw, on the meta device, would import the whole compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Phi(nn.Module):
    """Phi-2 with its output layer. `attention` is "sdpa" or "flex"; `gradient_checkpointing` recomputes each block's
    activations in the backward pass instead of keeping them. `origin`: (directory or hub name, revision, number format that
    it was quantized to on loading) of the whole model, for the adapters that may be added to it."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.origin: tuple[str, str | None, str | None] = ("", None, None)
        self.attention = "sdpa"
        self.gradient_checkpointing = False
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Phi":
        """Random weights as transformers starts them: N(0, initializer_range), biases 0, LayerNorm 1."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T]; attention_mask [B, T] is 1 for tokens and 0 for padding on either side."""
        if attention_mask is None:
            return self.lm_head(self.hidden(input_ids))
        position = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        number = attention_mask - 1  # one example, all of it a prompt: 0, padding -1
        return self.lm_head(self.hidden(input_ids, position, self.mask(number, number)))

    def mask(self, example: Tensor, segment: Tensor):
        """The attention mask of the shared-prompt layout, both [B, T], for this model's kind of attention."""
        if self.attention == "flex":
            return sibling_block_mask(example, segment)
        return sibling_mask(example, segment, compute_dtype(self.model.final_layernorm.weight))

    def hidden(self, tokens: Tensor, position: Tensor | None = None, mask=None, cache: KVCache | None = None) -> Tensor:
        """Outputs of the last LayerNorm [B, T, D] for tokens [B, T] at `position` [B, T] (default 0 .. T-1)."""
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.model.embed_tokens(tokens)  # [B, T, D]
        rotary = rotary_angles(position, self.config.rotary_size, self.config.head_size, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                store = functools.partial(cache.store, i) if cache else None
                x = block(x, rotary, mask, store)
        return self.model.final_layernorm(x)

    def logprobs(self, batch: Batch) -> Tensor:
        """log pi(completion | prompt) [N] in nats, fp32: the sum over the completion's tokens, `<|im_end|>` included.

        The one log-probability of this project: SFT, DPO, its reference, multiple choice and evaluation all call it, as
        `completion_logprobs(model, batch)`. Summed, not averaged: the DPO derivation (Rafailov et al. 2023, eq. 5) needs the
        probability of the whole answer, and a mean over tokens is not the logarithm of any probability of it.
        """
        hidden, head = self.predicting(batch), self.lm_head  # [M, D]
        weight, bias = head.dense() if isinstance(head, FrozenLinear) else head.weight, head.bias
        compute = compute_dtype(self.model.final_layernorm.weight)
        with torch.autocast(weight.device.type, enabled=False):
            logprobs = TokenLogProbs.apply(hidden, weight, bias, batch.target, compute)  # [M]
            # Hundreds of tokens sum to -1000 nats and more, where fp32 has steps of 1e-4: the running sum is kept in fp64.
            sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=logprobs.device)
            return sums.index_add(0, batch.owner, logprobs.double()).float()  # [N]

    def predicting(self, batch: Batch) -> Tensor:
        """The outputs of the last LayerNorm [M, D] that predict the tokens of a batch's completions."""
        mask = self.mask(batch.example, batch.segment) if batch.needs_mask else None  # else plain causal attention will do
        return self.hidden(batch.tokens, batch.position, mask).flatten(0, 1)[batch.source]  # [B, T, D] -> [M, D]

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
        base: str | None = None,
    ) -> "Phi":
        """A model from a directory or a Hugging Face repository, whatever dtype it is stored in; adapters in PEFT's format
        (lora.py) come with the model that they belong to.

        base: one of quant.FORMATS, to quantize the linear layers, but the output layer, as they are read (adapters: default
        as they were trained). Built on the meta device, then filled one tensor at a time: the peak is the weights once plus
        the largest tensor. InputError names the file or tensor that is missing, unexpected, mis-shaped or cut short.
        """
        directory = resolve(path_or_repo, revision)
        if is_adapter(directory):
            model = cls.from_pretrained(base_directory(directory), dtype, device, base=base or base_format(directory))
            named = read_json(directory / ADAPTER_CONFIG)
            model.origin = (named["base_model_name_or_path"], named.get("revision"), model.origin[2])
            return load_lora(model, directory)
        with torch.device("meta"):
            model = cls(read_config(directory))
        model.origin = (str(directory.resolve()), None, base)
        missing = {name: p.shape for name, p in model.named_parameters()}
        stored = list(stored_tensors(directory))
        coded = {layer: {} for layer in coded_layers([name for _, name in stored])}  # the tensors of quantized layers
        coded_on_reading: dict[str, FrozenLinear] = {}
        for shard, name in stored:
            layer = next((layer for layer in _prefixes(name) if layer in coded), None)
            # Opened anew for every tensor: closing the file gives back the pages it was mapped to.
            with safe_open(shard, framework="pt") as file:
                if layer and name != f"{layer}.bias":
                    coded[layer][name.removeprefix(f"{layer}.")] = file.get_tensor(name).to(device, copy=True)
                    continue
                for new_name, tensor in modern_tensors(name, file.get_tensor(name)):
                    _check_shape(shard, name, tensor.shape, missing.pop(new_name, None))
                    parent, _, leaf = new_name.rpartition(".")
                    if not tensor.is_floating_point():
                        raise InputError(f"{shard}: tensor {name!r} holds {tensor.dtype}, not floating-point weights")
                    if base and leaf == "weight" and _is_linear(model, parent):
                        coded_on_reading[parent] = _quantize(shard, new_name, tensor.to(device, dtype), base)
                        continue
                    weight = tensor.to(device=device, dtype=dtype, copy=True)
                    setattr(model.get_submodule(parent), leaf, nn.Parameter(weight))
        for layer, tensors in coded.items():
            if missing.pop(f"{layer}.weight", None) is None or f"{layer}.bias" in missing:
                raise InputError(
                    f"{directory}: {layer} is stored quantized, but the config has no such layer, or it has no bias"
                )
            plain = model.get_submodule(layer)
            try:
                frozen = layer_from_tensors(tensors, plain, model.config.other.get("quantization_config", {}))
            except InputError as error:
                raise InputError(f"{directory}: {layer}: {error}") from None
            model.set_submodule(layer, frozen)
        if missing:
            raise InputError(f"{directory}: {len(missing)} tensors are missing, the first {next(iter(missing))!r}")
        if coded and base:
            raise InputError(f"{directory} is stored quantized already; leave out --base {base}")
        for layer, frozen in coded_on_reading.items():
            frozen.bias = model.get_submodule(layer).bias
            model.set_submodule(layer, frozen)
        if (coded or coded_on_reading) and str(device).startswith("cuda"):
            line = use_kernels(model, device, compiled=False)
            if line:
                warnings.warn(line, stacklevel=2)
        return model

    @classmethod
    def sharded(cls, directory: Path, device: str, prepare: Callable[["Phi"], None] = lambda model: None) -> "Phi":
        """Of a model in fp32, this rank's rows of every weight (parallel.shard). `prepare` may change its layers before they
        are split. No rank ever holds or reads more than its own rows."""
        with torch.device("meta"):
            model = cls(read_config(directory))
        prepare(model)
        parallel.shard(model, model.model.layers, "logprobs", device)
        model.to_empty(device=device)
        model.fill(directory)
        return model

    def fill(self, directory: Path) -> None:
        """Reads a sharded model's own rows of all weights from a checkpoint."""
        missing = dict(self.named_parameters())
        for shard, name in stored_tensors(directory):
            with safe_open(shard, framework="pt") as file:
                stored = file.get_slice(name)
                rows, *columns = stored.get_shape()
                for new_name, first, end in modern_rows(name, rows):
                    p = missing.pop(new_name, None)
                    _check_shape(shard, name, (end - first, *columns), None if p is None else p.shape)
                    parallel.fill(p, stored, first)
        if missing:
            raise InputError(f"{directory}: {len(missing)} tensors are missing, the first {next(iter(missing))!r}")

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors (in shards with an index past 5 GB), each whole or not at all. Of a model
        with adapters only those are written, in PEFT's format. Of several ranks the main one writes; all must call this."""
        directory, dtype = Path(directory), self.model.final_layernorm.weight.dtype
        adapted = bool(lora_layers(self))
        tensors = self.state_dict() if adapted or parallel.size() == 1 else parallel.gathered(self.state_dict().items())
        if not parallel.is_main():
            return
        if adapted:
            save_lora(self, directory, *self.origin)
            return
        config = {**self.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("quantization_config", None)
        coded = {name: layer for name, layer in self.named_modules() if isinstance(layer, FrozenLinear)}
        for name, layer in coded.items():
            for part in layer.state_dict():
                del tensors[f"{name}.{part}"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in layer_tensors(layer).items()}
        if coded:
            plain = [name for name, layer in self.named_modules() if isinstance(layer, nn.Linear)]
            config["quantization_config"] = checkpoint_config(next(iter(coded.values())), plain, dtype)
        save_tensors(directory, tensors)
        write_json(directory / "config.json", config)


def read_config(directory: Path) -> PhiConfig:
    """The config of the model in a directory, or of the model under the adapters there."""
    path = base_directory(directory) / "config.json"
    return PhiConfig.from_dict(read_json(path), str(path))


def stored_dtype(config: PhiConfig) -> str:
    """The dtype that a checkpoint's config.json names, "float32" if none."""
    return config.other.get("dtype") or config.other.get("torch_dtype") or "float32"


def _check_shape(shard: Path, name: str, shape: tuple[int, ...], expected: torch.Size | None) -> None:
    if expected is None:
        raise InputError(f"{shard}: unexpected tensor {name!r}; the config names no such parameter")
    if tuple(shape) != tuple(expected):
        raise InputError(f"{shard}: tensor {name!r} has shape {list(shape)}, the config needs {list(expected)}")


def _is_linear(model: Phi, name: str) -> bool:
    return name.rpartition(".")[2] not in SKIP and isinstance(model.get_submodule(name), nn.Linear)


def _quantize(shard: Path, name: str, weight: Tensor, to: str) -> FrozenLinear:
    try:
        return quantize_layer(weight, None, to)
    except InputError as error:
        raise InputError(f"{shard}: {name} {error}") from None


def _prefixes(name: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b"]: the modules that a tensor may belong to."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


# -------------------------------------------------------------------------------------------------- log-probabilities


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32. 16-bit factors are multiplied exactly and summed in fp32; their sum is not rounded to 16 bits."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class TokenLogProbs(torch.autograd.Function):
    """log p(target_m) = logit_target - logsumexp(logits), m = 1 .. M, without ever holding all M x V logits.

    For Phi-2, 2,000 predicted tokens have 410 MB of fp32 logits, and their softmax and gradient as much again. So the
    output layer runs on a chunk of tokens at a time; only the logsumexp is kept, and the backward pass makes each chunk's
    logits once more. There, with p = softmax(logits) and g_m the incoming gradient,

        d/dlogits = g_m (onehot(target_m) - p),    d/dh = d/dlogits W,    d/dW = (d/dlogits)^T h,    d/db = its sum.

    The factors of the products are rounded to `compute`; everything else, the sums over chunks too, is fp32.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, compute: torch.dtype) -> Tensor:
        """h [M, D], weight [V, D], bias [V], target [M] -> [M] fp32"""
        W, chunk = weight.to(compute), max(1, LOGIT_CHUNK // len(weight))
        logprobs, logsumexp = [], []
        for h_c, target_c in zip(h.to(compute).split(chunk), target.split(chunk), strict=True):
            logits = _product(h_c, W.T).add_(bias)  # [m, V]
            logsumexp.append(logits.logsumexp(dim=-1))
            logprobs.append(logits.gather(1, target_c[:, None])[:, 0] - logsumexp[-1])
        ctx.save_for_backward(h, weight, bias, target, torch.cat(logsumexp))
        ctx.compute = compute
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        h, weight, bias, target, logsumexp = ctx.saved_tensors
        W, chunk = weight.to(ctx.compute), max(1, LOGIT_CHUNK // len(weight))
        h_compute, grad_h = h.to(ctx.compute), torch.empty_like(h)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            d = _product(h_compute[part], W.T).add_(bias).sub_(logsumexp[part, None]).exp_()  # p  [m, V]
            d.mul_(-grad[part, None]).scatter_add_(1, target[part, None], grad[part, None])
            if grad_bias is not None:
                grad_bias += d.sum(dim=0)
            d = d.to(ctx.compute)
            grad_h[part] = _product(d, W)
            if grad_weight is not None and d.dtype == torch.float32:
                grad_weight.addmm_(d.T, h_compute[part])  # in place: no second [V, D]
            elif grad_weight is not None:
                grad_weight += _product(d.T, h_compute[part])
        as_input = (g if g is None else g.to(x.dtype) for g, x in ((grad_weight, weight), (grad_bias, bias)))
        return grad_h, *as_input, None, None


def completion_logprobs(model: Phi, batch: Batch) -> Tensor:
    """`Phi.logprobs`, the one log-probability of this project."""
    return model.logprobs(batch)


# ---------------------------------------------------------------------------------------------------------- generation


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Next token ids [B] of logits [B, V]: greedy at temperature 0, else from softmax(logits / temperature) restricted to
    the smallest set of likeliest tokens whose probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2020)."""
    if temperature < 1e-6:  # 0, or so near to it that logits / temperature may overflow
        return logits.max(dim=-1).indices  # argmax, which takes three times as long on the CPU
    p = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True)
        before = sorted_p.cumsum(dim=-1) - sorted_p  # the probability of all likelier tokens
        p = torch.zeros_like(p).scatter(1, order, sorted_p.where(before < top_p, 0.0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.inference_mode()  # holds while a step is computed; the consumer, between two of them, keeps its own mode
def stream(
    model: Phi,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: tuple[int, ...] = (),
) -> Iterator[Tensor]:
    """Continues each prompt and yields every step's token ids [B], the next step being computed when it is asked for. Ends
    when every row has had a stop token; what a row gets after its own has no meaning.

    Prompts of different lengths run as one batch, padded on the right. Row b's cache has no gaps: its next token is
    written at its own length, over the padding, so positions need no correction and each row sees just its own tokens.
    """
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("generate needs at least one prompt, no empty one, and max_new_tokens >= 1")
    weight, config = model.model.final_layernorm.weight, model.config
    device = weight.device
    length = torch.tensor([len(p) for p in prompts], device=device)  # [B]
    B, T = len(prompts), int(length.max())
    shape = (config.num_hidden_layers, B, config.num_key_value_heads, T + max_new_tokens, config.head_size)
    keys, values = (torch.zeros(shape, dtype=compute_dtype(weight), device=device) for _ in range(2))
    cache = KVCache(keys, values, slot=slice(0, T), used=T)
    generator = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(stop_tokens, dtype=torch.long, device=device)

    padded = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)  # [B, T]
    hidden = model.hidden(padded, cache=cache)  # causal: a token never sees the padding to its right
    rows = torch.arange(B, device=device)
    hidden = hidden[rows, length - 1]  # [B, D]
    ragged = bool((length != T).any())
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = sample(model.lm_head(hidden), temperature, top_p, generator)  # [B]
        yield token
        done |= torch.isin(token, stops)
        if step == max_new_tokens - 1 or done.all():
            return
        position, mask = length + step, None  # [B]
        cache.slot, cache.used = slice(T + step, T + step + 1), T + step + 1
        if ragged:
            cache.slot = (rows, position)
            visible = torch.arange(cache.used, device=device) <= position[:, None]  # [B, used]
            mask = visible[:, None, None]  # [B, 1, 1, used]
        hidden = model.hidden(token[:, None], position[:, None], mask, cache)[:, 0]  # [B, D]


def generate(
    model: Phi,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continues each prompt, all as one batch; returns only the new tokens, up to and without the first stop token."""
    steps = list(stream(model, prompts, max_new_tokens, temperature, top_p, seed, stop_tokens))
    answers = torch.stack(steps, dim=1).tolist()  # [B, new]
    return [ids[: next((i for i, t in enumerate(ids) if t in stop_tokens), len(ids))] for ids in answers]
