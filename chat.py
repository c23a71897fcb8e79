"""Talking to a model in the terminal, over ChatML, with a memory of the conversation.

    python train.py --stage chat --model DIR                      type a line, read the answer
    python train.py --stage chat --model DIR < questions.txt      asks line by line; stdout gets the answers, nothing else
    python train.py --stage chat --model DIR --prompt "2 + 2?"    one answer

Commands: /reset, /system TEXT, /temperature X, /help, /quit; a line that is to begin with a slash is typed with two. Ctrl-C
stops the answer, Ctrl-D leaves. The lines of a pipe are one conversation, commands and all; hints go to stderr.

The n-th answer is sampled with seed + n (n = 0, 1, ...), so a session can be repeated. When the model's window is full, the
oldest turns are forgotten, never the system turn.
"""

import contextlib
import copy
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TextIO

from data import ChatML
from model import Phi, stream
from runtime.files import InputError

MARK = "> "
HELP = """\
/reset           forget the conversation
/system TEXT     forget it and go on under this system turn; without TEXT, show the system turn
/temperature X   of sampling; 0 always takes the likeliest token
/quit            leave, as Ctrl-D does
//TEXT           say /TEXT
Ctrl-C           stop an answer; what was said until then counts"""
# C0, DEL and C1 but for newline and tab: with an ESC in it, a text can move a terminal's cursor, fake or hide lines, in some
# even type for the user; a model may have learned that from anyone.
CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass
class Settings:
    system: str | None = None  # None: the ChatML's own system prompt; "": no system turn
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 0


@dataclass
class Talk:
    """A conversation. Its system turn is the system prompt of its own ChatML, which opens every prompt with it once."""

    model: Phi
    chat: ChatML
    settings: Settings
    out: TextIO
    source: TextIO | None = None
    turns: list[dict] = field(default_factory=list)  # user and assistant by turns
    asked: int = 0
    interactive: bool = False  # someone types: Ctrl-C is meant for the answer, not for the program
    waiting: bool = False  # for the user or the model: where there is something to interrupt


def converse(model: Phi, chat: ChatML, settings: Settings, source: TextIO, out: TextIO) -> int:
    """Answers the lines of `source` until it ends or one is /quit; returns the exit status."""
    talk = begin(model, chat, settings, out)
    talk.source, talk.interactive = source, source.isatty()
    return exit_status(lambda: listen(talk), out)


def answer_once(model: Phi, chat: ChatML, settings: Settings, prompt: str, out: TextIO) -> int:
    """Answers one prompt; returns the exit status. InputError if the prompt is empty or does not fit."""
    if not prompt.strip():
        raise InputError("the prompt is empty")
    return exit_status(lambda: answer(begin(model, chat, settings, out), prompt.strip()), out)


def begin(model: Phi, chat: ChatML, settings: Settings, out: TextIO) -> Talk:
    chat = copy.copy(chat)  # /system changes it
    if settings.system is not None:
        chat.system_prompt = settings.system
    return Talk(model, chat, replace(settings), out)


def exit_status(work: Callable[[], None], out: TextIO) -> int:
    """Does the work. 0, also if the reader of `out` has left, as `head` does; 130 after a Ctrl-C that ends the program."""
    try:
        work()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # Python's last flush would complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return 0


# ---------------------------------------------------------------------------------------------------------- in and out


def show(out: TextIO, text: str) -> None:
    """Prints a piece of an answer at once: what `out` has characters for and, if it is a terminal, what is safe there."""
    if out.isatty():
        text = text.translate(CONTROL)
    encoding = getattr(out, "encoding", None) or "utf-8"
    out.write(text.encode(encoding, "replace").decode(encoding))
    out.flush()


def hint(text: str) -> None:
    print(text.translate(CONTROL), file=sys.stderr, flush=True)


def read_line(source: TextIO, edited: bool) -> str:
    """The next line without blanks around it. EOFError at the end; UnicodeError if it is no text (the next one may be)."""
    if edited:
        line = input(MARK)
    else:
        line = getattr(source, "buffer", source).readline()  # bytes: a text stream breaks off at the first bad one
        if not line:
            raise EOFError
    line = line if isinstance(line, str) else line.decode("utf-8")
    line.encode("utf-8")  # in some locales Python hands on bytes that are no text as surrogates
    return line.strip()


def text_pieces(chat: ChatML, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, in pieces that make up chat.decode(tokens). Half a character at the end is decoded as
    one U+FFFD; it waits for the token that completes it."""
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


# ---------------------------------------------------------------------------------------------------- the conversation


def listen(talk: Talk) -> None:
    """Heeds line after line. In a terminal, Ctrl-C interrupts only what stands in a block of `interruptible`, and once: a
    second one cannot strike while the first is dealt with."""

    def interrupt(number, frame):
        if talk.waiting:
            talk.waiting = False
            raise KeyboardInterrupt

    edited = talk.interactive and talk.source is sys.stdin and talk.out is sys.stdout and talk.out.isatty()
    if edited:
        with contextlib.suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  gives input() its arrow keys and a history
    former = signal.signal(signal.SIGINT, interrupt) if talk.interactive else None
    try:
        while heed(talk, edited):
            pass
    finally:
        if talk.interactive:
            signal.signal(signal.SIGINT, former)


@contextlib.contextmanager
def interruptible(talk: Talk) -> Iterator[None]:
    talk.waiting = True
    try:
        yield
    finally:
        talk.waiting = False


def heed(talk: Talk, edited: bool) -> bool:
    """Reads one line and does what it asks for; False if that was to leave."""
    try:
        with interruptible(talk):
            line = read_line(talk.source, edited)
        if line.startswith("/") and not line.startswith("//"):
            return obey(talk, *line.split(maxsplit=1))
        if line:
            answer(talk, line.removeprefix("/"))
    except EOFError:
        if edited:
            show(talk.out, "\n")  # the shell's own mark begins a line
        return False
    except UnicodeError:
        hint("that line is not UTF-8 text; it is left out")
    except InputError as error:
        hint(str(error))
    except KeyboardInterrupt:
        if not talk.interactive:
            raise
        hint("\n/quit leaves")
    return True


def obey(talk: Talk, command: str, text: str = "") -> bool:
    """Carries out a command; False if it was to leave."""
    if command == "/reset":
        talk.turns.clear()
    elif command == "/system" and text:
        talk.chat.system_prompt = text
        talk.turns.clear()
    elif command == "/system":
        hint(talk.chat.system_prompt or "there is no system turn")
    elif command == "/temperature":
        set_temperature(talk.settings, text)
    elif command == "/help":
        hint(HELP)
    elif command != "/quit":
        hint(f"no command {command[:20]}: /reset, /system TEXT, /temperature X, /help, /quit; //... says /...")
    return command != "/quit"


def set_temperature(settings: Settings, text: str) -> None:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value < float("inf"):
        settings.temperature = value
    else:
        hint(f"/temperature takes a number, 0 or more; it is {settings.temperature:g}")


def fitting_prompt(talk: Talk, message: dict) -> list[int]:
    """Ids of the conversation with one more message, with room for an answer. If need be, the oldest turns are forgotten for
    that; InputError if it would not help."""
    window = talk.model.config.max_position_embeddings
    limit = window - min(talk.settings.max_new_tokens, window // 2)
    alone = len(talk.chat.prompt([message]))
    if alone > limit:
        raise InputError(
            f"this message alone takes {alone:,} tokens with its system turn; the model's window of {window:,} has room for "
            f"{limit:,} beside an answer"
        )
    forgotten = 0
    while len(ids := talk.chat.prompt([*talk.turns[forgotten:], message])) > limit:
        forgotten += 2  # a question with its answer
    if forgotten:
        del talk.turns[:forgotten]
        hint(f"the window of {window:,} tokens is full: the {forgotten} oldest turns are forgotten")
    return ids


def answer(talk: Talk, text: str) -> None:
    """Prints the model's answer while it is made. Question and answer are remembered, but not if nothing was said."""
    message, settings, said = {"role": "user", "content": text}, talk.settings, []
    prompt = fitting_prompt(talk, message)
    room = min(settings.max_new_tokens, talk.model.config.max_position_embeddings - len(prompt))
    seed, talk.asked = settings.seed + talk.asked, talk.asked + 1
    try:
        with interruptible(talk):
            steps = stream(talk.model, [prompt], room, settings.temperature, settings.top_p, seed)
            tokens = takewhile(lambda token: token not in talk.chat.control_ids, (step.item() for step in steps))
            for piece in text_pieces(talk.chat, tokens):
                said.append(piece)
                show(talk.out, piece)
    except KeyboardInterrupt:
        if not talk.interactive:
            raise
    show(talk.out, "\n")
    if said:
        talk.turns += [message, {"role": "assistant", "content": "".join(said)}]
