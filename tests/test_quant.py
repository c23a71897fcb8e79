"""Number formats: by hand, by their error bounds, by identities; and the layers that hold them."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import quant_kernels
from quant import (
    CODES,
    FORMATS,
    FakeQuantize,
    FakeQuantLinear,
    FrozenLinear,
    Int8Linear,
    Linear4bit,
    bits,
    dequantize,
    dequantize_int8,
    levels,
    llm_int8,
    quantize_blockwise,
    quantize_int8,
    quantize_layer,
    quantize_model,
    round_to,
    scales,
    train_quantized,
)
from quant_kernels import pack, unpack
from runtime.files import InputError

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS_ONLY = [to for to in FORMATS if to != "llm.int8"]  # formats in which activations stay as they are


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_rmse(w, rounded):
    return ((w - rounded).norm() / w.norm()).item()


# --------------------------------------------------------------------------------------------------------- worked by hand


def test_the_row_of_the_docstring():
    w = torch.tensor([0.5, -1.0, 0.1, 0.75, -0.3, 0.0, 2.0, -0.05])
    q = quantize_blockwise(w, "nf4", block=8)
    assert q.absmax.tolist() == [2.0]
    assert unpack(q.packed, 4).tolist() == [10, 2, 8, 11, 5, 7, 15, 7]
    assert bytes(q.packed[:, 0].tolist()) == b"\xa2\x8b\x57\xf7"
    expected = [0.4922, -1.0501, 0.1592, 0.6758, -0.3695, 0.0, 2.0, 0.0]
    torch.testing.assert_close(dequantize(q), torch.tensor(expected), atol=5e-5, rtol=0)


def test_int8_by_hand():
    w = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-2.54, 2.54, 1.0]])
    codes, scale = quantize_int8(w)
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 127, 50]]
    torch.testing.assert_close(scale, torch.tensor([1.27, 0.0, 2.54]))
    torch.testing.assert_close(dequantize_int8(codes, scale)[0], torch.tensor([1.27, -0.5, 0.0]))


def test_int8_codes_are_rounded_to_even():
    codes, _ = quantize_int8(torch.tensor([[127.0, 62.5, 63.5, -62.5, -0.5]]))
    assert codes.tolist() == [[127, 62, 64, -62, 0]]


def test_int8_rows_of_zeros_and_of_numbers_next_to_zero():
    """127 / s is not infinite, so no code comes from infinity times 0. A row keeps its exactness down to s = 1e-36; one that
    is smaller is multiplied with 127 / 1e-36 all the same: 127 * 0.1 = 12.7."""
    w = torch.tensor([[0.0, 0.0, 0.0], [1e-36, -4e-37, 2e-37], [1e-37, -5e-38, 0.0], [-1e-45, 0.0, 0.0]])
    codes, scale = quantize_int8(w)
    assert codes.tolist() == [[0, 0, 0], [127, -51, 25], [13, -6, 0], [0, 0, 0]]
    assert torch.equal(scale, w.abs().amax(dim=1))
    rounded = dequantize_int8(codes, scale)
    assert torch.equal(rounded[0], w[0]) and (rounded - w)[1].abs().max() <= 1e-36 / 254 * 1.00001
    assert (rounded[2:].abs() <= w[2:].abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_have_the_int8_codes_of_the_same_values_in_fp32(dtype):
    w = normal(40, 50).to(dtype)
    codes, scale = quantize_int8(w)
    expected, expected_scale = quantize_int8(w.float())
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale) and scale.dtype == torch.float32


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_have_the_blockwise_codes_of_the_same_values_in_fp32(code, dtype):
    w = normal(40, 50).to(dtype)
    q, expected = quantize_blockwise(w, code), quantize_blockwise(w.float(), code)
    assert torch.equal(q.packed, expected.packed) and torch.equal(scales(q), scales(expected))
    assert q.absmax.dtype == torch.float32


def test_halfway_between_two_levels_the_lower_one_is_taken():
    """A code is the number of midpoints *below* w / s, and nf2's first lies at -1/2."""
    assert levels("nf2").tolist()[:2] == [-1, 0]
    q = quantize_blockwise(torch.tensor([-0.5, -0.4999, -0.5001, 1.0]), "nf2", block=4)
    assert unpack(q.packed, 2).tolist() == [0, 1, 0, 3]


def test_the_half_of_a_byte_that_is_left_over_holds_the_code_of_zero():
    assert quantize_blockwise(torch.tensor([1.0, -1.0, 1.0]), "nf4").packed.flatten().tolist() == [0xF0, 0xF7]
    assert quantize_blockwise(torch.tensor([1.0, -1.0, 1.0]), "int4").packed.flatten().tolist() == [0xE0, 0xE7]
    assert quantize_blockwise(torch.tensor([1.0, -1.0, 1.0]), "fp4").packed.flatten().tolist() == [0x3B, 0x30]


def test_a_block_of_zeros_has_the_code_of_zero():
    """Its scale of 0 would hide any other code, until a kernel or a reader of the file sees it."""
    for code, pair in (("nf4", 0x77), ("int4", 0x77), ("fp4", 0x00)):
        q = quantize_blockwise(torch.zeros(4), code, block=4)
        assert q.packed.flatten().tolist() == [pair, pair] and q.absmax.tolist() == [0], code


def test_int4_by_hand():
    w = torch.tensor([0.7, -0.7, 0.34, 0.36, -0.04, 0.0])
    assert unpack(quantize_blockwise(w, "int4", 6).packed, 4)[:6].tolist() == [14, 0, 10, 11, 7, 7]  # k + 7


# ----------------------------------------------------------------------------------------------------------------- tables


def test_nf4_is_the_table_of_the_paper():
    paper = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
        -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
        0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    assert torch.equal(levels("nf4"), torch.tensor([float(value) for value in paper.split()]))


def test_int4_levels_are_evenly_spaced_and_the_last_code_is_spare():
    assert levels("int4").tolist() == torch.tensor([*(k / 7 for k in range(-7, 8)), 1.0]).tolist()


@pytest.mark.parametrize("code", ["nf2", "nf4"])
def test_normal_floats_hold_zero_and_both_ends(code):
    table = levels(code)
    assert len(table) == 2 ** bits(code) and torch.equal(table, table.sort().values)
    assert table[0] == -1 and table[-1] == 1 and (table == 0).sum() == 1


def test_every_nf4_code_is_used_about_equally_often_by_normal_weights():
    """With one scale for all (no absmax per block), each inner code has about 1/16 of the mass: equal quantiles."""
    w = normal(400_000).clamp(-1.848, 1.848)  # 1.848 = Phi^-1(0.9677083), where the table's ends lie
    codes = unpack(quantize_blockwise(w, "nf4", block=400_000).packed, 4)
    share = torch.bincount(codes, minlength=16) / len(codes)
    assert share[1:15].min() > 0.055 and share[1:15].max() < 0.075


def test_fp4_is_e2m1():
    """Exponent e and mantissa m stand for 2^(e - 2) (1 + m/2) and, at e = 0, m/16; bitsandbytes numbers e 0, 3, 2, 1."""
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.equal(levels("fp4"), torch.tensor(magnitudes + [-v for v in magnitudes]) / 12)


def test_the_dynamic_map():
    table = levels("dynamic8")
    assert len(table) == 256 and torch.equal(table, table.sort().values)
    assert table[-1] == 1 and (table == 0).sum() == 1 and table[table > 0].min() < 1e-6
    for decade in range(7):  # 1, 2, 4 ... 64 levels a decade
        inside = (table > 10.0 ** (decade - 7)) & (table < 10.0 ** (decade - 6))
        assert inside.sum() == 2**decade


# ---------------------------------------------------------------------------------------------------------------- packing


def test_packing_by_hand():
    assert pack(torch.tensor([1, 15, 3], dtype=torch.uint8), 4, fill=7).tolist() == [0x1F, 0x37]
    assert pack(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 2, fill=0).tolist() == [0b00011011]


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_unpack_undoes_pack(width, n):
    codes = torch.randint(2**width, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed = pack(codes, width, fill=0)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(n * width / 8)
    assert torch.equal(unpack(packed, width)[:n].to(torch.uint8), codes)


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("block", [1, 3, 64, 1000])
def test_no_value_is_further_away_than_half_the_widest_gap(code, block):
    w = normal(10, 333) * torch.logspace(-4, 4, 10)[:, None]
    q = quantize_blockwise(w, code, block)
    gap = levels(code).sort().values.diff().max()
    bound = (scales(q) * gap / 2).repeat_interleave(block)[: w.numel()]
    assert ((w - dequantize(q)).flatten().abs() <= bound * (1 + 1e-5) + 1e-30).all()


def test_no_int8_value_is_further_away_than_half_a_step():
    w = normal(40, 50) * torch.logspace(-3, 3, 40)[:, None]
    codes, scale = quantize_int8(w)
    step = scale[:, None] / 127
    assert ((w - dequantize_int8(codes, scale)).abs() <= step / 2 * (1 + 1e-5)).all()


def gaussian_rmse(code, block):
    """sqrt E[(w - w~)^2] for w ~ N(0, 1), by integration. The largest of `block` values lies at a with density
    f(a) = n F(a)^(n-1) p(a), F and p those of |w|; it is hit exactly, and the others are normal within [-a, a]."""
    a = torch.linspace(0.5, 6, 1101).double()
    p = 2 * torch.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    mass = torch.erf(a / math.sqrt(2))
    density = block * mass ** (block - 1) * p
    table = levels(code).double().sort().values
    t = torch.linspace(-1, 1, 8001).double()
    off = t - table[torch.bucketize(t, (table[1:] + table[:-1]) / 2)]  # w / s - w~ / s
    w = a[:, None] * t
    inner = torch.trapezoid(torch.exp(-(w**2) / 2) / math.sqrt(2 * math.pi) * (a[:, None] * off) ** 2, w, dim=1) / mass
    return math.sqrt(torch.trapezoid(density * inner * (block - 1) / block, a))


@pytest.mark.parametrize(("code", "expected"), [("nf4", 0.092), ("fp4", 0.122), ("int4", 0.108), ("nf2", 0.564)])
def test_the_error_of_normal_weights_is_as_integrated(code, expected):
    w = normal(20_000, 64)
    measured = relative_rmse(w, round_to(w, code, block=64))
    assert measured == pytest.approx(gaussian_rmse(code, 64), rel=0.01)
    assert measured == pytest.approx(expected, rel=0.02)


def test_the_error_of_normal_weights_in_evenly_spaced_levels():
    """Uniform within a step: step / sqrt(12), with E[s^2] of the blocks or rows. The largest of n values is below a with
    probability P(|w| < a)^n, so E[s^2] is the integral of 2 a (1 - P(|w| < a)^n)."""
    a = torch.linspace(0, 10, 20_001).double()
    largest = {n: torch.trapezoid(2 * a * (1 - torch.erf(a / math.sqrt(2)) ** n), a).sqrt().item() for n in (64, 2560)}
    assert largest == pytest.approx({64: 2.63, 2560: 3.70}, abs=0.005)
    w = normal(20_000, 64)
    assert w.abs().amax(1).square().mean().sqrt() == pytest.approx(2.63, abs=0.02)
    assert relative_rmse(w, round_to(w, "int4", block=64)) == pytest.approx(2.63 / 7 / math.sqrt(12), rel=0.02)
    w = normal(500, 2560)
    predicted = w.abs().amax(1).square().mean().sqrt().item() / 127 / math.sqrt(12)
    assert relative_rmse(w, round_to(w, "int8")) == pytest.approx(predicted, rel=0.02) == pytest.approx(0.0084, rel=0.02)


def test_shorter_blocks_are_more_exact():
    w = normal(100, 4096)
    errors = [relative_rmse(w, round_to(w, "nf4", block=block)) for block in (4096, 256, 64, 16, 4)]
    assert errors == sorted(errors, reverse=True)


def bytes_of(q):
    return sum(part.nbytes for part in (q.packed, q.absmax, q.nested_absmax, q.offset) if part is not None)


def test_double_quantization_costs_a_quarter_of_the_scales_and_hardly_any_error():
    w = normal(512, 512)
    once, twice = quantize_blockwise(w, "nf4"), quantize_blockwise(w, "nf4", double=True)
    assert torch.equal(once.packed, twice.packed) and twice.offset == once.absmax.mean()
    assert 8 * bytes_of(once) / w.numel() == 4.5
    assert 8 * bytes_of(twice) / w.numel() == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)  # QLoRA: 0.373 bits saved
    bound = (once.absmax - once.absmax.mean()).abs().amax() * levels("dynamic8").diff().max() / 2
    assert ((scales(twice) - once.absmax).abs() <= bound * 1.0001).all()
    assert relative_rmse(w, dequantize(twice)) < 1.01 * relative_rmse(w, dequantize(once))


# ------------------------------------------------------------------------------------------------------------- odd input


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (65,), (3, 43), (2, 3, 5)])
def test_any_size_and_dtype_comes_back_in_its_shape_and_dtype(code, dtype, shape):
    w = normal(*shape, seed=sum(shape)).to(dtype)
    rounded = dequantize(quantize_blockwise(w, code, block=64))
    assert rounded.shape == w.shape and rounded.dtype == dtype
    assert relative_rmse(w.float(), rounded.float()) < (0.7 if code == "nf2" else 0.3)


@pytest.mark.parametrize("code", CODES)
def test_zeros_and_one_element_tails_are_exact(code):
    w = torch.zeros(130)
    assert torch.equal(dequantize(quantize_blockwise(w, code, 64)), w)
    w[129], w[5] = -3.7, 1e-42  # a subnormal number's reciprocal is infinite
    rounded = dequantize(quantize_blockwise(w, code, 1))
    assert torch.equal(rounded[128], w[128])
    assert rounded[129] == w[129]
    assert rounded.isfinite().all() and (rounded - w).abs().max() <= 3.7 * 0.0071


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("to", FORMATS)
def test_what_is_not_finite_is_an_error_that_names_the_layer(to, bad):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model[1][0].weight.data[3, 4] = bad
    with pytest.raises(InputError, match=r"1\.0\.weight contains NaN or infinity"):
        quantize_model(model, to)
    with pytest.raises(InputError, match=r"1\.0\.weight contains NaN or infinity"):
        train_quantized(model, to)
    assert not round_to(model[1][0].weight, to, check=False).isfinite().all()  # the loss will show it


def test_a_matrix_of_nothing_is_an_error():
    with pytest.raises(InputError, match="is empty"):
        quantize_blockwise(torch.zeros(0, 8))


# ------------------------------------------------------------------------------------------------------------- LLM.int8()


def test_llm_int8_is_exact_for_integers():
    """x and W already on their int8 grids (each row holds +-127): nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (5, 32), generator=generator).float() / 127 * 4
    w = torch.randint(-127, 128, (7, 32), generator=generator).float()
    x[:, 0], w[:, 0] = 4.0, 127.0
    torch.testing.assert_close(llm_int8(x, *quantize_int8(w), threshold=6.0), x @ w.T, rtol=1e-5, atol=1e-3)


def test_llm_int8_by_hand():
    """W is the identity, so y is what became of x. |x| = 6 is an outlier, so feature 0 is kept as it is for both tokens. The
    first token's scale leaves its outlier out: 1. The second has none of its own, so its scale is 5, though the 5 itself is
    kept: 127 / 5 = 25.4 -> 25 and 127 * 0.4 / 5 = 10.16 -> 10."""
    x = torch.tensor([[-6.0, 1.0, -0.3], [5.0, 1.0, 0.4]])
    expected = torch.tensor([[-6.0, 1.0, -38 / 127], [5.0, 25 * 5 / 127, 10 * 5 / 127]])
    codes, scale = quantize_int8(torch.eye(3))
    torch.testing.assert_close(llm_int8(x, codes, scale, threshold=6.0), expected)
    _, quantized = layer("llm.int8", into=96)
    x = normal(2, 3, 96, seed=2, scale=3.0)
    expected = llm_int8(x, quantized.weight, quantized.SCB, 6.0) + quantized.bias
    assert torch.equal(quantized(x), expected)
    assert not torch.equal(quantize_layer(quantized.dense(), quantized.bias, "int8")(x), expected)  # the weights alone
    low = llm_int8(x.bfloat16(), quantized.weight, quantized.SCB, 6.0)
    assert low.dtype == torch.bfloat16 and low.shape == (2, 3, 24)


@pytest.mark.parametrize(("rows", "out", "into"), [(1, 8, 16), (3, 7, 13), (20, 33, 64), (17, 8, 8)])
def test_the_padding_for_cuda_changes_no_product(rows, out, into):
    a, b = (torch.randint(-127, 128, (n, into), generator=torch.Generator().manual_seed(n)) for n in (rows, out))
    product = quant_kernels.padded_int32_product(a.to(torch.int8), b.to(torch.int8))
    assert product.dtype == torch.int32 and torch.equal(product.long(), a @ b.T)


def test_a_feature_with_an_outlier_is_kept_exact_for_all_tokens():
    """Two tokens, the first with an outlier in feature 0. Kept apart, it does not coarsen the scale of the others. The
    second token's feature 0 is kept exact as well, so its result depends on its neighbour."""
    x, w = normal(2, 64), normal(16, 64, seed=1, scale=0.1)
    x[0, 0] = 60.0
    codes, scale = quantize_int8(w)
    exact = x @ dequantize_int8(codes, scale).T
    y = llm_int8(x, codes, scale, threshold=6.0)
    first, second = relative_rmse(exact[0], y[0]), relative_rmse(exact[1], y[1])
    assert first < 0.02 and second < 0.02
    assert relative_rmse(exact[0], llm_int8(x, codes, scale, threshold=1e9)[0]) > 5 * first  # without the decomposition
    assert not torch.equal(y[1:], llm_int8(x[1:], codes, scale, threshold=6.0))


# ------------------------------------------------------------------------------------------------------------------- QAT


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_quantize_is_the_rounded_value_with_the_gradient_of_the_identity(to, dtype):
    w = normal(6, 96).to(dtype).requires_grad_()
    rounded = FakeQuantize.apply(w, to, 32)
    assert torch.equal(rounded, round_to(w.detach(), to, block=32)) and not torch.equal(rounded, w)
    weights = normal(6, 96, seed=1).to(dtype)
    (rounded * weights).sum().backward()
    assert torch.equal(w.grad, weights)


def test_a_format_is_its_code_and_its_options():
    w = normal(6, 96)
    assert torch.equal(round_to(w, "nf4-double"), dequantize(quantize_blockwise(w, double=True)))
    assert not torch.equal(round_to(w, "nf4-double"), round_to(w, "nf4"))
    assert torch.equal(round_to(w, "llm.int8"), dequantize_int8(*quantize_int8(w)))
    assert quantize_layer(w, None, "llm.int8").threshold == 6.0 and quantize_layer(w, None, "int8").threshold is None


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "nf4-double"])  # whose scales move
def test_quantizing_what_is_quantized_changes_nothing(to):
    for seed in range(20):
        once = round_to(normal(16, 200, seed=seed), to, block=48)
        assert torch.equal(round_to(once, to, block=48), once)


def test_a_fake_quantized_model_equals_its_quantized_one_and_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    fake = train_quantized(copy.deepcopy(model), "nf4", block=32)
    assert list(fake.state_dict()) == list(model.state_dict())
    x = normal(10, 32)
    torch.testing.assert_close(fake(x), quantize_model(copy.deepcopy(model), "nf4", block=32)(x))
    fake(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fake.parameters())


def test_the_output_layer_is_trained_as_it_is_unless_asked():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    fake = train_quantized(copy.deepcopy(model), "nf4")
    assert isinstance(fake["a"], FakeQuantLinear) and type(fake["lm_head"]) is nn.Linear
    assert isinstance(train_quantized(model, "nf4", skip=())["lm_head"], FakeQuantLinear)


# ---------------------------------------------------------------------------------------------------------------- layers


def layer(to, out=24, into=96, block=64):
    plain = nn.Linear(into, out)
    plain.weight.data, plain.bias.data = normal(out, into), normal(out, seed=1)
    return plain, quantize_layer(plain.weight, plain.bias, to, block)


@pytest.mark.parametrize("to", WEIGHTS_ONLY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_multiplies_with_its_rounded_weights_in_the_dtype_of_its_input(to, dtype):
    plain, quantized = layer(to)
    x = normal(2, 5, 96, seed=2).to(dtype)
    expected = F.linear(x.float(), round_to(plain.weight, to), plain.bias)
    y = quantized(x)
    assert y.dtype == dtype and y.shape == (2, 5, 24)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert relative_rmse(expected, y.float()) < tolerance
    assert relative_rmse(FrozenLinear.product(quantized, x).float(), quantized.product(x).float()) < tolerance  # one line


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_are_worked_on_in_parts(to, dtype, monkeypatch):
    """5 of 24 rows at a time, the last part 4: the same codes, and the same product."""
    plain, whole = layer(to, block=32)
    x = normal(3, 96, seed=2).to(dtype)
    y = whole(x)
    assert y.dtype == dtype
    monkeypatch.setattr(quant_kernels, "CHUNK", 5 * 96)
    _, parts = layer(to, block=32)
    for name, buffer in whole.named_buffers():
        assert torch.equal(dict(parts.named_buffers())[name], buffer), name
    torch.testing.assert_close(parts(x), y)
    if to in WEIGHTS_ONLY:
        expected = F.linear(x.float(), round_to(plain.weight, to, block=32), plain.bias)
        assert relative_rmse(expected, y.float()) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_a_layer_names_its_format():
    assert layer("nf4-double", block=32)[1].extra_repr() == "96, 24, bias=True, nf4, block=32, double"
    assert layer("int4")[1].extra_repr() == "96, 24, bias=True, int4, block=64"
    assert layer("int8")[1].extra_repr() == "96, 24, bias=True, int8"
    assert layer("llm.int8")[1].extra_repr() == "96, 24, bias=True, llm.int8, threshold=6.0"


def test_int8_products_in_bf16_are_rounded_when_they_are_scaled_and_not_before():
    """x picks one weight each, so the product with the codes is exact. In bf16 the scale itself would lose two digits."""
    _, quantized = layer("int8")
    quantized.bias = None
    expected = (quantized.weight * (quantized.SCB / 127)[:, None]).bfloat16().T
    assert torch.equal(quantized(torch.eye(96, dtype=torch.bfloat16)), expected)


@pytest.mark.parametrize("to", ["nf4", "nf4-double", "nf2"])
def test_layers_whose_blocks_cross_rows(to, monkeypatch):
    """In parts too: 64 rows of 33 end with a block, so 150 rows are three parts of 64, 64 and 22."""
    for out, into, block in ((7, 33, 64), (150, 33, 64), (150, 96, 64), (10, 96, 7)):
        plain, quantized = layer(to, out, into, block)
        x = normal(3, into)
        monkeypatch.setattr(quant_kernels, "CHUNK", 100)
        torch.testing.assert_close(quantized(x), F.linear(x, round_to(plain.weight, to, block), plain.bias))


@pytest.mark.parametrize("to", FORMATS)
def test_the_gradient_of_the_input_is_that_of_the_rounded_weights(to):
    plain, quantized = layer(to)
    x = normal(5, 96, seed=2).requires_grad_()
    weights = normal(5, 24, seed=3)
    (quantized(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ quantized.dense())
    torch.testing.assert_close(quantized.bias.grad, weights.sum(0))
    assert [name for name, _ in quantized.named_parameters()] == ["bias"]


@pytest.mark.parametrize("to", FORMATS)
def test_moving_copying_and_state_dict(to):
    _, quantized = layer(to)
    x = normal(4, 96, seed=2)
    y = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), y)
    _, other = layer(to)
    other.weight.zero_()
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), y)
    moved = copy.deepcopy(quantized).to(torch.bfloat16)  # the scales stay fp32
    assert moved.bias.dtype == torch.bfloat16 and torch.equal(moved.dense(), quantized.dense())


def test_under_autocast_a_layer_computes_in_autocasts_dtype():
    _, quantized = layer("nf4")
    x = normal(4, 96, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_quantize_model_leaves_the_output_layer_unless_asked():
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "lm_head": nn.Linear(64, 8)})
    assert isinstance(quantize_model(copy.deepcopy(model), "nf4")["a"], Linear4bit)
    assert type(quantize_model(copy.deepcopy(model), "nf4")["lm_head"]) is nn.Linear
    assert isinstance(quantize_model(copy.deepcopy(model), "int8", skip=())["lm_head"], Int8Linear)


@pytest.mark.parametrize("to", FORMATS)
def test_another_weight_in_the_same_format(to):
    plain, quantized = layer(to, block=32)
    w = normal(24, 96, seed=5)
    other = quantized.with_weight(w)
    assert torch.equal(other.dense(), quantize_layer(w, None, to, block=32).dense()) and torch.equal(other.bias, plain.bias)
    assert other.extra_repr() == quantized.extra_repr()
