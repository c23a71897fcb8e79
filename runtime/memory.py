"""What a training step needs in memory, from shapes alone, before anything is loaded; and what it did need.

Letters as in model.py, and I the MLP's width, L blocks, n = B T tokens of the largest micro-batch, c bytes a value in
compute (2 in bf16, 4 in fp32), s bytes a value in the stream x that runs through the blocks (2 over 16-bit weights, else 4).

A step's memory is not one number: it rises through the forward pass and falls through the backward pass, while gradients
come. So it is added up at each of the moments at which it may be highest, and the estimate is the highest sum:

    forward         in the output layer, when all that the backward pass needs is kept
    live reference  the reference's forward pass, while the policy's activations wait
    output layer    its backward pass
    blocks          the backward pass of the last block, run once more first under gradient checkpointing
    embedding       the end of the backward pass: all gradients, hardly any activations

Unless a step is one micro-batch, the gradients of the one before are there all the time. Not counted: what an allocator
loses between its blocks. --compile needs less than this. On the CPU estimates were within 4% of what was measured in 29
settings of two steps each, and within 12% in 5 whole runs, evaluation and checkpoints included; tests/test_memory.py repeats
two. On CUDA, and of sharded weights, none has been measured.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data import Example, epoch_order, pack_rows
from levels import bits, packed_bytes
from lora import base_format
from model import LOGIT_CHUNK, PhiConfig
from quant import FORMATS
from runtime import parallel
from runtime.files import read_json
from runtime.optimizer import BLOCK, SMALL
from runtime.settings import Config
from runtime.weights import ADAPTER_CONFIG, is_adapter

CONTEXT = 600_000_000  # of a GPU, before the first tensor: CUDA's context, its kernels, cuBLAS' work space


# -------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Load:
    """The largest micro-batch of a run."""

    rows: int
    width: int  # tokens of a row, padding included
    predicted: int
    masked: bool  # some row holds two completions or more, so attention has a mask [B, 1, T, T]
    several: bool  # a step is several micro-batches, whose gradients add up

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def largest_load(examples: Sequence[Example], config: Config) -> Load:
    """The micro-batch with the most tokens, padding included, of the first epoch."""
    lengths, loads = [len(e) for e in examples], []
    predicted = [sum(map(len, e.completions)) for e in examples]
    for batch in epoch_order(examples, config.batch_size, config.seed, epoch=0):
        batch = sorted(batch, key=lengths.__getitem__)
        if config.pack:
            parts = [[batch[i] for i in part] for part in pack_rows([lengths[i] for i in batch], config.pack)]
        else:
            parts = [batch[i : i + config.micro_batch_size] for i in range(0, len(batch), config.micro_batch_size)]
        for part in parts:
            rows, width = (1, sum(lengths[i] for i in part)) if config.pack else (len(part), lengths[part[-1]])
            masked = sum(len(examples[i].completions) for i in part) > rows
            loads.append(Load(rows, width, sum(predicted[i] for i in part), masked, len(parts) > 1))
    return max(loads, key=lambda load: (load.tokens, load.predicted))


def longest_load(config: Config) -> Load:
    """The largest micro-batch that --max-length allows: of a prompt of no length, which two completions share in DPO."""
    completions = 2 if config.objective == "dpo" else 1
    tokens = completions * config.max_length
    rows, several = config.micro_batch_size, config.batch_size > config.micro_batch_size
    return Load(rows, tokens, rows * tokens, completions > 1, several)


def matrices(phi: PhiConfig) -> dict[str, tuple[int, int]]:
    """{name: (O, I)} of a block's linear layers; each has a bias [O] too."""
    D, kv = phi.hidden_size, phi.num_key_value_heads * phi.head_size
    block = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "dense": (D, D)}
    return block | {"fc1": (phi.intermediate_size, D), "fc2": (D, phi.intermediate_size)}


def adapted(phi: PhiConfig, config: Config) -> dict[str, tuple[int, int]]:
    """Those of `matrices` that --lora gives adapters."""
    every = matrices(phi)
    if not config.lora:
        return {}
    targets = config.lora_targets or "all-linear"
    return {name: shape for name, shape in every.items() if targets == "all-linear" or name in re.split(r"\s*,\s*", targets)}


def block_parameters(phi: PhiConfig) -> int:
    """Weights and biases of a block's linear layers."""
    return sum(rows * columns + rows for rows, columns in matrices(phi).values())


def parameters(phi: PhiConfig) -> int:
    """V D of the embedding, V D + V of the output layer, 2 D of each LayerNorm, and the blocks' layers. Phi-2:
    131,072,000 + 131,123,200 + 33 * 5,120 + 32 * 78,671,360 - hand-worked in tests/test_memory.py - = 2,779,683,840."""
    D, V = phi.hidden_size, phi.vocab_size
    return 2 * V * D + V + 2 * D + phi.num_hidden_layers * (block_parameters(phi) + 2 * D)


def adapter_parameters(phi: PhiConfig, config: Config) -> int:
    """A [r, I] and B [O, r] of each adapted layer."""
    return phi.num_hidden_layers * sum((config.lora or 0) * sum(shape) for shape in adapted(phi, config).values())


# --------------------------------------------------------------------------------------------------------- what stays


def coded_bytes(rows: int, columns: int, to: str, block: int = 64) -> int:
    """A matrix in a number format: codes, and fp32 scales, one a row in int8, one a block in the others (int4-asym: two)."""
    if to == "int8":
        return rows * columns + 4 * rows
    scales = (2 if to == "int4-asym" else 1) * math.ceil(rows * columns / block)
    return packed_bytes(rows * columns, bits(to)) + 4 * scales


def plain_bytes(config: Config) -> int:
    """Bytes of a weight that is not coded: see inputs.load_model."""
    return 2 if config.base == "bf16" or (config.base in FORMATS and config.dtype == "bf16") else 4


def weight_bytes(phi: PhiConfig, config: Config) -> int:
    """The model: all of it in one type or, under --lora with a coded --base, the blocks' matrices in codes."""
    total = plain_bytes(config) * parameters(phi)
    if config.base in FORMATS:
        for rows, columns in matrices(phi).values():
            coded = coded_bytes(rows, columns, config.base) - plain_bytes(config) * rows * columns
            total += phi.num_hidden_layers * coded
    return total + 4 * adapter_parameters(phi, config)


def trained_shapes(phi: PhiConfig, config: Config) -> list[tuple[int, tuple[int, ...]]]:
    """(how many, shape) of all parameters that have gradients and moments."""
    D, V, L = phi.hidden_size, phi.vocab_size, phi.num_hidden_layers
    if config.lora:
        shapes = adapted(phi, config).values()
        return [(L, shape) for rows, columns in shapes for shape in ((config.lora, columns), (rows, config.lora))]
    blocks = [(L, shape) for rows, columns in matrices(phi).values() for shape in ((rows, columns), (rows,))]
    return [(2, (V, D)), (1, (V,)), (2 * L + 2, (D,)), *blocks]


def moment_bytes(shape: tuple[int, ...], config: Config) -> int:
    """AdamW's two moments of a parameter: fp32, or codes of a byte with an fp32 scale for each 256 (optimizer.AdamW8bit)."""
    values = math.prod(shape)
    if config.optimizer == "adamw8bit" and len(shape) > 1 and values >= SMALL:
        return 2 * (values + 4 * math.ceil(values / BLOCK))
    return 8 * values


def offloaded_bytes(phi: PhiConfig, config: Config) -> int:
    """The CPU's memory under --offload-optimizer: a copy of what is trained, its moments, and one gradient."""
    shapes = trained_shapes(phi, config)
    state = sum(count * (4 * math.prod(shape) + moment_bytes(shape, config)) for count, shape in shapes)
    return state + 4 * max(math.prod(shape) for _, shape in shapes)


# ------------------------------------------------------------------------------------- what the backward pass waits for


def kept_bytes(phi: PhiConfig, config: Config, load: Load) -> int:
    """What autograd keeps of one block without gradient checkpointing.

    Of each token, in values ("input" stands for what a trained or adapted layer keeps of its input for its own gradient):

        x                       D in s bytes, for the LayerNorm
        inputs of q k v, fc1    D once; but under autocast over fp32 weights each of the four makes its own cast of LN(x)
        q and k turned, v       D + 2 K h, for attention
        attention's output      D, and its statistics, H in fp32; on the CPU the input of `dense` is another copy
        fc1's output            I, for GELU
        input of fc2            I
        adapters                r each, for B; with dropout each layer keeps its own input and what was dropped from it
    """
    cuda, lora = config.device.startswith("cuda"), adapted(phi, config)
    D, inner, c, s = phi.hidden_size, phi.intermediate_size, compute_bytes(config), plain_bytes(config)
    kv = phi.num_key_value_heads * phi.head_size
    wants = set(lora) if config.lora else set(matrices(phi))  # the layers that need their own input
    normed = 4 if cuda and c == 2 else s  # bytes of LN(x); CUDA's autocast computes LayerNorms in fp32, from an fp32 copy
    value = normed * D + c * (D + 2 * kv) + c * D + 4 * phi.num_attention_heads + c * inner
    own = wants & {"q_proj", "k_proj", "v_proj", "fc1"}
    dropped = bool(config.lora_dropout)
    value += c * D * (len(own) if dropped or normed != c else bool(own))
    value += c * D * ("dense" in wants and (dropped or not cuda)) + c * inner * ("fc2" in wants)
    value += c * (config.lora or 0) * len(lora)
    if dropped:  # CUDA keeps what was dropped as bytes, the CPU as factors
        value += sum(columns * (1 if cuda else normed if name in own else c) for name, (_, columns) in lora.items())
    return value * load.tokens


def compute_bytes(config: Config) -> int:
    return 2 if config.dtype == "bf16" else 4


def copied_bytes(phi: PhiConfig, config: Config) -> int:
    """Copies of one block's weights that its backward pass uses: bf16 ones of fp32 weights, and the rounded ones of qat."""
    if config.stage == "qat":
        return compute_bytes(config) * block_parameters(phi)
    if config.dtype != "bf16":
        return 0
    adapters = adapter_parameters(phi, config) // phi.num_hidden_layers
    return 2 * (adapters + (block_parameters(phi) if config.base in (None, "fp32") else 0))


def mask_bytes(config: Config, load: Load) -> int:
    """The attention mask [B, 1, T, T]; none under plain causal attention, nor in FlexAttention, which keeps blocks of it."""
    return compute_bytes(config) * load.rows * load.width**2 if load.masked and config.attention != "flex" else 0


def padded_mask_bytes(config: Config, load: Load) -> int:
    """CUDA's attention kernels copy a mask whose rows are not a multiple of 8 values, in each block."""
    return mask_bytes(config, load) if config.device.startswith("cuda") and load.width % 8 else 0


# ---------------------------------------------------------------------------------------------------- what comes and goes


def logit_bytes(phi: PhiConfig, config: Config, load: Load, backward: bool) -> int:
    """The output layer (model.TokenLogProbs) at its highest: a chunk of logits in fp32 and one more like it (exponentials
    forward, factors of products backward), and the [V, D] matrices that it makes on the way."""
    cuda, c, plain = config.device.startswith("cuda"), compute_bytes(config), plain_bytes(config)
    matrix, V = phi.vocab_size * phi.hidden_size, phi.vocab_size
    chunk = 4 * V * min(load.predicted, max(1, LOGIT_CHUNK // V))
    total = matrix * c * (c != plain)  # the weight in the compute type
    total += matrix * 4 * (c == 2 and not cuda)  # a factor or product of 16-bit matrices in fp32
    if not backward:
        return total + 2 * chunk
    if not config.lora:
        total += matrix * 4 * (2 if cuda and c == 2 else 1)  # the weight's gradient, and the part of a chunk
    return total + chunk * (5 if c == 2 and not cuda else 2) // 2


def work_bytes(phi: PhiConfig, config: Config, load: Load) -> int:
    """A block's backward pass on its way: the gradients of the MLP's hidden layer before and behind GELU, with adapters from
    both branches, four of the stream's width, and the gradient or the decoded weight of the largest matrix."""
    c, tokens = compute_bytes(config), load.tokens
    hidden = (3 if config.lora else 2) * c * phi.intermediate_size
    matrix = max(rows * columns for rows, columns in matrices(phi).values())
    if config.base in FORMATS:
        each = 8 if config.base == "int8" else 6
    else:
        each = 0 if config.lora else 4 if c == 4 else 6
    return tokens * (hidden + 4 * 4 * phi.hidden_size) + each * matrix


# ------------------------------------------------------------------------------------------------------------- the sum


def moments(phi: PhiConfig, config: Config, load: Load, process: int = 0) -> dict[str, dict[str, int]]:
    """Bytes on the device at each moment of the head of this file, by what holds them."""
    L, D = phi.num_hidden_layers, phi.hidden_size
    shapes = trained_shapes(phi, config)
    ranks = 1 if config.lora else parallel.size()  # that weights, gradients and moments are shared out over
    gathered = parameters(phi) - (L - 2) * block_parameters(phi) if ranks > 1 else 0  # all but the blocks, and two of those
    gradients = sum(4 * count * math.prod(shape) for count, shape in shapes) // ranks
    embedding = 0 if config.lora else 4 * phi.vocab_size * D
    live = config.reference == "live" and config.objective == "dpo"
    always = {
        "process": process,
        "weights": weight_bytes(phi, config) // ranks,
        "gathered weights": 4 * gathered,
        "AdamW's moments": (not config.offload_optimizer)
        * sum(n * moment_bytes(shape, config) for n, shape in shapes)
        // ranks,
        "live reference": 4 * parameters(phi) // ranks if live and not config.lora else 0,
        "attention mask": mask_bytes(config, load),
    }
    before = gradients if load.several else 0
    stream = plain_bytes(config) * D * load.tokens
    block, copies, padded = kept_bytes(phi, config, load), copied_bytes(phi, config), padded_mask_bytes(config, load)
    if config.gradient_checkpointing:
        kept, held, again = L * stream, 0, block + padded
        cached = L * copies if not config.lora and config.stage != "qat" else copies  # autocast's, until its block ends
    else:
        kept, held, again = L * (block + padded), L * copies, 0
        cached = held
    kept += 2 * stream + 4 * D * load.predicted  # the last LayerNorm's input and output, and its rows that predict
    work = work_bytes(phi, config, load)
    found = {
        "forward": {"gradients": before, "activations": kept, "copies of weights": cached}
        | {"output layer": logit_bytes(phi, config, load, backward=False)},
        "output layer": {"gradients": before, "activations": kept, "copies of weights": held}
        | {"output layer": logit_bytes(phi, config, load, backward=True)},
        "blocks": {"gradients": max(before, embedding), "activations": kept + again, "copies of weights": max(held, copies)}
        | {"work of a block": work},
        "embedding": {"gradients": gradients, "activations": max(again, block), "work of a block": max(work, embedding)},
    }
    if live:
        reference = {"copies of weights": held + (0 if config.lora else L * copies)}
        reference |= {"work of a block": work, "output layer": logit_bytes(phi, config, load, backward=False)}
        found["live reference"] = {"gradients": before, "activations": kept} | reference
    return {moment: always | parts for moment, parts in found.items()}


def estimate(phi: PhiConfig, config: Config, load: Load, process: int = 0) -> dict[str, int]:
    """Bytes that a training step needs on its device, by what holds them, at the moment when it needs most."""
    parts = max(moments(phi, config, load, process).values(), key=lambda parts: sum(parts.values()))
    return {name: size for name, size in parts.items() if size}


def stored_format(directory: Path, phi: PhiConfig) -> str | None:
    """The format of a directory that is quantized already, or under whose adapters weights are quantized on loading."""
    stored = phi.other.get("quantization_config", {})
    code = "int8" if stored.get("load_in_8bit") else stored.get("code") or stored.get("bnb_4bit_quant_type")
    return code or (base_format(directory) if is_adapter(directory) else None)


def as_loaded(directory: Path, phi: PhiConfig, config: Config) -> Config:
    """The config with --base and --lora-targets as the model's directory settles them, where the flags do not."""
    if not config.lora:
        return config
    config = replace(config, base=config.base or stored_format(directory, phi))
    if is_adapter(directory):
        config = replace(config, lora_targets=",".join(read_json(directory / ADAPTER_CONFIG).get("target_modules") or []))
    return config
