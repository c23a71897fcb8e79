"""AdamW in fp32 and in 8 bits: steps by hand, how near they stay to each other, and what is saved."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model import Phi
from quant import CODES, levels, midpoints, quantize_blockwise
from quant_kernels import nearest
from runtime.files import InputError
from runtime.flags import settle
from runtime.optimizer import AdamW8bit, adamw, in_8_bits, load_optimizer, make_optimizer, save_optimizer
from train import learning_rate

UNSIGNED = "dynamic8-unsigned"


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(optimizer, parameters, gradients):
    """One step for each list of gradients."""
    for grads in gradients:
        for p, grad in zip(parameters, grads):
            p.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()


def settings(**changes):
    return settle("dpo", {"lr": 1e-2, "adam_beta2": 0.99, "weight_decay": 0.1, **changes}).settings


# --------------------------------------------------------------------------------------------------------- worked by hand


@pytest.mark.parametrize("make", [AdamW8bit, adamw])
def test_two_steps_of_adamw_by_hand(make):
    """g = 2, then 1, with b1 = 0.9, b2 = 0.99, lr = 0.1, decay 0.5:
    step 1: m = 0.2, v = 0.04, m^ = 2, v^ = 4:        w = 0.95 * 1 - 0.1 * 2 / 2 = 0.85
    step 2: m = 0.28, v = 0.0496, m^ = 0.28 / 0.19, v^ = 0.0496 / 0.0199:
            w = 0.95 * 0.85 - 0.1 * 1.47368 / 1.57876 = 0.80750 - 0.09334 = 0.71416"""
    w = nn.Parameter(torch.ones(1))
    optimizer = make([{"params": [w]}], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    steps(optimizer, [w], [[torch.tensor([2.0])]])
    torch.testing.assert_close(w.data, torch.tensor([0.85]))
    steps(optimizer, [w], [[torch.tensor([1.0])]])
    torch.testing.assert_close(w.data, torch.tensor([0.714157]))


def test_two_steps_in_8_bits_by_hand():
    """A block with gradients 1, 0.5, 0.01 and zeros. After the first step m = g / 10 and v = g^2 / 1000, and of the block's
    largest they are 1, 0.5, 0.01 and 1, 0.25, 0.0001. Levels of the decade 0.1 .. 1 are 0.1 + 0.9 (k + 1/2) / 64, in the
    unsigned map / 128: the nearest to 0.5 is k = 28, 0.50078125, to 0.25 k = 21, 0.251171875. Of the decade 0.01 .. 0.1 the
    first is 0.01 + 0.09 / 64 = 0.01140625; 0.01 lies nearer to the last of the decade below, which has 16 levels:
    0.01 (1 - 0.9 / 32) = 0.00971875. And 0.0001 lies nearest to 0.0001 (1 - 0.9 / 16) = 0.000094375. The second step has
    gradient 0."""
    w = nn.Parameter(torch.zeros(16, 256))
    optimizer = AdamW8bit([w], lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    g = torch.zeros(16, 256)
    g[3, :3] = torch.tensor([1.0, 0.5, 0.01])
    steps(optimizer, [w], [[g]])
    torch.testing.assert_close(w.data[3, :3], torch.full((3,), -0.1), rtol=2e-6, atol=0)  # the first is lr sign(g)
    state = optimizer.state[w]
    m = levels("dynamic8")[state["exp_avg"][3, :4].long()]
    v = levels(UNSIGNED)[state["exp_avg_sq"][3, :4].long()]
    torch.testing.assert_close(m, torch.tensor([1, 0.50078125, 0.00971875, 0]))
    torch.testing.assert_close(v, torch.tensor([1, 0.251171875, 0.000094375, 0]))
    torch.testing.assert_close(state["exp_avg_absmax"][3], torch.tensor([0.1]))
    torch.testing.assert_close(state["exp_avg_sq_absmax"][3], torch.tensor([0.001]))
    before = w.data[3, :3].clone()
    steps(optimizer, [w], [[torch.zeros_like(g)]])
    m_hat = 0.9 * 0.1 * m[:3] / (1 - 0.9**2)
    v_hat = 0.999 * 0.001 * v[:3] / (1 - 0.999**2)
    torch.testing.assert_close(w.data[3, :3] - before, -0.1 * m_hat / v_hat.sqrt(), rtol=1e-5, atol=0)
    assert (w.data[:3] == 0).all() and (w.data[3, 3:] == 0).all()


# ------------------------------------------------------------------------------------------------------ levels and codes


def test_the_unsigned_map():
    table = levels(UNSIGNED)
    assert len(table) == 256 and torch.equal(table, table.sort().values) and len(table.unique()) == 256
    assert table[0] == 0 and table[-1] == 1 and table[1] == pytest.approx(3.25e-7)
    for decade in range(7):  # 2, 4, 8 ... 128 levels a decade
        inside = (table > 10.0 ** (decade - 7)) & (table < 10.0 ** (decade - 6))
        assert inside.sum() == 2 ** (decade + 1)
    assert UNSIGNED not in CODES


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4", "nf2", "dynamic8", UNSIGNED])
def test_the_look_ups_find_what_a_search_finds(code):
    """For the midpoints, their neighbours in fp32, both ends of every cell within [-1, 1], and 100,000 other numbers."""
    table = levels(code).sort().values
    between = (table[1:] + table[:-1]) / 2
    cells = torch.arange(0, 2**15) * 2**16
    ends = torch.cat((cells, cells + 2**16 - 1)).to(torch.int32).view(torch.float32)
    ends = ends[ends <= 1]
    far = torch.full_like(between, 9)
    x = torch.cat((between, between.nextafter(far), between.nextafter(-far), ends, -ends, normal(100_000).clamp(-1, 1)))
    x = x if table.min() < 0 else x.abs()
    found = torch.bucketize(x, between)
    if code == UNSIGNED:
        found[x > 0] = found[x > 0].clamp(min=1)  # 0 is for 0 alone
    assert torch.equal(nearest(x, midpoints(code)).long(), found)


@pytest.mark.parametrize("shape", [(16, 256), (20, 5, 512), (64, 65), (3, 400_001)], ids=str)
def test_codes_and_scales_are_those_of_quantize_blockwise(shape):
    """Rows of whole blocks and others, the last in several slices. After the first step m = (1 - b1) g."""
    w, g = nn.Parameter(torch.zeros(shape)), normal(*shape)
    optimizer = AdamW8bit([w])
    steps(optimizer, [w], [[g]])
    state, rows, values = optimizer.state[w], shape[0], g.numel()
    expected = quantize_blockwise(torch.zeros(shape).add(g, alpha=1 - 0.9), "dynamic8", block=256)
    assert torch.equal(state["exp_avg"].flatten(), expected.packed[:, 0])
    assert torch.equal(state["exp_avg_absmax"].flatten(), expected.absmax)
    whole = values // rows % 256 == 0
    assert state["exp_avg_sq"].shape == ((rows, values // rows) if whole else (values,))
    assert state["exp_avg_sq_absmax"].shape == ((rows, values // rows // 256) if whole else (math.ceil(values / 256),))


def test_the_state_takes_two_bytes_a_value_and_its_scales():
    w = nn.Parameter(torch.zeros(512, 2560))
    size = sum(value.nbytes for key, value in AdamW8bit([w]).state[w].items() if key != "step")
    assert size == w.numel() * (2 + 2 * 4 / 256)
    assert sum(value.nbytes for key, value in adamw([{"params": [w]}]).state[w].items() if key != "step") == 8 * w.numel()


@pytest.mark.parametrize(("shape", "expected"), [((63, 65), False), ((64, 64), True), ((51_200,), False), ((4096, 1), True)])
def test_small_parameters_and_vectors_keep_fp32_moments(shape, expected):
    w = nn.Parameter(torch.zeros(shape))
    assert in_8_bits(w) == expected
    assert (AdamW8bit([w]).state[w]["exp_avg"].dtype == torch.uint8) == expected


# ------------------------------------------------------------------------------------------------------------ trajectories


def test_a_model_trained_in_8_bits_stays_near_one_trained_in_fp32():
    """Regression on a teacher's outputs: the loss falls to a few percent with both, and the weights end up near each other,
    but not in the same place."""
    x, losses, ends = normal(256, 64), {}, {}
    torch.manual_seed(0)
    y = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))(x).detach()
    for make in (adamw, AdamW8bit):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer, losses[make] = make([{"params": list(model.parameters())}], lr=3e-3, weight_decay=0.0), []
        for _ in range(100):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            losses[make].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        ends[make] = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert losses[adamw][-1] < 0.05 * losses[adamw][0]
    assert losses[AdamW8bit] == pytest.approx(losses[adamw], rel=0.1)
    apart = (ends[AdamW8bit] - ends[adamw]).norm() / ends[adamw].norm()
    assert 1e-4 < apart < 0.05


def test_values_whose_gradients_come_and_go_make_no_huge_steps():
    """As in embeddings of rare tokens: a row has gradients in a tenth of the steps. With v rounded to 0 wherever 0 is the
    nearest level, some values would be thousands of learning rates away."""
    a, b = (nn.Parameter(torch.zeros(64, 2560)) for _ in range(2))
    gradients = [[normal(64, 2560, seed=i) * (torch.arange(64) % 10 == i % 10)[:, None]] for i in range(40)]
    steps(adamw([{"params": [a]}], lr=1.0, weight_decay=0.0), [a], gradients)
    steps(AdamW8bit([b], lr=1.0, weight_decay=0.0), [b], gradients)
    assert a.abs().max() < 40 and (a - b).abs().max() < 10
    assert (a - b).norm() < 0.1 * a.norm()


# ---------------------------------------------------------------------------------------------------------------- sharded


def test_rows_stepped_apart_are_the_rows_stepped_together():
    """So a process that holds some rows of a parameter holds the same rows of its state. (4,200 rows are two slices.)"""
    together = nn.Parameter(normal(4200, 256))
    apart = [nn.Parameter(rows.clone()) for rows in together.detach().split([4000, 200])]
    gradients = [normal(4200, 256, seed=seed) for seed in (1, 2, 3)]
    whole, parts = AdamW8bit([together]), AdamW8bit(apart)
    steps(whole, [together], [[g] for g in gradients])
    steps(parts, apart, [g.split([4000, 200]) for g in gradients])
    assert torch.equal(together, torch.cat([p.detach() for p in apart]))
    for key in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"):
        assert torch.equal(whole.state[together][key], torch.cat([parts.state[p][key] for p in apart]))


@pytest.fixture
def mesh():
    """A job of one process: its shards are whole, but they are DTensors as in a larger one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_are_stepped_as_tensors_are(mesh):
    plain = [nn.Parameter(normal(16, 512)), nn.Parameter(normal(16))]
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    gradients = [[normal(16, 512, seed=seed), normal(16, seed=seed)] for seed in (1, 2)]
    ours, theirs = AdamW8bit(plain), AdamW8bit(sharded)
    steps(ours, plain, gradients)
    steps(theirs, sharded, [[distribute_tensor(g, mesh, [Shard(0)]) for g in grads] for grads in gradients])
    for p, q in zip(plain, sharded):
        assert isinstance(q, DTensor) and torch.equal(p, q.to_local())
        for key, value in ours.state[p].items():
            assert torch.equal(value, theirs.state[q][key].full_tensor() if value.ndim else theirs.state[q][key])


def test_sharded_rows_must_be_whole_blocks(mesh):
    w = nn.Parameter(distribute_tensor(normal(64, 100), mesh, [Shard(0)]))
    with pytest.raises(InputError, match="on several GPUs needs weights whose rows are a multiple of 256 values"):
        AdamW8bit([w])


# ---------------------------------------------------------------------------------------------------------- make_optimizer


def test_it_is_pytorchs_adamw_with_its_state_made_at_once(tiny):
    """Bit for bit over three steps with three learning rates; PyTorch makes its state in the first step."""
    ours, theirs = Phi.from_pretrained(tiny), Phi.from_pretrained(tiny)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizers = {
        ours: make_optimizer(ours, settings()),
        theirs: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), fused=True),
    }
    for step in range(3):
        for model, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)  # as the training loop sets it
            parameters = list(model.parameters())
            steps(optimizer, parameters, [[normal(*p.shape, seed=step) for p in parameters]])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_only_what_requires_gradients_is_moved_and_only_matrices_decay(tiny, optimizer):
    model = Phi.from_pretrained(tiny).requires_grad_(False)
    trained = [model.lm_head.weight, model.lm_head.bias]
    for p in trained:
        p.requires_grad_()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, settings(optimizer=optimizer))
    steps(optimizer, trained, [[torch.zeros_like(p) for p in trained]])
    expected = {name: p * (1 - 1e-2 * 0.1) if name == "lm_head.weight" else p for name, p in start.items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.data, expected[name])
        assert (p in optimizer.state) == p.requires_grad
    model.lm_head.bias.requires_grad_(False)  # as under adapters, which are matrices alone
    make_optimizer(model, settings(optimizer="adamw"))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_the_whole_state_is_there_from_the_start(tiny, kind):
    """Zeros of every parameter that is trained, so that a checkpoint can be checked against it before the first step."""
    model = Phi.from_pretrained(tiny)
    optimizer = make_optimizer(model, settings(optimizer=kind))
    for p in model.parameters():
        scales = {"exp_avg_absmax", "exp_avg_sq_absmax"} if kind == "adamw8bit" and in_8_bits(p) else set()
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} | scales
        assert not any(value.any() for value in optimizer.state[p].values())
        assert optimizer.state[p]["step"].shape == () and optimizer.state[p]["step"].dtype == torch.float32


def test_a_parameter_without_a_gradient_is_left_alone():
    """No decay either, and its count of steps stays: a later first step is corrected as a first one."""
    for make in (AdamW8bit, adamw):
        still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = make([{"params": [still, moved]}], lr=0.1, weight_decay=0.5)
        moved.grad = torch.ones(2)
        optimizer.step()
        assert still.tolist() == [1, 1] and moved[0] < 1
        assert optimizer.state[still]["step"] == 0 and optimizer.state[moved]["step"] == 1


# ------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_saved_loaded_and_continued_equals_uninterrupted_bit_for_bit(tiny, tmp_path, optimizer):
    model = Phi.from_pretrained(tiny)
    model.model.embed_tokens.weight.requires_grad_(False)  # has no state, and needs none
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [[normal(*p.shape, seed=seed) for p in parameters] for seed in range(4)]
    first = make_optimizer(model, settings(optimizer=optimizer))
    steps(first, parameters, gradients[:2])
    model.save_pretrained(tmp_path)
    save_optimizer(tmp_path, model, first)
    steps(first, parameters, gradients[2:])

    resumed = Phi.from_pretrained(tmp_path)
    resumed.model.embed_tokens.weight.requires_grad_(False)
    second = make_optimizer(resumed, settings(optimizer=optimizer))
    load_optimizer(tmp_path, resumed, second)
    steps(second, [p for p in resumed.parameters() if p.requires_grad], gradients[2:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in first.state[p].items() if p.requires_grad else ():
            assert torch.equal(value, second.state[q][key])


def test_the_file_of_a_checkpoint_names_moment_and_parameter(tiny, tmp_path):
    """Checkpoints of earlier versions are read, so these names stay."""
    model = Phi.from_pretrained(tiny)
    save_optimizer(tmp_path, model, make_optimizer(model, settings(optimizer="adamw8bit")))
    stored = load_file(tmp_path / "optimizer.safetensors")
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert {f"{key}.lm_head.bias" for key in keys} == {name for name in stored if name.endswith(".lm_head.bias")}
    assert stored["exp_avg.lm_head.bias"].dtype == torch.float32 and stored["exp_avg.lm_head.weight"].dtype == torch.uint8
    rows, row = model.lm_head.weight.shape
    assert row % 256 and stored["exp_avg_absmax.lm_head.weight"].shape == (math.ceil(rows * row / 256),)


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ("adamw8bit", "adamw", r"has exp_avg as U8 \[.*\] for model\.embed_tokens\.weight"),
        ("adamw", "adamw8bit", r"has exp_avg as F32 \[.*\] for model\.embed_tokens\.weight"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_an_error_that_names_file_and_parameter(tiny, tmp_path, written, read, message):
    model = Phi.from_pretrained(tiny)
    save_optimizer(tmp_path, model, make_optimizer(model, settings(optimizer=written)))
    with pytest.raises(InputError, match=r"optimizer\.safetensors " + message):
        load_optimizer(tmp_path, model, make_optimizer(model, settings(optimizer=read)))
    model.lm_head.bias.requires_grad_(False)
    save_optimizer(tmp_path, model, make_optimizer(model, settings()))
    model.lm_head.bias.requires_grad_()
    with pytest.raises(InputError, match=r"has no step for lm_head\.bias"):
        load_optimizer(tmp_path, model, make_optimizer(model, settings()))


# ----------------------------------------------------------------------------------------------------- learning rate


def test_learning_rates_by_hand():
    """lr 1, two steps of warm-up, six in all: 1/2, 1, then from 1 at step 2 to 0 at step 6, which is never made."""
    linear = settle("dpo", {"lr": 1.0, "warmup_steps": 2, "schedule": "linear"}).settings
    assert [learning_rate(step, 6, linear) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = settle("dpo", {"lr": 1.0, "warmup_steps": 0, "schedule": "cosine"}).settings
    assert [learning_rate(step, 4, cosine) for step in range(4)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
