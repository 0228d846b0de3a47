"""The forward of one layer against its formula, and the dense update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_train.adapters.layers import LoraFloat, delta_weight, lora_layers, register_layers


def layer(*, rslora: bool = False, dropout: float = 0.0) -> LoraFloat:
    """One 64 -> 32 layer with r = 4, alpha = 6 and a random B."""
    model = nn.Sequential(nn.Linear(64, 32))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], use_rslora=rslora)
    found = next(iter(lora_layers(get_peft_model(model, register_layers(config))).values()))
    assert isinstance(found, LoraFloat)
    nn.init.normal_(found.lora_B["default"].weight)
    return found


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 1.5), (True, 3.0)])
def test_forward_and_delta_follow_the_formula(rslora: bool, scaling: float) -> None:
    one = layer(rslora=rslora)
    x = torch.randn(5, 7, 64)
    lora_A, lora_B = one.lora_A["default"].weight, one.lora_B["default"].weight
    delta = delta_weight(one, "default")
    # Sums of 4 products in another order: a few last places of values up to about 20.
    torch.testing.assert_close(delta, scaling * (lora_B @ lora_A), rtol=1e-6, atol=1e-6)
    assert delta.shape == (32, 64) and delta.dtype == torch.float32 and not delta.requires_grad
    base = one.get_base_layer()
    expected = nn.functional.linear(x.double(), base.weight.double() + delta.double(), base.bias.double())
    torch.testing.assert_close(one(x).double(), expected, rtol=1e-5, atol=1e-5)
    without = nn.functional.linear(x.double(), base.weight.double(), base.bias.double())
    assert float((expected - without).detach().abs().max()) > 0.1, "negative control: the update is not small"
    assert one.num_fallbacks == 0


def test_the_output_has_the_input_s_dtype() -> None:
    one = layer()
    one.get_base_layer().to(torch.bfloat16)
    assert one(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert one.lora_A["default"].weight.dtype == torch.float32


def test_dropout_hits_the_adapter_s_input_and_not_the_base() -> None:
    one = layer(dropout=0.5)
    nn.init.zeros_(one.lora_B["default"].weight)
    x = torch.randn(3, 64)
    assert torch.equal(one.train()(x), one.get_base_layer()(x))
    nn.init.normal_(one.lora_B["default"].weight)
    assert not torch.equal(one(x), one(x)) and torch.equal(one.eval()(x), one(x))


def test_what_is_not_plain_falls_back_to_peft() -> None:
    one = layer()
    x = torch.randn(3, 64)
    ours = one(x)
    one.merge()
    torch.testing.assert_close(one(x), ours, rtol=1e-5, atol=1e-5)
    assert one.num_fallbacks == 1
    one.unmerge()
    one.enable_adapters(False)
    torch.testing.assert_close(one(x), one.get_base_layer()(x), rtol=0, atol=0)
    assert one.num_fallbacks == 2


def test_our_classes_are_not_written_into_the_config(tmp_path: Path) -> None:
    register_layers(LoraConfig(r=4, target_modules=["0"])).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)["r"] == 4 and "Lora4bit" not in text and "qlora_train" not in text


def test_lora_layers_finds_nothing_in_a_plain_model() -> None:
    assert lora_layers(nn.Sequential(nn.Linear(4, 4))) == {}
