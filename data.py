"""From rows of text to batches of tokens.

    rows.jsonl --read_rows--> Row --encode--> Example --collate--> Batch
                 checked        ChatML, trimmed      one prompt,      a row for each prompt
                 (prepare/rows.py)                   k completions

One shape serves every stage: a prompt with its completions. SFT has one completion, DPO two (chosen, rejected), multiple
choice four or five. A batch row holds the prompt once, followed by its completions:

    tokens     p0 p1 p2 | c0 c1 c2 | r0 r1
    segment     0  0  0 |  1  1  1 |  2  2       0 = prompt, k = k-th completion, -1 = padding
    position    0  1  2 |  3  4  5 |  3  4       every completion continues from the end of the prompt

Where a dialogue has several answers to learn, the completion is everything from the first answer to the last. The loss is on
the answers alone (`Example.learned`); the turns between them are only read.

A completion attends to the prompt and to itself, never to its sibling (`model.sibling_mask`). So log-probabilities and
gradients are those of two separate rows, but the prompt goes through the network only once. Rows are padded on the right to
the longest one.

Letters: B rows of a batch, T tokens of its longest row, N completions in the batch, M predicted tokens.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import compress
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from runtime.files import InputError, json_object, numbered_lines, read_fields, write_json, write_jsonl, write_text

LETTERS = "ABCDEFGHIJ"  # name the options of a multiple-choice question
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


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
        self.start = tokenizer.token_to_id(IM_START)
        self.end = tokenizer.token_to_id(IM_END)
        added = tokenizer.get_added_tokens_decoder()
        control = {i: t.content for i, t in added.items() if t.special or i in (self.start, self.end)}
        self.control_ids = frozenset(control)
        # Splits text after the first character of each control token's name, so that no match is possible.
        self.break_names = re.compile("|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in control.values()))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; never a control token."""
        ids = []
        for piece in self.break_names.split(text):
            ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise InputError(f"the tokenizer turns plain text into a control token: {text[:60]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, messages: list[dict], max_tokens: int | None = None) -> list[int]:
        """Ids of `messages`, followed by the header of the assistant's reply.

        A prompt of more than `max_tokens` keeps its system turn and loses its oldest text: whole turns first, then the
        beginning of the oldest turn that is left, never its header. InputError if even that does not fit.
        """
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        turns = [(self._header(m["role"]), self.encode_text(m["content"])) for m in messages]
        tail = [self.end, *self.encode_text("\n")]
        reply_header = self._header("assistant")
        size = sum(len(header) + len(text) + len(tail) for header, text in turns) + len(reply_header)
        first = int(messages[0]["role"] == "system")
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
        """Ids of an assistant's answer and of the `<|im_end|>` that ends it. All of them are supervised."""
        return [*self.encode_text(text), self.end]

    def next_turn(self, role: str) -> list[int]:
        """Ids of what stands between a turn's `<|im_end|>` and the text of the next turn."""
        return [*self.encode_text("\n"), *self._header(role)]

    def _header(self, role: str) -> list[int]:
        return [self.start, *self.encode_text(role + "\n")]

    def template(self) -> str:
        """What transformers and llama.cpp render messages with (Jinja). They read control tokens from the rendered text, so
        the name of one in a message gets a blank after its first character."""
        system = ""
        if self.system_prompt:
            turn = json.dumps(f"{IM_START}system\n{self.system_prompt}{IM_END}\n", ensure_ascii=False)
            system = "{% if messages[0]['role'] != 'system' %}{{ " + turn + " }}{% endif %}"
        text = "message['content']"
        for name in (self.tokenizer.id_to_token(i) for i in sorted(self.control_ids)):
            broken = f"{name[0]} {name[1:]}"
            text += f" | replace({json.dumps(name, ensure_ascii=False)}, {json.dumps(broken, ensure_ascii=False)})"
        turn = f"'{IM_START}' + message['role'] + '\\n' + ({text}) + '{IM_END}\\n'"
        template = system + "{% for message in messages %}{{ " + turn + " }}{% endfor %}"
        return template + "{% if add_generation_prompt %}{{ '" + IM_START + "assistant\\n' }}{% endif %}"

    def save(self, directory: Path) -> None:
        """Writes the tokenizer, and what transformers needs to ask and to stop as is done here: the template with the system
        prompt, and the tokens that end an answer."""
        write_text(directory / "tokenizer.json", self.tokenizer.to_str(pretty=True))  # its own save has no OSError
        tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END, "chat_template": self.template()}
        write_json(directory / "tokenizer_config.json", tokens | {"clean_up_tokenization_spaces": False})
        ends = {"eos_token_id": sorted(self.control_ids), "pad_token_id": self.end}
        write_json(directory / "generation_config.json", ends)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model's directory; InputError if there is none."""
    path = Path(directory) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises the bare Exception class, or panics, which is not even one
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(f"{path}: not a tokenizer file, which every model needs ({error!s:.200})") from None


def lettered(choices: Iterable[str]) -> str:
    """The options of a question as text: "A. ...", "B. ...", one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


@dataclass
class Truth:
    """What is known about a question besides its row. Training never sees it; it only grades the result."""

    flipped: bool | None = None  # the label is wrong: the rejected answer is the better one
    answer: str | None = None  # the right answer
    grades: dict[str, str] = field(default_factory=dict)  # {name: regex}

    def grade(self, answer: str) -> dict[str, bool]:
        """{name: whether the whole of a sampled answer, without blanks around it, matches that regex}."""
        return {name: bool(re.fullmatch(pattern, answer.strip())) for name, pattern in self.grades.items()}


@dataclass(slots=True)
class Row:
    """One checked row of a data file, still text."""

    messages: list[dict]  # the prompt: {"role": "system" | "user" | "assistant", "content": text}, the last a user's
    completions: list[str]  # [completion] for SFT, [chosen, rejected] for pairs
    where: str  # "file:record", for messages
    raw: dict = field(repr=False)  # the whole row as it was read, to write it again; a question's topic is in it
    choices: list[str] = field(default_factory=list)  # the options of a multiple-choice question
    answer: int | None = None  # index of the right option
    truth: Truth | None = None
    later: list[dict] = field(default_factory=list)  # turns after the completion: {"role", "content", "learned": bool}
    form: str = field(default="", compare=False)  # how it was read (prepare/forms.py), to be shown


BIN = 32  # tokens; sizes of rows are counted as the next multiple


@dataclass
class Ledger:
    """Counts what became of every row: rows == kept + the sum of `dropped`. `trimmed` rows are among those kept."""

    rows: int = 0
    kept: int = 0
    trimmed: int = 0
    tokens: int = 0  # of the kept rows, a prompt counted once
    unlearned: int = 0  # answers that became part of a prompt, since their dialogue is too long to learn all of them
    dropped: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)  # rows by how they were read
    prompts: dict[int, int] = field(default_factory=dict)  # rows by their whole prompt's tokens, in steps of BIN
    sizes: dict[int, int] = field(default_factory=dict)  # the same with the longest completion

    def drop(self, cause: str) -> None:
        self.dropped[cause] = self.dropped.get(cause, 0) + 1

    def note_size(self, prompt: int, completion: int) -> None:
        for sizes, tokens in ((self.prompts, prompt), (self.sizes, prompt + completion)):
            step = math.ceil(tokens / BIN) * BIN
            sizes[step] = sizes.get(step, 0) + 1


def question_key(row: Row) -> str:
    """Equal for rows that ask the same question: the words, numbers and symbols of the conversation, without case, blanks
    and punctuation. (7 + 8 and 7 - 8 are two questions.)"""
    texts = (m["content"].casefold() for m in row.messages if m["role"] != "system")
    return " | ".join(" ".join(re.findall(r"\w+|[^\w\s.,;:!?'\"]", text)) for text in texts)


def split_by_question(rows: list[Row], eval_share: float, seed: int | str) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows) with no question on both sides.

    The side of a question depends on its own hash alone, u = sha256(seed, question) / 2^256 < eval_share, not on other rows
    or their order. The share is met on average.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{question_key(row)}".encode()).digest()
        held_out = int.from_bytes(digest, "big") < eval_share * 2**256
        sides[held_out].append(row)
    return sides


def check_no_leak(train: list[Row], evaluation: list[Row]) -> None:
    """InputError if both sides ask the same question."""
    seen = {question_key(row): row.where for row in train}
    leaks = [(row.where, seen[question_key(row)]) for row in evaluation if question_key(row) in seen]
    if leaks:
        which = f"{len(leaks):,} evaluation rows ask a question of the training rows, the first {leaks[0][0]} that of"
        raise InputError(f"{which} {leaks[0][1]}. Remove them, or leave out --eval to split --train by question.")


def read_truth(path: str | Path) -> dict[str, Truth]:
    """What is known about the questions of the rows in pairs.jsonl, by `question_key`, from pairs.truth.jsonl beside it.

    A line: {"prompt": as in the row, "flipped": bool, "answer": text, "grades": {name: regex}}; all but the prompt may be
    missing. InputError names the line that is wrong.
    """
    path = Path(str(path).removesuffix(".gz")).with_suffix(".truth.jsonl")
    truths: dict[str, Truth] = {}
    for number, line in numbered_lines(path) if path.exists() else ():
        try:
            kinds = {"flipped": bool | None, "answer": str | None, "grades": dict | None, "prompt": str | list}
            *known, grades, prompt = read_fields(json_object(line), kinds, "the line").values()
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            key = question_key(Row(messages, [], "", {}))
            truth = Truth(*known, grades or {})
            for pattern in truth.grades.values():
                re.compile(pattern)
        except (ValueError, TypeError, KeyError, AttributeError, re.error, RecursionError, OverflowError):
            form = '{"prompt": ..., "flipped": true or false, "answer": text, "grades": {name: regex}}'
            raise InputError(f"{path}:{number}: not of the form {form}") from None
        if truths.setdefault(key, truth) != truth:
            raise InputError(f"{path}:{number}: an earlier line says something else about the same question; remove one")
    return truths


def write_truth(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes the truth file for the rows in `path`; none if nothing is known about any of them."""
    known = []
    for row in (row for row in rows if row.truth):
        prompt = row.messages if len(row.messages) > 1 else row.messages[0]["content"]
        known.append({"prompt": prompt, **asdict(row.truth)})
    if known:
        write_jsonl(Path(path).with_suffix(".truth.jsonl"), known)


@dataclass
class Example:
    """A prompt with its completions as token ids. Each completion ends with `<|im_end|>`. With several answers to learn, the
    one completion is the dialogue from the first of them to the last."""

    prompt: list[int]
    completions: list[list[int]]
    where: str = ""
    raw: dict = field(default_factory=dict)  # the row
    question: str = ""  # the last message as text, to be shown
    texts: list[str] = field(default_factory=list)  # the completions as text
    choices: list[str] = field(default_factory=list)  # these three as in the row
    answer: int | None = None
    truth: Truth | None = None
    learned: list[bool] | None = None  # which tokens of the only completion carry the loss; None: all tokens of all

    def __len__(self) -> int:
        """Tokens of the example in a batch row: the prompt once, then every completion."""
        return len(self.prompt) + sum(map(len, self.completions))


def encode(rows: list[Row], chat: ChatML, max_length: int, max_prompt_length: int, ledger: Ledger) -> list[Example]:
    """Tokenizes rows. The ledger counts each one as kept (perhaps with a trimmed prompt) or dropped.

    A prompt of more than `max_prompt_length` tokens loses its oldest text (`ChatML.prompt`). All completions of a row share
    that prompt and one budget: prompt + completion <= `max_length` tokens. If one of them does not fit, the row is dropped;
    but a dialogue with several answers to learn first gives up its earliest ones, which become part of the prompt.
    A completion is never cut: a cut answer has no `<|im_end|>`, and a model tuned on those forgets to stop.
    """
    examples = []
    for row in rows:
        try:
            whole = tokenized(row, chat)
        except InputError:
            ledger.drop("text that the tokenizer takes for a control token")
            continue
        ledger.note_size(len(whole.prompt), max(map(len, whole.completions)))
        for part in with_fewer_answers(row):
            example, trimmed = whole if part is row else tokenized(part, chat), False
            if len(example.prompt) > max_prompt_length:
                try:
                    example, trimmed = replace(example, prompt=chat.prompt(part.messages, max_prompt_length)), True
                except InputError:
                    cause = "prompt does not fit"
                    continue
            if len(example.prompt) + max(map(len, example.completions)) <= max_length:
                break
            cause = "completion does not fit"
        else:
            ledger.drop(cause)
            continue
        ledger.kept += 1
        ledger.trimmed += trimmed
        ledger.unlearned += sum(turn["learned"] for turn in row.later) - sum(turn["learned"] for turn in part.later)
        examples.append(example)
        ledger.tokens += len(example)
    return examples


def with_fewer_answers(row: Row) -> Iterator[Row]:
    """The row, and then what it is when the first, the first two, ... of its answers belong to the prompt."""
    yield row
    turns = [{"role": "assistant", "content": row.completions[0]}, *row.later]
    for i, turn in enumerate(row.later, start=1):
        if turn["learned"]:
            earlier = [{"role": t["role"], "content": t["content"]} for t in turns[:i]]
            yield replace(row, messages=[*row.messages, *earlier], completions=[turn["content"]], later=row.later[i:])


def tokenized(row: Row, chat: ChatML) -> Example:
    """A row of any length as token ids; InputError if the tokenizer takes some of its text for a control token."""
    completions, learned = [chat.reply(text) for text in row.completions], None
    if row.later:
        (ids,) = completions
        learned = [True] * len(ids)
        for turn in row.later:
            between, text = chat.next_turn(turn["role"]), chat.reply(turn["content"])
            ids += between + text
            learned += [False] * len(between) + [turn["learned"]] * len(text)
    known = dict(texts=row.completions, choices=row.choices, answer=row.answer, truth=row.truth, learned=learned)
    return Example(chat.prompt(row.messages), completions, row.where, row.raw, row.messages[-1]["content"], **known)


def grades(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, list[bool]]:
    """{grade: which answers have it}, for the grades that the truth of every example has."""
    graded = [e.truth.grade(answer) if e.truth else {} for answer, e in zip(answers, examples, strict=True)]
    shared = [name for name in (graded[0] if graded else ()) if all(name in one for one in graded)]
    return {name: [one[name] for one in graded] for name in shared}


def supervise_everything(example: Example) -> Example:
    """The same text with the loss on all of it: everything after the first token becomes the completion."""
    (completion,) = example.completions
    return replace(example, prompt=example.prompt[:1], completions=[example.prompt[1:] + completion], learned=None)


def by_length(items: Sequence[Sized]) -> list[int]:
    """Indices of the items, the shortest first; equal ones keep their order. Batches of neighbours need little padding."""
    return sorted(range(len(items)), key=lambda i: len(items[i]))


def lengths_of(examples: Sequence[Example]) -> Tensor:
    """Learned tokens of every completion, [E, completions per example]."""
    return torch.tensor([[len(ids) if e.learned is None else sum(e.learned) for ids in e.completions] for e in examples])


def epoch_order(examples: list[Example], batch_size: int, seed: int, epoch: int, pool: int = 32) -> list[list[int]]:
    """Indices of the batches of one epoch. They depend on (seed, epoch) alone, so a resumed run continues the same order.

    The examples are shuffled, then sorted by length within pools of `pool` batches, which saves padding; then the batches
    are shuffled. Every example is in exactly one batch; one batch may be smaller.
    """
    shuffle = random.Random(f"{seed}-{epoch}")
    drawn = list(range(len(examples)))
    shuffle.shuffle(drawn)
    order: list[int] = []
    for start in range(0, len(drawn), pool * batch_size):
        part = drawn[start : start + pool * batch_size]
        order += [part[k] for k in by_length([examples[i] for i in part])]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shuffle.shuffle(batches)
    return batches


@dataclass
class Segments:
    """A batch without padding, for attention to sequences of unequal length (`model.attend_by_segment`): all n tokens in one
    row, and for each of S segments, a prompt or a completion, the tokens that it sees, those of its prompt and its own.

        prompt, chosen, rejected    queries  p | c | r        keys  p | p c | p r        causal, aligned at the end
    """

    kept: Tensor  # [n] index into the flattened [B*T] of each token
    source: Tensor  # [M] as in Batch, but an index into these n tokens
    seen: Tensor  # [K] index into these n tokens: the keys of the first segment, of the second, ...
    query_starts: Tensor  # [S + 1] int32: where the queries of each segment start; the last is n
    key_starts: Tensor  # [S + 1] int32: where its keys start in `seen`; the last is K
    longest: tuple[int, int]  # most queries, and most keys, of a segment

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        return replace(self, **{k: x.to(device, non_blocking=non_blocking) for k, x in vars(self).items() if k != "longest"})


@dataclass
class Batch:
    """The layout at the top of this file as tensors, all int64. Completions are numbered through the whole batch."""

    tokens: Tensor  # [B, T] token ids, 0 in the padding (its value is never used)
    segment: Tensor  # [B, T] 0 prompt, k the k-th completion, -1 padding
    position: Tensor  # [B, T]
    source: Tensor  # [M] index into the flattened [B*T] of the token whose output predicts ...
    target: Tensor  # [M] ... this token id ...
    owner: Tensor  # [M] ... of this completion, 0 .. N-1
    lengths: Tensor  # [N] predicted tokens of each completion
    segments: Segments  # the same without padding

    def __post_init__(self):
        # Where every row holds one completion, its tokens may attend to all tokens before them, and no mask is needed.
        self.needs_mask = len(self.lengths) > len(self.tokens)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def collate(examples: list[Example]) -> Batch:
    """A row for each example, padded on the right to the longest."""
    width = max(map(len, examples))
    tokens, segment, position = [], [], []  # row after row, flattened
    source, target, owner, lengths = [], [], [], []
    for example in examples:
        start = len(example.prompt)
        last = len(tokens) + start - 1  # index of the prompt's last token
        tokens += example.prompt
        segment += [0] * start
        position += range(start)
        for k, completion in enumerate(example.completions, start=1):
            first, size = len(tokens), len(completion)
            # The prompt's last token predicts a completion's first; then each token predicts the next.
            predicting = [last, *range(first, first + size - 1)]
            learned = example.learned or [True] * size
            source += compress(predicting, learned)
            target += compress(completion, learned)
            lengths.append(sum(learned))
            owner += [len(lengths) - 1] * lengths[-1]
            tokens += completion
            segment += [k] * size
            position += range(start, start + size)
        padding = width - len(example)
        tokens += [0] * padding
        segment += [-1] * padding
        position += [0] * padding
    grid = (torch.tensor(values).view(-1, width) for values in (tokens, segment, position))  # [B, T] each
    source = torch.tensor(source)
    return Batch(*grid, source, *map(torch.tensor, (target, owner, lengths)), without_padding(examples, segment, source))


def without_padding(examples: list[Example], segment: list[int], source: Tensor) -> Segments:
    """The segments of a batch of which these are the flattened `Batch.segment` and `Batch.source`."""
    real = torch.tensor(segment) >= 0  # [B*T]
    index = real.cumsum(0) - 1  # of a token among the real ones
    seen, queries, keys, first = [], [0], [0], 0
    for example in examples:
        prompt = range(first, first + len(example.prompt))
        seen += prompt
        queries.append(len(prompt))
        keys.append(len(prompt))
        first = prompt.stop
        for completion in example.completions:
            own = range(first, first + len(completion))
            seen += [*prompt, *own]
            queries.append(len(own))
            keys.append(len(prompt) + len(own))
            first = own.stop
    starts = (torch.tensor(sizes).cumsum(0, dtype=torch.int32) for sizes in (queries, keys))
    return Segments(real.nonzero()[:, 0], index[source], torch.tensor(seen), *starts, (max(queries), max(keys)))
