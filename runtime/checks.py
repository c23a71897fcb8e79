"""From the flags that were given to a complete config: unset fields are filled in from the recipe, and every value is
checked before anything is done. An option that would do nothing is an error, and so is what makes no sense together.
"""

from dataclasses import asdict, fields, replace

import torch

from dpo import check_loss
from quant import FORMATS
from runtime.files import InputError
from runtime.settings import METRICS, PRECISIONS, PRESETS, RECIPES, RUNS, TRAINING, Config, default_name


def with_preset(config: Config, given: set[str]) -> Config:
    """The config with its preset's values for the flags that were not given. (In a sweep "report" is a plan, not values.)"""
    if config.preset is None or config.stage not in TRAINING:
        return config
    values = {name: value for name, value in PRESETS[config.preset].items() if name not in given}
    if "loss" in given:
        values.pop("eps", None)  # the preset's eps belongs to the preset's loss
    if config.preset == "report" and config.stage != "dpo":
        raise InputError(f"--preset report is for --stage dpo and sweep; leave it out of --stage {config.stage}")
    if config.stage == "qat" and "lora" in values:
        raise InputError(f"--preset {config.preset} trains adapters, --stage qat all weights; leave it out, or take 80gb")
    return replace(config, **values)


def resolve(config: Config, given: set[str]) -> Config:
    """Fills every unset field and checks every value; InputError says what is wrong and what to type."""
    config = with_preset(config, given)
    stage, demo = config.stage, config.model == "demo"
    objective = {"mcq": "sft", "qat": config.objective or "sft", "sweep": "dpo"}.get(stage, stage)
    if config.other_models and stage != "eval":
        raise InputError(f"--model: --stage {stage} takes one model, not {len(config.models)}")
    for f in fields(Config):
        if f.name in given and not {stage, objective} & set(f.metadata["stages"]):
            where = f"--stage qat --objective {objective}" if stage == "qat" else f"--stage {stage}"
            raise InputError(f"--{f.name.replace('_', '-')} does nothing in {where}; leave it out")
    if config.revision and demo:
        raise InputError("--revision is for hub models; the demo has none")
    values = asdict(config)
    if stage in RUNS:
        values["name"] = config.name or default_name(config)
    values["device"] = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(values["device"])
    values["dtype"] = config.dtype or ("bf16" if values["device"].startswith("cuda") else "fp32")
    if values["dtype"] == "fp16":
        raise InputError("--dtype fp16: Phi-2's attention scores overflow fp16's 65,504; use bf16 or fp32")
    if stage in (*TRAINING, "sweep"):
        values |= _training_values(config, given, objective)
        cuda = values["device"].startswith("cuda")
        values["attention"] = config.attention or ("flex" if config.pack and cuda else "sdpa")
        _check_training(Config(**values))
    if stage in ("quantize", "qat"):
        _check_format(config, given)
        values["block"] = config.block or 64
    if stage == "eval":
        _check_eval(config, given)
        values |= {"samples": 200 if config.samples is None else config.samples}
        values |= {"micro_batch_size": config.micro_batch_size or 16, "temperature": config.temperature or 0.0}
    if stage == "sweep":
        _check_sweep(config)
    if stage == "chat":
        _check_chat(config)
        values["temperature"] = 0.7 if config.temperature is None else config.temperature
    if stage == "data":
        values["eval_share"] = config.eval_share or 0.2
        _check_data(config)
    return Config(**values)


def _training_values(config: Config, given: set[str], objective: str) -> dict:
    """What the recipe of the model and objective says for the fields that were not given."""
    demo = config.model == "demo"
    for name in ("demo_rows", "flip_rate"):
        if name in given and (not demo or config.train):
            raise InputError(f"--{name.replace('_', '-')} is for the demo's own data; leave it out")
    if config.stage == "mcq" and not config.train:
        raise InputError("--train FILE.jsonl is missing: multiple-choice questions, such as --stage data makes them")
    if not demo and not config.train:
        raise InputError(f"--train FILE.jsonl is missing: what shall {config.model} be tuned on?")
    if config.eval and not config.train:
        raise InputError("--eval needs --train: the demo's own questions are split by --eval-share")
    if config.eval and "eval_share" in given:
        raise InputError("--eval-share does nothing beside --eval; leave one of them out")
    kind = "demo" if demo else "phi"
    recipe = RECIPES[kind, objective] | (RECIPES[kind, "qat"] if config.stage == "qat" and objective == "sft" else {})
    if config.lora and objective == "dpo":
        recipe = recipe | RECIPES.get((kind, "lora"), {})
    if config.loss is not None and config.eps is None:
        recipe = recipe | {"eps": None}  # the recipe's eps belongs to the recipe's loss
    values = {name: recipe[name] for name in recipe if getattr(config, name) is None}
    values["objective"] = objective
    values["save_every"] = config.save_every or config.eval_every or recipe["eval_every"]
    values["metric"] = config.metric or METRICS[objective][0]
    return values


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: give cpu, cuda, or cuda:1 for the second GPU") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")


def _check_format(config: Config, given: set[str]) -> None:
    if config.to is None:
        raise InputError(f"--to FORMAT is missing; choose one of {', '.join(FORMATS)}")
    if config.to == "int8" and ("block" in given or config.double):
        raise InputError("--to int8 has a scale a row; --block and --double are for the blockwise formats, leave them out")
    if config.to != "int8" and config.threshold is not None:
        raise InputError(f"--threshold is for --to int8; with {config.to} only the weights are rounded, leave it out")
    if config.to == "int4-asym" and config.double:
        raise InputError("--double is for formats with one scale a block; int4-asym has two, leave it out")
    if config.to == "dynamic8" and config.stage == "qat":
        raise InputError("--to dynamic8 has no level at -1, so rounding twice is not rounding once; train another format")
    if config.block is not None and config.block < 1:
        raise InputError(f"--block {config.block}: must be positive")
    if config.threshold is not None and not 0 < config.threshold < float("inf"):
        raise InputError(f"--threshold {config.threshold}: must be positive; the paper's is 6")


# Flags that a report card (--precisions) has no use for.
NOT_ON_CARD = (
    "other_models bert max_new_tokens teacher concurrency price budget beta eps samples micro_batch_size dtype temperature"
).split()


def _check_eval(config: Config, given: set[str]) -> None:
    if config.precisions:
        unknown = [name for name in config.precisions.split(",") if name not in PRECISIONS]
        if unknown:
            raise InputError(f"--precisions: no {unknown[0]!r}; choose from {', '.join(PRECISIONS)}")
        unused = [name for name in NOT_ON_CARD if name in given]
        if unused:
            flag = "a second --model" if unused[0] == "other_models" else f"--{unused[0].replace('_', '-')}"
            raise InputError(f"{flag} does nothing beside --precisions; leave one of them out")
    elif config.compile:
        raise InputError("--compile is for --precisions; leave it out")
    if len(set(config.models)) < len(config.models):
        raise InputError("--model names a model twice")
    if not config.data and {"letter_only", "on_bad_row"} & given:
        raise InputError("--letter-only and --on-bad-row are for --data; what a run held out is read as the run read it")
    _check_positive(config, ["max_new_tokens", "micro_batch_size", "concurrency", "beta"])
    _check_not_negative(config, ["samples", "temperature"])
    if config.eps is not None and not 0 <= config.eps < 0.5:
        raise InputError(f"--eps {config.eps}: a flip rate lies in [0, 0.5); at 0.5 the labels say nothing")
    if not config.teacher and {"price", "budget", "concurrency"} & given:
        raise InputError("--price, --budget and --concurrency are for a judge; add --teacher MODEL or leave them out")
    if config.samples == 0 and {"bert", "teacher", "max_new_tokens", "temperature"} & given:
        raise InputError("--bert, --teacher, --max-new-tokens and --temperature need answers; leave --samples 0 out")


def _check_sweep(config: Config) -> None:
    if config.resume or config.dry_run and config.preset:
        raise InputError("a sweep needs no --resume: the same command goes on; --preset has no --dry-run")
    if config.preset not in (None, "report"):
        raise InputError(f"--preset {config.preset} is for the training stages; a sweep has --preset report")
    if bool(config.grid) == bool(config.preset):
        raise InputError("--stage sweep takes either --grid FLAG=VALUES (such as --grid beta=0.1,0.3) or --preset report")
    if config.preset and config.loss not in (None, "robust"):
        raise InputError(
            f"--loss {config.loss}: --preset report is about the robust loss; leave it out, or sweep with --grid"
        )
    if config.preset and config.full_grid:
        raise InputError("--full-grid is for --grid; --preset report varies one flag at a time")
    _check_positive(config, ["seeds"])


def _check_chat(config: Config) -> None:
    _check_positive(config, ["top_p", "max_new_tokens"])
    _check_not_negative(config, ["temperature"])
    if config.top_p > 1:
        raise InputError(f"--top-p {config.top_p}: a probability, at most 1")


def _check_data(config: Config) -> None:
    if not config.sources:
        raise InputError("--sources is missing: a list such as theoremqa,mmlu_stem=DIR")
    if config.eval_share is not None and not 0 < config.eval_share < 1:
        raise InputError(f"--eval-share {config.eval_share}: must lie between 0 and 1")
    if config.concurrency < 1:
        raise InputError(f"--concurrency {config.concurrency}: must be positive")
    if not config.teacher and (config.price or config.budget is not None):
        raise InputError("--price and --budget are for a teacher; add --teacher MODEL or leave them out")


def _check_positive(config: Config, names: list[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be positive")


def _check_not_negative(config: Config, names: list[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be 0 or more")


def _check_lora(config: Config) -> None:
    if config.lora is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "base"):
            if getattr(config, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is for adapters; add --lora RANK (such as 16) or leave it out")
        return
    _check_positive(config, ["lora", "lora_alpha"])
    if config.stage == "qat":
        raise InputError("--lora: --stage qat tunes the weights, which adapters keep frozen; leave it out")
    if config.lora_dropout is not None and not 0 <= config.lora_dropout < 1:
        raise InputError(f"--lora-dropout {config.lora_dropout}: must lie in [0, 1)")
    if config.base == "bf16" and config.dtype != "bf16":
        raise InputError("--base bf16 needs --dtype bf16: weights and inputs of a product have one type")


def _check_training(config: Config) -> None:
    if config.attention == "flex" and not config.device.startswith("cuda"):
        raise InputError("--attention flex trains on CUDA only; leave it out to use scaled-dot-product attention")
    if config.compile and config.base in FORMATS:
        raise InputError(
            f"--compile would keep the decoded weights of --base {config.base} in memory; leave one of them out"
        )
    if config.metric not in METRICS[config.objective]:
        raise InputError(
            f"--metric {config.metric}: choose one of {', '.join(METRICS[config.objective])}. (A robust loss ranks "
            "diverging runs first, so it is not offered.)"
        )
    _check_positive(config, "max_length max_prompt_length epochs max_steps batch_size micro_batch_size eval_every".split())
    _check_positive(config, "save_every keep patience demo_rows lr clip pack".split())
    _check_not_negative(config, ["warmup_steps", "weight_decay", "nll_weight", "samples"])
    if not 0 < config.adam_beta2 < 1:
        raise InputError(f"--adam-beta2 {config.adam_beta2}: must lie between 0 and 1")
    if not 0 < config.eval_share < 1:
        raise InputError(f"--eval-share {config.eval_share}: must lie between 0 and 1")
    if config.max_prompt_length >= config.max_length:
        raise InputError(
            f"--max-prompt-length {config.max_prompt_length} leaves no room for an answer in "
            f"--max-length {config.max_length}"
        )
    if config.flip_rate is not None and not 0 <= config.flip_rate < 0.5:
        raise InputError(f"--flip-rate {config.flip_rate}: must lie in [0, 0.5)")
    _check_lora(config)
    if config.offload_optimizer and not config.device.startswith("cuda"):
        raise InputError("--offload-optimizer moves AdamW's moments from the GPU to the CPU, where they are; leave it out")
    if config.objective == "dpo":
        check_loss(config.loss, config.beta, config.eps)
