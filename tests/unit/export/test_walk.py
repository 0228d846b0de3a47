"""Calls that go through layers in step: every batch through a layer, then the next layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from qlora_train.errors import ModelError
from qlora_train.export.walk import Walk, walk_through


class Layer(nn.Module):
    def __init__(self, factor: float, log: list[str]) -> None:
        super().__init__()
        self.factor, self.log = factor, log

    def forward(self, x: float, name: str) -> float:
        self.log.append(f"{name}{self.factor:g}")
        return x * self.factor


def model(layers: list[Layer]) -> Any:
    def call(x: float, name: str) -> float:
        for layer in layers:
            x = layer(x, name) + 1
        return x

    return call


def test_every_walk_passes_a_layer_while_it_is_filled() -> None:
    log: list[str] = []
    layers = [Layer(2, log), Layer(3, log)]
    call = model(layers)
    walks = [Walk(lambda x=x, name=name: call(x, name), nullcontext) for x, name in ((1.0, "a"), (5.0, "b"))]
    found = walk_through(layers, walks, lambda i: log.append(f"fill {i}"), lambda i: log.append(f"empty {i}"))
    assert found == [10.0, 34.0] == [call(1.0, "a"), call(5.0, "b")]
    assert log[:8] == ["fill 0", "a2", "b2", "empty 0", "fill 1", "a3", "b3", "empty 1"]
    assert "forward" not in vars(layers[0])


def test_a_walk_has_its_context_and_no_gradients() -> None:
    state = {"on": False}
    seen: list[tuple[bool, bool]] = []

    @contextmanager
    def switched() -> Iterator[None]:
        state["on"] = True
        yield
        state["on"] = False

    class Looking(Layer):
        def forward(self, x: float, name: str) -> float:
            seen.append((state["on"], torch.is_inference_mode_enabled()))
            return x

    layers = [Looking(1, []), Looking(1, [])]
    call = model(layers)  # type: ignore[arg-type]
    walks = [Walk(lambda: call(0.0, ""), nullcontext), Walk(lambda: call(0.0, ""), switched)]
    walk_through(layers, walks, lambda i: None, lambda i: None)
    assert seen == [(False, True), (True, True)] * 2 and not state["on"]


def test_an_error_of_one_ends_all_and_is_raised() -> None:
    layers = [Layer(2, []), Layer(3, [])]
    call = model(layers)
    before = threading.active_count()

    def bad() -> float:
        call(1.0, "a") if layers[0](1.0, "x") else None
        raise ValueError("in the model")

    with pytest.raises((ValueError, ModelError)):
        walk_through(layers, [Walk(lambda: call(1.0, "a"), nullcontext), Walk(bad, nullcontext)], print, print)
    assert threading.active_count() == before
    assert call(1.0, "a") == 10.0, "the layers are themselves again"


@pytest.mark.parametrize("order", [[1, 0], [0], [0, 1, 0], [0, 0, 1], []])
def test_a_model_with_another_order_of_layers_is_refused(order: list[int]) -> None:
    layers = [Layer(2, []), Layer(3, [])]
    call = model([layers[i] for i in order])
    before = threading.active_count()
    with pytest.raises(ModelError, match="one after the other"):
        walk_through(layers, [Walk(lambda: call(1.0, "a"), nullcontext)], lambda i: None, lambda i: None)
    assert threading.active_count() == before
