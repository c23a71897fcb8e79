"""The teacher: a model behind any server that speaks OpenAI's protocol. It writes what the sources lack, and it judges.

    explanation   why a known answer is right
    rejected      a worse answer: a reply to the bare question, or an argument for a wrong option
    topic         one of a list, or "Unknown"
    judgement     the better of two answers: "A", "B" or "tie"

Every answer is appended to a journal, under the hash of its request, before it is used. A second run asks only what is
missing, and a kill loses at most the calls in flight. One process at a time asks; the next one waits and reads what the
first has paid for. OPENAI_API_KEY and OPENAI_BASE_URL come from the environment alone; the key is never written anywhere.
"""

import asyncio
import hashlib
import json
import math
import os
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data import LETTERS
from runtime import runs
from runtime.files import InputError, first_line, json_object, read_fields, redact
from runtime.settings import Data, Eval

RETRIES = 8  # by the client, of a call that fails on its way; the growing waits add up to some 40 seconds
USELESS = 3  # unusable answers after which a request is given up for good
TIMEOUT = 120.0  # seconds for one answer
FAILURES = 20  # calls in a row without an answer after which nothing else is asked


@dataclass(frozen=True)
class Request:
    """One question to the teacher, and how its answer is read."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    choices: tuple[str, ...] = ()  # the only valid answers; empty: any text is
    max_tokens: int = 1024

    def body(self, model: str) -> dict:
        """The JSON to send."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        return {"model": model, "messages": messages, "max_tokens": self.max_tokens}

    def key(self, model: str) -> str:
        return hashlib.sha256(json.dumps(self.body(model), sort_keys=True).encode()).hexdigest()[:32]

    def parse(self, answer: str) -> str | None:
        """The text of an answer or, with choices, the one that it names. None if it is useless."""
        if not self.choices:
            return answer.strip() or None
        said = answer.strip(' \n."').casefold()
        return next((choice for choice in self.choices if choice.casefold() == said), None)

    def at_most(self) -> list[int]:
        """Upper bounds of the tokens in (about one for 3 bytes of text) and out."""
        return [sum(len(text.encode()) // 3 + 8 for _, text in self.messages), self.max_tokens]


def lettered(choices: list[str]) -> str:
    """The options of a question as text: "A. ...", "B. ...", one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


def explanation(question: str, choices: list[str], answer: str) -> Request:
    """Why `answer` is right, step by step."""
    options = f"\n\nOptions:\n{lettered(choices)}" if choices else ""
    task = "Explain step by step how to arrive at the given answer, then state it. "
    task += "Do not say that it was given, and do not name options by their letters."
    return Request((("system", task), ("user", f"{question}{options}\n\nAnswer: {answer}")))


def rejected(question: str, choices: list[str], wrong: str | None) -> Request:
    """An answer worse than the right one. With options, the teacher argues for a wrong one, on the same instructions as for
    `explanation`, so that style does not give the rejected answer away. Without, it replies to the bare question."""
    return Request((("user", question),)) if wrong is None else explanation(question, choices, wrong)


def topic(question: str, topics: tuple[str, ...]) -> Request:
    choices = (*topics, "Unknown")
    task = f"To which topic does the question belong? Answer with one of: {', '.join(choices)}."
    return Request((("system", task), ("user", question)), choices, max_tokens=30)


def judgement(question: str, a: str, b: str) -> Request:
    task = "Which answer to the question is better? Judge correctness first, then clarity. Answer with A, B or tie."
    text = f"Question:\n{question}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
    return Request((("system", task), ("user", text)), ("A", "B", "tie"), max_tokens=30)


class Journal:
    """A JSONL file with every call that was paid for: {"key", "answer", "tokens": [in, out]}. "answer" is null if
    the teacher refused; "key" is empty if the answer was useless: the request stays open."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.read()

    def read(self) -> None:
        """Reads the file anew. A last line without its end was cut short by a kill, or is just being written."""
        self.answers: dict[str, str | None] = {}
        self.tokens = [0, 0]
        *lines, _ = self.path.read_bytes().split(b"\n")
        self.size = sum(len(line) + 1 for line in lines)  # where the next entry goes
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json_object(line))
            except ValueError as error:
                hint = "correct it, or remove it to ask and pay again"
                raise InputError(f"{self.path}:{number}: not a line of a teacher's journal ({error}); {hint}") from None

    def _take(self, entry: dict) -> None:
        fields = read_fields(entry, {"key": str, "answer": str | None, "tokens": list}, "the entry")
        if len(fields["tokens"]) != 2 or not all(map(is_count, fields["tokens"])):
            raise ValueError('"tokens" are not two counts')
        self.answers[fields["key"]] = fields["answer"]
        self.tokens = [had + new for had, new in zip(self.tokens, fields["tokens"])]

    def add(self, key: str, answer: str | None, tokens: list[int]) -> None:
        entry = {"key": key, "answer": answer and redact(answer), "tokens": tokens}
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            with open(self.path, "r+b") as file:
                file.truncate(self.size)
                file.seek(self.size)
                file.write(line)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; an answer that was paid for is lost") from None
        self.size += len(line)
        self._take(entry)


def is_count(value: object) -> bool:
    """Whether a number of tokens can be one: neither NaN nor negative nor absurd."""
    return type(value) is int and 0 <= value < 10**9


@dataclass
class Teacher:
    """How to ask: which model, how many calls at a time, at what price per million tokens in and out, within what budget."""

    model: str
    journal: Journal
    concurrency: int = 8
    price: tuple[float, ...] = (0.0, 0.0)
    budget: float = math.inf  # for all calls in the journal
    open_calls: list[float] = field(default_factory=list)  # what each call in flight may cost
    failures: int = 0  # calls in a row without an answer

    def cost(self, tokens: list[int]) -> float:
        return sum(count * price / 1e6 for count, price in zip(tokens, self.price))

    def missing(self, requests: list[Request]) -> dict[str, Request]:
        """The requests that the journal does not answer, each once, by key."""
        keyed = {request.key(self.model): request for request in requests}
        return {key: request for key, request in keyed.items() if key not in self.journal.answers}


def open_teacher(settings: Data | Eval) -> Teacher | None:
    """The teacher of a run, with the journal that all runs under OUT share; None without --teacher."""
    if not settings.teacher:
        return None
    if settings.budget is not None and not settings.price:
        raise InputError("--budget needs --price IN,OUT: per million tokens in and out")
    try:
        price = tuple(float(part) for part in (settings.price or "0,0").split(","))
    except ValueError:
        price = ()
    if len(price) != 2 or not all(0 <= value < math.inf for value in price):
        raise InputError(f"--price {settings.price}: two numbers, per million tokens in and out, such as 0.5,1.5")
    journal = Journal(Path(settings.out) / "teacher" / "journal.jsonl")
    budget = math.inf if settings.budget is None else settings.budget
    return Teacher(settings.teacher, journal, settings.concurrency, price, budget)


def estimate(requests: list[Request], teacher: Teacher) -> str:
    """How many calls the requests need and what they may cost, for --dry-run."""
    todo = teacher.missing(requests).values()
    tokens = [sum(counts) for counts in zip((0, 0), *(request.at_most() for request in todo))]
    return (
        f"{len(requests):,} requests, {len(requests) - len(todo):,} answered in the journal or asked twice; {len(todo):,} "
        f"calls of {teacher.model}: at most about {tokens[0]:,} tokens in and {tokens[1]:,} out, {teacher.cost(tokens):,.2f}"
    )


def ask_all(requests: list[Request], teacher: Teacher, label: str) -> list[str | None]:
    """The parsed answer to every request; None where the teacher refused or gave no usable one. InputError if an answer is
    still missing: the server failed, or there is no point in asking on (a wrong key, an unknown model, the budget)."""
    journal, stop = teacher.journal, None
    with runs.locked(journal.path, wait=True):
        journal.read()
        if todo := teacher.missing(requests):
            try:
                asyncio.run(_ask_missing(todo, teacher, label))
            except InputError as error:
                stop = redact(str(error))
    if missing := len(teacher.missing(requests)):
        left = f"{missing:,} of {len(requests):,} answers are missing; the same command asks only for those"
        raise InputError(f"{stop or 'the server of the teacher failed'} ({left})")
    answers = [journal.answers.get(request.key(teacher.model)) for request in requests]
    return [None if answer is None else request.parse(answer) for request, answer in zip(requests, answers)]


def check_environment() -> None:
    """InputError if the key or the address cannot be used, before the client tries them eight times for each request."""
    if not (key := os.environ.get("OPENAI_API_KEY")):
        raise InputError("OPENAI_API_KEY is not set in the environment (a local server takes any text)")
    if not re.fullmatch("[!-~]+", key):
        raise InputError("OPENAI_API_KEY holds a blank, a line break or another character that no key has; set it anew")
    url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    try:
        parts = urlsplit(url)
        usable = re.fullmatch("[!-~]+", url) and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"OPENAI_BASE_URL {url!r} is no address such as http://localhost:8000/v1")


async def _ask_missing(todo: dict[str, Request], teacher: Teacher, label: str) -> None:
    import openai

    check_environment()
    queue = deque(todo.items())
    async with openai.AsyncOpenAI(max_retries=RETRIES, timeout=TIMEOUT) as api:
        with tqdm(total=len(todo), desc=label, unit="call", mininterval=1) as bar:

            async def worker() -> None:
                try:
                    while queue:
                        await _ask(api, *queue.popleft(), teacher)
                        bar.update()
                finally:
                    queue.clear()  # after an error nothing else is asked

            # After an error the calls in flight still cost money, so their answers are waited for and kept.
            for ended in await asyncio.gather(*(worker() for _ in range(teacher.concurrency)), return_exceptions=True):
                if ended:
                    raise ended


async def _ask(api, key: str, request: Request, teacher: Teacher) -> None:
    """Asks until the journal has the answer. InputError if all other requests would fail too."""
    import openai

    journal, body, useless = teacher.journal, request.body(teacher.model), 0
    while useless < USELESS:
        bound = teacher.cost(request.at_most())
        while (spent := teacher.cost(journal.tokens)) + sum(teacher.open_calls) + bound > teacher.budget:
            if not teacher.open_calls:
                spent = f"{spent:.4f} is spent, a call may cost {bound:.4f}"
                raise InputError(f"the budget of {teacher.budget} is used up: {spent}")
            await asyncio.sleep(0.01)  # the open calls may turn out cheaper
        teacher.open_calls.append(bound)
        try:
            response = await api.chat.completions.create(**body)
        except Exception as error:  # openai's, and whatever its libraries make of an answer that is none
            code = getattr(error, "code", None)
            if "max_tokens" in body and "max_completion_tokens" in str(error):
                body["max_completion_tokens"] = body.pop("max_tokens")  # a newer model
                continue
            if code in ("context_length_exceeded", "content_filter", "content_policy_violation"):
                return journal.add(key=key, answer=None, tokens=[0, 0])
            unreached = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
            if unreached or code == "insufficient_quota" or getattr(error, "status_code", 0) in (400, 401, 403, 404, 422):
                reason = first_line(error.__cause__ or error)
                raise InputError(f"the teacher's server at {api.base_url} cannot be used: {reason}") from None
            return _no_answer(teacher, type(error).__name__)
        finally:
            teacher.open_calls.remove(bound)
        text, refused, tokens = read_response(response)
        if text is None and not refused:  # no answer, but it may have been paid for
            if tokens:
                journal.add(key="", answer=None, tokens=tokens)
            return _no_answer(teacher, "a response without a message")
        teacher.failures = 0
        usable = text is not None and request.parse(text) is not None
        useless += not usable
        final = usable or refused or useless == USELESS
        journal.add(key=key if final else "", answer=text if usable else None, tokens=tokens or request.at_most())
        if final:
            return


def read_response(response: object) -> tuple[str | None, bool, list[int] | None]:
    """What a server sent, which may be anything: the answer, None if there is none; whether the teacher refused; the tokens
    in and out, None unless they are counts."""
    choices, usage = getattr(response, "choices", None), getattr(response, "usage", None)
    tokens = [getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)]
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None)
    if message is not None and (not isinstance(text, str) or getattr(choice, "finish_reason", None) == "length"):
        text = ""  # a model tuned on answers that were cut off would not learn to stop
    return text, bool(getattr(message, "refusal", None)), tokens if all(map(is_count, tokens)) else None


def _no_answer(teacher: Teacher, reason: str) -> None:
    """Leaves a request open. InputError if the last calls all went like this."""
    teacher.failures += 1
    if teacher.failures >= FAILURES:
        raise InputError(f"the teacher's server gave no answer to the last {FAILURES} calls: {reason}")
    tqdm.write(f"  no answer ({reason}); the next run asks again")
