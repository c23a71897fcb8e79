"""A conversation with a model in the terminal.

    python train.py --stage chat --model DIR                      type a line, read the answer
    python train.py --stage chat --model DIR < questions.txt      asks line by line; only the answers go to stdout
    python train.py --stage chat --model DIR --prompt "2 + 2?"    one answer

    /reset           forget the conversation
    /system TEXT     forget it and continue with this system turn; without TEXT, with none
    /quit            leave, as Ctrl-D does
    Ctrl-C           stop an answer; the part that was printed is remembered

The lines of a pipe are one conversation, commands included; hints go to stderr. The n-th answer is sampled with seed + n
(n = 0, 1, ...), so a session can be repeated. When the model's window is full, the oldest turns are forgotten, never the
system turn.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from data import ChatML
from generate import stream
from model import Phi
from runtime.files import InputError, printable
from runtime.runs import load_chat
from runtime.settings import Chat
from runtime.weights import resolve


@dataclass
class Talk:
    """A conversation. Its ChatML begins every prompt with the system turn."""

    model: Phi
    chat: ChatML
    settings: Chat
    turns: list[dict] = field(default_factory=list)  # user and assistant alternate
    asked: int = 0


def run(settings: Chat) -> int:
    """A conversation in the terminal, or one answer to --prompt."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers alone
        directory = resolve(settings.model, settings.revision)
    chat = load_chat(directory, settings.system_prompt)
    model = Phi.from_pretrained(directory, torch.bfloat16 if settings.dtype == "bf16" else torch.float32, settings.device)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # it was closed: nobody asks
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not text
    talk = Talk(model, chat, settings)
    prompt = (sys.stdin.read() if settings.prompt == "-" else settings.prompt or "").strip()
    if settings.prompt is None:
        converse(talk)
    elif prompt:
        answer(talk, prompt)
    else:
        raise InputError("the prompt is empty")
    return 0


def show(text: str) -> None:
    """Prints a piece of an answer at once; on a terminal, as it is safe there."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def hint(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def text_pieces(chat: ChatML, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, in pieces that add up to chat.decode(tokens). Half a character at the end is decoded
    as one U+FFFD; it waits for the token that completes it."""
    ids, text, printed = [], "", 0
    for token in tokens:
        ids.append(token)
        text = chat.decode(ids)
        ready = len(text) - text.endswith("\ufffd")
        if ready > printed:
            yield text[printed:ready]
            printed = ready
    if len(text) > printed:
        yield text[printed:]


def converse(talk: Talk) -> None:
    """Reads and answers lines until the input ends or one is /quit."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  gives input() arrow keys and a history
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                show("\n")  # the shell's own prompt begins a line
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            hint("\n/quit leaves")
            continue
        command, _, text = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command in ("/reset", "/system"):
                talk.turns.clear()
                if command == "/system":
                    talk.chat.system_prompt = text.strip()
            elif command.startswith("/"):
                hint(f"no command {command[:20]}: /reset, /system TEXT, /quit")
            elif line:
                answer(talk, line)
        except InputError as error:
            hint(str(error))


def fitting_prompt(talk: Talk, message: dict) -> list[int]:
    """Ids of the conversation with one more message, short enough to leave room for an answer; if need be, the oldest turns
    are forgotten. InputError if the message alone is too long."""
    window = talk.model.config.max_position_embeddings
    limit = window - min(talk.settings.max_new_tokens, window // 2)
    if (alone := len(talk.chat.prompt([message]))) > limit:
        raise InputError(f"this message alone takes {alone:,} tokens; the window of {window:,} has room for {limit:,}")
    forgotten = 0
    while len(ids := talk.chat.prompt([*talk.turns[forgotten:], message])) > limit:
        forgotten += 2  # a question with its answer
    if forgotten:
        del talk.turns[:forgotten]
        hint(f"the window of {window:,} tokens is full: the {forgotten} oldest turns are forgotten")
    return ids


def answer(talk: Talk, text: str) -> None:
    """Prints the model's answer while it is generated, and remembers question and answer unless the answer is empty. In a
    terminal, Ctrl-C ends the answer and not the program."""
    message, settings, said = {"role": "user", "content": text}, talk.settings, []
    prompt = fitting_prompt(talk, message)
    room = min(settings.max_new_tokens, talk.model.config.max_position_embeddings - len(prompt))
    seed, talk.asked = settings.seed + talk.asked, talk.asked + 1
    steps = stream(talk.model, [prompt], room, settings.temperature, settings.top_p, seed)
    try:
        tokens = takewhile(lambda token: token not in talk.chat.control_ids, (step.item() for step in steps))
        for piece in text_pieces(talk.chat, tokens):
            said.append(piece)
            show(piece)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    show("\n")
    if said:
        talk.turns += [message, {"role": "assistant", "content": "".join(said)}]
