"""Loss, learning rate and norms of the last steps: what the flight recorder tells of, and every checkpoint keeps.

As plain data each figure is a list over the steps, oldest first: `step`, `loss`, `grad_norm`, `learning_rate`; and, by
the name of each trained tensor, `grad_norm_of` (before clipping) and `norm_of` (of the value after the update).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_train.names import PEFT_PREFIX
from qlora_train.train.optim import trainable_parameters
from qlora_train.train.step import StepResult, norms

STEPS_KEPT = 20
_FIGURES = ("step", "loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class _Noted:
    """One step. Norms are (P,), left on their device: nothing waits for them."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    grad_norms: Tensor
    weight_norms: Tensor


class LastSteps:
    """The last STEPS_KEPT steps of a run, those before a resume among them. Nothing that is trained depends on it."""

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
        names = {parameter: name for name, parameter in trainable_parameters(model).items()}
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.names = [short_name(names.get(parameter, f"tensor {i}")) for i, parameter in enumerate(self.parameters)]
        self._noted: deque[_Noted] = deque(maxlen=STEPS_KEPT)

    def note(self, step: int, result: StepResult, learning_rate: float) -> Tensor:
        """Keep what a step, from 1, came to; the norms of the trained values after it, (P,)."""
        assert result.grad_norms is not None
        weight_norms = norms(self.parameters)
        self._noted.append(_Noted(step, result.loss, result.grad_norm, learning_rate, result.grad_norms, weight_norms))
        return weight_norms

    def as_dict(self) -> dict[str, Any]:
        """Plain data; no tensor is named where no step was made."""
        noted = list(self._noted)
        found: dict[str, Any] = {key: [getattr(one, key) for one in noted] for key in _FIGURES}
        for key, values in (("grad_norm_of", "grad_norms"), ("norm_of", "weight_norms")):
            rows = torch.stack([getattr(one, values).cpu() for one in noted]) if noted else torch.zeros(0, 0)
            found[key] = dict(zip(self.names, rows.t().tolist(), strict=False))
        return found

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave. Of another version's tensors nothing is taken over."""
        if not (set(found.get("grad_norm_of", ())) == set(found.get("norm_of", ())) == set(self.names)):
            return
        device = self.parameters[0].device
        by_step = (
            torch.tensor([found[key][name] for name in self.names], dtype=torch.float32, device=device).t()
            for key in ("grad_norm_of", "norm_of")
        )
        self._noted.extend(_Noted(*values) for values in zip(*(found[key] for key in _FIGURES), *by_step, strict=True))


def short_name(name: str) -> str:
    """A parameter's name as the base's own files have it, the adapter's tensor behind it.

    >>> short_name("base_model.model.layers.0.q_proj.lora_A.default.weight")
    'layers.0.q_proj.lora_A'
    """
    return name.removeprefix(PEFT_PREFIX).replace(".default", "").removesuffix(".weight")
