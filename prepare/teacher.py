"""The ChatGPT side: rejected answers, explanations, topics, judgements, from any server that speaks OpenAI's protocol.

    rejected      an answer to put below the right one: to the bare question, or arguing for a wrong option
    explanation   of a right answer that is known
    topic         one of a list, or "Unknown"
    judgement     which of two answers is better: "A", "B" or "tie"

Each job is one prompt. An answer is appended to the journal, under the hash of its request, before it is used: a second run
asks only what is missing, and a kill loses at most the calls in flight. OPENAI_API_KEY and OPENAI_BASE_URL come from the
environment alone; the key is written nowhere.
"""

import asyncio
import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from runtime.files import InputError

ATTEMPTS = 8  # per request
FIRST_WAIT = 0.5  # seconds, doubled after each attempt up to a minute
UNREACHED = 5  # attempts to connect, after which there is no server
USELESS = 3  # answers that make no sense, after which a request is given up for good
TIMEOUT = 120.0  # seconds for one answer


@dataclass(frozen=True)
class Request:
    """One question to the teacher, and how its answer is read."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    choices: tuple[str, ...] = ()  # the only answers that make sense; without any, all text does
    max_tokens: int = 1024

    def body(self, model: str, structured: bool = True, limit: str = "max_tokens") -> dict:
        """The JSON of the request. `structured`: have the server hold the answer to the choices, if it can; `limit`: newer
        models take "max_completion_tokens"."""
        messages = [{"role": role, "content": text} for role, text in self.messages]
        body = {"model": model, "messages": messages, limit: self.max_tokens}
        if self.choices and structured:
            answer = {"type": "string", "enum": list(self.choices)}
            schema = {"type": "object", "properties": {"answer": answer}, "required": ["answer"]}
            schema |= {"additionalProperties": False}  # what OpenAI asks for beside "strict"
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        return body

    def key(self, model: str) -> str:
        return hashlib.sha256(json.dumps(self.body(model), sort_keys=True).encode()).hexdigest()[:32]

    def parse(self, answer: str) -> str:
        """The text of an answer, or which choice {"answer": choice} or bare words name. ValueError if it is of no use."""
        if not answer.strip():
            raise ValueError("an empty answer")
        if not self.choices:
            return answer.strip()
        try:
            value = json.loads(answer)["answer"]
        except (ValueError, KeyError, TypeError):
            value = answer
        for choice in self.choices:
            if str(value).strip().strip('."').casefold() == choice.casefold():
                return choice
        raise ValueError(f"{answer[:60]!r} is none of {', '.join(self.choices)}")


# ----------------------------------------------------------------------------------------------------------- the four jobs


def explanation(question: str, choices: list[str], answer: str) -> Request:
    """Why `answer` is right, in steps."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices))
    options = f"\n\nOptions:\n{options}" if choices else ""
    task = (
        "Explain step by step how to arrive at the given answer, then state it. Do not say that it was given, and do not "
        "name options by their letters."
    )
    return Request((("system", task), ("user", f"{question}{options}\n\nAnswer: {answer}")))


def rejected(question: str, choices: list[str], wrong: str | None) -> Request:
    """An answer that is worse than the right one. A wrong option is argued for in the words of `explanation`, so that style
    does not tell the two apart; without options, it is what the teacher answers to the bare question."""
    return Request((("user", question),)) if wrong is None else explanation(question, choices, wrong)


def topic(question: str, topics: tuple[str, ...]) -> Request:
    choices = (*topics, "Unknown")
    task = f"To which topic does the question belong? Answer with one of: {', '.join(choices)}."
    return Request((("system", task), ("user", question)), choices, max_tokens=30)


def judgement(question: str, a: str, b: str) -> Request:
    task = "Which answer to the question is better? Judge correctness first, then clarity. Answer with A, B or tie."
    text = f"Question:\n{question}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
    return Request((("system", task), ("user", text)), ("A", "B", "tie"), max_tokens=30)


# ------------------------------------------------------------------------------------------------------ journal and prices


@dataclass
class Journal:
    """A JSONL file of {"key", "answer", "tokens": [in, out]}: everything that was paid for. `answer` None: refused; key "":
    paid for and of no use, so the request is still open."""

    path: Path
    answers: dict[str, str | None] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=lambda: [0, 0])

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Reads the journal; a last line that a kill cut short is removed."""
        journal = cls(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            os.truncate(path, data.rfind(b"\n") + 1)
            for number, line in enumerate(data.split(b"\n")[:-1], start=1):
                try:
                    journal._take(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path}:{number}: not a line of a teacher's journal ({error!r})") from None
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
    """How to ask: the model's name, calls at a time, price per million tokens in and out, and what may be spent in all."""

    model: str
    concurrency: int = 8
    price: tuple[float, float] = (0.0, 0.0)
    budget: float | None = None

    def cost(self, tokens: list[int]) -> float:
        return sum(count * price / 1e6 for count, price in zip(tokens, self.price))

    def at_most(self, request: Request) -> list[int]:
        """Tokens in (about a token for 3 bytes of text) and out, estimated from above."""
        return [sum(len(text.encode()) // 3 + 8 for _, text in request.messages), request.max_tokens]


class Stop(Exception):
    """Asking on is pointless or unwanted: a wrong key, an empty account, the budget. The message is for the user."""


def missing(requests: list[Request], journal: Journal, teacher: Teacher) -> dict[str, Request]:
    """The requests that the journal does not answer, each once."""
    keyed = {request.key(teacher.model): request for request in requests}
    return {key: request for key, request in keyed.items() if key not in journal.answers}


def estimate(requests: list[Request], journal: Journal, teacher: Teacher) -> str:
    """What asking would take, for --dry-run."""
    todo = missing(requests, journal, teacher).values()
    tokens = [sum(part) for part in zip(*map(teacher.at_most, todo))] or [0, 0]
    answered, cost = len(requests) - len(todo), teacher.cost(tokens)
    return (
        f"{len(requests):,} requests, {answered:,} answered in the journal or asked twice; {len(todo):,} calls of "
        f"{teacher.model}: at most about {tokens[0]:,} tokens in and {tokens[1]:,} out, {cost:,.2f}"
    )


# -------------------------------------------------------------------------------------------------------------- asking


def client():
    """The SDK's client. Its own retries are off: they would retry an empty account, and count no money."""
    import openai

    if not os.environ.get("OPENAI_API_KEY"):
        raise InputError("OPENAI_API_KEY is not set in the environment (a local server takes any text)")
    return openai.AsyncOpenAI(max_retries=0, timeout=TIMEOUT)


def ask_all(requests: list[Request], journal: Journal, teacher: Teacher, label: str) -> list[str | None]:
    """The parsed answer to every request, None where the teacher refused or gave nothing of use in all attempts.

    InputError stops all: a wrong key, an empty account, an unknown model, or the budget. What was answered until then is in
    the journal.
    """
    todo = missing(requests, journal, teacher)
    if todo:
        try:
            asyncio.run(_ask_missing(todo, journal, teacher, label))
        except Stop as stop:
            left = len(missing(requests, journal, teacher))
            hint = f"{left:,} of {len(requests):,} answers are missing; the same command asks only for those"
            raise InputError(f"{stop} ({hint})") from None
    answers = [journal.answers.get(request.key(teacher.model)) for request in requests]
    return [None if answer is None else request.parse(answer) for request, answer in zip(requests, answers)]


async def _ask_missing(todo: dict[str, Request], journal: Journal, teacher: Teacher, label: str) -> None:
    queue, in_flight, halted = iter(todo.items()), [], []
    with tqdm(total=len(todo), desc=label, unit="call", mininterval=1) as bar:
        async with client() as api:

            async def worker() -> None:
                for key, request in queue:
                    if halted:
                        return
                    try:
                        bound = await _reserve(request, journal, teacher, in_flight)
                        try:
                            answer, tokens, final = await _ask(api, request, teacher.model)
                        finally:
                            in_flight.remove(bound)
                    except Stop:
                        halted.append(True)
                        raise
                    if final or any(tokens):
                        journal.add(key if final else "", answer, tokens)
                    bar.update()
                    bar.set_postfix(cost=f"{teacher.cost(journal.tokens):.4f}", refresh=False)

            workers = [asyncio.create_task(worker()) for _ in range(teacher.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:  # at a Stop, calls in flight are paid for: let them end and be written down
                await asyncio.gather(*workers, return_exceptions=True)


async def _reserve(request: Request, journal: Journal, teacher: Teacher, in_flight: list[float]) -> float:
    """The most that a request may cost, added to `in_flight` once the budget has room for it; waits for calls in flight to
    turn out cheaper than that. Stop if nothing is in flight and there is still no room."""
    bound = teacher.cost(teacher.at_most(request))
    while teacher.budget is not None and teacher.cost(journal.tokens) + sum(in_flight) + bound > teacher.budget:
        if not in_flight:
            spent = teacher.cost(journal.tokens)
            raise Stop(f"the budget of {teacher.budget} would be passed: {spent:.4f} are spent, a call may cost {bound:.4f}")
        await asyncio.sleep(0.01)
    in_flight.append(bound)
    return bound


async def _ask(api, request: Request, model: str) -> tuple[str | None, list[int], bool]:
    """(answer, tokens paid, whether that is final). Answer None and final: refused, or of no use several times."""
    import openai

    structured, limit, paid, useless, last = True, "max_tokens", [0, 0], 0, None
    for attempt in range(ATTEMPTS):
        wait = min(60.0, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.5)
        try:
            response = await api.chat.completions.create(**request.body(model, structured, limit))
            message, usage, cut = response.choices[0].message, response.usage, response.choices[0].finish_reason == "length"
            paid = [had + new for had, new in zip(paid, (usage.prompt_tokens, usage.completion_tokens))]
            try:
                request.parse("" if cut else message.content or "")  # a cut answer would teach not to end
                return message.content, paid, True
            except ValueError as error:
                useless, last = useless + 1, error
            if useless == USELESS or getattr(message, "refusal", None):
                return None, paid, True
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise Stop(f"the teacher's server refuses: {error.status_code} {_reason(error)}") from None
        except openai.BadRequestError as error:
            if structured and request.choices and "response_format" in str(error):
                structured = False  # an older server
                continue
            if limit == "max_tokens" and "max_completion_tokens" in str(error):
                limit = "max_completion_tokens"  # a newer model
                continue
            if getattr(error, "code", None) in ("context_length_exceeded", "content_filter", "content_policy_violation"):
                return None, paid, True  # this request alone
            raise Stop(f"the teacher's server does not understand the request: {_reason(error)}") from None
        except openai.RateLimitError as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise Stop(f"the teacher's account is empty: {_reason(error)}") from None
            wait, last = max(wait, _retry_after(error)), error
        except (openai.APIError, ValueError, AttributeError, IndexError, TypeError) as error:
            # By name: which HTTP library the SDK brings depends on its version.
            if type(error.__cause__).__name__ == "ConnectError" and attempt + 1 == UNREACHED:
                raise Stop(f"the teacher's server at {api.base_url} cannot be reached: {error.__cause__}") from None
            last = error  # a server's error, a cut connection, a time-out, or a body that is not the protocol's
        await asyncio.sleep(wait)
    tqdm.write(f"  no answer in {ATTEMPTS} attempts ({type(last).__name__}); the next run asks again")
    return None, paid, False


def _reason(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or type(error).__name__)[:200]


def _retry_after(error) -> float:
    try:
        return min(60.0, float(error.response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
