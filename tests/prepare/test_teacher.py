"""The teacher beside a local server that speaks OpenAI's protocol and misbehaves."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai_server import FAULTS, Handler, Server

from prepare import teacher
from prepare.teacher import Journal, Teacher, argument, ask_all, attempt, concludes, estimate, judgement, terms, topic
from runtime.files import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, ...) starts a server that the environment points to. Waits and time-outs are short."""
    servers = []

    def start(answer=lambda body: f"Answer to {body['messages'][-1]['content']}", **settings):
        server = Server(answer, **settings)
        servers.append(server)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setattr(teacher, "TIMEOUT", 0.3)
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(**changes):
    """A good response of the protocol, but for its `choices` or `usage`."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage} | changes


@pytest.fixture
def asker(tmp_path):
    """asker(model, ...) is a teacher that has read the journal anew."""
    return lambda model="m", **settings: Teacher(model, Journal(tmp_path / "j.jsonl"), **settings)


def questions(count):
    return [attempt(f"What is {i} + {i}?") for i in range(count)]


def test_answers_come_in_order_and_are_asked_once(serve, asker):
    server, first = serve(), asker()
    asked = questions(20) + questions(5)
    answers = ask_all(asked, first, "x")
    assert answers == [f"Answer to What is {i} + {i}?" for i in (*range(20), *range(5))]
    assert sum(server.answered.values()) == 20
    again = asker()
    assert ask_all(asked, again, "x") == answers and sum(server.answered.values()) == 20
    assert again.journal.tokens == first.journal.tokens == [20 * 5, 20 * 10]
    ask_all(asked[:1], asker("another model"), "x")  # another model's answer is another answer
    assert sum(server.answered.values()) == 21


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(serve, asker, fault):
    server = serve(fault=lambda body, attempt: fault if attempt <= 2 else None)
    answers = ask_all(questions(4), asker(), "x")
    assert None not in answers and set(server.attempts.values()) == {3}


@pytest.mark.parametrize(
    ("fault", "key", "message"),
    [
        ("quota", "sk-test", "cannot be used: .*You exceeded"),
        ("403", "sk-test", "cannot be used: .* 403 .*Country"),
        (None, "sk-other", "cannot be used: .* 401 .*Incorrect API key"),
        ("400", "sk-test", "cannot be used: .* 400 .*Unknown parameter"),
    ],
)
def test_what_cannot_get_better_stops_everything_with_one_line(serve, asker, fault, key, message, capfd):
    server = serve(fault=lambda body, attempt: fault if "5 + 5" in body["messages"][-1]["content"] else None, key=key)
    with pytest.raises(InputError, match=message) as error:
        ask_all(questions(10), asker(concurrency=2), "x")
    assert "\n" not in str(error.value) and "answers are missing" in str(error.value)
    assert "sk-test" not in str(error.value) + capfd.readouterr().err
    assert max(server.attempts.values(), default=1) == (1 + teacher.RETRIES if fault == "quota" else 1)
    assert len(asker().journal.answers) == sum(server.answered.values())  # what was answered is kept


def test_no_key_is_an_error(serve, asker, monkeypatch):
    serve()
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        ask_all(questions(1), asker(), "x")


def test_refusals_are_written_down_and_not_asked_again(serve, asker):
    server = serve(answer=lambda body: "REFUSE" if "3 + 3" in body["messages"][-1]["content"] else "fine")
    for _ in range(2):
        assert ask_all(questions(5), asker(), "x") == ["fine", "fine", "fine", None, "fine"]
    assert set(server.attempts.values()) == {1}


def test_newer_models_and_questions_that_are_too_long(serve, asker):
    faults = {"3 + 3": "context_length_exceeded", "4 + 4": "content_filter"}
    server = serve(fault=lambda body, attempt: next((faults[sum] for sum in faults if sum in str(body)), "newer model"))
    for _ in range(2):
        answers = ask_all(questions(5), asker(), "x")
        assert [answer is None for answer in answers] == [False, False, False, True, True]
    assert sum(server.attempts.values()) == 3 * 2 + 2


def test_the_other_answers_to_true_or_false_are_known_without_choices():
    assert argument("Is it?", [], "True").options == ("True", "False")
    assert argument("What is 1 + 1?", [], "2").options == () and argument("Which?", ["a", "b"], "a").options == ("a", "b")


def test_a_stop_ends_all_calls(serve, asker):
    server = serve(fault=lambda body, attempt: "403" if "0 + 0" in str(body) else "slow")
    with pytest.raises(InputError, match="cannot be used"):
        ask_all(questions(100), asker(concurrency=4), "x")
    assert len(server.attempts) <= 4 and sum(server.attempts.values()) <= 1 + 3 * (1 + teacher.RETRIES)


@pytest.mark.parametrize(
    ("fault", "attempts", "name"), [("429", 1 + teacher.RETRIES, "RateLimitError"), ("not json", 1, "JSONDecodeError")]
)
def test_calls_that_led_to_nothing_are_paid_for_and_the_request_stays_open(serve, asker, capsys, fault, attempts, name):
    """An answer of no use, 5 tokens in and 10 out, then errors until the client gives up."""
    server = serve(fault=lambda body, attempt: "empty" if attempt == 1 else fault)
    with pytest.raises(InputError, match=r"server of the teacher failed \(1 of 1 answers are missing"):
        ask_all(questions(1), asker(), "x")
    assert list(server.attempts.values()) == [1 + attempts]
    assert f"no answer ({name}); the next run asks again" in capsys.readouterr().out
    later = asker()
    assert later.journal.tokens == [5, 10] and questions(1)[0].key("m") not in later.journal.answers
    server.fault = lambda body, attempt: None
    assert ask_all(questions(1), later, "x") == ["Answer to What is 0 + 0?"]
    assert asker().journal.tokens == [10, 20]


USAGES = [None, {}, {"prompt_tokens": math.nan, "completion_tokens": 1}, {"prompt_tokens": -5, "completion_tokens": 10}, "1"]


@pytest.mark.parametrize("usage", [*USAGES, {"prompt_tokens": 5, "completion_tokens": 10**400}])
def test_an_answer_whose_tokens_are_not_counted_is_kept_and_counted_at_its_most(serve, asker, usage):
    server = serve(fault=lambda body, attempt: reply(usage=usage))
    for _ in range(2):
        one = asker(price=(1e4, 1e4), budget=21.0)  # there is room for two calls of some 10.4
        with pytest.raises(InputError, match="budget of 21.0 is used up.*1 of 3 answers"):
            ask_all(questions(3), one, "x")
    assert len(server.attempts) == sum(server.attempts.values()) == 2
    assert one.journal.tokens == [sum(counts) for counts in zip(*(request.at_most() for request in questions(2)))]


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ((500, {"error": "down"}), [0, 0]),
        ((413, "<h1>Too large</h1>"), [0, 0]),
        ("<html>Welcome</html>", [0, 0]),
        ([1, 2], [0, 0]),
        (reply(choices=[]), [5, 10]),  # paid for
        (reply(choices=None, usage=None), [0, 0]),
        (reply(choices="none"), [5, 10]),
        (reply(choices=[{"message": None}]), [5, 10]),
    ],
)
def test_a_server_that_fails_ends_in_an_error_and_the_same_call_goes_on(serve, asker, answer, tokens):
    server = serve(fault=lambda body, attempt: answer if "3 + 3" in str(body) else None)
    one = asker()
    with pytest.raises(InputError, match="server of the teacher failed.*1 of 5 answers are missing"):
        ask_all(questions(5), one, "x")
    assert one.journal.tokens == [20 + tokens[0], 40 + tokens[1]] == asker().journal.tokens
    server.fault = lambda body, attempt: None
    assert ask_all(questions(5), one, "x") == [f"Answer to What is {i} + {i}?" for i in range(5)]
    assert sum(server.answered.values()) == 5


@pytest.mark.parametrize("content", [7, ["fine"], {"text": "fine"}, "cut \ud83d\u2028\u0085here"])
def test_a_message_of_any_kind_is_journalled(serve, asker, content):
    choices = [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]
    serve(fault=lambda body, attempt: reply(choices=choices))
    answers = ask_all(questions(1), asker(), "x")
    assert answers == ask_all(questions(1), asker(), "x") == [content if isinstance(content, str) else None]


def test_a_server_that_always_fails_is_not_asked_everything(serve, asker):
    server = serve(fault=lambda body, attempt: "<html>Welcome</html>")
    with pytest.raises(InputError, match="no answer to the last 20 calls.*100 of 100 answers are missing"):
        ask_all(questions(100), asker(concurrency=1), "x")
    assert len(server.attempts) == 20


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OPENAI_API_KEY", "sk-secret-1\n", "OPENAI_API_KEY holds a blank, a line break"),
        ("OPENAI_API_KEY", "sk-\u00e9-secret", "OPENAI_API_KEY holds"),
        ("OPENAI_BASE_URL", "localhost:8000/v1", "'localhost:8000/v1' is no address such as http"),
        ("OPENAI_BASE_URL", "http://me:hunter2two@", r"'http://\*\*\*@' is no address"),
        ("OPENAI_BASE_URL", "http://localhost:8000/v1\n", "is no address"),
        ("OPENAI_BASE_URL", "http://localhost:port/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://\x1b[2J/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://[::1", "is no address"),
    ],
)
def test_a_key_or_address_that_cannot_work_stops_at_once(serve, asker, monkeypatch, name, value, message):
    server = serve()
    monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        ask_all(questions(3), asker(), "x")
    assert time.monotonic() - began < 5 and not server.attempts and "secret" not in str(error.value)


def test_a_key_and_a_password_are_nowhere(serve, asker, monkeypatch, tmp_path, capfd):
    """The server's errors and answers repeat both."""
    echo = "You sent sk-secret-1 and hunter2two to http://me:hunter2two@here/v1"
    answers = [(401, {"error": {"message": echo}}), (500, echo)]
    server = serve(lambda body: echo, fault=lambda body, attempt: answers[0])
    monkeypatch.setattr(Handler, "allowed", lambda self: True)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("//", "//me:hunter2two@", 1))
    errors = []
    while answers:
        with pytest.raises(InputError) as error:
            ask_all(questions(1), asker(), "x")
        errors.append(str(error.value))
        answers.pop(0)
    server.fault = lambda body, attempt: None
    assert ask_all(questions(1), asker(), "x") == ["You sent *** and *** to http://***@here/v1"]
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    everything = "".join([*errors, *capfd.readouterr(), *files])
    assert "You sent ***" in errors[0] and "***@127.0.0.1" in errors[0]
    assert not any(secret in everything for secret in ("sk-secret-1", "hunter2two"))


def test_two_builds_on_one_journal_pay_once(serve, asker):
    server = serve(lambda body: time.sleep(0.02) or "fine")
    asked, made = questions(30), []
    teachers = [asker(), asker()]  # both have read an empty journal
    both = [threading.Thread(target=lambda one=one: made.append(ask_all(asked, one, "x"))) for one in teachers]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert made == [["fine"] * 30] * 2 and sum(server.attempts.values()) == 30


def test_an_answer_that_cannot_be_written_is_an_error_and_spoils_nothing(asker):
    journal = asker().journal
    journal.add(key="a", answer="x", tokens=[1, 2])
    path, journal.path = journal.path, Path("/dev/full")
    with pytest.raises(OSError):
        journal.add(key="b", answer="y", tokens=[1, 1])
    path.write_bytes(path.read_bytes() + b'{"key": "half of a li')  # what a full disk leaves
    journal.path = path
    journal.add(key="c", answer="z", tokens=[1, 1])
    assert asker().journal.answers == {"a": "x", "c": "z"}


def test_a_journal_that_cannot_be_written_is_named(serve, asker):
    one = asker()
    serve(lambda body: one.journal.path.unlink() or "fine")
    with pytest.raises(InputError, match=r"j\.jsonl: No such file or directory \(1 of 1 answers are missing"):
        ask_all(questions(1), one, "x")


def test_tokens_of_all_attempts_are_counted(serve, asker):
    serve(fault=lambda body, attempt: "too many words" if attempt <= 2 else None)
    one = asker()
    ask_all(questions(1), one, "x")
    assert one.journal.tokens == [3 * 5, 3 * 10]
    written = [json.loads(line) for line in one.journal.path.read_text().splitlines()]  # at once, or a kill would lose them
    assert [entry["key"] for entry in written] == ["", "", questions(1)[0].key("m")]
    assert [entry["tokens"] for entry in written] == [[5, 10]] * 3


def test_the_budget_counts_every_attempt(serve, asker):
    """There is room for one attempt, which turns out useless; what is left is less than another one may cost."""
    server = serve(fault=lambda body, attempt: "too many words")
    one = asker(price=(1e4, 1e4))
    one.budget = one.cost(questions(1)[0].at_most()) + 0.1  # an attempt costs 0.15
    with pytest.raises(InputError, match="is used up: 0.1500 is spent"):
        ask_all(questions(1), one, "x")
    assert list(server.attempts.values()) == [1]


def test_a_server_that_cannot_be_reached_stops_everything(serve, asker):
    server = serve()
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"server at http://127.0.0.1:\d+/v1/ cannot be used: .*connection"):
        ask_all(questions(20), asker(concurrency=2), "x")


@pytest.mark.parametrize(("budget", "at_once"), [(math.inf, 6), (25.0, 2)])
def test_calls_at_a_time(serve, asker, monkeypatch, budget, at_once):
    """Six, or as many as the budget has room for if each costs all that it may: some 10.4."""
    running, most, lock = 0, 0, threading.Lock()

    def answer(body):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.25)
        with lock:
            running -= 1
        return "fine"

    serve(answer)
    monkeypatch.setattr(teacher, "TIMEOUT", 20.0)
    ask_all(questions(12), asker(concurrency=6, price=(1e4, 1e4), budget=budget), "x")
    assert most == at_once


def test_answers_of_no_use_are_given_up_after_three_attempts(serve, asker):
    """The question, and twice the question with what an answer has to end in or may be."""
    server = serve(answer=lambda body: "It is fast." if "1 + 1" in str(body) else "perhaps")
    asked = [judgement("Q?", "a", "b"), argument("What is 1 + 1?", [], "2")]
    assert ask_all(asked, asker(), "x") == ask_all(asked, asker(), "x") == [None, None]
    assert sorted(server.attempts.values()) == [1, 1, 2, 2]  # the last two are reminders, given twice


def test_an_unreadable_answer_is_asked_for_once_more_in_its_bare_form(serve, asker):
    """As is an explanation that ends in something else, with the sentence that it has to end in."""

    def answer(body):
        asked = body["messages"][-1]["content"]
        if "Answer B" in asked:
            return "tie" if asked.endswith("\n\nAnswer with nothing but one of: A, B, tie.") else "Hard to say."
        if "fall" in asked:
            return "The topic is Physics." if "nothing but one of: Physics, Biology, Unknown." in asked else "Falling."
        reminded = asked.endswith('\n\nEnd with the sentence "The answer is 2."')
        return f"Two. The answer is {2 if reminded else 3}."

    server = serve(answer)
    asked = [judgement("Q?", "a", "b"), topic("Why do things fall?", ("Physics", "Biology")), argument("1 + 1?", [], "2")]
    assert ask_all(asked, asker(), "x") == ["tie", "Physics", "Two. The answer is 2."]
    assert sum(server.attempts.values()) == 6
    assert ask_all(asked, asker(), "x") == ["tie", "Physics", "Two. The answer is 2."]  # from the journal
    assert sum(server.attempts.values()) == 6


def test_a_server_without_structured_output_judges(serve, asker):
    """It refuses every parameter but three, and its model gives reasons before its verdict, in more words than a letter."""
    plain = {"model", "messages", "max_tokens"}
    reasons = "Both answers name the formula. " * 12

    def answer(body):
        *_, a, b = body["messages"][-1]["content"].split("\n\nAnswer ")
        verdict = "Answer A is better." if len(a) > len(b) else "I would say that B is the better answer."
        return " ".join((reasons + verdict).split()[: body["max_tokens"]])

    def refuse(body, attempt):
        return "400" if set(body) - plain else None

    server = serve(answer, fault=refuse)
    assert ask_all([judgement("Q?", "long", "x"), judgement("Q?", "x", "long")], asker(), "x") == ["A", "B"]
    assert sum(server.attempts.values()) == 2


def test_topics_and_judgements(serve, asker):
    serve(lambda body: "tie" if "Answer B" in body["messages"][-1]["content"] else "Physics.")
    asked = [topic("Why do things fall?", ("Physics", "Biology")), judgement("Q?", "a", "b")]
    assert ask_all(asked, asker(), "x") == ["Physics", "tie"]


def test_prompts():
    """A wrong option is argued for as the right one is, and the attempt at an explained question is made in that style."""
    right = argument("Which?", ["red", "blue"], "blue")
    assert right.messages[1] == ("user", "Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer: blue")
    assert argument("Which?", ["red", "blue"], "red").messages[0] == right.messages[0]
    assert attempt("Which?").messages == (("user", "Which?"),)
    asked = attempt("Which?", "blue").messages
    assert asked[1] == ("user", "Which?") and asked[0][1].endswith(right.messages[0][1].partition("given. ")[2])


CHARGES = ["0.005 C", "0.01 C", "0.1 C", "10 C"]


@pytest.mark.parametrize(
    ("text", "answer", "options", "holds"),
    [
        ("So it is 0.01 C. The answer is 0.01 C.", "0.01 C", CHARGES, True),
        ("**Answer:** 0.010 C", "0.01 C", CHARGES, True),
        ("Therefore the charge is\n0.01 C.", "0.01 C", CHARGES, True),  # no "answer": the last line counts
        ("The answer is (B).", "0.01 C", CHARGES, True),
        ("The answer is B. 0.01 C", "0.01 C", CHARGES, True),
        ("The answer is 0.005 C.", "0.01 C", CHARGES, False),
        ("B. 0.005 C", "0.01 C", CHARGES, False),
        ("The answer is A.", "0.01 C", CHARGES, False),
        ("The answer is A. 0.01 C", "0.01 C", CHARGES, False),  # letter and text are not of one option
        ("The answer is 0.01 C, not 0.1 C.", "0.01 C", CHARGES, False),
        ("The answer is 0.01 C.\n\nBut is it not 10 C?", "0.01 C", CHARGES, False),
        ("It is 0.01 C.\n\nThat is all.", "0.01 C", CHARGES, False),  # which ends in nothing
        ("The answer is light blue.", "light blue", ["blue", "light blue"], True),
        ("The answer is light blue.", "blue", ["blue", "light blue"], False),
        ("The answer is Aa.", "Aa", ["AA", "Aa", "aa"], True),
        ("The answer is aa.", "Aa", ["AA", "Aa", "aa"], False),
        ("The answer is 20.", "20", ["10", "20", "20", "30"], True),  # two options of one text
        ("The answer is -5.", "5", ["5", "-5"], False),
        ("The answer is (5 + 1) * 2.", "(5 + 1) * 2", ["(5 + 1) * 2", "5 + (1 * 2)"], True),
        ("The answer is 11,760.", "11760", [], True),
        ("The answer is 1.0 m^2.", "1", [], True),
        ("The answer is 15.", "5", [], False),
        ("The answer is 5 or 7.", "5", [], False),
        ("The answer is [1, 2].", "[1, 2]", [], True),
        ("The answer is True.", "True", ["True", "False"], True),
        ("", "5", [], False),
    ],
)
def test_what_an_explanation_ends_in(text, answer, options, holds):
    assert concludes(text, answer, options) == holds


def test_an_attempt_may_not_end_in_the_right_answer():
    assert attempt("1 + 1?", "2").parse("The answer is 2 of course.") is None
    assert attempt("1 + 1?", "2").parse("Not 2. The answer is 3.") == "Not 2. The answer is 3."
    assert attempt("Why?").parse("  any text ") == "any text" and attempt("Why?").parse(" ") is None


def test_words_numbers_and_symbols():
    assert terms('It is "1,000.50" N, 7-5 = 2, or \u22123 \u00b5C.') == [
        *["it", "is", "1000.5", "n", "7", "-", "5", "=", "2", "or", "-3", "\u03bcc"]
    ]
    assert terms("AaB", case=True) == ["AaB"] and terms("**...**") == []


def test_the_budget_is_never_exceeded(serve, asker):
    server = serve()
    cheap = asker(concurrency=3, price=(1e4, 1e4), budget=30.0)  # a call is bounded by some 10.4 and costs 0.15
    with pytest.raises(InputError, match="the budget of 30.0 is used up"):
        ask_all(questions(200), cheap, "x")
    journal = asker().journal
    assert 15 < cheap.cost(journal.tokens) <= 30 and len(journal.answers) == sum(server.answered.values())


def test_the_estimate_bounds_what_is_paid(serve, asker):
    serve()
    asked, priced = questions(30), asker(price=(1.0, 2.0))
    before = estimate(asked, priced)
    assert "30 calls of m" in before and "30,720 out" in before
    ask_all(asked, priced, "x")
    assert priced.cost(priced.journal.tokens) <= sum(priced.cost(request.at_most()) for request in asked)
    assert "0 calls" in estimate(asked, priced)


def test_prices_and_bounds_by_hand(asker):
    """Tokens in and out have prices of their own, and 3 bytes of text are at most a token: 猫 is 3 bytes."""
    assert asker(price=(0.5, 1.5)).cost([2_000_000, 1_000_000]) == 2.5
    assert attempt("猫" * 90).at_most() == [90 + 8 + 8, 1024]
    for request, most in ((topic("Q?", ("Physics",)), 30), (judgement("Q?", "a", "b"), 512)):
        assert request.at_most()[1] == most
        assert request.at_most()[0] >= 2 * 8 + sum(len(text) // 3 for _, text in request.messages)


def test_an_estimate_counts_each_missing_answer_once(asker):
    one, asked = asker(price=(0.0, 1e6)), questions(4)
    one.journal.add(key=asked[0].key("m"), answer="known", tokens=[0, 0])
    shown = estimate([*asked, asked[1]], one)
    assert shown.startswith("5 requests, 2 answered in the journal or asked twice; 3 calls of m:")
    assert shown.endswith(f"and {3 * 1024:,} out, {3 * 1024:,.2f}")
    assert estimate(asked, asker("another model")).startswith("4 requests, 0 answered")


def test_a_torn_last_line_is_removed_and_other_damage_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a", "answer": "x", "tokens": [1, 2]}\n{"key": "b", "ans')
    journal = Journal(path)
    assert journal.answers == {"a": "x"}
    journal.add(key="c", answer="y", tokens=[1, 1])
    assert Journal(path).answers == {"a": "x", "c": "y"}
    good, tokens = (
        '{"key": "b", "answer": "x", "tokens": [1, 2]}',
        ("[1]", "7", "[NaN, 1]", "[-1, 1]", "[true, 1]", "[1.5, 1]"),
    )
    broken = [f'{{"key": "b", "answer": "x", "tokens": {value}}}' for value in tokens]
    broken += ['{"key": "a"}', '{"key": 7, "answer": "x", "tokens": [1, 2]}', '{"key": "a", "answer": 7, "tokens": [1, 2]}']
    for line in [*broken, "", "[" * 100_000, "9" * 5_000, "\x00"]:
        path.write_text(f"{line}\n{good}\n")
        with pytest.raises(InputError, match=r"j\.jsonl:1: not a line of a teacher's journal") as error:
            Journal(path)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_rows_with_faults_on_a_third_and_a_kill_in_the_middle(serve, asker, tmp_path, monkeypatch):
    """No row is lost and none is paid for twice, but for the calls in flight when the process was killed."""
    draw = random.Random(0)
    faulty = {f"What is {i} + {i}?": draw.choice(("429", "500", "cut")) for i in range(0, 300, 3)}
    server = serve(fault=lambda body, attempt: faulty.get(body["messages"][-1]["content"]) if attempt == 1 else None)
    monkeypatch.setattr(teacher, "TIMEOUT", 20.0)  # a busy machine may be slow; none of these faults is
    code = (
        "from pathlib import Path; from prepare.teacher import *; import openai; "
        "openai._base_client.INITIAL_RETRY_DELAY = 0.001; "
        f"one = Teacher('m', Journal(Path({str(tmp_path / 'j.jsonl')!r})), concurrency=16); "
        "ask_all([attempt(f'What is {i} + {i}?') for i in range(300)], one, 'x')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(server.answered.values()) < 120:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(asker().journal.answers)
    assert 100 < kept < 300
    answers = ask_all(questions(300), asker(concurrency=16), "x")
    assert answers == [f"Answer to What is {i} + {i}?" for i in range(300)]
    twice = [name for name, count in server.answered.items() if count > 1]
    assert len(server.answered) == 300 and len(twice) <= 16 and max(server.answered.values()) <= 2
