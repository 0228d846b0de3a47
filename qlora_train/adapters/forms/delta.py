"""Delta-tuning of parameters that are not quantised: norms and biases, each with a trained difference on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from qlora_train.adapters.forms.base import Form, Shapes, Tensors, layer_tensors
from qlora_train.adapters.module_names import is_named
from qlora_train.adapters.updates import Difference, Update
from qlora_train.errors import ModelError
from qlora_train.quant.bnb import Params4bit

PREFIX = "lora_delta_"  # lora_delta_weight is the difference on the module's `weight`
NAMES = (f"{PREFIX}weight", f"{PREFIX}bias")


class DeltaForm(Form):
    """`theta = theta_0 + delta` for named parameters (arXiv 2203.06904: specification-based delta tuning).

    Training moves the difference, in float32, and leaves theta_0 as it is: switching the adapter off gives the base
    back to the bit, and small steps on a bfloat16 norm are not rounded away. What is saved is the difference.
    """

    def __init__(self, parameters: Sequence[str]) -> None:
        self.parameters = parameters  # what the recipe selected

    def expected(self, r: int, found: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Whichever of the differences are there, and one at least."""
        return {name: found[name] for name in NAMES if name in found} or {NAMES[0]: ()}

    def updates(self, tensors: Tensors, scaling: float) -> dict[str, Update]:
        """A difference on each parameter."""
        return {name.removeprefix(PREFIX): Difference(tensor) for name, tensor in tensors.items()}


class DeltaLayer(nn.Module, LoraLayer):
    """A module that computes with trained differences on its small parameters."""

    adapter_layer_names = NAMES
    num_fallbacks = 0

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        for name in NAMES:
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, 1, 1, config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """A difference of zero on each parameter that the config's form selects here."""
        layer: Any = self
        layer.lora_variant[adapter_name] = config.form
        layer.scaling[adapter_name] = 1.0
        for name, parameter in small_parameters(layer.get_base_layer()).items():
            values = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            getattr(layer, f"{PREFIX}{name}")[adapter_name] = nn.Parameter(values)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module with `theta_0 + delta`, summed in float32 and rounded once, to the dtype of x.

        A linear layer's own output, as the base rounds it, takes the place of theta_0.
        """
        layer: Any = self
        base: Any = layer.get_base_layer()
        if layer.disable_adapters:
            return base(x, *args, **kwargs)
        tensors = layer_tensors(layer, layer.active_adapters[0])
        deltas = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        if isinstance(base, nn.Linear):  # of its parameters only the bias is small
            result: Tensor = base(x, *args, **kwargs)
            return (result.float() + deltas["bias"]).to(result.dtype)
        moved = {name: getattr(base, name).float() + delta for name, delta in deltas.items()}
        wide = x.float() if isinstance(base, nn.LayerNorm) else x  # torch's takes one dtype for all
        output: Tensor = functional_call(base, moved, (wide, *args), kwargs)
        return output.to(x.dtype)


def small_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself that delta-tuning may move: vectors called weight or bias, never quantised."""
    found = dict(module.named_parameters(recurse=False))
    return {
        name: parameter
        for name, parameter in found.items()
        if name in ("weight", "bias") and parameter.ndim == 1 and not isinstance(parameter, Params4bit)
    }


def select_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The modules that hold the wanted parameters: `norm`, `bias`, or modules by the end of their dotted name.

    `norm`: weights and biases of normalisation layers; `bias`: biases of linear layers. ModelError for a word that
    matches nothing, with the nearest names.
    """
    holders = {name: module for name, module in model.named_modules() if small_parameters(module)}
    chosen: dict[str, None] = {}
    for word in wanted:
        matching = [name for name, module in holders.items() if _matches(word, name, module)]
        if not matching:
            last = sorted({name.rpartition(".")[2] for name in holders})
            near = get_close_matches(word, [*last, "norm", "bias"], n=2, cutoff=0.5)
            hint = f", nearest: {', '.join(near)}" if near else ""
            raise ModelError(
                f"adapter.parameters: {word!r} matches no small parameter of this model{hint}",
                fix=f"write norm, bias, or names of modules that hold some: {', '.join(last) or 'this model has none'}",
            )
        chosen |= dict.fromkeys(matching)
    return list(chosen)


def _matches(word: str, name: str, module: nn.Module) -> bool:
    if word == "norm":
        return "norm" in type(module).__name__.lower()
    if word == "bias":
        return isinstance(module, nn.Linear)
    return is_named(name, [word])
