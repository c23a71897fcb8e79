"""A conversation in the terminal: what is printed, what the model is asked; Ctrl-C, a full window."""

import io
import os
import random
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import chat as chat_file
from chat import Talk, converse, text_pieces
from data import ChatML, load_tokenizer
from generate import generate
from model import Phi
from runtime.files import write_jsonl
from runtime.flags import settle
from train import main

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = settle("chat", dict(temperature=1.0, top_p=0.9, max_new_tokens=12, seed=5)).settings
SYSTEM = "You are a helpful EPFL chatbot."


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Breaking(Terminal):
    """An output stream whose n-th flush is interrupted by Ctrl-C."""

    def __init__(self, at):
        super().__init__()
        self.at, self.flushes = at, 0

    def flush(self):
        self.flushes += 1
        if self.flushes == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(tiny) -> Phi:
    return Phi.from_pretrained(tiny)


@pytest.fixture
def chat(tiny) -> ChatML:
    return ChatML(load_tokenizer(tiny))


def users(*texts):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def system(text):
    return [{"role": "system", "content": text}]


def expected(model, chat, messages, seed, **changes):
    """The answer to a conversation, made in one go."""
    s = replace(SETTINGS, **changes)
    prompt = ChatML(chat.tokenizer).prompt(messages)
    room = min(s.max_new_tokens, model.config.max_position_embeddings - len(prompt))
    (ids,) = generate(model, [prompt], room, s.temperature, s.top_p, seed, tuple(chat.control_ids))
    return chat.decode(ids)


def talk(model, chat, lines, settings=SETTINGS, out=None, source=io.StringIO):
    """What a conversation prints, from a pipe or, with source=Terminal, from someone who types."""
    out = out or io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", source("".join(f"{line}\n" for line in lines)))
        patch.setattr(sys, "stdout", out)
        converse(Talk(model, chat, settings))
    return out.getvalue()


@pytest.fixture
def asked(monkeypatch):
    """The prompts that reach the model."""
    prompts, stream = [], chat_file.stream

    def spy(model, batch, *rest):
        prompts.extend(batch)
        return stream(model, batch, *rest)

    monkeypatch.setattr(chat_file, "stream", spy)
    return prompts


# ------------------------------------------------------------------------------------------------------- text in pieces


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_up_the_whole_text_and_hold_no_half_characters(chat, seed):
    """Tokens of single bytes, so that every character of more than one is torn; some sequences are no UTF-8 at all."""
    draw = random.Random(seed)
    text = "".join(draw.choice(["a", "é", "ß", "€", "漢", "🙂", "👩‍🚀", "🇨🇭", "\ufffd", " ", "\n"]) for _ in range(30))
    tokens = chat.encode_text(text)
    assert "".join(text_pieces(chat, tokens)) == text
    assert all("\ufffd" not in piece for piece in text_pieces(chat, tokens)) or "\ufffd" in text
    torn = [draw.choice(tokens) for _ in range(60)] + [draw.randrange(len(chat.tokenizer.get_vocab())) for _ in range(60)]
    draw.shuffle(torn)
    for length in range(len(torn)):
        assert "".join(text_pieces(chat, torn[:length])) == chat.decode(torn[:length])


def test_a_character_is_printed_when_it_is_whole_and_not_before(chat):
    tokens = chat.encode_text("a🙂b")
    assert len(tokens) == 6 and list(text_pieces(chat, tokens)) == ["a", "🙂", "b"]
    assert list(text_pieces(chat, tokens[:3])) == ["a", "\ufffd"]  # nothing completes it
    assert list(text_pieces(chat, [])) == []


def test_each_piece_is_out_before_the_next_token_is_computed(model, chat, monkeypatch):
    out, seen = io.StringIO(), []
    stream = chat_file.stream
    monkeypatch.setattr(chat_file, "stream", lambda *a: (seen.append(out.getvalue()) or step for step in stream(*a)))
    said = talk(model, chat, ["Hi"], out=out)
    assert len(set(seen)) > 5 and all(said.startswith(text) for text in seen)


INJECTION = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x7f\x00\r\ne\tf\x85"


def test_a_terminal_gets_no_control_characters_and_a_file_gets_the_text_itself(model, chat, monkeypatch, capsys):
    tokens = [chat.encode_text(char) for char in INJECTION]
    script = [int(i) for ids in tokens for i in ids]
    monkeypatch.setattr(chat_file, "stream", lambda *args: (FakeStep(i) for i in script))
    assert talk(model, chat, ["Hi"], out=Terminal()) == r"a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x7f\x00\r" + "\ne\tf\\x85\n"
    assert talk(model, chat, ["Hi"], out=io.StringIO(newline="")) == INJECTION + "\n"
    talk(model, chat, ["/\x1b[2J"])
    assert not set(capsys.readouterr().err) & set("\x1b\x9b\x07\x00")


class FakeStep(int):
    def item(self):
        return int(self)


def test_control_tokens_end_an_answer_and_are_not_printed(model, chat, monkeypatch):
    for token in chat.control_ids:
        script = [*chat.encode_text("Yes."), token, *chat.encode_text("No.")]
        monkeypatch.setattr(chat_file, "stream", lambda *args, script=script: map(FakeStep, script))
        assert talk(model, chat, ["Hi"]) == "Yes.\n"


# ------------------------------------------------------------------------------------------------------------- history


def test_the_model_is_asked_the_whole_conversation(model, chat):
    first = expected(model, chat, users("One?"), 5)
    second = expected(model, chat, users("One?", first, "Two?"), 6)
    third = expected(model, chat, users("One?", first, "Two?", second, "Three?"), 7)
    assert first and second and third
    assert talk(model, chat, ["One?", "", "  Two?  ", " ", "Three?"]) == f"{first}\n{second}\n{third}\n"


def test_an_answer_of_nothing_is_not_remembered(model, chat, asked, monkeypatch):
    spy = chat_file.stream
    monkeypatch.setattr(chat_file, "stream", lambda *args: [FakeStep(chat.end) for _ in spy(*args)])
    assert talk(model, chat, ["One?", "Two?"]) == "\n\n"
    assert asked == [chat.prompt(users("One?")), chat.prompt(users("Two?"))]


@pytest.mark.parametrize("system_prompt", [None, "", SYSTEM])
def test_the_system_turn_stands_in_front_once(model, chat, asked, system_prompt):
    chat.system_prompt = system_prompt
    assert talk(model, chat, ["One?", "Two?"])
    opening = system(SYSTEM) if system_prompt else []
    first = ChatML(chat.tokenizer).prompt([*opening, *users("One?")])
    assert asked[0] == first and asked[1][: len(first)] == first


def test_reset_and_system_forget_the_conversation(model, chat, asked):
    talk(model, chat, ["One?", "/reset", "Two?", f"/system {SYSTEM}", "Three?", "/reset", "Four?", "/system", "Five?"])
    plain, turns = ChatML(chat.tokenizer), [users(f"{n}?") for n in ("One", "Two", "Three", "Four", "Five")]
    openings = [[], [], system(SYSTEM), system(SYSTEM), []]
    assert asked == [plain.prompt(opening + turn) for opening, turn in zip(openings, turns)]


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("line", ["/", "/Reset", "/help", "/" + "x" * 500])
def test_an_unknown_command_gives_one_line_and_the_talk_goes_on(model, chat, capsys, line):
    said = talk(model, chat, [line, "One?"])
    assert capsys.readouterr().err == f"no command {line[:20]}: /reset, /system TEXT, /quit\n"
    assert said == expected(model, chat, users("One?"), 5) + "\n"


def test_quit_leaves(model, chat, asked):
    assert talk(model, chat, ["/quit", "One?"]) == "" and not asked


# ---------------------------------------------------------------------------------------------------- the model's window


@pytest.fixture
def narrow(tiny):
    """The tiny model with a window of 120 tokens."""
    model = Phi.from_pretrained(tiny)
    model.config.max_position_embeddings = 120
    return model


def test_the_oldest_turns_go_when_the_window_is_full(narrow, chat, asked, capsys):
    questions = [f"What is {i} plus {i}?" for i in range(12)]
    out = talk(narrow, chat, [f"/system {SYSTEM}", *questions])
    limit, errors = 120 - SETTINGS.max_new_tokens, capsys.readouterr().err.splitlines()
    opening, dropped = ChatML(chat.tokenizer).prompt(system(SYSTEM))[:-12], 0
    assert out and len(asked) == 12 and all(ids[: len(opening)] == opening and len(ids) <= limit for ids in asked)
    kept = [chat.decode(ids).count("<|im_start|>user") for ids in asked]
    for before, after in zip([0, *kept], kept):
        dropped += before + 1 - after
    assert kept[0] == 1 and max(kept) > 1 and dropped == 12 - kept[-1] > 3
    told = [int(line.split("the ")[2].split()[0]) for line in errors]
    assert sum(told) == 2 * dropped and len(told) == sum(a < b + 1 for b, a in zip([0, *kept], kept))
    for i, ids in enumerate(asked):  # whole turns: the system's and the last ones
        messages = chat.decode(ids).split("<|im_start|>")[2:-1]
        assert [m.split("\n")[0] for m in messages] == ["user", "assistant"] * (kept[i] - 1) + ["user"]
        assert messages[0].startswith(f"user\n{questions[i + 1 - kept[i]]}")


def test_a_message_that_does_not_fit_is_left_out_and_the_rest_stays(narrow, chat, asked, capsys):
    said = talk(narrow, chat, ["One?", "long " * 200, "Two?"])
    error = capsys.readouterr().err
    assert error.startswith("this message alone takes 1,") or "tokens" in error
    assert error.count("\n") == 1 and "window of 120 has room for 108" in error
    first = expected(narrow, chat, users("One?"), 5)
    assert asked == [chat.prompt(users("One?")), chat.prompt(users("One?", first, "Two?"))]
    assert said == f"{first}\n{expected(narrow, chat, users('One?', first, 'Two?'), 6)}\n"


def test_an_answer_may_take_what_the_prompt_leaves(narrow, chat, monkeypatch):
    """--max-new-tokens beyond the window: half of it is kept free for the answer, which ends with the window."""
    rooms, stream = [], chat_file.stream
    monkeypatch.setattr(
        chat_file, "stream", lambda m, p, room, *a: rooms.append((len(p[0]), room)) or stream(m, p, room, *a)
    )
    talk(narrow, chat, ["One?"] * 4, replace(SETTINGS, max_new_tokens=1000))
    assert len(rooms) == 4 and all(prompt + room == 120 and prompt <= 60 for prompt, room in rooms)


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


def typed(monkeypatch, lines):
    """Makes input() return these lines, or raise those that are exceptions, and end."""
    lines = iter([*lines, EOFError])

    def type_line(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(model, chat, asked, monkeypatch):
    out = Breaking(at=4)
    typed(monkeypatch, ["One?", "Two?"])
    talk(model, chat, [], out=out, source=Terminal)
    whole = expected(model, chat, users("One?"), 5)
    assert len(list(text_pieces(chat, chat.encode_text(whole)))) > 4 and len(asked) == 2
    said = chat.decode(asked[1]).split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    assert said and whole.startswith(said) and said != whole
    assert asked[1] == chat.prompt(users("One?", said, "Two?"))
    assert out.getvalue().startswith(said + "\n")


def test_ctrl_c_before_a_word_drops_the_question_too(model, chat, asked, monkeypatch):
    spy, calls = chat_file.stream, []

    def late(*args):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from spy(*args)

    monkeypatch.setattr(chat_file, "stream", late)
    typed(monkeypatch, ["One?", "Two?"])
    talk(model, chat, [], source=Terminal, out=Terminal())
    assert asked == [chat.prompt(users("Two?"))]


def test_ctrl_c_at_the_prompt_says_how_to_leave(model, chat, asked, capsys, monkeypatch):
    typed(monkeypatch, [KeyboardInterrupt, "One?", KeyboardInterrupt, "Two?"])
    talk(model, chat, [], source=Terminal, out=Terminal())
    assert len(asked) == 2 and capsys.readouterr().err == 2 * "\n/quit leaves\n"


def test_ctrl_c_ends_the_program_when_nobody_types(model, chat, asked):
    with pytest.raises(KeyboardInterrupt):
        talk(model, chat, ["One?", "Two?"], out=Breaking(at=3))
    assert len(asked) == 1


def test_end_of_input_leaves(model, chat, capsys):
    assert talk(model, chat, []) == "" and capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------ a real terminal

DRIVER = """
import sys
root, directory = sys.argv[1:]
sys.path.insert(0, root)
from chat import Talk, converse
from data import ChatML, load_tokenizer
from model import Phi
from runtime.flags import settle
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the controlling terminal, which sends the signal for Ctrl-C
model, chat = Phi.from_pretrained(directory), ChatML(load_tokenizer(directory))
model.config.max_position_embeddings = 40_000
model.lm_head.bias.data[list(chat.control_ids)] = -1e9  # answers never end by themselves
converse(Talk(model, chat, settle("chat", {"max_new_tokens": 30_000}).settings))
"""


class Pty:
    """A child with a terminal of its own; every wait has a deadline."""

    def __init__(self, command):
        import pty

        self.main, side = pty.openpty()
        self.child = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, start_new_session=True, env={**os.environ, "TERM": "dumb"}
        )
        os.close(side)
        self.seen, self.closed, self.deadline = "", False, time.monotonic() + 120

    def send(self, text):
        self.seen = ""
        os.write(self.main, text.encode())

    def wait_for(self, found, patience=float("inf")):
        end = time.monotonic() + patience
        while not found(self.seen) and time.monotonic() < end:
            assert time.monotonic() < self.deadline and not self.closed, f"seen: {self.seen[-2000:]!r}"
            if select.select([self.main], [], [], 1)[0]:
                try:
                    text = os.read(self.main, 4096).decode("utf-8", "replace")
                except OSError:  # Linux says so when the child has closed its side
                    text = ""
                self.closed, self.seen = not text, self.seen + text

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.main)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal_ctrl_c_stops_an_answer_and_quit_leaves(tiny):
    terminal = Pty([sys.executable, "-c", DRIVER, str(ROOT), str(tiny)])
    try:
        terminal.wait_for(lambda seen: "> " in seen)

        def hinted(seen):
            return "/quit leaves" in seen and seen.endswith("> ")

        while not hinted(terminal.seen):  # Python overlooks one that comes between printing the mark and waiting for a key
            terminal.send("\x03")
            terminal.wait_for(hinted, patience=2)
        terminal.send("Hello?\r")
        terminal.wait_for(lambda seen: len(seen) > 500)  # in the midst of an answer of 30,000 tokens
        terminal.send("\x03")
        terminal.wait_for(lambda seen: seen.endswith("\n> "))
        terminal.send("/quit\r")
        assert terminal.child.wait(60) == 0
        terminal.wait_for(lambda seen: terminal.closed)
        assert terminal.seen.split() == ["/quit"]  # its echo
    finally:
        terminal.close()


# -------------------------------------------------------------------------------------------------------- --stage chat


def test_the_stage_answers_a_prompt_once(tiny, capsys, monkeypatch):
    command = ["--stage", "chat", "--model", str(tiny), "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*command, "--prompt", "Say it"]) == 0
    printed = capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Say it\n")))
    assert main([*command, "--prompt", "-"]) == 0 and capsys.readouterr() == printed
    chatml = ChatML(load_tokenizer(tiny))
    prompt = chatml.prompt([{"role": "user", "content": "Say it"}])
    (ids,) = generate(Phi.from_pretrained(tiny), [prompt], 8, stop_tokens=tuple(chatml.control_ids))
    assert printed.out == chatml.decode(ids) + "\n" and printed.err == ""


def test_a_closed_standard_input_asks_nothing(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    command = ["--stage", "chat", "--model", str(tiny), "--device", "cpu"]
    assert main(command) == 0 and capsys.readouterr().out == ""
    assert main([*command, "--prompt", "-"]) == 2 and "the prompt is empty" in capsys.readouterr().err


def test_the_stage_takes_the_system_prompt_that_the_model_was_tuned_with(tiny, tmp_path, asked, monkeypatch):
    rows = [{"prompt": f"Say {i}", "completion": f"Here: {i}"} for i in range(20)]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    command = ["--stage", "sft", "--model", str(tiny), "--train", str(tmp_path / "sft.jsonl"), "--max-steps", "1"]
    command += ["--system-prompt", "Be brief.", "--out", str(tmp_path), "--name", "tuned", "--samples", "0"]
    assert main([*command, "--device", "cpu"]) == 0
    raw = io.BytesIO(b"One?\nTw\xff?\n")  # bytes that are no UTF-8 become U+FFFD
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    assert main(["--stage", "chat", "--model", str(tmp_path / "tuned"), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    chat = ChatML(load_tokenizer(tiny))
    assert asked[0] == chat.prompt(system("Be brief.") + users("One?"))
    assert "Tw\ufffd?" in chat.decode(asked[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/where"], "no/where"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "long " * 2000], "this message alone takes"),
    ],
)
def test_what_cannot_be_answered(tiny, flags, message, capsys):
    command = ["--stage", "chat", *([] if "--model" in flags else ["--model", str(tiny)]), *flags]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
