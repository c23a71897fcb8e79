"""What a training stage starts from: a model's directory, tokenized examples, and the reference's log-probabilities."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import demo
from checkpoint import cached_logprobs, fingerprint, save_model
from config import Config
from data import (
    ChatML,
    Example,
    Ledger,
    check_no_leak,
    encode,
    load_tokenizer,
    read_rows,
    split_by_question,
    supervise_everything,
)
from eval import all_logprobs
from files import InputError, write_jsonl
from model import Phi, PhiConfig

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


def load_inputs(config: Config, run: Path, parent: Path | None) -> Inputs:
    """Reads and checks the rows, splits them by question, and turns them into tokens with the tokenizer of `parent`.

    The demo's own rows are written to the run's directory first and then read like any other file. If `parent` is None,
    the demo's random tiny Phi is made there too.
    """
    kind = "pairs" if config.objective == "dpo" else "sft"
    if config.stage == "mcq":
        kind = "mcq letter" if config.letter_only else "mcq"
    path = config.train
    if path is None:
        path = run / "data" / f"{kind}.jsonl"
        if not path.exists():
            write_jsonl(path, demo_rows(config, kind))
    parent = parent or demo_base(run, config.seed)
    chat = ChatML(load_tokenizer(parent), config.system_prompt)

    ledgers = {str(path): Ledger()}
    rows = read_rows(path, kind, config.on_bad_row, ledgers[str(path)])
    if config.eval:
        ledgers[config.eval] = Ledger()
        eval_rows = read_rows(config.eval, kind, config.on_bad_row, ledgers[config.eval])
        check_no_leak(rows, eval_rows)
        sides = {"train": (rows, str(path)), "eval": (eval_rows, config.eval)}
    else:
        train_rows, eval_rows = split_by_question(rows, config.eval_share, config.seed)
        sides = {"train": (train_rows, str(path)), "eval": (eval_rows, str(path))}

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


def reference_tables(config: Config, model: Phi, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities [E, 2] of the training and evaluation answers under the starting model, which DPO measures from.

    The reference never changes, so it is run once over the data instead of once a step, and the tables are kept on disk
    under a hash of everything that they depend on: weights, token ids (and so the template and the lengths), and dtype.
    """
    weights = fingerprint(model)
    tables = []
    for label, examples in (("train", inputs.train), ("eval", inputs.eval)):
        key = json.dumps(
            [
                weights,
                config.dtype,
                config.attention,
                torch.device(config.device).type,
                torch.__version__,
                [(e.prompt, e.completions) for e in examples],
            ]
        )
        path = Path(config.out) / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        compute = functools.partial(
            all_logprobs, model, examples, config.micro_batch_size, config.device, config.dtype, f"reference, {label}"
        )
        table, reused = cached_logprobs(path, compute)
        did = "reused from" if reused else "written to"
        print(f"Reference log-probabilities of {len(examples):,} {label} pairs: {did} {path}")
        tables.append(table)
    return tables[0], tables[1]
