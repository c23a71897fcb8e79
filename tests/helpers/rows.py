"""Preference pairs that are told apart at a glance."""


def pair_rows(count: int) -> list[dict]:
    """Not in the order of their lengths, so that a pass that sorts them must put its results back in place."""
    numbers = sorted(range(count), key=lambda i: i % 3)
    return [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": f"{i}{i} I think!"} for i in numbers
    ]
