"""What `python -m bench` does around its measurements: rows, targets, processes, missing peers, operations by hand."""

import json
import math
import os
import re
import sys

import pytest
import torch

from bench import __main__ as bench
from bench import inference, timing, training
from bench.workloads import TINY, forward_parts, pairs, peak, training_operations, write_models
from data import Example
from model import Phi, PhiConfig
from runtime.files import InputError

SHAPE = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=11)
CONFIG = PhiConfig(**SHAPE, partial_rotary_factor=0.5)
PAIR = Example(prompt=[1, 2], completions=[[3, 4], [5]])


def test_a_rows_target_is_of_the_ratio_or_of_ours():
    assert timing.row("a", "s", 1.0, 5.0, "<= 0.25")["met"] is True
    assert timing.row("a", "s", 2.0, 5.0, "<= 0.25")["met"] is False
    assert timing.row("a", "tokens/s", 3.0, 2.0, ">= 1.5")["met"] is True
    assert timing.row("a", "s", 4.0, 1.0, "ours <= 5")["met"] is True
    assert timing.row("a", "s", 4.0, 1.0)["met"] is None
    assert timing.row("a", "s", None, 1.0, "<= 1")["met"] is None, "without a number there is nothing to meet"


def test_the_table_is_markdown_with_targets_and_notes():
    rows = [
        timing.row("step", "s", 1.0, 5.0, "<= 0.25"),
        timing.row("speed", "pairs/s", 2.0, None, ">= 1.5", note="TRL failed: out of memory"),
        timing.row("  tokens", "tokens/s", 3.0, None, "ours >= 4", note="TRL failed: out of memory"),
    ]
    assert timing.table(rows).splitlines() == [
        "| case | unit | ours | peer | ours / peer | target |",
        "|---|---|---:|---:|---:|---|",
        "| step | s | 1 | 5 | 0.20 | <= 0.25, met |",
        "| speed | pairs/s | 2 | - | - | >= 1.5 |",
        "|   tokens | tokens/s | 3 | - | - | ours >= 4, missed |",
        "",
        "- speed: TRL failed: out of memory",
    ]


def test_contenders_take_turns_and_the_first_round_does_not_count():
    order = []
    seconds = timing.medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" * 4 and set(seconds) == {"a", "b"}
    assert timing.medians({"a": lambda: None, "missing": None}, 1)["missing"] is None


def test_the_exponent_of_a_power_law():
    assert timing.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert timing.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


def test_operations_by_hand():
    """N = 3 (4 * 64 + 2 * 8 * 16) = 1,536 weights, T = 5; a token sees itself and what is before it but for the sibling: 13
    pairs; three tokens are predicted."""
    layers, attention, output = 2 * 1536 * 5, 4 * 3 * 8 * 13, 2 * 11 * 8 * 3
    assert forward_parts(CONFIG, [PAIR]) == (layers, attention, output)
    assert forward_parts(CONFIG, [PAIR, PAIR]) == (2 * layers, 2 * attention, 2 * output)
    assert forward_parts(CONFIG, [PAIR], all_logits=True)[2] == 2 * 11 * 8 * 5
    assert training_operations(CONFIG, [PAIR]) == 3 * (layers + attention + output)
    assert training_operations(CONFIG, [PAIR], frozen=True) == 2 * layers + 3 * attention + 2 * output


def test_operations_are_those_that_torch_counts():
    """One completion, all logits: torch's own counter sees the same products (and attention's whole square)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Phi(CONFIG).init_weights(seed=0)
    ids = [1, 2, 3, 4, 5, 6]
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([ids]))
    layers, attention, output = forward_parts(CONFIG, [Example(ids[:2], [ids[2:]])], all_logits=True)
    square = attention * 36 // 21  # 6 x 6 pairs where 21 are needed
    assert counter.get_total_flops() in (layers + output, layers + output + square)  # some versions do not see attention


def test_the_peak_goes_by_the_cards_name():
    assert peak("NVIDIA H100 80GB HBM3") == 989e12 and peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12 and peak("Voodoo 3") is None


def test_the_hours_on_the_page_are_those_of_its_formula():
    """20,000 pairs of 600 tokens, 3 epochs, 40% of the peak; k = 6 with adapters and recomputed activations, 8 without
    adapters, and 2/3 for the reference."""
    page = (timing.ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (.+) \| `(\w+)` \| (\d+) \| ([\d.]+) \| estimated \|$", page)
    assert len(rows) == 5
    for name, preset, top, hours in rows:
        k = (8 if preset == "80gb" else 6) + 2 / 3
        assert peak(name) == float(top) * 1e12
        assert float(hours) == pytest.approx(20_000 * 600 * 3 * k * 2.78e9 / (0.4 * peak(name)) / 3600, abs=0.05)


def test_a_decoding_step_reads_all_weights_but_the_embedding():
    weights = sum(p.numel() for p in Phi(CONFIG).parameters()) - 11 * 8
    assert inference.read_bytes(Phi(CONFIG)) == 4 * weights


def test_pairs_have_lengths_in_their_ranges_and_an_sft_example_is_the_pairs_first_half():
    drawn = pairs(vocab_size=50, count=20, prompt=(3, 5), completion=(2, 9))
    assert {len(e.prompt) for e in drawn} == {3, 4, 5}
    assert {len(c) for e in drawn for c in e.completions} == set(range(2, 10))
    single = pairs(vocab_size=50, count=20, prompt=(3, 5), completion=(2, 9), completions=1)
    assert [(e.prompt, e.completions) for e in single] == [(e.prompt, e.completions[:1]) for e in drawn]


def test_our_step_starts_from_no_gradient_and_a_margin_of_0(tmp_path):
    """With the policy as its own reference every margin is 0, and the robust loss ln 2."""
    write_models(tmp_path, TINY)
    setup = training.Setup("dpo", str(tmp_path), "cpu", count=3, prompt=(5, 9), completion=(3, 8))
    step, model = training.make_step("ours", setup)
    assert step() == pytest.approx(0.6931472, abs=1e-5)
    first = model.lm_head.weight.grad.clone()
    step()
    assert torch.equal(model.lm_head.weight.grad, first) and first.abs().max() > 0


def test_steps_that_differ_are_not_timed():
    same = (1.0, {"w": torch.ones(2)})
    training.same_steps(same, same, 1e-5)
    for other in ((1.0, {"w": torch.full((2,), 1.1)}), (1.1, {"w": torch.ones(2)}), (1.0, {"v": torch.ones(2)})):
        with pytest.raises(AssertionError, match="do not compute the same step|keys of the mappings"):
            training.same_steps(same, other, 1e-5)


PEERS = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "xllamacpp")


@pytest.mark.slow
def test_without_the_peers_every_case_has_its_rows(tmp_path, monkeypatch, capsys):
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is a ModuleNotFoundError
    cases = [name for name in bench.ON_CPU if name not in ("lora", "start")]
    assert bench.main(["--only", *cases, "--json", str(tmp_path / "b.json"), "--small"]) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert not written["failed"] and "torch" in written["hardware"]
    rows = {row["case"]: row for row in written["rows"]}
    assert len(rows) == len(written["rows"]) == 38
    assert all(row["ours"] is not None for row in rows.values())
    missing = "is not installed; pip install -r requirements-peers.txt"
    alone = {case for case, row in rows.items() if row["peer"] is None and missing in row["note"]}
    assert {case for case in rows if case.endswith(("transformers", "bitsandbytes", "cached", "live", "memory"))} <= alone
    told = capsys.readouterr()
    assert "peft is not installed" not in told.err and "transformers is not installed" in told.out


@pytest.mark.slow
def test_the_first_steps_of_the_demo_are_found(tmp_path):
    assert bench.main(["--only", "start", "--json", str(tmp_path / "b.json"), "--small"]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["case"][:9] for row in rows] == ["start of ", "  with an", "  the sam"]
    assert all(0.1 < row["ours"] < 120 for row in rows)


def test_a_case_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def failing(bench):
        raise InputError("the two differ")

    monkeypatch.setitem(bench.ON_CPU, "forward", failing)
    monkeypatch.setitem(bench.ON_CPU, "sft", lambda bench: [timing.row("step", "s", 1.0, 2.0)])
    assert bench.main(["--only", "forward", "sft", "--json", str(tmp_path / "b.json"), "--small"]) == 1
    told = capsys.readouterr()
    assert "error: forward: the two differ" in told.err
    assert "| step | s | 1 | 2 | 0.50 | - |" in told.out
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["rows"][0]["ratio"] == 0.5 and list(written["failed"]) == ["forward"]


@pytest.mark.parametrize("flags", [["--only", "nothing"], ["--nonsense"]])
def test_wrong_flags_are_told(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(flags)
    assert ended.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_an_error_of_one_line(capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: torch sees no CUDA GPU here; leave out --device cuda\n"


GPU_FIELDS = {  # of a row, besides those that every row has
    "attention": {"ms", "ms_new_length", "difference"},
    "float32": {"us", "error"},
    "int8": {"us", "error"},
    "nf4": {"us", "error"},
    "adamw": {"bytes_of_state", "difference"},
    "adamw8bit": {"bytes_of_state", "difference"},
    "DPO": {"seconds", "GB", "loss", "drift", "busy", "kernels"},
}


def test_the_gpu_cases_print_a_line_of_json_for_each_row(capfd):
    """In tiny on the CPU, without the peers."""
    assert bench.main(["--small", "--quick"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    first = [re.split("[ ,]", row["case"])[0] for row in rows if not row["case"].startswith(" ")]
    assert set(first) == {*GPU_FIELDS, "copy", "decode"}
    for row in rows:
        assert row["card"] and row["torch"] == torch.__version__ and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert GPU_FIELDS.get(re.split("[ ,]", row["case"])[0], set()) <= row.keys()
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert row["ours"] > 0 and all(map(math.isfinite, numbers))
    steps = [row for row in rows if row["case"].startswith("DPO")]
    assert len(steps) == len(training.FULL_SETUPS)
    assert all(len(row["kernels"]) == 5 and 0 < sum(row["kernels"].values()) <= 1 and row["drift"] < 0.05 for row in steps)
    products = [row for row in rows if "error" in row]
    assert len(products) == 4 * 3 and all(row["error"] < 1e-5 for row in products)  # in fp32
    by_name = {row["case"].partition(",")[0]: row for row in rows}
    assert by_name["adamw"]["bytes_of_state"] == pytest.approx(8, rel=1e-3)
    assert by_name["adamw8bit"]["bytes_of_state"] == pytest.approx(2.03, rel=0.05)


def test_a_peer_that_is_left_out_is_not_started():
    """Its function is never called: this one would end the process."""
    assert timing.attempt(os._exit, 1, unless="left out by --quick") == (None, "left out by --quick")


def test_what_fails_alone_is_an_error_of_one_line():
    with pytest.raises(InputError, match="TypeError: sorted expected"):
        timing.alone(sorted, "cuda", key=None)


@pytest.mark.slow
def test_a_worker_says_in_one_line_why_it_failed():
    with pytest.raises(InputError, match="^StatisticsError"):
        timing.in_worker(timing.exponent, sizes=[1], costs=[2])
    with pytest.raises(InputError, match="its process was killed; out of memory"):
        timing.in_worker(os._exit, status=1)


def test_the_peak_is_that_of_the_run_alone():
    """40 MB are held while it runs, and freed before it ends."""
    before, most, result = timing.held_and_peak(lambda: float(torch.ones(10**7).sum()), "cpu")
    assert result == 1e7 and most - before == pytest.approx(40e6, rel=0.2)


def test_the_first_step_of_a_run_that_ends_without_one_is_an_error(tmp_path):
    flags = ["--stage", "sft", "--lr", "0", "--out", str(tmp_path)]
    with pytest.raises(InputError, match="came to no first step: error: --lr"):
        timing.first_step(flags, tmp_path / "demo-sft")
