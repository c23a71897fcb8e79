"""BERTScore: how much of one text's meaning is in another, by the cosines of their tokens' contextual embeddings.

Zhang et al. 2020, "BERTScore: Evaluating text generation with BERT". A BERT turns the reference into vectors x_1 .. x_k and
the candidate into x^_1 .. x^_l, all of length 1. Each token is matched with the most similar one of the other text:

    R = 1/|x| sum_i max_j x_i . x^_j        P = 1/|x^| sum_j max_i x_i . x^_j        F = 2 P R / (P + R)        (eqs. 1-3)

With idf the sums are weighted, so that rare words count more. Over N references of which df(w) hold the token w

    R = sum_i idf(x_i) max_j x_i . x^_j / sum_i idf(x_i),  P likewise,        idf(w) = log[(N + 1) / (df(w) + 1)]

Random pairs of sentences do not score 0 but some b that depends on model and layer (0.83 with 17 layers of RoBERTa-large),
so all scores crowd between b and 1. Rescaling with this baseline, (x - b) / (1 - b), moves b to 0 and leaves 1 where it is.

The numbers are those of the authors' `bert-score` package. As there, [CLS] and [SEP] are embedded and may be matched but
weigh nothing; an empty text scores 0 (before rescaling); a text is cut at the model's maximum; RoBERTa's text begins with a
space, so that its first word is the token that it would be inside a sentence (the package asks for that, but transformers 5
ignores it). Where idf leaves a text without weight, the package says NaN; here that side's score is 0.

Letters: B texts of a batch, T tokens, D width, N pairs, V vocabulary.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from data import load_tokenizer
from files import InputError, read_json
from weights import stored_tensors

# ------------------------------------------------------------------------------------------------------- the encoder


class Bert(nn.Module):
    """The embeddings and the first `layers` layers of a BERT (Devlin et al. 2019) or RoBERTa (Liu et al. 2019).

    RoBERTa is the same network, but its positions are counted from padding_idx + 1: `first_position`.
    """

    def __init__(self, config: dict, layers: int, first_position: int):
        super().__init__()
        D, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-12)
        self.words = nn.Embedding(config["vocab_size"], D)
        self.positions = nn.Embedding(config["max_position_embeddings"], D)
        self.types = nn.Embedding(config["type_vocab_size"], D)  # first or second sentence of a pair: here always the first
        self.norm = nn.LayerNorm(D, eps)
        H, inner = config["num_attention_heads"], config["intermediate_size"]
        make = nn.TransformerEncoderLayer  # LayerNorm after each half, and the exact gelu, as BERT has them
        self.layers = nn.ModuleList(
            make(D, H, inner, dropout=0.0, activation=F.gelu, layer_norm_eps=eps, batch_first=True) for _ in range(layers)
        )
        self.first_position = first_position

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Hidden states after the last layer [B, T, D] of tokens [B, T]; padding [B, T] is True where there is no token."""
        position = torch.arange(tokens.shape[1], device=tokens.device) + self.first_position  # [T]
        h = self.norm(self.words(tokens) + self.types.weight[0] + self.positions(position))  # [B, T, D]
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=padding)
        return h


@dataclass
class Encoder:
    """A Bert with what turns text into its tokens."""

    bert: Bert
    tokenizer: Tokenizer  # cuts at the model's maximum
    special: list[int]  # the ids of [CLS] and [SEP], which stand around every text
    prefix: str  # " " for RoBERTa

    def tokens(self, texts: list[str]) -> list[list[int]]:
        stripped = [text.strip() for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch([text and self.prefix + text for text in stripped])]


def load_encoder(directory: str | Path, layers: int | None, device: str) -> Encoder:
    """The first `layers` layers (None: all; 0: only the embeddings) of a BERT or RoBERTa in fp32, from a directory with
    config.json, tokenizer.json and model.safetensors. InputError if it is another network or its files do not fit."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; it holds a BERT's config.json, tokenizer.json, model.safetensors")
    config = read_config(directory / "config.json")
    total, roberta = config["num_hidden_layers"], config["model_type"] == "roberta"
    if layers is not None and not 0 <= layers <= total:
        raise InputError(f"{directory}: the model has {total} layers, not {layers}: choose 0 to {total} of them")
    first_position = config.get("pad_token_id", 1) + 1 if roberta else 0
    with torch.device("meta"):
        bert = Bert(config, total if layers is None else layers, first_position)
    fill(bert, directory, device)

    tokenizer = load_tokenizer(directory)
    if (count := tokenizer.get_vocab_size()) > config["vocab_size"]:
        raise InputError(f"{directory}: tokenizer.json has {count:,} tokens, the model only {config['vocab_size']:,}")
    limit = config["max_position_embeddings"] - first_position
    if (directory / "tokenizer_config.json").is_file():  # some models were trained on less than they have positions for
        limit = min(limit, read_json(directory / "tokenizer_config.json").get("model_max_length", limit))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    special = tokenizer.encode("").ids
    if len(special) != 2:
        raise InputError(f"{directory}/tokenizer.json: puts {len(special)} tokens around a text, not [CLS] and [SEP]")
    # Not bert.eval(): there is no dropout, and in eval mode PyTorch's encoder layers take a fused path that holds all T x T
    # attention weights and is half as fast for long texts on a CPU.
    return Encoder(bert.requires_grad_(False), tokenizer, special, " " if roberta else "")


def read_config(path: Path) -> dict:
    """config.json, checked: InputError if it is not BERT or RoBERTa, or asks for something that `Bert` does not compute."""
    config = read_json(path)
    if config.get("model_type") not in ("bert", "roberta"):
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}; only 'bert' and 'roberta' can be used")
    for name, supported in {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}.items():
        if config.get(name, supported) != supported:
            raise InputError(f"{path}: {name} = {config[name]!r} is not supported, only {supported!r}")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "vocab_size", "max_position_embeddings", "type_vocab_size"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{path}: {name} is {config.get(name)!r}, not a positive number")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(f"{path}: {config['num_attention_heads']} heads do not divide a width of {config['hidden_size']}")
    return config


STORED_NAMES = (  # our name: the stored tensors whose rows make it up
    ("words.", ["embeddings.word_embeddings."]),
    ("positions.", ["embeddings.position_embeddings."]),
    ("types.", ["embeddings.token_type_embeddings."]),
    ("self_attn.in_proj_", ["attention.self.query.", "attention.self.key.", "attention.self.value."]),
    ("self_attn.out_proj.", ["attention.output.dense."]),
    ("norm1.", ["attention.output.LayerNorm."]),
    ("linear1.", ["intermediate.dense."]),
    ("linear2.", ["output.dense."]),
    ("norm2.", ["output.LayerNorm."]),
    ("norm.", ["embeddings.LayerNorm."]),
)


def fill(bert: Bert, directory: Path, device: str) -> None:
    """Reads each parameter of a Bert on the meta device. What else is stored (pooler, heads, later layers) is left alone."""
    stored = {}  # current name: (file, stored name)
    for shard, name in stored_tensors(directory):
        modern = re.sub(r"^(bert|roberta)\.", "", name)
        modern = modern.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        stored[modern] = (shard, name)
    tensors = {}
    for name, p in bert.named_parameters():
        ours, theirs = next((ours, theirs) for ours, theirs in STORED_NAMES if ours in name)
        names = [name.replace("layers.", "encoder.layer.").replace(ours, their) for their in theirs]
        shape = [p.shape[0] // len(names), *p.shape[1:]]
        tensors[name] = torch.cat([read_tensor(stored, part, shape, directory) for part in names]).to(device)
    bert.load_state_dict(tensors, assign=True)


def read_tensor(stored: dict[str, tuple[Path, str]], name: str, shape: list[int], directory: Path) -> Tensor:
    if name not in stored:
        raise InputError(f"{directory}: the weights have no tensor {name!r}, which the config asks for")
    shard, stored_name = stored[name]
    with safe_open(shard, framework="pt") as file:
        tensor = file.get_tensor(stored_name)
    if list(tensor.shape) != shape or not tensor.is_floating_point():
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise InputError(f"{shard}: tensor {stored_name!r} holds {found}, the config needs floats {shape}")
    return tensor.float()


@torch.no_grad()
def embed(encoder: Encoder, tokens: list[list[int]], batch_size: int) -> list[Tensor]:
    """The hidden states [T, D] of each text's tokens, on the CPU."""
    device, states = encoder.bert.norm.weight.device, [torch.empty(0)] * len(tokens)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))  # like lengths together: little padding
    for start in tqdm(range(0, len(order), batch_size), desc="embedding", unit="batch", leave=False, disable=None):
        part = order[start : start + batch_size]
        length = torch.tensor([len(tokens[i]) for i in part])  # [B]
        padded = nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in part], batch_first=True)  # [B, T]
        padding = torch.arange(padded.shape[1]) >= length[:, None]
        h = encoder.bert(padded.to(device), padding.to(device)).cpu()  # [B, T, D]
        for i, row, n in zip(part, h, length.tolist()):
            states[i] = row[:n].clone()  # or it would keep the whole batch alive
    return states


# ---------------------------------------------------------------------------------------------------------- the score


def greedy_match(candidate: Tensor, reference: Tensor, candidate_weight: Tensor, reference_weight: Tensor) -> Tensor:
    """P, R and F [3] of embeddings [T, D] and [T', D] with weights [T] and [T'] (eqs. 1-3). A side whose tokens all weigh
    nothing scores 0, and F is 0 where P and R are."""
    similarity = F.normalize(candidate, dim=-1) @ F.normalize(reference, dim=-1).T  # [T, T']
    sides = (similarity.amax(dim=1), candidate_weight), (similarity.amax(dim=0), reference_weight)
    p, r = [(best * w).sum() / w.sum() if w.any() else torch.zeros(()) for best, w in sides]
    return torch.stack((p, r, 2 * p * r / (p + r) if p or r else p))


def idf_weights(references: list[list[int]], vocabulary: int) -> Tensor:
    """log[(N + 1) / (df + 1)] [V]; a token that no reference holds has df = 0. Every reference holds [CLS] and [SEP]: 0."""
    df = torch.zeros(vocabulary, dtype=torch.float64)
    for tokens in references:
        df[list(set(tokens))] += 1
    return ((len(references) + 1) / (df + 1)).log().float()


def bert_score(
    candidates: list[str],
    references: list[str],
    encoder: Encoder,
    idf: bool,
    baseline: tuple[float, float, float] | None,
    batch_size: int,
) -> Tensor:
    """Precision, recall and F1 [N, 3] of each candidate against its reference, fp32 on the CPU.

    idf: weigh tokens by how few of `references` hold them; baseline: P, R and F of `read_baseline`, or None to not rescale.
    """
    pairs = list(zip(candidates, references, strict=True))
    texts = list(dict.fromkeys([*candidates, *references]))  # each distinct text is encoded once
    tokens = dict(zip(texts, encoder.tokens(texts)))
    states = dict(zip(texts, embed(encoder, list(tokens.values()), batch_size)))
    weight = torch.ones(encoder.bert.words.num_embeddings)  # [V]
    weight[encoder.special] = 0
    if idf:
        weight = idf_weights([tokens[r] for r in references], len(weight))
    scores = torch.zeros(len(pairs), 3)  # [N, 3]
    for i, (c, r) in enumerate(tqdm(pairs, desc="matching", unit="pair", leave=False, disable=None)):
        if tokens[c] != encoder.special and tokens[r] != encoder.special:  # neither is empty
            scores[i] = greedy_match(states[c], states[r], weight[tokens[c]], weight[tokens[r]])
    return scores if baseline is None else rescale(scores, baseline)


def rescale(scores: Tensor, baseline: tuple[float, float, float]) -> Tensor:
    """(x - b) / (1 - b) of P, R and F [N, 3], each with a baseline of its own."""
    b = torch.tensor(baseline)  # [3]
    return (scores - b) / (1 - b)


def read_baseline(path: str | Path, layers: int) -> tuple[float, float, float]:
    """The baseline P, R, F of a layer from a file of the bert-score package (rescale_baseline/en/MODEL.tsv; each model has
    its own): the header LAYER,P,R,F, then a row a layer, with commas or tabs."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a baseline file ({error})") from None
    header, *rows = [re.split("[,\t]", line.strip()) for line in lines if line.strip()] or [[]]
    rows = {row[0]: row[1:] for row in rows}
    if header != ["LAYER", "P", "R", "F"]:
        raise InputError(f"{path}: does not begin with LAYER,P,R,F, so it is no baseline file of the bert-score package")
    if str(layers) not in rows:
        raise InputError(
            f"{path}: has no row for layer {layers}, only for {', '.join(rows) or 'none'}; use as many layers of the model "
            "as one of these rows says, or take the file that belongs to the model"
        )
    try:
        p, r, f = (float(cell) for cell in rows[str(layers)])
    except ValueError:
        p = r = f = float("nan")
    if not all(-1 < b < 1 for b in (p, r, f)):
        raise InputError(f"{path}: layer {layers}: {','.join(rows[str(layers)])} are not three numbers P, R, F below 1")
    return p, r, f
