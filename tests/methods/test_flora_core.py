"""FLoRA's core space: which part moves first, two ranks, and the Tucker form as the oracle."""

from __future__ import annotations

import math

import torch

from qlora_train.adapters.forms.base import base_weight
from qlora_train.adapters.layers import layer_update
from tests.methods.cases import gradients_of, one_layer, shake

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
PULL = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))


def test_the_first_step_moves_the_core_alone() -> None:
    layer = one_layer("flora_core", r=4, r_out=6)
    assert torch.equal(layer(X), layer.get_base_layer()(X)), "the core is zero"
    found = gradients_of(layer, X, PULL)
    assert bool(found["lora_core_c"].any())
    assert not bool(found["lora_A"].any()) and not bool(found["lora_B"].any())


def test_the_update_is_the_tucker_form_of_two_ranks() -> None:
    layer = one_layer("flora_core", r=4, r_out=6)
    tensors = shake(layer)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "lora_A": (4, 64),
        "lora_B": (32, 6),
        "lora_core_c": (4, 6),
    }
    # The authors' way: contract the core with each basis in turn; the update comes out (in, out).
    tucker = torch.tensordot(tensors["lora_core_c"], tensors["lora_A"].T, dims=[[0], [1]])
    tucker = torch.tensordot(tucker, tensors["lora_B"], dims=[[0], [1]])
    delta = layer.scaling["default"] * tucker.T
    torch.testing.assert_close(
        layer(X), torch.nn.functional.linear(X, base_weight(layer) + delta), rtol=1e-5, atol=1e-4
    )
    folded = layer_update(layer, "default").dense(torch.device("cpu"))
    torch.testing.assert_close(folded, delta.detach(), rtol=1e-5, atol=1e-5)
    assert int(torch.linalg.matrix_rank(folded.double(), rtol=1e-5)) == 4


def test_both_bases_start_with_the_authors_spread() -> None:
    """Kaiming-normal with a = sqrt(3) over the rank: N(0, 1 / (2 r))."""
    layer = one_layer("flora_core", num_in=512, num_out=512, r=8, r_out=16)
    for name, r in (("lora_A", 8), ("lora_B", 16)):
        found = float(getattr(layer, name)["default"].weight.std())
        assert abs(found - math.sqrt(1 / (2 * r))) < 0.02, name
