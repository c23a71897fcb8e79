"""The forms of a row: which fields make one, what becomes of messages, and what makes a row unusable."""

import pytest

from data import Row
from prepare.forms import FORMS, kind_of_fields, read_row


def user(text, **more):
    return {"role": "user", "content": text} | more


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


ASKED = [user("2 + 2?")]
HELLO = [user("Hi"), assistant("Hello."), user("2 + 2?")]
BRIEF = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
OWN = {"answer": "3", "kind": "motion", "letter": "A", "choices": None, "flipped": "false", "licence": ["MIT"], "topic": 7}
ANSWERS = {"chosen": "4", "rejected": "5"}


# ------------------------------------------------------------------------------------------------------------------ pairs

PAIRS = [  # fields, the prompt
    (PAIR, ASKED),
    (PAIR | {"chosen": [assistant("4")], "rejected": assistant("5")}, ASKED),
    (PAIR | {"prompt": HELLO}, HELLO),
    (PAIR | {"system": "Be brief."}, [BRIEF, *ASKED]),
    (ANSWERS | {"question": "2 + 2?", "system": ""}, ASKED),
    (ANSWERS | {"question": "2 + 2?", "system": "Be brief."}, [BRIEF, *ASKED]),
    (ANSWERS | {"instruction": "2 + 2?", "input": ""}, ASKED),
    (ANSWERS | {"instruction": "Add.", "input": "2 + 2"}, [user("Add.\n\n2 + 2")]),
    (ANSWERS | {"input": "2 + 2?", "system": None}, ASKED),
    (
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        ASKED,
    ),
    # Whole dialogues: as messages, as text, beside the prompt that they repeat.
    ({"chosen": [*HELLO, assistant("4")], "rejected": [*HELLO, assistant("5")]}, HELLO),
    (PAIR | {"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]}, ASKED),
    (PAIR | {"chosen": [*HELLO, assistant("4")], "rejected": [*HELLO, assistant("5")]}, HELLO),  # the prompt is one of them
    (PAIR | {"system": "Be brief."} | {k: [*ASKED, assistant(v)] for k, v in ANSWERS.items()}, [BRIEF, *ASKED]),
    ({k: f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant: {v}" for k, v in ANSWERS.items()}, HELLO),
    (ANSWERS | {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant:"}, HELLO),
    ({k: f"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n{v}<|im_end|>\n" for k, v in ANSWERS.items()}, ASKED),
    # Two responses and what says which is the better one.
    ({"question": "2 + 2?", "response_j": "4", "response_k": "5"}, ASKED),
    ({"prompt": "2 + 2?", "response_a": "5", "response_b": "4", "label": "b"}, ASKED),
    ({"prompt": "2 + 2?", "response_a": "4", "response_b": "5", "preference": "response_a"}, ASKED),
    ({"prompt": "2 + 2?", "response_0": "5", "response_1": "4", "better_response_id": 1}, ASKED),
    ({"prompt": "2 + 2?", "response_1": "4", "response_2": "5", "preference": "1"}, ASKED),
    ({"prompt": "2 + 2?", "response_a": "5", "response_b": "4", "score_a": 1.5, "score_b": "8"}, ASKED),
    ({"history": "2 + 2?", "human_ref_A": "4", "human_ref_B": "5", "score_A": 7, "score_B": -1, "labels": 1}, ASKED),
    (
        {
            "conversation_a": [*ASKED, assistant("5")],
            "conversation_b": [*ASKED, assistant("4")],
            "winner": "model_b",
        },
        ASKED,
    ),
]


@pytest.mark.parametrize(("raw", "prompt"), PAIRS)
def test_every_form_of_a_pair_becomes_the_same_row(raw, prompt):
    assert read_row("pairs", raw, "f:1") == Row(prompt, ["4", "5"], "f:1", raw)
    assert kind_of_fields(frozenset(name for name, value in raw.items() if value is not None)) == "pairs"


def parted(chosen, rejected):
    return {"chosen": [*ASKED, *chosen], "rejected": [*ASKED, *rejected]}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            parted([assistant("4"), user("Sure?"), assistant("Yes.")], [assistant("5"), user("Sure?"), assistant("No.")]),
            "part",
        ),
        (parted([assistant("4")], [assistant("4"), user("Sure?"), assistant("No.")]), "part before their last user turn"),
        (
            {"chosen": [user("a"), assistant("4")], "rejected": [user("b"), assistant("4")]},
            "part before their last user turn",
        ),
        (parted([assistant("4")], [assistant("4")]), "the same text: there is nothing to prefer"),
        (parted([assistant("4")], []), '"rejected" ends with the user'),
        (PAIR | {"chosen": [user("3 + 3?"), assistant("4")]}, "a whole dialogue, but the prompt is not in it"),
        (ANSWERS, '"chosen" is an answer without its question'),
        (PAIR | {"chosen": [{"role": "system", "content": ""}]}, '"chosen" holds nothing but an empty system message'),
        (PAIR | {"prompt": [*ASKED, assistant("!")]}, '"prompt" ends with the assistant'),
        (PAIR | {"prompt": [BRIEF, *ASKED], "system": "Be long."}, "there are two system turns"),
        (PAIR | {"system": ["Be brief."]}, '"system" is list, not text'),
        (
            {"prompt": "?", "response_a": "4", "response_b": "5", "label": "tie"},
            "\"label\" 'tie' do not say which of response_a and",
        ),
        ({"prompt": "?", "response_a": "4", "response_b": "5", "label": 1}, "do not say which"),  # of which of them?
        (
            {"prompt": "?", "response_a": "4", "response_b": "5", "score_a": 1, "score_b": 1},
            "\"score_a\" '1' and \"score_b\" '1' do not say",
        ),
        (
            {"prompt": "?", "response_a": "4", "response_b": "5", "score_a": "x", "score_b": 1},
            "\"score_a\" is 'x', not a number",
        ),
    ],
)
def test_pairs_that_are_none_say_why(raw, reason):
    with pytest.raises(ValueError, match=reason):
        read_row("pairs", raw)


@pytest.mark.parametrize(
    ("kind", "raw", "reason"),
    [
        (
            "pairs",
            {"prompt": "?", "chosen": "4", "best": 1},
            '^"rejected" is missing: the fields are best, chosen, prompt; the ',
        ),
        (
            "pairs",
            {"prompt": "?", "response_a": "4", "response_b": "5"},
            "the nearest form is prompt, response_a, response_b, ",
        ),
        ("sft", {"instruction": "Add."}, '^"output" is missing: .* the nearest form is instruction, output'),
        ("mcq", {"question": "?", "choices": ["a", "b"], "key": "A"}, '^"answer" is missing'),
        ("sft", {}, "the fields are none"),
        ("sft", {"a" * 99: 1, "b\nc": 2}, "the fields are a{40}, b c; the"),
    ],
)
def test_an_unknown_form_names_the_fields_and_the_nearest_form(kind, raw, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_row(kind, raw)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------------- sft

SFT = [
    {"prompt": "2 + 2?", "completion": "4"},
    {"prompt": "2 + 2?", "completion": "4", "type": "question", "label": "chosen"},  # words of other forms, as values
    {"prompt": ASKED, "completion": [assistant("4")]},
    {"prompt": "2 + 2?", "response": "4"},
    {"instruction": "2 + 2?", "input": None, "output": "4"},
    {"instruction": "2 + 2?", "context": "", "response": "4"},
    {"question": "2 + 2?", "answer": "4"},
    {"question": "2 + 2?", "response": "4", "system_prompt": ""},
    {"messages": [*ASKED, assistant("4")]},
    {"messages": [{"role": "system", "content": None}, *ASKED, assistant("4", weight=1, train=True, tool_calls=None)]},
    {
        "messages": [user([{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]), assistant("4")],
        "prompt": "own",
    },
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4", "weight": None}]},
    {"text": "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"},
    {"text": "Human: 2 + 2?\n\nAssistant: 4"},
]


@pytest.mark.parametrize("raw", SFT)
def test_every_form_of_an_answer_to_learn_becomes_the_same_row(raw):
    for kind in ("sft", "sft last"):
        assert read_row(kind, raw, "f:1") == Row(ASKED, ["4"], "f:1", raw)
    assert kind_of_fields(frozenset(name for name, value in raw.items() if value is not None)) == "sft"


def test_a_system_turn_and_a_task_s_input_belong_to_the_prompt():
    raw = {"system": "Be brief.", "instruction": "Add.", "input": "2 + 2", "output": "4"}
    assert read_row("sft", raw).messages == [BRIEF, user("Add.\n\n2 + 2")]


def contents(row):
    return [m["content"] for m in row.messages], row.completions, [(m["content"], m["learned"]) for m in row.later]


def test_which_answers_of_a_dialogue_are_learned():
    turns = [
        assistant("Welcome."),
        user("a"),
        assistant("1"),
        user("b"),
        assistant("2", weight=0),
        user("c"),
        assistant("3"),
    ]
    assert contents(read_row("sft", {"messages": turns})) == (
        ["Welcome.", "a"],  # a greeting answers nobody: context
        ["1"],
        [("b", False), ("2", False), ("c", False), ("3", True)],
    )
    assert contents(read_row("sft last", {"messages": turns})) == (["Welcome.", "a", "1", "b", "2", "c"], ["3"], [])
    turns[-1] = assistant("3", train=False)  # nothing is learned after "1", so the rest is cut
    assert contents(read_row("sft", {"messages": turns})) == (["Welcome.", "a"], ["1"], [])
    turns[2] = assistant("1", weight=0.0)
    with pytest.raises(ValueError, match='"messages" has no reply to a user that is to be learned'):
        read_row("sft", {"messages": turns})


def ending(*messages, **more):
    return {"messages": [*ASKED, *messages]} | more


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            ending(assistant("so", tool_calls=[{"id": "1"}])),
            r'"messages"\[1\] has tool_calls, which cannot be learned as text',
        ),
        (ending(assistant(None, function_call={"name": "f"})), "has function_call"),
        (ending(assistant("so", reasoning_content="because")), "has reasoning_content"),
        (ending(assistant("so", thinking="because"), user("?"), assistant("4")), "has thinking"),
        (ending(assistant("so"), {"role": "tool", "content": "4"}), r'"messages"\[2\] is no message of'),
        (ending(assistant([{"type": "image", "image": "x.png"}])), "has a part that is not text, such as an image"),
        (ending(assistant("so", weight=0.5)), "has a weight other than 0 and 1"),
        (ending(assistant("so", weight=0)), "no reply to a user that is to be learned"),
        (ending(assistant("so"), assistant("4")), "no user message between two replies"),
        (ending(assistant({"text": "so"})), r'"messages\[1\].content" is dict, not text'),
        ({"messages": 7}, '"messages" is neither text nor a list'),
        ({"text": "no turns in here"}, '"text" ends with the user'),
        ({"prompt": "?", "completion": "4<|im_end|>\n<|im_start|>user\nAnd"}, '"completion" has .* inside'),
        ({"prompt": "?", "completion": " <|im_end|>"}, '"completion" is empty'),
        ({"prompt": "<|im_start|>user and more", "completion": "4"}, "but not all of it are turns in ChatML"),
    ],
)
def test_what_cannot_be_learned_makes_the_row_unusable(raw, reason):
    with pytest.raises(ValueError, match=reason):
        read_row("sft", raw)


def test_texts_in_chatml_lose_their_marks_and_say_so():
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    raw = {"prompt": prompt, "chosen": "4<|im_end|>\n", "rejected": "5<|im_end|><|im_end|>"}
    row = read_row("pairs", raw)
    assert (row.messages, row.completions, row.form) == ([BRIEF, *ASKED], ["4", "5"], "prompt, chosen, rejected, in ChatML")
    row = read_row("sft", {"messages": [user("What is <|im_end|>?"), assistant("A mark.<|im_end|>")]})
    assert (row.messages, row.completions) == ([user("What is <|im_end|>?")], ["A mark."])  # of a user it stays text
    assert read_row("pairs", PAIR).form == "prompt, chosen, rejected"
    two = {k: [*ASKED, assistant(v)] for k, v in ANSWERS.items()}
    assert read_row("pairs", two).form == "chosen, rejected (two dialogues with a shared prompt)"


# -------------------------------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize(
    "fields",
    [
        {"choices": ["red", "blue"], "answer": "B"},
        {"choices": ["red", "blue"], "answer": 1},
        {"options": ["red", "blue"], "answer": "B"},
        {"choices": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}], "answer": "B"},
        {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"},
        {"choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
        {"choices": [{"label": 1, "text": "red"}, {"label": 2, "text": "blue"}], "answer": 2},
    ],
)
def test_every_form_of_options_becomes_the_same_question(fields):
    row = read_row("mcq", {"question": "Which?"} | fields)
    assert row.messages == [user("Question: Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer:")]
    assert (row.completions, row.choices, row.answer) == (["Answer: B"], ["red", "blue"], 1)
    assert kind_of_fields(frozenset(fields) | {"question"}) == "mcq"


def test_options_that_name_options_keep_their_order():
    choices = ["It is a vector", "It has a unit", "A and B only"]
    assert read_row("mcq", {"question": "?", "choices": choices, "answer": "C"}).choices == choices


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"choices": ["a", "b", " b"], "answer": "C"}, "options B and C are the same text"),
        ({"choices": ["a", "b"], "answer": 2}, "not the letter of an option, nor its number"),
        ({"choices": ["a", "b"], "answer": True}, "not the letter of an option"),
        ({"choices": ["a", "b"], "answer": ["A"]}, "not the letter of an option"),
        ({"choices": ["a", 2], "answer": "A"}, '"choices" is int, not text'),
        ({"choices": ["a", "b"], "answer": "A", "explanation": ["x"]}, '"explanation" is list, not text'),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}, "nor of texts with a label each"),
        ({"choices": {"text": "ab", "label": "AB"}, "answerKey": "A"}, "nor of texts with a label each"),
        ({"choices": [{"text": "a"}, {"text": "b"}], "answer": "A"}, "nor of texts with a label each"),
    ],
)
def test_questions_whose_options_or_answer_make_no_sense_say_why(fields, reason):
    with pytest.raises(ValueError, match=reason):
        read_row("mcq", {"question": "?"} | fields)


def test_a_question_without_options_is_multiple_choice_only_if_letters_are_asked_for():
    fields = frozenset({"question", "answer"})
    assert (kind_of_fields(fields), kind_of_fields(fields, letter_only=True)) == ("sft", "mcq")
    assert kind_of_fields(frozenset({"question", "chosen", "rejected"}), letter_only=True) == "pairs"


# ------------------------------------------------------------------------------------------------------------- own fields


def test_other_fields_are_the_user_s_own():
    row = read_row("pairs", PAIR | OWN, "f:1")
    assert row == Row(ASKED, ["4", "5"], "f:1", PAIR | OWN) and (row.choices, row.answer, row.truth) == ([], None, None)
    assert read_row("sft", {"prompt": "2 + 2?", "completion": "4", **OWN}).completions == ["4"]
    mcq = read_row("mcq", {"question": "?", "choices": ["a", "b"], "answer": "B", "letter": "A", "flipped": True})
    assert (mcq.choices, mcq.answer, mcq.truth) == (["a", "b"], 1, None)


def test_the_page_about_rows_names_every_field(request):
    page = (request.config.rootpath / "docs" / "rows.md").read_text(encoding="utf-8")
    named = {name for family in FORMS.values() for form in family for name in form.fields()}
    patterns = ("_0", "_1", "_2", "_a", "_b", "_A", "_B")  # spelled out once
    assert {name for name in named if f"`{name}`" not in page and not name.endswith(patterns)} == set()


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"train": 0}, {"loss": False}, {"loss_mask": 0}], ids=lambda mark: str(*mark)
)
def test_whatever_says_so_a_turn_is_not_learned(mark):
    said = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one", **mark}]
    said += [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "two"}]
    row = read_row("sft", {"messages": said})
    assert row.completions == ["two"] and len(row.messages) == 3
    with pytest.raises(ValueError, match="other than 0 and 1"):
        read_row("sft", {"messages": [said[0], said[1] | dict.fromkeys(mark, "false")]})


def test_an_answer_that_was_judged_bad_is_not_imitated():
    assert read_row("sft", {"prompt": "1?", "completion": "one", "label": True}).completions == ["one"]
    with pytest.raises(ValueError, match='"label" is false: the answer was judged to be bad'):
        read_row("sft", {"prompt": "1?", "completion": "one", "label": False})


@pytest.mark.parametrize("answer", ["B", "b", " B ", "(B)", "B."])
def test_a_letter_may_be_written_in_several_ways_and_options_in_a_cell_of_csv(answer):
    row = read_row("mcq", {"question": "1 + 1?", "choices": '["1", "2"]', "answer": answer})
    assert row.choices == ["1", "2"] and row.answer == 1
    labelled = {"question": "1 + 1?", "choices": {"label": ["1", "2"], "text": ["one", "two"]}, "answer": 1}
    assert read_row("mcq", labelled).answer == 0  # the label 1, not the index 1
    with pytest.raises(ValueError, match='"answer" is'):
        read_row("mcq", labelled | {"answer": 0})
