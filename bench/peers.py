"""The peers' side of bench.py: the same step, set up as their own users would.

TRL's trainers take a tokenizer and a data set, which stay unused: the batch is ours, laid out as their collators do it.
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from data import Example

RANK = 16  # of the adapters, ours and PEFT's; alpha is the same, so that both add B A x


def trainer_arguments(device: str, bf16: bool, checkpointing: bool, **settings) -> dict:
    return (
        dict(
            output_dir=tempfile.mkdtemp(),
            use_cpu=device == "cpu",
            report_to="none",
            bf16=bf16,
            gradient_checkpointing=checkpointing,
            max_length=None,
            disable_tqdm=True,
        )
        | settings
    )


def word_tokenizer():
    """A tokenizer of four words: TRL wants one, nothing is tokenized with it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[END]": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]")


def load_phi(directory: Path, device: str, dtype: torch.dtype = torch.float32, base: str | None = None):
    """transformers' Phi; `base`: "nf4" or "int8" by bitsandbytes, computing in `dtype`."""
    import transformers

    options = {}
    if base:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        options["device_map"] = {"": device}
        four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            **(four if base == "nf4" else {"load_in_8bit": True})
        )
    phi = transformers.PhiForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    return phi if base else phi.to(device)


def adapters():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def dpo_trainer(
    model, reference, device: str, *, lora: bool = False, bf16: bool = False, checkpointing: bool = False, **loss
):
    """TRL's DPOTrainer, with PEFT's adapters if `lora` (its reference is then the model with the adapters off)."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}] * 8)
    config = DPOConfig(**trainer_arguments(device, bf16, checkpointing, **loss))
    peft = dict(peft_config=adapters()) if lora else {}
    trainer = DPOTrainer(model, reference, args=config, train_dataset=rows, processing_class=word_tokenizer(), **peft)
    trainer.model.train()
    return trainer


def sft_trainer(model, device: str, *, lora: bool = False, bf16: bool = False, checkpointing: bool = False):
    """TRL's SFTTrainer."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 8)
    config = SFTConfig(**trainer_arguments(device, bf16, checkpointing))
    peft = dict(peft_config=adapters()) if lora else {}
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=word_tokenizer(), **peft)
    trainer.model.train()
    return trainer


def dpo_batch(examples: list[Example], device: str) -> dict:
    """All chosen rows, then all rejected ones, each with its own prompt."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [{"prompt_ids": e.prompt, "chosen_ids": e.completions[0], "rejected_ids": e.completions[1]} for e in examples]
    return {name: value.to(device) for name, value in DataCollatorForPreference(pad_token_id=0)(rows).items()}


def sft_batch(examples: list[Example], device: str) -> dict:
    """One row an example, the loss on its first completion."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = []
    for e in examples:
        ids = e.prompt + e.completions[0]
        rows.append({"input_ids": ids, "labels": [-100] * len(e.prompt) + e.completions[0]})
    return {name: value.to(device) for name, value in DataCollatorForLanguageModeling(pad_token_id=0)(rows).items()}


def with_cached_reference(trainer, batch: dict) -> dict:
    """The batch with its reference log-probabilities, which TRL then reads instead of running its reference."""
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    trainer.precompute_ref_logps = True
    return batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def set_adapters(model, values: dict[str, torch.Tensor]) -> None:
    """Gives PEFT's adapters our values, {"model.layers.0.mlp.fc1.lora_A": tensor}."""
    parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in values.items():
        parameters[name].data.copy_(value)


def plain_name(name: str) -> str:
    """Our name of one of PEFT's parameters."""
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def trainer_step(trainer, batch: dict) -> Callable:
    """step() -> (loss, gradients by our names): the trainer's loss under its autocast, which its train() would turn on, and
    the backward pass."""

    def step():
        trainer.model.zero_grad()
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.item(), {plain_name(name): p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}

    return step
