"""TRL's DPOTrainer, set up so that it takes a batch of token ids from us."""

import datasets
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference


def trl_trainer(directory, policy, reference, use_cpu=True, **settings) -> DPOTrainer:
    """A DPOTrainer in fp32 for two transformers models. It needs a tokenizer and a data set, which stay unused."""
    words = {"[PAD]": 0, "[END]": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]")
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}] * 8)
    config = DPOConfig(
        output_dir=str(directory),
        use_cpu=use_cpu,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        **settings,
    )
    return DPOTrainer(policy, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)


def trl_batch(examples) -> dict:
    """Our examples as TRL's collator lays them out: all chosen rows, then all rejected ones, each with its own prompt."""
    collator = DataCollatorForPreference(pad_token_id=0)
    return collator(
        [{"prompt_ids": e.prompt, "chosen_ids": e.completions[0], "rejected_ids": e.completions[1]} for e in examples]
    )
