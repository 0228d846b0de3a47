"""What a method may do around each optimiser step, and what of it survives a restart; by default nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Value = Tensor | bool | int | float | str | None | list["Value"] | dict[str, "Value"]


class MethodHooks:
    """One step calls, in this order: `extra_loss` for each micro-batch, `before_step`, the update, `after_step`.

    Steps count from 0. A method overrides what it needs and keeps its state in itself. What it does must follow from
    that state, the step and the gradients alone: then a resumed run, which gets the state back, is the straight run.
    Random draws take a generator seeded by `seeds.derive_seed(seed, PURPOSE, step)`.
    """

    def extra_loss(self, share: float) -> Tensor | None:
        """What is added to a micro-batch's part of the step's mean loss, a scalar with a gradient; called after its
        forward pass. `share` is the micro-batch's part of the step's supervised tokens: shares of a step add up to 1.
        """
        return None

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After the gradients were found finite and clipped, before the update. They may be changed in place."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After the update; the gradients of the step are still there."""

    def figures(self) -> Mapping[str, float]:
        """Numbers of the step just made, logged beside its loss in metrics.jsonl, by names of the method's own."""
        return {}

    def state_dict(self) -> Mapping[str, Value]:
        """What the next step depends on besides adapter and optimiser: tensors, and plain values as JSON has them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Value]) -> None:
        """Put back what `state_dict` gave; called after adapter and optimiser were restored. ValueError, with the
        reason, where it does not fit.
        """
        if state:
            raise ValueError(f"this method keeps no state, and there is one: {', '.join(sorted(state))}")


NO_HOOKS = MethodHooks()
