"""The command line: a stage's dataclass becomes its flags, its help, and its errors.

    parse(["--stage", "dpo", "--lr", "1e-5"]) -> Command(Dpo(lr=1e-5, ...), {"lr": "flag", "beta": "default", ...})

Errors are one line: a flag of another stage says where it belongs, a misspelt one what was probably meant. Nothing here
imports torch, so that `--help` and an error come at once.
"""

import argparse
import difflib
import os
import shlex
import sys
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any

from runtime.files import InputError, printable
from runtime.settings import (
    DEFAULTS,
    DEMO,
    DEMO_DPO,
    DEMO_LORA_LR,
    FORMATS,
    METRICS,
    PRECISIONS,
    PRESETS,
    STAGES,
    TRAINING,
)

OVERVIEW = """\
python train.py --stage STAGE [flags]

{stages}

The three commands that are typed most:
  python train.py --stage dpo                                          the embedded demo, minutes on a laptop
  python train.py --stage dpo --model DIR --train pairs.jsonl          your model, your pairs
  python train.py --stage chat --model out/demo-dpo                    talk to what came out

python train.py --stage dpo --help lists the flags of a stage. README.md and docs/ explain them."""


@dataclass
class Command:
    """The settings of a command line; for each its layer, "default", "demo", "preset" or "flag"; and those in the last."""

    settings: Any
    origins: dict[str, str]
    typed: set[str]


def parse(argv: list[str]) -> Command:
    """The settings of a command line. Prints help and ends the program where help is asked for (SystemExit).

    InputError, in one line, for what is not understood.
    """
    stage = _stage(argv)
    if stage is None and _asks_for_help(argv):
        print(overview())
        raise SystemExit(0)
    stage = stage or "dpo"
    if _asks_for_help(argv):
        print(stage_help(stage))
        raise SystemExit(0)
    parser = parser_of(stage)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_not_a_flag(unknown[0], stage))
    values = vars(given)
    values.pop("stage", None)
    command = settle(stage, values)
    check(command)
    return command


def parse_or_exit(argv: list[str]) -> Command:
    """As `parse`, but an error is printed, once under torchrun too, and ends the program with status 2."""
    try:
        return parse(argv)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(printable(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def _asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _stage(argv: list[str]) -> str | None:
    """The stage that a command line names, None if it names none; InputError if there is no such stage."""
    if argv and not argv[0].startswith("-"):
        if argv[0] in STAGES:
            raise InputError(f"write --stage {argv[0]}: python train.py --stage {shlex.join(argv)}")
        raise InputError(f"{argv[0]!r} is not a flag; python train.py --help lists the stages")
    stage = None
    for i, word in enumerate(argv):
        if word == "--stage":
            stage = argv[i + 1] if i + 1 < len(argv) else ""
        elif word.startswith("--stage="):
            stage = word.removeprefix("--stage=")
    if stage is not None and stage not in STAGES:
        meant = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(STAGES)}"
        raise InputError(f"--stage {stage}: no such stage; {hint}")
    return stage


# -------------------------------------------------------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:  # argparse would print its usage and exit
        raise InputError(message.removeprefix("argument "))


def parser_of(stage: str) -> argparse.ArgumentParser:
    """Reads the flags of a stage, of the types and among the choices that its dataclass gives; InputError if it cannot."""
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--stage")
    types = typing.get_type_hints(STAGES[stage])
    for f in fields(STAGES[stage]):
        name, kind = flag_name(f.name), value_type(types[f.name])
        if kind is bool:
            parser.add_argument(name, action="store_true")
        elif f.name == "grid":
            parser.add_argument(name, action="append")
        elif kind is list:
            parser.add_argument(name, nargs="+")
        else:
            parser.add_argument(name, type=_reader(kind), choices=f.metadata["choices"] or None)
    return parser


def value_type(hint: Any) -> type:
    """The type of one value: int of `int | None`, list of `list[str]`."""
    if typing.get_origin(hint) is list:
        return list
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint


def _reader(kind: type):
    names = {int: "a whole number", float: "a number"}

    def read(text: str):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names[kind]}") from None

    return read


def _not_a_flag(word: str, stage: str) -> str:
    """What is wrong with a word that no flag of the stage took, and what to type instead."""
    if not word.startswith("-"):
        return f"{word!r} is not a flag, and the flag before it takes no such value"
    flag = word.partition("=")[0]
    others = [name for name, other in STAGES.items() if flag in {flag_name(f.name) for f in fields(other)}]
    if others:
        return f"{flag} belongs to --stage {', '.join(others)}; --stage {stage} does not have it"
    own = [flag_name(f.name) for f in fields(STAGES[stage])]
    every = [flag_name(f.name) for other in STAGES.values() for f in fields(other)]
    meant = difflib.get_close_matches(flag, own, n=1) or difflib.get_close_matches(flag, every, n=1)
    hint = f"did you mean {meant[0]}?" if meant else f"python train.py --stage {stage} --help lists the flags"
    return f"there is no flag {flag}; {hint}"


# --------------------------------------------------------------------------------------------------- the layers of values


def flag_name(name: str) -> str:
    """ "max_length" -> "--max-length" """
    return "--" + name.replace("_", "-")


def defaults(stage: str) -> dict[str, Any]:
    """The lowest layer: every field of a stage with its default."""
    own = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(STAGES[stage])}
    return own | DEFAULTS.get(stage, {})


def settle(stage: str, flags: dict[str, Any]) -> Command:
    """The settings of a stage from the flags that were typed, not checked yet (`flags.check`)."""
    layers = {"default": defaults(stage)}
    preset = PRESETS[flags["preset"]] if flags.get("preset") else {}
    if stage == "sweep":  # --preset report is a plan of runs, with the report's objective
        preset = {name: preset[name] for name in ("loss", "beta", "eps") if name in preset}
    model = flags.get("model", preset.get("model", layers["default"].get("model")))
    if model == "demo" and stage in DEMO:
        layers["demo"] = _demo_layer(stage, flags)
    if preset:
        layers["preset"] = {name: value for name, value in preset.items() if name in layers["default"]}
    layers["flag"] = flags

    values, origins = {}, {}
    for layer, its in layers.items():
        values |= its
        origins |= dict.fromkeys(its, layer)
    if flags.get("loss", "robust") != "robust" and "eps" not in flags:
        values["eps"] = None  # that of the lower layers belongs to the robust loss
    settings = STAGES[stage](**values)
    if "name" in values and settings.name is None:
        settings.name = default_name(settings)
    return Command(settings, origins, set(flags))


def _demo_layer(stage: str, flags: dict[str, Any]) -> dict[str, Any]:
    objective = flags.get("objective", "sft") if stage == "qat" else stage
    values = DEMO_DPO if stage == "qat" and objective == "dpo" else DEMO[stage]
    if flags.get("lora") and stage in ("dpo", "sweep"):
        values = values | {"lr": DEMO_LORA_LR}
    return values


def default_name(settings: Any) -> str:
    """The name of a run that was given none: model, stage, and what changes the model's form."""
    if settings.stage == "data":
        return "data"
    first = (settings.model or [""])[0] if isinstance(settings.model, list) else settings.model or ""
    model = first.rstrip("/").rpartition("/")[2] or "model"
    if settings.stage == "merge":
        return f"{model}-merged"
    if settings.stage == "quantize":
        return f"{model}-{settings.to}"
    if settings.stage == "sweep" and settings.preset:
        return f"{model}-{settings.preset}"
    base = getattr(settings, "base", None)
    parts = [
        model,
        settings.stage,
        getattr(settings, "to", None),
        "lora" if getattr(settings, "lora", None) else None,
        base if base in FORMATS else None,
    ]
    return "-".join(part for part in parts if part)


def from_stored(stored: dict, where: str) -> Any:
    """The settings in a run.json, {"stage", "settings"}; `where` names the file.

    InputError, which names the setting, for one that this version does not know or that is missing.
    """
    stage, values = stored.get("stage"), stored.get("settings")
    if stage not in STAGES or not isinstance(values, dict):
        raise InputError(f"{where}: names no stage and settings, so it is another program's or an earlier version's")
    own = {f.name for f in fields(STAGES[stage])}
    odd = sorted(own ^ values.keys())
    if odd:
        what = "is missing" if odd[0] in own else f"= {values[odd[0]]!r} is none that this version has"
        raise InputError(f"{where}: the setting {odd[0]} {what}. Go on with the version that wrote it, or start another run")
    return STAGES[stage](**values)


# ----------------------------------------------------------------------------------------------------------------- help


HEADINGS = (
    "this stage", "model", "data", "objective", "number format", "optimizer", "memory", "adapters (LoRA)",
    "evaluation and checkpoints", "teacher", "machine", "run",
)  # fmt: skip


def overview() -> str:
    """All stages, a line each, and the commands that are typed most."""
    lines = [f"  {name:10} {stage.__doc__}" for name, stage in STAGES.items()]
    return OVERVIEW.format(stages="\n".join(lines))


def stage_help(stage: str) -> str:
    """The flags of one stage in groups, a line each."""
    types, values = typing.get_type_hints(STAGES[stage]), defaults(stage)
    groups: dict[str, list[str]] = {}
    for owner, f in _by_part(STAGES[stage]):
        kind, default = value_type(types[f.name]), values[f.name]
        metavar = f.metadata.get("metavar") or {bool: "", int: "N", float: "X", str: "TEXT"}.get(kind, "")
        if f.metadata["choices"]:
            metavar = "|".join(f.metadata["choices"])
        shown = (
            ""
            if default is None or default is False or default in ("", [])
            else f" ({default:g})"
            if kind is float
            else f" ({default})"
        )
        usage = f"{flag_name(f.name)} {metavar}".strip()
        if len(usage) > 34:
            usage = f"{flag_name(f.name)} ..."
            shown = f": {metavar}{shown}"
        groups.setdefault(owner, []).append(f"  {usage:34}  {f.metadata['help']}{shown}")
    lines = [f"python train.py --stage {stage}: {STAGES[stage].__doc__}"]
    if stage in DEMO:
        lines.append("Values in brackets are for Phi-2; the demo has its own. --dry-run shows the values of a run.")
    for heading in sorted(groups, key=HEADINGS.index):
        lines += [f"{heading}:", *groups[heading]]
    return "\n".join(lines)


def _by_part(stage: type) -> list[tuple[str, Any]]:
    """(heading, field) of a stage's fields, in the order in which the parts declare them."""
    by_name, pairs = {f.name: f for f in fields(stage)}, []
    for part in (c for c in stage.__mro__ if c is not object):
        heading = part.__doc__ if part.__doc__ in HEADINGS else "this stage"
        pairs += [(heading, by_name.pop(name)) for name in vars(part).get("__annotations__", {}) if name in by_name]
    return pairs


# --------------------------------------------------------------------------------------------------------------- checks


def check(command: Command) -> None:
    """InputError for a value out of range, and for flags that contradict each other or have no effect."""
    settings, stage = command.settings, command.settings.stage
    check_limits(settings)
    if stage in (*TRAINING, "sweep"):
        _check_training(command)
    if stage in ("quantize", "qat"):
        _check_format(command)
    if stage in ("quantize", "merge", "eval", "chat") and not settings.model:
        raise InputError(f"--model is missing: --stage {stage} needs a model, such as --model out/demo-dpo")
    if stage == "sweep":
        _check_sweep(command)
    if stage == "eval":
        _check_eval(command)
    if stage == "data":
        _check_data(command)


def check_limits(settings: Any) -> None:
    """InputError for a value out of range."""
    for f in fields(settings):
        value, limit = getattr(settings, f.name), f.metadata["limit"]
        if limit is None or value is None or limit.low < value < limit.high:
            continue
        if (value, True) not in zip((limit.low, limit.high), limit.ends):
            raise InputError(f"{flag_name(f.name)} {value}: {limit.words}")


def _check_training(command: Command) -> None:
    _check_preset(command)
    settings, stage, demo = command.settings, command.settings.stage, command.settings.model == "demo"
    if settings.resume and (settings.overwrite or settings.dry_run):
        raise InputError("--resume continues a run: it goes with neither --overwrite nor --dry-run")
    if settings.revision and demo:
        raise InputError("--revision is for hub models; the demo has none")
    if stage == "mcq" and not settings.resume and (demo or not settings.train):
        raise InputError("--stage mcq needs --model DIR and --train FILE.jsonl with questions, as --stage data makes them")
    varied = stage == "sweep" and any(text.startswith("train=") for text in settings.grid)
    if not demo and not settings.train and not varied and not settings.resume:
        raise InputError(f"--train FILE.jsonl is missing: the rows to tune {settings.model} on")
    if settings.eval and not settings.train:
        raise InputError("--eval needs --train: the demo's own questions are split by --eval-share")
    if settings.eval and "eval_share" in command.typed:
        raise InputError("--eval-share has no effect beside --eval; leave one of them out")
    if settings.max_prompt_length >= settings.max_length:
        raise InputError(
            f"--max-prompt-length {settings.max_prompt_length} leaves no room for an answer in "
            f"--max-length {settings.max_length}"
        )
    if settings.metric and settings.metric not in METRICS[settings.objective]:
        raise InputError(
            f"--metric {settings.metric}: choose one of {', '.join(METRICS[settings.objective])}. (A robust loss ranks "
            "diverging runs first, so it is not offered.)"
        )
    _check_objective(command)
    _check_adapters(command)


def _check_preset(command: Command) -> None:
    preset, stage = command.settings.preset, command.settings.stage
    if preset == "report" and stage not in ("dpo", "sweep"):
        raise InputError(f"--preset report is for --stage dpo and sweep; leave it out of --stage {stage}")
    if stage == "qat" and "lora" in PRESETS.get(preset, {}):
        raise InputError(f"--preset {preset} trains adapters, --stage qat all weights; leave it out, or take 80gb")


def _check_objective(command: Command) -> None:
    settings = command.settings
    if settings.objective == "sft":
        for name in ("loss", "beta", "eps", "nll_weight"):
            if name in command.typed:
                raise InputError(f"{flag_name(name)} has no effect in --stage qat --objective sft; leave it out")


def _check_adapters(command: Command) -> None:
    settings = command.settings
    if settings.lora is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "base"):
            if name in command.typed:
                raise InputError(f"{flag_name(name)} is for adapters; add --lora RANK (such as 16) or leave it out")
        return
    if settings.base == "bf16" and settings.dtype == "fp32":
        raise InputError("--base bf16 needs --dtype bf16: weights and inputs of a product have one type")
    if settings.compile and settings.base in FORMATS:
        raise InputError(f"--compile would keep the decoded weights of --base {settings.base}; leave one of them out")


def _check_format(command: Command) -> None:
    settings = command.settings
    if settings.to is None and not getattr(settings, "resume", False):
        raise InputError(f"--to FORMAT is missing; choose one of {', '.join(FORMATS)}")
    if settings.to in ("int8", "llm.int8") and "block" in command.typed:
        raise InputError(f"--to {settings.to} has one scale a row; --block is for the other formats, leave it out")


def _check_sweep(command: Command) -> None:
    settings = command.settings
    if settings.resume:
        raise InputError("a sweep needs no --resume: give the same command again and it goes on")
    if settings.dry_run:
        raise InputError("a sweep has no --dry-run; try one of its runs: --stage dpo --dry-run")
    if settings.preset not in (None, "report"):
        raise InputError(f"--preset {settings.preset} is for the training stages; a sweep has --preset report")
    if bool(settings.grid) == bool(settings.preset):
        raise InputError("--stage sweep takes either --grid FLAG=VALUES (such as --grid beta=0.1,0.3) or --preset report")
    if settings.preset and settings.loss != "robust":
        raise InputError(f"--loss {settings.loss}: --preset report is about the robust loss; leave it out, or use --grid")


# Flags that have no effect beside --precisions.
NOT_ON_CARD = (
    "bert max_new_tokens teacher concurrency price budget beta eps samples micro_batch_size dtype temperature".split()
)


def _check_eval(command: Command) -> None:
    settings = command.settings
    if settings.precisions:
        for name in settings.precisions.split(","):
            if name not in PRECISIONS:
                raise InputError(f"--precisions: no {name!r}; choose from {', '.join(PRECISIONS)}")
        if len(settings.model) > 1:
            raise InputError("--precisions compares the formats of one model; give one --model")
        for name in NOT_ON_CARD:
            if name in command.typed:
                raise InputError(f"{flag_name(name)} has no effect beside --precisions; leave one of them out")
    if len(set(settings.model)) < len(settings.model):
        raise InputError("--model names a model twice")
    if not settings.data and command.typed & {"letter_only", "on_bad_row"}:
        raise InputError("--letter-only and --on-bad-row are for --data; held-out rows are read as their run read them")
    if settings.samples == 0 and command.typed & {"bert", "teacher", "max_new_tokens", "temperature"}:
        raise InputError("--bert, --teacher, --max-new-tokens and --temperature need answers; leave --samples 0 out")
    _check_teacher(command)


def _check_teacher(command: Command) -> None:
    if not command.settings.teacher and command.typed & {"price", "budget", "concurrency"}:
        raise InputError("--price, --budget and --concurrency are for a teacher; add --teacher MODEL or leave them out")


def _check_data(command: Command) -> None:
    if not command.settings.sources:
        raise InputError("--sources is missing: a list such as theoremqa,mmlu_stem=DIR")
    _check_teacher(command)
