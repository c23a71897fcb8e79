"""--stage eval: everything that is measured about models, side by side, each share and mean with its 95% interval.

    python train.py --stage eval --model out/demo-dpo out/demo-sft-seed0 --data pairs.jsonl

What is measured follows from the rows: preference pairs (preferences.py), multiple choice (choices.py), and for all of them
the texts (texts.py): loss and perplexity of the reference answers, and the model's own answers to --samples prompts beside
them (greedy, unless --temperature is given); with --bert their BERTScore, with --teacher a judge's opinion (judge.py).

    out/<name>/  eval.json  eval.md  answers.jsonl  samples.md  figures/eval.png

Every number is a sum over examples over their count, by the log-probability that training uses; the batch size changes none.
Answers are sampled in fp32. Intervals are of each model alone; models that answer the same rows may differ for certain even
where theirs overlap. A judge sees a row's last message, not the turns before it.
All models answer the same rows: those that fit into every model's window. They are measured one after the other; what was
measured is written before the next one begins, and a model that cannot be read costs its own row and no other.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data import LETTERS, ChatML, Example, Ledger, Row
from inputs import encode_for, load_chat, load_reference, rows_to_measure, seen_in_training, tuned_from
from metrics import judge, scores
from metrics import multiple_choice as choices
from metrics import text as texts
from metrics.bertscore import BEST_LAYERS, Encoder, bert_score, load_encoder
from metrics.intervals import mean, share
from metrics.multiple_choice import Choices, parse_letter, score_options
from metrics.preferences import measure_baselines, measure_rewards
from metrics.scores import Results
from model import Phi
from passes import all_logprobs, completion_lengths, flips, grades, sample_answers
from prepare.teacher import Journal, Teacher, ask_all
from runtime.files import InputError, first_line
from runtime.settings import Config
from runtime.weights import resolve

BETA = 0.1  # of the DPO loss, if --beta is not given
BATCH_OF_TEXTS = 64  # for BERTScore


@dataclass
class Contest:
    """Who is measured on what, complete before anything is measured."""

    rows: list[Row]  # those that fit into every model's window
    kind: str  # one of data.PARSERS
    where: str  # that the rows are from
    sources: dict[str, Path]  # of the models, by name
    encoded: dict[str, tuple[ChatML, list[Example]]]
    references: dict[str, Path | None]  # the model that each one's rewards are measured from
    encoder: Encoder | None  # for BERTScore
    notes: list[str]
    failures: list[str]  # a line for every model that cannot be read


def evaluate_models(config: Config, contest: Contest, teacher: Teacher | None, journal: Journal | None) -> int:
    """Measures every model, writes and prints the results; 0 if all went well, 2 if something failed."""
    run, rows, failures = Path(config.out) / config.name, contest.rows, contest.failures
    asked = draw(len(rows), config.samples, config.seed)
    notes = [*contest.notes, f"{len(asked):,} of the rows were answered." if asked else "No answers were asked for."]
    results = Results(rows, contest.where, asked, notes, failures=failures)
    for name in contest.sources:
        print(f"{name} ...", flush=True)
        try:
            measured, results.answers[name] = measure_model(config, name, contest, results.asked)
            results.models.append(measured)
        except (InputError, OSError, torch.OutOfMemoryError) as error:
            fail(failures, f"{name}: {first_line(error)}")
        scores.write(results, run)
    if teacher and any(results.answers.values()):
        try:
            results.models += judge_models(results, lambda wanted: ask_all(wanted, journal, teacher, "judging"))
        except InputError as error:
            fail(failures, f"the judge {teacher.model}: {error}")
        scores.write(results, run)
    print("\n" + scores.text(results))
    picture = ", figures/eval.png" if results.models else ""
    print(f"Written to {run}/: eval.json, eval.md, answers.jsonl, samples.md{picture}")
    return 2 if failures else 0


def fail(failures: list[str], line: str) -> None:
    failures.append(line)
    print(f"error: {line}", file=sys.stderr, flush=True)


def gather(config: Config, find: Callable[[str], Path]) -> Contest:
    """Reads the rows and finds the models; `find` turns a model's name into its directory. InputError if the rows are
    broken, no model is left, or an option does not go with the rows."""
    sources, fitting, references, failures, notes, skipped = {}, {}, {}, [], [], Ledger()
    rows_kind_where = rows_to_measure(config, None, skipped) if config.data else None
    for name in config.models:
        try:
            source = find(name)
            rows_kind_where = rows_kind_where or rows_to_measure(config, source, skipped)
            fitting[name] = encode_for(source, rows_kind_where[0], config.system_prompt)
            references[name] = find_reference(config, source, fitting[name][0]) if rows_kind_where[1] == "pairs" else None
            sources[name] = source
        except InputError as error:
            if len(config.models) == 1:
                raise
            fail(failures, f"{name}: {error}")
    if not sources:
        raise InputError("no model is left to measure")
    rows, kind, where = rows_kind_where
    check_options(config, kind)
    common = set.intersection(*({e.where for e in fitting[name][1]} for name in sources))
    kept = [row for row in rows if row.where in common]
    if not kept:
        raise InputError(f"none of the {len(rows):,} rows fits into every model's window")
    encoded = {name: (fitting[name][0], [e for e in fitting[name][1] if e.where in common]) for name in sources}
    encoder = None
    if config.bert:
        layers = BEST_LAYERS.get(Path(config.bert).name)
        encoder = load_encoder(resolve(config.bert, None), layers, config.device)
    notes += (
        [f"{len(skipped.bad_rows):,} bad rows were skipped, the first {skipped.bad_rows[0]}"] if skipped.bad_rows else []
    )
    notes += row_notes(sources, {name: fitting[name][2] for name in sources}, kept, len(rows) - len(kept))
    if kind == "pairs":
        rate = f"debiased: of labels flipped at rate {config.eps}; " if config.eps is not None else ""
        notes.append(f"{rate}DPO loss at beta {config.beta or BETA}; reference answers are the chosen ones, as labelled.")
    return Contest(kept, kind, where, sources, encoded, references, encoder, notes, failures)


def row_notes(sources: dict[str, Path], ledgers: dict[str, Ledger], rows: list[Row], left_out: int) -> list[str]:
    """What a reader of the numbers must know about the rows."""
    notes = [f"{left_out:,} rows do not fit into every model's window and are left out."] if left_out else []
    for name, source in sources.items():
        seen, trimmed = seen_in_training(source, rows), ledgers[name].trimmed
        notes += [f"Warning: {name} was trained on the questions of {seen:,} of these {len(rows):,} rows."] if seen else []
        notes += [f"{trimmed:,} prompts lose their beginning to fit into half of {name}'s window."] if trimmed else []
    return notes


def find_reference(config: Config, source: Path, chat: ChatML) -> Path | None:
    """The directory of the model that rewards are measured from; InputError if it reads other tokens than the model."""
    parent = resolve(config.reference_model, None) if config.reference_model else tuned_from(source)
    if parent and load_chat(parent, None).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise InputError(f"{parent}: its tokenizer is not that of {source}, so no reward can be measured from it")
    return parent


def check_options(config: Config, kind: str) -> None:
    """InputError for an option that says nothing about rows of this kind."""
    for name in ("beta", "eps", "reference_model"):
        if getattr(config, name) is not None and kind != "pairs":
            raise InputError(f"--{name.replace('_', '-')} is for preference pairs, and the rows are none; leave it out")


def draw(count: int, wanted: int, seed: int) -> list[int]:
    """Which rows are answered: the same for every model, in the rows' order."""
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))


# ------------------------------------------------------------------------------------------------------------ one model


def measure_model(config: Config, name: str, contest: Contest, asked: list[int]) -> tuple[dict, list[str]]:
    """All measures of one model in sections {section: {measure: Estimate}}, and its answers to the rows `asked`."""
    source, kind, (chat, examples) = contest.sources[name], contest.kind, contest.encoded[name]
    parent = contest.references[name]
    reference = reference_logprobs(config, parent, source, examples) if parent else None
    model = Phi.from_pretrained(source, device=config.device)  # after the reference is gone: one model in memory
    passes = (config.micro_batch_size, config.device, config.dtype)
    policy = all_logprobs(model, examples, *passes, "reading")  # [E, completions]
    lengths = completion_lengths(examples).view(len(examples), -1)
    result = {
        "model": name,
        "reference": str(parent) if parent else None,
        "text": texts.likelihood(policy[:, 0], lengths[:, 0]),
    }
    if kind == "pairs":
        flipped = flips(examples)
        if reference is not None:
            result["rewards"] = measure_rewards(policy, reference, lengths, flipped, config.eps, config.beta or BETA)
        result["baselines"] = measure_baselines(policy, reference, lengths, flipped)
    scored = [score_options(model, examples, chat, *passes)] if kind.startswith("mcq") else []
    answers = []
    if asked:
        drawn = [examples[i] for i in asked]
        room = model.config.max_position_embeddings - max(len(e.prompt) for e in drawn)
        length = min(config.max_new_tokens, room)
        answers, ended = sample_answers(model, chat, drawn, length, config.temperature, config.seed, config.micro_batch_size)
        result["answers"], result["BLEU signature"] = measure_answers(config, contest, answers, ended, drawn)
        if scored:
            scored.append(generated_choices(answers, drawn))
    if scored:
        result |= measure_choices(scored)
    return result, answers


def reference_logprobs(config: Config, parent: Path, source: Path, examples: list[Example]) -> torch.Tensor:
    """Log-probabilities [E, 2] under the model that the rewards of the one in `source` are measured from."""
    model = load_reference(parent, source, config.device)
    return all_logprobs(model, examples, config.micro_batch_size, config.device, config.dtype, "reference")


def measure_answers(
    config: Config, contest: Contest, answers: list[str], ended: list[bool], drawn: list[Example]
) -> tuple[dict, str]:
    """How much the model's own answers look like the reference answers, and whether they end (the demo's are graded, too);
    and BLEU's signature."""
    references = [e.texts[0] for e in drawn]
    measured, signature = texts.similarity(answers, references)
    if contest.encoder:
        measured["BERTScore"] = mean(bert_score(answers, references, contest.encoder, BATCH_OF_TEXTS))
    graded = {"ends": ended} | grades(answers, drawn)
    return measured | {name: share(sum(flags), len(flags)) for name, flags in graded.items()}, signature


def generated_choices(answers: list[str], drawn: list[Example]) -> Choices:
    """The letters that the answers name."""
    counts = [len(e.extra["choices"]) for e in drawn]
    picks = [parse_letter(answer, count) for answer, count in zip(answers, counts, strict=True)]
    return Choices(
        [LETTERS.index(e.extra["letter"]) for e in drawn], counts, [choices.topic(e) for e in drawn], {"generated": picks}
    )


def measure_choices(scored: list[Choices]) -> dict:
    """Accuracy, position bias and picks by method, accuracy by topic (letters), chance, and the share of invalid answers."""
    made = {"choices": {}, "position bias": {}, "picks": {"right": choices.letter_shares(scored[0].right)}}
    for part in scored:
        made["choices"] |= choices.accuracies(part)
        for method, picks in part.picks.items():
            made["position bias"][method] = choices.position_bias(part, method)
            made["picks"][method] = choices.letter_shares(picks)
            if method == "generated":
                made["invalid"] = choices.invalid(part)
    return made | {"chance": choices.chance(scored[0]), "by topic": choices.by_topic(scored[0], "letter")}


def judge_models(results: Results, ask: judge.Ask) -> list[dict]:
    """Every other model against the first, or a single one against the reference answers, by a judge."""
    asked = [results.rows[i] for i in results.asked]
    (first, theirs), *others = results.answers.items()
    contests = [(name, ours, first, theirs) for name, ours in others]
    if not others:
        contests = [(first, theirs, "the reference answers", [row.completions[0] for row in asked])]
    made = []
    for name, ours, opponent, their_answers in contests:
        outcomes = judge.compare([row.messages[-1]["content"] for row in asked], ours, their_answers, ask)
        made.append({"model": name, "judged against": opponent, "judge": judge.summary(outcomes, ours, their_answers)})
    return made
