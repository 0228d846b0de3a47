"""One tiny NF4 model with each method of the table on it, started as training starts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn

from qlora_train.adapters.attach import attach_adapter, load_adapter
from qlora_train.adapters.config import section_config
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.layers import adapted_layers, lora_layers, register_layers
from qlora_train.adapters.schedules import method_hooks
from qlora_train.adapters.state import save_adapter
from qlora_train.data.loader import MicroBatch, collate
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import Base
from qlora_train.model.start import rebuild, start_from_gradients, start_from_inputs, start_from_weights
from qlora_train.quant.bnb import Linear4bit, dequantize
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection, TrainSection
from qlora_train.train.optim import build_optimizer
from qlora_train.train.step import StepResult, train_step
from tests.loading import tiny_base, with_adapter
from tests.packs import table_of

IDS = torch.arange(3, 19)[None, :]
# What a method needs beside its defaults on a model of two layers and in ten steps.
KEYS: dict[str, dict[str, Any]] = {
    "mtlora": {"structure": "ctcm"},
    "flora_core": {"r_out": 6},
    "adalora": {"r": 6, "target_r": 4, "schedule_every": 2, "schedule_start_frac": 0.1},
    "aflora": {"schedule_every": 2, "schedule_start_frac": 0.1},
}
# Every method, and ways of one that compute otherwise than its default does.
WAYS: dict[str, dict[str, Any]] = {name: {} for name in METHODS} | {"mole layer": {"granularity": "layer"}}
RATES = {"adalora": 5e-2, "mole": 5e-2, "delta": 1e-2}  # of a few steps on one batch; 5e-3 for the others


@dataclass(frozen=True)
class Case:
    """A method attached to a base, ready to train."""

    section: AdapterSection
    base: Base
    model: PeftModel
    causal: CausalModel
    batches: Sequence[MicroBatch]

    def logits(self) -> torch.Tensor:
        """Of a few tokens, without gradients."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=IDS).logits
        return logits

    def train(self, num_steps: int, seed: int = 0) -> list[StepResult]:
        """Steps on the case's one batch, with the method's optimiser rule and schedule."""
        learning_rate = RATES.get(self.section.method, 5e-3)
        train = TrainSection(learning_rate=learning_rate, schedule="constant", warmup_frac=0.0)
        optimizer = build_optimizer(self.model, train, self.section)
        hooks = method_hooks(self.model, self.section, num_steps=num_steps, seed=seed)
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.model.train()
        results = [
            train_step(
                self.causal,
                self.batches,
                optimizer,
                accelerator,
                seed=seed,
                step=step,
                learning_rate=learning_rate,
                max_grad_norm=0.0,
                hooks=hooks,
            )
            for step in range(num_steps)
        ]
        self.model.eval()
        return results


def section_of(method: str, experts: Sequence[Path] = (), **keys: Any) -> AdapterSection:
    """A recipe's section for the method: r = 4, alpha = 8 where it reads them."""
    row = METHODS[method]
    common = {key: value for key, value in {"r": 4, "alpha": 8.0}.items() if key in row.reads}
    if "experts" in row.options:
        common["experts"] = tuple(experts)
    return AdapterSection(**{"method": method, **common, **KEYS.get(method, {}), **keys})


def build(folder: Path, section: AdapterSection, *, seed: int = 0, fused: bool = True, **quant: Any) -> Case:
    """A base with the method on it, started as training starts it."""
    base = tiny_base(folder, **quant)
    model = attach_adapter(base.model, section, seed, base_name="tiny", fused=fused)
    causal = CausalModel(model)
    table = table_of([20, 12, 16])
    batches = [collate(table, [[0], [1], [2]], 0)]
    base = start_from_weights(base, model, section)
    start_from_inputs(causal, section, batches)
    start_from_gradients(causal, section, batches, seed=seed)
    model.eval()
    return Case(section, base, model, causal, batches)


def one_layer(method: str, *, num_in: int = 64, num_out: int = 32, seed: int = 0, **keys: Any) -> Any:
    """A float linear layer without bias, with the method on it: the adapted layer itself, in training mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(num_in, num_out, bias=False))
    section = section_of(method, **{"target_modules": ("0",), **keys})
    config = section_config(section)
    config.task_type = None  # it is no language model
    torch.manual_seed(seed)
    return lora_layers(get_peft_model(model, register_layers(config)).train())["base_model.model.0"]


def shake(layer: Any, std: float = 0.1, seed: int = 1) -> dict[str, torch.Tensor]:
    """Add noise to all that trains in a layer, so that nothing is zero by its start; its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = layer_tensors(layer, "default")
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=std)
    return tensors


def gradients_of(layer: Any, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Gradients of sum(weights * layer(x)) by attribute."""
    tensors = layer_tensors(layer, "default")
    for tensor in tensors.values():
        tensor.grad = None
    (layer(x) * weights).sum().backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


def reloaded(folder: Path, adapter: Path, section: AdapterSection, **quant: Any) -> Case:
    """A new base with the adapter of a folder on it."""
    base = tiny_base(folder, **quant)
    model = load_adapter(base.model, adapter)
    base = rebuild(base, model)
    model.eval()
    return Case(section, base, model, CausalModel(model), [])


def write_experts(folder: Path, to: Path) -> list[Path]:
    """Two plain adapters of the base, of different rank, with every factor random."""
    folders = []
    for index, r in enumerate((4, 2)):
        made = to / f"expert{index}" / "adapter"
        made.mkdir(parents=True)
        save_adapter(with_adapter(tiny_base(folder), seed=index + 1, r=r, alpha=2.0 * r), made)
        folders.append(made)
    return folders


def trained_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What trains, by layer and attribute."""
    return {
        f"{name}.{attribute}": tensor
        for name, layer in adapted_layers(model).items()
        for attribute, tensor in layer_tensors(layer, "default").items()
        if tensor.requires_grad
    }


def dense_twin_of(model: PeftModel, folder: Path) -> nn.Module:
    """The base under an adapter as a plain model, holding the dequantised weights."""
    twin: nn.Module = tiny_base(folder, quant_type="none").model
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                twin.get_parameter(f"{plain}.weight").copy_(dequantize(layer.weight))
    return twin
