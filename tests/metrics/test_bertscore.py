"""BERTScore: matching by hand; the encoder written out; scores that depend on the two texts alone."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from metrics.bertscore import BEST_LAYERS, bert_score, embed, greedy_match, load_encoder
from runtime.files import InputError, read_json, write_jsonl
from train import main

WORDS = ["<pad>", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "on", "mat", "a", "dog", "ran", "▁the", "▁cat"]
THE, CAT, SAT, DOG, SPACED_THE = (WORDS.index(w) for w in ("the", "cat", "sat", "dog", "▁the"))
CLS, SEP = 1, 2
D, LAYERS, POSITIONS, EPS = 8, 3, 12, 0.1
CONFIG = {
    "model_type": "bert",
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": len(WORDS),
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": EPS,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def tokenizer(special=True):
    """A token a word; a word after a space has a name of its own if the text itself begins with a space, as RoBERTa's."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    lone = normalizers.Replace(Regex("^ $"), "▁")  # nor is a lone space nothing to RoBERTa's
    made.normalizer = normalizers.Sequence([lone, normalizers.Replace(" the", "▁the")])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", CLS), ("[SEP]", SEP)])
    made.enable_truncation(3)  # what a file says about cutting and padding is not what is done here
    made.enable_padding(length=9)
    return made


def tensors(seed=0):
    """The weights of CONFIG under the hub's names: large enough that a wrong one shows, biases small enough that not all
    texts look alike."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"word": [len(WORDS), D], "position": [POSITIONS, D], "token_type": [2, D]}
    shapes = {f"embeddings.{name}_embeddings.weight": shape for name, shape in shapes.items()}
    matrices = {f"attention.self.{name}": [D, D] for name in ("query", "key", "value")}
    matrices |= {"attention.output.dense": [D, D], "intermediate.dense": [12, D], "output.dense": [D, 12]}
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        for name, shape in matrices.items():
            shapes |= {f"encoder.layer.{layer}.{name}.weight": shape, f"encoder.layer.{layer}.{name}.bias": shape[:1]}
        norms += [f"encoder.layer.{layer}.{name}.LayerNorm" for name in ("attention.output", "output")]
    shapes |= {f"{name}.{kind}": [D] for name in norms for kind in ("weight", "bias")}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, w in weights.items():
        w *= 0.1 if "bias" in name else 0.3 if "encoder" in name else 1
        w += 1 if "LayerNorm.weight" in name else 0
    return weights


def write_bert(directory, weights=None, special=True, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    tokenizer(special).save(str(directory / "tokenizer.json"))
    save_file(tensors() if weights is None else weights, directory / "model.safetensors")
    return directory


@pytest.fixture
def encoder(tmp_path):
    return load_encoder(write_bert(tmp_path / "bert"), None, "cpu")


# ---------------------------------------------------------------------------------------------------------- the score


def match(candidate, reference, candidate_counts, reference_counts):
    made = (torch.tensor(x) for x in (candidate, reference))
    return greedy_match(*made, torch.tensor(candidate_counts), torch.tensor(reference_counts)).item()


def test_matching_by_hand():
    """Lengths do not count, only directions: candidate (1,0), (0,1); reference (1,0), (3,4)/5, (-1,0). Their cosines are 1,
    0.6, -1 and 0, 0.8, 0."""
    candidate, reference = [[2.0, 0.0], [0.0, 7.0]], [[1.0, 0.0], [3.0, 4.0], [-5.0, 0.0]]
    # P = (1 + 0.8) / 2 = 0.9; R = (1 + 0.8 + 0) / 3 = 0.6; F = 1.08 / 1.5
    assert match(candidate, reference, [True, True], [True, True, True]) == pytest.approx(0.72)
    # Only the candidate's first and the reference's last two count: P = 1; R = (0.8 + 0) / 2 = 0.4; F = 0.8 / 1.4. That 0.8
    # is the cosine with a token that does not count itself.
    assert match(candidate, reference, [True, False], [False, True, True]) == pytest.approx(0.8 / 1.4)


def test_cosines_below_zero_stay_below_zero():
    assert match([[1.0, 0.0]], [[-1.0, 0.0]], [True], [True]) == -1


def test_a_text_in_which_nothing_counts_scores_zero():
    x, y = [[1.0, 0.0]], [[0.6, 0.8]]
    assert match(x, y, [False], [True]) == match(x, y, [True], [False]) == match(x, y, [False], [False]) == 0
    assert match([[1.0, 0.0]], [[0.0, 1.0]], [True], [True]) == 0  # P = R = 0: not 0 / 0


def test_identical_texts_score_1_and_others_less(encoder):
    scores = bert_score(["the cat sat", "a dog", "mat"], ["the cat sat", "a dog", "dog"], encoder, 2)
    torch.testing.assert_close(scores[:2], torch.ones(2))
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores[2] < 0.99


def test_exchanging_the_texts_changes_nothing(encoder):
    a, b = ["the cat sat", "mat"], ["a dog ran on the mat", "on the dog"]
    torch.testing.assert_close(bert_score(a, b, encoder, 8), bert_score(b, a, encoder, 8))


def test_the_whole_is_matching_of_states_in_which_the_special_tokens_do_not_count(encoder):
    candidates, references = ["the dog", "cat"], ["the cat", "[SEP] sat"]
    ids = [[CLS, THE, DOG, SEP], [CLS, CAT, SEP], [CLS, THE, CAT, SEP], [CLS, SEP, SAT, SEP]]
    assert encoder.tokens(candidates + references) == ids
    counts = [[False, True, True, False], [False, True, False], [False, True, True, False], [False, False, True, False]]
    states, counts = embed(encoder, ids, 1), [torch.tensor(flags) for flags in counts]
    expected = torch.stack([greedy_match(states[i], states[i + 2], counts[i], counts[i + 2]) for i in (0, 1)])
    torch.testing.assert_close(bert_score(candidates, references, encoder, 4), expected)


def test_an_empty_text_scores_0(encoder):
    scores = bert_score(["", "the cat", " \n", "a dog"], ["the cat", "", "", "a mat"], encoder, 4)
    assert scores[:3].tolist() == [0, 0, 0] and scores[3] != 0
    assert bert_score([], [], encoder, 4).shape == (0,)


def test_batch_size_and_neighbours_do_not_matter(encoder):
    candidates = ["the cat", "a", "the dog ran on the mat", "cat sat on mat", "the cat", "the mat the mat the mat a"]
    references = ["a cat sat", "the dog ran on a mat a", "dog", "cat", "the", "sat sat sat sat"]
    one = bert_score(candidates, references, encoder, 1)
    for batch_size in (2, 3, 100):
        torch.testing.assert_close(bert_score(candidates, references, encoder, batch_size), one, rtol=0, atol=1e-6)
    back = bert_score(candidates[::-1], references[::-1], encoder, 4)
    torch.testing.assert_close(back.flip(0), one, rtol=0, atol=1e-6)
    assert one.unique().shape == one.shape  # each pair has a score of its own


def test_an_evaluation_uses_the_layers_that_belong_to_the_models_name(tiny, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": f"Say {i}", "completion": f"the cat sat {i}"} for i in range(4)])
    directory = write_bert(tmp_path / "known")
    monkeypatch.setitem(BEST_LAYERS, "known", 1)
    flags = f"--stage eval --model {tiny} --data {tmp_path}/sft.jsonl --out {tmp_path} --name e --device cpu"
    assert main([*flags.split(), "--max-new-tokens", "8", "--bert", str(directory)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "e" / "answers.jsonl").read_text().splitlines()]
    answers, references = [row["answers"][str(tiny)] for row in rows], [row["reference"] for row in rows]
    encoders = [load_encoder(directory, layers, "cpu") for layers in (1, None)]
    first, last = (bert_score(answers, references, encoder, 4).mean().item() for encoder in encoders)
    (result,) = read_json(tmp_path / "e" / "eval.json")["results"]
    assert result["answers"]["BERTScore"]["value"] == pytest.approx(first) and abs(first - last) > 1e-3


# -------------------------------------------------------------------------------------------------------- the encoder


def written_out(w, tokens, layers, first_position=0):
    """BERT's encoder in plain products: tokens [T] -> [T, D]."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
        return x * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    h = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.token_type_embeddings.weight"][0]
    h = norm(h + w["embeddings.position_embeddings.weight"][first_position:][: len(tokens)], "embeddings")
    for name in (f"encoder.layer.{layer}" for layer in range(layers)):
        heads = [linear(h, f"{name}.attention.self.{part}").split(D // 2, dim=1) for part in ("query", "key", "value")]
        mixed = torch.cat([(q @ k.T / math.sqrt(D // 2)).softmax(-1) @ v for q, k, v in zip(*heads)], dim=1)
        h = norm(h + linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output")
        inner = linear(h, f"{name}.intermediate.dense")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        h = norm(h + linear(inner, f"{name}.output.dense"), f"{name}.output")
    return h


@pytest.mark.parametrize("layers", [0, 1, 2, None])
def test_hidden_states_are_those_of_bert_written_out(tmp_path, layers):
    encoder = load_encoder(write_bert(tmp_path), layers, "cpu")
    texts = [[CLS, THE, CAT, SAT, SEP], [CLS, DOG, SEP], [CLS, SEP]]
    for tokens, states in zip(texts, embed(encoder, texts, 3)):
        expected = written_out(tensors(), tokens, LAYERS if layers is None else layers)
        torch.testing.assert_close(states, expected, rtol=0, atol=2e-5)


def test_robertas_positions_begin_after_the_padding_and_its_text_with_a_space(tmp_path):
    roberta = load_encoder(write_bert(tmp_path, model_type="roberta", pad_token_id=3), None, "cpu")
    tokens = [CLS, THE, CAT, SEP]
    torch.testing.assert_close(embed(roberta, [tokens], 1)[0], written_out(tensors(), tokens, 3, 4), rtol=0, atol=2e-5)
    assert roberta.tokens(["the", "  the cat ", " "]) == [[CLS, SPACED_THE, SEP], [CLS, SPACED_THE, CAT, SEP], [CLS, SEP]]
    assert len(roberta.tokens(["cat " * 50])[0]) == POSITIONS - 4


def test_a_bert_reads_its_text_without_that_space(encoder):
    assert encoder.tokens(["  the cat "]) == [[CLS, THE, CAT, SEP]]


def test_long_texts_are_cut_at_the_positions_or_at_what_the_tokenizer_config_says(tmp_path):
    long = "the " + "cat " * 50
    assert load_encoder(write_bert(tmp_path), 1, "cpu").tokens([long]) == [[CLS, THE, *[CAT] * 9, SEP]]
    for limit, length in ((7, 7), (int(1e30), POSITIONS)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
        assert load_encoder(tmp_path, 1, "cpu").tokens([long]) == [[CLS, THE, *[CAT] * (length - 3), SEP]]


@pytest.mark.parametrize("prefix", ["bert.", "roberta."])
def test_prefixed_and_old_names_and_half_precision_are_the_same_weights(tmp_path, prefix):
    weights = {name: tensor.half() for name, tensor in tensors().items()}
    plain = load_encoder(write_bert(tmp_path / "plain", weights), None, "cpu").bert
    renamed = {
        prefix + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights.items()
    }
    renamed |= {"cls.predictions.bias": torch.zeros(3), f"{prefix}pooler.dense.weight": torch.zeros(D, D)}
    loaded = load_encoder(write_bert(tmp_path / "renamed", renamed), None, "cpu").bert
    for (name, ours), theirs in zip(loaded.named_parameters(), plain.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs), name


def test_more_layers_than_there_are_are_all(tmp_path):
    assert [len(load_encoder(write_bert(tmp_path), layers, "cpu").bert.layers) for layers in (None, 9, 2, 0)] == [3, 3, 2, 0]


def test_layers_that_are_not_used_need_not_be_there(tmp_path):
    first = {name: tensor for name, tensor in tensors().items() if ".layer.2." not in name}
    assert len(load_encoder(write_bert(tmp_path, first), 2, "cpu").bert.layers) == 2


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deberta-v2"}, "model_type is 'deberta-v2'; only 'bert' and 'roberta'"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new' is not supported, only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"intermediate_size": None}, "not the sizes of a BERT .TypeError"),
        ({"num_attention_heads": 3}, "not the sizes of a BERT .AssertionError.*divisible"),
        ({"num_hidden_layers": 4}, "missing, the first 'encoder.layer.3.attention.self.query.weight'"),
        ({"intermediate_size": 10}, r"intermediate.dense.bias' has shape \[12\], the config needs \[10"),
        ({"vocab_size": 9}, r"word_embeddings.weight' has shape \[14, 8\]"),
        ({"special": False}, "puts 0 tokens around a text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_does_not_fit_is_an_error(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_encoder(write_bert(tmp_path, **changes), None, "cpu")


def test_more_tokens_than_the_model_has_are_an_error(tmp_path):
    weights = tensors()
    weights["embeddings.word_embeddings.weight"] = torch.zeros(13, D)
    with pytest.raises(InputError, match="tokenizer.json has 14 tokens, the model only 13"):
        load_encoder(write_bert(tmp_path, weights, vocab_size=13), None, "cpu")


def test_integers_are_no_weights(tmp_path):
    weights = tensors() | {"embeddings.LayerNorm.bias": torch.ones(D, dtype=torch.int64)}
    with pytest.raises(InputError, match="'embeddings.LayerNorm.bias' holds I64, not floating-point"):
        load_encoder(write_bert(tmp_path, weights), None, "cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_an_error(tmp_path, name):
    (write_bert(tmp_path) / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        load_encoder(tmp_path, None, "cpu")


def test_a_missing_directory_and_a_pickle_are_errors(tmp_path):
    with pytest.raises(InputError, match="none/config.json: no such file"):
        load_encoder(tmp_path / "none", None, "cpu")
    (write_bert(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="a pickled pytorch_model.*which is never read"):
        load_encoder(tmp_path, None, "cpu")


def test_lists_of_different_length_are_an_error(encoder):
    with pytest.raises(ValueError):
        bert_score(["a", "the"], ["a"], encoder, 4)
