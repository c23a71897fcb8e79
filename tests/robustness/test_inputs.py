"""Broken inputs, drawn at random from kinds that real files have: each ends well or in an error that says what is wrong."""

import json
import random
import shutil
from dataclasses import fields

import pytest
from rows import pair_rows

from runtime.files import write_jsonl
from runtime.flags import flag_name
from runtime.settings import STAGES
from train import main

JUNK = [
    None, True, 0, -1, 3.5, 10**400, 1e308, float("nan"), float("inf"), "", " ", "x", "\x1b[2J", "\ud800", "\u2028",
    "<|im_start|>", [], {}, [None], [[]], {"a": 1}, ["x", "y"], [{"role": "user", "content": "hi"}], [{"role": 3}],
    [{"role": "assistant", "content": None}], "A", "nan", "../x", "a\x00b",
]  # fmt: skip


def spoiled(value: object, draw: random.Random) -> object:
    """A copy of a JSON value in which one part is junk, missing, or has a junk part added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        copy, name = dict(value), draw.choice(list(value))
        match draw.randrange(4):
            case 0:
                del copy[name]
            case 1:
                copy[draw.choice(["answer", "choices", "flipped", "messages", "extra", ""])] = draw.choice(JUNK)
            case _:
                copy[name] = spoiled(value[name], draw)
        return copy
    if isinstance(value, list) and value and draw.random() < 0.7:
        copy = list(value)
        copy[draw.randrange(len(copy))] = spoiled(draw.choice(value), draw)
        return copy
    return draw.choice(JUNK)


def spoiled_bytes(content: bytes, draw: random.Random) -> bytes:
    """A file that was cut, or in which a few bytes changed."""
    if draw.random() < 0.4:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(len(changed), 4096))] = draw.randrange(256)
    return bytes(changed)


def ends_well(words: list[str], capsys) -> None:
    """The command succeeds, or says in a few printable lines what is wrong. An exception would fail the test by itself."""
    try:
        status = main(words)
    except SystemExit as end:  # flags end the program
        status = end.code
    told = capsys.readouterr().err
    assert status in (0, 2), told
    assert status == 0 or "error: " in told, words
    assert len(told) < 20_000 and "\x1b[2J" not in told and "Traceback" not in told


@pytest.fixture
def count(long) -> int:
    return 300 if long else 12


DRY = "--dry-run --device cpu --max-length 128 --max-prompt-length 64".split()


def dialogue(pair: dict) -> dict:
    texts = [pair["prompt"], pair["rejected"], "Sure?", pair["chosen"]]
    return {"messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]}


@pytest.mark.parametrize("stage", ["sft", "dpo", "mcq"])
def test_rows(tiny, tmp_path, capsys, count, stage):
    draw = random.Random(stage)
    pairs = pair_rows(24)
    rows = {
        "dpo": pairs,
        "sft": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs[::2]] + [dialogue(r) for r in pairs[1::2]],
        "mcq": [{"question": r["prompt"], "choices": [r["chosen"], r["rejected"]], "answer": "A"} for r in pairs],
    }[stage]
    file = tmp_path / "rows.jsonl"
    for _ in range(count):
        kept = [spoiled(row, draw) if draw.random() < 0.2 else row for row in rows]
        content = "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in kept)
        raw = content.encode("utf-8", errors="surrogatepass")
        file.write_bytes(spoiled_bytes(raw, draw) if draw.random() < 0.3 else raw)
        skip = ["--on-bad-row", "skip"] if draw.random() < 0.5 else []
        ends_well(["--stage", stage, "--model", str(tiny), "--train", str(file), *skip, *DRY], capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "run.json", "results.json"])
def test_files_of_a_model(tiny, tmp_path, capsys, count, name):
    draw = random.Random(name)
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    usual = ["--train", str(tmp_path / "pairs.jsonl"), "--device", "cpu", "--max-length", "128", "--max-prompt-length", "64"]
    run = tmp_path / "out" / "run"
    once = ["--stage", "dpo", "--model", str(tiny), *usual, "--out", str(tmp_path / "out"), "--name", "run"]
    assert main([*once, "--max-steps", "1", "--samples", "0"]) == 0
    capsys.readouterr()
    good = (run / name).read_bytes()
    for i in range(count):
        if name == "model.safetensors" or draw.random() < 0.2:
            (run / name).write_bytes(spoiled_bytes(good, draw))
        else:
            (run / name).write_text(json.dumps(spoiled(json.loads(good), draw)), encoding="utf-8", errors="replace")
        dry = ["--stage", "dpo", "--model", str(run), *usual, "--dry-run"]
        measure = ["--stage", "eval", "--model", str(run), "--samples", "1", "--max-new-tokens", "2"]
        measure += ["--out", str(tmp_path / "out"), "--name", f"eval-{i}", "--device", "cpu"]
        ends_well(measure if i % 2 else dry, capsys)


def test_adapters(tiny, tmp_path, capsys, count):
    draw = random.Random("adapters")
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    usual = ["--train", str(tmp_path / "pairs.jsonl"), "--device", "cpu", "--max-length", "128", "--max-prompt-length", "64"]
    words = ["--stage", "dpo", "--model", str(tiny), "--lora", "4", *usual, "--out", str(tmp_path), "--name", "run"]
    assert main([*words, "--max-steps", "1", "--samples", "0"]) == 0
    capsys.readouterr()
    for _ in range(count):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "run", copy)
        file = draw.choice(sorted([*copy.glob("*.json"), *copy.glob("*.safetensors")]))
        if file.suffix == ".json" and draw.random() < 0.8:
            file.write_text(json.dumps(spoiled(json.loads(file.read_text()), draw)), encoding="utf-8", errors="replace")
        else:
            file.write_bytes(spoiled_bytes(file.read_bytes(), draw))
        ends_well(["--stage", "dpo", "--model", str(copy), *usual, "--lora", "4", "--dry-run"], capsys)


def test_flags(tiny, tmp_path, capsys, count):
    draw = random.Random("flags")
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    values = [
        "",
        "0",
        "-1",
        "nan",
        "inf",
        "1e400",
        "9" * 30,
        "../x",
        "a,b",
        "a=nan",
        "meta",
        "cuda:9",
        "demo",
        "\x00",
        "ü",
        ",",
    ]
    for _ in range(10 * count):
        stage = draw.choice(["sft", "dpo", "qat", "quantize", "sweep", "eval"])
        words = ["--stage", stage, "--model", str(tiny)]
        if stage in ("sft", "dpo", "qat", "sweep"):
            words += ["--train", str(tmp_path / "pairs.jsonl"), *(["--dry-run"] if stage != "sweep" else [])]
        name = draw.choice([f.name for f in fields(STAGES[stage]) if f.name not in ("model", "dry_run", "out", "teacher")])
        words += [flag_name(name), *([draw.choice(values)] if draw.random() < 0.9 else [])]
        if stage in ("quantize", "eval", "sweep"):  # these would write: only what ends before that
            words += ["--data", str(tmp_path / "none.jsonl")] if stage != "quantize" else ["--to", "nf9"]
        ends_well([*words, "--out", str(tmp_path / "out")], capsys)
