"""MTLoRA: the four structures, their gradients, and the zero cores that never train."""

from __future__ import annotations

import pytest
import torch

from qlora_train.adapters.forms.base import base_weight, layer_tensors
from qlora_train.adapters.forms.cores import STRUCTURES, TransformedForm
from qlora_train.adapters.layers import layer_update
from tests.methods.cases import gradients_of, one_layer, shake

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
PULL = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))
REFERENCE = {
    "shim": lambda c, d: c,
    "icfm": lambda c, d: torch.einsum("ik,jk->ij", c, c),
    "ctcm": lambda c, d: torch.einsum("ik,kj->ij", c, d),
    "dtsm": lambda c, d: c + d,
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_update_is_b_t_a(structure: str) -> None:
    layer = one_layer("mtlora", structure=structure)
    tensors = shake(layer)
    assert ("lora_core_d" in tensors) == (structure in ("ctcm", "dtsm"))
    core = REFERENCE[structure](tensors["lora_core_c"], tensors.get("lora_core_d"))
    delta = layer.scaling["default"] * torch.einsum("or,rs,si->oi", tensors["lora_B"], core, tensors["lora_A"])
    expected = torch.nn.functional.linear(X, base_weight(layer) + delta)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    folded = layer_update(layer, "default").applied(base_weight(layer))
    torch.testing.assert_close(folded, (base_weight(layer) + delta).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_at_its_start_it_is_lora_to_the_bit(structure: str) -> None:
    """The same seed gives the same A; with T = I outputs and gradients of A and B are LoRA's, B being random."""
    layers = [one_layer("lora"), one_layer("mtlora", structure=structure)]
    generator = torch.Generator().manual_seed(5)
    weight_B = torch.randn(32, 4, generator=generator)
    found = []
    for layer in layers:
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(weight_B)
        layer.get_base_layer().weight.data = layers[0].get_base_layer().weight.data
        found.append((layer(X).detach(), gradients_of(layer, X, PULL)))
    assert torch.equal(found[0][0], found[1][0])
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(found[0][1][name], found[1][1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_core_trains_from_the_second_step_on(structure: str) -> None:
    layer = one_layer("mtlora", structure=structure)
    optimizer = torch.optim.SGD([t for t in layer_tensors(layer, "default").values() if t.requires_grad], lr=1e-3)
    assert not bool(gradients_of(layer, X, PULL)["lora_core_c"].any()), "B is zero"
    optimizer.step()
    assert bool(gradients_of(layer, X, PULL)["lora_core_c"].any())
    for _ in range(3):
        optimizer.step()
        gradients_of(layer, X, PULL)
    if structure == "icfm":
        core = TransformedForm("icfm").transformation(layer_tensors(layer, "default")).detach()
        assert torch.equal(core, core.T) and float(torch.linalg.eigvalsh(core).min()) > -1e-6


@pytest.mark.parametrize(("structure", "dead"), [("icfm", True), ("ctcm", True), ("shim", False), ("dtsm", False)])
def test_zero_cores_never_train_where_two_of_them_multiply(structure: str, dead: bool) -> None:
    """The start of one of the authors' programs: with C = D = 0 every gradient of icfm and ctcm is exactly zero."""
    layer = one_layer("mtlora", structure=structure)
    tensors = shake(layer)
    with torch.no_grad():
        for name in ("lora_core_c", "lora_core_d"):
            if name in tensors:
                tensors[name].zero_()
    found = gradients_of(layer, X, PULL)
    assert all(not bool(grad.any()) for grad in found.values() if grad is not None) == dead
