"""Talking to a model in the terminal, over ChatML, with a memory of the conversation.

    python train.py --stage chat --model DIR                      type a line, read the answer
    python train.py --stage chat --model DIR < questions.txt      asks line by line; stdout gets the answers, nothing else
    python train.py --stage chat --model DIR --prompt "2 + 2?"    one answer

/help lists the commands. The lines of a pipe are one conversation, commands and all; hints go to stderr. The n-th answer is
sampled with seed + n (n = 0, 1, ...), so a session can be repeated. When the model's window is full, the oldest turns are
forgotten, never the system turn.
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

import torch

from data import ChatML
from generate import stream
from model import Phi
from runtime.files import InputError
from runtime.runs import load_chat
from runtime.settings import Chat
from runtime.weights import resolve

HELP = """\
/reset           forget the conversation
/system TEXT     forget it and go on under this system turn; without TEXT, show the system turn
/temperature X   of sampling; 0 always takes the likeliest token
/quit            leave, as Ctrl-D does
//TEXT           say /TEXT
Ctrl-C           stop an answer; what was said until then counts"""
# Control characters (C0, DEL, C1) except newline and tab: an escape can move the cursor, fake lines, even type for the user.
CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass
class Talk:
    """A conversation. Its system turn is the system prompt of its ChatML, which opens every prompt with it once."""

    model: Phi
    chat: ChatML
    settings: Chat
    out: TextIO
    interactive: bool = False  # someone types: Ctrl-C is meant for the answer, not for the program
    waiting: bool = False  # for the user or the model: where there is something to interrupt
    turns: list[dict] = field(default_factory=list)  # user and assistant by turns
    asked: int = 0


def run(settings: Chat) -> int:
    """A conversation in the terminal, or one answer to --prompt; returns the exit status."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers alone
        directory = resolve(settings.model, settings.revision)
    chat = load_chat(directory, settings.system_prompt)
    model = Phi.from_pretrained(directory, torch.bfloat16 if settings.dtype == "bf16" else torch.float32, settings.device)
    if settings.prompt is None:
        return converse(model, chat, settings, sys.stdin, sys.stdout)
    return answer_once(model, chat, settings, sys.stdin.read() if settings.prompt == "-" else settings.prompt, sys.stdout)


def converse(model: Phi, chat: ChatML, settings: Chat, source: TextIO, out: TextIO) -> int:
    """Answers the lines of `source` until it ends or one is /quit; returns the exit status."""
    talk = Talk(model, copy.copy(chat), replace(settings), out, source.isatty())
    return exit_status(lambda: listen(talk, source), out)


def answer_once(model: Phi, chat: ChatML, settings: Chat, prompt: str, out: TextIO) -> int:
    """Answers one prompt; returns the exit status. InputError if the prompt is empty or does not fit."""
    if not prompt.strip():
        raise InputError("the prompt is empty")
    return exit_status(lambda: answer(Talk(model, chat, settings, out), prompt.strip()), out)


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


def show(out: TextIO, text: str) -> None:
    """Prints a piece of an answer at once: what `out` has characters for and, if it is a terminal, what is safe there."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    print(text.translate(CONTROL) if out.isatty() else text, end="", file=out, flush=True)


def hint(text: str) -> None:
    print(text.translate(CONTROL), file=sys.stderr, flush=True)


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


def listen(talk: Talk, source: TextIO) -> None:
    """Reads and answers lines until the end. In a terminal, Ctrl-C only interrupts waiting or generating (`interruptible`),
    never the cleanup."""

    def interrupt(number, frame):
        if talk.waiting:
            talk.waiting = False
            raise KeyboardInterrupt

    edited = talk.interactive and source is sys.stdin and talk.out is sys.stdout and talk.out.isatty()
    if edited:
        with contextlib.suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  gives input() its arrow keys and a history
    former = signal.signal(signal.SIGINT, interrupt) if talk.interactive else None
    try:
        while respond(talk, source, edited):
            pass
    finally:
        if talk.interactive:
            signal.signal(signal.SIGINT, former)


@contextlib.contextmanager
def interruptible(talk: Talk, note: str = "") -> Iterator[None]:
    """Where someone types, Ctrl-C ends the block, with a note on stderr, and not the program."""
    talk.waiting = True
    try:
        yield
    except KeyboardInterrupt:
        if not talk.interactive:
            raise
        if note:
            hint(note)
    finally:
        talk.waiting = False


def respond(talk: Talk, source: TextIO, edited: bool) -> bool:
    """Reads one line and answers it, or carries out its command. Returns False to leave."""
    line = ""
    try:
        with interruptible(talk, "\n/quit leaves"):
            line = read_line(source, edited)
        if line.startswith("/") and not line.startswith("//"):
            return carry_out(talk, *line.split(maxsplit=1))
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
    return True


def read_line(source: TextIO, edited: bool) -> str:
    """The next line without blanks around it. EOFError at the end; UnicodeError if it is no text (the next one may be)."""
    # Bytes where there are any: a text stream breaks off at the first bad one.
    line = input("> ") if edited else getattr(source, "buffer", source).readline()
    if not line and not edited:
        raise EOFError
    line = line if isinstance(line, str) else line.decode("utf-8")
    line.encode("utf-8")  # in some locales Python hands on bytes that are no text as surrogates
    return line.strip()


def carry_out(talk: Talk, command: str, text: str = "") -> bool:
    """Carries out a command. Returns False to leave."""
    if command == "/reset":
        talk.turns.clear()
    elif command == "/system" and text:
        talk.chat.system_prompt = text
        talk.turns.clear()
    elif command == "/system":
        hint(talk.chat.system_prompt or "there is no system turn")
    elif command == "/temperature":
        with contextlib.suppress(ValueError):
            if 0 <= float(text) < float("inf"):
                talk.settings.temperature = float(text)
                return True
        hint(f"/temperature takes a number, 0 or more; it is {talk.settings.temperature:g}")
    elif command == "/help":
        hint(HELP)
    elif command != "/quit":
        hint(f"no command {command[:20]}: /reset, /system TEXT, /temperature X, /help, /quit; //... says /...")
    return command != "/quit"


def fitting_prompt(talk: Talk, message: dict) -> list[int]:
    """Ids of the conversation and one more message that leave room for an answer, for which the oldest turns are forgotten.
    InputError if that would not help."""
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
    """Prints the model's answer while it is made. Question and answer are remembered, but not if nothing was said."""
    message, settings, said = {"role": "user", "content": text}, talk.settings, []
    prompt = fitting_prompt(talk, message)
    room = min(settings.max_new_tokens, talk.model.config.max_position_embeddings - len(prompt))
    seed, talk.asked = settings.seed + talk.asked, talk.asked + 1
    with interruptible(talk):
        steps = stream(talk.model, [prompt], room, settings.temperature, settings.top_p, seed)
        tokens = takewhile(lambda token: token not in talk.chat.control_ids, (step.item() for step in steps))
        for piece in text_pieces(talk.chat, tokens):
            said.append(piece)
            show(talk.out, piece)
    show(talk.out, "\n")
    if said:
        talk.turns += [message, {"role": "assistant", "content": "".join(said)}]
