"""Figures in docs/ and docstrings that follow from formulas: computed here and compared with what is printed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import demo
import lora
import quant
from metrics.intervals import share
from model import PhiConfig, read_config
from runtime import flags, memory

ROOT = Path(__file__).resolve().parent.parent
PHI2 = PhiConfig()
ALL = memory.parameters(PHI2)
MATRICES = 32 * (4 * 2560**2 + 2 * 2560 * 10240)  # weights of the layers that are quantized
ROWS = 32 * (4 * 2560 + 10240 + 2560)
ADAPTERS = 32 * 16 * (4 * (2560 + 2560) + 2 * (2560 + 10240))  # of rank 16


def printed(page, pattern):
    """The numbers that a pattern captures on a page, whose lines are joined."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    found = re.search(pattern, text)
    assert found, f"{page} does not say {pattern}"
    return [float(number.replace(",", "")) for number in found.groups()]


def cells(page, name):
    """The cells of the first row of a table that begins with `name`."""
    [row, *_] = re.findall(rf"(?m)^\| `?{re.escape(name)}`? \|.*$", (ROOT / page).read_text(encoding="utf-8"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", quant.FORMATS)
def test_bits_a_weight(name):
    """Of Phi-2's matrices: an fp32 scale for each row or 64 weights; doubly quantized 8 bits, and 32 for 64 x 256."""
    code = quant.FORMATS[name].code
    scales = 32 * ROWS / MATRICES if code == "int8" else 8 / 64 + 32 / (64 * 256) if "double" in name else 32 / 64
    bits = (8 if code == "int8" else quant.bits(code)) + scales
    assert float(cells("docs/quantization.md", name)[2]) == pytest.approx(bits, abs=0.005)
    assert memory.BITS[name] == pytest.approx(bits, abs=0.01)


def test_sizes_of_phi_2():
    """Embeddings and output layer stay in bf16."""
    rest = ALL - MATRICES
    said = printed("docs/quantization.md", r"weights, ([\d.]+) GB in bf16\) becomes ([\d.]+) GB .*? or ([\d.]+) GB")
    made = [2 * ALL, 4.5 / 8 * MATRICES + 2 * rest, MATRICES + 4 * ROWS + 2 * rest]
    assert said == pytest.approx([size / 1e9 for size in made], rel=0.01)
    assert "--to nf4-double          # a third of its size in bf16" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (4.127 / 8 * MATRICES + 2 * rest) / (2 * ALL) == pytest.approx(1 / 3, abs=0.02)
    assert printed("docs/sweeps.md", r"the model of each run: (\d+) GB") == [pytest.approx(4 * ALL / 1e9, abs=0.5)]
    assert printed("docs/glossary.md", r"saves ([\d.]+) bits a weight") == [pytest.approx(4.5 - 4.127, abs=0.005)]


def test_training_all_of_phi_2_and_its_adapters():
    assert printed(
        "docs/adapters-and-memory.md", r"([\d.]+) billion weights with AdamW takes 16 bytes each, ([\d.]+) GB"
    ) == [
        pytest.approx(ALL / 1e9, abs=0.005),
        pytest.approx(16 * ALL / 1e9, abs=0.05),
    ]
    assert printed("runtime/memory.py", r"([\d.]+) GB for Phi-2") == [pytest.approx(16 * ALL / 1e9, abs=0.05)]
    assert printed("runtime/memory.py", r"in bf16, ([\d.]+) in nf4") == [pytest.approx(4.5 / 8, abs=0.005)]
    moments = printed("runtime/optimizer.py", r"([\d.]+) of the ([\d.]+) GB that training all of Phi-2")
    assert moments == pytest.approx([8 * ALL / 1e9, 16 * ALL / 1e9], abs=0.05)
    million, megabytes = printed("docs/adapters-and-memory.md", r"([\d.]+) million values at rank 16.*?\(([\d.]+) MB")
    assert million == pytest.approx(ADAPTERS / 1e6, abs=0.05) and megabytes == pytest.approx(4 * ADAPTERS / 1e6, abs=0.5)
    assert ADAPTERS / ALL == pytest.approx(0.01, abs=0.002)  # gradients and moments of 99% of the weights are saved
    assert 1 - memory.BITS["nf4"] / 16 == pytest.approx(2 / 3, abs=0.06)  # "about two thirds of the bytes"
    hold = r"hold (\d+) thousand values instead of (\d+) million"
    thousand, whole = re.search(hold, " ".join(lora.__doc__.split())).groups()
    assert (int(thousand), int(whole)) == (round(16 * (2560 + 10240) / 1e3), round(2560 * 10240 / 1e6))


CARDS = {"RTX 4060": "8gb", "L4": "24gb", "RTX 4090": "24gb", "A100, 80 GB": "80gb", "H100, 80 GB": "80gb"}


def hours(preset, peak):
    """As docs/training.md has it, tokens x k x parameters / (share x peak): 20,000 pairs of 600 tokens, 3 epochs, 40%."""
    settings = flags.parse(["--preset", preset, "--model", "DIR", "--train", "pairs.jsonl"]).settings
    k = (4 if settings.lora else 6) + 2 * settings.gradient_checkpointing + 2 / 3
    return 20_000 * 600 * 3 * k * 2.78e9 / (0.4 * peak * 1e12) / 3600


@pytest.mark.parametrize("card", CARDS)
def test_hours_of_training(card):
    _, preset, peak, said, *_ = cells("docs/training.md", card)
    assert preset == f"`{CARDS[card]}`" and float(said) == pytest.approx(hours(CARDS[card], float(peak)), abs=0.05)


def test_hours_of_the_readme():
    """An RTX 4060, an RTX 4090 and an A100 in bf16, and in the fp32 of the report, at 19.5 x 10^12 a second."""
    said = [cells("README.md", name)[3] for name in ("8gb", "24gb", "80gb", "report")]
    made = [hours("8gb", 30), hours("24gb", 165), hours("80gb", 312)]
    assert said == [*(f"{round(h)} hours" for h in made), "a day"] and hours("report", 19.5) == pytest.approx(24, abs=1)


def test_the_shares_of_nf4_s_codes():
    """Of normal weights in blocks of 64."""
    q = quant.quantize_blockwise(torch.randn(64 * 20_000, generator=torch.Generator().manual_seed(0)))
    codes = torch.cat((q.packed >> 4, q.packed & 15)).flatten().long()
    shares = 100 * torch.bincount(codes, minlength=16) / len(codes)
    outer, inner = printed(
        "docs/quantization.md", r"outermost codes get about ([\d.]+)% each, the innermost up to ([\d.]+)%"
    )
    assert shares[[0, 15]].mean().item() == pytest.approx(outer, abs=0.1)
    assert shares.max().item() == pytest.approx(inner, abs=0.1)


def test_what_is_won_back_by_training_through_the_rounding():
    full, rounded, after = map(float, cells("docs/quantization.md", "loss, nats per token")[1:])
    won = 100 * (rounded - after) / (rounded - full)
    assert printed("docs/quantization.md", r"(\d+)% of the loss is won back") == [round(won)]


def test_the_demo_s_model(tiny):
    """A million parameters, of which embeddings and output layer are a fifth."""
    phi = replace(read_config(tiny), num_hidden_layers=demo.TINY_PHI["num_hidden_layers"])
    assert memory.parameters(phi) == pytest.approx(1e6, rel=0.05)
    assert 2 * phi.vocab_size * phi.hidden_size / memory.parameters(phi) == pytest.approx(1 / 5, abs=0.03)


def test_memory_of_the_demo_s_formats(tiny):
    """All that is not quantized stays fp32."""
    phi = replace(read_config(tiny), num_hidden_layers=4)
    matrices, rows = 4 * (4 * 128**2 + 2 * 128 * 512), 4 * (4 * 128 + 512 + 128)
    for name in ("int8", "nf4", "nf4-double", "nf2"):
        row = re.search(rf"(?m)^\| {name} \| (\d\.\d+) \| ([\d.]+) \|", (ROOT / "docs/quantization.md").read_text("utf-8"))
        bits = 8 + 32 * rows / matrices if name == "int8" else memory.BITS[name]
        assert float(row[2]) == pytest.approx(bits, abs=0.006)
        size = 4 * (memory.parameters(phi) - matrices) + bits / 8 * matrices
        assert float(row[1]) == pytest.approx(size / 1e6, abs=0.006)


@pytest.mark.parametrize("name", ["out/demo-dpo", "out/demo-sft-seed0"])
def test_the_intervals_of_the_page_on_measuring(name):
    """Wilson's, of shares of 1,425 pairs; those of debiased accuracy are (x - .2) / .6."""
    shares = [[float(x) for x in re.findall(r"[\d.]+", cell)] for cell in cells("docs/measuring.md", name)[1:]]
    raw, debiased, clean, _, longer, reference = shares
    for value, low, high in (raw, clean, longer, reference):
        made = share(value / 100 * 1425, 1425)
        assert [low, high] == pytest.approx([100 * made.low, 100 * made.high], abs=0.11)
    assert debiased == pytest.approx([(x - 20) / 0.6 for x in raw], abs=0.1)


def test_the_debiased_accuracy_of_the_readme():
    """A fifth of the labels is wrong, so a perfect model scores 80%: (a - .2) / (1 - .4)."""
    names = ("reward accuracy", "debiased accuracy")
    links = [f"[{name}](docs/glossary.md#{name.replace(' ', '-')})" for name in names]
    raw, debiased = (float(cells("README.md", link)[1].strip("%")) for link in links)
    assert debiased == pytest.approx((raw - 20) / 0.6, abs=0.1)
