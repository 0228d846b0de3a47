"""DoRA: rows of the trained length, the norm without the dense sum, and PEFT's own variant as the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_train.adapters.forms.base import base_weight, layer_tensors
from qlora_train.adapters.forms.dora import MAGNITUDE, row_norms
from qlora_train.adapters.layers import layer_update, lora_layers
from qlora_train.adapters.state import save_adapter
from qlora_train.recipe.schema import TrainSection
from qlora_train.train.optim import build_optimizer, parameter_groups, trainable_parameters
from tests.loading import tiny_base
from tests.methods.cases import IDS, build, gradients_of, one_layer, section_of, shake

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
PULL = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))


def dense_sum(layer: object, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    s = layer.scaling["default"]  # type: ignore[attr-defined]
    return base_weight(layer) + s * tensors["lora_B"] @ tensors["lora_A"]


def test_every_row_of_the_merged_weight_has_its_trained_length() -> None:
    layer = one_layer("dora")
    tensors = shake(layer)
    merged = layer_update(layer, "default").applied(base_weight(layer))
    torch.testing.assert_close(merged.norm(dim=1), tensors[MAGNITUDE].detach(), rtol=1e-6, atol=1e-6)


def test_the_cheap_row_norms_are_the_dense_ones() -> None:
    layer = one_layer("dora")
    tensors = shake(layer)
    found = row_norms(layer, tensors["lora_A"], tensors["lora_B"], layer.scaling["default"], torch.float32)
    expected = dense_sum(layer, tensors).double().norm(dim=1).float()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)


def test_the_norm_is_detached() -> None:
    """Section 4.3: autograd of the formula with a live norm gives another gradient of B, and ours with a dead one."""
    layer = one_layer("dora")
    tensors = shake(layer)
    found = gradients_of(layer, X, PULL)
    expected = {}
    for live in (False, True):
        leaf = tensors["lora_B"].detach().clone().requires_grad_()
        moved = base_weight(layer) + layer.scaling["default"] * leaf @ tensors["lora_A"].detach()
        norm = moved.norm(dim=1) if live else moved.detach().norm(dim=1)
        weight = moved * (tensors[MAGNITUDE].detach() / norm)[:, None]
        (nn.functional.linear(X, weight) * PULL).sum().backward()
        expected[live] = leaf.grad
    torch.testing.assert_close(found["lora_B"], expected[False], rtol=1e-4, atol=1e-4)
    assert float((found["lora_B"] - expected[True]).norm() / expected[True].norm()) > 1e-2


def test_magnitudes_do_not_decay(tiny_dir: Path) -> None:
    """With no gradient a step of decay alone moves A and B, and leaves every row of the weight its length."""
    section = section_of("dora")
    model = build(tiny_dir, section).model
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    optimizer = build_optimizer(model, TrainSection(learning_rate=0.1, weight_decay=0.5), section)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, p in trainable_parameters(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_A" in name}, "B is zero"
    groups = {group.name: group for group in parameter_groups(model, section)}
    assert list(groups) == ["adapter", "vector"] and not groups["vector"].decays
    assert len(groups["vector"].parameters) == sum("magnitude" in name for name in before) > 0


@pytest.mark.parametrize("fused", [True, False])
def test_logits_and_gradients_are_peft_s(fused: bool, tiny_dir: Path, tmp_path: Path) -> None:
    """And PEFT reads our folder as its own: no tag, no other kind."""
    case = build(tiny_dir, section_of("dora"), fused=fused)
    for layer in lora_layers(case.model).values():
        shake(layer, 0.02)
    save_adapter(case.model, tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(tiny_base(tiny_dir).model, str(tmp_path), is_trainable=True)
    assert isinstance(theirs.peft_config["default"], LoraConfig) and theirs.peft_config["default"].use_dora
    assert {type(v).__name__ for m in theirs.modules() for v in getattr(m, "lora_variant", {}).values()} == {
        "DoraLinearVariant"
    }
    grads = []
    for model in (case.model, theirs):
        model.train()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads.append((out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-5)
    assert grads[0][1].keys() == grads[1][1].keys() and len(grads[0][1]) == 3 * 7
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grad, grads[1][1][name], rtol=1e-3, atol=1e-6, msg=name)
    plain = get_peft_model(tiny_base(tiny_dir).model, LoraConfig(**{**config.to_dict(), "use_dora": False}))
    assert not torch.allclose(plain(input_ids=IDS).logits, grads[0][0], atol=1e-3), "negative control"


def test_in_bfloat16_a_small_change_of_length_is_not_rounded_away() -> None:
    """1.003 is one in bfloat16. The layer multiplies with what is beside one: on average outputs do grow by it."""
    layer = one_layer("dora")
    layer.get_base_layer().to(torch.bfloat16)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    before = layer(x).double().abs().sum()
    with torch.no_grad():
        layer_tensors(layer, "default")[MAGNITUDE].mul_(1.003)
    assert float(torch.tensor(1.003).to(torch.bfloat16)) == 1.0
    assert float(layer(x).double().abs().sum() / before) == pytest.approx(1.003, abs=3e-4)


def test_dropout_hits_the_adapter_s_branch_alone() -> None:
    layer = one_layer("dora", dropout=0.5)
    assert torch.equal(layer(X), layer.get_base_layer()(X)), "B is zero: nothing of the base is dropped"
    shake(layer)
    assert not torch.equal(layer(X), layer(X))
