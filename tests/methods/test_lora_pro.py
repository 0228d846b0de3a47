"""LoRA-Pro on NF4: the effect of a step is nearest to the dense gradient; both modes train and go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.gradrules import LoraProAdamW, lora_pro
from qlora_train.adapters.layers import lora_layers
from qlora_train.errors import RecipeError
from qlora_train.memory.advice import advise
from qlora_train.memory.moments import optimizer_of, state_bytes
from qlora_train.memory.plan import plan_training
from qlora_train.memory.trace import OPTIMISER
from qlora_train.model.causal import CausalModel
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import AdapterSection, TrainSection
from qlora_train.train.optim import build_optimizer, optimizer_figures, optimizer_tensors, restore_optimizer
from tests.commandline import write_recipe
from tests.loading import dense_twin, tiny_base, with_adapter
from tests.packs import alone, table_of
from tests.tiny import build_tiny_llama
from tests.unit.memory.planned import published_config, recipe_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("lora_pro"), num_hidden_layers=1)


def projected_out(of: Tensor, columns: Tensor) -> Tensor:
    basis = torch.linalg.qr(columns).Q
    return of - basis @ (basis.t() @ of)


def test_the_steps_effect_is_nearest_to_the_dense_gradient(folder: Path) -> None:
    """g is never formed by the rule; here autograd has it, on the dequantised weights with the update added."""
    batch = alone(table_of([60]), 0)
    base = tiny_base(folder)
    twin = dense_twin(base, folder).model
    model = with_adapter(base).train()
    layers = lora_layers(model)
    for name, layer in layers.items():
        weight = twin.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
        with torch.no_grad():
            weight.add_(layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        weight.requires_grad_()
    for one in (model, twin):
        CausalModel(one).loss_sum(batch).backward()
    for name, layer in layers.items():
        a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        g = twin.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").grad
        assert a.grad is not None and b.grad is not None and g is not None
        with torch.no_grad():
            step_a, step_b = lora_pro(a, b, a.grad, b.grad, scaling)
            left = float((scaling * (b @ step_a + step_b @ a) - g).norm())
            least = float(projected_out(projected_out(g, b).t(), a.t()).norm())
            plain = scaling * (b @ a.grad + b.grad @ a)
            rescaled = plain * float((plain * g).sum() / plain.square().sum())
        assert left == pytest.approx(least, rel=1e-3), name
        assert left < float((rescaled - g).norm()), f"{name}: negative control"


def trained(folder: Path, section: AdapterSection, num_steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = attach_adapter(tiny_base(folder).model, section, 0, base_name="tiny").train()
    optimizer = build_optimizer(model, TrainSection(learning_rate=2e-3), section)
    run(model, optimizer, num_steps)
    return model, optimizer


def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    causal, batch = CausalModel(model), alone(table_of([60]), 0)
    losses = []
    for _ in range(num_steps):
        loss = causal.loss_sum(batch) / batch.weight_sum
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def adapter(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["factor", "full"])
def test_the_rule_acts_trains_and_goes_on_from_its_state(folder: Path, mode: str) -> None:
    section = AdapterSection(method="lora_pro", r=4, alpha=8.0, rule_mode=mode)  # type: ignore[arg-type]
    model, optimizer = trained(folder, section, 3)
    assert isinstance(optimizer, LoraProAdamW) == (mode == "full")
    plain, plain_optimizer = trained(folder, section.model_copy(update={"method": "lora"}), 3)
    assert any(not torch.equal(one, adapter(plain)[name]) for name, one in adapter(model).items()), "negative control"
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    moments = {name for name in tensors if name.startswith("exp_avg_sq/")}
    assert len(moments) == (7 if mode == "full" else 14)
    if mode == "full":
        shapes = {tuple(tensors[name].shape) for name in moments}
        assert (256, 128) in shapes and (128, 256) in shapes, "moments are those of whole weights"

    again = attach_adapter(tiny_base(folder).model, section, 0, base_name="tiny").train()
    own = dict(again.named_parameters())
    with torch.no_grad():
        for name, value in adapter(model).items():
            own[name].copy_(value)
    restored = build_optimizer(again, TrainSection(learning_rate=2e-3), section)
    restore_optimizer(again, restored, tensors)
    assert optimizer_figures(optimizer)["rule_norm"] > 0 and optimizer_figures(plain_optimizer) == {}
    losses = run(model, optimizer, 5)
    run(again, restored, 5)
    assert all(torch.equal(value, adapter(again)[name]) for name, value in adapter(model).items())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["factor", "full"])
def test_plans_count_the_moments_that_the_optimiser_keeps(folder: Path, mode: str) -> None:
    section = AdapterSection(method="lora_pro", r=4, alpha=8.0, rule_mode=mode)  # type: ignore[arg-type]
    model, optimizer = trained(folder, section, 1)
    held = sum(tensor.nbytes for tensor in optimizer_tensors(model, optimizer).values())
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    recipe = recipe_of(adapter=section.model_dump(), data={"seq_len": 64, "eval": ()})
    assert state_bytes(optimizer_of(recipe), shapes) == held
    plan = plan_training(recipe, AutoConfig.from_pretrained(folder), device="cpu")
    moments = next(term.num_bytes for term in plan.of("training") if term.cause == OPTIMISER)
    num_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = next(term.num_bytes for term in plan.of("disk") if term.cause == "checkpoints")
    assert moments == held and kept == (recipe.train.keep + 1) * (held + 4 * num_weights)
    assert any("whole weights" in note for note in plan.notes) == (mode == "full")


def test_the_way_out_of_whole_moments_is_factor_mode() -> None:
    """Not 8-bit moments, which the recipe refuses there."""
    given: dict[str, Any] = {"method": "lora_pro", "rule_mode": "full", "r": 16, "target_modules": "all-linear"}
    plan = plan_training(recipe_of(adapter=given, data={"eval": ()}), published_config("smollm2-135m"), device="cuda")
    changes = advise(plan, plan.device_bytes // 2)
    assert not any("8bit" in change.text for change in changes)
    factor = next(change for change in changes if change.text == "adapter.rule_mode=factor")
    assert factor.changes_training and factor.saved_bytes > 0.8 * 8 * 106_000_000, "weights in linear layers"


def test_full_mode_refuses_another_optimiser(folder: Path, tmp_path: Path) -> None:
    changes = {"adapter__method": "lora_pro", "adapter__rule_mode": "full", "train__optimizer": "adamw_8bit"}
    with pytest.raises(RecipeError, match=r"train\.optimizer: adamw_8bit has no effect: adapter\.rule_mode is full"):
        load_recipe(write_recipe(tmp_path, folder, **changes), ())
    load_recipe(write_recipe(tmp_path, folder, **{**changes, "adapter__rule_mode": "factor"}), ())
