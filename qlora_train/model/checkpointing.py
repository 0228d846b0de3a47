"""Which decoder layers compute their activations again in the backward pass, and what they keep for it.

Every recomputation is torch's non-reentrant one, through the hook that transformers' decoder layers have for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # registers torch_attn._varlen_attn
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.errors import MachineError, ModelError

Kind = Literal["none", "selective", "full"]

_SDPA_NAMES = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
# The matmuls of attention, whichever way it goes: a linear layer is an mm, never a bmm. The softmax between two kept
# products is computed again: its output is as large as its input, which must be kept anyway.
ATTENTION_OPS = frozenset(
    {
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
        torch.ops.torch_attn._varlen_attn.default,
        *(getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _SDPA_NAMES),
    }
)


@dataclass(frozen=True)
class Checkpointing:
    """What is computed again: nothing; all but attention's matmuls; or everything, from a layer's input."""

    kind: Kind = "none"
    every: int = 1  # layers 0, every, 2 * every, ... are computed again; the others keep their activations
    offload: bool = False  # the inputs of those layers wait in pinned host memory

    def recomputes(self, index: int, num_layers: int) -> bool:
        """Whether layer `index` runs again. The last never does: its backward pass would be the first thing to need it
        back, when nothing has been freed yet."""
        return self.kind != "none" and index % self.every == 0 and index < num_layers - 1

    def num_recomputed(self, num_layers: int) -> int:
        """Layers that run twice in a step."""
        return sum(self.recomputes(index, num_layers) for index in range(num_layers))


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The repeated blocks of a model, with or without an adapter, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def apply_checkpointing(model: nn.Module, policy: Checkpointing) -> None:
    """Set the policy on every decoder layer; it holds in training mode, until the next call.

    Loss and gradients are the same bits under every policy: tests/numerics/test_checkpointing.py. Raises ModelError
    for a model that cannot be recomputed as asked, MachineError for offload without CUDA.
    """
    layers = decoder_layers(model)
    if policy.kind != "none":
        _check(model, layers, policy)
    for index, layer in enumerate(layers):
        set_layer(layer, policy.kind if policy.recomputes(index, len(layers)) else "none", offload=policy.offload)


def set_layer(layer: GradientCheckpointingLayer, kind: Kind, *, offload: bool = False) -> None:
    """Make one decoder layer keep its activations, or compute them again."""
    layer.gradient_checkpointing = kind != "none" or hasattr(layer, "compiled_forward")
    layer._gradient_checkpointing_func = partial(_run, kind, offload)


def _check(model: nn.Module, layers: list[GradientCheckpointingLayer], policy: Checkpointing) -> None:
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no decoder layers that can be computed again",
            fix="set train.checkpointing: none",
        )
    device = next(layers[0].parameters()).device
    if policy.offload and device.type != "cuda":
        raise MachineError(
            f"train.offload_checkpoints moves activations from a CUDA device to the host, but the device is {device}",
            fix="set train.offload_checkpoints: false",
        )
    # Skipped attention would not draw its dropout again, and everything after it would draw other numbers.
    dropout = getattr(getattr(model, "config", None), "attention_dropout", 0.0)
    if policy.kind == "selective" and dropout:
        raise ModelError(
            f"the model has an attention_dropout of {dropout}, so attention cannot be kept while the rest runs again",
            fix="set train.checkpointing: full",
        )


def _run(kind: Kind, offload: bool, function: partial[Any], *args: Any) -> Any:
    """Run a layer, compiled where it is (model/compiling.py); to be recomputed, it saves its inputs alone, and
    attention's products where they are kept."""
    layer = function.args[0]
    if (compiled := getattr(layer, "compiled_forward", None)) is not None:
        function = partial(compiled, *function.args, **function.keywords)
    if kind == "none":
        return function(*args)
    run = partial(checkpoint, function, *args, use_reentrant=False)
    if kind == "selective":
        run = partial(run, context_fn=_keep_attention)
    if not offload:
        return run()
    # torch moves what is saved outside the recomputed function, the inputs. Both copies run on the compute stream.
    with save_on_cpu(pin_memory=True):
        return run()


def _keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts for a layer's forward pass and for its recomputation, as `checkpoint` takes them.

    torch's own `create_selective_checkpoint_contexts` wants every operator to be called as often in both; our
    dequantisation is left out where its weight is still there (kernels/dense.py). Like it, costs some microseconds of
    the host's time for every operator of the layer, so that it pays where rows are long. Not for compiled layers.
    """
    kept: list[Any] = []
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):
    """Remember what the operators of attention give."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ATTENTION_OPS:
            self._kept.append(_detached(out))
        return out


class _Replay(TorchDispatchMode):
    """Give in place of each operator of attention what it gave before. Can be entered again."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self._kept = kept

    def __enter__(self) -> Any:
        self._rest = iter(self._kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION_OPS:
            return _detached(next(self._rest))
        return func(*args, **(kwargs or {}))


def _detached(out: Any) -> Any:
    """The same values without a history: a kept tensor must not hold the graph that it came from."""
    return tree_map_only(Tensor, Tensor.detach, out)
