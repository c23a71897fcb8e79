"""--stage sweep --preset report: the report's tables, curves and claims again, with a model of your choice.

    python train.py --stage sweep --preset report                                          the demo, within half an hour
    python train.py --stage sweep --preset report --model DIR --train pairs.jsonl --data test.jsonl

    Table 1   sizes of the training set: 20, 30, 40 and 54 parts of 54, each inside the next (the report's thousands)
    Table 2   learning rate (1/2, 1, 3, 5 times the recipe's), beta (.05, .1, .3, .5), eps (0, .05, .1, .25), one at a time
    Table 3   models by checkpoints: each size at a quarter, a half, three quarters and the end of its training
    Figure 2  the curves of all these runs

The defaults are the report's: robust loss, beta 0.3, eps 0.1, all rows. What differs, and is meant to: accuracies are on
test questions that no run trained on, of clean labels where they are known, with intervals; a run's best checkpoint is
chosen on evaluation rows, never by its robust loss. The report's own numbers are in the text of its claims.

Each claim stands beside what was measured here and a verdict: "held", "did not hold", or "cannot be told" where the
difference is within chance, by McNemar's test on the same test pairs (ranking.py) or by intervals that overlap.
"""

import platform
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data import Ledger, lengths_of, read_truth
from experiments import sweep
from experiments.precisions import in_format
from experiments.ranking import Result, Run, cannot_tell, collect, conclusions, pick_eps, plot_metric, table
from generate import sample_answers
from metrics import text
from metrics.intervals import Estimate, share
from metrics.tables import decimal, markdown, percent
from model import Phi, all_logprobs
from prepare.rows import read_rows
from runtime.files import numbered_lines, picture, read_json, write_json, write_text
from runtime.runs import load_chat
from runtime.settings import Dpo, Sweep

PARTS = (20, 30, 40, 54)
GRID = {"lr": (0.5, 1, 3, 5), "beta": (0.05, 0.1, 0.3, 0.5), "eps": (0.0, 0.05, 0.1, 0.25)}  # lr: times the recipe's
ANSWERS = 300  # sampled, unless --samples says otherwise
NEW_TOKENS = 256
FORMATS = ("fp32", "int8", "nf4", "fp4")  # in which the answers are scored
QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of a run's training, where its checkpoints are


def run(settings: Sweep) -> int:
    """Makes all runs, or those that are missing, and writes report.md with its figures; returns the exit status."""
    directory = sweep.open_sweep(settings)
    runs = make_runs(settings, directory)
    status = sweep.run_all(runs)
    if status:
        return status
    base = sweep.single(settings)
    results, failed = collect(runs, base)
    if "defaults" not in {result.name for result in results}:
        print(f"error: the run with the defaults failed: {failed.get('defaults')}")
        return 2
    print("sampling and quantizing ...", flush=True)
    extra = measure_more(runs[0], directory, settings.samples or ANSWERS)
    figure_2(runs, failed, directory / "figures")
    write_text(directory / "report.md", report(base, runs, results, failed, extra))
    print(f"\nWritten to {directory}/: report.md, figures/. Every curve: tensorboard --logdir {directory}")
    return 2 if failed else 0


# ------------------------------------------------------------------------------------------------------------ the runs


def make_runs(settings: Sweep, directory: Path) -> list[Run]:
    """The run with the defaults, those with smaller training sets, and the three grids."""
    grid = GRID | {"lr": [float(f"{settings.lr * times:.3g}") for times in GRID["lr"]]}
    default, *varied = sweep.plan(replace(settings, samples=0), grid, directory)  # answers come from `measure_more` alone
    rows = read_rows(default.settings.train, "pairs", "stop", Ledger())
    random.Random(settings.seed).shuffle(rows)
    sized = []
    for part in PARTS[:-1]:
        count = round(len(rows) * part / PARTS[-1])
        path = Path(default.settings.train).with_name(f"pairs-{count}.jsonl")
        sweep.write_rows(path, rows[:count])  # nested: each is the beginning of the next
        name = f"pairs={count}"
        sized.append(Run(name, {"pairs": count}, replace(default.settings, train=str(path), name=name)))
    return [*(with_checkpoints(run) for run in (default, *sized)), *varied]


def with_checkpoints(run: Run) -> Run:
    """The run, with a checkpoint at each quarter of its training, all kept until they are measured."""
    settings = run.settings
    steps = settings.max_steps or settings.epochs * -(-count_lines(settings.train) // settings.batch_size)
    return replace(run, settings=replace(settings, save_every=max(1, steps // 4), keep=1000), checkpoints=True)


def count_lines(path: str) -> int:
    return sum(1 for _ in numbered_lines(path))


@torch.no_grad()
def measure_more(run: Run, directory: Path, answers_wanted: int) -> dict:
    """Sampled answers before and after tuning, and the tuned model in the report's number formats; kept in more.json."""
    path, settings = directory / "more.json", run.settings
    if path.exists():
        return read_json(path)
    chat = load_chat(run.directory, settings.system_prompt or "")
    asked = sweep.test_examples(run)[:answers_wanted]
    extra = {"answers": len(asked)}
    prompts = [e.prompt for e in asked]
    for label, source in (("before", Path(settings.model)), ("after", run.directory)):
        model = Phi.from_pretrained(source, device=settings.device)
        answers, ended = sample_answers(model, chat, prompts, NEW_TOKENS, 1.0, settings.seed)
        extra[f"ends, {label}"] = asdict(share(sum(ended), len(ended)))
        right = text.grades(answers, asked).get("right method")
        extra[f"method, {label}"] = asdict(share(sum(right), len(right))) if right else None
    for name in FORMATS:
        model = in_format(name, Phi.from_pretrained(run.directory, device=settings.device))
        answers, _ = sample_answers(model, chat, prompts, NEW_TOKENS, 0.0, settings.seed)
        bleu, _ = text.bleu(answers, [right_text(e) for e in asked])
        likely = [replace(e, completions=e.completions[:1]) for e in asked]
        logprobs = all_logprobs(model, likely, settings.micro_batch_size, settings.device, "fp32", name)[:, 0]
        loss = text.likelihood(logprobs, lengths_of(likely)[:, 0])["loss"]
        extra[f"format {name}"] = {"BLEU": asdict(bleu), "loss": asdict(loss)}
    write_json(path, extra)
    return extra


def right_text(example) -> str:
    """The answer that is right: the chosen one, or the other one where the label is known to be flipped."""
    return example.texts[1 if example.truth and example.truth.flipped else 0]


# ---------------------------------------------------------------------------------------------------------- the claims


@dataclass
class Claim:
    """What the report did or said, what was measured here, and whether it held."""

    text: str
    here: str
    verdict: str  # "held", "did not hold", "cannot be told"


def better(a: Result, b: Result) -> str:
    """Whether "a orders more test pairs correctly than b" held."""
    if cannot_tell(a.right, b.right):
        return "cannot be told"
    return "held" if a.accuracy > b.accuracy else "did not hold"


def accuracy_of(result: Result) -> str:
    return percent(result.accuracy)


def claims(base: Dpo, runs: list[Run], results: list[Result], extra: dict) -> list[Claim]:
    """Each claim with its evidence; settings whose runs failed are left out of it."""
    by_name = {result.name: result for result in results}
    default = by_name["defaults"]
    start, tuned = (
        replace(default, right=(default.baselines[name] == 1)[None]) for name in ("starting model", "tuned model")
    )
    made = [
        Claim(
            "Tuning raises the accuracy (Table 3: .744 and the like, measured without the shift by one; .80 to .85 by its "
            "trainer's own evaluation).",
            f"right answer likelier: starting model {accuracy_of(start)}, tuned {accuracy_of(tuned)}; by the reward "
            f"{accuracy_of(default)}",
            better(tuned, start),
        )
    ]
    sized = [r for r in results if "pairs" in r.point]
    if sized:
        smallest = min(sized, key=lambda r: r.point["pairs"])
        made.append(
            Claim(
                "A larger mixture is better (it compared 20,000, 30,000, 40,000 and 54,000 pairs).",
                f"{smallest.point['pairs']:,} pairs {accuracy_of(smallest)}, all {accuracy_of(default)}",
                better(default, smallest),
            )
        )
    made += [last_checkpoint(runs, default), *best_of_grids(base, results, default)]
    lowest, best = min(results, key=lambda r: r.own_loss), results[0]
    made.append(
        Claim(
            "The lowest robust test loss names the best run (it reached -59, and -241).",
            f"lowest, {lowest.own_loss:.2f}: {lowest.name}, {accuracy_of(lowest)}; best: {best.name}, {accuracy_of(best)}",
            "held" if cannot_tell(best.right, lowest.right) else "did not hold",
        )
    )
    return [*made, *noise_claims(base, results), *answer_claims(extra)]


def last_checkpoint(runs: list[Run], default: Result) -> Claim:
    """Whether the end of training is better than its first quarter."""
    saved = checkpoints(runs[0])
    first, last = nearest(saved, QUARTERS[0]), nearest(saved, 1.0)
    n = default.right.shape[1]
    early, late = share(first * n, n), share(last * n, n)
    verdict = "held" if late.low > early.high else "did not hold" if late.high < early.low else "cannot be told"
    text = "Later checkpoints are better (Table 3 goes through them)."
    return Claim(text, f"first quarter {percent(early)}, end {percent(late)}", verdict)


def best_of_grids(base: Dpo, results: list[Result], default: Result) -> list[Claim]:
    """Whether the report's value of each hyperparameter is among the best of its grid."""
    made = []
    for name, theirs in (("lr", "1e-5, here the recipe's"), ("beta", "0.3"), ("eps", "0.1")):
        varied = [r for r in results if set(r.point) == {name}]
        if varied:
            best = max([default, *varied], key=lambda r: r.accuracy)
            value = best.point.get(name, getattr(base, name))
            verdict = "held" if cannot_tell(best.right, default.right) else "did not hold"
            here = f"{getattr(base, name)}: {accuracy_of(default)}; best {value}: {accuracy_of(best)}"
            made.append(Claim(f"{name} = {theirs} is the best of its grid.", here, verdict))
    return made


def noise_claims(base: Dpo, results: list[Result]) -> list[Claim]:
    """Whether the robust loss needs its eps."""
    picked, plain = pick_eps(results, base), next((r for r in results if r.point == {"eps": 0.0}), None)
    if picked is None or plain is None:
        return []
    eps, rate = picked.point.get("eps", base.eps), results[0].measures.get("flip rate")
    here = f"eps 0: {accuracy_of(plain)}; eps {eps}: {accuracy_of(picked)}; flip rate by the margins {percent(rate)}"
    return [Claim("Assuming that labels are noisy helps (eps > 0).", here, better(picked, plain))]


def answer_claims(extra: dict) -> list[Claim]:
    """What became of the answers themselves."""
    before, after = (Estimate(**extra[f"ends, {label}"]) for label in ("before", "after"))
    verdict = "held" if after.high < before.low else "did not hold"
    text = "After DPO the model barely ends its answers (its trainer supervised two <|im_end|>, its evaluation one)."
    made = [Claim(text, f"answers that end: {percent(before)} before, {percent(after)} after", verdict)]
    scores = {name: Estimate(**extra[f"format {name}"]["BLEU"]) for name in FORMATS}
    full = scores["fp32"].value
    here = ", ".join(f"{name} {decimal(score, 1)}" for name, score in scores.items())
    kept = all(score.value >= 0.95 * full for score in scores.values())
    text = "Quantization costs little: BLEU .572 in full precision, .567 in int8, .565 and .544 in 4 bits (at most 5% less)."
    return [*made, Claim(text, f"BLEU of greedy answers: {here}", "held" if kept else "did not hold")]


def checkpoints(run: Run) -> dict[float, float]:
    """{share of the training: accuracy on the test} of every checkpoint that was measured."""
    record = read_json(run.directory / "test.json").get("checkpoints", {})
    steps = {int(step): value for step, value in record.items()}
    return {step / max(steps): value for step, value in sorted(steps.items())}


def nearest(saved: dict[float, float], part: float) -> float:
    return saved[min(saved, key=lambda done: abs(done - part))]


# ---------------------------------------------------------------------------------------------------------- the report


def table_3(runs: list[Run], failed: dict[str, str]) -> str:
    """Accuracy of each training set's model at each quarter of its training."""
    rows = []
    for run in runs:
        if run.checkpoints and run.name not in failed:
            saved = checkpoints(run)
            rows.append([run.name, *(percent(nearest(saved, quarter)) for quarter in QUARTERS)])
    return markdown(["model", *(f"{quarter:.0%} of its steps" for quarter in QUARTERS)], rows)


def report(base: Dpo, runs: list[Run], results: list[Result], failed: dict[str, str], extra: dict) -> str:
    """report.md."""
    default = next(r for r in results if not r.point)

    def part(names: set[str]) -> str:
        return table([r for r in results if not r.point or set(r.point) <= names], base)

    train = count_lines(runs[0].settings.train)
    made = claims(base, runs, results, extra)
    pairs, minutes = default.right.shape[1], sum(r.seconds for r in results) / 60
    flipped = [truth.flipped for truth in read_truth(runs[0].settings.train).values() if truth.flipped is not None]
    flips = f", {sum(flipped) / len(flipped):.0%} of whose labels are flipped" if any(flipped) else ""
    method = [Estimate(**extra[f"method, {label}"]) for label in ("before", "after") if extra.get(f"method, {label}")]
    answers = (
        f" Sampled answers with the right method: {percent(method[0])} before, {percent(method[1])} after." if method else ""
    )
    parts = [
        "# The report again",
        f"Robust DPO of {base.model} on {train:,} pairs{flips}; {pairs:,} test pairs of questions that no run saw. Defaults:"
        f" lr {base.lr:g}, beta {base.beta}, eps {base.eps}, nll-weight {base.nll_weight}, {base.epochs} epochs, batches of "
        f"{base.batch_size}. {len(results)} runs, {minutes:.0f} minutes on {base.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}.{answers}",
        "## What the report did or said, and what happened here",
        markdown(["claim", "here", "verdict"], [[c.text, c.here, f"**{c.verdict}**"] for c in made]),
        '"Cannot be told": the difference is within chance (McNemar\'s test on the same pairs, or intervals that overlap).',
        "## Table 1: sizes of the training set",
        part({"pairs"}),
        "## Table 2: hyperparameters, one at a time",
        part({"lr"}),
        part({"beta"}),
        part({"eps"}),
        "\n".join(f"- {line}" for line in conclusions([r for r in results if "pairs" not in r.point], base)),
        "## Table 3: models by checkpoints",
        "Accuracy on the test pairs" + (" (clean labels)" if "clean" in default.measures else ""),
        table_3(runs, failed),
        "## Figure 2: the curves",
        "![Curves of all runs](figures/figure-2.png)",
        "The lower row is what the report compared. Its curves of different beta and eps have different units.",
        *([f"Failed: {name}: {error}" for name, error in failed.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def figure_2(runs: list[Run], failed: dict[str, str], figures: Path) -> None:
    """Held-out accuracy and own loss over the training, a column for what was varied."""
    columns = {"pairs": "training pairs", **{name: name for name in GRID}}
    with picture(figures / "figure-2.png", columns=len(columns), rows=2, size=(18, 7)) as axes:
        for n, (name, label) in enumerate(columns.items()):
            shown = [r for r in runs if r.name not in failed and (not r.point or set(r.point) == {name})]
            for run in shown:
                plot_metric(axes[n], run, "eval_rewards/accuracies")
                plot_metric(axes[n + len(columns)], run, "eval_preference_loss")
            axes[n].set(title=label, ylabel="reward accuracy, held out, as labelled", xlabel="optimizer step")
            axes[n].legend(fontsize=7)
            axes[n + len(columns)].set(ylabel="own robust loss, held out (not comparable)", xlabel="optimizer step")
