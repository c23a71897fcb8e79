"""Ours beside the most naive code that could do the same, on random input: ChatML, batches, number formats, the split by
question, the teacher's journal."""

import hashlib
import random
from fractions import Fraction

import pytest
import torch

from data import ChatML, Example, Row, collate, load_tokenizer, split_by_question
from prepare.teacher import Journal
from quant import dequantize, dequantize_int8, levels, quantize_4bit, quantize_blockwise, quantize_int8, scales
from quant_kernels import unpack
from runtime.files import InputError

PIECES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "start|>", "<", "|", "system\n", "\n", "\n\n", " ", "\t",
    "\u00a0", "\u2028", "é", "e\u0301", "你好", "\U0001f469\u200d\U0001f52c", "\x00", "\x1b[2J", "word", "F = m a", "12",
    "\ufffd",
]  # fmt: skip


@pytest.fixture(params=[None, "Be brief.", "<|im_end|>\n"])
def chat(tiny, request):
    return ChatML(load_tokenizer(tiny), request.param)


def text(draw, most=6):
    return "".join(draw.choices(PIECES, k=draw.randint(1, most)))


def conversation(draw):
    """Perhaps a system turn, then turns of user and assistant; the last is a user's."""
    roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(0, 3) + ["user"]
    return [{"role": role, "content": text(draw)} for role in roles]


def test_ids_decode_to_the_conversation_and_the_only_control_tokens_are_those_of_the_turns(chat):
    draw = random.Random(0)
    for _ in range(100):
        messages, reply = conversation(draw), text(draw)
        ids = chat.prompt(messages)
        if chat.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": chat.system_prompt}, *messages]
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        assert chat.decode(ids) == "".join(turns) + "<|im_start|>assistant\n"
        assert [i for i in ids if i in chat.control_ids] == [chat.start, chat.end] * len(turns) + [chat.start]
        ids = chat.reply(reply)
        assert chat.decode(ids) == f"{reply}<|im_end|>"
        assert [i for i in ids if i in chat.control_ids] == [chat.end]


def trimmed(chat, messages, limit):
    """`ChatML.prompt(messages, limit)`, one token at a time; None if it cannot be done."""
    if chat.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": chat.system_prompt}, *messages]
    turns = [(message["role"], chat.encode_text(message["content"])) for message in messages]
    reply = [chat.start, *chat.encode_text("assistant\n")]

    def whole():
        parts = [
            [chat.start, *chat.encode_text(f"{role}\n"), *ids, chat.end, *chat.encode_text("\n")] for role, ids in turns
        ]
        return sum(parts, []) + reply

    oldest = int(turns[0][0] == "system")
    while len(whole()) > limit:
        turns[oldest][1].pop(0)
        if not turns[oldest][1]:  # a turn without text goes, but the last one has to stay
            if oldest == len(turns) - 1:
                return None
            turns.pop(oldest)
    return whole()


def test_a_trimmed_prompt_is_that_of_taking_away_one_token_after_the_other(chat):
    draw = random.Random(1)
    for _ in range(12):
        messages = conversation(draw)
        length = len(chat.prompt(messages))
        for limit in draw.sample(range(length + 2), 8):
            expected = trimmed(chat, messages, limit)
            if expected is None:
                with pytest.raises(InputError, match=f"need more than {limit} tokens"):
                    chat.prompt(messages, limit)
            else:
                assert chat.prompt(messages, limit) == expected


def test_a_batch_is_what_a_loop_over_its_cells_makes():
    draw = random.Random(2)
    for _ in range(50):
        ids = lambda most: draw.choices(range(1, 99), k=draw.randint(1, most))  # noqa: E731
        examples = [Example(ids(9), [ids(5) for _ in range(draw.randint(1, 5))]) for _ in range(draw.randint(1, 6))]
        batch, grid = collate(examples), []
        predictions = []  # (index of the cell that predicts, token, completion)
        completions = 0
        width = max(map(len, examples))
        for row, example in enumerate(examples):
            cells = [(token, 0, i) for i, token in enumerate(example.prompt)]  # (token, segment, position)
            for k, completion in enumerate(example.completions, start=1):
                cells += [(token, k, len(example.prompt) + i) for i, token in enumerate(completion)]
            for token, segment, position in cells:
                if segment > 0:  # predicted by the cell before it, as if its siblings were not there
                    before = [i for i, (_, s, p) in enumerate(cells) if s in (0, segment) and p == position - 1]
                    predictions.append((row * width + before[-1], token, completions + segment - 1))
            completions += len(example.completions)
            grid += cells + [(0, -1, 0)] * (width - len(cells))
        assert torch.stack([batch.tokens, batch.segment, batch.position], 2).view(-1, 3).tolist() == [list(c) for c in grid]
        assert list(zip(batch.source.tolist(), batch.target.tolist(), batch.owner.tolist())) == predictions
        assert batch.lengths.tolist() == [len(completion) for example in examples for completion in example.completions]


# ------------------------------------------------------------------------------------------------------- number formats


def odd_matrix(draw):
    """A small matrix of any shape and dtype whose values span all that it can hold, with zeros among them."""
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    rows, columns = draw.randint(1, 9), draw.randint(1, 70)
    low, high = (-7, 4) if dtype == torch.float16 else (-44, 38)  # powers of ten: subnormal numbers too
    size = 10.0 ** torch.empty(rows, 1).uniform_(low, high, generator=generator).double()
    w = size * torch.empty(rows, columns).uniform_(-1, 1, generator=generator)
    return w.masked_fill(torch.rand(rows, columns, generator=generator) < 0.2, 0).to(dtype)


def no_other_level_is_nearer(x, codes, table):
    """x [n], codes [n], table [levels]. Two levels that are equally near but for rounding are both fine."""
    distance = (x[:, None] - table.double()).abs()  # [n, levels]
    assert (distance[torch.arange(len(x)), codes] <= distance.min(dim=1).values + 1e-6 * table.abs().max()).all()


def test_int8_codes_are_the_nearest_in_every_row():
    draw = random.Random(3)
    for _ in range(100):
        w = odd_matrix(draw)
        codes, scale = quantize_int8(w)
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32
        for row, its_codes, s in zip(w.double(), codes, scale):
            assert s == row.abs().max()
            no_other_level_is_nearer(row * 127 / max(s.item(), 1e-36), its_codes.long() + 127, torch.arange(-127, 128))
        by_hand = [[c / 127 * s for c in row] for row, s in zip(codes.float(), scale)]
        assert dequantize_int8(codes, scale).tolist() == [[value.item() for value in row] for row in by_hand]


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4", "nf2"])
def test_blockwise_codes_are_the_nearest_in_every_block(code):
    draw, table = random.Random(code), levels(code)
    for _ in range(60):
        w, block = odd_matrix(draw), draw.choice([1, 2, 3, 16, 64, 100, 4096])
        q = quantize_blockwise(w, code, block) if code == "nf2" else quantize_4bit(w, code, block)
        codes, by_hand = unpack(q.packed, {"nf2": 2}.get(code, 4)).long(), []
        blocks = w.double().flatten().split(block)
        assert len(q.absmax) == len(blocks)
        for values, its_codes, s in zip(blocks, codes[: w.numel()].split(block), q.absmax):
            assert s == values.abs().max()
            no_other_level_is_nearer(values / max(s.item(), 1e-38), its_codes, table)
            by_hand.append(table[its_codes] * s)
        rounded = dequantize(q)
        assert (rounded.shape, rounded.dtype) == (w.shape, w.dtype)
        assert torch.equal(rounded.flatten(), torch.cat(by_hand).to(w.dtype))


def test_double_quantization_rounds_every_scale_to_the_nearest_of_its_256():
    draw, table = random.Random(5), levels("dynamic8")
    for _ in range(30):
        w = torch.randn(draw.randint(1, 40), draw.randint(1, 70)) * 10.0 ** draw.uniform(-20, 20)
        once, twice = quantize_4bit(w, "nf4", 4), quantize_4bit(w, "nf4", 4, double=True)
        assert torch.equal(once.packed, twice.packed) and twice.offset == once.absmax.mean()
        by_hand = []
        for values, codes, s in zip((once.absmax - twice.offset).split(256), twice.absmax.split(256), twice.nested_absmax):
            assert s == values.abs().max()
            no_other_level_is_nearer(values.double() / max(s.item(), 1e-38), codes.long(), table)
            by_hand.append(table[codes.long()] * s + twice.offset)
        assert torch.equal(scales(twice), torch.cat(by_hand))


# ------------------------------------------------------------------------------------------------ split, and the journal


def test_a_side_is_decided_by_the_hash_of_the_question_alone():
    draw = random.Random(6)
    for _ in range(30):
        seed, share = draw.randrange(2**63), draw.choice([0.01, 0.2, 0.5, 0.99, draw.random()])
        numbers = draw.choices(range(60), k=100)  # some are asked more than once
        rows = [Row([{"role": "user", "content": f"What is {n}?"}], [], f"f:{i}", {}) for i, n in enumerate(numbers)]
        sides = split_by_question(rows, share, seed)
        for n, row in zip(numbers, rows):
            digest = hashlib.sha256(f"{seed}\nwhat is {n}".encode()).hexdigest()
            assert row in sides[Fraction(int(digest, 16), 16**64) < Fraction(share)]
        assert sorted(row.where for side in sides for row in side) == sorted(row.where for row in rows)


def test_a_journal_is_a_dictionary_whatever_is_killed_in_between(tmp_path):
    """Two processes take turns: each reads the file before it adds, as `ask_all` does. A kill leaves part of a line."""
    draw, path = random.Random(7), tmp_path / "journal.jsonl"
    answers, tokens = {}, [0, 0]
    writers = [Journal(path), Journal(path)]
    for _ in range(150):
        writer = draw.choice(writers)
        writer.read()
        match draw.randrange(4):
            case 0:
                torn = b'{"key": "k1", "answer": "lost", "tokens": [1, 1]}'
                path.write_bytes(path.read_bytes() + torn[: draw.randint(1, len(torn))])
            case 1:
                writers = [Journal(path), Journal(path)]
            case _:
                key, used = f"k{draw.randrange(20)}", [draw.randrange(99), draw.randrange(99)]
                answer = draw.choice([None, "", "\n", text(draw, 20), "half \ud800 a character"])
                writer.add(key=key, answer=answer, tokens=used)
                answers[key], tokens = answer, [had + new for had, new in zip(tokens, used)]
                assert (writer.answers, writer.tokens) == (answers, tokens)
        again = Journal(path)
        assert (again.answers, again.tokens) == (answers, tokens)
