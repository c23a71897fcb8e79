"""The teacher beside a local server that speaks OpenAI's protocol and misbehaves."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from openai_server import FAULTS, Server

from prepare import teacher
from prepare.teacher import Journal, Teacher, ask_all, estimate, explanation, judgement, rejected, topic
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
        monkeypatch.setattr(teacher, "FIRST_WAIT", 0.001)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def questions(count):
    return [rejected(f"What is {i} + {i}?", [], None) for i in range(count)]


def test_answers_come_in_order_and_are_asked_once(serve, tmp_path):
    server, journal = serve(), Journal.open(tmp_path / "journal.jsonl")
    asked = questions(20) + questions(5)
    answers = ask_all(asked, journal, Teacher("m"), "x")
    assert answers == [f"Answer to What is {i} + {i}?" for i in (*range(20), *range(5))]
    assert sum(server.answered.values()) == 20
    again = Journal.open(tmp_path / "journal.jsonl")
    assert ask_all(asked, again, Teacher("m"), "x") == answers and sum(server.answered.values()) == 20
    assert again.tokens == journal.tokens == [20 * 5, 20 * 10]
    ask_all(asked[:1], again, Teacher("another model"), "x")  # another model's answer is another answer
    assert sum(server.answered.values()) == 21


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(serve, tmp_path, fault):
    server = serve(fault=lambda body, attempt: fault if attempt <= 2 else None)
    answers = ask_all(questions(4), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x")
    assert None not in answers and set(server.attempts.values()) == {3}


@pytest.mark.parametrize(
    ("fault", "key", "message"),
    [
        ("quota", "sk-test", "account is empty: You exceeded"),
        ("403", "sk-test", "refuses: 403 Country"),
        (None, "sk-other", "refuses: 401 Incorrect API key"),
        ("400", "sk-test", "does not understand the request: Unknown parameter"),
    ],
)
def test_what_cannot_get_better_stops_at_once_with_one_line(serve, tmp_path, fault, key, message, capfd):
    server = serve(fault=lambda body, attempt: fault if "5 + 5" in body["messages"][-1]["content"] else None, key=key)
    with pytest.raises(InputError, match=message) as error:
        ask_all(questions(10), Journal.open(tmp_path / "j.jsonl"), Teacher("m", concurrency=2), "x")
    assert "\n" not in str(error.value) and "answers are missing" in str(error.value)
    assert "sk-test" not in str(error.value) + capfd.readouterr().err
    assert max(server.attempts.values(), default=1) == 1
    journal = Journal.open(tmp_path / "j.jsonl")  # what was answered is kept
    assert len(journal.answers) == sum(server.answered.values())


def test_no_key_is_an_error(serve, tmp_path, monkeypatch):
    serve()
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        ask_all(questions(1), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x")


def test_refusals_are_written_down_and_not_asked_again(serve, tmp_path):
    server = serve(answer=lambda body: "REFUSE" if "3 + 3" in body["messages"][-1]["content"] else "fine")
    for _ in range(2):
        answers = ask_all(questions(5), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x")
        assert answers == ["fine", "fine", "fine", None, "fine"]
    assert set(server.attempts.values()) == {1}


def test_newer_models_and_questions_that_are_too_long(serve, tmp_path):
    faults = {"3 + 3": "context_length_exceeded", "4 + 4": "content_filter"}
    server = serve(fault=lambda body, attempt: next((faults[sum] for sum in faults if sum in str(body)), "newer model"))
    for _ in range(2):
        answers = ask_all(questions(5), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x")
        assert [answer is None for answer in answers] == [False, False, False, True, True]
    assert sum(server.attempts.values()) == 3 * 2 + 2


def test_a_stop_ends_all_calls(serve, tmp_path):
    server = serve(fault=lambda body, attempt: "quota" if "0 + 0" in str(body) else "slow")
    with pytest.raises(InputError, match="account is empty"):
        ask_all(questions(100), Journal.open(tmp_path / "j.jsonl"), Teacher("m", concurrency=4), "x")
    assert sum(server.attempts.values()) <= 40  # each of the other three was in a call that timed out and was tried again


def test_attempts_that_led_to_nothing_are_paid_for_and_the_request_stays_open(serve, tmp_path, capsys):
    """An answer of no use, 5 tokens in and 10 out, then errors until the attempts are used up."""
    server = serve(fault=lambda body, attempt: "empty" if attempt == 1 else "429")
    assert ask_all(questions(1), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x") == [None]
    assert list(server.attempts.values()) == [teacher.ATTEMPTS] == [8]
    assert f"no answer in {teacher.ATTEMPTS} attempts (RateLimitError)" in capsys.readouterr().out
    journal = Journal.open(tmp_path / "j.jsonl")
    assert journal.tokens == [5, 10] and questions(1)[0].key("m") not in journal.answers
    server.fault = lambda body, attempt: None
    assert ask_all(questions(1), journal, Teacher("m"), "x") == ["Answer to What is 0 + 0?"]
    assert Journal.open(tmp_path / "j.jsonl").tokens == [10, 20]


def test_tokens_of_all_attempts_are_counted(serve, tmp_path):
    serve(fault=lambda body, attempt: "too many words" if attempt <= 2 else None)
    journal = Journal.open(tmp_path / "j.jsonl")
    ask_all(questions(1), journal, Teacher("m"), "x")
    assert journal.tokens == [3 * 5, 3 * 10]
    written = [json.loads(line) for line in journal.path.read_text().splitlines()]  # at once, or a kill would lose them
    assert [entry["key"] for entry in written] == ["", "", questions(1)[0].key("m")]
    assert [entry["tokens"] for entry in written] == [[5, 10]] * 3


def test_the_budget_counts_every_attempt(serve, tmp_path):
    """There is room for one attempt, which turns out useless; what is left is less than another one may cost."""
    server = serve(fault=lambda body, attempt: "too many words")
    asker = Teacher("m", price=(1e4, 1e4))
    asker.budget = asker.cost(asker.at_most(questions(1)[0])) + 0.1  # an attempt costs 0.15
    with pytest.raises(InputError, match="is used up: 0.1500 is spent"):
        ask_all(questions(1), Journal.open(tmp_path / "j.jsonl"), asker, "x")
    assert list(server.attempts.values()) == [1]


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would be waited, none of which are."""
    seconds, sleep = [], asyncio.sleep

    async def record(delay, *args):
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    return seconds


def test_each_wait_is_about_twice_the_one_before_and_at_most_a_minute(serve, tmp_path, monkeypatch, waits):
    serve(fault=lambda body, attempt: "500")
    monkeypatch.setattr(teacher, "FIRST_WAIT", 2.0)
    ask_all(questions(1), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x")
    waited = [seconds for seconds in waits if seconds > 0.5]
    expected = [2, 4, 8, 16, 32, 60, 60, 60]
    assert len(waited) == 8 and all(0.5 * e <= w <= 1.5 * e for w, e in zip(waited, expected))
    assert len({w / e for w, e in zip(waited, expected)}) > 1  # not all clients at once


def test_a_server_that_says_when_to_come_back_is_believed(serve, tmp_path, waits):
    serve(fault=lambda body, attempt: "429" if attempt <= 2 else None)  # Retry-After: 0.01, longer than our own first waits
    ask_all(questions(1), Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x")
    assert [seconds for seconds in waits if seconds > 0.0001] == [0.01, 0.01]


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("3600", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)])
def test_what_a_server_says_about_waiting(header, seconds):
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": header}))
    assert teacher._retry_after(error) == seconds


def test_a_server_that_cannot_be_reached_stops_everything(serve, tmp_path):
    server = serve()
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"server at http://127.0.0.1:\d+/v1/ cannot be reached"):
        ask_all(questions(20), Journal.open(tmp_path / "j.jsonl"), Teacher("m", concurrency=2), "x")


@pytest.mark.parametrize(("budget", "at_once"), [(None, 6), (25.0, 2)])
def test_calls_at_a_time(serve, tmp_path, monkeypatch, budget, at_once):
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
    asker = Teacher("m", concurrency=6, price=(1e4, 1e4), budget=budget)
    ask_all(questions(12), Journal.open(tmp_path / "j.jsonl"), asker, "x")
    assert most == at_once


def test_answers_of_no_use_are_given_up_after_three_attempts(serve, tmp_path):
    server = serve(answer=lambda body: "perhaps")
    asked = [judgement("Q?", "a", "b")]
    assert ask_all(asked, Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x") == [None]
    assert ask_all(asked, Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x") == [None]
    assert set(server.attempts.values()) == {3}


@pytest.mark.parametrize("structured", [True, False])
def test_topics_and_judgements(serve, tmp_path, structured):
    """With structured output, and with a server that does not have it and answers in plain words."""

    def answer(body):
        word = "tie" if "Answer B" in body["messages"][-1]["content"] else "Physics."
        return json.dumps({"answer": word.strip(".")}) if "response_format" in body else word

    server = serve(answer, structured=structured)
    asked = [topic("Why do things fall?", ("Physics", "Biology")), judgement("Q?", "a", "b")]
    assert ask_all(asked, Journal.open(tmp_path / "j.jsonl"), Teacher("m"), "x") == ["Physics", "tie"]
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["answer"]["enum"] in (["Physics", "Biology", "Unknown"], ["A", "B", "tie"])


def test_prompts():
    request = explanation("Which?", ["red", "blue"], "blue")
    assert request.messages[1] == ("user", "Which?\n\nOptions:\nA. red\nB. blue\n\nAnswer: blue")
    wrong = rejected("Which?", ["red", "blue"], "red")
    assert wrong.messages[0] == request.messages[0]  # the same task, so the same style
    assert rejected("Which?", [], None).messages == (("user", "Which?"),)


def test_the_budget_is_never_exceeded(serve, tmp_path):
    server = serve()
    cheap = Teacher("m", concurrency=3, price=(1e4, 1e4), budget=30.0)  # a call is bounded by some 10.4 and costs 0.15
    with pytest.raises(InputError, match="the budget of 30.0 is used up"):
        ask_all(questions(200), Journal.open(tmp_path / "j.jsonl"), cheap, "x")
    journal = Journal.open(tmp_path / "j.jsonl")
    assert 15 < cheap.cost(journal.tokens) <= 30 and len(journal.answers) == sum(server.answered.values())


def test_the_estimate_bounds_what_is_paid(serve, tmp_path):
    serve()
    asked, journal, priced = questions(30), Journal.open(tmp_path / "j.jsonl"), Teacher("m", price=(1.0, 2.0))
    before = estimate(asked, journal, priced)
    assert "30 calls of m" in before and "30,720 out" in before
    ask_all(asked, journal, priced, "x")
    assert priced.cost(journal.tokens) <= sum(priced.cost(priced.at_most(r)) for r in asked)
    assert "0 calls" in estimate(asked, journal, priced)


def test_prices_and_bounds_by_hand():
    """Tokens in and out have prices of their own, and 3 bytes of text are at most a token: 猫 is 3 bytes."""
    assert Teacher("m", price=(0.5, 1.5)).cost([2_000_000, 1_000_000]) == 2.5
    assert Teacher("m").at_most(rejected("猫" * 90, [], None)) == [90 + 8, 1024]
    for request in (topic("Q?", ("Physics",)), judgement("Q?", "a", "b")):
        assert Teacher("m").at_most(request)[1] == 30
        assert Teacher("m").at_most(request)[0] >= 2 * 8 + sum(len(text) // 3 for _, text in request.messages)


def test_an_estimate_counts_each_missing_answer_once(tmp_path):
    journal, asked = Journal(tmp_path / "j.jsonl"), questions(4)
    journal.answers[asked[0].key("m")] = "known"
    shown = estimate([*asked, asked[1]], journal, Teacher("m", price=(0.0, 1e6)))
    assert shown.startswith("5 requests, 2 answered in the journal or asked twice; 3 calls of m:")
    assert shown.endswith(f"and {3 * 1024:,} out, {3 * 1024:,.2f}")
    assert estimate(asked, journal, Teacher("another model")).startswith("4 requests, 0 answered")


def test_a_choice_is_read_from_json_and_from_words_in_any_case():
    request = judgement("Q?", "a", "b")
    for answer in ('{"answer": "tie"}', "TIE", ' "Tie". ', '"tie"'):
        assert request.parse(answer) == "tie"
    assert request.parse("a") == request.parse('{"answer": "A"}') == "A"
    for answer in ("", " ", "A or B", '{"verdict": "A"}', "[1]", '{"answer": "C"}'):
        assert request.parse(answer) is None
    assert rejected("Q?", [], None).parse("  any text ") == "any text"
    assert rejected("Q?", [], None).parse(" ") is None


def test_a_torn_last_line_is_removed_and_other_damage_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a", "answer": "x", "tokens": [1, 2]}\n{"key": "b", "ans')
    journal = Journal.open(path)
    assert journal.answers == {"a": "x"}
    journal.add("c", "y", [1, 1])
    assert Journal.open(path).answers == {"a": "x", "c": "y"}
    path.write_text('{"key": "a"}\n{"key": "b", "answer": "x", "tokens": [1, 2]}\n')
    with pytest.raises(InputError, match=r"j\.jsonl:1: not a line of a teacher's journal"):
        Journal.open(path)


def test_a_thousand_rows_with_faults_on_a_third_and_a_kill_in_the_middle(serve, tmp_path, monkeypatch):
    """No row is lost and none is paid for twice, but for the calls in flight when the process was killed."""
    draw = random.Random(0)
    faulty = {f"What is {i} + {i}?": draw.choice(("429", "500", "cut", "not json")) for i in range(0, 1000, 3)}
    server = serve(fault=lambda body, attempt: faulty.get(body["messages"][-1]["content"]) if attempt == 1 else None)
    monkeypatch.setattr(teacher, "TIMEOUT", 20.0)  # a busy machine may be slow; none of these faults is
    code = (
        "from pathlib import Path; from prepare import teacher; from prepare.teacher import *; teacher.FIRST_WAIT = 0.001; "
        f"j = Journal.open(Path({str(tmp_path / 'j.jsonl')!r})); "
        "ask_all([rejected(f'What is {i} + {i}?', [], None) for i in range(1000)], j, Teacher('m', concurrency=16), 'x')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(server.answered.values()) < 400:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(Journal.open(tmp_path / "j.jsonl").answers)
    assert 300 < kept < 1000
    answers = ask_all(questions(1000), Journal.open(tmp_path / "j.jsonl"), Teacher("m", concurrency=16), "x")
    assert answers == [f"Answer to What is {i} + {i}?" for i in range(1000)]
    twice = [name for name, count in server.answered.items() if count > 1]
    assert len(server.answered) == 1000 and len(twice) <= 16 and max(server.answered.values()) <= 2
