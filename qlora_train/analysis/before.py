"""What a run computed with before its first step, read from its base: whole weights, and LoftQ's start made again.

A start that changed the base is kept in the adapter's buffers. LoftQ of one round changes none and keeps nothing: its
start is the best rank-r part of the quantisation error, which follows from the original weight and the quantised one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from qlora_train.adapters.config import AdapterConfig
from qlora_train.adapters.forms.offset import ResidualForm
from qlora_train.adapters.inits.residual import Taken
from qlora_train.adapters.inits.spectral import loftq
from qlora_train.adapters.updates import Delta, Update
from qlora_train.quant.bnb import Params4bit, dequantize

NO_START = "LoftQ's start is made again from the base of its run, on the kind of device that trained it"


class Reader(Protocol):
    """The base of a run, a tensor at a time, by its own names; each is proven to be the one that was trained on."""

    def original(self, name: str) -> Tensor:
        """As the base's files hold it."""

    def as_trained(self, name: str, original: Tensor | None = None) -> Tensor | Params4bit:
        """As training held it."""

    def started(self, name: str, original: Tensor) -> Tensor:
        """What quantising was given."""

    def taken(self, name: str) -> Taken | None:
        """What a start took out of it."""

    def recorded(self, name: str) -> Any:
        """What the run says of it."""


@dataclass(frozen=True)
class Before:
    """The weights of a run as they were before training."""

    reader: Reader
    corrections: Mapping[str, Taken] = field(default_factory=dict)  # LoftQ's start, by parameter of the base

    def weight(self, module: str) -> tuple[Tensor, float | None]:
        """(out, in) in float32, with what a start keeps of it in A and B; and how far quantising took it away."""
        name = f"{module}.weight"
        original = self.reader.original(name)
        held = _float32(self.reader.as_trained(name, original))
        is_quantised = self.reader.recorded(name).quantised
        error = float((self.reader.started(name, original).float() - held).norm()) if is_quantised else None
        start = self.reader.taken(name) or self.corrections.get(name)
        return held if start is None else held + start.delta().to(held.device), error


def keeps_no_start(config: AdapterConfig) -> bool:
    """Whether A and B began as something that the adapter's folder does not say."""
    return config.method.start == "loftq" and not isinstance(config.form, ResidualForm)


def corrections_of(reader: Reader, updates: Mapping[str, Update]) -> dict[str, Taken]:
    """LoftQ's start of one round for the updates of an adapter, by parameter of the base: s B0 A0 = SVD_r(W - base).

    Empty where the adapter does not hold it: above 1,024 directions the decomposition is an iteration that another kind
    of device, or another torch, ends elsewhere, for the errors of quantisation prefer no direction much. A start S that
    is none of the adapter's is at right angles to its update U; of one that is, U holds S and what training added, so
    that <U, S> is |S|^2 and not 0. The bar lies between the two. Reads each weight once; cost: that of the start.
    """
    found: dict[str, Taken] = {}
    inside = squared = 0.0
    for module, update in updates.items():
        assert isinstance(update, Delta), "LoftQ's updates are"
        name = f"{module}.weight"
        original = reader.original(name)
        held = _float32(reader.as_trained(name, original))
        r = update.lora_A.shape[0]
        factors = loftq(original.float(), held, r, update.scaling, lambda weight: weight).factors
        found[name] = Taken(factors, update.scaling)
        start = found[name].delta()
        inside += float((update.dense(start.device).double() * start).sum())
        squared += float(start.double().square().sum())
    return found if inside > 0.5 * squared else {}


def _float32(held: Tensor | Params4bit) -> Tensor:
    return dequantize(held) if isinstance(held, Params4bit) else held.float()
