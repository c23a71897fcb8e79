"""The block that lessons/quantization/codes.py quantizes by hand."""

import pytest
import torch

from lessons.quantization.codes import blockwise, use_of_codes
from quant import dequantize, levels, quantize_blockwise
from quant_kernels import unpack


def test_the_block_of_the_docstring():
    w = torch.tensor([0.1, -0.5, 0.02, 0.9, -1.2, 0.0, 0.33, 0.7])
    q = quantize_blockwise(w, "nf4", block=8)
    codes = [8, 3, 7, 14, 0, 7, 10, 13]
    assert unpack(q.packed, 4).tolist() == codes
    assert bytes(q.packed[:, 0].tolist()) == b"\x83\x7e\x07\xad"
    written = [0.0796, -0.3949, 0.0, 0.7230, -1.0, 0.0, 0.2461, 0.5626]
    torch.testing.assert_close(levels("nf4")[codes], torch.tensor(written), atol=5e-5, rtol=0)
    restored = [0.0955, -0.4739, 0.0, 0.8675, -1.2, 0.0, 0.2953, 0.6751]
    torch.testing.assert_close(dequantize(q), torch.tensor(restored), atol=5e-5, rtol=0)


def test_bits_count_the_scales():
    w = torch.randn(2**14)
    assert blockwise(w, "nf4", 64)[0] == 4.5
    assert blockwise(w, "nf4", 64, double=True)[0] == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**14
    )  # and the mean


def test_shares_of_codes_sum_to_one():
    for shares in use_of_codes(torch.randn(6400)):
        assert shares.shape == (16,) and shares.sum().item() == pytest.approx(1)
