"""What a training stage starts from: a model's directory, tokenized examples, and the reference's log-probabilities."""

import contextlib
import functools
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

import demo
from data import (
    ChatML,
    Example,
    Ledger,
    Row,
    check_no_leak,
    encode,
    kind_of,
    load_tokenizer,
    question_key,
    read_rows,
    split_by_question,
    supervise_everything,
)
from lora import LoraLinear, add_lora, base_format, lora_layers, merge_lora
from model import Phi, PhiConfig, read_config
from passes import all_logprobs
from quant import FORMATS, FrozenLinear
from runtime import parallel
from runtime.coded import coded_layers
from runtime.files import InputError, read_json, write_jsonl
from runtime.runs import cached_logprobs, fingerprint, save_model
from runtime.settings import TRAINING, Config
from runtime.weights import base_directory, is_adapter, stored_tensors

# Where each stage's questions stand in the demo's one list of distinct questions: none is asked in two stages.
QUESTIONS = {"sft": (0, 26_000), "qat": (26_000, 30_000), "dpo": (30_000, demo.MOST_QUESTIONS)}
RIGHT_SHARE = 0.4  # of the demo's SFT answers; answers sampled after SFT then have the right method about half the time


@dataclass
class Inputs:
    """All that a training stage starts from."""

    parent: Path  # directory of the model that is tuned
    chat: ChatML
    train: list[Example]
    eval: list[Example]
    ledgers: dict[str, Ledger]  # by file


def demo_rows(config: Config, kind: str) -> list[dict]:
    """The demo's rows of `kind` "sft" or "pairs", from the questions that are set aside for the stage."""
    start, end = QUESTIONS["qat" if config.stage == "qat" and kind == "sft" else config.objective]
    if config.demo_rows > end - start:
        raise InputError(f"--demo-rows {config.demo_rows}: the demo has {end - start:,} questions for this stage")
    questions = demo.make_questions(start + config.demo_rows, config.seed)[start:]
    if kind == "sft":
        return demo.make_sft_rows(questions, right_share=RIGHT_SHARE, seed=config.seed)
    return demo.make_pair_rows(questions, config.flip_rate, config.seed)


def demo_base(run: Path, seed: int) -> Path:
    """A tiny Phi with random weights and a tokenizer trained on the demo's text, saved as any other model."""
    directory = run / "base"
    if not (directory / "tokenizer.json").exists():
        questions = demo.make_questions(2000, seed)
        texts = [f"{q['prompt']}\n{answer}" for q in questions for answer in (q["answer"], q["wrong"])]
        tokenizer = demo.train_tokenizer(texts)
        phi = Phi(PhiConfig.from_dict({**demo.TINY_PHI, "vocab_size": tokenizer.get_vocab_size()}))
        save_model(directory, phi.init_weights(seed), ChatML(tokenizer))
    return directory


def load_chat(directory: Path, system_prompt: str | None) -> ChatML:
    """The ChatML of a model's directory (adapters may leave the tokenizer to their base's); InputError if the tokenizer has
    ids that the model has no embedding for."""
    own = (directory / "tokenizer.json").exists() or not is_adapter(directory)
    chat = ChatML(load_tokenizer(directory if own else base_directory(directory)), system_prompt)
    rows = read_config(directory).vocab_size
    largest = max(chat.tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{directory}: the tokenizer does not fit the model: its ids reach {largest:,}, the model's embedding has "
            f"{rows:,} rows. Is tokenizer.json another model's?"
        )
    return chat


def training_run(directory: Path) -> Path | None:
    """The run that tuned a model: its own directory or, if it was quantized from another, that one's; None if neither is."""
    while (directory / "run.json").exists():
        if read_json(directory / "run.json")["config"]["stage"] in TRAINING:
            return directory
        directory = Path(read_json(directory / "results.json").get("parent", ""))
    return None


def run_config(run: Path) -> Config:
    """The settings that a training run was made with."""
    known = {f.name for f in fields(Config)}
    return Config(**{name: value for name, value in read_json(run / "run.json")["config"].items() if name in known})


def refuse_adapters(directory: Path) -> None:
    """InputError if a directory holds adapters where a whole model is needed."""
    if is_adapter(directory):
        raise InputError(
            f"{directory} holds adapters; make one plain model of them and their base first: "
            f"python train.py --stage merge --model {directory}"
        )


def trained_system_prompt(directory: Path) -> str | None:
    """The system prompt that a model was tuned with, if it is one of this program's runs."""
    run = training_run(directory)
    return run_config(run).system_prompt if run else None


def tuned_from(directory: Path) -> Path | None:
    """The model that a model was tuned from, which rewards are measured from; None if that is not recorded or gone."""
    run = training_run(directory)
    if run is None or not (run / "results.json").exists():
        return None
    parent = Path(read_json(run / "results.json").get("parent", ""))
    return parent if (parent / "config.json").exists() or is_adapter(parent) else None


def row_kind(config: Config) -> str:
    """Which rows a training stage reads, one of `data.PARSERS`."""
    if config.stage == "mcq":
        return "mcq letter" if config.letter_only else "mcq"
    return "pairs" if config.objective == "dpo" else "sft"


Sides = dict[str, tuple[list[Row], str]]  # "train" and "eval": rows, and the file that they are from


def read_sides(config: Config, run: Path) -> tuple[Sides, dict[str, Ledger]]:
    """The checked rows of both sides, no question on both, and a ledger a file. The demo's own rows are written to the run's
    directory first and then read like any other file."""
    kind, path = row_kind(config), config.train
    if path is None:
        path = run / "data" / f"{kind}.jsonl"
        if not path.exists():
            write_jsonl(path, demo_rows(config, kind))
    ledgers = {str(path): Ledger()}
    rows = read_rows(path, kind, config.on_bad_row, ledgers[str(path)])
    if config.eval:
        ledgers[config.eval] = Ledger()
        eval_rows = read_rows(config.eval, kind, config.on_bad_row, ledgers[config.eval])
        check_no_leak(rows, eval_rows)
        return {"train": (rows, str(path)), "eval": (eval_rows, config.eval)}, ledgers
    train_rows, eval_rows = split_by_question(rows, config.eval_share, config.seed)
    return {"train": (train_rows, str(path)), "eval": (eval_rows, str(path))}, ledgers


def load_inputs(config: Config, run: Path, parent: Path | None) -> Inputs:
    """Reads and checks the rows, splits them by question, and turns them into tokens with the tokenizer of `parent`.

    If `parent` is None, the demo's random tiny Phi is made in the run's directory first.
    """
    parent = parent or demo_base(run, config.seed)
    chat = load_chat(parent, config.system_prompt)
    sides, ledgers = read_sides(config, run)
    examples = {}
    for side, (rows, file) in sides.items():
        examples[side] = encode(rows, chat, config.max_length, config.max_prompt_length, ledgers[file])
        if config.whole_text:
            examples[side] = [supervise_everything(e) for e in examples[side]]
        if not examples[side]:
            raise InputError(
                f"{file}: no row is left for the {side} side ({len(rows)} before trimming to --max-length "
                f"{config.max_length}, --max-prompt-length {config.max_prompt_length}); give more rows, "
                "other limits, or another --eval-share"
            )
    for ledger in ledgers.values():
        ledger.check()
    return Inputs(parent, chat, examples["train"], examples["eval"], ledgers)


def rows_to_measure(config: Config, source: Path | None, ledger: Ledger) -> tuple[list[Row], str, str]:
    """Rows to measure a model on, their kind, and where they are from: --data, or what the run of the model held out. The
    ledger gets the bad rows that are skipped."""
    if config.data is None:
        run = training_run(source)
        if run is None:
            raise InputError(
                f"--data FILE.jsonl is missing: {source} is no run of this program with held-out rows of its own"
            )
        trained = run_config(run)
        rows, file = read_sides(trained, run)[0]["eval"]
        return rows, row_kind(trained), f"the rows of {file} that {run} held out"
    kind = kind_of(config.data)
    if config.letter_only and kind != "mcq":
        raise InputError(f"--letter-only is for multiple-choice questions, and {config.data} holds none; leave it out")
    rows = read_rows(config.data, "mcq letter" if config.letter_only else kind, config.on_bad_row, ledger)
    return rows, kind, config.data


def seen_in_training(source: Path, rows: list[Row]) -> int:
    """How many of the rows ask a question that the run of a model trained on; 0 if it is no run or its rows are gone."""
    run, trained = training_run(source), []
    with contextlib.suppress(InputError):
        if run and (run_config(run).train or (run / "data").exists()):  # else the demo's rows would be made anew
            trained = read_sides(run_config(run), run)[0]["train"][0]
    keys = {question_key(row) for row in trained}
    return sum(question_key(row) in keys for row in rows)


def encode_for(source: Path, rows: list[Row], system_prompt: str | None) -> tuple[ChatML, list[Example], Ledger]:
    """The rows that fit a model's window, with its own tokenizer and, unless another is given, the system prompt that it was
    tuned with; and what became of the others. InputError if none fits."""
    chat = load_chat(source, trained_system_prompt(source) if system_prompt is None else system_prompt)
    window, ledger = read_config(source).max_position_embeddings, Ledger()
    examples = encode(rows, chat, window, window // 2, ledger)
    for example in list(examples):
        longest = max((len(chat.reply(choice)) for choice in example.extra.get("choices", ())), default=0)
        if len(example.prompt) + longest > window:
            examples.remove(example)
    if not examples:
        raise InputError(f"{source}: none of the {len(rows):,} rows fits into its window of {window:,} tokens")
    return chat, examples, ledger


def load_model(directory: Path, config: Config) -> Phi:
    """A model as a stage trains and measures it: under --lora with its frozen weights as --base says, else in fp32."""
    bf16 = config.base == "bf16" or (config.base in FORMATS and config.dtype == "bf16")
    to = config.base if config.base in FORMATS else None
    return Phi.from_pretrained(directory, torch.bfloat16 if bf16 else torch.float32, config.device, base=to)


def load_reference(parent: Path, tuned: Path, device: str) -> Phi:
    """The model that a tuned model's rewards are measured from, its weights rounded as under the tuned one's adapters."""
    same_base = base_format(tuned) if is_adapter(tuned) and not is_adapter(parent) else None
    return Phi.from_pretrained(parent, device=device, base=same_base)


def load_to_tune(directory: Path, config: Config) -> Phi:
    """The model that tuning starts from. Its own adapters are what --lora goes on with; without --lora they are merged.
    Several ranks each hold all of a model under --lora, whose weights do not move, and their share of it without."""
    if is_adapter(directory) and config.base and (trained_on := base_format(directory) or "unrounded") != config.base:
        if trained_on in FORMATS or config.base in FORMATS:
            raise InputError(f"{directory} holds adapters of {trained_on} weights, not of {config.base}: leave out --base")
    if parallel.size() > 1 and config.lora is None:
        refuse_adapters(directory)
        if coded_layers([name for _, name in stored_tensors(directory)]):
            raise InputError(f"{directory} is quantized, and codes cannot be tuned: add --lora 16")
        return Phi.sharded(directory, config.device)
    model = load_model(directory, config)
    adapters = lora_layers(model)
    if config.lora is None and adapters:
        merge_lora(model)
        print(f"{directory} holds adapters: merged, and all weights are tuned (--lora would go on with them)")
    if config.lora is None and any(isinstance(layer, FrozenLinear) for layer in model.modules()):
        raise InputError(
            f"{directory} is quantized, and codes cannot be tuned: add --lora 16, or start from what it was made of"
        )
    if config.lora is not None and adapters:
        _check_goes_on(directory, config, adapters)
    name = config.model
    if name != "demo" and not Path(name).is_dir() and not adapters:  # adapters then name the hub's model, not its local copy
        model.origin = (name, config.revision, model.origin[2])
    return model


def _check_goes_on(directory: Path, config: Config, adapters: dict[str, LoraLinear]) -> None:
    """InputError if the flags ask for other adapters than those that a model has."""
    one = next(iter(adapters.values()))
    for flag, asked, has in (("lora", config.lora, one.rank), ("lora-alpha", config.lora_alpha, one.alpha)):
        if asked is not None and asked != has:
            raise InputError(
                f"{directory} holds adapters with --{flag} {has:g}, which tuning goes on with: give that, or make one plain "
                f"model of it first: python train.py --stage merge --model {directory}"
            )
    if config.lora_targets:
        raise InputError(f"--lora-targets: {directory} has its adapters already; leave it out")


def add_adapters(model: Phi, config: Config) -> None:
    """The adapters that --lora asks for; a model that has some goes on with them."""
    if config.lora and not lora_layers(model):
        add_lora(model, config.lora, config.lora_alpha, config.lora_targets or "all-linear", seed=config.seed)
    for layer in lora_layers(model).values():
        layer.dropout = config.lora_dropout or 0.0


def reference_tables(config: Config, model: Phi, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities [E, 2] of the training and evaluation answers under the starting model, which DPO measures from."""
    weights = fingerprint(model)
    return tuple(
        reference_table(config, model, weights, examples, label)
        for label, examples in (("train", inputs.train), ("eval", inputs.eval))
    )


def reference_table(config: Config, model: Phi, weights: str, examples: list[Example], label: str) -> Tensor:
    """Log-probabilities [E, 2] of pairs under a model that never changes: run once, not once a step, and kept on disk in
    OUT/reference under a hash of all that they depend on: `weights`, the model's fingerprint, token ids (and so the template
    and the lengths), and the compute type."""
    device = torch.device(config.device).type
    pairs = [(e.prompt, e.completions) for e in examples]
    key = json.dumps([weights, config.dtype, config.attention, device, torch.__version__, pairs])
    path = Path(config.out) / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    compute = functools.partial(
        all_logprobs, model, examples, config.micro_batch_size, config.device, config.dtype, f"reference, {label}"
    )
    table, reused = cached_logprobs(path, compute)
    did = "reused from" if reused else "written to"
    print(f"Reference log-probabilities of {len(examples):,} {label} pairs: {did} {path}")
    return table
