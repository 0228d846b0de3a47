"""torch.compile of one decoder layer, used for all of them: what lies between the matmuls becomes a few fused loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_train.adapters.layer_gates import ungated
from qlora_train.adapters.layers import adapted_layers
from qlora_train.errors import first_line
from qlora_train.model.attention import ATTENTION_NAME, row_attention
from qlora_train.model.checkpointing import decoder_layers

Forward = Callable[..., Any]


def compile_layers(model: nn.Module) -> None:
    """Decoder layers run compiled in training mode once `apply_checkpointing` is called after this.

    Compiled is what stands between the adapted linear layers and attention (norms, rotary embedding, activation,
    residuals), which run as they are: so a recomputation still stops before its last matmul, and dequantised weights
    are found where they were left. All layers of a kind share the code; it is compiled at the first step. Values are
    rounded less often than without, so losses differ by rounding: tests/numerics/test_compiling.py. Not for selective
    checkpointing, which watches single operators.
    """
    for layer in adapted_layers(model).values():
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(row_attention))
    for module in model.modules():
        if _is_gated_mlp(module):
            module.forward = MethodType(_gated_mlp, module)
    for layer in decoder_layers(model):
        # transformers wraps the forward of each layer class in its checkpointing; compiled is what is inside.
        kind = ungated(type(layer))
        compiled = _compiled(kind.forward.__wrapped__)
        if kind is type(layer):
            layer.compiled_forward = compiled
        else:  # the gate stays outside: it must be closed whatever happens inside
            layer.inside = compiled


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether its class computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, to the byte as Llama's does."""
    found, llamas = getattr(type(module).forward, "__code__", None), LlamaMLP.forward.__code__
    return found is not None and (found.co_code, found.co_names) == (llamas.co_code, llamas.co_names)


def _gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The same with both projections first: nothing stands between activation and product, so they are one loop, and
    of the activation's result nothing is saved."""
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    result: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return result


@cache
def _compiled(forward: Forward) -> Forward:
    return torch.compile(forward, dynamic=True)


def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work on this machine, or None. Compiles a line: some seconds."""
    try:
        torch.compile(lambda x: torch.sin(x) * 2 + 1)(torch.ones(64, device=device))
    except Exception as error:  # whatever the compiler and its tools may raise
        return f"{type(error).__name__}: {first_line(error)}"
    return None
