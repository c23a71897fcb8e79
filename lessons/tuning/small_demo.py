"""The demo in small, for lessons that tune a network: three kinds of question, two blocks of width 64, seconds of training.

The questions are those of the demo that show a single number, so that a model this small learns to copy it within 300 steps.
Afterwards it has seen right and wrong answers, as the demo's SFT model has, and gives both.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import demo
import train
from data import ChatML, Example, Ledger, encode, epoch_order, grades
from generate import sample_answers
from model import Phi, PhiConfig, all_logprobs
from runtime.optimizer import make_optimizer
from runtime.settings import Sft, Tuning

KINDS = ("perimeter", "seconds", "metres")
SIZE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
COMMON = {"device": "cpu", "dtype": "fp32", "epochs": 1, "batch_size": 16, "micro_batch_size": 16}  # settings of all stages
SFT_QUESTIONS, PAIRS, TEST = 3_600, 720, 200


@dataclass
class SmallDemo:
    """The SFT model, which no lesson may change, and the questions that it has not seen."""

    model: Phi
    chat: ChatML
    pair_questions: list[dict]  # of demo.make_questions
    test: list[Example]  # pairs with clean labels
    test_reference: Tensor  # log-probabilities of the SFT model, [TEST, 2]

    def pairs(self, flip_rate: float, seed: int = 0) -> list[Example]:
        return as_examples(demo.make_pair_rows(self.pair_questions, flip_rate, seed), self.chat)

    def right_method(self, model: Phi, count: int, seed: int = 0) -> float:
        """The share of sampled answers to `count` test prompts whose formula, numbers and unit are right."""
        asked = self.test[:count]
        answers, _ = sample_answers(model, self.chat, [e.prompt for e in asked], 32, 1.0, seed)
        right = grades(answers, asked)["right method"]
        return sum(right) / len(right)


def as_examples(rows: list, chat: ChatML) -> list[Example]:
    return encode(rows, chat, 256, 128, Ledger())


@functools.cache
def small_demo(seed: int = 0) -> SmallDemo:
    """The small demo after SFT, made once for all lessons of a command."""
    wanted = SFT_QUESTIONS + PAIRS + TEST
    made = demo.make_questions(wanted * len(demo.KINDS) * 13 // (10 * len(KINDS)), seed)
    questions = [q for q in made if q["kind"] in KINDS][:wanted]
    tokenizer = demo.train_tokenizer([f"{q['prompt']}\n{q[part]}" for q in questions[:500] for part in ("answer", "wrong")])
    chat = ChatML(tokenizer)
    config = PhiConfig.from_dict(demo.TINY_PHI | SIZE | {"vocab_size": tokenizer.get_vocab_size()})
    model = Phi(config).init_weights(seed)
    rows = demo.make_sft_rows(questions[:SFT_QUESTIONS], demo.RIGHT_SHARE, seed)
    settings = Sft(**COMMON, lr=5e-3, adam_beta2=0.98, warmup_steps=30)
    tune(model, as_examples(rows, chat), None, settings)
    test = as_examples(demo.make_pair_rows(questions[-TEST:], 0, seed), chat)
    return SmallDemo(model, chat, questions[SFT_QUESTIONS:-TEST], test, logprobs(model, test))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For networks as small as this one, where a second thread gains little, and costs much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logprobs(model: Phi, pairs: list[Example]) -> Tensor:
    return all_logprobs(model, pairs, 50, "cpu", "fp32", "")


def tune(
    model: Phi,
    examples: list[Example],
    reference: Tensor | None,
    settings: Tuning,
    watch: Callable[[int], None] | None = None,
) -> Phi:
    """train.train without its files: tunes the model in place. `watch` is called with the number of steps done, from 0."""
    optimizer = make_optimizer(model, settings)
    order = [b for epoch in range(settings.epochs) for b in epoch_order(examples, settings.batch_size, settings.seed, epoch)]
    for step, chosen in enumerate(order):
        if watch:
            watch(step)
        expected = None if reference is None else reference[chosen]
        train.step_gradients(model, [examples[i] for i in chosen], expected, settings, step + 1)
        train.clip_gradients(model, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, len(order), settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if watch:
        watch(len(order))
    return model
