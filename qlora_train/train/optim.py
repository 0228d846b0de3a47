"""AdamW over the adapter, by name, with its state and its method's rule; and learning rates, a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.adapters.gradrules import LoraProAdamW, LoraProRule, Pair
from qlora_train.adapters.groups import Group, loraplus_groups, one_group
from qlora_train.adapters.layers import lora_layers
from qlora_train.errors import MachineError, ResumeError
from qlora_train.quant.moments import PAGED, build_bnb_adamw
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection, TrainSection

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


def build_optimizer(
    model: nn.Module, section: TrainSection, adapter: AdapterSection | None = None
) -> torch.optim.Optimizer:
    """The optimiser named in the recipe, on the device where the adapter lies, with the rule of the adapter's method.

    torch's AdamW has float32 moments. On CUDA it is fused: one kernel for all. On a CPU it is `foreach`, equal to the
    plain loop to the bit, which `fused` is not. bitsandbytes' run one kernel per parameter on CUDA, and plain torch
    operations on a CPU. LoRA+ gives groups of their own rates, LoRA-Pro rewrites the gradients before each update.
    Raises MachineError as `check_optimizer` does.
    """
    parameters = trainable_parameters(model)
    device = next(iter(parameters.values())).device
    check_optimizer(section, device)
    rule = METHODS[adapter.method].rule if adapter else ""
    betas = (section.adam_beta1, section.adam_beta2)
    if adapter and rule == "lora_pro" and adapter.rule_mode == "full":
        rate, decay = section.learning_rate, section.weight_decay
        return LoraProAdamW(_pairs(model), lr=rate, betas=betas, weight_decay=decay)
    groups = [_as_torch(group, section) for group in parameter_groups(model, adapter)]
    optimizer: torch.optim.Optimizer
    if section.optimizer != "adamw":
        optimizer = build_bnb_adamw(
            section.optimizer,
            groups,
            learning_rate=section.learning_rate,
            betas=betas,
            weight_decay=section.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            groups,
            lr=section.learning_rate,
            betas=betas,
            weight_decay=section.weight_decay,
            foreach=device.type != "cuda",
            fused=device.type == "cuda",
        )
    if rule == "lora_pro":
        optimizer.rule = LoraProRule(_pairs(model))  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(optimizer.rule)  # type: ignore[attr-defined]
    return optimizer


def parameter_groups(model: nn.Module, adapter: AdapterSection | None = None) -> list[Group]:
    """Every trainable parameter in exactly one group, by the rule of the adapter's method."""
    parameters = trainable_parameters(model)
    if adapter is None or METHODS[adapter.method].rule != "loraplus":
        return one_group(parameters)
    return loraplus_groups(parameters, adapter.lr_ratio)


def _as_torch(group: Group, section: TrainSection) -> dict[str, Any]:
    decay = section.weight_decay if group.decays else 0.0
    rate = section.learning_rate * group.lr_ratio
    return {
        "params": list(group.parameters),
        "name": group.name,
        "lr_ratio": group.lr_ratio,
        "lr": rate,
        "weight_decay": decay,
    }


def _pairs(model: nn.Module) -> list[Pair]:
    """A and B of every adapted layer."""
    layers = lora_layers(model).values()
    adapters = [(layer, layer.active_adapters[0]) for layer in layers]
    return [Pair(one.lora_A[name].weight, one.lora_B[name].weight, one.scaling[name]) for one, name in adapters]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the coming step; each group gets its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def optimizer_figures(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What shows the method's rule at work in the log of a step: the rates of groups, the norm of rewritten gradients.

    Empty for plain AdamW.
    """
    figures: dict[str, Any] = {}
    if rates := learning_rates(optimizer):
        figures["learning_rates"] = rates
    rule = optimizer if isinstance(optimizer, LoraProAdamW) else getattr(optimizer, "rule", None)
    return figures if rule is None else {**figures, "rule_norm": rule.rule_norm}


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each group by name, where groups have several; empty where all have one."""
    groups = optimizer.param_groups
    ratios = {group.get("lr_ratio", 1.0) for group in groups}
    return {group["name"]: group["lr"] for group in groups} if len(ratios) > 1 else {}


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
    paged = getattr(optimizer, "is_paged", False)
    places = {} if paged else _places(optimizer)
    new = [p for p in trainable_parameters(model).values() if p in places and not optimizer.state.get(p)]
    try:
        for parameter in new:
            _new_state(optimizer, places[parameter], parameter)
        yield
    finally:
        for parameter in new:
            optimizer.state.pop(parameter, None)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, copied into states as the optimiser itself makes them.

    So `step` lies where torch wants it, and paged moments are paged again, which bitsandbytes' `load_state_dict`
    forgets. Raises ResumeError unless every name, shape and dtype agrees, and the tables of 8-bit codes to the bit.
    """
    optimizer.state.clear()
    with_state, places = {name.partition("/")[2] for name in tensors}, _places(optimizer)
    states = {
        name: _new_state(optimizer, places[parameter], parameter)
        for name, parameter in trainable_parameters(model).items()
        if name in with_state and parameter in places
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


def _places(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[int, int]]:
    """Where each parameter that gets a state stands: its group, and its place in the group."""
    if isinstance(optimizer, LoraProAdamW):
        return {pair.lora_B: (0, 2 * index + 1) for index, pair in enumerate(optimizer.pairs)}
    groups = enumerate(optimizer.param_groups)
    return {p: (index, place) for index, group in groups for place, p in enumerate(group["params"])}


def _new_state(optimizer: Any, place: tuple[int, int], parameter: nn.Parameter) -> dict[str, Any]:
    """The state that the optimiser gives the parameter of this place before its first step, put in place."""
    group = optimizer.param_groups[place[0]]
    if isinstance(optimizer, LoraProAdamW):
        return optimizer.new_state(parameter)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    else:
        optimizer.init_state(group, parameter, *place)
    state: dict[str, Any] = optimizer.state[parameter]
    return state


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
