"""Preference pairs that are told apart at a glance."""


def pair_rows(count: int) -> list[dict]:
    return [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": f"{i}{i} I think!"}
        for i in range(count)
    ]
