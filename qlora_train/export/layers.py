"""What a model makes of rows where it is larger than memory: weights come from files, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qlora_train.adapters.layers import lora_layers, use_fused
from qlora_train.adapters.tokens import mean_row, token_layers
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError
from qlora_train.evaluate.compare import Observed, observe_batch
from qlora_train.export.base import BaseReader
from qlora_train.export.safetensors_reader import read_rows, read_tensor
from qlora_train.export.tensors import MergedTensors
from qlora_train.export.walk import Walk, walk_through
from qlora_train.loss import TrainedRows, put_rows
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import decoder_layers
from qlora_train.model.files import StoredTensor
from qlora_train.model.hollow import fill, parameter_names
from qlora_train.quant.bnb import Params4bit
from qlora_train.quant.fingerprint import base_parameter_name

ROWS_AT_A_TIME = 4096  # of embeddings and output heads


class Weights(Protocol):
    """Where a model's tensors come from, by transformers' parameter names."""

    def value(self, name: str) -> Tensor | Params4bit:
        """A whole tensor: 4-bit, or float32."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it in float32."""


@dataclass(frozen=True)
class TrainedWeights:
    """The base as training held it."""

    base: BaseReader

    def value(self, name: str) -> Tensor | Params4bit:
        """Quantised again, and proven."""
        held = self.base.as_trained(name)
        return held if isinstance(held, Params4bit) else held.float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of an unquantised tensor."""
        return self.base.rows(name, start, stop).float()


@dataclass(frozen=True)
class FolderWeights:
    """A merged model's own files."""

    stored: dict[str, StoredTensor]

    def value(self, name: str) -> Tensor:
        """As it is stored."""
        return read_tensor(self.stored[name].path, self.stored[name].name).float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of any tensor."""
        return read_rows(self.stored[name].path, self.stored[name].name, start, stop).float()


@dataclass(frozen=True)
class CandidateWeights:
    """A merged model that is on no disk, rounded to the dtype that it would be stored in."""

    tensors: MergedTensors
    export_dtype: torch.dtype

    def value(self, name: str) -> Tensor:
        """Merged anew each time."""
        exact = self.tensors.exact(self.tensors.stored_names[name], self.export_dtype)
        return exact.to(self.export_dtype).float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of an embedding or a head that is not adapted or by single rows; else the whole is made for them."""
        rows = self.tensors.rows(name, start, stop)
        return self.value(name)[start:stop] if rows is None else rows.to(self.export_dtype).float()


def fill_whole(model: nn.Module, weights: Weights) -> None:
    """Give a hollow model all of its weights, in float32."""
    device = next(model.parameters()).device
    for name in parameter_names(model):
        value = weights.value(name)
        fill(model, name, value if isinstance(value, Params4bit) else value.to(device))


def observe_in_layers(
    model: Any,
    weights: Weights,
    batches: Sequence[MicroBatch],
    device: torch.device,
    contexts: Sequence[Callable[[], AbstractContextManager[Any]]] = (nullcontext,),
    *,
    after_layer: Callable[[int], None] | None = None,
) -> list[Observed]:
    """What a hollow model makes of the batches under each of some contexts, such as one with the adapter off.

    Every layer is filled once for all of them; `after_layer` is called while it still has its weights. Memory: one
    layer; the rows of the embedding that occur; a slice of the output head; the hidden states of all batches, once for
    each context. The numbers are those of `observe`.
    """
    causal = CausalModel(model)
    layers: list[Any] = list(decoder_layers(model))
    if not layers:
        raise ModelError(f"{type(model).__name__} has no decoder layers", fix="export with export.verify=whole")
    of_layer = [_names_in(model, layer) for layer in layers]
    table, head = _names_in(model, model.get_input_embeddings()), f"{_head_name(model)}.weight"
    streamed = {*table, head}.union(*of_layer)
    for name in parameter_names(model):
        if name not in streamed:
            fill(model, name, _on(device, weights.value(name)))
    _start_lacking_rows(model, weights)
    for name in table:
        fill(model, name, _used_rows(weights, name, model, batches).to(device))
    hollow: dict[str, Any] = {}

    def fill_layer(index: int) -> None:
        for name in of_layer[index]:
            hollow[name] = fill(model, name, _on(device, weights.value(name)))

    def empty_layer(index: int) -> None:
        if after_layer is not None:
            after_layer(index)
        for name in of_layer[index]:
            fill(model, name, hollow.pop(name))
        if any(layer.frozen is not None for layer in lora_layers(model).values()):
            use_fused(model)  # a new workspace: the old one holds this layer's dense weights

    walks = [
        Walk(partial(observe_batch, causal.decoder, batch, device), context)
        for context in contexts
        for batch in batches
    ]
    seen = walk_through(layers, walks, fill_layer, empty_layer)
    output = StreamedHead(
        weights, head if head in parameter_names(model) else table[0], tuple(causal.head.weight_VH.shape),
        causal.head.bias_V, causal.head.softcap, device,
    )  # fmt: skip
    found, size = [], len(batches)
    for index, context in enumerate(contexts):
        with context():  # a head with trained rows has none where the adapter is off
            own = replace(output, rows=causal.head.rows)
        found.append(Observed.of(seen[index * size : (index + 1) * size], own))
    return found


@dataclass(frozen=True)
class StreamedHead:
    """An output head whose weight stays on disk: logits = cap(hidden W^T + b), some rows of W at a time."""

    weights: Weights
    name: str
    shape: tuple[int, ...]
    bias_V: Tensor | None
    softcap: float
    device: torch.device
    rows: TrainedRows | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.shape[0] + (self.rows.num_new if self.rows else 0)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) in float32."""
        logits_NV = torch.empty(len(hidden_NH), self.shape[0], device=self.device)
        for start in range(0, self.shape[0], ROWS_AT_A_TIME):
            stop = min(start + ROWS_AT_A_TIME, self.shape[0])
            rows = self.weights.rows(self.name, start, stop).to(self.device)
            torch.mm(hidden_NH, rows.T, out=logits_NV[:, start:stop])
        if self.bias_V is not None:
            logits_NV += self.bias_V
        if self.rows is not None:
            logits_NV = put_rows(logits_NV, hidden_NH, self.rows)
        return self.softcap * torch.tanh(logits_NV / self.softcap) if self.softcap else logits_NV


def _start_lacking_rows(model: nn.Module, weights: Weights) -> None:
    """Rows that a table lacks start from its mean, which a hollow model does not know."""
    for name, layer in token_layers(model).items():
        if layer.num_lacking:
            num_rows = layer.get_base_layer().weight.shape[0]
            stops = [(start, min(start + ROWS_AT_A_TIME, num_rows)) for start in range(0, num_rows, ROWS_AT_A_TIME)]
            layer.start_lacking(mean_row(weights.rows(f"{name}.weight", *ends) for ends in stops))


def _on(device: torch.device, value: Tensor | Params4bit) -> Tensor | Params4bit:
    return value if isinstance(value, Params4bit) else value.to(device)


def _names_in(model: nn.Module, module: nn.Module) -> list[str]:
    """The base's parameters that a module of a model holds."""
    ids = {id(parameter) for parameter in module.parameters()}
    found = (base_parameter_name(name) for name, parameter in model.named_parameters() if id(parameter) in ids)
    return [name for name in found if name is not None]


def _head_name(model: nn.Module) -> str:
    """The base's name of the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    full = next(name for name, module in model.named_modules() if module is head)
    return str(base_parameter_name(full))


def _used_rows(weights: Weights, name: str, model: nn.Module, batches: Sequence[MicroBatch]) -> Tensor:
    """An embedding in float32 with the rows that the batches use; the others are zeros that take no memory.

    The system gives a page of such an array only once it is written to.
    """
    shape = next(p.shape for full, p in model.named_parameters() if base_parameter_name(full) == name)
    table = torch.from_numpy(np.zeros(tuple(shape), dtype=np.float32))
    used = torch.cat([batch.input_ids.reshape(-1) for batch in batches]).unique()
    for start in range(0, shape[0], ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, shape[0])
        here = used[(used >= start) & (used < stop)]  # a new token may have no row in the table
        if len(here):
            table[here] = weights.rows(name, start, stop).cpu()[here - start]
    return table
