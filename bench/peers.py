"""The peers' side: the same models and steps, set up as their own users would.

TRL's trainers ask for a tokenizer and a data set. Neither is used: the batch is ours, laid out as their collators do it.
"""

import json
import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

import demo
from data import Example

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
ADAPTED = ("lora", "qlora")  # kinds of a training.Setup that have adapters
BETA, EPS = 0.1, 0.1
RANK = 16  # of the adapters, ours and PEFT's; alpha is the same, so that both add B A x


def load_phi(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", base: str | None = None):
    """transformers' Phi; `base`: "nf4" or "int8" by bitsandbytes, computing in `dtype`."""
    import transformers

    if not base:
        return transformers.PhiForCausalLM.from_pretrained(directory, dtype=dtype).to(device)
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    config = transformers.BitsAndBytesConfig(**(four if base == "nf4" else {"load_in_8bit": True}))
    options = dict(dtype=dtype, device_map={"": device}, quantization_config=config)
    return transformers.PhiForCausalLM.from_pretrained(directory, **options)


def llama_server(file: Path, threads: int = 1, exact: bool = False) -> Callable:
    """llama.cpp's server with a GGUF file: ask(route, body) -> the answer's JSON. `exact`: keys and values in fp32
    instead of fp16, and attention in separate steps."""
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path = str(file)
    how.port, how.n_parallel, how.n_ctx, how.verbosity, how.warmup = 0, 1, 0, 1, False  # a free port, the model's window
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = threads
    if exact:
        how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(how)

    def ask(route: str, body: dict) -> dict:
        url, headers = f"{server.listening_address}/{route}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
            return json.load(answer)

    return ask


def nf4_layer(plain: torch.nn.Linear) -> torch.nn.Module:
    """bitsandbytes' layer for the weights of `plain`, as it is for evaluation."""
    import bitsandbytes as bnb

    nf4 = bnb.nn.Linear4bit(plain.in_features, plain.out_features, quant_type="nf4", compress_statistics=False)
    nf4.load_state_dict(plain.state_dict())
    nf4.to(plain.weight.device)
    return nf4.eval()


def trl_trainer(model, reference, setup):
    """TRL's SFTTrainer or DPOTrainer for a `training.Setup`. With adapters its reference is the model without them."""
    import datasets
    import transformers
    import trl

    settings = dict(output_dir=str(Path(setup.directory) / "trl"), report_to="none", max_length=None, disable_tqdm=True)
    settings |= dict(use_cpu=setup.device == "cpu", bf16=setup.dtype == "bf16", gradient_checkpointing=setup.checkpointing)
    if setup.kind == "sft":
        make, config, options = trl.SFTTrainer, trl.SFTConfig, {}
        example = {"prompt": "a", "completion": "b"}
    else:
        make, config, options = trl.DPOTrainer, trl.DPOConfig, {"ref_model": reference}
        example = {"prompt": "a", "chosen": "b", "rejected": "a"}
        keep_no_copy = reference is None and setup.kind not in ADAPTED  # of the model, as the reference
        settings |= dict(precompute_ref_log_probs=keep_no_copy, loss_type="robust", beta=BETA, label_smoothing=EPS)
    if setup.kind in ADAPTED:
        from peft import LoraConfig

        shape = dict(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear")
        options["peft_config"] = LoraConfig(**shape, task_type="CAUSAL_LM")
    names = dict(pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=demo.train_tokenizer([]), **names)
    options |= dict(train_dataset=datasets.Dataset.from_list([example] * 8), processing_class=tokenizer)
    trainer = make(model, args=config(**settings), **options)
    trainer.model.train()
    if setup.checkpointing:  # its train() would do this
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trainer


def trl_batch(examples: list[Example], device: str) -> dict:
    """TRL's layout. Pairs: all chosen rows, then all rejected ones, each with its own prompt. Else one row per example."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if len(examples[0].completions) == 2:
        make, names = DataCollatorForPreference, ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, (e.prompt, *e.completions))) for e in examples]
    else:
        make = DataCollatorForLanguageModeling
        both = [(e.prompt, e.completions[0]) for e in examples]
        rows = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in both]
    return {name: value.to(device) for name, value in make(pad_token_id=0)(rows).items()}


def trained(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by our names for them: "model.layers.0.mlp.fc1.lora_A" where PEFT says
    "base_model.model.model.layers.0.mlp.fc1.lora_A.default.weight"."""
    named = {n.removeprefix("base_model.model.").removesuffix(".default.weight"): p for n, p in model.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


def draw_adapters(model) -> None:
    """The same random A and B for ours and PEFT's. B must not be 0, as it is at first, or A's gradient would be 0."""
    draw = torch.Generator().manual_seed(2)
    for _, p in sorted(trained(model).items()):
        p.data.copy_(0.01 * torch.randn(p.shape, generator=draw))
