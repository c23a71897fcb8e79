"""Sizes with which a case of the benchmark takes seconds, and its numbers mean nothing."""

from bench.workloads import shape

TINY = shape(64, layers=2, heads=2, vocab_size=1024)
SMALL = dict(
    repeats=1,
    model=TINY,
    wide=TINY,
    growing=TINY,
    full=TINY,
    prompt=(5, 9),
    completion=(3, 8),
    tokens=16,
    forward=(2, 16),
    answer=(4, 4),
    short_answer=(4, 4),
    layer=(128, 256),
    lengths=(16, 32),
    batches=(1, 2),
    widths=(32, 64),
    depths=(1, 2),
    world={"sft": 300, "qat": 0, "pairs": 100, "test": 0},
)
