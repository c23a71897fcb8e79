"""The turns that the lesson draws tile the row, and its tokens' log-probabilities add up to those of the answers."""

import torch

import demo
from data import ChatML, Ledger, collate, encode
from lessons.tuning.one_pair import token_logprobs, turns
from model import Phi, PhiConfig, completion_logprobs


def test_turns_tile_the_row_and_tokens_add_up_to_answers():
    rows = demo.make_pair_rows(demo.make_questions(1, seed=5), 0.0, seed=0)
    chat = ChatML(demo.train_tokenizer([rows[0].raw["prompt"]]), "Be brief.")
    [pair] = encode(rows, chat, 1024, 512, Ledger())
    batch = collate([pair])

    parts = turns(pair, chat)
    assert list(parts) == ["system", "user", "assistant", "chosen", "rejected"]
    assert [i for part in parts.values() for i in part] == list(range(len(pair)))
    assert batch.segment[0, parts["rejected"].start] == 2 and batch.segment[0, parts["rejected"].start - 1] == 1

    tiny = PhiConfig(vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = Phi(tiny).init_weights(0)
    chosen, rejected = token_logprobs(model, batch)
    assert [len(chosen), len(rejected)] == [len(ids) for ids in pair.completions]
    torch.testing.assert_close(torch.stack((chosen.sum(), rejected.sum())), completion_logprobs(model, batch))
