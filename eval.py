"""--stage eval: measures models side by side; every share and mean has its 95% interval.

    python train.py --stage eval --model out/demo-dpo out/demo-sft-seed0 --data pairs.jsonl
    python train.py --stage eval --model out/demo-dpo --precisions fp32,int8,nf4     one model in several number formats

The rows decide what is measured (metrics/): preferences for pairs, multiple choice for questions with options, and for all
rows the texts, that is, loss and perplexity of the reference answers, and how much the model's own answers to --samples
prompts look like them (greedy, unless --temperature is given). --bert adds BERTScore, --teacher the verdict of a judge.

    out/<name>/  eval.json  eval.md  answers.jsonl

Every number is a sum over examples divided by their count, so the batch size changes none; log-probabilities are those of
training. Answers are sampled in --dtype. An interval describes one model; two models measured on the same rows can differ
significantly even where their intervals overlap. A judge sees the last message of a row, not the turns before it.
All models answer the same rows: those that fit into every model's window. They are measured one after the other, and results
are written after each: an error in one, or of the judge, loses nothing that was measured before.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import ChatML, Example, Row, grades, lengths_of, question_key
from dpo import margin
from generate import sample_answers
from lora import find_origin, is_adapter
from metrics import judge, multiple_choice, precisions, tables, text
from metrics.bertscore import BEST_LAYERS, bert_score, load_encoder
from metrics.intervals import mean, share
from metrics.preferences import flips, measure_baselines, measure_rewards
from metrics.tables import Results
from model import Phi, all_logprobs
from prepare.rows import Measured, describe_reading, encode_for, rows_to_measure
from prepare.teacher import ask_all, open_teacher
from runtime import parallel, runs
from runtime.files import InputError, printable
from runtime.flags import flag_name
from runtime.settings import FORMATS, GGUF, Eval
from runtime.weights import is_quantized, resolve


@dataclass
class Contestant:
    """A model to be measured."""

    name: str
    directory: Path
    chat: ChatML
    examples: list[Example]  # the rows that fit into every model's window, as this one reads them
    reference: Path | None  # the model that its rewards are measured from
    precision: str | None = None  # number format that its weights are read in, one of PRECISIONS; None: as they are


def run(settings: Eval) -> int:
    """Measures every model, writes and prints the results; returns the exit status."""
    measured, contestants, notes = gather(settings)
    if settings.precisions:  # what differs is the weights' format alone, so products are fp32 in all
        settings = replace(settings, dtype="fp32")
        contestants = [replace(contestants[0], name=p, precision=p) for p in map(str.strip, settings.precisions.split(","))]
    encoder = None  # network and tokenizer for BERTScore
    if settings.bert:
        encoder = load_encoder(resolve(settings.bert), BEST_LAYERS.get(Path(settings.bert).name), settings.device)
    teacher = open_teacher(settings)
    directory, count = Path(settings.out) / settings.name, len(measured.rows)
    asked = sorted(random.Random(settings.seed).sample(range(count), min(settings.samples, count)))  # of every model
    notes.append(f"{len(asked):,} of the rows were answered." if asked else "No answers were asked for.")
    results = Results(measured.rows, measured.where, asked, notes)
    references: dict = {}
    with runs.open_run(settings):
        for contestant in contestants:
            print(f"{printable(contestant.name)} ...", flush=True)
            sections, answers = measure_model(settings, measured.kind, contestant, asked, encoder, references)
            results.models.append(sections)
            results.answers[contestant.name] = answers
            if parallel.is_main():  # all ranks find the same numbers
                tables.write(results, directory)
        if settings.precisions:
            precisions.figure(results.models, directory / "figures" / "precisions.png")
        if teacher and any(results.answers.values()):
            results.models += judge_models(results, lambda wanted: ask_all(wanted, teacher, "judging"))
            tables.write(results, directory)
    print("\n" + tables.report(results))
    print(f"Written to {directory}/: eval.json, eval.md, answers.jsonl")
    return 0


def gather(settings: Eval) -> tuple[Measured, list[Contestant], list[str]]:
    """The rows that every model can read, the models, and what a reader of the numbers must know. InputError if the rows are
    broken, a model is no model, or a flag does not go with the rows."""
    first = None if settings.data else resolve(settings.model[0], settings.revision)
    measured = rows_to_measure(settings.data, first, settings.letter_only, settings.on_bad_row)
    for name in ("eps", "reference_model"):
        if getattr(settings, name) is not None and measured.kind != "pairs":
            raise InputError(f"{flag_name(name)} is for preference pairs, which these rows are not; leave it out")
    found: list[Contestant] = []
    trimmed: list[str] = []
    for name in settings.model:
        directory = resolve(name, settings.revision)
        if settings.precisions and (is_adapter(directory) or is_quantized(directory)):
            raise InputError(f"{directory} holds adapters or codes; --precisions needs a model in full precision")
        chat, examples, ledger = encode_for(directory, measured.rows, settings.system_prompt)
        reference = find_reference(settings, directory, chat) if measured.kind == "pairs" else None
        found.append(Contestant(name, directory, chat, examples, reference))
        if ledger.trimmed:
            trimmed.append(f"{ledger.trimmed:,} prompts lose their beginning to fit into half of {name}'s window.")
    common = set.intersection(*({e.where for e in one.examples} for one in found))
    kept = [row for row in measured.rows if row.where in common]
    if not kept:
        raise InputError(f"none of the {len(measured.rows):,} rows fits into every model's window")
    for one in found:
        one.examples = [e for e in one.examples if e.where in common]
    return replace(measured, rows=kept), found, row_notes(settings, measured, kept, found) + trimmed


def row_notes(settings: Eval, measured: Measured, kept: list[Row], found: list[Contestant]) -> list[str]:
    """What a reader of the numbers must know about the rows."""
    notes = [line.strip() for line in describe_reading(measured.ledger)]
    if bad := measured.ledger.bad_rows:
        notes.append(f"{len(bad):,} bad rows were skipped, the first {bad[0]}")
    if len(kept) < len(measured.rows):
        notes.append(f"{len(measured.rows) - len(kept):,} rows do not fit into every model's window and are left out.")
    keys = [question_key(row) for row in kept]
    for one in found:
        if seen := runs.questions_seen(one.directory, keys):
            notes.append(f"Warning: {one.name} was trained on the questions of {seen:,} of these {len(kept):,} rows.")
    if measured.kind == "pairs":
        rate = f"debiased: of labels flipped at rate {settings.eps}; " if settings.eps is not None else ""
        notes.append(f"{rate}DPO loss at beta {settings.beta}; reference answers are the chosen ones, as labelled.")
    return notes


def find_reference(settings: Eval, directory: Path, chat: ChatML) -> Path | None:
    """The model that rewards are measured from; InputError if it has another vocabulary than the model."""
    parent = resolve(settings.reference_model) if settings.reference_model else runs.tuned_from(directory)
    if parent and runs.load_chat(parent).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise InputError(f"{parent}: its tokenizer differs from that of {directory}, so no reward can be measured from it")
    return parent


def measure_model(
    settings: Eval, kind: str, one: Contestant, asked: list[int], encoder: tuple | None, references: dict
) -> tuple[dict, list[str]]:
    """All measures of one model, {section: {measure: Estimate}}, and its answers to the rows `asked`. `references` keeps the
    log-probabilities of references: formats of one model share theirs."""
    examples, reference = one.examples, None
    run_with = (settings.micro_batch_size, settings.device, settings.dtype)
    if one.reference:  # in the number format of the weights under the measured model's adapters
        rounded = None if is_adapter(one.reference) else find_origin(one.directory).format
        if (key := (one.reference, rounded, id(examples))) not in references:
            model = Phi.from_pretrained(one.reference, device=settings.device, base=rounded)
            references[key] = all_logprobs(model, examples, *run_with, "reference")  # [E, 2]
            del model  # one model in memory
        reference = references[key]
    rounded = one.precision if one.precision in FORMATS else None
    stored = torch.bfloat16 if one.precision == "bf16" else torch.float32
    model = Phi.from_pretrained(one.directory, stored, settings.device, base=rounded)
    sizes = precisions.sizes(model)
    if one.precision in GGUF:
        from publish.export import round_weights  # the gguf package takes a while to import

        sizes = round_weights(model, one.precision)
    policy = all_logprobs(model, examples, *run_with, "reading")  # [E, completions]
    lengths = lengths_of(examples)  # [E, completions]
    result = {"model": one.name, "reference": str(one.reference) if one.reference else None}
    if one.precision:
        full = Phi.from_pretrained(one.directory, device=settings.device)
        apart = precisions.divergence(full, model, examples, settings.micro_batch_size, settings.device)
        result["format"] = sizes | apart
        del full
    result["text"] = text.likelihood(policy[:, 0], lengths[:, 0])
    if kind == "pairs":
        flipped = flips(examples)
        if reference is not None:
            margins = margin(policy, reference)[None]  # [1, E]
            result["rewards"] = measure_rewards(margins, flipped, settings.eps, settings.beta, lengths)
        result["baselines"] = measure_baselines(policy, reference, lengths, flipped)
    if kind.startswith("mcq"):
        picks = multiple_choice.score_options(model, examples, one.chat, *run_with)
    answers, drawn = [], [examples[i] for i in asked]
    if drawn:
        if settings.dtype == "bf16":  # the last use of the model: autocast would keep its weights and a copy of them
            model.bfloat16()
        prompts = [e.prompt for e in drawn]
        length = min(settings.max_new_tokens, model.config.max_position_embeddings - max(map(len, prompts)))
        answers, ended = sample_answers(model, one.chat, prompts, length, settings.temperature, settings.seed)
        written = [e.texts[0] for e in drawn]
        result["answers"], result["BLEU signature"] = text.similarity(answers, written)
        if encoder:
            result["answers"]["BERTScore"] = mean(bert_score(answers, written, *encoder))
        graded = {"ends": ended} | grades(answers, drawn)  # grades: if a truth file is there
        result["answers"] |= {name: share(sum(flags), len(flags)) for name, flags in graded.items()}
    if kind.startswith("mcq"):
        result |= multiple_choice.summary(examples, picks, drawn, answers)
    return result, answers


def judge_models(results: Results, ask: judge.Ask) -> list[dict]:
    """A judge compares every other model with the first, or a single one with the reference answers."""
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
