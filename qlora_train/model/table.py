"""What was quantised, what was not, and bytes by dtype: the table that is printed after loading and stored."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from qlora_train.quant.fingerprint import BasePrint


@dataclass(frozen=True)
class DtypeRow:
    """All tensors of one kind."""

    kind: str
    num_tensors: int
    num_params: int
    num_bytes: int
    names: tuple[str, ...]  # last two parts of the tensors' names, each once


def dtype_table(base_print: BasePrint) -> list[DtypeRow]:
    """One row per dtype or quant type, the largest first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, tensor in base_print.tensors.items():
        groups[tensor.dtype].append(name)
    rows = []
    for kind, names in groups.items():
        tensors = [base_print.tensors[name] for name in names]
        num_params = sum(t.num_params for t in tensors)
        short = tuple(dict.fromkeys(_short(name) for name in names))
        rows.append(DtypeRow(kind, len(names), num_params, sum(t.num_bytes for t in tensors), short))
    return sorted(rows, key=lambda row: -row.num_bytes)


def _short(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return parts[-1] + (".bias" if name.endswith(".bias") and parts[-1] != "bias" else "")
