"""What --stage eval measures, beside TRL (rewards), transformers (options, perplexity), NLTK (BLEU) and rouge-score."""

import copy
import math

import pytest
import torch
import transformers
from nltk.translate.bleu_score import corpus_bleu
from peers import trl_batch, trl_trainer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

import demo
from data import LETTERS, ChatML, Ledger, encode, lengths_of, load_tokenizer
from dpo import margin
from metrics.multiple_choice import accuracy, score_options
from metrics.preferences import measure_rewards
from metrics.text import likelihood, similarity
from model import Phi, all_logprobs
from prepare.forms import read_row


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """(their policy, their reference, our policy, our reference, ChatML): the policy is the reference after a push."""
    reference = transformers.PhiForCausalLM.from_pretrained(tiny).eval()
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    directory = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(directory)
    return policy, reference, Phi.from_pretrained(directory), Phi.from_pretrained(tiny), ChatML(load_tokenizer(tiny))


def examples_of(rows, chat):
    return encode(rows, chat, 1024, 512, Ledger())


@torch.no_grad()
def their_logprob(model, prompt, completion) -> float:
    """log pi(completion | prompt) of one row, in nats."""
    logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


def test_reward_accuracy_and_margin_are_trl_s(models, tmp_path):
    their_policy, their_reference, policy, reference, chat = models
    rows = demo.make_pair_rows(demo.make_questions(40, 0), 0.2, 0)
    examples, beta = examples_of(rows, chat), 0.3
    trainer = trl_trainer(tmp_path, copy.deepcopy(their_policy), copy.deepcopy(their_reference), beta=beta)
    trainer.model.train()  # where it keeps its metrics; TRL has no dropout
    loss = trainer.compute_loss(trainer.model, trl_batch(examples)).item()
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    tables = [all_logprobs(model, examples, 7, "cpu", "fp32", "") for model in (policy, reference)]
    ours = measure_rewards(margin(*tables)[None], None, 0.2, beta)
    assert 0 < theirs["rewards/accuracies"] < 1
    assert ours["reward accuracy"].value == pytest.approx(theirs["rewards/accuracies"], abs=1e-6)
    assert beta * ours["margin"].value == pytest.approx(theirs["rewards/margins"], rel=1e-4)
    assert ours["DPO loss"].value == pytest.approx(loss, rel=1e-5)


def test_choices_are_those_of_transformers_log_probabilities(models):
    their_policy, _, policy, _, chat = models
    options = ["9 m", "a rather longer option of 12 km", "force", "the 5 of them", "0"]
    rows = [
        {"question": f"What is {i} * {i + 1}?", "choices": options[: 2 + i % 4], "answer": LETTERS[i % 2]} for i in range(24)
    ]
    examples = examples_of([read_row("mcq", row) for row in rows], chat)
    scored = score_options(policy, examples, chat, 5, "cpu", "fp32")
    right = dict.fromkeys(scored, 0)
    for i, example in enumerate(examples):
        texts = example.choices
        scores = [their_logprob(their_policy, example.prompt, chat.reply(text)) for text in texts]
        letters = [their_logprob(their_policy, example.prompt, chat.reply(letter)) for letter in LETTERS[: len(texts)]]
        per_char = [score / len(text) for score, text in zip(scores, texts, strict=True)]  # as the harness's acc_norm
        for name, values in (("letter", letters), ("summed", scores), ("per char", per_char)):
            assert scored[name][i] == values.index(max(values)), (name, i)
            right[name] += values.index(max(values)) == i % 2
    assert {name: accuracy(picks, examples).value for name, picks in scored.items()} == {n: c / 24 for n, c in right.items()}


def test_perplexity_is_transformers(models):
    their_policy, _, policy, _, chat = models
    rows = demo.make_pair_rows(demo.make_questions(12, 1), 0.0, 0)
    examples = examples_of(rows, chat)
    nats = -sum(their_logprob(their_policy, e.prompt, e.completions[0]) for e in examples)
    tokens = sum(len(e.completions[0]) for e in examples)
    logprobs, lengths = all_logprobs(policy, examples, 5, "cpu", "fp32", "")[:, 0], lengths_of(examples)[:, 0]
    ours = likelihood(logprobs, lengths)
    assert ours["loss"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert ours["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-4)


REFERENCES = [
    "First, we need to find the factors of 120 and of 40, which are 1, 2, 4, 5, 8, 10, 20 and 40.",
    "The net force is F = P - Q = 12 - 6 = 6 N, because the two forces are opposed.",
    "It's a 5% increase; therefore the right option is (C).",
    "Enzymes lower the activation energy of a reaction, so it goes faster at the same temperature.",
]
ANSWERS = [
    "First we find the factors of 120 and of 40, which are 1, 2, 4, 5, 8, 10, 20, 40.",
    "The net force is F = P + Q = 12 + 6 = 18 N, because the two forces are added up.",
    "It is a 5% increase; so the right option is (C).",
    "Enzymes lower the activation energy of a reaction, so it goes faster.",
]


def test_bleu_is_nltk_s_on_the_same_tokens():
    ours, signature = similarity(ANSWERS, REFERENCES)
    tokens = Tokenizer13a()
    theirs = corpus_bleu([[tokens(text).split()] for text in REFERENCES], [tokens(text).split() for text in ANSWERS])
    assert 0.3 < theirs < 0.9 and "tok:13a" in signature
    assert ours["BLEU"].value == pytest.approx(100 * theirs, rel=1e-9)
    assert ours["BLEU"].low < ours["BLEU"].value < ours["BLEU"].high


def test_rouge_is_the_middle_of_google_s_aggregate():
    ours, _ = similarity(ANSWERS, REFERENCES)
    scorer, aggregator = RougeScorer(["rouge1", "rouge2", "rougeL"]), BootstrapAggregator(n_samples=4000)
    scores = [scorer.score(reference, answer) for reference, answer in zip(REFERENCES, ANSWERS, strict=True)]
    for score in scores:
        aggregator.add_scores(score)
    middle = aggregator.aggregate()
    for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        assert ours[name].value == pytest.approx(sum(s[key].fmeasure for s in scores) / len(scores), rel=1e-6)
        assert ours[name].value == pytest.approx(middle[key].mid.fmeasure, abs=0.02)  # the mean of their bootstrap
