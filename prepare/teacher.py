"""The teacher: a model behind any server that speaks OpenAI's protocol. It writes what the sources lack, and it judges.

    argument      an explanation that ends in a given answer: the right one, or a wrong option
    attempt       a reply to the bare question that does not end in the right answer
    topic         one of a list, or "Unknown"
    judgement     the better of two answers: "A", "B" or "tie"

What an answer ends in is checked (`concludes`). One that cannot be used is asked for again, with a reminder.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data import lettered
from metrics.multiple_choice import parse_choice, parse_letter
from runtime import runs
from runtime.files import InputError, first_line, json_object, read_fields, redact
from runtime.settings import Data, Eval

TRIES = 3  # unusable answers after which a request is given up for good
RETRIES = 8  # by the client, of a call that fails on its way; the growing waits add up to some 40 seconds
TIMEOUT = 120.0  # seconds for one answer
FAILURES = 20  # calls in a row without an answer after which nothing else is asked


@dataclass(frozen=True)
class Request:
    """One question to the teacher, and which answers to it can be used."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    names: tuple[str, ...] = ()  # the answer has to name one of these; empty: it is any text
    max_tokens: int = 1024
    end: str = ""  # what the text has to end in ...
    options: tuple[str, ...] = ()  # ... and in no other of these
    not_end: str = ""  # what it may not end in

    def reminder(self) -> str:
        """What the question is followed by when it is asked again."""
        if self.names:
            return f"\n\nAnswer with nothing but one of: {', '.join(self.names)}."
        return f'\n\nEnd with the sentence "The answer is {self.end}."' if self.end else ""

    def body(self, model: str, again: bool = False) -> dict:
        """The JSON to send."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        if again:
            messages[-1]["content"] += self.reminder()
        return {"model": model, "messages": messages, "max_tokens": self.max_tokens}

    def key(self, model: str) -> str:
        return hashlib.sha256(json.dumps(self.body(model), sort_keys=True).encode()).hexdigest()[:32]

    def parse(self, answer: str) -> str | None:
        """The text of an answer or, with names, the one that it chooses. None if it cannot be used."""
        if self.names:
            found = parse_choice(answer, self.names)
            return None if found is None else self.names[found]
        if self.end and not concludes(answer, self.end, self.options):
            return None
        if self.not_end and starts(terms(self.not_end), terms(conclusion(answer))):
            return None
        return answer.strip() or None

    def at_most(self) -> list[int]:
        """Upper bounds of the tokens in (about one for 3 bytes of text) and out."""
        texts = [*(text for _, text in self.messages), self.reminder()]
        return [sum(len(text.encode()) // 3 + 8 for text in texts), self.max_tokens]


NUMBER = r"(?<![\w)\]}])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
TERM = re.compile(rf"({NUMBER})|\w+|[^\w\s.,;:!?'\"\u2018-\u201d*$`]")


def terms(text: str, case: bool = False) -> list[str]:
    """Words, numbers and symbols: "It is 1,000.50 N." -> ["it", "is", "1000.5", "n"]; with `case`, "It" and "N"."""
    made = []
    for found in TERM.finditer(text.replace("\u2212", "-")):
        number = found[1] and found[1].replace(",", "")
        made.append(f"{float(number):.15g}" if number else found[0])
    return made if case else [term.casefold() for term in made]


def conclusion(text: str) -> str:
    """What a text ends in: all that follows its last "answer is" or "answer:"; without one, its last line."""
    parts = re.split(r"(?i)\banswer\b[^.:\n]{0,40}?(?:\bis\b|:)", text)
    return parts[-1] if len(parts) > 1 else text.strip().rpartition("\n")[2]


def starts(part: list[str], whole: list[str]) -> list[int]:
    """Where a list of terms occurs in another."""
    return [i for i in range(len(whole)) if part and whole[i : i + len(part)] == part]


def concludes(text: str, answer: str, options: Sequence[str] = ()) -> bool:
    """Whether a text ends in `answer`, by its words or its letter, and in no other option. An answer without options may be
    followed by its unit, but not by another number."""
    case = len({option.casefold() for option in options}) < len(set(options))  # AA, Aa, aa
    said, wanted = terms(conclusion(text), case), {option: terms(option, case) for option in (answer, *options)}
    found = [(range(i, i + len(its)), option) for option, its in wanted.items() for i in starts(its, said)]
    # "blue" is not named where it is a part of "light blue".
    named = {option for its, option in found if not any(set(its) < set(longer) for longer, _ in found)}
    letter = parse_letter(f"Answer: {conclusion(text).strip()}", len(options)) if options else None
    if letter is not None and said[: len(wanted[answer])] != wanted[answer]:
        return options[letter] == answer and named <= {answer}
    numbers = {term for before, term in zip(["", *said], said) if re.fullmatch(NUMBER, term) and before not in ("^", "_")}
    return named == {answer} and (bool(options) or numbers <= set(wanted[answer]))


END = 'End with a sentence of its own: "The answer is", and the answer word for word. Do not name options by their letters.'


def argument(question: str, choices: list[str], answer: str) -> Request:
    """Why `answer` is right, step by step. A wrong option is argued for on the same instructions as the right one, so that
    style does not give the rejected answer away."""
    options = f"\n\nOptions:\n{lettered(choices)}" if choices else ""
    task = f"Explain step by step how to arrive at the given answer. Do not say that it was given. {END}"
    others = tuple(choices) or (("True", "False") if answer in ("True", "False") else ())
    return Request((("system", task), ("user", f"{question}{options}\n\nAnswer: {answer}")), end=answer, options=others)


def attempt(question: str, answer: str = "") -> Request:
    """A reply to the bare question, to be rejected. With the right `answer`, which the teacher has explained, it has the
    style of the explanation and may not end in that answer."""
    task = (("system", f"Explain step by step how to arrive at the answer. {END}"),) if answer else ()
    return Request((*task, ("user", question)), not_end=answer)


def topic(question: str, topics: tuple[str, ...]) -> Request:
    names = (*topics, "Unknown")
    task = f"To which topic does the question belong? Answer with one of: {', '.join(names)}."
    return Request((("system", task), ("user", question)), names, max_tokens=30)


def judgement(question: str, a: str, b: str) -> Request:
    task = "Which answer to the question is better? Judge correctness first, then clarity. Answer with A, B or tie."
    text = f"Question:\n{question}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
    return Request((("system", task), ("user", text)), ("A", "B", "tie"), max_tokens=512)  # some give reasons first


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
        with open(self.path, "r+b") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.write(line)
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
    price = settings.price or "0,0"
    if not re.fullmatch(r"\d*\.?\d+,\d*\.?\d+", price):
        raise InputError(f"--price {price}: two numbers, per million tokens in and out, such as 0.5,1.5")
    journal = Journal(Path(settings.out) / "teacher" / "journal.jsonl")
    budget = math.inf if settings.budget is None else settings.budget
    return Teacher(settings.teacher, journal, settings.concurrency, tuple(map(float, price.split(","))), budget)


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
            except (InputError, OSError) as error:  # a full disk, for example
                stop = redact(f"{journal.path}: {error.strerror}" if isinstance(error, OSError) else str(error))
    if missing := len(teacher.missing(requests)):
        left = f"{missing:,} of {len(requests):,} answers are missing; the same command asks only for those"
        raise InputError(f"{stop or 'the server of the teacher failed'} ({left})")
    answers = [journal.answers.get(request.key(teacher.model)) for request in requests]
    return [None if answer is None else request.parse(answer) for request, answer in zip(requests, answers)]


def check_environment() -> None:
    """InputError if the key or the address cannot be used, before the client tries them eight times for each request."""
    key, url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not key:
        raise InputError("OPENAI_API_KEY is not set in the environment (a local server takes any text)")
    if not re.fullmatch("[!-~]+", key):
        raise InputError("OPENAI_API_KEY holds a blank, a line break or another character that no key has; set it anew")
    if url and not re.fullmatch(r"(?i)https?://([!-~]+@)?(\[[\da-f:.]+\]|[\w.-]+)(:\d+)?(/[!-~]*)?", url):
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
    while useless < TRIES:
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
        final = usable or refused or useless == TRIES
        body["messages"] = request.body(teacher.model, again=True)["messages"]
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
