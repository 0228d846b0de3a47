"""LoRA-GA on an NF4 base: the gradient found without a dense one, the start that changes nothing, the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.layers import lora_layers
from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel
from qlora_train.model.probe import probe_gradients
from qlora_train.model.start import start_from_gradients
from qlora_train.recipe.schema import AdapterSection
from tests.loading import dense_twin, tiny_base
from tests.packs import alone, table_of
from tests.tiny import build_tiny_llama

SECTION = AdapterSection(method="lora_ga", r=4, alpha=8.0, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("lora_ga"), num_hidden_layers=1)


def batches() -> list[MicroBatch]:
    table = table_of([60, 40, 50, 30])
    return [alone(table, row) for row in range(4)]


def dense_gradients(folder: Path, of: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """By autograd on the dequantised weights, by parameter name."""
    twin = dense_twin(tiny_base(folder), folder)
    weights = {name: p for name, p in twin.model.named_parameters() if name.endswith("_proj.weight")}
    for parameter in weights.values():
        parameter.requires_grad_()
    total = sum(batch.weight_sum for batch in of)
    causal = CausalModel(twin.model)
    for batch in of:
        (causal.loss_sum(batch) / total).backward()
    return {name: parameter.grad for name, parameter in weights.items() if parameter.grad is not None}


def test_the_probe_finds_the_gradient_that_autograd_has(folder: Path) -> None:
    model = attach_adapter(tiny_base(folder).model, SECTION, 0, base_name="tiny").train()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    found = probe_gradients(CausalModel(model), batches(), 8, seed=0)
    exact = dense_gradients(folder, batches())
    assert len(found) == len(exact) == 7
    rough = probe_gradients(CausalModel(model), batches(), 8, seed=0, passes=2)
    held = {"four passes": 0.0, "two passes": 0.0, "best": 0.0}
    for name, thin in found.items():
        gradient = exact[f"{name.removeprefix('base_model.model.')}.weight"]
        best = torch.linalg.svdvals(gradient)[:8]
        held = {
            "four passes": held["four passes"] + float(thin.singular.norm() / best.norm()),
            "two passes": held["two passes"] + float(rough[name].singular.norm() / best.norm()),
            "best": held["best"] + 1,
        }
        eye = torch.eye(8)
        assert torch.allclose(thin.right @ thin.right.t(), eye, atol=1e-4)
        assert torch.allclose(thin.left.t() @ thin.left, eye, atol=1e-4)
        # They are triples of the very gradient: nothing but the choice of the space is approximate.
        assert torch.allclose(thin.left.t() @ gradient @ thin.right.t(), torch.diag(thin.singular), atol=1e-4 * best[0])
    assert 0.97 * held["best"] < held["four passes"] <= held["best"] * (1 + 1e-5), held
    assert held["two passes"] < held["four passes"], "negative control: fewer passes hold less of it"

    after = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.lora_dropout["default"].p == 0.1 for layer in lora_layers(model).values())


def test_the_start_is_the_base_and_its_first_step_follows_the_gradient(folder: Path) -> None:
    """W moves by -lr s^2 z^2 G_2r: nearly along -G, where plain LoRA's first step sees r random directions of it."""
    alignment = {}
    for method in ("lora_ga", "lora"):
        section = SECTION.model_copy(update={"method": method, "dropout": 0.0})
        base = tiny_base(folder)
        with torch.no_grad():
            plain = base.model(input_ids=torch.arange(3, 19)[None]).logits
        model = attach_adapter(base.model, section, 0, base_name="tiny").train()
        causal = CausalModel(model)
        start_from_gradients(causal, section, batches(), seed=0)
        with torch.no_grad():
            assert torch.equal(model(input_ids=torch.arange(3, 19)[None]).logits, plain)
        total = sum(batch.weight_sum for batch in batches())
        for batch in batches():
            (causal.loss_sum(batch) / total).backward()
        exact, cosines = dense_gradients(folder, batches()), []
        for name, layer in lora_layers(model).items():
            lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert lora_A.grad is not None and lora_B.grad is not None
            moved = -(lora_B @ lora_A.grad + lora_B.grad @ lora_A)  # to first order in the rate
            gradient = exact[f"{name.removeprefix('base_model.model.')}.weight"]
            cosines.append(-float((moved * gradient).sum().detach() / (moved.detach().norm() * gradient.norm())))
            if method == "lora_ga":
                tensors = layer_tensors(layer, "default")
                size = layer.out_features**0.5 / SECTION.stable_gamma
                assert torch.allclose(lora_A @ lora_A.t(), size * torch.eye(4), atol=1e-3 * size)
                assert torch.equal(lora_B, tensors["lora_start_B"])
                singular = torch.linalg.svdvals(gradient)
                best = float(singular[:8].norm() / singular.norm())
                assert cosines[-1] > 0.95 * best, "within 5 % of the best that rank 2 r can do"
        alignment[method] = sum(cosines) / len(cosines)
    assert alignment["lora_ga"] > 1.5 * alignment["lora"], "negative control: chance directions"


def test_stable_gamma_and_the_number_of_batches_reach_the_start(folder: Path) -> None:
    def start(num_batches: int, gamma: float) -> Tensor:
        section = SECTION.model_copy(update={"stable_gamma": gamma})
        model = attach_adapter(tiny_base(folder).model, section, 0, base_name="tiny").train()
        start_from_gradients(CausalModel(model), section, batches()[:num_batches], seed=0)
        weight: Tensor = next(iter(lora_layers(model).values())).lora_A["default"].weight.detach()
        return weight

    assert torch.allclose(start(4, 16.0), 2 * start(4, 64.0), atol=1e-5)
    assert not torch.allclose(start(4, 16.0), start(2, 16.0), atol=1e-2)
