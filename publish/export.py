"""--stage export: a checkpoint as one GGUF file, the format of llama.cpp and of the programs around it.

    python train.py --stage export --model out/demo-dpo --to gguf-q4_0

    gguf-f16     matrices in fp16
    gguf-q8_0    32 neighbours of a row share an fp16 scale, codes have 8 bits: 8.5 bits a weight
    gguf-q4_0    the same with 4 bits: 4.5 bits a weight; embedding and output layer in Q8_0

    out/NAME/    NAME.gguf (weights, tokenizer and template), Modelfile (for Ollama), README.md

Names, layout and rounding are the gguf package's. Tensors are read, merged with their adapters, rounded and written one by
one, so memory holds a single matrix. Biases and LayerNorms stay fp32 in every format.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from torch import Tensor

from data import IM_END, IM_START, ChatML
from lora import find_origin, load_lora, read_adapters
from model import Phi, PhiConfig, read_config
from publish.card import write_card
from quant import SKIP, round_to
from runtime import weights
from runtime.files import InputError, printable, whole_file, write_json, write_text
from runtime.runs import load_chat, open_run
from runtime.settings import Export

TYPES = {"gguf-f32": Type.F32, "gguf-f16": Type.F16, "gguf-q8_0": Type.Q8_0, "gguf-q4_0": Type.Q4_0}
FILE_TYPES = {Type.F32: gguf.LlamaFileType.ALL_F32, Type.F16: gguf.LlamaFileType.MOSTLY_F16}
FILE_TYPES |= {Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0, Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0}
ENDS = ("embed_tokens", "lm_head")  # where an error reaches every token


def run(settings: Export) -> int:
    """--stage export; returns the exit status."""
    source = weights.resolve(settings.model, settings.revision)
    target = Path(settings.out) / settings.name
    file = target / f"{settings.name}.gguf"
    with open_run(settings):
        for line in what_is_done_first(source):
            print(printable(line), flush=True)
        chat = load_chat(source)
        export(source, file, settings.to, chat)
        write_text(target / "Modelfile", modelfile(file.name, chat, read_config(source)))
        write_json(target / "results.json", {"parent": str(source), "bytes": file.stat().st_size})
        write_card(target)
        print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB. Two ways to talk to it:")
        print(f"  llama-cli -m {file}")
        print(f"  ollama create {settings.name} -f {target}/Modelfile && ollama run {settings.name}")
    return 0


def what_is_done_first(source: Path) -> list[str]:
    """What happens to the stored weights before they are rounded, in words."""
    origin, lines = find_origin(source), []
    if origin.adapters:
        lines.append(f"The adapters in {source} are merged into {origin.directory} on the way.")
    if origin.format or weights.is_quantized(origin.directory):
        lines.append(f"The weights of {source} were quantized before; they are decoded, and then rounded a second time.")
    return lines


def export(source: Path, file: Path, to: str, chat: ChatML) -> None:
    """Writes a checkpoint of any kind to `file`, whole or not at all. `to`: one of TYPES; gguf-f32 is for tests. InputError
    if llama.cpp has no name for the tokenizer, or if a matrix does not fit the format."""
    config = read_config(source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI2, config.num_hidden_layers)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Phi(config).named_parameters()}
    with whole_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, "phi2")
        try:
            add_config(writer, config, file.stem, to)
            add_vocabulary(writer, chat, config.vocab_size)
            for name, shape in shapes.items():  # the list of tensors comes before the first of them
                kind = type_of(name, shape, to)
                stored = gguf.quant_shape_to_byte_shape(shape, kind)
                there = names.get_name(name, try_suffixes=(".weight", ".bias"))
                writer.add_tensor_info(there, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, values in dense_tensors(source):
                writer.write_tensor_data(encode(values, type_of(name, shapes[name], to), f"{source}: {name}"))
        finally:
            writer.close()


def type_of(name: str, shape: tuple[int, ...], to: str) -> Type:
    """The type of a parameter in the file. InputError if its rows cannot be cut into blocks."""
    if len(shape) == 1:
        return Type.F32
    kind = Type.Q8_0 if to == "gguf-q4_0" and name.split(".")[-2] in ENDS else TYPES[to]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise InputError(f"{name} has rows of {shape[-1]} values, which blocks of {block} do not fill; take --to gguf-f16")
    return kind


def encode(values: Tensor, kind: Type, where: str = "the matrix") -> np.ndarray:
    """A tensor as the bytes of the file. InputError if fp16 has no such numbers; `where` names it."""
    if kind == Type.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        raise InputError(f"{where}: a weight of {values.abs().max():.3g} is too large for fp16; take --to gguf-q8_0")
    return gguf.quantize(values.float().numpy(), kind).view(np.uint8)


@torch.no_grad()
def round_weights(model: Phi, to: str) -> dict[str, float]:
    """Rounds a model's weights, in place, to the values in its GGUF file. Returns the file's tensors in megabytes, and bits
    per weight of the linear layers but the output layer, as `precisions.sizes` does for other formats."""
    stored = 0
    for name, parameter in model.named_parameters():
        kind = type_of(name, tuple(parameter.shape), to)
        data = encode(parameter.cpu(), kind, name)
        values = torch.from_numpy(gguf.dequantize(data, kind).copy())
        parameter.copy_(values.view_as(parameter))
        stored += data.nbytes
    block, size = gguf.GGML_QUANT_SIZES[TYPES[to]]  # values, and the bytes that they take
    return {"memory, MB": stored / 1e6, "bits per weight": 8 * size / block}


@torch.no_grad()
def dense_tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 values of each parameter of a checkpoint, in the order of the network, one at a time: codes are decoded,
    and adapters are added to the matrix that they belong to."""
    origin = find_origin(source)
    with torch.device("meta"):
        model = Phi(read_config(source))
    checkpoint, adapters, scale = weights.match(model, origin.directory), {}, 0.0
    parameters = dict(model.named_parameters())
    layers = {name: model.get_submodule(name) for name in checkpoint.quantized}
    if origin.adapters:
        config, adapters = read_adapters(origin.adapters)
        scale = config["lora_alpha"] / config["r"]
        load_lora(model, origin.adapters)  # without memory of its own, it only finds out whether they fit
    for name in parameters:
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in layers:
            values = checkpoint.read_layer(layer, layers[layer]).dense().float()
        else:
            values = checkpoint.plain[name].read(dtype=torch.float32)
            if origin.format and values.dim() == 2 and layer.rpartition(".")[2] not in (*SKIP, "embed_tokens"):
                values = round_to(values, origin.format)  # the weights that the adapters were trained on
        if leaf == "weight" and layer in adapters:
            a, b = (adapters[layer][part].read(dtype=torch.float32) for part in "AB")
            values += scale * (b @ a)
        yield name, values


def add_config(writer: gguf.GGUFWriter, config: PhiConfig, name: str, to: str) -> None:
    """What shapes the network."""
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[TYPES[to]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(config.rotary_size)
    writer.add_rope_freq_base(config.rope_theta)


SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # as GPT-2
OTHER_BPE = "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges".split()


def add_vocabulary(writer: gguf.GGUFWriter, chat: ChatML, rows: int) -> None:
    """Tokens, merges and template. Only control tokens have the type CONTROL, which text never becomes unless a program asks
    for it; the embedding's `rows` beyond the vocabulary are UNUSED. InputError if llama.cpp would split texts otherwise."""
    raw = json.loads(chat.tokenizer.to_str())
    model, split = raw["model"], raw["pre_tokenizer"] or {}
    odd = [name for name in OTHER_BPE if model.get(name)] + ["normalizer"] * bool(raw["normalizer"])
    odd += [f"type {model['type']}"] * (model["type"] != "BPE")
    odd += [f"pre_tokenizer {split.get('type')}"] * any(split.get(name) != value for name, value in SPLIT.items())
    odd += [t["content"] for t in raw["added_tokens"] if t["single_word"] or t["lstrip"] or t["rstrip"]]
    if odd:
        told = "only byte-level BPE that splits texts as GPT-2 does, as Phi-2's tokenizer, can be exported"
        raise InputError(f"the tokenizer has no name in llama.cpp ({', '.join(odd):.200}): {told}")
    tokens = {i: token for token, i in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["id"] in chat.control_ids else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("phi-2")
    writer.add_token_list([tokens.get(i, f"[UNUSED{i}]") for i in range(rows)])
    writer.add_token_types([types.get(i, TokenType.UNUSED) for i in range(rows)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_eot_token_id, writer.add_pad_token_id):
        add(chat.end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat.template())


def modelfile(file: str, chat: ChatML, config: PhiConfig) -> str:
    """What Ollama needs to serve the file: ChatML in its own template language, and where an answer ends."""
    turn = f"{IM_START}{{{{ .Role }}}}\n{{{{ .Content }}}}{IM_END}\n"
    lines = [f"FROM ./{file}", f'TEMPLATE """{{{{ range .Messages }}}}{turn}{{{{ end }}}}{IM_START}assistant\n"""']
    if chat.system_prompt:
        quoted = chat.system_prompt.replace('"""', "'''")
        lines.append(f'SYSTEM """{quoted}"""')
    lines += [f"PARAMETER num_ctx {config.max_position_embeddings}"]
    lines += [f"PARAMETER stop {json.dumps(chat.tokenizer.id_to_token(i))}" for i in sorted(chat.control_ids)]
    return "\n".join(lines) + "\n"
