"""Every tensor that is neither quantised nor an adapted layer, value by value: embeddings, norms, biases, heads.

They are copied, or changed in single rows, so what is written must be what was trained, but for one rounding. A mean
over tokens does not see a wrong row of an embedding that those tokens do not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qlora_train.adapters.updates import Difference, RowDelta, Update, VocabularyRows
from qlora_train.export.base import BaseReader
from qlora_train.export.layers import ROWS_AT_A_TIME, Weights
from qlora_train.export.probe import Deviation, ulp

# Formats may store a value after adding another to it, as GGUF does with Gemma's norms: 1 + w in float32, and back.
_STORED_WITH_ANOTHER = 2.0**-23
_COPIED = (type(None), VocabularyRows, RowDelta, Difference)  # else the tensor is that of an adapted layer


def worst_copy(
    base: BaseReader,
    updates: Mapping[str, Update],
    weights: Weights,
    has: Callable[[str], bool],
    dtype: torch.dtype,
    *,
    original: bool,
) -> Deviation | None:
    """The tensor with the value that is furthest from the trained one, over half a unit in the last place: 1 at most.

    `weights` are the written tensors by the base's names, `has` finds one; `dtype` is what they were rounded to, from
    what training held or, where `original`, from what the base's files hold. None where all tensors are quantised or
    adapted layers. Reads each of these tensors of both once. Memory: `ROWS_AT_A_TIME` rows of both in float32.
    """
    found = [
        Deviation(name, _furthest(base, name, updates.get(name), weights, dtype, original=original))
        for name, recorded in base.print.tensors.items()
        if not recorded.quantised and has(name) and isinstance(updates.get(name), _COPIED)
    ]
    return max(found, key=lambda deviation: deviation.ratio, default=None)


def _furthest(
    base: BaseReader, name: str, update: Update | None, weights: Weights, dtype: torch.dtype, *, original: bool
) -> float:
    shape = base.recorded(name).shape
    num_held = shape[0]
    num_rows = num_held if update is None else (update.shape_from(shape) or shape)[0]
    furthest = 0.0
    for start in range(0, num_rows, ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, num_rows)
        held = base.rows(name, min(start, num_held), min(stop, num_held), original=original).float()
        trained, written = _trained(update, start, stop, held), weights.rows(name, start, stop).float().cpu()
        if not torch.equal(written, trained.to(dtype).float()):
            explained = 0.5 * ulp(trained, dtype) + _STORED_WITH_ANOTHER
            furthest = max(furthest, float(((written - trained).abs() / explained).max()))
    return furthest


def _trained(update: Update | None, start: int, stop: int, held: Tensor) -> Tensor:
    """Rows `start` to `stop` of a trained tensor in float32, from those that the base holds."""
    if isinstance(update, VocabularyRows):
        return update.applied_between(start, stop, held, torch.float32)
    if isinstance(update, RowDelta):
        return RowDelta(update.embedding_A[:, start:stop], update.embedding_B, update.scaling).applied(held)
    if isinstance(update, Difference):
        return Difference(update.values[start:stop]).applied(held)
    return held
