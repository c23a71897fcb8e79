"""Our Phi beside transformers' PhiForCausalLM: same weights, same logits, same tokens, files that both read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from generate import generate
from model import Phi, PhiConfig, sibling_mask

ROOT = Path(__file__).resolve().parent.parent.parent

CONFIGS = {
    "Phi-2's heads (80 wide, 32 turned)": dict(hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4),
    "half of each head turned": dict(hidden_size=128, num_attention_heads=4, partial_rotary_factor=0.5),
    "grouped queries": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, partial_rotary_factor=0.5),
    "another rotary base": dict(hidden_size=96, num_attention_heads=3, partial_rotary_factor=1.0, rope_theta=500.0),
}
VOCABULARY = 512


def peer(seed=0, **config) -> transformers.PhiForCausalLM:
    """A random Phi of transformers with weights large enough for outputs that differ."""
    theta = config.pop("rope_theta", 10000.0)
    factor = config.pop("partial_rotary_factor")
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
    config = transformers.PhiConfig(
        **config, intermediate_size=200, num_hidden_layers=3, vocab_size=VOCABULARY, resid_pdrop=0.1, rope_parameters=rope
    )
    torch.manual_seed(seed)
    model = transformers.PhiForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08)
    return model


@pytest.fixture(params=CONFIGS, ids=str)
def pair(request, tmp_path):
    """(theirs, ours) with the same weights, which travelled through their save_pretrained."""
    theirs = peer(**CONFIGS[request.param])
    theirs.save_pretrained(tmp_path)
    return theirs, Phi.from_pretrained(tmp_path)


def relative_error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def tokens(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@torch.no_grad()
def test_logits_are_equal(pair, dtype, bound):
    theirs, ours = (model.to(dtype) for model in pair)
    ids = tokens(3, 40)
    assert relative_error(ours(ids), theirs(ids).logits) <= bound


def padded_logits(model, ids, mask):
    """Logits [B, T, V] where mask [B, T] is 1; padding (0) is neither counted in positions nor seen."""
    segment = mask - 1
    hidden = model.hidden(ids, (mask.cumsum(1) - 1).clamp(min=0), sibling_mask(segment, torch.float32))
    return model.lm_head(hidden)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_a_padded_batch_are_equal_on_its_tokens(pair, side):
    theirs, ours = pair
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, padding in enumerate((0, 7, 25)):
        mask[row, :padding] = 0
    mask = mask if side == "left" else mask.flip(1)
    real = mask.bool()
    assert relative_error(padded_logits(ours, ids, mask)[real], theirs(ids, attention_mask=mask).logits[real]) <= 1e-5


@torch.no_grad()
def test_where_two_rope_fields_disagree_the_same_one_is_read(tmp_path):
    theirs = peer(hidden_size=128, num_attention_heads=4, partial_rotary_factor=0.5)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
    (tmp_path / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.25, "rope_theta": 99.0}))
    loaded, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 20)
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert relative_error(Phi.from_pretrained(tmp_path)(ids), loaded(ids).logits) <= 1e-5


@torch.no_grad()
def test_what_we_save_loads_in_transformers_with_identical_logits(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = tokens(2, 20)
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    for name in ("hidden_size", "num_key_value_heads", "resid_pdrop", "layer_norm_eps", "rope_parameters"):
        assert getattr(loaded.config, name) == getattr(theirs.config, name)
    assert loaded.dtype == torch.float32


# Loads a checkpoint with transformers where there is no Triton; prints its logits, and which files of this project it found.
WITHOUT_TRITON = """
import json, sys
from pathlib import Path
sys.modules["triton"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.tensor([[3, 1, 4, 1, 5]])).logits
files = [Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()]
ours = [file.name for file in files if file.is_absolute() and file.parent == Path.cwd()]
print(json.dumps([logits.tolist(), ours]))
"""


@torch.no_grad()
def test_from_the_project_s_own_directory_transformers_finds_its_own_packages(tmp_path):
    """It imports optional packages if they are there, and here our files come first: one with such a package's name would
    be taken for it."""
    ours = Phi(PhiConfig(VOCABULARY, 64, 128, num_hidden_layers=1, num_attention_heads=2)).init_weights(0)
    ours.save_pretrained(tmp_path)
    command = [sys.executable, "-B", "-c", WITHOUT_TRITON, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    logits, found = json.loads(process.stdout.splitlines()[-1])
    assert relative_error(ours(torch.tensor([[3, 1, 4, 1, 5]])), torch.tensor(logits)) <= 1e-5
    assert not found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_their_shards_in_any_dtype_load_in_ours(tmp_path, dtype):
    theirs = peer(**CONFIGS["Phi-2's heads (80 wide, 32 turned)"]).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tokens(2, 20)
    assert relative_error(Phi.from_pretrained(tmp_path)(ids), theirs.float()(ids).logits) <= 1e-5


@pytest.mark.parametrize("stop", [(), (3, 17, 99, 200, 301, 402)], ids=["no stop", "stop tokens"])
def test_greedy_tokens_of_20_prompts_in_one_batch_are_identical(pair, stop):
    theirs, ours = pair
    lengths = torch.randint(2, 40, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [tokens(n).tolist() for n in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=list(stop) or None
    )[:, width:].tolist()
    expected = [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in out]
    assert generate(ours, prompts, max_new_tokens=24, stop_tokens=stop) == expected


def test_parameters_have_the_same_names_and_shapes_as_theirs(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
