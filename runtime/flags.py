"""The command line: a stage's dataclass becomes its flags, its help, and its errors.

    parse(["--stage", "dpo", "--lr", "1e-5"]) -> Command(Dpo(lr=1e-5, ...), {"lr": "flag", "beta": "default", ...})

Errors are one line: for a flag of another stage they name that stage, for a misspelled flag the likely one. Nothing here
imports torch, so help and errors appear at once.
"""

import argparse
import difflib
import functools
import os
import shlex
import sys
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any

from runtime.files import UNPRINTABLE, InputError, printable, read_fields
from runtime.settings import DEFAULTS, DEMO, DEMO_LORA_LR, FORMATS, LOSSES, METRICS, PRESETS, STAGES, TRAINING


@dataclass
class Command:
    """What a command line means."""

    settings: Any
    origins: dict[str, str]  # the layer that each setting comes from: "default", "demo", "preset" or "flag"


def parse(argv: list[str]) -> Command:
    """The settings of a command line; InputError if it has a mistake. Where it asks for help, prints that and exits."""
    if argv and argv[0] in STAGES:
        raise InputError(f"write --stage {argv[0]}: python train.py --stage {shlex.join(argv)}")
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", nargs="?", const="")
    first.add_argument("-h", "--help", action="store_true")
    found, words = first.parse_known_args(argv)
    stage = "dpo" if found.stage is None else found.stage
    if stage not in STAGES:
        raise InputError(f"--stage {stage}: no such stage; {_guess(stage, [*STAGES]) or 'there are ' + ', '.join(STAGES)}")
    if found.help:
        print(stage_help(stage) if found.stage else overview())
        raise SystemExit(0)
    given, unknown = parser_of(stage).parse_known_args(words)
    if unknown:
        raise InputError(_not_a_flag(unknown[0], stage))
    command = settle(stage, vars(given))
    check(command)
    return command


def parse_or_exit(argv: list[str]) -> Command:
    """As `parse`, but prints an error and exits with status 2. Under torchrun only one process prints it."""
    try:
        return parse(argv)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(printable(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


# ---------------------------------------------------------------------------------------------------- parsing and help


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:  # argparse would print its usage and exit
        raise InputError(message.removeprefix("argument "))


def parser_of(stage: str) -> argparse.ArgumentParser:
    """Reads the flags of a stage and formats their help. What it returns holds only the flags that were typed."""
    about = f"python train.py --stage {stage}: {STAGES[stage].__doc__}"
    if stage in DEMO:
        about += "\nDefaults in brackets are for Phi-2; the demo has its own. --dry-run shows the values of a run."
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=38, width=200)
    parser = _Parser("", argparse.SUPPRESS, about, formatter_class=layout, add_help=False, allow_abbrev=False)
    types, values = typing.get_type_hints(STAGES[stage]), defaults(stage)
    left, groups = {f.name: f for f in fields(STAGES[stage])}, {}
    for part in STAGES[stage].__mro__[:-1]:  # one group of flags for each part of the stage's dataclass
        heading = "this stage" if part in STAGES.values() else part.__doc__
        group = groups.setdefault(heading, parser.add_argument_group(heading))
        for name in [name for name in vars(part).get("__annotations__", {}) if name in left]:
            meta, default = left.pop(name).metadata, values[name]
            kind = (*typing.get_args(types[name]), types[name])[0]  # int of `int | None`, str of `list[str]`
            how = {"metavar": "|".join(meta["choices"]) or {int: "N", float: "X"}.get(kind, "TEXT"), "type": kind}
            if name in ("prompt", "system_prompt"):
                how["type"] = as_text
            if kind is bool:
                how = {"action": "store_true"}
            elif meta["choices"]:
                how["choices"] = meta["choices"]
            elif default == []:
                how |= {"action": "append"} if name == "grid" else {"nargs": "+"}
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            shown = "" if shown in ("None", "False", "", "[]") else f" ({shown})"
            group.add_argument(flag_name(name), default=argparse.SUPPRESS, help=meta["help"] + shown, **how)
    return parser


def as_text(argument: str) -> str:
    """What the model is to read of an argument. Python keeps bytes that the locale does not know as half characters, which
    no tokenizer takes: they are read as UTF-8, and as U+FFFD if they are not that either."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def stage_help(stage: str) -> str:
    """The flags of one stage, in groups."""
    return "\n".join(line for line in parser_of(stage).format_help().splitlines() if line)


def overview() -> str:
    """All stages, one per line, and the most common commands."""
    stages = "\n".join(f"  {name:10} {stage.__doc__}" for name, stage in STAGES.items())
    return f"""\
python train.py --stage STAGE [flags]

{stages}

The most common commands:
  python train.py --stage dpo                                          the embedded demo, minutes on a laptop
  python train.py --stage dpo --model DIR --train pairs.jsonl          your model, your pairs
  python train.py --stage chat --model out/demo-dpo                    talk to the result

python train.py --stage dpo --help lists the flags of a stage. README.md and docs/ explain them."""


def _not_a_flag(word: str, stage: str) -> str:
    """What is wrong with a word that is no flag of the stage, and what to type instead."""
    if not word.startswith("-"):
        return f"{word!r} is not a flag, nor a value of the flag before it; --stage {stage} --help lists the flags"
    flag, known = word.partition("=")[0], {name: [flag_name(f.name) for f in fields(STAGES[name])] for name in STAGES}
    others = [name for name in STAGES if flag in known[name]]
    if others:
        return f"{flag} belongs to --stage {', '.join(others)}; --stage {stage} does not have it"
    every = sorted({name for names in known.values() for name in names})
    return f"there is no flag {flag}; {_guess(flag, every) or f'python train.py --stage {stage} --help lists the flags'}"


def _guess(word: str, known: list[str]) -> str:
    meant = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {meant[0]}?" if meant else ""


# --------------------------------------------------------------------------------------------------- the layers of values


def flag_name(name: str) -> str:
    """ "max_length" -> "--max-length" """
    return "--" + name.replace("_", "-")


def defaults(stage: str) -> dict[str, Any]:
    """The lowest layer: every field of a stage with its default."""
    own = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(STAGES[stage])}
    return own | DEFAULTS.get(stage, {})


def settle(stage: str, flags: dict[str, Any]) -> Command:
    """The settings of a stage from the flags that were typed: puts the layers together but does not check the values."""
    layers = {"default": defaults(stage)}
    preset = PRESETS[flags["preset"]] if flags.get("preset") else {}
    if stage == "sweep" and preset:  # --preset report is a plan of runs, with the report's objective
        preset = {name: preset[name] for name in ("loss", "beta", "eps", "epochs") if name in preset} | {"seeds": 3}
    model = flags.get("model", preset.get("model", layers["default"].get("model")))
    if model == "demo" and stage in DEMO:
        layers["demo"] = DEMO["dpo" if flags.get("objective") == "dpo" else stage]
        if flags.get("lora") and stage in ("dpo", "sweep"):
            layers["demo"] = layers["demo"] | {"lr": DEMO_LORA_LR}
    layers["preset"] = {name: value for name, value in preset.items() if name in layers["default"]}
    layers["flag"] = flags

    values, origins = {}, {}
    for layer, its in layers.items():
        values |= its
        origins |= dict.fromkeys(its, layer)
    if flags.get("loss", "robust") != "robust" and "eps" not in flags:
        values["eps"] = None  # the default is meant for the robust loss
    settings = STAGES[stage](**values)
    if "name" in values and settings.name is None:
        settings.name = default_name(settings)
    return Command(settings, origins)


def default_name(settings: Any) -> str:
    """The name of a run without --name: the model, the stage, and what changes the form of the model."""
    stage, asked = settings.stage, getattr(settings, "model", "data")
    models = asked if isinstance(asked, list) else [asked]
    model = models[0].rstrip("/").rpartition("/")[2] if models and models[0] else "model"
    to, base = getattr(settings, "to", None), getattr(settings, "base", None)
    lora = "lora" if getattr(settings, "lora", None) else None
    parts = {"data": [], "merge": ["merged"], "quantize": [to], "export": [to]}
    if stage == "sweep" and settings.preset:
        parts["sweep"] = [settings.preset]
    parts = parts.get(stage, [stage, to, lora, base if base in FORMATS else None])
    return "-".join(part for part in [model, *parts] if part)


def from_stored(stored: dict, where: str) -> Any:
    """The settings in a run.json, {"stage", "settings"}; `where` names the file. InputError names a setting that is missing,
    unknown to this version, or has a value that no flag could have given it."""
    stage, values = stored.get("stage"), stored.get("settings")
    if stage not in STAGES or not isinstance(values, dict):
        raise InputError(f"{where}: names no stage and settings, so it is another program's or an earlier version's")
    types = typing.get_type_hints(STAGES[stage])
    kinds = {f.name: list if types[f.name] == list[str] else types[f.name] for f in fields(STAGES[stage])}
    if odd := sorted(kinds.keys() ^ values.keys()):
        what = "is missing" if odd[0] in kinds else f"= {values[odd[0]]!r} is unknown to this version"
        raise InputError(f"{where}: the setting {odd[0]} {what}. Use the version that wrote it, or start a new run")
    settings = STAGES[stage](**read_fields(values, kinds, where))
    try:
        check_limits(settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return settings


# --------------------------------------------------------------------------------------------------------------- checks

REQUIRED = ("model", "to", "repo", "sources")  # settings that a stage which has them cannot do without


def check(command: Command) -> None:
    """InputError for a value out of range, and for flags that are missing, contradict each other or have no effect."""
    settings, stage = command.settings, command.settings.stage
    check_limits(settings)
    for f in fields(settings):
        if f.name in REQUIRED and not getattr(settings, f.name) and not getattr(settings, "resume", False):
            choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
            raise InputError(f"{flag_name(f.name)} is missing: {f.metadata['help']}{choices}")
    if stage in (*TRAINING, "sweep"):
        _check_training(settings, stage)
    if stage == "sweep" and bool(settings.grid) == bool(settings.preset):
        raise InputError("--stage sweep takes either --grid FLAG=VALUES (such as --grid beta=0.1,0.3) or --preset report")
    typed = {name for name, layer in command.origins.items() if layer == "flag"}
    for name in sorted(typed - {"system_prompt"}):
        if getattr(settings, name) == "":
            raise InputError(f"{flag_name(name)} is empty; leave it out, or give it a value")
    name = getattr(settings, "name", None) or "run"
    if name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise InputError(f"--name {name!r}: give a plain name, without / and not beginning with a dot")
    out = getattr(settings, "out", "")
    if UNPRINTABLE.search(out):
        raise InputError(f"--out {out!r}: give a directory whose name is plain text in this locale")
    for holds, names, reason in _misplaced(settings, stage):
        for name in names.split():
            if holds and name in typed:
                raise InputError(f"{flag_name(name)} {reason}")


def check_limits(settings: Any) -> None:
    """InputError for a value out of range, or that is none of those to choose from."""
    for f in fields(settings):
        value, meta, flag = getattr(settings, f.name), f.metadata, flag_name(f.name)
        if value is not None and meta["limit"]:
            words, low, high, ends = meta["limit"]
            at_end = (value, ends) in ((low, "[)"), (high, "(]"))
            if not (low < value < high or at_end):
                raise InputError(f"{flag} {value}: {words}")
        if value is not None and meta["choices"] and value not in meta["choices"]:
            raise InputError(f"{flag} {value!r:.60}: choose one of {', '.join(meta['choices'])}")
        if value is not None and meta["some"] and not {*map(str.strip, value.split(","))} <= {*meta["some"]}:
            raise InputError(f"{flag} {value!r:.60}: give some of {','.join(meta['some'])} with commas between them")
    metrics = METRICS.get(getattr(settings, "objective", None), ())  # not the robust loss, which ranks diverging runs first
    if (metric := getattr(settings, "metric", None)) and metric not in metrics:
        raise InputError(f"--metric {metric}: choose one of {', '.join(metrics)}")


def check_loss(settings: Any) -> None:
    """InputError if eps is missing where the loss takes one, or given where it takes none."""
    loss, eps = settings.loss, settings.eps
    if LOSSES[loss] and eps is None:
        raise InputError(f"--loss {loss} needs --eps, the share of labels that you believe to be flipped, such as 0.1")
    if eps is not None and not LOSSES[loss]:
        raise InputError(f"--loss {loss} takes no --eps; leave it out")


def _check_training(s: Any, stage: str) -> None:
    if s.objective == "dpo":
        check_loss(s)
    if s.resume and (s.overwrite or s.dry_run):
        raise InputError("--resume continues a run: it goes with neither --overwrite nor --dry-run")
    varied = stage == "sweep" and any(text.startswith("train=") for text in s.grid)
    if not (s.model == "demo" or s.train or varied or s.resume):
        raise InputError(f"--train FILE.jsonl is missing: the rows to tune {s.model} on")
    if s.max_prompt_length >= s.max_length:
        prompt, both = f"--max-prompt-length {s.max_prompt_length}", f"--max-length {s.max_length}"
        raise InputError(f"{prompt} leaves no room for an answer in {both}; lower the first or raise the second")
    if s.lora and s.base == "bf16" and s.dtype == "fp32":
        raise InputError("--base bf16 needs --dtype bf16: weights and inputs of a product have one type")


def _misplaced(s: Any, stage: str) -> list[tuple[bool, str, str]]:
    """(condition, flags, reason): where the condition holds, typing one of these flags is an error."""
    tunes, evaluates, sweeps, to = stage in (*TRAINING, "sweep"), stage == "eval", stage == "sweep", getattr(s, "to", None)
    return [
        (tunes and s.model == "demo", "revision", "is for hub models; the demo has none"),
        (stage == "mcq" and s.model == "demo", "model", "cannot be the demo, which has no questions with options"),
        (tunes and not s.train, "eval", "needs --train: the demo's own questions are split by --eval-share"),
        (tunes and s.eval is not None, "eval_share", "has no effect beside --eval; leave one of them out"),
        (tunes and s.objective == "sft", "loss beta eps nll_weight", "is for --objective dpo; add that, or leave it out"),
        (tunes and s.whole_text, "last_turn_only", "has no effect beside --whole-text; leave one of them out"),
        (tunes and s.lora is None, "lora_alpha lora_dropout lora_targets base", "needs adapters; add --lora 16"),
        (tunes and s.lora and s.base in FORMATS, "compile", "would keep the decoded weights of --base; leave it out"),
        (sweeps, "resume", "is not needed: give the same command again, and the sweep continues"),
        (sweeps and s.preset, "dry_run", "does not go with --preset report; try one of its runs: --stage dpo --dry-run"),
        (sweeps and s.preset and s.loss != "robust", "loss", "is for --grid; --preset report is about the robust loss"),
        (to in ("int8", "llm.int8"), "block", f"has no effect on --to {to}, which has one scale per row; leave it out"),
        (evaluates and len(s.model) > 1, "precisions", "compares the formats of one model; give one --model"),
        (evaluates and len(set(s.model)) < len(s.model), "model", "names a model twice"),
        (evaluates and s.precisions, "dtype", "has no effect beside --precisions, whose products are fp32; leave it out"),
        (evaluates and not s.data, "letter_only on_bad_row", "is for --data; held-out rows are read as their run read them"),
        (evaluates and s.samples == 0, "bert teacher max_new_tokens temperature", "needs answers; leave out --samples 0"),
        (getattr(s, "what", "") == "sft", "match_lengths", "is for --what pairs; leave it out"),
        (stage in ("data", "eval") and not s.teacher, "price budget concurrency", "needs a teacher; add --teacher MODEL"),
    ]
