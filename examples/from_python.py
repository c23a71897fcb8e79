"""The demo's model from Python: quantized, asked, and with the gradient of a preference loss.

    python -m examples.from_python          in the project's directory

The model is random, so its answer is noise. After `python train.py --stage dpo` try Phi.from_pretrained("out/demo-dpo").
"""

from pathlib import Path

import demo
import dpo
from data import ChatML, Ledger, collate, encode, load_tokenizer
from generate import sample_answers
from model import Phi, completion_logprobs
from prepare.rows import read_rows
from quant import quantize_model

world = demo.write_world(Path("out/demo-seed0"))
chat = ChatML(load_tokenizer(world.model))
rows = read_rows(world.pairs, "pairs", on_bad_row="stop", ledger=Ledger())[:2]
pairs = encode(rows, chat, max_length=1024, max_prompt_length=512, ledger=Ledger())

# A copy in 4 bits answers the first question.
small = quantize_model(Phi.from_pretrained(world.model), to="nf4")
answers, _ = sample_answers(small, chat, [pairs[0].prompt], max_new_tokens=12, temperature=1.0, seed=0)
print(f"{rows[0].messages[0]['content']}\n  {answers[0]!r}")

# The gradient of robust DPO. Before the first step policy and reference are one model: z = 0, and the loss is ln 2 a pair.
model = Phi.from_pretrained(world.model)
batch = collate(pairs)
lengths = batch.lengths.view(-1, 2)
policy = completion_logprobs(model, batch).view(-1, 2)  # chosen and rejected, one row a pair
reference = policy.detach()
loss, metrics = dpo.objective(policy, reference, lengths, loss="robust", beta=0.3, eps=0.2)
(loss / len(policy)).backward()
print(f"loss {loss.item() / len(policy):.4f}, gradient of the output layer {model.lm_head.weight.grad.norm():.3f}")
