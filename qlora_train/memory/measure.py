"""What a model costs in memory, measured on its first layer and its loss head alone: cheap at any depth."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.adapters.layers import lora_layers
from qlora_train.data.loader import MicroBatch, collate
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.memory.budget import Costs
from qlora_train.memory.live import LiveBytes, only_new_garbage
from qlora_train.memory.moments import state_bytes
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Kind, decoder_layers, set_layer
from qlora_train.quant.bnb import linear4bit_modules, packed_tensors

KINDS: tuple[Kind, ...] = ("none", "selective", "full")


def trial_batch(num_lines: int, num_tokens: int, row_tokens: int, *, packed: bool) -> MicroBatch:
    """A micro-batch as heavy as one can be: every token but the first of each row supervised.

    Packs are full of rows of `row_tokens`, the last of a pack maybe shorter; else each line is one row.
    """
    widths = [num_tokens] if not packed else [row_tokens] * (num_tokens // row_tokens)
    widths += [num_tokens - sum(widths)] if sum(widths) < num_tokens else []
    rows = [_supervised_row(width) for _ in range(num_lines) for width in widths]
    lines = [range(first, first + len(widths)) for first in range(0, len(rows), len(widths))]
    return collate(TokenTable.of_rows(rows), lines, 0, packed=packed, seq_len=num_tokens)


def _supervised_row(num_tokens: int) -> TokenRow:
    spans = 1 if num_tokens > 1 else 0
    starts, stops = np.ones(spans, dtype=np.int32), np.full(spans, num_tokens, dtype=np.int32)
    return TokenRow(np.zeros(num_tokens, dtype=np.int32), starts, stops, np.ones(spans, dtype=np.float32))


@only_new_garbage()
def measure_costs(
    causal: CausalModel, batch: MicroBatch, optimizer: str, tracker: Callable[[], LiveBytes] = LiveBytes
) -> Costs:
    """Costs of training on micro-batches like this one, which lies on the model's device; all layers as the first.

    `optimizer`: as memory/moments.py names it.

    Runs the first layer four times, its backward pass twice, and the loss head once. Leaves gradients, generators and
    settings as they were. What a kernel allocates inside itself is not seen, unless `tracker` knows of it: leave room.
    """
    layers = decoder_layers(causal.model)
    trainable = [p for p in causal.model.parameters() if p.requires_grad]
    device = batch.input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        call = _first_call(causal, layers[0], batch)
        buffer_bytes = _workspace_bytes(causal.model)
        with tracker() as shared, _run_as(layers[0], "none"):
            call.run(tracker)
            gc.collect()
            shared_bytes = shared.current + buffer_bytes
        runs = {}
        for kind in KINDS:
            with _run_as(layers[0], kind):
                runs[kind] = call.run(tracker, backward=kind == "none")
        head_bytes = _head_bytes(causal, batch, tracker)
    saved, peak = runs["none"]
    return Costs(
        model_bytes=model_bytes(causal.model) + shared_bytes,
        optimizer_bytes=sum(p.nbytes for p in trainable) + state_bytes(optimizer, [p.shape for p in trainable]),
        head_bytes=head_bytes,
        num_layers=len(layers),
        saved_bytes={kind: run[0] for kind, run in runs.items()},
        transient_bytes=peak - saved,
        dense_layer_bytes=_dense_bytes(layers[0], call.hidden.dtype),
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantisation statistics, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for _, layer in linear4bit_modules(model):
        tensors += packed_tensors(layer.weight)
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _workspace_bytes(model: nn.Module) -> int:
    """Buffers of dense weights that the fused layers share already."""
    workspaces = {layer.frozen.workspace for layer in lora_layers(model).values() if layer.frozen is not None}
    return sum(workspace.num_bytes for workspace in workspaces)


@dataclass(frozen=True)
class _Call:
    """One call of a decoder layer, with what the decoder passes it."""

    layer: GradientCheckpointingLayer
    hidden: Tensor  # (B, T, H)
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, tracker: Callable[[], LiveBytes], *, backward: bool = True) -> tuple[int, int]:
        """Bytes held after the forward pass, and the most held through both; the gradient that comes in counts there.

        The input does not count, the output does: it is the next layer's input.
        """
        hidden = self.hidden.detach().clone().requires_grad_()
        inputs = [hidden, *(p for p in self.layer.parameters() if p.requires_grad)]
        with tracker() as live:
            grad = torch.ones_like(hidden)
            out = self.layer(hidden, *self.rest, **self.kwargs)
            out = out[0] if isinstance(out, tuple) else out
            saved_bytes = live.current - grad.nbytes
            if backward:
                torch.autograd.grad(out, inputs, grad, allow_unused=True)
        return saved_bytes, live.peak


class _Reached(Exception):
    """The decoder has come to its first layer."""


def _first_call(causal: CausalModel, layer: GradientCheckpointingLayer, batch: MicroBatch) -> _Call:
    """What the decoder calls its first layer with; the forward pass ends there."""
    calls: list[_Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append(_Call(layer, hidden, args[1:], kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            causal.hidden(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return calls[0]


@contextmanager
def _run_as(layer: GradientCheckpointingLayer, kind: Kind) -> Iterator[None]:
    """The layer in training mode under a policy, and as it was afterwards."""
    training, enabled = layer.training, layer.gradient_checkpointing
    function = getattr(layer, "_gradient_checkpointing_func", None)
    layer.train()
    set_layer(layer, kind)
    try:
        yield
    finally:
        layer.train(training)
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = enabled, function


def _head_bytes(causal: CausalModel, batch: MicroBatch, tracker: Callable[[], LiveBytes]) -> int:
    weight = causal.head.weight_VH
    shape = (*batch.input_ids.shape, weight.shape[1])
    hidden_BTH = torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    with tracker() as live:
        causal.loss_of(hidden_BTH, batch).backward()
    return live.peak


def _dense_bytes(layer: nn.Module, dtype: torch.dtype) -> int:
    return sum(module.weight.quant_state.shape.numel() * dtype.itemsize for _, module in linear4bit_modules(layer))
