"""BERTScore: how much of one text's meaning is in another, by the cosines of their tokens' contextual embeddings.

Zhang et al. 2020, "BERTScore: Evaluating text generation with BERT". A BERT turns the reference into vectors x_1 .. x_k and
the candidate into x^_1 .. x^_l, all of length 1. Each token is matched with the most similar one of the other text:

    R = 1/|x| sum_i max_j x_i . x^_j        P = 1/|x^| sum_j max_i x_i . x^_j        F = 2 P R / (P + R)        (eqs. 1-3)

A middle layer agrees with people's judgement better than the last (`BEST_LAYERS`). Random pairs of sentences do not score 0
but some number that depends on model and layer, such as 0.83: compare scores by the same model only.

F is that of the authors' `bert-score` package without idf and rescaling. As there, [CLS] and [SEP] may be matched but do not
count, an empty text scores 0, and a text is cut at the model's maximum. RoBERTa's text begins with a space, so its first
word is the token that it would be inside a sentence.

Letters: B texts of a batch, T tokens, D width, N pairs.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from data import by_length, load_tokenizer
from runtime.files import InputError, read_json
from runtime.weights import load_weights

# How many layers to use of the models for which it was measured (bert-score 0.3.13's table); of others, all.
BEST_LAYERS = {"bert-base-uncased": 9, "bert-large-uncased": 18, "roberta-base": 10, "roberta-large": 17}

# ------------------------------------------------------------------------------------------------------- the encoder


class Bert(nn.Module):
    """The embeddings and the first `layers` layers of a BERT (Devlin et al. 2019) or RoBERTa (Liu et al. 2019), which counts
    its positions from padding_idx + 1: `first_position`."""

    def __init__(self, config: dict, layers: int, first_position: int):
        super().__init__()
        D, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-12)
        self.words = nn.Embedding(config["vocab_size"], D)
        self.positions = nn.Embedding(config["max_position_embeddings"], D)
        self.types = nn.Embedding(config["type_vocab_size"], D)  # first or second sentence of a pair: here always the first
        self.norm = nn.LayerNorm(D, eps)
        sizes = D, config["num_attention_heads"], config["intermediate_size"], 0.0, F.gelu, eps  # 0.0: no dropout
        # LayerNorm after each half, and the exact gelu, as BERT has them.
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, batch_first=True) for _ in range(layers))
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
    special: Tensor  # [2] the ids of [CLS] and [SEP], which stand around every text
    prefix: str  # " " for RoBERTa

    def tokens(self, texts: list[str]) -> list[list[int]]:
        stripped = [text.strip() for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch([text and self.prefix + text for text in stripped])]


def load_encoder(directory: str | Path, layers: int | None, device: str) -> Encoder:
    """The first `layers` layers (None: all; 0: only the embeddings) of a BERT or RoBERTa in fp32, from a directory with
    config.json, tokenizer.json and model.safetensors. InputError if it is another network or its files do not fit."""
    directory = Path(directory)
    path = directory / "config.json"
    config = read_json(path)
    if config.get("model_type") not in ("bert", "roberta"):
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}; only 'bert' and 'roberta' can be used")
    for name, supported in {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}.items():
        if config.get(name, supported) != supported:
            raise InputError(f"{path}: {name} = {config[name]!r} is not supported, only {supported!r}")
    roberta = config["model_type"] == "roberta"
    first_position = config.get("pad_token_id", 1) + 1 if roberta else 0
    try:
        total = config["num_hidden_layers"]
        with torch.device("meta"):
            bert = Bert(config, total if layers is None else min(layers, total), first_position)
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"{path}: these are not the sizes of a BERT ({error!r})") from None
    bert.to_empty(device=device)
    load_weights(bert, directory, wanted=by_stored_name(bert), rename=current_names)

    tokenizer = load_tokenizer(directory)
    if (count := tokenizer.get_vocab_size()) > config["vocab_size"]:
        raise InputError(f"{directory}: tokenizer.json has {count:,} tokens, the model only {config['vocab_size']:,}")
    limit = config["max_position_embeddings"] - first_position
    if (directory / "tokenizer_config.json").is_file():  # some models were trained on less than they have positions for
        limit = min(limit, read_json(directory / "tokenizer_config.json").get("model_max_length", limit))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    if len(special := tokenizer.encode("").ids) != 2:
        raise InputError(f"{directory}/tokenizer.json: puts {len(special)} tokens around a text, not [CLS] and [SEP]")
    # Not bert.eval(): there is no dropout, and in eval mode PyTorch's encoder layers take a fused path that holds all T x T
    # attention weights and is half as fast for long texts on a CPU.
    return Encoder(bert.requires_grad_(False), tokenizer, torch.tensor(special), " " if roberta else "")


STORED_NAMES = {  # our name: the stored tensors whose rows make it up
    "words.": ["embeddings.word_embeddings."],
    "positions.": ["embeddings.position_embeddings."],
    "types.": ["embeddings.token_type_embeddings."],
    "self_attn.in_proj_": ["attention.self.query.", "attention.self.key.", "attention.self.value."],
    "self_attn.out_proj.": ["attention.output.dense."],
    "norm1.": ["attention.output.LayerNorm."],
    "linear1.": ["intermediate.dense."],
    "linear2.": ["output.dense."],
    "norm2.": ["output.LayerNorm."],
    "norm.": ["embeddings.LayerNorm."],
}


def by_stored_name(bert: Bert) -> dict[str, Tensor]:
    """The parameters by their names in a checkpoint; of query, key and value, which are one tensor here, its three parts."""
    named = {}
    for name, p in bert.named_parameters():
        ours, theirs = next(item for item in STORED_NAMES.items() if item[0] in name)
        for part, their in zip(p.detach().chunk(len(theirs)), theirs, strict=True):
            named[name.replace("layers.", "encoder.layer.").replace(ours, their)] = part
    return named


def current_names(key: str) -> list[str]:
    """The one name of a stored tensor, whichever class and version of transformers wrote it."""
    key = re.sub(r"^(bert|roberta)\.", "", key)
    return [key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")]


@torch.no_grad()
def embed(encoder: Encoder, tokens: list[list[int]], batch_size: int) -> list[Tensor]:
    """The hidden states [T, D] of each text's tokens, on the CPU."""
    device, states = encoder.bert.norm.weight.device, [torch.empty(0)] * len(tokens)
    order = by_length(tokens)
    for start in tqdm(range(0, len(order), batch_size), desc="embedding", unit="batch", leave=False, disable=None):
        part = order[start : start + batch_size]
        padded = nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in part], batch_first=True)  # [B, T]
        padding = torch.arange(padded.shape[1]) >= torch.tensor([len(tokens[i]) for i in part])[:, None]
        h = encoder.bert(padded.to(device), padding.to(device)).cpu()  # [B, T, D]
        for i, row in zip(part, h):
            states[i] = row[: len(tokens[i])].clone()  # or it would keep the whole batch alive
    return states


# ---------------------------------------------------------------------------------------------------------- the score


def greedy_match(candidate: Tensor, reference: Tensor, candidate_counts: Tensor, reference_counts: Tensor) -> Tensor:
    """F [] of embeddings [T, D] and [T', D] (eqs. 1-3). `counts` [T] and [T'] are False for tokens that are matched by
    others but do not count themselves; a text of nothing else scores 0."""
    if not (candidate_counts.any() and reference_counts.any()):
        return torch.zeros(())
    similarity = F.normalize(candidate, dim=-1) @ F.normalize(reference, dim=-1).T  # [T, T']
    p, r = similarity.amax(dim=1)[candidate_counts].mean(), similarity.amax(dim=0)[reference_counts].mean()
    return 2 * p * r / (p + r) if p + r else p + r


def bert_score(candidates: list[str], references: list[str], encoder: Encoder, batch_size: int) -> Tensor:
    """F [N] of each candidate against its reference, fp32 on the CPU."""
    pairs = list(zip(candidates, references, strict=True))
    texts = list(dict.fromkeys([*candidates, *references]))  # each distinct text is encoded once
    tokens = encoder.tokens(texts)
    states = dict(zip(texts, embed(encoder, tokens, batch_size)))
    counts = {text: ~torch.isin(torch.tensor(ids), encoder.special) for text, ids in zip(texts, tokens)}
    scores = torch.zeros(len(pairs))
    for i, (c, r) in enumerate(tqdm(pairs, desc="matching", unit="pair", leave=False, disable=None)):
        scores[i] = greedy_match(states[c], states[r], counts[c], counts[r])
    return scores
