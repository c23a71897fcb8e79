"""Every option of `train.py`: one dataclass, whose fields are the command line's flags.

A field with the default None takes its value from RECIPES, by model and stage: a 1 M-parameter model wants another
learning rate than Phi-2. An unknown flag is an error, and so is a flag that would do nothing in the chosen stage.
"""

import argparse
import shlex
import typing
from dataclasses import dataclass, field, fields

from dpo import LOSSES
from quant import FORMATS
from runtime import parallel

TRAINING = ("sft", "dpo", "mcq", "qat")
RUNS = ("data", *TRAINING, "quantize", "merge", "eval", "sweep")  # stages that leave a directory behind
STAGES = (*RUNS, "chat")
# Values of flags that are not given. `report` is what the report's authors ran, from their code; the others fit Phi-2, with
# rows as long as --max-length allows, on a GPU of that size by the estimate of memory.py (tests/test_memory.py).
LORA = dict(lora=16, lora_alpha=16.0)  # on all linear layers
LEAN = dict(dtype="bf16", gradient_checkpointing=True)
PRESETS = {
    "report": LORA
    | dict(
        model="rhysjones/phi-2-orange-v2",
        system_prompt="You are a helpful EPFL chatbot.",
        lora_dropout=0.1,
        dtype="fp32",
        loss="robust",
        beta=0.3,
        eps=0.1,
        lr=1e-5,
        schedule="cosine",
        warmup_steps=5,
        clip=1.0,
        epochs=3,
        batch_size=32,
        micro_batch_size=1,
        gradient_checkpointing=True,
        max_length=2048,
        max_prompt_length=1024,
        eval_every=500,
    ),
    "8gb": LORA | dict(base="nf4", max_length=1024, max_prompt_length=512, micro_batch_size=4) | LEAN,
    "24gb": LORA | dict(base="bf16", max_length=2048, max_prompt_length=1024, micro_batch_size=8) | LEAN,
    "80gb": dict(max_length=2048, max_prompt_length=1024, micro_batch_size=8) | LEAN,
}
OBJECTIVES = ("sft", "dpo")  # what a training stage minimizes; qat takes either
PRECISIONS = ("fp32", "bf16", "nf4-double", "fp4-double", "int4-double", "llm.int8", *FORMATS)  # rows of the report card
# What "best" may mean. A robust loss is not among them: it can be lowered without bound by diverging (see dpo.py).
METRICS = {"sft": ("loss",), "dpo": ("debiased_accuracy", "rewards/accuracies", "dpo_loss")}
LOWER_IS_BETTER = ("loss", "dpo_loss")


def flag(default: object, help: str, stages: tuple[str, ...] = TRAINING, choices: tuple[str, ...] | None = None):
    """`stages`: where the flag does something. "sft" stands for mcq and qat too, "dpo" for sweep and for qat with it."""
    return field(default=default, metadata={"help": help, "stages": stages, "choices": choices})


@dataclass
class Config:
    stage: str = flag("dpo", "what to do", STAGES, STAGES)
    model: str = flag("demo", "demo, a directory, or a hub name such as microsoft/phi-2; several in --stage eval", STAGES)
    other_models: list[str] = field(default_factory=list, metadata={"stages": ("eval",)})  # --model's second, third, ...
    revision: str | None = flag(None, "branch, tag or commit of a hub model", STAGES)
    name: str | None = flag(None, "name of the run: it lives in OUT/NAME (default: model and stage)", RUNS)
    out: str = flag("out", "directory of all runs", STAGES)
    resume: bool = flag(False, "continue the run of this name from its last checkpoint, with its own settings")
    overwrite: bool = flag(False, "delete an earlier run of this name first", RUNS)
    dry_run: bool = flag(
        False,
        "show config, data, batches, memory and time, a sweep's runs, or what a teacher would cost; do nothing",
        (*TRAINING, "data"),
    )

    to: str | None = flag(None, "number format of the weights", ("quantize", "qat"), FORMATS)
    block: int | None = flag(None, "values that share a scale, but for int8 (default 64)", ("quantize", "qat"))
    double: bool = flag(False, "quantize the scales too", ("quantize",))
    threshold: float | None = flag(
        None,
        "int8: round activations too but for outliers from here on, as LLM.int8() does at 6 (default: weights only)",
        ("quantize",),
    )
    output_layer: bool = flag(False, "quantize the output layer too", ("quantize",))
    compile: bool = flag(
        False, "fuse operations with torch.compile: a block's in training, the quantizers'", (*TRAINING, "quantize", "eval")
    )
    objective: str | None = flag(None, "what to minimize (default sft)", ("qat",), OBJECTIVES)
    precisions: str | None = flag(None, "report card: formats to compare, such as fp32,int8,nf4-double", ("eval",))
    data: str | None = flag(
        None, "JSONL file to measure on (default: what was held out of the training rows)", ("merge", "eval", "sweep")
    )
    reference_model: str | None = flag(
        None,
        "directory of the model that rewards are measured from (default: the one that --model was tuned from)",
        ("eval",),
    )
    bert: str | None = flag(None, "BERT or RoBERTa for BERTScore: a directory or hub name with safetensors", ("eval",))

    grid: list[str] | None = flag(None, "values to try, such as beta=0.1,0.3; once for each flag to vary", ("sweep",))
    full_grid: bool = flag(False, "try all combinations (default: vary one flag at a time)", ("sweep",))
    seeds: int = flag(1, "runs of each setting, with seeds SEED, SEED + 1, ...", ("sweep",))
    preset: str | None = flag(
        None,
        "report: what the report's authors ran (sweep: the report's tables, figure and claims); 8gb, 24gb, 80gb: settings "
        "that fit on a GPU of that size. Flags that are given win over the preset",
        (*TRAINING, "sweep"),
        tuple(PRESETS),
    )

    prompt: str | None = flag(None, "answer this once and exit (- reads it from standard input)", ("chat",))
    temperature: float | None = flag(
        None, "of sampling; 0 always takes the likeliest token (default: eval 0, chat 0.7)", ("eval", "chat")
    )
    top_p: float = flag(0.95, "sample from the likeliest tokens that have this probability together", ("chat",))
    max_new_tokens: int = flag(256, "tokens of an answer, at most", ("eval", "chat"))

    sources: str | None = flag(
        None, "data sets, such as theoremqa,mmlu_stem=DIR (NAME from the hub, NAME=PATH a copy)", ("data",)
    )
    sizes: str = flag("", "training rows of each mixture, such as 20000,30000 (default: one with all rows)", ("data",))
    shares: str = flag("", "shares of the mixture, such as epfl=2,mmlu_stem=1 (default: equal)", ("data",))
    shares_by: str = flag("source", "what --shares names", ("data",), ("source", "topic"))
    independent: bool = flag(False, "draw each size anew instead of each inside the next", ("data",))
    match_lengths: bool = flag(
        False, "as many pairs whose longer answer is chosen as whose shorter is, by source", ("data",)
    )
    topics: str | None = flag(None, "filled-in copy of topics_to_review.jsonl", ("data",))
    teacher: str | None = flag(
        None, "model that writes missing answers, or judges two (OPENAI_API_KEY, OPENAI_BASE_URL)", ("data", "eval")
    )
    concurrency: int = flag(8, "calls to the teacher at a time", ("data", "eval"))
    price: str | None = flag(None, "of a million tokens in and out, such as 0.5,1.5", ("data", "eval"))
    budget: float | None = flag(
        None, "stop before the teacher has cost more than this, in the price's currency", ("data", "eval")
    )
    letter_only: bool = flag(False, "answer with the letter alone, without explaining first", ("mcq", "eval"))

    train: str | None = flag(None, "JSONL file to train on (the demo makes its own)")
    eval: str | None = flag(None, "JSONL file to evaluate on (default: a share of --train, split by question)")
    eval_share: float | None = flag(
        None, "share of the questions that is kept for evaluation (default 0.2)", (*TRAINING, "data")
    )
    on_bad_row: str = flag(
        "stop", "a row that cannot be used ends the run, or is left out", (*TRAINING, "data", "eval"), ("stop", "skip")
    )
    system_prompt: str | None = flag(
        None,
        "system turn for prompts that have none (eval, chat: default the one that the model was tuned with)",
        (*TRAINING, "eval", "chat"),
    )
    max_length: int | None = flag(None, "tokens of a prompt with one completion; longer examples are dropped")
    max_prompt_length: int | None = flag(None, "tokens of a prompt; longer ones lose their oldest text")
    whole_text: bool = flag(False, "put the loss on the prompt too", stages=("sft",))
    demo_rows: int | None = flag(None, "demo: rows to generate")
    flip_rate: float | None = flag(None, "demo: share of the preference labels to swap", stages=("dpo",))

    loss: str | None = flag(None, "preference loss", stages=("dpo",), choices=LOSSES)
    beta: float | None = flag(None, "strength of the pull towards the reference (eval: default 0.1)", ("dpo", "eval"))
    eps: float | None = flag(
        None, "share of flipped labels that robust and conservative assume, and that debiasing undoes", ("dpo", "eval")
    )
    nll_weight: float | None = flag(None, "weight of the chosen answer's NLL per token", stages=("dpo",))
    reference: str = flag(
        "cached",
        "reference log-probabilities: computed once, or by a live copy of the model",
        stages=("dpo",),
        choices=("cached", "live"),
    )

    lora: int | None = flag(None, "train adapters of this rank instead of all weights", ("sft", "dpo"))
    lora_alpha: float | None = flag(
        None, "the adapters' output is scaled by ALPHA / RANK (default: the rank)", ("sft", "dpo")
    )
    lora_dropout: float | None = flag(
        None, "share of an adapter's inputs that a training step drops (default 0)", ("sft", "dpo")
    )
    lora_targets: str | None = flag(
        None,
        "layers that get adapters, such as q_proj,v_proj (default all-linear: all but the output layer)",
        ("sft", "dpo"),
    )
    base: str | None = flag(
        None, "number format of the frozen weights under --lora (default fp32)", ("sft", "dpo"), ("fp32", "bf16", *FORMATS)
    )

    lr: float | None = flag(None, "peak learning rate")
    schedule: str = flag("cosine", "decay of the learning rate to 0 after the warm-up", choices=("cosine", "linear"))
    warmup_steps: int | None = flag(None, "steps in which the learning rate rises from 0")
    epochs: int | None = flag(None, "passes over the training rows")
    max_steps: int | None = flag(None, "stop after this many steps (the schedule ends there too)")
    batch_size: int | None = flag(None, "examples per optimizer step")
    micro_batch_size: int | None = flag(
        None, "examples per forward pass; the gradients of a step add up", (*TRAINING, "eval")
    )
    optimizer: str = flag("adamw", "adamw8bit keeps AdamW's two moments in 8 bits", choices=("adamw", "adamw8bit"))
    offload_optimizer: bool = flag(False, "keep AdamW's moments in the CPU's memory; needs CUDA")
    adam_beta2: float | None = flag(None, "AdamW's memory of squared gradients")
    weight_decay: float = flag(0.0, "AdamW's decay of the weight matrices")
    clip: float = flag(1.0, "largest norm of the gradient")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    pack: int | None = flag(
        None,
        "let several examples share a row of up to this many tokens in training; a longer one has its own, and "
        "--micro-batch-size is for evaluation then (default: a row each)",
    )
    attention: str | None = flag(
        None, "attention kernel; flex needs CUDA (default: flex with --pack on CUDA, else sdpa)", choices=("sdpa", "flex")
    )
    dtype: str | None = flag(
        None,
        "compute type; weights are fp32, but in chat (default: bf16 on CUDA, fp32 on the CPU)",
        (*TRAINING, "eval", "chat"),
        ("fp32", "bf16", "fp16"),
    )
    device: str | None = flag(None, "cpu, cuda, cuda:1, ... (default: cuda if there is one)", STAGES)
    seed: int = flag(0, "of the data's split and order, the demo's questions and weights, and of sampling", STAGES)

    eval_every: int | None = flag(None, "steps between evaluations")
    save_every: int | None = flag(None, "steps between checkpoints (default: eval_every)")
    keep: int = flag(2, "checkpoints to keep, besides the best one")
    metric: str | None = flag(None, "what makes a checkpoint the best, measured in evaluation")
    patience: int | None = flag(None, "stop after this many evaluations without a new best")
    samples: int | None = flag(
        None, "evaluation prompts to answer before and after (eval: default 200)", (*TRAINING, "eval")
    )

    @property
    def models(self) -> list[str]:
        return [self.model, *self.other_models]


# The demo's were tuned until its generations improved; Phi-2's DPO values are those of the report's authors.
DEMO = dict(eval_share=0.2, max_length=1024, max_prompt_length=512, nll_weight=0.0, epochs=1)
PHI = dict(
    eval_share=0.2,
    max_length=2048,
    max_prompt_length=1024,
    nll_weight=0.0,
    lr=1e-5,
    adam_beta2=0.999,
    batch_size=32,
    micro_batch_size=4,
)
RECIPES = {
    ("demo", "sft"): DEMO
    | dict(
        demo_rows=26_000,
        eval_share=0.01,
        lr=1.5e-3,
        adam_beta2=0.99,
        warmup_steps=50,
        batch_size=8,
        micro_batch_size=8,
        eval_every=1000,
        samples=0,
    ),
    ("demo", "dpo"): DEMO
    | dict(
        demo_rows=7_000,
        flip_rate=0.2,
        loss="robust",
        beta=0.3,
        eps=0.2,
        nll_weight=2.0,
        lr=2e-4,
        adam_beta2=0.999,
        warmup_steps=10,
        batch_size=16,
        micro_batch_size=16,
        eval_every=50,
        samples=1000,
    ),
    ("demo", "lora"): dict(lr=2e-3),  # on top of ("demo", "dpo"): adapters start from 0 and want longer steps
    ("demo", "qat"): dict(demo_rows=4_000, eval_share=0.2, epochs=2, lr=5e-4, eval_every=200),  # on top of ("demo", "sft")
    ("phi", "qat"): {},
    ("phi", "sft"): PHI | dict(warmup_steps=20, epochs=1, eval_every=200, samples=3),
    ("phi", "dpo"): PHI | dict(loss="robust", beta=0.3, eps=0.1, warmup_steps=5, epochs=3, eval_every=500, samples=16),
}
PHI2_COMMAND = "python train.py --stage dpo --preset report --train pairs.jsonl"


def parse(argv: list[str] | None) -> tuple[Config, set[str]]:
    """The config of a command line and the names of the flags that were given. Unset fields are still None."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Preference-tune a Phi-2: see README.md.",
    )
    types = typing.get_type_hints(Config)
    for f in fields(Config):
        if "help" not in f.metadata:
            continue
        kind = next(t for t in (*typing.get_args(types[f.name]), types[f.name]) if t is not type(None))
        names = list(dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}")))
        if f.name == "model":
            help = f"{f.metadata['help']} (default {f.default})"
            parser.add_argument(*names, nargs="+", help=help, metavar="MODEL")
        elif typing.get_origin(kind) is list:
            parser.add_argument(*names, action="append", help=f.metadata["help"], metavar="FLAG=VALUES")
        elif kind is bool:
            parser.add_argument(*names, action="store_true", help=f.metadata["help"])
        else:
            default = "" if f.default is None else f" (default {f.default})"
            parser.add_argument(
                *names,
                type=kind,
                choices=f.metadata["choices"],
                help=f.metadata["help"] + default,
                metavar=None if f.metadata["choices"] else kind.__name__.upper(),
            )
    given = vars(parser.parse_args(argv))
    if "model" in given:
        given["model"], *others = given["model"]
        given |= {"other_models": others} if others else {}
    return Config(**given), set(given)


def default_name(config: Config) -> str:
    if config.stage == "data":
        return "data"
    model = config.model.rstrip("/").rpartition("/")[2] or "model"
    if config.stage == "merge":
        return f"{model}-merged"
    if config.stage == "quantize":
        return f"{model}-{config.to}" + ("-double" if config.double else "")
    if config.stage == "sweep" and config.preset:
        return f"{model}-{config.preset}"
    base = config.base if config.base in FORMATS else None
    parts = [model, config.stage, config.to, "lora" if config.lora else None, base]
    return "-".join(part for part in parts if part)


def resume_command(config: Config) -> str:
    """The command line that continues this run; everything else is read from its run.json."""
    where = [] if config.out == Config.out else ["--out", config.out]
    return shlex.join([*parallel.launcher(), "train.py", "--stage", config.stage, "--name", config.name, *where, "--resume"])
