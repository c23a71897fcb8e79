"""Adapters beside PEFT's: the same files, outputs and gradients, in both directions; QLoRA beside PEFT on bitsandbytes."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora import add_lora, lora_layers, merge_lora
from model import Phi, PhiConfig
from runtime.files import InputError

CONFIG = PhiConfig(512, 64, 256, num_hidden_layers=2, num_attention_heads=4)
IDS = torch.arange(24).view(2, 12) * 7 % 512


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    Phi(CONFIG).init_weights(0).save_pretrained(directory)
    return directory


def ours(directory, **options):
    model = add_lora(Phi.from_pretrained(directory, **options), 4, alpha=6, seed=1)
    draw = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.05, generator=draw)
    return model


def theirs(plain, **options):
    return transformers.PhiForCausalLM.from_pretrained(plain, **options)


def test_peft_loads_ours(plain, tmp_path):
    model = ours(plain)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs(plain), tmp_path, is_trainable=True)
    assert len([n for n, _ in loaded.named_parameters() if "lora_A" in n]) == len(lora_layers(model)) == 12
    for m in (model, loaded):
        logits = m(IDS) if m is model else m(input_ids=IDS).logits
        logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(model(IDS), loaded(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, p in loaded.named_parameters():
        if p.grad is not None:
            own = name.removeprefix("base_model.model.").replace(".default.weight", "")
            torch.testing.assert_close(p.grad, mine.pop(own), rtol=1e-4, atol=1e-6)
    assert not mine


def test_a_directory_of_ours_is_a_model_to_transformers(plain, tmp_path):
    model = ours(plain)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(model(IDS), auto(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc2"]])
def test_we_load_peft(plain, tmp_path, targets):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs(plain), config)
    model.save_pretrained(tmp_path)
    loaded = Phi.from_pretrained(tmp_path)
    assert len(lora_layers(loaded)) == (12 if targets == "all-linear" else 4)
    torch.testing.assert_close(loaded(IDS), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    merge_lora(loaded)
    torch.testing.assert_close(loaded(IDS), merged(IDS).logits, rtol=1e-5, atol=1e-5)
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p, dict(merged.named_parameters())[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_start_by_changing_the_base_are_read_once_peft_has_converted_them(plain, tmp_path, start):
    """W - s B A lies under such adapters, so on the plain W they are another model."""
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=start, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs(plain), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says to do before saving the start
    model.save_pretrained(tmp_path / "start")
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "as it is")
    with pytest.raises(InputError, match=f"init_lora_weights '{start}' changes the weights under the adapters; save them"):
        Phi.from_pretrained(tmp_path / "as it is")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = Phi.from_pretrained(tmp_path / "converted")
    torch.testing.assert_close(ours(IDS), model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_new_adapters_start_as_theirs_do(plain):
    """The same layers and shapes; A uniform with the same bound, B zero."""
    model = add_lora(Phi.from_pretrained(plain), 8)
    other = peft.get_peft_model(theirs(plain), peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in other.named_parameters():
        if ".lora_" in name:
            own = model.get_parameter(name.removeprefix("base_model.model.").replace(".default.weight", ""))
            assert own.shape == p.shape and bool(own.any()) == bool(p.any())
            torch.testing.assert_close(own.abs().max(), p.abs().max(), rtol=0.03, atol=0)


def test_qlora_is_theirs_on_bitsandbytes(plain, tmp_path):
    """NF4 base and adapters: the same outputs and the same gradients of A and B."""
    model = ours(plain, base="nf4")
    model.save_pretrained(tmp_path)
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = theirs(plain, quantization_config=quantized, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()  # train: no AVX512-BF16 kernel
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(IDS), loaded(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    model(IDS).logsumexp(-1).sum().backward()
    loaded(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for name, p in loaded.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".default.weight", "")
        if ".lora_" in name:
            torch.testing.assert_close(p.grad, mine[own], rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared == 24
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        n.replace(".default", "") for n, _ in loaded.named_parameters() if ".lora_" in n
    }
