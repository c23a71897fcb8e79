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
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data import LETTERS, ChatML, Example
from metrics.intervals import Estimate, mean, ratio
from metrics.multiple_choice import parse_letter
from passes import grades


def likelihood(logprobs: Tensor, lengths: Tensor) -> dict[str, Estimate]:
    """Loss and perplexity of the reference answers: logprobs [E] in nats, lengths [E] in tokens."""
    loss = ratio(-logprobs, lengths)
    return {"loss": loss, "perplexity": Estimate(*(math.exp(x) for x in (loss.value, loss.low, loss.high)), loss.n)}


def bleu(answers: list[str], references: list[str]) -> tuple[Estimate, str]:
    """Corpus BLEU, its interval by sacrebleu's own bootstrap over answers, and its signature."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(answers, [references], n_bootstrap=1000)
    signature = str(metric.get_signature())
    shown = json.loads(score.format(width=6, signature=signature, is_json=True))
    middle, spread = shown.get("confidence_mean", score.score), shown.get("confidence_var", 0.0)  # none for a score of 0
    return Estimate(score.score, max(0.0, middle - spread), min(100.0, middle + spread), len(answers)), signature


def rouge(answers: list[str], references: list[str]) -> dict[str, Estimate]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    return {name: mean(torch.tensor([score[key].fmeasure for score in scores])) for key, name in names.items()}


def similarity(answers: list[str], references: list[str]) -> tuple[dict[str, Estimate], str]:
    """BLEU and ROUGE, and BLEU's signature."""
    score, signature = bleu(answers, references)
    return {"BLEU": score, **rouge(answers, references)}, signature


def answer_summary(
    answers: list[str], ended_flags: list[bool], examples: Sequence[Example], chat: ChatML
) -> dict[str, float]:
    """The few numbers about sampled answers that the table at the end of a training run shows."""
    summary = {
        "tokens per answer": sum(len(chat.encode_text(a)) for a in answers) / len(answers),
        "answers that end": sum(ended_flags) / len(answers),
    }
    if all("letter" in e.extra for e in examples):
        picks = [parse_letter(answer, len(e.extra["choices"])) for answer, e in zip(answers, examples, strict=True)]
        right = [pick == LETTERS.index(e.extra["letter"]) for pick, e in zip(picks, examples, strict=True)]
        summary["sampled: right letter"] = sum(right) / len(right)
    return summary | {f"sampled: {name}": sum(right) / len(right) for name, right in grades(answers, examples).items()}
