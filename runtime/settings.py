"""Everything that can be set: one dataclass per stage, made of shared parts. Each field is a flag of the command line.

Settings are flat, `settings.lr`, and a function names the part that it needs: `make_optimizer(model, settings: Optimizer)`.
A value comes from the highest layer that has one:

    flag       what was typed
    preset     --preset NAME, from PRESETS
    demo       DEMO, if --model is demo: a model of a million parameters needs other learning rates than Phi-2
    default    DEFAULTS for the stage, or the field's own default below: values for Phi-2

`runtime/flags.py` turns the fields into flags and help, puts the layers together and checks the values. Neither file imports
torch, so the command line answers in a fraction of a second.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

# The names in quant.FORMATS; quant.py needs torch, so they are repeated here, and a test compares the two.
FORMATS = ("int8", "llm.int8", "nf4", "nf4-double", "fp4", "int4", "nf2")
PRECISIONS = ("fp32", "bf16", *FORMATS)
GGUF = ("gguf-f16", "gguf-q8_0", "gguf-q4_0")  # the number formats of llama.cpp
# The names in dpo.LOSSES, and whether the loss takes eps; compared by the same test.
LOSSES = {"sigmoid": False, "robust": True, "conservative": True, "ipo": False, "hinge": False}
# The last parts of the names of model.Block's linear layers; a test compares them.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
# What can decide which checkpoint is best. The robust loss cannot: it falls without bound when a run diverges (see dpo.py).
METRICS = {"sft": ("loss",), "dpo": ("debiased_accuracy", "rewards/accuracies", "dpo_loss")}
LOWER_IS_BETTER = ("loss", "dpo_loss")

# A limit: what to say of other values, the interval of those allowed, and which of its ends are ("[" or "]").
POSITIVE = ("must be positive", 0, math.inf, "()")
NOT_NEGATIVE = ("must be 0 or more", 0, math.inf, "[)")
SEED = ("must be a whole number from 0 to 2^63 - 1", 0, 2**63, "[)")
BETWEEN = ("must lie between 0 and 1", 0, 1, "()")
PROBABILITY = ("is a probability: above 0, at most 1", 0, 1, "(]")
DROPOUT = ("must lie in [0, 1)", 0, 1, "[)")
FLIP_RATE = ("is a flip rate, in [0, 0.5); at 0.5 the labels say nothing", 0, 0.5, "[)")


def setting(default: Any, help: str, choices: tuple = (), limit: tuple | None = None, some: tuple = ()) -> Any:
    """A field with its help. `choices`: its value is one of them; `some`: it names some of them, with commas between."""
    value = {"default_factory": list} if default == [] else {"default": default}
    return field(**value, metadata={"help": help, "choices": choices, "limit": limit, "some": some})


# ---------------------------------------------------------------------------------------------------------- shared parts
# A part's docstring is the heading of its group in --help.


@dataclass
class Model:
    """model and machine"""

    model: str | None = setting(None, "a directory, or a hub name such as microsoft/phi-2")
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    device: str | None = setting(None, "cpu, cuda, cuda:1, ... (default: cuda if there is one)")


@dataclass
class RunningModel(Model):
    """model and machine"""

    dtype: str | None = setting(None, "compute type (default: bf16 on CUDA, fp32 on a CPU)", ("fp32", "bf16"))
    system_prompt: str | None = setting(None, "system turn for prompts without one (default: the model's own, if any)")
    seed: int = setting(0, "seed of all random numbers", limit=SEED)


@dataclass
class Run:
    """run"""

    name: str | None = setting(None, "the run lives in OUT/NAME (default: model and stage)")
    out: str = setting("out", "directory of all runs")
    overwrite: bool = setting(False, "replace an earlier run of this name")


@dataclass
class BadRows:
    """data"""

    on_bad_row: str = setting("stop", "what an unusable row does: stop the run, or be skipped", ("stop", "skip"))


@dataclass
class Rows:
    """data"""

    train: str | None = setting(None, "rows to train on: a file, a folder or hub:ORG/NAME (the demo has its own)")
    eval: str | None = setting(None, "rows to evaluate on, as for --train (default: a share of --train)")
    eval_share: float = setting(0.2, "share of the questions to evaluate on", limit=BETWEEN)
    max_length: int = setting(2048, "tokens of a prompt with one completion; longer examples are dropped", limit=POSITIVE)
    max_prompt_length: int = setting(1024, "tokens of a prompt; longer ones lose their oldest text", limit=POSITIVE)


@dataclass
class Preference:
    """objective"""

    loss: str = setting("robust", "preference loss; sigmoid is plain DPO", tuple(LOSSES))
    beta: float = setting(0.3, "strength of the pull towards the reference", limit=POSITIVE)
    eps: float | None = setting(0.1, "share of flipped labels that robust and conservative assume", limit=FLIP_RATE)
    nll_weight: float = setting(0.0, "weight of the chosen answer's NLL per token", limit=NOT_NEGATIVE)


@dataclass
class Optimizer:
    """optimizer"""

    lr: float = setting(1e-5, "peak learning rate", limit=POSITIVE)
    schedule: str = setting("cosine", "decay of the learning rate to 0 after the warm-up", ("cosine", "linear"))
    warmup_steps: int = setting(5, "steps during which the learning rate rises from 0", limit=NOT_NEGATIVE)
    epochs: int = setting(3, "passes over the training rows", limit=POSITIVE)
    max_steps: int | None = setting(None, "stop after this many steps; the schedule ends there too", limit=POSITIVE)
    batch_size: int = setting(32, "examples per optimizer step", limit=POSITIVE)
    optimizer: str = setting("adamw", "adamw8bit keeps AdamW's two moments in 8 bits", ("adamw", "adamw8bit"))
    adam_beta2: float = setting(0.999, "AdamW's memory of squared gradients", limit=BETWEEN)
    weight_decay: float = setting(0.0, "AdamW's decay of the weight matrices", limit=NOT_NEGATIVE)
    clip: float = setting(1.0, "largest norm of the gradient", limit=POSITIVE)


@dataclass
class Memory:
    """memory"""

    preset: str | None = setting(None, "settings for a GPU of that size", ("8gb", "24gb", "80gb"))
    micro_batch_size: int = setting(4, "examples per forward pass", limit=POSITIVE)
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, a third more time")
    compile: bool = setting(False, "fuse each block's operations with torch.compile")
    dry_run: bool = setting(False, "show settings, data, batches, memory and time; train nothing")


@dataclass
class Adapters:
    """adapters (LoRA)"""

    lora: int | None = setting(None, "train adapters of this rank instead of all weights", limit=POSITIVE)
    lora_alpha: float | None = setting(None, "scale the adapters' output by ALPHA / RANK (default: RANK)", limit=POSITIVE)
    lora_dropout: float = setting(0.0, "dropout on an adapter's inputs while training", limit=DROPOUT)
    lora_targets: str | None = setting(None, "layers to adapt, as q_proj,fc1 (default: all but lm_head)", some=LINEAR_LAYERS)
    base: str | None = setting(None, "number format of the frozen weights (default: fp32)", PRECISIONS)


@dataclass
class Checkpoints:
    """evaluation and checkpoints"""

    eval_every: int = setting(500, "steps between evaluations", limit=POSITIVE)
    save_every: int | None = setting(None, "steps between checkpoints (default: --eval-every)", limit=POSITIVE)
    keep: int = setting(2, "checkpoints to keep, besides the best one", limit=POSITIVE)
    metric: str | None = setting(None, "what decides which checkpoint is best (default: loss; DPO: debiased_accuracy)")
    patience: int | None = setting(None, "stop after this many evaluations without a new best", limit=POSITIVE)
    samples: int = setting(16, "evaluation prompts to answer before and after", limit=NOT_NEGATIVE)
    resume: bool = setting(False, "continue the run of this name from its last checkpoint")


@dataclass
class Format:
    """number format"""

    to: str | None = setting(None, "number format of the weights", FORMATS)
    block: int = setting(64, "values that share a scale, in the 4-bit and 2-bit formats", limit=POSITIVE)


@dataclass
class Asking:
    """teacher"""

    teacher: str | None = setting(None, "model that writes missing answers, or judges (OPENAI_API_KEY, OPENAI_BASE_URL)")
    concurrency: int = setting(8, "simultaneous calls to the teacher", limit=POSITIVE)
    price: str | None = setting(None, "price of a million tokens in and out, such as 0.5,1.5")
    budget: float | None = setting(None, "stop before the teacher costs more, in the price's currency", limit=NOT_NEGATIVE)


# --------------------------------------------------------------------------------------------------------- the stages


@dataclass
class Data(BadRows, Asking, Run):
    """Build preference pairs from the report's sources, completed by a teacher"""

    stage: ClassVar[str] = "data"
    sources: str | None = setting(None, "data sets, such as theoremqa,mmlu_stem=DIR (NAME from the hub, NAME=PATH a copy)")
    what: str = setting("pairs", "the rows to make: preference pairs, or questions with answers for SFT", ("pairs", "sft"))
    sizes: str = setting("", "training rows of each mixture, such as 20000,30000 (default: one with all rows)")
    shares: str = setting("", "shares of the mixture, such as epfl=2,mmlu_stem=1 (default: equal)")
    shares_by: str = setting("source", "what --shares names", ("source", "topic"))
    match_lengths: bool = setting(False, "drop pairs until their lengths say nothing about which answer is chosen")
    eval_share: float = setting(0.2, "share of the questions to test on", limit=BETWEEN)
    seed: int = setting(0, "seed of the split and the mixtures", limit=SEED)
    dry_run: bool = setting(False, "show what the teacher would be asked and what that would cost")


@dataclass
class Tuning(RunningModel, Rows, BadRows, Optimizer, Memory, Checkpoints, Run):
    """What every training stage has. A class variable, here and below, is a setting that has no flag in that stage."""

    letter_only: ClassVar[bool] = False
    whole_text: ClassVar[bool] = False
    last_turn_only: ClassVar[bool] = False


@dataclass
class Sft(Adapters, Tuning):
    """Supervised fine-tuning: learn the reference answers"""

    stage: ClassVar[str] = "sft"
    objective: ClassVar[str] = "sft"
    whole_text: bool = setting(False, "put the loss on the prompt too")
    last_turn_only: bool = setting(False, "of a dialogue, learn the last reply alone, not all of them")


@dataclass
class Dpo(Preference, Adapters, Tuning):
    """Preference tuning: learn which of two answers is better"""

    stage: ClassVar[str] = "dpo"
    objective: ClassVar[str] = "dpo"
    preset: str | None = setting(None, "settings of the report or for a GPU of that size", ("report", "8gb", "24gb", "80gb"))


@dataclass
class Mcq(Adapters, Tuning):
    """Multiple choice: learn to explain and name the letter"""

    stage: ClassVar[str] = "mcq"
    objective: ClassVar[str] = "sft"
    letter_only: bool = setting(False, "answer with the letter alone, without explaining first")


@dataclass
class Qat(Format, Preference, Tuning):
    """Quantization-aware training: tune the weights through their rounding"""

    stage: ClassVar[str] = "qat"
    lora: ClassVar[None] = None
    lora_dropout: ClassVar[float] = 0.0
    base: ClassVar[None] = None
    preset: str | None = setting(None, "settings for a GPU of that size", ("80gb",))
    objective: str = setting("sft", "the loss to minimize", ("sft", "dpo"))


@dataclass
class Quantize(Model, Format, Run):
    """Write a checkpoint in int8, 4 bits or 2 bits"""

    stage: ClassVar[str] = "quantize"


@dataclass
class Merge(Model, Run):
    """Merge adapters and their base into one plain model"""

    stage: ClassVar[str] = "merge"


@dataclass
class Export(Run):
    """Write a checkpoint as a GGUF file, for llama.cpp and Ollama"""

    stage: ClassVar[str] = "export"
    model: str | None = setting(None, "a directory, or a hub name such as microsoft/phi-2")
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    to: str | None = setting(None, "number format of the matrices", GGUF)


@dataclass
class Push:
    """Send a model and its card to the Hugging Face hub"""

    stage: ClassVar[str] = "push"
    model: str | None = setting(None, "a directory, as a run leaves it")
    repo: str | None = setting(None, "the repository on the hub, USER/NAME; made if there is none")
    private: bool = setting(False, "make the repository private")
    dry_run: bool = setting(False, "list what would be sent; send nothing")


@dataclass
class Eval(RunningModel, BadRows, Asking, Run):
    """Measure models side by side, or one model in several number formats"""

    stage: ClassVar[str] = "eval"
    model: list[str] = setting([], "one or more directories or hub names")
    data: str | None = setting(None, "rows to measure on, as for --train (default: what the model's run held out)")
    letter_only: bool = setting(False, "multiple choice: answer with the letter alone, without explaining first")
    micro_batch_size: int = setting(16, "examples per forward pass", limit=POSITIVE)
    precisions: str | None = setting(None, "formats to measure one model in, such as fp32,nf4", some=(*PRECISIONS, *GGUF))
    reference_model: str | None = setting(None, "model that rewards are measured from (default: its parent)")
    beta: float = setting(0.1, "beta of the DPO loss", limit=POSITIVE)
    eps: float | None = setting(None, "share of flipped labels that debiased accuracy assumes", limit=FLIP_RATE)
    bert: str | None = setting(None, "BERT or RoBERTa for BERTScore: a directory or a hub name")
    samples: int = setting(200, "prompts to answer", limit=NOT_NEGATIVE)
    max_new_tokens: int = setting(256, "tokens of an answer, at most", limit=POSITIVE)
    temperature: float = setting(0.0, "randomness of the answers; 0 always takes the likeliest token", limit=NOT_NEGATIVE)


@dataclass
class Sweep(Dpo):
    """Compare the settings of DPO runs"""

    stage: ClassVar[str] = "sweep"
    preset: str | None = setting(None, "make the runs of the report instead of those of a grid", ("report",))
    grid: list[str] = setting([], "FLAG=VALUES to try, one flag at a time, such as beta=0.1,0.3")
    seeds: int = setting(1, "runs of each setting, with seeds SEED, SEED + 1, ...", limit=POSITIVE)
    data: str | None = setting(None, "test pairs, as for --train (default: questions set aside from --train)")


@dataclass
class Chat(RunningModel):
    """Talk to a model in the terminal"""

    stage: ClassVar[str] = "chat"
    prompt: str | None = setting(None, "answer this one prompt and exit (- reads it from standard input)")
    temperature: float = setting(0.7, "randomness of the answers; 0 always takes the likeliest token", limit=NOT_NEGATIVE)
    top_p: float = setting(0.95, "sample from the likeliest tokens that together have this probability", limit=PROBABILITY)
    max_new_tokens: int = setting(256, "tokens of an answer, at most", limit=POSITIVE)


STAGES = {stage.stage: stage for stage in (Data, Sft, Dpo, Mcq, Qat, Quantize, Merge, Export, Push, Eval, Sweep, Chat)}
TRAINING = ("sft", "dpo", "mcq", "qat")


# ----------------------------------------------------------------------------------------------- the layers of defaults

SFT_DEFAULTS = dict(model="demo", warmup_steps=20, epochs=1, eval_every=200, samples=3)
DEFAULTS = dict.fromkeys(("sft", "qat"), SFT_DEFAULTS)
DEFAULTS |= {"mcq": SFT_DEFAULTS | dict(model=None), "dpo": dict(model="demo"), "sweep": dict(model="demo", samples=0)}

# fmt: off
# Chosen by trial until the demo's answers improved.
DEMO_SFT = dict(
    max_length=1024, max_prompt_length=512, eval_share=0.01, epochs=1, lr=1.5e-3, adam_beta2=0.99, warmup_steps=50,
    batch_size=8, micro_batch_size=8, eval_every=1000, samples=0,
)
DEMO_DPO = dict(
    max_length=1024, max_prompt_length=512, epochs=1, loss="robust", beta=0.3, eps=0.2, nll_weight=2.0, lr=2e-4,
    warmup_steps=10, batch_size=16, micro_batch_size=16, eval_every=50, samples=1000,
)
DEMO_QAT = DEMO_SFT | dict(eval_share=0.2, epochs=2, lr=5e-4, eval_every=200)
DEMO = {"sft": DEMO_SFT, "dpo": DEMO_DPO, "sweep": DEMO_DPO | dict(samples=0), "qat": DEMO_QAT}
DEMO_LORA_LR = 2e-3  # adapters start from 0 and need a larger learning rate

# `report` is what the report's authors ran, from their code. With the others Phi-2 fits on a GPU of that size, even if all
# rows are as long as --max-length allows, according to runtime/memory.py.
LEAN = dict(dtype="bf16", gradient_checkpointing=True)
PRESETS = {
    "report": dict(
        model="rhysjones/phi-2-orange-v2", system_prompt="You are a helpful EPFL chatbot.", lora=16, lora_alpha=16.0,
        lora_dropout=0.1, dtype="fp32", loss="robust", beta=0.3, eps=0.1, lr=1e-5, schedule="cosine", warmup_steps=5,
        clip=1.0, epochs=3, batch_size=32, micro_batch_size=1, gradient_checkpointing=True, max_length=2048,
        max_prompt_length=1024, eval_every=500,
    ),
    "8gb": LEAN | dict(lora=16, lora_alpha=16.0, base="nf4", max_length=1024, max_prompt_length=512, micro_batch_size=4),
    "24gb": LEAN | dict(lora=16, lora_alpha=16.0, base="bf16", max_length=2048, max_prompt_length=1024, micro_batch_size=8),
    "80gb": LEAN | dict(max_length=2048, max_prompt_length=1024, micro_batch_size=8),
}
# fmt: on
