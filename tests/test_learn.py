"""docs/learn.md, recipes.md, report.md: what they name exists, and what they work out by hand is what the code computes."""

import re
from pathlib import Path

import pytest
import torch

import dpo
from lessons.__main__ import ROOMS as LESSONS
from model import sibling_mask
from quant import dequantize, dequantize_int8, levels, quantize_4bit, quantize_int8

ROOT = Path(__file__).resolve().parent.parent
LEARN, RECIPES = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("learn.md", "recipes.md"))
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])


def test_there_are_thirty_questions():
    assert [int(number) for number in re.findall(r'(?m)^<a id="q\d+"></a>\*\*(\d+)\. ', LEARN)] == list(range(1, 31))


def test_every_lesson_is_listed():
    assert sorted(re.findall(r"\[\w+\]\(\.\./lessons/\w+/(\w+)\.py\)", LEARN)) == sorted(LESSONS)


def test_every_test_that_is_named_exists():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"`(test_\w+)`", pages))
    assert len(named) > 10 and {name for name in named if f"def {name}(" not in TESTS} == set()


def test_every_piece_of_code_that_is_named_exists():
    named = {name for line in re.findall(r"\*Code: [^*]*\*", LEARN) for name in re.findall(r"`([\w.]+)", line)}
    last = {name.rpartition(".")[2] for name in named if not name.startswith("test_")} - {""}
    assert len(last) > 15 and {name for name in last if not re.search(rf"(def|class) {name}\b|\b{name}:", SOURCE)} == set()


def test_the_mask_that_is_drawn():
    header = next(line for line in LEARN.splitlines() if "sees  p0" in line)
    columns = [header.index(name, header.index("sees")) for name in "p0 p1 p2 c0 c1 r0 r1".split()]
    rows = [line for line in LEARN.splitlines() if re.search(r"\b[pcr]\d( +x)+$", line)]
    assert len(rows) == 7
    seen = torch.tensor([[column < len(row) and row[column] == "x" for column in columns] for row in rows])
    mask = sibling_mask(torch.tensor([[0, 0, 0, 1, 1, 2, 2]]), torch.float32)[0, 0]
    assert torch.equal(seen, mask == 0)


def test_eight_numbers_in_nf4():
    w = torch.tensor([[0.1, -0.5, 0.02, 0.9, -1.2, 0.0, 0.33, 0.7]])
    q = quantize_4bit(w)
    assert " ".join(f"{byte:02X}" for byte in q.packed.flatten().tolist()) in LEARN
    rows = {
        line[4:16].strip(): line[16:].split() for line in LEARN.splitlines() if line.startswith("    ") and "    " in line
    }
    codes = [int(word) for word in rows["code"][:8]]
    assert [float(word) for word in rows["w / 1.2"]] == pytest.approx((w / 1.2).flatten().tolist(), abs=6e-5)
    assert [float(word) for word in rows["level"]] == pytest.approx(levels("nf4")[codes].tolist(), abs=6e-5)
    assert [float(word) for word in rows["level x 1.2"]] == pytest.approx(dequantize(q).flatten().tolist(), abs=6e-5)


def test_the_loss_of_the_recipe():
    code = re.search(r"```python\n(.*?)```", RECIPES, re.DOTALL)[1]
    names = {"torch": torch}
    exec(code, names)
    loss = names["exponential_loss"]
    z = torch.tensor([-1e4, -20.0, 0.0, 1.0, 1e4], requires_grad=True)
    value = loss(z)
    value.sum().backward()
    assert value[1:4].tolist() == pytest.approx(torch.exp(-z[1:4]).tolist())
    assert value.isfinite().all() and z.grad.isfinite().all()
    assert z.grad[0] == z.grad[1] == -torch.exp(torch.tensor(20.0))  # one tangent from -20 down


def test_the_solutions_that_can_be_computed():
    z = torch.tensor([0.2], dtype=torch.float64)
    losses = [dpo.sigmoid_loss(z), dpo.conservative_loss(z, 0.1), dpo.robust_loss(z, 0.1)]
    assert [f"{loss.item():.4f}" in RECIPES for loss in losses] == [True] * 3
    assert dpo.debiased_accuracy(0.74, 0.2) == pytest.approx(0.9) and dpo.debiased_accuracy(0.8, 0.2) == pytest.approx(1)
    assert (4 + 32 / 128, round(4 + 8 / 128 + 32 / (128 * 256), 3)) == (4.25, 4.063)
    codes, scale = quantize_int8(torch.tensor([[3, -1, 0.2, 0]]))
    assert codes.tolist() == [[127, -42, 8, 0]] and scale.tolist() == [3]
    assert dequantize_int8(codes, scale)[0].tolist() == pytest.approx([3, -0.992, 0.189, 0], abs=1e-3)
    assert 16 * (2560 + 10240) == 204_800 and round(100 * 204_800 / (2560 * 10240), 2) == 0.78
