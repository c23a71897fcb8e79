"""From rows of text to batches of tokens.

    rows.jsonl --read_rows--> Row --encode--> Example --collate--> Batch
                 checked        ChatML, trimmed      one prompt,      one row per prompt,
                                                     k completions    or several prompts a row

One shape serves every stage: a prompt with its completions. SFT has one completion, DPO two (chosen, rejected),
multiple choice four or five. The prompt stands in the batch once, its completions one after the other behind it:

    tokens     p0 p1 p2 | c0 c1 c2 | r0 r1
    segment     0  0  0 |  1  1  1 |  2  2       0 = prompt, k = k-th completion, -1 = padding
    position    0  1  2 |  3  4  5 |  3  4       every completion continues from the end of the prompt

A completion attends to the prompt and to itself, never to its sibling (`model.sibling_mask`), so the log-probabilities
and gradients are those of two separate rows, but the prompt goes through the network once.

Rows of unlike length are padded to the longest. To save that, several examples may share a row (`pack_rows`), one after the
other and each as above; no token attends to another example:

    tokens     p0 p1 p2 c0 c1 r0 | q0 q1 d0 d1 d2 s0 | .. ..
    example     0  0  0  0  0  0 |  1  1  1  1  1  1 | -1 -1       number in its row, -1 = padding
    segment     0  0  0  1  1  2 |  0  0  1  1  1  2 | -1 -1       0 = the example's prompt, k = its k-th completion
    position    0  1  2  3  4  3 |  0  1  2  3  4  2 |  0  0       every example starts from 0

Letters: B rows of a batch, T tokens of its longest row, N completions in the batch, M predicted tokens.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from runtime.files import InputError

LETTERS = "ABCDEFGHIJ"  # of the options of a multiple-choice question
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


# ------------------------------------------------------------------------------------------------------------- ChatML


class ChatML:
    """Messages to token ids, segment by segment, in the ChatML format (OpenAI 2023) that phi-2-orange-v2 was tuned on:

        <|im_start|>user\\nWhat is 2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>

    Only the role headers and `<|im_end|>` are control tokens. Text is encoded by itself and stays text: a user who types
    `<|im_start|>system` writes a few harmless punctuation tokens and does not open a system turn. No BOS is added.

    A tokenizer without the two ChatML tokens (microsoft/phi-2) gets them as its next ids, 50,295 and 50,296: Phi-2's
    embedding has 51,200 rows, so nothing is resized. `system_prompt` opens every prompt that has no system turn.
    """

    def __init__(self, tokenizer: Tokenizer, system_prompt: str | None = None):
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for token in (IM_END, IM_START):
            if tokenizer.token_to_id(token) is None:
                tokenizer.add_special_tokens([token])
        self.start, self.end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
        added = tokenizer.get_added_tokens_decoder()
        control = {i: t.content for i, t in added.items() if t.special or i in (self.start, self.end)}
        self.control_ids = frozenset(control)
        # Splits text inside each control token's name, after its first character, so that no match is possible.
        self.break_names = re.compile("|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in control.values()))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; never a control token."""
        pieces = self.break_names.split(text)
        ids = [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False).ids]
        if not self.control_ids.isdisjoint(ids):
            raise InputError(f"the tokenizer turns plain text into a control token: {text[:60]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, messages: list[dict], max_tokens: int | None = None) -> list[int]:
        """Ids of `messages` and of the header that the assistant's reply follows.

        If they are more than `max_tokens`, the system turn stays and the oldest text behind it goes: whole turns, then the
        beginning of the oldest turn that remains, never its header. InputError if even that cannot fit.
        """
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        turns = [(self._header(m["role"]), self.encode_text(m["content"])) for m in messages]
        tail = [self.end, *self.encode_text("\n")]
        reply_header = self._header("assistant")

        size = sum(len(header) + len(text) + len(tail) for header, text in turns) + len(reply_header)
        first = 1 if messages[0]["role"] == "system" else 0
        excess = size - max_tokens if max_tokens is not None else 0
        while excess > 0 and first < len(turns) - 1 and excess >= len(turns[first][1]):
            header, text = turns.pop(first)
            excess -= len(header) + len(text) + len(tail)
        if excess > 0:
            if first >= len(turns) or excess >= len(turns[first][1]):
                raise InputError(f"the system turn and headers alone need more than {max_tokens} tokens")
            turns[first] = (turns[first][0], turns[first][1][excess:])

        return [i for header, text in turns for i in (*header, *text, *tail)] + reply_header

    def reply(self, text: str) -> list[int]:
        """Ids of an assistant's answer with the `<|im_end|>` that ends it, all of them supervised."""
        return [*self.encode_text(text), self.end]

    def _header(self, role: str) -> list[int]:
        return [self.start, *self.encode_text(role + "\n")]


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model's directory; InputError if there is none."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the model's directory needs its tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare Exception class
        raise InputError(f"{path}: not a tokenizer file ({error})") from None


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Row:
    """One checked line of a data file, still text."""

    messages: list[dict]  # the prompt: {"role": "system" | "user" | "assistant", "content": text}, the last a user's
    completions: list[str]  # [completion] for SFT, [chosen, rejected] for pairs
    where: str  # "file:line", for messages
    extra: dict  # the fields that the format does not name, kept as they came


@dataclass
class Ledger:
    """What became of every row that was read: rows == kept + the sum of `dropped`. `trimmed` rows are among the kept."""

    rows: int = 0
    kept: int = 0
    trimmed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)

    def drop(self, cause: str) -> None:
        self.dropped[cause] = self.dropped.get(cause, 0) + 1

    def check(self) -> None:
        if self.rows != self.kept + sum(self.dropped.values()):
            raise AssertionError(f"the ledger does not add up: {self}")


def _text(value: object, name: str) -> str:
    """`value` if it is text with something in it."""
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is missing' if value is None else f'"{name}" is {type(value).__name__}, not text')
    if not value.strip():
        raise ValueError(f'"{name}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f'"{name}" holds half of a surrogate pair, which is no character') from None
    return value


def _reply(value: object, name: str) -> str:
    """A reply: text, or a list holding one assistant message (the form that TRL also takes)."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise ValueError(f'"{name}" is a list but not of one assistant message')
        value = value[0].get("content")
    return _text(value, name)


def _messages(value: object, name: str) -> list[dict]:
    """A conversation: text (one user message) or a list of messages; only the first may be the system's."""
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, name)}]
    if not isinstance(value, list):
        raise ValueError(f'"{name}" is missing' if value is None else f'"{name}" is neither text nor a list of messages')
    if not value:
        raise ValueError(f'"{name}" holds no message')
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f'"{name}"[{i}] is not a message')
        role = message.get("role")
        if role not in ("system", "user", "assistant") or (role == "system" and i > 0):
            raise ValueError(f'"{name}"[{i}] has the role {role!r}: user, assistant, or system as the first')
        _text(message.get("content"), f"{name}[{i}].content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _prompt(value: object, name: str) -> list[dict]:
    messages = _messages(value, name)
    if messages[-1]["role"] != "user":
        raise ValueError(f'"{name}" ends with the {messages[-1]["role"]}, not with the user who is to be answered')
    return messages


def parse_pair(row: dict) -> tuple[list[dict], list[str], dict]:
    """{"prompt", "chosen", "rejected", ...} -> messages, [chosen, rejected], the other fields."""
    completions = [_reply(row.get("chosen"), "chosen"), _reply(row.get("rejected"), "rejected")]
    if completions[0] == completions[1]:
        raise ValueError('"chosen" and "rejected" are the same text: there is nothing to prefer')
    extra = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}
    return _prompt(row.get("prompt"), "prompt"), completions, extra


def parse_sft(row: dict) -> tuple[list[dict], list[str], dict]:
    """{"prompt", "completion", ...}, or {"messages", ...} whose last message is the assistant's: the one that is learned."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise ValueError('"messages" does not end with the assistant, so there is no reply to learn')
        prompt, completion = messages[:-1], messages[-1]["content"]
        if not prompt or prompt[-1]["role"] != "user":
            raise ValueError('"messages" has no user message before the last reply')
    else:
        prompt, completion = _prompt(row.get("prompt"), "prompt"), _reply(row.get("completion"), "completion")
    return prompt, [completion], {k: v for k, v in row.items() if k not in ("messages", "prompt", "completion")}


def written_options(question: str) -> list[str]:
    """The options that stand in a question's own text, "A. ..." or "A) ..." each on a new line, behind "Options:" if that is
    there. Their letters must run A, B, C, ..."""
    _, _, tail = question.rpartition("Options:")
    found = re.findall(r"(?ms)^([A-J])\s*[.)][ \t]*(.*?)(?=^[A-J]\s*[.)]|^Answer:|\Z)", tail)
    if "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        raise ValueError('the options in "question" are not lettered A, B, C, ...')
    return [text.strip() for _, text in found]


def parse_mcq(row: dict, letter_only: bool = False) -> tuple[list[dict], list[str], dict]:
    """{"question", "choices", "answer": letter, "explanation", ...}, or the course's form, whose question has the options in
    its text and ends with "Answer:". The reply explains first, if there is an explanation, and ends with "Answer: C"."""
    question, choices = _text(row.get("question"), "question"), row.get("choices")
    if choices is None:
        choices = written_options(question)
    else:
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f'"choices" is not a list of 2 to {len(LETTERS)} texts')
        options = [f"{letter}. {_text(choice, 'choices')}" for letter, choice in zip(LETTERS, choices)]
        question = "\n".join([f"Question: {question}", "", "Options:", *options, "", "Answer:"])
    answer = row.get("answer")
    if answer not in tuple(LETTERS[: len(choices)]):
        raise ValueError(f'"answer" is {answer!r}, not the letter of an option')
    explanation = row.get("explanation") or ""
    reply = answer if letter_only else f"{explanation.strip()}\n\nAnswer: {answer}".strip()
    extra = {k: v for k, v in row.items() if k not in ("question", "choices", "answer", "explanation")}
    return [{"role": "user", "content": question}], [reply], extra | {"letter": answer, "choices": choices}


PARSERS = {
    "pairs": parse_pair,
    "sft": parse_sft,
    "mcq": parse_mcq,
    "mcq letter": functools.partial(parse_mcq, letter_only=True),
}


def read_rows(path: str | Path, kind: str, on_bad_row: str, ledger: Ledger) -> list[Row]:
    """Reads a JSONL file of a `kind` of PARSERS: "pairs", "sft", "mcq" or "mcq letter". Blank lines are no rows.

    Every row that cannot be used is reported as `file:line: reason`: with on_bad_row "stop" in one InputError after the
    whole file was read, with "skip" in `ledger.bad_rows`, counted under `ledger.dropped["bad row"]`.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        ledger.rows += 1
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"a JSON {type(value).__name__}, not an object (JSONL has one object a line)")
            messages, completions, extra = PARSERS[kind](value)
            rows.append(Row(messages, completions, f"{path}:{number}", extra))
        except UnicodeDecodeError:
            bad.append(f"{path}:{number}: not UTF-8 text")
        except json.JSONDecodeError as error:
            bad.append(f"{path}:{number}: not JSON ({error})")
        except RecursionError:
            bad.append(f"{path}:{number}: nested too deeply")
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
    if not ledger.rows:
        raise InputError(f"{path}: the file holds no rows")
    if bad and on_bad_row == "stop":
        more = f"\n  ... and {len(bad) - 20:,} more" if len(bad) > 20 else ""
        raise InputError(
            f"{len(bad):,} of {ledger.rows:,} rows of {path} cannot be used:\n  "
            + "\n  ".join(bad[:20])
            + more
            + "\nMend them, or leave them out with --on-bad-row skip."
        )
    for reason in bad:
        ledger.drop("bad row")
        ledger.bad_rows.append(reason)
    return rows


def kind_of(path: str | Path) -> str:
    """Which of PARSERS a JSONL file is for, by the fields of its first row: "pairs", "mcq" or "sft"."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return "pairs" if '"chosen"' in first else "mcq" if '"question"' in first else "sft"


def question_key(row: Row) -> str:
    """What makes two questions the same: words, numbers and symbols of the conversation, without case, blanks and the
    punctuation of sentences. (7 + 8 and 7 - 8 are two questions.)"""
    texts = (m["content"].casefold() for m in row.messages if m["role"] != "system")
    return " | ".join(" ".join(re.findall(r"\w+|[^\w\s.,;:!?'\"]", text)) for text in texts)


def split_by_question(rows: list[Row], eval_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows) with no question on both sides.

    A question's side is decided by its own hash alone, u = sha256(seed, question) / 2^256 < eval_share, so it depends
    neither on the order of the rows nor on which other rows there are; the shares are met on average.
    """
    sides = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{question_key(row)}".encode()).digest()
        sides[int.from_bytes(digest, "big") < eval_share * 2**256].append(row)
    return sides


def check_no_leak(train: list[Row], evaluation: list[Row]) -> None:
    """InputError if a question stands on both sides."""
    seen = {question_key(row): row.where for row in train}
    leaks = [(row.where, seen[question_key(row)]) for row in evaluation if question_key(row) in seen]
    if leaks:
        raise InputError(
            f"{len(leaks):,} evaluation rows ask a question of the training rows, the first {leaks[0][0]} that "
            f"of {leaks[0][1]}. Remove them, or leave out --eval to split --train by question."
        )


# ----------------------------------------------------------------------------------------------------------- examples


@dataclass
class Example:
    """A prompt with its completions as token ids. Each completion ends with `<|im_end|>`."""

    prompt: list[int]
    completions: list[list[int]]
    where: str = ""
    extra: dict = field(default_factory=dict)
    question: str = ""  # the last message as text, to be shown
    texts: list[str] = field(default_factory=list)  # the completions as text

    def __len__(self) -> int:
        """Tokens that the example takes in a batch row: the prompt once, then every completion."""
        return len(self.prompt) + sum(map(len, self.completions))


def encode(rows: list[Row], chat: ChatML, max_length: int, max_prompt_length: int, ledger: Ledger) -> list[Example]:
    """Tokenizes rows and counts each in the ledger as kept (perhaps with a trimmed prompt) or dropped.

    A prompt over `max_prompt_length` tokens loses its oldest text (`ChatML.prompt`). All completions of a row share that
    prompt and one budget: prompt + completion <= `max_length` tokens. If one of them does not fit, the row is dropped. A
    completion is never cut, because a cut answer has no `<|im_end|>`, and a model tuned on those forgets to stop.
    """
    examples = []
    for row in rows:
        try:
            prompt = chat.prompt(row.messages)
            trimmed = len(prompt) > max_prompt_length
            if trimmed:
                prompt = chat.prompt(row.messages, max_prompt_length)
        except InputError:
            ledger.drop("prompt does not fit")
            continue
        completions = [chat.reply(text) for text in row.completions]
        if len(prompt) + max(map(len, completions)) > max_length:
            ledger.drop("completion does not fit")
            continue
        ledger.kept += 1
        ledger.trimmed += trimmed
        examples.append(Example(prompt, completions, row.where, row.extra, row.messages[-1]["content"], row.completions))
    return examples


def supervise_everything(example: Example) -> Example:
    """The same text with the loss on all of it: everything behind the first token becomes the completion."""
    (completion,) = example.completions
    return replace(example, prompt=example.prompt[:1], completions=[example.prompt[1:] + completion])


def epoch_order(examples: list[Example], batch_size: int, seed: int, epoch: int, pool: int = 32) -> list[list[int]]:
    """Indices of the batches of one epoch: a function of (seed, epoch) alone, so a resumed run continues the same order.

    Shuffled, then sorted by length within pools of `pool` batches, so that a batch holds rows of like length and little
    padding, then the batches are shuffled. Every example stands in exactly one batch; the last may be smaller.
    """
    shuffle = random.Random(f"{seed}-{epoch}")
    order = list(range(len(examples)))
    shuffle.shuffle(order)
    pools = [order[i : i + pool * batch_size] for i in range(0, len(order), pool * batch_size)]
    order = [i for part in pools for i in sorted(part, key=lambda i: len(examples[i]))]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shuffle.shuffle(batches)
    return batches


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    """The layout in the head of this file as tensors. All int64; completions are numbered through the whole batch."""

    tokens: Tensor  # [B, T] token ids, 0 in the padding (its value is never used)
    example: Tensor  # [B, T] number of the token's example in its row, -1 padding
    segment: Tensor  # [B, T] 0 prompt, k the k-th completion of its example, -1 padding
    position: Tensor  # [B, T]
    source: Tensor  # [M] index into the flattened [B*T] of the token whose output predicts ...
    target: Tensor  # [M] ... this token id ...
    owner: Tensor  # [M] ... of this completion, 0 .. N-1
    lengths: Tensor  # [N] predicted tokens of each completion

    @property
    def needs_mask(self) -> bool:
        """Whether some row holds two completions or more, so that a token must not attend to all tokens before it. (Every
        row holds one at least.)"""
        return len(self.lengths) > len(self.tokens)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def collate(examples: list[Example]) -> Batch:
    """Examples to one Batch, each in a row of its own."""
    return collate_rows([[example] for example in examples])


def collate_rows(rows: list[list[Example]]) -> Batch:
    """Rows of one example or more to one Batch, padded on the right to the longest."""
    width = max(sum(map(len, row)) for row in rows)
    tokens, number, segment, position = [], [], [], []  # row after row, as if flattened
    source, target, owner, lengths = [], [], [], []
    for row in rows:
        for n, example in enumerate(row):
            start = len(example.prompt)
            last = len(tokens) + start - 1
            tokens += example.prompt
            segment += [0] * start
            position += range(start)
            for k, completion in enumerate(example.completions, start=1):
                first, size = len(tokens), len(completion)
                # The prompt's last token predicts a completion's first; then each token predicts the next.
                source += [last, *range(first, first + size - 1)]
                target += completion
                owner += [len(lengths)] * size
                lengths.append(size)
                tokens += completion
                segment += [k] * size
                position += range(start, start + size)
            number += [n] * len(example)
        padding = -len(tokens) % width  # up to the row's end
        tokens += [0] * padding
        number += [-1] * padding
        segment += [-1] * padding
        position += [0] * padding
    layout = (torch.tensor(values).view(-1, width) for values in (tokens, number, segment, position))  # four of [B, T]
    return Batch(*layout, *map(torch.tensor, (source, target, owner, lengths)))


def pack_rows(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Which examples share a row of at most `tokens` tokens: their indices, row by row. A longer one has its own row.

    First-fit decreasing: the longest example first, each into the first row with room for it, else into a new one. No two
    rows would fit into one, so there are fewer than 2 sum(lengths) / tokens + 1 of them; and if no example is too long, at
    most 11/9 of the smallest possible number, + 6/9 (Dosa 2007). Examples of the same length keep their order.
    """
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if lengths[i] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(tokens)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
