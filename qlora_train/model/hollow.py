"""A model of which no weight is in memory: right names, shapes, dtypes and buffers, filled a part at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.model.skeleton import build_skeleton, linear_layers
from qlora_train.quant.bnb import Params4bit, QuantSettings, forbid_cpu_repacking, meta_linear4bit
from qlora_train.quant.fingerprint import BasePrint, base_parameter_name


def build_hollow(config: Any, device: torch.device, base: BasePrint | None = None, attention: str | None = None) -> Any:
    """A transformers model on `device` whose parameters are one number each, seen as a whole tensor of zeros.

    With `base`, the linear layers that it names as quantised are 4-bit layers; everything else computes in float32.
    `attention` None is
    transformers' own choice. Tied parameters stay tied. What is no parameter, such as rotary tables, has its values.
    """
    model: Any = build_skeleton(config, dtype=torch.float32, attn_implementation=attention)
    if base is not None and base.quant:
        settings = QuantSettings(**base.quant)  # type: ignore[arg-type]
        for name, layer in linear_layers(model).items():
            if base.tensors[f"{name}.weight"].quantised:
                parent, _, own_name = name.rpartition(".")
                setattr(model.get_submodule(parent), own_name, meta_linear4bit(layer, settings))
        model.is_loaded_in_4bit = True  # else PEFT builds no 4-bit layers
    _hollow_out(model, device)
    _fill_buffers(model, device)
    forbid_cpu_repacking(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def fill(model: nn.Module, name: str, value: Tensor | Params4bit) -> nn.Parameter:
    """Give a parameter its value, and return what was there. `name` is the base's, with or without an adapter."""
    owners = _owners(model, name)
    former = owners[0][2]
    if isinstance(value, Params4bit):
        assert isinstance(former, Params4bit)
        value.quant_state.dtype = former.quant_state.dtype  # what the layer computes in
    made = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    for module, own_name, _ in owners:
        setattr(module, own_name, made)
    return former


def parameter_names(model: nn.Module) -> list[str]:
    """The base's parameters, by the base's own names; tied ones once."""
    found = [base_parameter_name(name) for name, _ in model.named_parameters()]
    return [name for name in found if name is not None]


def _owners(model: nn.Module, name: str) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every module that holds a parameter, or shares it."""
    same = {id(parameter) for full, parameter in model.named_parameters() if base_parameter_name(full) == name}
    return [
        (module, own_name, parameter)
        for module in model.modules()
        for own_name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in same
    ]


def _hollow_out(model: nn.Module, device: torch.device) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = _hollow(parameter, device)
            setattr(module, name, made[id(parameter)])


def _hollow(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    zeros = _zeros(parameter, device)
    made: nn.Parameter
    if isinstance(parameter, Params4bit):
        made = Params4bit(
            zeros,
            requires_grad=False,
            quant_state=_hollow_state(parameter.quant_state, device),
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            bnb_quantized=True,
        )
    else:
        made = nn.Parameter(zeros, requires_grad=False)
    made._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it as it is
    return made


def _hollow_state(state: Any, device: torch.device) -> Any:
    """A quantiser's state with every tensor hollow."""
    made = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(made, name, _zeros(value, device))
        elif isinstance(value, type(state)):
            setattr(made, name, _hollow_state(value, device))
    return made


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)


def _fill_buffers(model: Any, device: torch.device) -> None:
    """transformers computes what its files do not hold: it passes over parameters that are marked."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
    model.initialize_weights()
