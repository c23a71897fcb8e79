"""Both rewards fall: is my model broken?

DPO looks at z alone, the difference of two log-ratios. Its gradient in a pair is (Rafailov et al. 2023, section 4)

    -beta sigma(-z) [grad log pi(y_w|x) - grad log pi(y_l|x)]

which pushes the rejected answer down as hard as it pushes the chosen one up. Probabilities sum to 1, but what the
rejected answer loses need not go to the chosen one, and the tokens that both share are pulled both ways. So both
log-probabilities may fall while z grows, and probability goes to answers that are in no pair ("likelihood displacement",
Razin et al. 2024).

The lesson tunes the small demo (small_demo.py) on pairs with 20% wrong labels, and watches on 100 other questions, with
clean labels: reward accuracy, the chosen answer's log-probability against the reference's, and the share of sampled answers
that have the right method. The last of these is what counts, and accuracy does not show it.

What to do when both rewards fall: look at `drift/chosen`. A nat or two is common and harmless. If it goes on falling, add
--nll-weight, lower the learning rate, or stop earlier. A larger beta helps less, and it is not the robust loss that is at
fault: plain DPO does the same.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

import train
from data import Example
from lessons.lesson import Claim, print_table
from lessons.tuning.small_demo import COMMON, SmallDemo, logprobs, one_thread, small_demo, tune
from metrics.intervals import share
from model import Phi
from runtime.files import picture
from runtime.settings import Dpo

EVERY = 9  # steps between two looks
WATCHED = 100  # test questions

ROBUST = Dpo(**COMMON, lr=1.5e-3, warmup_steps=5, loss="robust", eps=0.2, beta=0.1)
RUNS = {
    "robust": ROBUST,
    "plain": replace(ROBUST, loss="sigmoid", eps=None),
    "robust, NLL weight 2": replace(ROBUST, nll_weight=2.0),
    "robust, lr / 5": replace(ROBUST, lr=ROBUST.lr / 5),
    "robust, beta x 5": replace(ROBUST, beta=ROBUST.beta * 5),
}


@dataclass
class Look:
    """The model after some steps, on questions that it was not tuned on."""

    step: int
    chosen: float  # log pi/pi_ref of the right answer, mean in nats
    rejected: float
    accuracy: float  # share of pairs that the reward orders correctly
    right: float  # share of sampled answers with the right method


def look(small: SmallDemo, model: Phi, settings: Dpo, step: int) -> Look:
    numbers = train.evaluate(model, small.test[:WATCHED], small.test_reference[:WATCHED], settings)
    drift = [numbers[f"eval_drift/{side}"] for side in ("chosen", "rejected")]
    return Look(step, *drift, numbers["eval_rewards/accuracies"], small.right_method(model, WATCHED))


def curve(small: SmallDemo, pairs: list[Example], reference: Tensor, settings: Dpo) -> list[Look]:
    """One epoch of DPO from the SFT model, and what became of it on the way."""
    model, looks = copy.deepcopy(small.model), []
    steps = -(-len(pairs) // settings.batch_size)

    def watch(step: int) -> None:
        if step % EVERY == 0 or step == steps:
            looks.append(look(small, model, settings, step))

    tune(model, pairs, reference, settings, watch)
    return looks


def run(figure: Path) -> list[Claim]:
    with one_thread():
        small = small_demo()
        pairs = small.pairs(flip_rate=0.2)
        reference = logprobs(small.model, pairs)
        curves = {name: curve(small, pairs, reference, settings) for name, settings in RUNS.items()}
    before = curves["robust"][0].right
    print_table(
        ["run", "step", "chosen (nats)", "rejected", "accuracy", "right method", "95%"],
        [["SFT model", 0, 0, 0, "-", before, interval(before)]]
        + [
            [name, one.step, one.chosen, one.rejected, one.accuracy, one.right, interval(one.right)]
            for name, looks in curves.items()
            for one in (looks[-1],)
        ],
    )
    draw(figure, curves)

    last = {name: looks[-1] for name, looks in curves.items()}
    robust, plain, nll, slow, strict = last.values()
    early = curves["robust"][1]
    return [
        Claim(
            f"Accuracy does not show it: with the robust loss and no NLL term it is {robust.accuracy:.0%} while the right "
            f"answer has lost {-robust.chosen:.0f} nats, and the share of sampled answers with the right method falls from "
            f"{before:.0%} to {robust.right:.0%}. Plain DPO does it too: {-plain.chosen:.0f} nats, {plain.right:.0%}.",
            all(one.accuracy > 0.8 and one.chosen < -1.5 and one.right < before / 2 for one in (robust, plain)),
        ),
        Claim(
            f"An NLL term of weight 2 prevents it: the right answer gains {nll.chosen:.1f} nats, the right method rises to "
            f"{nll.right:.0%}, and accuracy is {nll.accuracy:.0%}.",
            nll.chosen > -0.5 and nll.right > robust.right + 0.1 and nll.accuracy > 0.8,
        ),
        Claim(
            f"So does a fifth of the learning rate ({slow.chosen:+.1f} nats, {slow.right:.0%}); five times the beta only "
            f"softens it ({strict.chosen:+.1f} nats, {strict.right:.0%}). Longer is worse: after {early.step} steps the "
            f"first run has the right answer at {early.chosen:+.1f} nats, at its end at {robust.chosen:+.1f}.",
            slow.chosen > -1.5
            and slow.right > robust.right + 0.05
            and robust.chosen < strict.chosen
            and robust.chosen < early.chosen - 1,
        ),
    ]


def interval(right: float) -> str:
    found = share(right * WATCHED, WATCHED)
    return f"{found.low:.2f}-{found.high:.2f}"


def draw(figure: Path, curves: dict[str, list[Look]]) -> None:
    with picture(figure, columns=3, size=(12, 4)) as (chosen, accuracy, right):
        for name, looks in curves.items():
            steps = [one.step for one in looks]
            (line,) = chosen.plot(steps, [one.chosen for one in looks], label=name)
            chosen.plot(steps, [one.rejected for one in looks], color=line.get_color(), linestyle=":")
            accuracy.plot(steps[1:], [one.accuracy for one in looks[1:]], label=name)
            ends = [share(one.right * WATCHED, WATCHED) for one in looks]
            right.plot(steps, [one.right for one in looks], label=name)
            right.fill_between(steps, [e.low for e in ends], [e.high for e in ends], color=line.get_color(), alpha=0.12)
        chosen.set(title="chosen (dotted: rejected)", xlabel="step", ylabel="log pi / pi_ref (nats)")
        accuracy.set(title="reward accuracy on clean labels", xlabel="step", ylabel="share of pairs", ylim=(0.8, 1.005))
        right.set(title="sampled answers, with 95% intervals", xlabel="step", ylabel="share with the right method")
        accuracy.legend(loc="lower center")
