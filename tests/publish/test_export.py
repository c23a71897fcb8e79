"""A GGUF file holds the values, the tokens and the sizes that it should, from every kind of checkpoint."""

import json

import gguf
import numpy as np
import pytest
import torch

import demo
from convert import quantize_checkpoint
from data import ChatML, load_tokenizer
from lora import add_lora, lora_layers
from model import Phi, read_config
from publish.export import Type, encode, export, modelfile, round_weights, what_is_done_first
from runtime.files import InputError, read_json, write_jsonl
from runtime.runs import load_chat
from train import main


def read(file):
    """The fields and tensors of a GGUF file, {name: value} each."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type for t in reader.tensors}


def exported(source, tmp_path, to="gguf-f32"):
    export(source, tmp_path / "phi.gguf", to, load_chat(source))
    return read(tmp_path / "phi.gguf")


# ------------------------------------------------------------------------------------------------------------- the formats


def test_a_block_of_q8_0_by_hand():
    """scale = largest / 127, code = value / scale rounded: 127 is 127 x 1, 63.6 becomes 64."""
    block = torch.tensor([[127.0, -127.0, 63.6, 0.4] + 28 * [0.0]])
    data = encode(block, Type.Q8_0)
    assert (
        data.nbytes == 34 and data[0, :2].view(np.float16) == 1 and data[0, 2:6].view(np.int8).tolist() == [127, -127, 64, 0]
    )
    assert gguf.dequantize(data, Type.Q8_0)[0, :4].tolist() == [127, -127, 64, 0]


def test_a_block_of_q4_0_by_hand():
    """The value furthest from 0 becomes -8 times the scale, so its sign is never lost: here the scale is 8 / -8 = -1. Of the
    16 levels -8 ... 7 times the scale the one on the other side, -7, is the last."""
    block = torch.tensor([[8.0, -8.0, 2.4, -2.4] + 28 * [0.0]])
    data = encode(block, Type.Q4_0)
    assert data.nbytes == 18 and data[0, :2].view(np.float16) == -1
    assert gguf.dequantize(data, Type.Q4_0)[0, :5].tolist() == [8, -7, 2, -2, 0]


def test_fp16_refuses_what_it_has_no_number_for():
    assert encode(torch.tensor([[65504.0]]), Type.F16).view(np.float16) == 65504
    with pytest.raises(InputError, match=r"q_proj: a weight of 7e\+04 is too large for fp16; take --to gguf-q8_0"):
        encode(torch.tensor([[7e4]]), Type.F16, "q_proj")


@pytest.mark.parametrize("to, bits", [("gguf-f16", 16), ("gguf-q8_0", 8.5), ("gguf-q4_0", 4.5)])
def test_the_file_holds_the_rounded_weights_and_the_report_card_the_same(tiny, tmp_path, to, bits):
    _, tensors, types = exported(tiny, tmp_path, to)
    model = Phi.from_pretrained(tiny)
    sizes = round_weights(model, to)
    assert sizes["bits per weight"] == bits
    assert sizes["memory, MB"] * 1e6 == sum(t.data.nbytes for t in gguf.GGUFReader(tmp_path / "phi.gguf").tensors)
    assert torch.equal(tensors["blk.0.ffn_down.weight"], model.model.layers[0].mlp.fc2.weight)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)
    assert torch.equal(tensors["output.bias"], model.lm_head.bias)
    ends = {"gguf-f16": Type.F16}.get(to, Type.Q8_0)
    assert types["token_embd.weight"] == types["output.weight"] == ends
    assert {kind for name, kind in types.items() if "bias" in name or "norm" in name} == {Type.F32}


# --------------------------------------------------------------------------------------------------- kinds of checkpoints


def test_a_plain_checkpoint_keeps_every_value(tiny, tmp_path):
    fields, tensors, _ = exported(tiny, tmp_path)
    model, config = Phi.from_pretrained(tiny), read_config(tiny)
    assert len(tensors) == len(list(model.parameters()))
    assert torch.equal(tensors["blk.0.attn_q.weight"], model.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)
    assert fields["general.architecture"] == "phi2" and fields["phi2.rope.dimension_count"] == config.rotary_size
    assert fields["phi2.context_length"] == config.max_position_embeddings and fields["phi2.block_count"] == 1


def test_codes_are_decoded(tiny, tmp_path):
    quantize_checkpoint(tiny, tmp_path / "nf4", "nf4-double")
    _, tensors, _ = exported(tmp_path / "nf4", tmp_path)
    model = Phi.from_pretrained(tmp_path / "nf4")
    assert torch.equal(tensors["blk.0.ffn_up.weight"], model.model.layers[0].mlp.fc1.dense())
    assert "decoded, and then rounded a second time" in "".join(what_is_done_first(tmp_path / "nf4"))


@pytest.mark.parametrize("base", [None, "nf4"])
def test_adapters_are_added_to_the_weights_that_they_were_trained_on(tiny, tmp_path, base):
    model = add_lora(Phi.from_pretrained(tiny, base=base), rank=2, alpha=6)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapters")
    load_chat(tiny).save(tmp_path / "adapters")
    _, tensors, _ = exported(tmp_path / "adapters", tmp_path)
    layer = model.model.layers[0].mlp.fc2
    expected = (layer.base.dense() if base else layer.base.weight) + layer.delta()
    torch.testing.assert_close(tensors["blk.0.ffn_down.weight"], expected, rtol=0, atol=1e-6)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)
    told = what_is_done_first(tmp_path / "adapters")
    assert "merged into" in told[0] and len(told) == (2 if base else 1)


# -------------------------------------------------------------------------------------------------------------- the tokens


def test_only_control_tokens_are_control_tokens(tiny, tmp_path):
    chat = load_chat(tiny)
    chat.tokenizer.add_tokens(["  "])
    fields = written_with(tiny, tmp_path, chat, rows=800)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    named = {token: gguf.TokenType(kind) for token, kind in zip(tokens, types, strict=True)}
    control = {token for token, kind in named.items() if kind == gguf.TokenType.CONTROL}
    assert control == {"<|endoftext|>", "<|im_end|>", "<|im_start|>"}
    assert named["  "] == gguf.TokenType.USER_DEFINED and named["\u0120the"] == gguf.TokenType.NORMAL
    assert named["[UNUSED799]"] == gguf.TokenType.UNUSED and len(tokens) == 800
    assert fields["tokenizer.ggml.eos_token_id"] == chat.end and fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == chat.template()


def written_with(source, tmp_path, chat, rows):
    """The fields of an export with another tokenizer."""
    from publish.export import add_vocabulary

    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "phi2")
    add_vocabulary(writer, chat, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return read(tmp_path / "vocabulary.gguf")[0]


@pytest.mark.parametrize("part, value", [("normalizer", {"type": "NFC"}), ("pre_tokenizer", {"type": "Whitespace"})])
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tiny, tmp_path, part, value):
    raw = json.loads((tiny / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {part: value}))
    chat = ChatML(load_tokenizer(tmp_path))
    with pytest.raises(InputError, match=f"no name in llama.cpp .{part}.*GPT-2"):
        export(tiny, tmp_path / "phi.gguf", "gguf-f16", chat)
    assert not (tmp_path / "phi.gguf").exists()


def test_the_modelfile_for_ollama(tiny):
    chat = load_chat(tiny, 'Be """brief""".')
    lines = modelfile("phi.gguf", chat, read_config(tiny)).splitlines()
    assert lines[0] == "FROM ./phi.gguf" and "SYSTEM \"\"\"Be '''brief'''.\"\"\"" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER num_ctx 1024" in lines


# ---------------------------------------------------------------------------------------------------------- the command line


def test_the_stage_writes_a_run_and_says_how_to_use_it(tiny, tmp_path, capfd):
    command = f"--stage export --model {tiny} --to gguf-q8_0 --out {tmp_path} --name mine"
    assert main(command.split()) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {"mine.gguf", "Modelfile", "run.json", "results.json"}
    said = capfd.readouterr().out
    assert f"llama-cli -m {tmp_path}/mine/mine.gguf" in said and "ollama create mine" in said
    assert main(command.split()) == 2, "an earlier run is not overwritten"
    assert main([*command.split()[:-1], "other", "--overwrite"]) == 0


def test_the_report_card_measures_the_formats_of_llama_cpp(tiny, tmp_path):
    rows = [{"prompt": q["prompt"], "chosen": q["answer"], "rejected": q["wrong"]} for q in demo.make_questions(4, seed=1)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = f"--stage eval --model {tiny} --data {tmp_path}/pairs.jsonl --samples 0 --out {tmp_path} --name card"
    assert main([*flags.split(), "--precisions", "fp32,gguf-q8_0,gguf-q4_0"]) == 0
    full, q8, q4 = (one["format"] for one in read_json(tmp_path / "card" / "eval.json")["results"])
    assert (q8["bits per weight"], q4["bits per weight"]) == (8.5, 4.5)
    assert full["KL, nats"] < 1e-9 < q8["KL, nats"] < q4["KL, nats"]
