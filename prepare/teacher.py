"""The teacher: a model behind any server that speaks OpenAI's protocol. It writes what the sources lack, and it judges.

    explanation   why a known answer is right
    rejected      a worse answer: a reply to the bare question, or an argument for a wrong option
    topic         one of a list, or "Unknown"
    judgement     the better of two answers: "A", "B" or "tie"

Every answer is appended to a journal, under the hash of its request, before it is used. A second run asks only what is
missing, and a kill loses at most the calls in flight. OPENAI_API_KEY and OPENAI_BASE_URL come from the environment alone;
the key is never written anywhere.
"""

import asyncio
import hashlib
import json
import math
import os
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data import LETTERS
from runtime.files import InputError, json_object, numbered_lines
from runtime.settings import Data, Eval

ATTEMPTS = 8  # per request
FIRST_WAIT = 0.5  # seconds, doubled after each attempt up to a minute
UNREACHED = 5  # failed connections after which the server counts as down
USELESS = 3  # unusable answers after which a request is given up for good
TIMEOUT = 120.0  # seconds for one answer


@dataclass(frozen=True)
class Request:
    """One question to the teacher, and how its answer is read."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    choices: tuple[str, ...] = ()  # the only valid answers; empty: any text is
    max_tokens: int = 1024

    def body(self, model: str) -> dict:
        """The JSON to send. With choices, the server may answer {"answer": choice} and nothing else."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        body = {"model": model, "messages": messages, "max_tokens": self.max_tokens}
        if self.choices:
            answer = {"type": "string", "enum": list(self.choices)}
            schema = {"type": "object", "properties": {"answer": answer}, "required": ["answer"]}
            schema["additionalProperties"] = False  # OpenAI requires it with "strict"
            form = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def key(self, model: str) -> str:
        return hashlib.sha256(json.dumps(self.body(model), sort_keys=True).encode()).hexdigest()[:32]

    def parse(self, answer: str) -> str | None:
        """The text of an answer; with choices, the one named by {"answer": choice} or in plain words. None if useless."""
        if not self.choices:
            return answer.strip() or None
        try:
            value = json.loads(answer)["answer"]
        except (ValueError, KeyError, TypeError):
            value = answer
        said = str(value).strip().strip('."').casefold()
        return next((choice for choice in self.choices if choice.casefold() == said), None)


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


@dataclass
class Journal:
    """A JSONL file with every call that was paid for: {"key", "answer", "tokens": [in, out]}. "answer" is null if
    the teacher refused; "key" is empty if the answer was useless: the request stays open."""

    path: Path
    answers: dict[str, str | None] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    open_calls: list[float] = field(default_factory=list)  # what each call in flight may cost

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Reads the journal; removes a last line that a kill cut short."""
        journal = cls(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        for number, line in numbered_lines(path) if path.exists() else ():
            try:
                journal._take(json_object(line))
            except (ValueError, KeyError, TypeError) as error:
                hint = "correct it, or remove it to ask and pay again"
                raise InputError(f"{path}:{number}: not a line of a teacher's journal ({error!r}); {hint}") from None
        return journal

    def _take(self, entry: dict) -> None:
        self.answers[entry["key"]] = entry["answer"]
        self.tokens = [had + new for had, new in zip(self.tokens, entry["tokens"], strict=True)]

    def add(self, key: str, answer: str | None, tokens: list[int]) -> None:
        entry = {"key": key, "answer": answer, "tokens": tokens}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._take(entry)


@dataclass
class Teacher:
    """How to ask: which model, how many calls at a time, at what price per million tokens in and out, within what budget."""

    model: str
    concurrency: int = 8
    price: tuple[float, float] = (0.0, 0.0)
    budget: float | None = None  # for all calls in the journal

    def cost(self, tokens: list[int]) -> float:
        return sum(count * price / 1e6 for count, price in zip(tokens, self.price))

    def at_most(self, request: Request) -> list[int]:
        """Upper bounds of a call's tokens in (about one for 3 bytes of text) and out."""
        return [sum(len(text.encode()) // 3 + 8 for _, text in request.messages), request.max_tokens]


def open_teacher(settings: Data | Eval) -> tuple[Teacher | None, Journal]:
    """The teacher of a run, None without --teacher, and the journal that all runs under OUT share."""
    journal = Journal.open(Path(settings.out) / "teacher" / "journal.jsonl")
    if not settings.teacher:
        return None, journal
    if settings.budget is not None and not settings.price:
        raise InputError("--budget needs --price IN,OUT: per million tokens in and out")
    try:
        price = tuple(float(part) for part in (settings.price or "0,0").split(","))
    except ValueError:
        price = ()
    if len(price) != 2 or not all(0 <= value < math.inf for value in price):
        raise InputError(f"--price {settings.price}: two numbers, per million tokens in and out, such as 0.5,1.5")
    return Teacher(settings.teacher, settings.concurrency, price, settings.budget), journal


def missing(requests: list[Request], journal: Journal, teacher: Teacher) -> dict[str, Request]:
    """The requests that the journal does not answer, each once, by key."""
    keyed = {request.key(teacher.model): request for request in requests}
    return {key: request for key, request in keyed.items() if key not in journal.answers}


def estimate(requests: list[Request], journal: Journal, teacher: Teacher) -> str:
    """How many calls the requests need and what they may cost, for --dry-run."""
    todo = missing(requests, journal, teacher).values()
    tokens = [sum(counts) for counts in zip((0, 0), *map(teacher.at_most, todo))]
    return (
        f"{len(requests):,} requests, {len(requests) - len(todo):,} answered in the journal or asked twice; {len(todo):,} "
        f"calls of {teacher.model}: at most about {tokens[0]:,} tokens in and {tokens[1]:,} out, {teacher.cost(tokens):,.2f}"
    )


def ask_all(requests: list[Request], journal: Journal, teacher: Teacher, label: str) -> list[str | None]:
    """The parsed answer to every request; None where the teacher refused or gave no usable one in all attempts. InputError
    if there is no point in asking on: a wrong key, an empty account, an unknown model, or the budget."""
    todo = missing(requests, journal, teacher)
    if todo:
        try:
            asyncio.run(_ask_missing(todo, journal, teacher, label))
        except InputError as stop:
            left = len(missing(requests, journal, teacher))
            hint = f"{left:,} of {len(requests):,} answers are missing; the same command asks only for those"
            raise InputError(f"{stop} ({hint})") from None
    answers = [journal.answers.get(request.key(teacher.model)) for request in requests]
    return [None if answer is None else request.parse(answer) for request, answer in zip(requests, answers)]


async def _ask_missing(todo: dict[str, Request], journal: Journal, teacher: Teacher, label: str) -> None:
    import openai

    if not os.environ.get("OPENAI_API_KEY"):
        raise InputError("OPENAI_API_KEY is not set in the environment (a local server takes any text)")
    queue = deque(todo.values())
    # The SDK's own retries would ask on with an empty account, and they count no tokens.
    async with openai.AsyncOpenAI(max_retries=0, timeout=TIMEOUT) as api:
        with tqdm(total=len(todo), desc=label, unit="call", mininterval=1) as bar:

            async def worker() -> None:
                try:
                    while queue:
                        await _ask(api, queue.popleft(), journal, teacher)
                        bar.update()
                        bar.set_postfix(cost=f"{teacher.cost(journal.tokens):.4f}", refresh=False)
                finally:
                    queue.clear()  # after an error nothing else is asked

            workers = [asyncio.create_task(worker()) for _ in range(teacher.concurrency)]
            # After an error the calls in flight still cost money, so their answers are waited for and kept.
            for ended in await asyncio.gather(*workers, return_exceptions=True):
                if ended:
                    raise ended


async def _ask(api, request: Request, journal: Journal, teacher: Teacher) -> None:
    """Asks until the journal has the answer, at most ATTEMPTS times. InputError if all other requests would fail too."""
    import openai

    key, body = request.key(teacher.model), request.body(teacher.model)
    useless = 0
    for attempt in range(ATTEMPTS):
        wait = min(60.0, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.5)
        bound = await _reserve(request, journal, teacher)
        try:
            response = await api.chat.completions.create(**body)
            choice = response.choices[0]
            tokens = [int(response.usage.prompt_tokens), int(response.usage.completion_tokens)]
            refused = bool(getattr(choice.message, "refusal", None))
            cut = choice.finish_reason == "length"  # a model tuned on answers that were cut off would not learn to stop
            text = "" if cut else choice.message.content or ""
            usable = request.parse(text) is not None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise InputError(f"the teacher's server refuses: {error.status_code} {_reason(error)}") from None
        except openai.BadRequestError as error:
            if "response_format" in body and "response_format" in str(error):
                del body["response_format"]  # an older server; the words of its answer are checked anyway
            elif "max_tokens" in body and "max_completion_tokens" in str(error):
                body["max_completion_tokens"] = body.pop("max_tokens")  # a newer model
            elif error.code in ("context_length_exceeded", "content_filter", "content_policy_violation"):
                journal.add(key, None, [0, 0])
                return
            else:
                raise InputError(f"the teacher's server does not understand the request: {_reason(error)}") from None
            continue
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise InputError(f"the teacher's account is empty: {_reason(error)}") from None
            wait, failure = max(wait, _retry_after(error)), type(error).__name__
        except (openai.APIError, ValueError, AttributeError, IndexError, TypeError) as error:
            # A server error, a cut connection, a time-out, or a body that is not the protocol's. The error of a failed
            # connection is recognized by its name, because the SDK's versions use different HTTP libraries.
            if type(error.__cause__).__name__ == "ConnectError" and attempt + 1 == UNREACHED:
                raise InputError(f"the teacher's server at {api.base_url} cannot be reached: {error.__cause__}") from None
            failure = type(error).__name__
        else:
            useless += 0 if usable else 1
            final = usable or refused or useless == USELESS
            journal.add(key if final else "", text if usable else None, tokens)
            if final:
                return
            failure = "useless answers"
        finally:
            journal.open_calls.remove(bound)
        await asyncio.sleep(wait)
    tqdm.write(f"  no answer in {ATTEMPTS} attempts ({failure}); the next run asks again")


async def _reserve(request: Request, journal: Journal, teacher: Teacher) -> float:
    """Waits until the budget has room for the most that a call may cost, and adds that to the open calls, which may turn
    out cheaper. InputError if none is open and there is still no room."""
    bound = teacher.cost(teacher.at_most(request))
    while teacher.budget is not None and teacher.cost(journal.tokens) + sum(journal.open_calls) + bound > teacher.budget:
        if not journal.open_calls:
            spent = teacher.cost(journal.tokens)
            raise InputError(f"the budget of {teacher.budget} is used up: {spent:.4f} is spent, a call may cost {bound:.4f}")
        await asyncio.sleep(0.01)
    journal.open_calls.append(bound)
    return bound


def _reason(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or type(error).__name__)[:200]


def _retry_after(error) -> float:
    """The seconds that a server asks to wait, at most a minute; 0 if it names none."""
    try:
        return min(60.0, float(error.response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
