"""Texts, measured: how likely the reference answers are, and how much the model's own answers look like them.

    loss         - sum log pi(y|x) / tokens of y over the reference answers, nats per token; perplexity is its exponential.
                 A mean over tokens, not of the answers' means. Of two models, compare it only if they share a tokenizer
    BLEU         Papineni et al. 2002, 0 to 100, by sacrebleu, whose signature says how it was counted
    ROUGE-1/2/L  Lin 2004, F-measure 0 to 1, by rouge-score, without stemming
    BERTScore    Zhang et al. 2020, F1 (bertscore.py)
    ends         share of the model's answers that end by themselves within the tokens that they were given

All but the first compare one sampled answer with one reference; they reward its words, not its truth.
"""

import json

import torch
from torch import Tensor

from metrics.intervals import Estimate, mean, ratio


def likelihood(logprobs: Tensor, lengths: Tensor) -> dict[str, Estimate]:
    """Loss and perplexity of the reference answers: logprobs [E] in nats, lengths [E] in tokens."""
    loss = ratio(-logprobs, lengths)
    perplexity = torch.tensor([loss.value, loss.low, loss.high], dtype=torch.float64).exp().tolist()  # infinite from 710 on
    return {"loss": loss, "perplexity": Estimate(*perplexity, loss.n)}


def similarity(answers: list[str], references: list[str]) -> tuple[dict[str, Estimate], str]:
    """Corpus BLEU, its interval by sacrebleu's own bootstrap over answers; mean F-measures of ROUGE; BLEU's signature."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(answers, [references], n_bootstrap=1000)
    signature = str(metric.get_signature())
    shown = json.loads(score.format(width=6, signature=signature, is_json=True))
    middle, spread = shown.get("confidence_mean", score.score), shown.get("confidence_var", 0.0)  # none for a score of 0
    made = {"BLEU": Estimate(score.score, max(0.0, middle - spread), min(100.0, middle + spread), len(answers))}
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    for kind in "12L":
        made[f"ROUGE-{kind}"] = mean(torch.tensor([score[f"rouge{kind}"].fmeasure for score in scores]))
    return made, signature
