"""Eight contracts that every method of the table keeps on an NF4 base. A method that the table lacks does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from qlora_train.adapters.fold import Update, read_deltas, read_updates
from qlora_train.adapters.forms.base import Form, base_weight, layer_tensors
from qlora_train.adapters.forms.delta import PREFIX as DIFFERENCE
from qlora_train.adapters.forms.delta import DeltaLayer
from qlora_train.adapters.forms.mole import GATE, LEAST_TAU, TAU
from qlora_train.adapters.forms.registry import FORMS
from qlora_train.adapters.layers import adapted_layers, layer_update, lora_layers
from qlora_train.adapters.state import save_adapter
from qlora_train.errors import ModelError
from qlora_train.quant.bnb import linear4bit_modules
from qlora_train.quant.fingerprint import print_base
from qlora_train.recipe.methods import METHODS
from tests.loading import tiny_base
from tests.methods.cases import IDS, WAYS, Case, build, dense_twin_of, reloaded, section_of, trained_tensors

NUM_STEPS = 10


@dataclass
class Evidence:
    """A method before and after ten steps on one batch."""

    case: Case
    base_logits: torch.Tensor
    base_print: str
    start_logits: torch.Tensor
    start_print: str
    moved: set[str]
    losses: list[float]
    end_logits: torch.Tensor
    folder: Path


@pytest.fixture(scope="module", params=WAYS)
def evidence(
    request: pytest.FixtureRequest, tiny_dir: Path, experts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Evidence]:
    torch.manual_seed(0)
    base = tiny_base(tiny_dir)
    with torch.no_grad():
        base_logits = base.model(input_ids=IDS).logits
    case = build(tiny_dir, section_of(request.param.partition(" ")[0], experts, **WAYS[request.param]))
    start_logits, start_print = case.logits(), print_base(case.model).digest
    before = {name: tensor.detach().clone() for name, tensor in trained_tensors(case.model).items()}
    losses = [result.loss for result in case.train(NUM_STEPS)]
    after = all_tensors(case)
    folder = tmp_path_factory.mktemp(request.param)
    save_adapter(case.model, folder)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    yield Evidence(
        case, base_logits, base.print.digest, start_logits, start_print, moved, losses, case.logits(), folder
    )


def all_tensors(case: Case) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{attribute}": tensor
        for name, layer in adapted_layers(case.model).items()
        for attribute, tensor in layer_tensors(layer, "default").items()
    }


def test_every_layer_carries_the_method_s_form(evidence: Evidence) -> None:
    """PEFT builds plain LoRA without a word where a 4-bit layer does not know what its config asks for."""
    row = METHODS[evidence.case.section.method]
    config = evidence.case.model.peft_config["default"]
    wanted = type(FORMS[row.form](config.options))  # type: ignore[attr-defined]
    layers = adapted_layers(evidence.case.model)
    if row.form != "delta":
        assert len(layers) == len(list(linear4bit_modules(evidence.case.base.model)))
    kinds = {type(layer.lora_variant.get("default", Form())) for layer in layers.values()}  # type: ignore[union-attr, operator]
    assert kinds == {wanted} and layers


def test_the_start_is_the_base_or_said_not_to_be(evidence: Evidence) -> None:
    same = torch.equal(evidence.start_logits, evidence.base_logits)
    assert same == METHODS[evidence.case.section.method].starts_at_base
    assert bool(torch.isfinite(evidence.start_logits).all())


def test_the_forward_pass_is_the_updated_weight_s(evidence: Evidence) -> None:
    row = METHODS[evidence.case.section.method]
    moved = [_moved_by_difference(layer) for layer in delta_layers(evidence.case.model)]
    for name, layer in lora_layers(evidence.case.model).items():
        x = torch.randn(5, layer.in_features)
        base = layer.get_base_layer()
        if row.merges == "none":
            with pytest.raises(ModelError, match="no weight does"):
                layer_update(layer, "default")
            moved.append(_moved_by_mixture(layer, x))
            continue
        weight_OI = layer_update(layer, "default").applied(base_weight(layer))
        with torch.no_grad():
            found = layer(x)
        torch.testing.assert_close(found, nn.functional.linear(x, weight_OI), rtol=1e-5, atol=1e-5, msg=name)
        assert layer.num_fallbacks == 0
        moved.append(float((found - base(x)).abs().max()))
    assert max(moved) > 1e-4, "negative control: the adapter does something"


def delta_layers(model: nn.Module) -> list[DeltaLayer]:
    return [layer for layer in adapted_layers(model).values() if isinstance(layer, DeltaLayer)]


@torch.no_grad()
def _moved_by_difference(layer: DeltaLayer) -> float:
    """A layer with differences is its base with other values; how far its output moved."""
    base = layer.get_base_layer()
    x = torch.randn(5, next(iter(base.parameters())).shape[-1])
    values = dict(base.named_parameters())
    for name, tensor in layer_tensors(layer, "default").items():
        own = name.removeprefix(DIFFERENCE)
        values[own] = values[own] + tensor.to(values[own].dtype)
    torch.testing.assert_close(layer(x), functional_call(base, values, (x,)), rtol=1e-6, atol=1e-6)
    return float((layer(x) - base(x)).abs().max())


@torch.no_grad()
def _moved_by_mixture(layer: Any, x: torch.Tensor) -> float:
    """A mixture is the base and each expert's update by its share, token by token; how far the output moved."""
    tensors = layer_tensors(layer, "default")
    shared = layer.layer_gate
    own = layer_tensors(shared.holder, "default") if shared else tensors
    read = torch.randn(len(x), own[GATE].shape[1]) if shared else x  # the decoder layer's input, or the matrix's
    normed = read / read.square().mean(dim=-1, keepdim=True).sqrt() if shared else read
    gates = (normed @ own[GATE].t() / own[TAU].clamp_min(LEAST_TAU)).softmax(dim=-1)
    experts = zip(tensors["lora_A"].chunk(2), tensors["lora_B"].chunk(2, dim=1), gates.unbind(dim=-1), strict=True)
    update = sum(share[:, None] * (x @ a.t() @ b.t()) for a, b, share in experts) * layer.scaling["default"]
    base = layer.get_base_layer()(x)
    with shared.reading(read) if shared else nullcontext():
        found = layer(x)
    torch.testing.assert_close(found, base + update, rtol=1e-5, atol=1e-5)
    return float(update.abs().max())


def test_what_the_row_declares_trains_and_nothing_else(evidence: Evidence) -> None:
    row = METHODS[evidence.case.section.method]
    moved = {name.rpartition(".")[2] for name in evidence.moved}
    found = {name.rpartition(".")[2] for name in all_tensors(evidence.case)}
    assert moved == set(row.trains) & found
    if row.schedule != "freezing":
        assert {name.rpartition(".")[2] for name in trained_tensors(evidence.case.model)} == moved
    layers = adapted_layers(evidence.case.model)
    if getattr(evidence.case.section, "granularity", "matrix") == "layer":
        layers = {name: layer for name, layer in layers.items() if GATE in layer_tensors(layer, "default")}
    assert len({name.rpartition(".")[0] for name in evidence.moved}) == len(layers), "in every layer"


def test_training_leaves_the_base_to_the_bit(evidence: Evidence) -> None:
    assert print_base(evidence.case.model).digest == evidence.start_print


def test_saved_and_loaded_it_gives_the_same_logits(evidence: Evidence, tiny_dir: Path) -> None:
    again = reloaded(tiny_dir, evidence.folder, evidence.case.section)
    assert torch.equal(again.logits(), evidence.end_logits)
    assert not torch.equal(evidence.end_logits, evidence.start_logits), "negative control: training moved it"
    assert print_base(again.model).digest == evidence.start_print


def test_the_export_computes_what_the_adapter_does(evidence: Evidence, tiny_dir: Path) -> None:
    row = METHODS[evidence.case.section.method]
    if row.merges == "none":
        with pytest.raises(ModelError, match="no weight does"):
            read_updates(evidence.folder)
        return
    updates: dict[str, Update] = read_updates(evidence.folder)
    if row.merges == "fold":
        assert read_deltas(evidence.folder).keys() == updates.keys()
    else:
        with pytest.raises(ModelError, match="cannot be plain LoRA"):
            read_deltas(evidence.folder)
    twin = dense_twin_of(reloaded(tiny_dir, evidence.folder, evidence.case.section).model, tiny_dir)
    with torch.no_grad():
        for name, update in updates.items():
            parameter = twin.get_parameter(name)
            assert tuple(parameter.shape) == update.shape
            parameter.copy_(update.applied(parameter.float()))
        merged = twin(input_ids=IDS).logits
    torch.testing.assert_close(merged, evidence.end_logits, rtol=1e-4, atol=1e-4)


def test_ten_steps_lower_the_loss_and_switched_off_the_base_is_back(evidence: Evidence) -> None:
    row = METHODS[evidence.case.section.method]
    assert evidence.losses[-1] < evidence.losses[0] - 0.01
    with evidence.case.model.disable_adapter():
        without = evidence.case.logits()
    assert torch.equal(without, evidence.base_logits) == (evidence.start_print == evidence.base_print)
    assert row.base == "residual" or evidence.start_print == evidence.base_print
    assert torch.equal(evidence.case.logits(), evidence.end_logits), "and on again"
