"""What gives the preferred answer away without its content: its length and its words.

A model can reach the accuracy of these scores without learning what a good answer is. Each is right about a share of the
pairs that it was not fitted on: the questions are dealt into five parts, and each part is scored by a fit on the other four.
Guessing reaches a half. On pairs that were matched in length a score may come out a little lower: where the longer answers
of a bin win in one part, they lose in the others, so a fit on those is wrong.

    lengths alone   logistic regression of "the longer answer is the chosen one" on l = log(longer), s = log(shorter),
                    d = log(difference), and their squares and products
    words alone     naive Bayes: a word in the share p of the chosen and q of the rejected answers counts log p - log q for
                    every answer that holds it, and the answer with the larger sum is taken to be the chosen one
"""

import hashlib
import math
import re
from collections import Counter

import torch
from torch import Tensor

PARTS = 5
FEWEST = 50  # pairs; of less a score says nothing


def score(right: list[float]) -> str:
    """The share and its standard error in words, from 1, 0 or, for a tie, 0.5 for each pair."""
    if len(right) < FEWEST:
        return "too few pairs"
    share = sum(right) / len(right)
    return f"{share:.1%} ± {math.sqrt(share * (1 - share) / len(right)):.1%}"


def part_of(row: dict) -> int:
    """Which of the five parts the question of a row is in."""
    return hashlib.sha256(row["question"].casefold().encode()).digest()[0] % PARTS


def longer_wins(rows: list[dict]) -> str:
    """The plainest score: the longer answer is the chosen one."""
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    return score([0.5 if gap == 0 else float(gap > 0) for gap in gaps])


def by_length(rows: list[dict]) -> str:
    """How often a score of the two lengths alone, in characters, finds the chosen answer."""
    if len(rows) < FEWEST:
        return score([])
    lengths = torch.tensor([[len(row["chosen"]), len(row["rejected"])] for row in rows]).double()  # [n, 2]
    gap = lengths[:, 0] - lengths[:, 1]
    basic = torch.stack((lengths.amax(1), lengths.amin(1), gap.abs())).clamp(min=1).log().T  # [n, 3]
    basic = (basic - basic.mean(0)) / basic.std(0).clamp(min=1e-6)
    x = torch.cat((torch.ones(len(rows), 1), basic, *(basic * basic.roll(k, 1) for k in range(2))), dim=1)  # [n, 10]
    part = torch.tensor([part_of(row) for row in rows])
    right = torch.full((len(rows),), 0.5)
    for held_out in range(PARTS):
        fit, here = (part != held_out) & (gap != 0), (part == held_out) & (gap != 0)
        says_longer = x[here] @ logistic(x[fit], (gap[fit] > 0).double()) > 0
        right[here] = (says_longer == (gap[here] > 0)).float()
    return score(right.tolist())


def logistic(x: Tensor, y: Tensor) -> Tensor:
    """The weights [k] of logistic regression of y [n], 0 or 1, on x [n, k], with a small ridge, by Newton's method."""
    weights = x.new_zeros(x.shape[1])
    for _ in range(20):
        p = (x @ weights).sigmoid()
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + torch.eye(len(weights)).double()
        weights = weights + torch.linalg.solve(curvature, x.T @ (y - p) - weights)
    return weights


def by_words(rows: list[dict]) -> str:
    """How often a bag of words finds the chosen answer."""
    words = [[set(re.findall(r"\w+", row[name].casefold())) for name in ("chosen", "rejected")] for row in rows]
    parts, right = [part_of(row) for row in rows], []
    for held_out in range(PARTS):
        counts = [Counter(), Counter()]
        for pair, part in zip(words, parts):
            for count, said in zip(counts, pair if part != held_out else ()):
                count.update(said)
        weight = {word: math.log((counts[0][word] + 1) / (counts[1][word] + 1)) for word in counts[0] | counts[1]}
        for pair in (pair for pair, part in zip(words, parts) if part == held_out):
            chosen, rejected = (math.fsum(weight.get(word, 0.0) for word in said) for said in pair)
            right.append(0.5 if chosen == rejected else float(chosen > rejected))
    return score(right)


SCORES = {"longer answer wins": longer_wins, "lengths alone": by_length, "words alone": by_words}
