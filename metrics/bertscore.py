"""BERTScore: how much of one text's meaning is in another, by the cosines of their tokens' contextual embeddings.

Zhang et al. 2020, "BERTScore: Evaluating text generation with BERT". A BERT turns the reference into vectors x_1 .. x_k and
the candidate into x^_1 .. x^_l, all of length 1. Each token is matched with the most similar one of the other text:

    R = 1/|x| sum_i max_j x_i . x^_j        P = 1/|x^| sum_j max_i x_i . x^_j        F = 2 P R / (P + R)        (eqs. 1-3)

A middle layer agrees with people's judgement better than the last (`BEST_LAYERS`). Random pairs of sentences do not score 0
but some number that depends on model and layer, such as 0.83: compare scores by the same model only.

F is that of the authors' `bert-score` package without idf and rescaling. As there, [CLS] and [SEP] may be matched but do not
count, an empty text scores 0, and a text is cut at the model's maximum. RoBERTa's text begins with a space, so its first
word is the token that it would be inside a sentence. Network and tokenizer are those of `transformers`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from runtime.files import InputError, first_line

# How many layers to use of the models for which it was measured (bert-score 0.3.13's table); of others, all.
BEST_LAYERS = {"bert-base-uncased": 9, "bert-large-uncased": 18, "roberta-base": 10, "roberta-large": 17}


def load_encoder(directory: Path, layers: int | None, device: str) -> tuple:
    """The first `layers` layers (None: all) of a BERT or RoBERTa in fp32, and its tokenizer; InputError if it is none."""
    try:
        import transformers
    except ImportError:
        raise InputError("--bert needs the transformers package: pip install transformers") from None
    if not (directory / "tokenizer.json").is_file():  # transformers would make up an empty one
        raise InputError(f"{directory}/tokenizer.json: no such file")
    transformers.logging.set_verbosity_error()  # or it reports every tensor that the encoder does not need
    options = dict(add_pooling_layer=False, use_safetensors=True, output_loading_info=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        model, loaded = transformers.AutoModel.from_pretrained(directory, **options)
    except Exception as error:  # each version of transformers has its own kinds
        raise InputError(f"{directory}: not a BERT that transformers can read: {first_line(error)}") from None
    config, missing = model.config, sorted(loaded["missing_keys"])
    if config.model_type not in ("bert", "roberta"):
        raise InputError(f"{directory}: model_type is {config.model_type!r}; only 'bert' and 'roberta' can be used")
    if missing:
        raise InputError(f"{directory}: {len(missing)} tensors are missing, the first {missing[0]!r}")
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{directory}: tokenizer.json has {len(tokenizer):,} tokens, the model only {config.vocab_size:,}")
    model.encoder.layer = model.encoder.layer[:layers]
    unused = config.pad_token_id + 1 if config.model_type == "roberta" else 0  # of RoBERTa's positions
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings - unused)
    return model.float().to(device).eval(), tokenizer


@torch.no_grad()
def embed(text: str, model, tokenizer) -> tuple[Tensor, Tensor]:
    """The embeddings [tokens, width] of a text's tokens, and which of them count [tokens]."""
    prefix = " " if model.config.model_type == "roberta" and text.strip() else ""
    batch = tokenizer(prefix + text.strip(), truncation=True, return_tensors="pt").to(model.device)
    ids = batch["input_ids"][0]
    return model(**batch).last_hidden_state[0], (ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)


def greedy_match(candidate: Tensor, reference: Tensor, candidate_counts: Tensor, reference_counts: Tensor) -> Tensor:
    """F [] of embeddings [l, width] and [k, width] (eqs. 1-3). `counts` [l] and [k] are False for tokens that are matched by
    others but do not count themselves; a text of nothing else scores 0."""
    if not (candidate_counts.any() and reference_counts.any()):
        return torch.zeros(())
    similarity = F.normalize(candidate, dim=-1) @ F.normalize(reference, dim=-1).T  # [l, k]
    p, r = similarity.amax(dim=1)[candidate_counts].mean(), similarity.amax(dim=0)[reference_counts].mean()
    return 2 * p * r / (p + r) if p + r else p + r


def bert_score(candidates: list[str], references: list[str], model, tokenizer) -> Tensor:
    """F [pairs] of each candidate against its reference, fp32 on the CPU."""
    scores = []
    pairs = list(zip(candidates, references, strict=True))
    for pair in tqdm(pairs, desc="BERTScore", unit="answer", leave=False, disable=None):
        (x, x_counts), (y, y_counts) = (embed(text, model, tokenizer) for text in pair)
        scores.append(greedy_match(x, y, x_counts, y_counts).item())
    return torch.tensor(scores)
