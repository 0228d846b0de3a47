"""The merged model as a stream of tensors: what every format is written from.

dequantized:  dequantise(quantise(W)) + delta     the model that was trained, exactly
original:     W + delta                            another model: the adapter never saw these weights
requantized:  the first, quantised again           what PEFT's merge_and_unload makes of a 4-bit base

A layer that LoRD put into two factors is one again: the product of both, each merged so, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.state import WEIGHTS
from qlora_train.adapters.updates import VocabularyRows
from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.folders import MANIFEST
from qlora_train.errors import ModelError
from qlora_train.export.base import BaseReader, as_float32
from qlora_train.export.clock import Clock
from qlora_train.model.low_rank import FACTORS, dense_name, ranks_of
from qlora_train.model.skeleton import load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun

Onto = Literal["dequantized", "original", "requantized"]
_BLOCK = 2**22  # values that norms are summed over at a time
_BLOCK_ROWS = 4096  # of a table that are merged at a time


@dataclass(frozen=True)
class Change:
    """What the merge did to one weight. Norms are Frobenius norms."""

    weight_norm: float
    delta_norm: float
    quant_error_norm: float  # of quantisation: ||W - W4||; 0 where the base is not quantised
    rounding_norm: float = 0.0  # of a table with trained rows that `exact` gave rounded


class MergedTensors:
    """The merged model's tensors by the names that the base's own files have for them. Holds none of them.

    Raises ModelError as `BaseReader` does, and when an update of the adapter fits no weight.
    """

    def __init__(
        self, run: FinishedRun, source: Source, onto: Onto = "dequantized", clock: Clock | None = None
    ) -> None:
        self.base = BaseReader(run, source, clock)
        self.updates = read_updates(run.run_dir.adapter)
        self.onto = onto
        self.changes: dict[str, Change] = {}  # of the adapted weights so far, by parameter name
        # Merged tensors keep the names of the base's files: other programs know the model by them.
        self._ranks = ranks_of(load_config(source))
        self._parameter: dict[str, str] = {}
        for name, tensor in self.base.stored.items():
            merged = self.merged_name(name)
            stored = tensor.name if merged == name else dense_name(tensor.name, {_layer_of(tensor.name): 1})
            self._parameter[stored] = merged
        for name, update in self.updates.items():
            shape = self.base.recorded(name).shape if name in self.base.stored else None
            if shape is None or update.shape_from(shape) is None:
                raise ModelError(
                    f"the adapter's update of {name} fits no weight of the base", fix="use the base of the run"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the merged model, sorted; tied weights once."""
        return tuple(sorted(self._parameter))

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """The names in the files, by parameter."""
        return {parameter: stored for stored, parameter in self._parameter.items()}

    def parameter(self, stored: str) -> str:
        """transformers' own name of a tensor."""
        return self._parameter[stored]

    def merged_name(self, name: str) -> str:
        """The parameter of the merged model that one of the base goes into: itself, or the product of two factors."""
        return dense_name(name, self._ranks)

    def shape(self, stored: str) -> tuple[int, ...]:
        """Shape of a tensor: the base's, with a row more for each new token that the base has none for."""
        name = self._parameter[stored]
        if (factors := self._factors(name)) is not None:
            reduce, expand = (self.base.recorded(factor).shape for factor in factors)
            return expand[0], reduce[1]
        name = self._own_name(name)
        shape, update = self.base.recorded(name).shape, self.updates.get(name)
        return shape if update is None else update.shape_from(shape) or shape

    def exact(self, stored: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One tensor on the run's device, before any rounding but one.

        float32 where something was computed; where the tensor is the base's own and not quantised, its own dtype. A
        table with trained rows, the largest tensor there is, comes in `dtype`, to which the caller rounds anyway.
        Time is dominated by quantising again. Memory: about five times the tensor in float32; for such a table itself,
        as training held it, and what is returned.
        """
        name = self._parameter[stored]
        factors = self._factors(name)
        return self._single(self._own_name(name), dtype) if factors is None else self._product(name, *factors)

    def _factors(self, name: str) -> tuple[str, str] | None:
        """The two weights whose product a parameter is; None for one that the base has itself."""
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self._ranks:
            return None
        reduce, expand = (f"{layer}.{factor}.weight" for factor in FACTORS)
        return reduce, expand

    def _own_name(self, name: str) -> str:
        """The base's name of a parameter that is no product: a bias stands with the second factor."""
        layer, _, kind = name.rpartition(".")
        return f"{layer}.{FACTORS[1]}.{kind}" if layer in self._ranks else name

    def _product(self, name: str, reduce: str, expand: str) -> Tensor:
        """A layer that was two, merged, in float32; what changed of the product is noted where a factor is adapted."""
        after = [self._single(factor, torch.float32).float() for factor in (expand, reduce)]
        merged = after[0] @ after[1]
        if not {reduce, expand} & self.updates.keys():
            return merged
        trained = as_float32(self.base.as_trained(expand)) @ as_float32(self.base.as_trained(reduce))
        before = self.base.original(expand).float() @ self.base.original(reduce).float()
        self.changes[name] = Change(
            weight_norm=_norm(trained),
            delta_norm=_norm(merged, trained),
            quant_error_norm=_norm(before, trained) if self.base.recorded(expand).quantised else 0.0,
        )
        return merged

    def _single(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the base with its update; see `exact`."""
        original = self.base.original(name)
        held = self.base.as_trained(name, original)
        quantised = self.base.recorded(name).quantised
        update = self.updates.get(name)
        with self.base.clock.of("merge"):
            if not quantised and (update is None or isinstance(update, VocabularyRows)):
                start = original if self.onto == "original" else held
                del original, held
                return start if update is None else self._with_rows(name, update, start, dtype)
            trained = as_float32(held)
            del held
            before = self.base.started(name, original)  # of quantising
            start = before.float() if self.onto == "original" else trained
            merged = start if update is None else update.applied(start)
            if update is not None:
                # What a start took out of the base lies in A and B from the beginning: no training put it there.
                taken = self.base.taken(name)
                untrained = start if taken is None else start + taken.delta().to(start.device)
                self.changes[name] = Change(
                    weight_norm=_norm(untrained),
                    delta_norm=_norm(merged[: len(untrained)], untrained),
                    quant_error_norm=_norm(before, trained) if quantised else 0.0,
                )
        if self.onto == "requantized" and quantised:
            with self.base.clock.of("quantise"):
                return as_float32(self.base.requantised(merged))
        return merged

    def rows(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows of a parameter as `exact` has them, on the host; None where they take the whole of it to make.

        That is one that is quantised, or adapted by more than single rows.
        """
        recorded, update = self.base.recorded(name), self.updates.get(name)
        if recorded.quantised or not (update is None or isinstance(update, VocabularyRows)):
            return None
        ends = (min(end, recorded.shape[0]) for end in (start, stop))
        held = self.base.rows(name, *ends, original=self.onto == "original")
        return held if update is None else update.applied_between(start, stop, held, torch.float32)

    def _with_rows(self, name: str, update: VocabularyRows, table: Tensor, dtype: torch.dtype) -> Tensor:
        """A table with trained rows, rounded to `dtype` a block at a time; what changed is noted."""
        shape = self.shape(self.base.stored[name].name)
        merged = table.new_empty(shape, dtype=dtype)
        delta = rounding = 0.0
        for start in range(0, shape[0], _BLOCK_ROWS):
            stop, held = min(start + _BLOCK_ROWS, shape[0]), table[start : start + _BLOCK_ROWS]
            exact = update.applied_between(start, stop, held, torch.float32)
            merged[start:stop] = exact
            delta += _norm(exact[: len(held)], held) ** 2
            rounding += _norm(merged[start:stop], exact) ** 2
        self.changes[name] = Change(_norm(table), delta**0.5, quant_error_norm=0.0, rounding_norm=rounding**0.5)
        return merged

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all, in the order of the names."""
        for stored in self.names:
            yield stored, self.exact(stored)

    def unused(self) -> list[str]:
        """Updates that no tensor has taken up so far."""
        return sorted(name for name in self.updates if self.merged_name(name) not in self.changes)


def _layer_of(stored: str) -> str:
    """The layer of a stored factor: `layers.0.up_proj` of `layers.0.up_proj.expand.weight`."""
    return stored.rpartition(".")[0].rpartition(".")[0]


def adapter_sha256(run: FinishedRun) -> str:
    """Of the adapter's weights, as its manifest has it."""
    return str(read_json(run.run_dir.adapter / MANIFEST)["files"][WEIGHTS]["sha256"])


def difference_norm(one: Tensor, other: Tensor) -> float:
    """||one - other|| in float32, a block at a time."""
    return _norm(one, other)


def _norm(one: Tensor, other: Tensor | None = None) -> float:
    flat, minus = one.reshape(-1), None if other is None else other.reshape(-1)
    squares = torch.zeros((), dtype=torch.float64, device=one.device)
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK].float()
        squares += (part if minus is None else part - minus[start : start + _BLOCK].float()).norm().double() ** 2
    return float(squares.sqrt())
