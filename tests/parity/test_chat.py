"""Our output in transformers: its template asks with the same tokens, and its generate stops at the same token."""

import pytest
import torch
import transformers
from rows import pair_rows
from safetensors.torch import load_file, save_file

from generate import generate
from model import Phi
from runtime.files import write_jsonl
from runtime.runs import load_chat
from train import main

SYSTEM = 'Say "ä" 🙂 {{ or }} {% \\ %}\nin a word.'
FLAGS = "--batch-size 4 --micro-batch-size 4 --max-steps 1 --lr 1e-9 --samples 1 --max-length 256 --max-prompt-length 128"


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory):
    """A model that likes to end its answers, tuned (hardly at all), quantized, given adapters, merged."""
    out = tmp_path_factory.mktemp("out")
    base = out / "base"
    base.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (base / file).write_bytes((tiny / file).read_bytes())
    tensors, draw = load_file(tiny / "model.safetensors"), torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor.normal_(0, 0.3, generator=draw)
    chat = load_chat(base)
    tensors["lm_head.bias"][sorted(chat.control_ids)] += 1.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(out / "pairs.jsonl", pair_rows(24))
    write_jsonl(out / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(24)])
    sft, dpo, to_nf4, merge = (
        f"--stage sft --train {out}/sft.jsonl --model {base} {FLAGS}",
        f"--stage dpo --train {out}/pairs.jsonl --model {out}/sft {FLAGS} --lora 2",
        f"--stage quantize --model {out}/sft --to nf4",
        f"--stage merge --model {out}/dpo",
    )
    for name, command in (("sft", sft), ("dpo", dpo), ("quantize", to_nf4), ("merge", merge)):
        system = ["--system-prompt", SYSTEM] if name in ("sft", "dpo") else []
        assert main([*command.split(), "--device", "cpu", "--out", str(out), "--name", name, *system]) == 0
    return out


DIALOGUES = [[{"role": "user", "content": f"What is {i} + {i * i}?"}] for i in range(12)]
DIALOGUES += [[{"role": "system", "content": "Be brief."}, *DIALOGUES[0]]]
DIALOGUES += [[*DIALOGUES[0], {"role": "assistant", "content": "0"}, *DIALOGUES[1]]]


@pytest.mark.parametrize("name", ["sft", "dpo", "quantize", "merge"])
def test_transformers_asks_and_stops_as_we_do(out, name):
    chat, theirs = load_chat(out / name), transformers.AutoTokenizer.from_pretrained(out / name)
    assert theirs.eos_token == "<|im_end|>" and chat.system_prompt == SYSTEM
    prompts = [chat.prompt(messages) for messages in DIALOGUES]
    for messages, prompt in zip(DIALOGUES, prompts):
        assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
    model = Phi.from_pretrained(out / name)
    answers = generate(model, prompts, 40, stop_tokens=tuple(chat.control_ids))
    settings = transformers.GenerationConfig.from_pretrained(out / name)
    other = transformers.AutoModelForCausalLM.from_pretrained(out / name).train(name == "quantize")  # as bitsandbytes' test
    ended = set()
    for prompt, answer in zip(prompts, answers):
        made = other.generate(torch.tensor([prompt]), generation_config=settings, max_new_tokens=40, do_sample=False)
        made = made[0, len(prompt) :].tolist()
        assert made[: len(answer)] == answer and len(made) - len(answer) == (len(made) < 40 or made[-1] in chat.control_ids)
        ended |= {made[-1]} & chat.control_ids
    assert chat.end in ended and len(ended) > 1 and max(map(len, answers)) > 3
    if name != "dpo":  # of adapters transformers takes these settings from the base
        assert other.generation_config.eos_token_id == settings.eos_token_id
