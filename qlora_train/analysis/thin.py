"""The strongest directions of updates that are no product of two factors, such as DoRA's: W' - W, module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qlora_train.adapters.arithmetic import norm
from qlora_train.adapters.updates import Delta, Difference, Update, VocabularyRows
from qlora_train.analysis.look import ReadWeight
from qlora_train.analysis.sparse import nearest
from qlora_train.errors import ModelError


def matrices_of(updates: Mapping[str, Update]) -> tuple[dict[str, Update], list[str]]:
    """The updates of matrices, and notices of what else there is beside them."""
    tables = {module for module, update in updates.items() if isinstance(update, VocabularyRows)}
    kernels = {m for m, update in updates.items() if isinstance(update, Difference) and update.values.ndim > 2}
    notices = []
    if tables:
        notices.append(f"the rows of new tokens in {', '.join(sorted(tables))} are no low-rank update and are left out")
    if kernels and kernels != updates.keys():
        notices.append(f"convolutions are no matrices and are left out: {', '.join(sorted(kernels))}")
        tables |= kernels
    return {module: update for module, update in updates.items() if module not in tables}, notices


def thin(updates: Mapping[str, Update], read_weight: ReadWeight, r: int) -> tuple[dict[str, Delta], str]:
    """The nearest update of rank r to each, and a notice of how much they hold. Reads each weight of the base.

    ModelError for a change of something that is no matrix, which has no directions.
    """
    found, kept, lost = {}, [], []
    for module, update in updates.items():
        if isinstance(update, Delta):
            found[module] = update
            continue
        if isinstance(update, Difference):
            raise ModelError(f"{module} was changed, which is no matrix: it has no directions", fix="look at others")
        weight, _ = read_weight(module)
        found[module], error = nearest((update.applied(weight) - weight).cpu(), r)
        kept.append(norm(found[module]))
        lost.append(error)
    share = math.hypot(*kept) ** 2 / (math.hypot(*kept, *lost) ** 2 or 1.0)
    what = f"{len(kept)} updates are of full rank, as its method makes them"
    return found, f"{what}; their first {r} directions are looked at, which hold {share:.0%} of their squared size"
