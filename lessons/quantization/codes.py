"""Which 16 numbers, and what does a bit buy?

A block of weights is stored as one scale, s = max |w|, and for each weight the number of the level nearest to w / s. The
formats differ in their levels. Eight weights by hand, one block with s = 1.2:

    w             0.1      -0.5      0.02     0.9      -1.2     0.0      0.33     0.7
    w / s         0.0833   -0.4167   0.0167   0.75     -1.0     0.0      0.275    0.5833
    NF4 level     0.0796   -0.3949   0.0      0.7230   -1.0     0.0      0.2461   0.5626
    code          8        3         7        14       0        7        10       13
    two a byte         0x83               0x7e              0x07              0xad
    w ~           0.0955   -0.4739   0.0      0.8675   -1.2     0.0      0.2953   0.6751

**Where NF4's numbers come from** (QLoRA, Dettmers et al. 2023). Weights look like draws from a normal distribution, so the
levels are normal quantiles, dense where weights are dense: eight for positive and seven for negative numbers, at evenly
spaced probabilities from p_max = 0.9677083 down to 1/2, divided by the largest; and a zero. Zero has to be a level, or
padding and pruned weights would come back as something else. 16 is even, so with a zero one side gets one level more, and
the table is not symmetric. `quant.normal_float` computes it.

**What the scale costs.** An fp32 scale for a block of 64 is 32/64 = 0.5 bits a weight. Double quantization stores it in 8
bits, with an fp32 scale for each 256 of them: 8/64 + 32/(64 * 256) = 0.127.

**Q4_0** is llama.cpp's format: blocks of 32 with an fp16 scale, which is 4.5 bits too. Its levels are k/8 for k = -8 .. 7,
and the scale has a sign, chosen so that the largest weight in magnitude gets k = -8. So it uses all 16 codes, where int4 has
15 levels k/7, and each step is 7/8 of int4's. Q8_0 is the same in 8 bits, k/127 with an unsigned scale. Both come from the
package `gguf`; without it their rows are left out.

The error is the RMS of w - w~ divided by the RMS of w. Student's t with 5 degrees of freedom stands for weights with a few
large ones among them. The demo's weights are those of a new network, not a trained one, so they are normal by construction.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

import demo
from lessons.lesson import Claim, print_table
from metrics.intervals import mean
from model import Phi, PhiConfig
from quant import dequantize, dequantize_int8, integers, levels, linear_layers, midpoints, quantize_blockwise, quantize_int8
from quant_kernels import nearest, unpack
from runtime.files import picture

try:
    import gguf
except ImportError:
    gguf = None

COUNT = 2**16  # weights in a sample
SEEDS = range(5)
BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
FOUR_BITS = ("nf4", "fp4", "int4")
P_MAX = 0.9677083


def new_network(seed: int) -> Tensor:
    """The first MLP's first matrix of the demo's network before training: 512 x 128 weights."""
    config = PhiConfig.from_dict({**demo.TINY_PHI, "vocab_size": 768, "num_hidden_layers": 1})
    layers = dict(linear_layers(Phi(config).init_weights(seed)))
    return next(layer for name, layer in layers.items() if name.endswith("fc1")).weight.detach().flatten()


def draw(source: str, seed: int) -> Tensor:
    """A sample of weights, fp32 [COUNT]."""
    torch.manual_seed(seed)
    if source == "normal":
        return torch.randn(COUNT)
    if source == "Student t, 5":
        return torch.distributions.StudentT(5.0).sample((COUNT,))
    return 2 * torch.rand(COUNT) - 1 if source == "uniform" else new_network(seed)


SOURCES = ("normal", "Student t, 5", "uniform", "demo, untrained")


def relative_error(w: Tensor, rounded: Tensor) -> float:
    return ((w - rounded).norm() / w.norm()).item()


def blockwise(w: Tensor, code: str, block: int, double: bool = False) -> tuple[float, float]:
    """(bits a weight with the scales, error)"""
    q = quantize_blockwise(w, code, block, double)
    stored = [t for t in (q.packed, q.absmax, q.nested_absmax, q.offset) if t is not None]
    return 8 * sum(t.nbytes for t in stored) / len(w), relative_error(w, dequantize(q))


def int8(w: Tensor) -> tuple[float, float]:
    codes, scale = quantize_int8(w.view(-1, 1024))
    return 8 * (codes.nbytes + scale.nbytes) / len(w), relative_error(w, dequantize_int8(codes, scale).flatten())


def llama_cpp(w: Tensor, name: str) -> tuple[float, float]:
    kind = gguf.GGMLQuantizationType[name]
    stored = gguf.quants.quantize(w.numpy(), kind)
    return 8 * stored.nbytes / len(w), relative_error(w, torch.from_numpy(gguf.quants.dequantize(stored, kind)))


def measure(samples: list[Tensor], how: Callable) -> tuple[float, Tensor]:
    """Bits a weight, and the errors, one for each sample."""
    measured = [how(w) for w in samples]
    return measured[0][0], torch.tensor([error for _, error in measured])


def use_of_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Shares in which NF4's 16 codes occur in standard normal weights: in blocks of 64, and if all weights are divided by
    the one number that puts the level 1 on the quantile p_max, without regard to larger weights."""
    in_blocks = unpack(quantize_blockwise(w, "nf4", 64).packed, 4)
    one_scale = nearest((w / NormalDist().inv_cdf(P_MAX)).clamp(-1, 1), midpoints("nf4"))
    counts = [torch.bincount(codes, minlength=16) for codes in (in_blocks, one_scale.int())]
    return counts[0] / len(w), counts[1] / len(w)


def run(figure: Path) -> list[Claim]:
    samples = {source: [draw(source, seed) for seed in SEEDS] for source in SOURCES}
    formats = {f"{code}, block 64": (lambda w, code=code: blockwise(w, code, 64)) for code in ("nf2", *FOUR_BITS)}
    formats["nf4-double, block 64"] = lambda w: blockwise(w, "nf4", 64, double=True)
    formats["int8, rows of 1,024"] = int8
    if gguf:
        formats |= {f"{name}, block 32": (lambda w, name=name: llama_cpp(w, name)) for name in ("Q4_0", "Q8_0")}
    table = {name: {source: measure(samples[source], how) for source in SOURCES} for name, how in formats.items()}
    print_table(
        ["error in % of the weights' RMS", "bits", *SOURCES],
        [
            [name, f"{row['normal'][0]:.3f}", *(f"{100 * mean(errors).value:.2f}" for _, errors in row.values())]
            for name, row in table.items()
        ],
    )
    spreads = [(errors / errors.mean() - 1).abs().max().item() for row in table.values() for _, errors in row.values()]
    print(f"\n  means of {len(SEEDS)} samples of {COUNT:,} weights, each within {100 * max(spreads):.1f}% of its mean")
    curves = {
        source: {code: [measure(w, lambda w, c=code, b=block: blockwise(w, c, b)) for block in BLOCKS] for code in FOUR_BITS}
        for source, w in samples.items()
    }
    at_32 = {code: 100 * of[BLOCKS.index(32)][1].mean().item() for code, of in curves["normal"].items()}
    print(
        f"  normal weights in blocks of 32, 5 bits: NF4 {at_32['nf4']:.2f}, int4 {at_32['int4']:.2f}; Q4_0, 4.5 bits:",
        end=" ",
    )
    print(f"{100 * table['Q4_0, block 32']['normal'][1].mean():.2f}" if gguf else "see after pip install gguf")
    used, fitted = use_of_codes(torch.cat(samples["normal"]))
    with picture(figure, columns=3, rows=2, size=(15, 8)) as axes:
        draw_levels(axes[0])
        draw_bits(axes[1], table)
        for axis, source in zip(axes[2:4], ("normal", "Student t, 5")):
            draw_blocks(axis, curves[source], source, table)
        draw_ratio(axes[4], curves)
        draw_use(axes[5], used, fitted)
    return claims(table, curves, used, fitted)


def draw_levels(axis) -> None:
    w = torch.linspace(-3.3, 3.3, 200)
    axis.plot(w, torch.exp(-(w**2) / 2) / (2 * torch.pi) ** 0.5, color="black")
    torch.manual_seed(0)
    scale = torch.randn(2000, 64).abs().amax(dim=1).mean().item()
    shown = {code: levels(code) for code in (*FOUR_BITS, "nf2")} | {"int8": integers(8)}
    for k, (code, table) in enumerate(shown.items()):
        width = 0.4 if code == "int8" else 1.5
        at = {"lineoffsets": -0.05 - 0.07 * k, "linelengths": 0.055}
        axis.eventplot(table * scale, colors=f"C{k}", linewidths=width, **at)
        axis.text(3.35, -0.065 - 0.07 * k, code, color=f"C{k}", ha="right")
    axis.set(title="levels on the bell curve, at the mean scale of 64 weights", xlim=(-3.4, 3.4), yticks=[0, 0.2, 0.4])
    axis.set(xlabel="weight, in standard deviations", ylabel="density of weights")


def draw_bits(axis, table: dict) -> None:
    colours = dict(zip((*FOUR_BITS, "nf2", "nf4-double"), ("C0", "C1", "C2", "C3", "C9")))
    for name, row in table.items():
        bits, errors = row["normal"]
        colour = colours.get(name.partition(",")[0], "black")
        axis.semilogy(bits, 100 * errors.mean(), "*" if name.startswith("Q") else "o", color=colour, label=name)
    first_bits, first_errors = table["nf2, block 64"]["normal"]
    more = torch.tensor([0.0, 6.0])
    halved = 100 * first_errors.mean() / 2**more
    axis.semilogy(first_bits + more, halved, ":", color="grey", label="half with each bit")
    axis.set(title="what a bit buys, normal weights", xlabel="bits a weight, with the scales", ylabel="error (% of RMS)")
    axis.legend(fontsize=8)


def draw_blocks(axis, curves: dict, source: str, table: dict) -> None:
    first = BLOCKS.index(32)
    for k, (code, points) in enumerate(curves.items()):
        bits = [b for b, _ in points[first:]]
        axis.plot(bits, [100 * errors.mean() for _, errors in points[first:]], "o-", color=f"C{k}", label=code)
    double_bits, double_errors = table["nf4-double, block 64"][source]
    axis.plot(double_bits, 100 * double_errors.mean(), "D", color="C0", label="nf4-double, block 64")
    if "Q4_0, block 32" in table:
        bits, errors = table["Q4_0, block 32"][source]
        axis.plot(bits, 100 * errors.mean(), "k*", markersize=11, label="Q4_0")
    axis.set(title=f"{source}: blocks of 1,024 (left) to 32 (right)", xlabel="bits a weight, with the scales")
    axis.set(ylabel="error (% of RMS)")
    axis.legend(fontsize=8)


def draw_ratio(axis, curves: dict) -> None:
    for source, of in curves.items():
        ratio = [(int4 / nf4).mean() for (_, int4), (_, nf4) in zip(of["int4"], of["nf4"])]
        axis.semilogx(BLOCKS, ratio, "x--" if source.startswith("demo") else "o-", base=2, label=source)
    axis.axhline(1, color="grey")
    axis.set(title="where int4 beats NF4: below 1", xlabel="weights in a block", ylabel="error of int4 / error of NF4")
    axis.set_xticks(BLOCKS, [str(b) for b in BLOCKS])
    axis.legend()


def draw_use(axis, used: Tensor, fitted: Tensor) -> None:
    code = torch.arange(16)
    axis.bar(code - 0.2, 100 * used, 0.4, label="blocks of 64")
    axis.bar(code + 0.2, 100 * fitted, 0.4, label="one scale for all, fitted to their spread")
    axis.axhline(100 / 16, color="grey", linestyle=":")
    axis.set(title="how often NF4's codes are used, normal weights", xlabel="code", ylabel="share of the weights (%)")
    axis.set(xticks=range(16), ylim=(0, 13))
    axis.legend()


def claims(table: dict, curves: dict, used: Tensor, fitted: Tensor) -> list[Claim]:
    at_64 = {source: {c: curves[source][c][BLOCKS.index(64)][1] for c in FOUR_BITS} for source in SOURCES}
    percent = {source: {c: 100 * e.mean().item() for c, e in row.items()} for source, row in at_64.items()}
    normal, heavy, flat = percent["normal"], percent["Student t, 5"], percent["uniform"]
    at_4 = [100 * curves["normal"][c][0][1].mean().item() for c in ("nf4", "int4")]
    bits, error = zip(
        *((b, e.mean().item()) for b, e in (table[n]["normal"] for n in ("nf2, block 64", "int8, rows of 1,024")))
    )
    factor = (error[0] / error[1]) ** (1 / (bits[1] - bits[0]))
    (single_bits, single), (double_bits, double) = (table[f"{n}, block 64"]["normal"] for n in ("nf4", "nf4-double"))
    return [
        Claim(
            f"In blocks of 64, NF4 errs by {normal['nf4']:.1f}% on normal weights, int4 by {normal['int4']:.1f}% and FP4 by "
            f"{normal['fp4']:.1f}%; with heavy tails NF4 has {heavy['nf4']:.1f}% and int4 {heavy['int4']:.1f}%. But int4 "
            f"wins on uniform weights ({flat['int4']:.1f} against {flat['nf4']:.1f}%) and in blocks of 4 ({at_4[1]:.1f} "
            f"against {at_4[0]:.1f}%): no table is best for all weights.",
            bool((at_64["normal"]["nf4"] < at_64["normal"]["int4"]).all() and normal["int4"] < normal["fp4"])
            and heavy["int4"] / heavy["nf4"] > normal["int4"] / normal["nf4"]
            and flat["int4"] < flat["nf4"]
            and at_4[1] < at_4[0],
        ),
        Claim(
            f"Each bit divides the error by {factor:.1f}: from NF2 to int8, {bits[0]:.1f} to {bits[1]:.1f} bits, it falls "
            f"from {100 * error[0]:.0f} to {100 * error[1]:.1f}%. Double quantization saves {single_bits - double_bits:.2f} "
            f"bits and adds {100 * (double / single - 1).mean():.2f}% to NF4's error.",
            1.9 < factor < 2.5 and 0.37 < single_bits - double_bits < 0.38 and double.mean() < 1.02 * single.mean(),
        ),
        Claim(
            "NF4's codes are not used equally often. In blocks of 64, a code stands for "
            f"{100 * used.min():.1f} to {100 * used.max():.1f}% of normal weights: the scale is the largest of 64, and few "
            f"others come near it. With one scale for all, fitted to their spread, it is {100 * fitted.min():.1f} to "
            f"{100 * fitted.max():.1f}%.",
            bool(used.min() < 0.025 and used.max() > 0.085 and fitted.max() < 1.4 * fitted.min()),
        ),
    ]
