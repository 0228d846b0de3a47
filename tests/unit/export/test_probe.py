"""One layer that is wrong stands out by name; rounding alone does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.export.probe import Deviation, Probe, deviations, probing, recheck
from qlora_train.quant.bnb import dequantize
from tests.adapted import adapted_model
from tests.loading import tiny_base, with_adapter

NAMES = ("a.weight", "b.weight", "c.weight")


def setting(dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Probe], dict[str, torch.Tensor]]:
    """Three layers with a bias each, as they were trained and as a dtype stores them; one input channel is huge."""
    torch.manual_seed(0)
    probes, stored = {}, {}
    for name in NAMES:
        weight, bias, x = torch.randn(256, 64) * 0.02, torch.randn(256), torch.randn(8, 64)
        x[:, 7] *= 300
        rounded = weight.to(dtype).float()
        probes[name] = Probe(x, x @ weight.T + bias)
        stored |= {name: rounded, name.replace("weight", "bias"): bias}
    return probes, stored


def measured(probes: dict[str, Probe], stored: dict[str, torch.Tensor], dtype: Any = torch.bfloat16) -> list[Deviation]:
    return deviations(probes, stored.__getitem__, stored.__contains__, dtype)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 1.0), (torch.float16, 0.83)])
def test_rounding_is_explained(dtype: torch.dtype, expected: float) -> None:
    """256 outputs, each with an error of its own: the ratio's spread is 1 / sqrt(2 * 256), here three times that.

    float16 loses 1.5e-4 of a weight, not much more than the 1e-4 that is granted to sums: 1.5 / sqrt(1.5^2 + 1) = 0.83.
    """
    found = measured(*setting(dtype), dtype)
    assert len(found) == 3 and all(one.ratio == pytest.approx(expected, abs=0.15) for one in found)


@pytest.mark.parametrize("fault", ["weight", "bias", "columns", "twice rounded"])
def test_a_layer_that_is_wrong_comes_first(fault: str) -> None:
    probes, stored = setting()
    if fault == "weight":
        stored["b.weight"] = stored["b.weight"] * 0.99
    elif fault == "bias":
        del stored["b.bias"]
    elif fault == "columns":
        stored["b.weight"] = stored["b.weight"].flip(1)
    else:
        scale = stored["b.weight"].abs().max() / 127
        stored["b.weight"] = (stored["b.weight"] / scale).round() * scale
    found = measured(probes, stored)
    assert found[0].name == "b.weight" and found[0].ratio > 1.5 and found[1].ratio < 1.15


def test_exact_weights_are_off_by_the_order_of_sums_alone() -> None:
    probes, stored = setting(torch.float32)
    assert measured(probes, stored, torch.float32)[0].ratio < 0.1


def test_the_first_call_of_every_adapted_layer_is_noted() -> None:
    model = adapted_model("llama", num_layers=2).eval()
    first, second = torch.arange(3, 20)[None, :], torch.arange(30, 50)[None, :]
    with torch.no_grad(), probing(model) as found:
        model(input_ids=first)
        noted = {name: probe.y_NO.clone() for name, probe in found.items()}
        model(input_ids=second)
    assert len(found) == 14 and "model.layers.0.self_attn.q_proj.weight" in found
    assert all(torch.equal(found[name].y_NO, y) and len(y) == 8 for name, y in noted.items())
    with torch.no_grad(), probing(model) as after:
        pass
    assert after == {} and not any(layer._forward_hooks for layer in model.modules())


def test_a_4_bit_layer_without_an_adapter_is_noted_too(tiny_llama_dir: Path) -> None:
    """Its dequantised weight is in the merged model, and could be another."""
    model = with_adapter(tiny_base(tiny_llama_dir), target_modules=("q_proj",)).eval()
    with torch.no_grad(), probing(model) as found:
        model(input_ids=torch.arange(3, 20)[None, :])
    assert len(found) == 14
    name = "model.layers.1.mlp.up_proj.weight"
    layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
    weight = dequantize(layer.weight)
    (sound,) = deviations({name: found[name]}, lambda _: weight, lambda _: False, torch.float32)
    (spoilt,) = deviations({name: found[name]}, lambda _: weight * 1.01, lambda _: False, torch.float32)
    assert sound.ratio < 1 < 3 < spoilt.ratio


def coherent() -> tuple[Probe, torch.Tensor, torch.Tensor]:
    """A layer whose weights all have one value: each is rounded alike, and inputs of one sign add the errors up."""
    exact = torch.full((256, 64), 0.02001953125 + 0.45 * 2**-13)  # a bfloat16 number and 0.45 of its last place
    x = torch.rand(8, 64) + 0.5
    return Probe(x, x @ exact.T), exact, exact.bfloat16().float()


def test_roundings_that_add_up_are_told_from_a_fault() -> None:
    probe, exact, written = coherent()
    (suspect,) = deviations({"a.weight": probe}, lambda name: written, lambda name: False, torch.bfloat16)
    assert suspect.ratio > 3
    assert recheck(suspect, probe, written, exact, None, torch.bfloat16).ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("fault", ["the merge", "the file"])
def test_a_fault_stays_one(fault: str) -> None:
    """A merged weight that was computed wrongly, and one that was written otherwise than computed."""
    probe, exact, written = coherent()
    if fault == "the merge":
        exact, written = exact * 1.05, (exact * 1.05).bfloat16().float()
    else:
        written = written * 1.05
    (suspect,) = deviations({"a.weight": probe}, lambda name: written, lambda name: False, torch.bfloat16)
    assert recheck(suspect, probe, written, exact, None, torch.bfloat16).ratio > 3
