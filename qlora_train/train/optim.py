"""AdamW over the adapter, and learning rates as a closed form of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlora_train.errors import ResumeError
from qlora_train.recipe.schema import TrainSection

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def lr_factor(step: int, num_steps: int, warmup_frac: float, schedule: str) -> float:
    """Share of the peak rate that step `step` (from 0) uses.

    Linear rise over `ceil(warmup_frac * num_steps)` steps, never from a rate of zero; then constant, or linear or
    cosine down towards zero, which is reached one step after the last.

    >>> [round(lr_factor(k, 4, 0.0, "linear"), 2) for k in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    warmup = math.ceil(warmup_frac * num_steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, in the model's order: the order of the optimiser's state too."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def build_optimizer(model: nn.Module, section: TrainSection) -> torch.optim.AdamW:
    """AdamW with float32 moments. `foreach` equals the plain loop to the bit on a CPU; `fused` does not."""
    return torch.optim.AdamW(
        list(trainable_parameters(model).values()),
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        weight_decay=section.weight_decay,
        foreach=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named float32 tensors on the CPU: `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        for moment in MOMENTS:
            if (value := optimizer.state[parameter].get(moment)) is not None:
                tensors[f"{moment}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave: every name, shape and dtype must agree."""
    parameters = trainable_parameters(model)
    expected = {f"{moment}/{name}" for name in parameters for moment in MOMENTS}
    if expected != set(tensors):
        name = sorted(expected ^ set(tensors))[0]
        raise ResumeError(
            f"the optimiser's state does not fit the adapter, first difference {name}", fix="use another step"
        )
    for name, parameter in parameters.items():
        state = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
        shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size([])}
        if any(state[k].shape != shapes[k] or state[k].dtype != torch.float32 for k in MOMENTS):
            raise ResumeError(f"the optimiser's state of {name} has another shape or dtype", fix="use another step")
        # torch keeps `step` on the CPU unless the optimiser is fused or capturable.
        on_device = {k: v.clone() if k == "step" else v.to(parameter.device, copy=True) for k, v in state.items()}
        optimizer.state[parameter] = on_device
