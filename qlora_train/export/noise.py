"""Did training rise above the noise? Each weight's change beside the errors of quantising and of rounding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_train.export.merge import ModuleRow

NUM_WORST = 5


@dataclass(frozen=True)
class Quantiles:
    """Over all adapted weights."""

    least: float
    quarter: float
    median: float
    three_quarters: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Linear interpolation between the values."""
        if len(values) == 1:
            return cls(*(values[0],) * 5)
        quarter, median, three_quarters = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), quarter, median, three_quarters, max(values))


@dataclass(frozen=True)
class Noise:
    """||delta|| of every adapted weight as a share of its other errors."""

    num_modules: int
    over_weight: Quantiles  # ||delta|| / ||W4||
    over_quant_error: Quantiles | None  # ||delta|| / ||W - W4||; None where nothing was quantised
    over_rounding: Quantiles | None  # ||delta|| / rounding of the export; None where nothing was rounded
    num_below_rounding: int  # weights of which the rounding is larger than the change
    worst: tuple[ModuleRow, ...]  # least change for their rounding, or for their quantisation error

    @property
    def reading(self) -> str:
        """What the figures say, in a sentence."""
        parts = [f"training changed the median weight by {self.over_weight.median:.2%} of its norm"]
        if self.over_quant_error is not None:
            ratio = self.over_quant_error.median
            parts.append(
                f"{ratio:.1%} of what quantising changed: "
                + (
                    "quantised again, the model would lose most of it"
                    if ratio < 0.5
                    else "it would partly survive quantising again"
                    if ratio < 2
                    else "it stands above that noise"
                )
            )
        if self.over_rounding is not None:
            count = self.num_below_rounding
            parts.append(
                f"{self.over_rounding.median:.1f} times the rounding of this file"
                + (f", and less than it in {count} of {self.num_modules} weights" if count else "")
            )
        return "; ".join(parts)


def noise(rows: Sequence[ModuleRow]) -> Noise | None:
    """The summary of a merge; None where no weight was adapted."""
    if not rows:
        return None
    quantised = [row for row in rows if row.quant_error_norm > 0]
    rounded = [row for row in rows if row.rounding_norm > 0]
    against = "rounding_norm" if rounded else "quant_error_norm"
    return Noise(
        num_modules=len(rows),
        over_weight=Quantiles.of([_share(row.delta_norm, row.weight_norm) for row in rows]),
        over_quant_error=Quantiles.of([row.delta_norm / row.quant_error_norm for row in quantised])
        if quantised
        else None,
        over_rounding=Quantiles.of([row.delta_norm / row.rounding_norm for row in rounded]) if rounded else None,
        num_below_rounding=sum(row.delta_norm < row.rounding_norm for row in rows),
        worst=tuple(sorted(rows, key=lambda row: _share(row.delta_norm, getattr(row, against)))[:NUM_WORST]),
    )


def _share(one: float, other: float) -> float:
    return one / other if other > 0 else math.inf if one > 0 else 0.0
