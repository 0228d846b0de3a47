"""LoRA and rsLoRA: the update's gradients in closed form, the dead start, and what each scale does as r grows."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_train.adapters.forms.base import layer_tensors
from tests.methods.cases import gradients_of, one_layer, shake

X, OUT = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)), 32
PULL = torch.randn(20, OUT, generator=torch.Generator().manual_seed(4))  # the loss's gradient at the output


def test_gradients_are_those_of_the_dense_update() -> None:
    """G = dL/dW: dL/dB = s G A^T and dL/dA = s B^T G."""
    layer = one_layer("lora")
    tensors = shake(layer)
    found = gradients_of(layer, X, PULL)
    dense_G, s = PULL.T @ X, layer.scaling["default"]
    torch.testing.assert_close(found["lora_B"], s * dense_G @ tensors["lora_A"].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["lora_A"], s * tensors["lora_B"].T @ dense_G, rtol=1e-5, atol=1e-5)


def test_with_both_factors_at_zero_nothing_ever_trains() -> None:
    """Why B alone starts at zero: with B = 0 the gradient of A is zero and that of B is not."""
    layer = one_layer("lora")
    found = gradients_of(layer, X, PULL)
    assert not bool(found["lora_A"].any()) and bool(found["lora_B"].any())
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
    assert not any(bool(grad.any()) for grad in gradients_of(layer, X, PULL).values())


@pytest.mark.parametrize(("method", "exponent"), [("lora", -1.0), ("rslora", 0.0)])
def test_the_first_step_s_size_as_r_grows(method: str, exponent: float) -> None:
    """-<delta, G> / (eta ||G||^2) after one SGD step from B = 0 goes as r^exponent (arXiv 2312.03732)."""
    eta, alignments = 1e-2, {}
    for r in (8, 128):
        layer = one_layer(method, r=r, alpha=8.0)
        found, s = gradients_of(layer, X, PULL), layer.scaling["default"]
        assert s == pytest.approx(8.0 / (math.sqrt(r) if method == "rslora" else r))
        dense_G = PULL.T @ X
        delta = s * (-eta * found["lora_B"]) @ layer_tensors(layer, "default")["lora_A"]
        alignments[r] = float(-(delta * dense_G).sum() / (eta * dense_G.square().sum()))
    assert alignments[128] / alignments[8] == pytest.approx(16.0**exponent, rel=0.35)
