"""AdamW over the adapter, by name, with its state; and learning rates as a closed form of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.errors import MachineError, ResumeError
from qlora_train.quant.moments import PAGED, build_bnb_adamw
from qlora_train.recipe.schema import TrainSection

TABLES = ("qmap1", "qmap2")  # what bitsandbytes' 8-bit codes stand for, shared by all parameters


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


def check_optimizer(section: TrainSection, device: torch.device) -> None:
    """MachineError when the optimiser needs CUDA and `device` is another: bitsandbytes would leave paging out."""
    if section.optimizer in PAGED and device.type != "cuda":
        raise MachineError(
            f"train.optimizer: {section.optimizer} needs CUDA's managed memory, and the device is {device}",
            fix=f"set train.optimizer: {section.optimizer.removeprefix('paged_')}",
        )


def build_optimizer(model: nn.Module, section: TrainSection) -> torch.optim.Optimizer:
    """The optimiser named in the recipe, on the device where the adapter lies.

    torch's AdamW has float32 moments. On CUDA it is fused: one kernel for all. On a CPU it is `foreach`, equal to the
    plain loop to the bit, which `fused` is not. bitsandbytes' run one kernel per parameter on CUDA, and plain torch
    operations on a CPU. Raises MachineError as `check_optimizer` does.
    """
    parameters = list(trainable_parameters(model).values())
    device = parameters[0].device
    check_optimizer(section, device)
    betas = (section.adam_beta1, section.adam_beta2)
    if section.optimizer != "adamw":
        return build_bnb_adamw(
            section.optimizer,
            parameters,
            learning_rate=section.learning_rate,
            betas=betas,
            weight_decay=section.weight_decay,
        )
    return torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=betas,
        weight_decay=section.weight_decay,
        foreach=device.type != "cuda",
        fused=device.type == "cuda",
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors on the CPU, not copied where they lie there already.

    `STATE/PARAMETER`: `exp_avg`, `exp_avg_sq`, `step` of torch's AdamW; `state1`, `state2`, `step` of bitsandbytes'
    and, where these are 8-bit codes, `absmax1`, `absmax2`. The tables of the codes once: `qmap1`, `qmap2`. A parameter
    that never had a gradient (an expert that no token reached) has no state.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[_tensor_name(key, name)] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


@contextmanager
def with_all_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Every parameter has its state in the block, as after a step; what was not there before is gone afterwards.

    Paged moments, which bitsandbytes never frees, are left as they are.
    """
    parameters = enumerate(trainable_parameters(model).values())
    paged = getattr(optimizer, "is_paged", False)
    new = [] if paged else [(index, p) for index, p in parameters if not optimizer.state.get(p)]
    try:
        for index, parameter in new:
            _new_state(optimizer, index, parameter)
        yield
    finally:
        for _, parameter in new:
            optimizer.state.pop(parameter, None)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, copied into states as the optimiser itself makes them.

    So `step` lies where torch wants it, and paged moments are paged again, which bitsandbytes' `load_state_dict`
    forgets. Raises ResumeError unless every name, shape and dtype agrees, and the tables of 8-bit codes to the bit.
    """
    optimizer.state.clear()
    with_state = {name.partition("/")[2] for name in tensors}
    states = {
        name: _new_state(optimizer, index, parameter)
        for index, (name, parameter) in enumerate(trainable_parameters(model).items())
        if name in with_state
    }
    expected = {_tensor_name(key, name): value for name, state in states.items() for key, value in state.items()}
    if expected.keys() != tensors.keys():
        name = sorted(expected.keys() ^ tensors.keys())[0]
        raise ResumeError(
            f"the optimiser's state does not fit the adapter and train.optimizer, first difference {name}",
            fix="use another step",
        )
    for name, value in expected.items():
        _check_fit(name, tensors[name], torch.as_tensor(value))
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.copy_(tensors[_tensor_name(key, name)])
            else:
                state[key] = int(tensors[_tensor_name(key, name)])


def _new_state(optimizer: Any, index: int, parameter: nn.Parameter) -> dict[str, Any]:
    """The state that the optimiser gives the parameter of this index before its first step, put in place."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    else:
        optimizer.init_state(group, parameter, 0, index)
    return optimizer.state[parameter]


def _tensor_name(key: str, parameter: str) -> str:
    return key if key in TABLES else f"{key}/{parameter}"


def _check_fit(name: str, saved: Tensor, expected: Tensor) -> None:
    if saved.shape != expected.shape or saved.dtype != expected.dtype:
        raise ResumeError(f"the optimiser's state {name} has another shape or dtype", fix="use another step")
    if name in TABLES and not torch.equal(saved, expected.cpu()):
        raise ResumeError(
            f"the optimiser's 8-bit codes stand for other values than here ({name} differs)",
            fix="install the bitsandbytes of the run's environment.json, or start a new run",
        )
