"""From items to data sets: what is kept, on which side, in which mixture."""

from collections import Counter

import pytest

from prepare.mixture import (
    clean,
    is_empty,
    jobs,
    make_rows,
    match_lengths,
    mix,
    mixtures,
    prompt_text,
    row_key,
    split,
    wrong_option,
)
from prepare.sources import Item
from runtime.files import InputError


def pairs(items):
    return make_rows(items, "pairs", taught=True)


def row(prompt, chosen="A right answer.", rejected="A wrong one, no.", source="s", topic="Physics"):
    names = ("prompt", "question", "chosen", "rejected", "source", "topic", "question_id")
    return dict(zip(names, (prompt, prompt, chosen, rejected, source, topic, prompt)))


def many(count, source="s", topic="Physics"):
    return [row(f"Question {source} {i}?", source=source, topic=topic) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_one_blank_part_makes_an_item_empty():
    whole = Item("Which?", "blue", ["red", "blue"], 1)
    blanks = [Item(" ", "blue"), Item("Which?", "\n"), Item("Which?", "blue", ["red", " "], 0)]
    assert not is_empty(whole) and all(map(is_empty, blanks))


def test_what_is_asked_of_the_teacher():
    """An option needs an explanation, and a wrong option argued for; an essay only a rejected answer; a pair nothing."""
    option = Item("Which?", "blue", ["red", "blue"], 1, topic="Physics")
    essay = Item("Why?", "Because of a long chain of reasons, one after the other.")
    pair = Item("How?", "So.", chosen="So it goes.", rejected="Otherwise.", topic="Physics")
    asking = jobs([option, essay, pair], 0, "pairs")
    asked = [request.messages for job in asking.values() for _, request in job]
    assert [m[-1][1] for m in asked] == [
        "Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer: blue",
        "Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer: red",
        "Why?",
        "Why?",
    ]
    assert "topic" in asked[-1][0][1]

    answers = {"explanation": ["It is blue."], "rejected": ["It is red.", "For no reason."], "topic": ["Biology"]}
    for field, job in asking.items():
        for (item, _), answer in zip(job, answers[field], strict=True):
            setattr(item, field, answer)
            item.taught.add(field)
    assert (option.topic, essay.topic, pair.topic) == ("Physics", "Biology", "Physics")
    rows = pairs([option, essay, pair])
    assert [(r["chosen"], r["rejected"], r["chosen_by"], r["rejected_by"]) for r in rows] == [
        ("It is blue.", "It is red.", "teacher", "teacher"),
        (essay.answer, "For no reason.", "source", "teacher"),
        ("So it goes.", "Otherwise.", "source", "source"),
    ]
    assert rows[0]["prompt"] == "Which?\n\nA. red\nB. blue" == prompt_text(option)


def test_what_is_asked_for_sft():
    known = Item("Why?", "Because of a long chain of reasons, link by link.", topic="Physics")
    asked = jobs([Item("Which?", "blue", ["red", "blue"], 1), known], 0, "sft")
    assert {field: len(job) for field, job in asked.items()} == {"explanation": 1, "rejected": 0, "topic": 1}


def test_a_pair_with_an_empty_answer_is_not_completed_nor_a_question_without_a_wrong_option():
    """Some questions of AQUA-RAT have lost the numbers of their options."""
    items = [Item("How?", "So.", chosen="So it goes."), Item("How long is the train?", "m", ["m", "m", "m", "m", "m "], 2)]
    assert jobs(items, 0, "pairs")["rejected"] == []


def test_the_attempt_at_a_question_with_a_bare_answer_may_not_be_right():
    ((_, request),) = jobs([Item("1 + 1?", "2")], 0, "pairs")["rejected"]
    assert request.parse("The answer is 2.") is None and request.parse("The answer is 3.")


def test_a_bare_option_is_never_chosen_against_an_argued_one():
    """The teacher's explanation could not be used, its argument for a wrong option could."""
    item = Item("Which?", "a blue colour", ["red", "a blue colour"], 1, rejected="It is red, as one sees at once.")
    counts = Counter()
    assert clean(pairs([item]), counts) == [] and counts == {"no usable explanation of a bare answer": 1}
    item.explanation, item.rejected = "Because it is blue.", ""
    counts = Counter()
    assert clean(pairs([item]), counts) == [] and counts == {"no rejected answer": 1}


def test_bare_answers_are_those_under_40_characters_and_options():
    def bare(*items):
        return [item.question for item, _ in jobs(list(items), 0, "pairs")["explanation"]]

    assert bare(Item("a?", "x" * 39), Item("b?", "x" * 40), Item("c?", "x" * 40, ["x" * 40, "y"])) == ["a?", "c?"]
    assert bare(Item("d?", "x", explanation="because"), Item("e?", "x", chosen="because")) == []


def test_what_is_preferred_is_the_pairs_own_answer_then_the_explanation_then_an_answer_that_is_not_bare():
    items = [Item("?", "c", chosen=" a ", explanation="b"), Item("?", "c", explanation="b"), Item("?", "c" * 40)]
    assert [r["chosen"] for r in pairs(items)] == ["a", "b", "c" * 40]
    assert [r["topic"] for r in pairs([Item("?", ""), Item("?", "", topic="Physics")])] == ["Unknown", "Physics"]


def test_rows_for_sft_take_bare_answers_unless_a_teacher_failed_to_explain_them():
    items = [Item("Why?", "So.", explanation="So it is."), Item("1 + 1?", "2"), Item("?", "", chosen="a", rejected="b")]
    assert [r["completion"] for r in make_rows(items, "sft", taught=False)] == ["So it is.", "2", "a"]
    rows = make_rows(items, "sft", taught=True)
    counts = Counter()
    assert [r["completion"] for r in clean([*rows, rows[0]], counts)] == ["So it is.", "a"]
    assert counts == {"no usable explanation of a bare answer": 1, "exact duplicate": 1}
    assert "chosen" not in rows[0] and "rejected" not in rows[0]


def test_a_conversation_stays_one_and_is_split_by_all_of_its_turns():
    turns = [
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "On."},
    ]
    items = [
        Item("On.", "a", chosen=f"{i} is the right one.", rejected=f"{i} is not right.", messages=turns) for i in range(2)
    ]
    items[1].messages = [{"role": "user", "content": "Other."}, *turns[1:]]
    rows = clean(pairs(items), Counter())
    assert rows[0]["prompt"] == turns and row_key(rows[0]) != row_key(rows[1])
    train, test = split(rows * 2, 0.5, seed=0)
    assert {row_key(r) for r in train}.isdisjoint({row_key(r) for r in test}) and len(train) + len(test) == 4


def test_wrong_options_and_orders_follow_from_the_seed():
    item = Item("Which?", "d", ["a", "b", "c", "d"])
    assert wrong_option(item, 0) == wrong_option(item, 0) != "d"
    items = [Item(f"{i}?", "d", item.choices) for i in range(50)]
    assert {wrong_option(item, 0) for item in items} == {"a", "b", "c"}
    wrong = [[wrong_option(item, seed) for item in items] for seed in (0, 0, 1)]
    assert wrong[0] == wrong[1] != wrong[2]


# --------------------------------------------------------------------------------------------------------------- cleaning


def test_every_reason_is_counted():
    rows = [
        row("Q1?"),
        row("Q1?"),
        row("Q2?", chosen="short"),
        row("Q3?", rejected="A right answer."),
        row("Q4?", rejected=""),
        *[row("Many?", chosen=f"Right answer {i}.") for i in range(12)],
    ]
    counts = Counter()
    kept = clean(rows, counts)
    assert counts == {
        "exact duplicate": 1,
        "an answer under 10 characters": 1,
        "chosen and rejected are the same": 1,
        "no rejected answer": 1,
        "over 10 rows of one question": 2,
    }
    assert len(kept) == 11 and len(kept) + sum(counts.values()) == len(rows)


def test_answers_of_ten_characters_are_long_enough():
    rows = [
        row("Q1?", chosen="x" * 10),
        row("Q2?", rejected="x" * 10),
        row("Q3?", chosen="x" * 9),
        row("Q4?", rejected="x" * 9),
    ]
    assert [r["prompt"] for r in clean(rows, Counter())] == ["Q1?", "Q2?"]


def test_near_duplicates_of_a_question_stay_on_one_side():
    spellings = ("What is 7 + {}?", "what is  7 + {} ?", "What is 7 + {}", "WHAT IS 7 + {}!")
    rows = [row(spelling.format(i), chosen=f"{spelling}, {i}") for i in range(200) for spelling in spellings]
    train, test = split(rows, 0.2, seed=0)
    assert not {row_key(r) for r in train} & {row_key(r) for r in test}
    assert len(train) + len(test) == 800 and 0.1 < len(test) / 800 < 0.3
    options = [r | {"prompt": r["prompt"] + f"\n\nA. 1\nB. {i}"} for i, r in enumerate(rows)]
    train, test = split(rows + options, 0.2, seed=0)  # with and without options
    assert not {r["question"].casefold() for r in train} & {r["question"].casefold() for r in test}
    assert row_key(row("What is 7 + 8?")) != row_key(row("What is 7 - 8?")) != row_key(row("What is 7 + 9?"))


def test_match_lengths_balances_each_bin_of_each_source():
    def gaps(count, gap, source="x"):
        """Pairs whose chosen answer is `gap` characters longer."""
        answers = ["y" * 50, "y" * (50 + abs(gap))]
        chosen, rejected = answers if gap < 0 else answers[::-1]
        return [row(f"{source} {gap} {i}?", chosen, rejected, source) for i in range(count)]

    rows = gaps(30, 40) + gaps(10, -41)  # one bin: gaps from 1.5^9 = 38.4 to 57.7, lengths from 1.5^11 = 86.5 to 129.7
    rows += gaps(20, 400) + gaps(3, -5)  # alone in their bins
    rows += [row(f"E{i}?", "same size!", "size same!", "x") for i in range(5)]
    rows += gaps(7, -40, "y")  # another source has its own bins
    counts = Counter()
    kept = match_lengths(rows, 0, counts)
    left = Counter((r["source"], len(r["chosen"]) - len(r["rejected"])) for r in kept)
    assert left == {("x", 40): 10, ("x", -41): 10, ("x", 0): 5} and counts.total() == 20 + 20 + 3 + 7
    assert match_lengths(rows[::-1], 0, Counter()) == kept


# ----------------------------------------------------------------------------------------------------------------- mixing


def test_the_order_of_a_mixture_by_hand():
    """Shares of 2/3 and 1/3. Row 1: a lacks 2/3, b 1/3. Row 2: a 4/3 - 1, b 2/3. Row 3: a 2 - 1, b 1 - 1."""
    mixed = mix(many(4, "a") + many(2, "b"), {"a": 2, "b": 1}, "source", "0")
    assert "".join(r["source"] for r in mixed) == "abaaba"


def test_every_beginning_of_a_mixture_has_its_shares():
    rows = many(300, "a") + many(300, "b") + many(40, "c")
    mixed = mix(rows, {"a": 2, "b": 1, "c": 1}, "source", "0")
    for size in (4, 40, 100, 160):
        counts = Counter(r["source"] for r in mixed[:size])
        assert abs(counts["a"] - size / 2) <= 1 and abs(counts["c"] - size / 4) <= 1
    assert len(mixed) == 640 and Counter(r["source"] for r in mixed[:160])["c"] == 40  # then the others go on without it
    assert mix(rows[::-1], {"a": 2, "b": 1, "c": 1}, "source", "0") == mixed  # whatever order they came in
    assert {r["source"] for r in mix(rows, {"a": 1}, "source", "0")} == {"a"}


def test_mixtures_are_nested():
    rows = many(500, "a", "Physics") + many(500, "b", "Biology")
    nested = mixtures(rows, [100, 300, 900], {}, "topic", 0)
    small, middle, large = nested["train-100"], nested["train-300"], nested["train-900"]
    assert (len(small), len(middle), len(large)) == (100, 300, 900)
    assert small == middle[:100] and middle == large[:300]
    assert Counter(r["topic"] for r in small) == {"Physics": 50, "Biology": 50}
    assert mixtures(rows, [], {}, "topic", 0) == {"train": mix(rows, {}, "topic", "0")}
    with pytest.raises(InputError, match="--sizes 1001: the mixture has 1,000 training rows"):
        mixtures(rows, [1001], {}, "source", 0)
    with pytest.raises(InputError, match="no rows of z; there are a, b"):
        mix(rows, {"z": 1}, "source", "0")


def test_equal_shares_without_any_named():
    mixed = mix(many(3, "a") + many(9, "b"), {}, "source", "0")
    assert [Counter(r["source"] for r in mixed[:n])["a"] for n in (2, 4, 6, 12)] == [1, 2, 3, 3]
    assert mix(many(9, "a"), {}, "source", "0") != mix(many(9, "a"), {}, "source", "1")
