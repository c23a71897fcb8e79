"""From rows to batches: no question on two sides, an order for every epoch, and a batch as data.py pictures it."""

import itertools
import random

import pytest
import torch

from data import (
    Example,
    Row,
    check_no_leak,
    collate,
    epoch_order,
    question_key,
    split_by_question,
    supervise_everything,
)
from runtime.files import InputError

# -------------------------------------------------------------------------------------------------------------- split


def user(text):
    return {"role": "user", "content": text}


def question(text, where="f:1"):
    return Row([user(text)], ["4"], where, {})


def words(rows):
    return {row.messages[-1]["content"] for row in rows}


def test_split_puts_no_question_on_both_sides_and_meets_the_share_on_average():
    rows = [question(f"What is {n} plus one?", f"f:{i}") for i, n in enumerate(2 * list(range(2000)))]  # each twice
    train, evaluation = split_by_question(rows, eval_share=0.25, seed=0)
    assert len(train) + len(evaluation) == len(rows) and not words(train) & words(evaluation)
    check_no_leak(train, evaluation)
    assert abs(len(words(evaluation)) / 2000 - 0.25) < 0.04  # four standard deviations of 2,000 coin tosses
    assert split_by_question(rows, 0.0, seed=0) == (rows, [])
    assert words(split_by_question(rows, 0.25, seed=1)[1]) != words(evaluation)


def test_a_question_with_two_answers_is_on_one_side():
    answers = [["4"], ["Four, of course."], ["4", "5"], []]
    for seed in range(20):
        rows = [Row([user("What is 2+2?")], completions, f"f:{i}", {}) for i, completions in enumerate(answers)]
        train, evaluation = split_by_question(rows, 0.5, seed)
        assert not train or not evaluation


def test_split_depends_neither_on_the_order_nor_on_the_other_rows():
    rows = [question(f"What is {n} plus one?") for n in range(200)]
    train, evaluation = split_by_question(rows, eval_share=0.3, seed=0)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert words(split_by_question(shuffled, 0.3, seed=0)[1]) == words(evaluation)
    more = rows + [question(f"What is {n} minus one?") for n in range(200)]
    more_train, more_evaluation = split_by_question(more, 0.3, seed=0)
    assert words(train) <= words(more_train) and words(evaluation) <= words(more_evaluation)


def test_variants_in_case_blanks_and_punctuation_stay_together():
    variants = ["What is the speed of light?", "what is  the speed of light", "WHAT IS THE SPEED OF LIGHT?!\n"]
    assert len({question_key(question(text)) for text in variants}) == 1
    assert question_key(question("What is the speed of sound?")) != question_key(question(variants[0]))
    for seed in range(20):
        train, evaluation = split_by_question([question(text) for text in variants], 0.5, seed)
        assert not train or not evaluation


def test_symbols_and_numbers_make_another_question():
    sums = ["What is 7 + 8?", "What is 7 - 8?", "What is 7 * 8?", "What is 78?", "What is 7 + 9?", "What is (7 + 8) / 2?"]
    assert len({question_key(question(text)) for text in sums}) == len(sums)
    assert question_key(question("Grüße aus der STRASSE")) == question_key(question("grüsse aus der Straße"))


def test_a_system_prompt_does_not_make_another_question_but_an_earlier_turn_does():
    row = question("Why?")
    assert question_key(Row([{"role": "system", "content": "S"}, *row.messages], [], "", {})) == question_key(row)
    assert question_key(
        Row([user("It is blue."), {"role": "assistant", "content": "Yes."}, *row.messages], [], "", {})
    ) != question_key(row)


def test_a_question_on_both_sides_is_refused_and_named():
    train = [question("Why is it blue?", "train.jsonl:3"), question("Why not?", "train.jsonl:4")]
    check_no_leak(train, [question("Why is it red?")])
    with pytest.raises(InputError, match=r"^1 evaluation rows .* the first eval.jsonl:7 that of train.jsonl:3\."):
        check_no_leak(train, [question("why is it BLUE", "eval.jsonl:7"), question("Why is it red?")])
    with pytest.raises(InputError, match=r"^2 evaluation rows .* the first eval.jsonl:8 that of train.jsonl:4\."):
        check_no_leak(train, [question("Why not", "eval.jsonl:8"), question("Why is it blue?", "eval.jsonl:9")])


# -------------------------------------------------------------------------------------------------------- epoch order


def examples_of_lengths(lengths):
    return [Example([1] * (n - 1), [[2]]) for n in lengths]


LENGTHS = random.Random(0).choices(range(2, 100), k=150)


@pytest.mark.parametrize("batch_size, pool", [(1, 32), (4, 32), (4, 3), (7, 2), (200, 32)])
def test_every_index_stands_in_exactly_one_batch(batch_size, pool):
    batches = epoch_order(examples_of_lengths(LENGTHS), batch_size, seed=0, epoch=0, pool=pool)
    assert sorted(i for batch in batches for i in batch) == list(range(150))
    full, rest = divmod(150, batch_size)
    assert sorted(map(len, batches)) == sorted([batch_size] * full + [rest] * (rest > 0))


def test_order_is_a_function_of_seed_and_epoch():
    examples = examples_of_lengths(LENGTHS)
    orders = [epoch_order(examples, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (11, 1), (1, 11))]
    assert len(set(map(str, orders))) == 5  # also (11, 1) and (1, 11) are two different things
    assert epoch_order(examples, 4, 0, 1) == orders[1]


def test_an_epoch_mixes_its_examples_anew_and_sorts_them_within_pools_alone():
    examples = examples_of_lengths(LENGTHS)
    first, second = ({frozenset(batch) for batch in epoch_order(examples, 4, seed=0, epoch=epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 2  # other batches, not the same ones in another order
    pools = epoch_order(examples, 4, seed=0, epoch=0, pool=5)
    spans = sorted((min(LENGTHS[i] for i in batch), max(LENGTHS[i] for i in batch)) for batch in pools)
    assert any(longest > shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))  # two pools overlap
    alone = [batch[0] for batch in epoch_order(examples, 1, seed=0, epoch=0, pool=1)]
    assert [LENGTHS[i] for i in alone] != sorted(LENGTHS)


def test_lengths_within_a_batch_are_close_but_batches_come_in_random_order():
    batches = epoch_order(examples_of_lengths(LENGTHS), 4, seed=0, epoch=0, pool=100)  # all in one pool
    spans = [(min(LENGTHS[i] for i in batch), max(LENGTHS[i] for i in batch)) for batch in batches]
    assert spans != sorted(spans)
    spans.sort()
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))  # no overlap


# ------------------------------------------------------------------------------------------------------------ batches


def test_collate_makes_the_layout_of_the_docstring():
    batch = collate([Example([10, 11, 12], [[20, 21, 22], [30, 31]]), Example([13], [[23], [33, 34]])])
    expected = dict(
        tokens=[[10, 11, 12, 20, 21, 22, 30, 31], [13, 23, 33, 34, 0, 0, 0, 0]],
        segment=[[0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 2, -1, -1, -1, -1]],
        position=[[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 1, 2, 0, 0, 0, 0]],
        # 20 is predicted by 12 at index 2, 21 by 20 at index 3, ... and 30 by 12 again; the second row begins at 8
        source=[2, 3, 4, 2, 6, 8, 8, 10],
        target=[20, 21, 22, 30, 31, 23, 33, 34],
        owner=[0, 0, 0, 1, 1, 2, 3, 3],
        lengths=[3, 2, 1, 2],
    )
    for name, value in expected.items():
        assert torch.equal(getattr(batch, name), torch.tensor(value)), name
    moved = batch.to("cpu")
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in expected)


def test_rows_of_more_than_one_completion_need_a_mask():
    for completions, needed in ([1], False), ([1, 1], False), ([2], True), ([1, 2], True):
        assert collate([Example([1, 2], [[3, 4]] * k) for k in completions]).needs_mask is needed


def test_every_target_is_predicted_by_the_token_before_it():
    """As in the row of the same prompt with one completion alone, where source stands right before target."""
    source = random.Random(0)
    examples = [
        Example(
            source.choices(range(99), k=source.randint(1, 9)),
            [source.choices(range(99), k=source.randint(1, 9)) for _ in range(source.randint(1, 5))],
        )
        for _ in range(20)
    ]
    batch = collate(examples)
    assert batch.tokens.shape == (20, max(map(len, examples)))
    expected = []
    for example in examples:
        for completion in example.completions:
            alone = example.prompt + completion
            expected += [(alone[i - 1], alone[i], i - 1) for i in range(len(example.prompt), len(alone))]
    flat, position = batch.tokens.flatten(), batch.position.flatten()
    assert list(zip(flat[batch.source].tolist(), batch.target.tolist(), position[batch.source].tolist())) == expected
    lengths = [len(completion) for example in examples for completion in example.completions]
    assert batch.lengths.tolist() == batch.owner.bincount().tolist() == lengths


def test_supervise_everything_predicts_all_tokens_but_the_first():
    example = Example([1, 2, 3], [[4, 5]], "f:1", {"id": 7})
    assert supervise_everything(example) == Example([1], [[2, 3, 4, 5]], "f:1", {"id": 7})
    batch = collate([supervise_everything(example)])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5]] and batch.target.tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError):
        supervise_everything(Example([1, 2], [[3], [4]]))  # two answers are not one text
