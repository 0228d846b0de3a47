"""The merged model as a stream of tensors: what every format is written from.

dequantized:  dequantise(quantise(W)) + delta     the model that was trained, exactly
original:     W + delta                            another model: the adapter never saw these weights
requantized:  the first, quantised again           what PEFT's merge_and_unload makes of a 4-bit base
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
        self._parameter = {stored.name: name for name, stored in self.base.stored.items()}
        for name, update in self.updates.items():
            shape = self.base.recorded(name).shape if name in self._parameter.values() else None
            if shape is None or update.shape_from(shape) is None:
                raise ModelError(
                    f"the adapter's update of {name} fits no weight of the base", fix="use the base of the run"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the merged model, sorted; tied weights once."""
        return tuple(sorted(self._parameter))

    def parameter(self, stored: str) -> str:
        """transformers' own name of a tensor."""
        return self._parameter[stored]

    def shape(self, stored: str) -> tuple[int, ...]:
        """Shape of a tensor: the base's, with a row more for each new token that the base has none for."""
        name = self._parameter[stored]
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
                self.changes[name] = Change(
                    weight_norm=_norm(start),
                    delta_norm=_norm(merged[: len(start)], start),
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
        return sorted(set(self.updates) - set(self.changes))


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
