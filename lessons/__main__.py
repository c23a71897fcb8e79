"""Small experiments that show what the method does. Each takes less than a minute on two cores.

    python -m lessons                  lists the lessons and runs them all
    python -m lessons losses codes     these two
    python -m lessons --out figures/lessons

A lesson prints a table and three sentences, and draws a picture, out/lessons/NAME.png. Its sentences are checked against its
numbers: if one does not hold on this machine, the lesson says so and the command ends with status 1.
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does, before torch is imported

import torch  # noqa: E402

LESSONS = {  # in the order in which they are best read
    "tuning": ["losses", "one_pair", "beta", "sum_or_mean", "flips", "displacement", "length", "adapters"],
    "quantization": ["codes", "outliers", "rounding", "when_faster"],
}
ROOMS = {name: room for room, names in LESSONS.items() for name in names}


def teach(name: str, folder: Path) -> bool:
    """Runs one lesson; returns whether all that it says holds."""
    lesson = importlib.import_module(f"lessons.{ROOMS[name]}.{name}")
    print(f"\n{name}: {lesson.__doc__.splitlines()[0]}\n")
    started = time.perf_counter()
    torch.manual_seed(0)
    claims = lesson.run(folder / f"{name}.png")
    print()
    for claim in claims:
        print(f"  {'-' if claim.holds else 'DOES NOT HOLD HERE:'} {claim.sentence}")
    print(f"  {folder / name}.png, {time.perf_counter() - started:.0f} s")
    return all(claim.holds for claim in claims)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lessons", description="Small experiments, each with a picture.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROOMS))
    parser.add_argument("--out", type=Path, default=Path("out/lessons"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ROOMS]:
        parser.error(f"there is no lesson {unknown[0]}; choose from {', '.join(ROOMS)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    held = [teach(name, args.out) for name in args.names or ROOMS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
