"""What the adapter tools found and made, as tables on stdout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from statistics import mean
from typing import TypeVar

from rich.text import Text

from qlora_train.adapters.module_names import name_of
from qlora_train.analysis.tools import AdapterDiff, AdapterInfo, MadeAdapter, ModuleDiff, ModuleInfo, ResizedAdapter
from qlora_train.cli.results import new_table, stdout
from qlora_train.printable import printable

Row = TypeVar("Row")
ROUNDING = 1e-6  # of a norm: what float32 factors cannot hold
_SHARED = ("cosine", "inputs_overlap", "outputs_overlap")


def info(result: AdapterInfo, *, every_module: bool) -> None:
    """An adapter in a few lines, and its modules."""
    scalings = {f"{module.scaling:g}" for module in result.modules}
    ranks = sorted({module.r for module in result.modules})
    rank = f"r = {ranks[0]}" if len(ranks) == 1 else f"r = {ranks[0]} to {ranks[-1]}"
    scaling = f"scaling {scalings.pop()}" if len(scalings) == 1 else "scaling differs by module"
    say(f"{result.method}: {rank}, alpha = {result.alpha:g}, {scaling}")
    names = dict.fromkeys(name_of(module.module) for module in result.modules)
    say(f"on {', '.join(names)}: {len(result.modules)} modules")
    if result.num_experts:
        who = "every matrix" if result.granularity == "matrix" else "all matrices of a decoder layer alike"
        each = f"{result.num_experts} experts of r = {ranks[-1] // result.num_experts}"
        say(f"{each}, weighed anew for each token, for {who}")
    for module, count in result.token_rows.items():
        say(f"and {count} rows of new tokens in {module}")
    size = f"{result.num_params:,} parameters in {', '.join(result.dtypes)}, {result.num_bytes / 2**20:,.1f} MiB"
    say(size + (f"; trained to step {result.step:,}" if result.step else ""))
    say(f"belongs to {result.base_words}")
    if result.made:
        sources = ", ".join(f"{part['weight']:g} x {part['path']}" for part in result.made["from"])
        say(f"made by `adapter {result.made['tool']}` of {sources}")
    table = new_table("module", "of", "||A||", "||B||", "||s B A||", "stable", "effective", "95 % in", "r")
    groups = _groups(result.modules, lambda module: module.module, every_module=every_module)
    for name, rows in groups.items():
        table.add_row(printable(name), str(len(rows)), *_info_cells(rows))
    stdout.print(table)
    say(
        "||s B A|| is the size of the update. Stable, effective: how many directions it has, however small the others; "
        "95 % in: how many hold 95 % of its energy." + ("" if every_module else " Means over the modules of a name.")
    )


def _info_cells(rows: Sequence[ModuleInfo]) -> list[str]:
    means = [_mean_or_none(getattr(row, key) for row in rows) for key in ("lora_A_norm", "lora_B_norm")]
    norms = ["-" if value is None else f"{value:.3g}" for value in means]
    spectra = [row.spectrum for row in rows if row.spectrum]
    if len(spectra) < len(rows):  # rescaled rows have no thin product
        return [*norms, "-", "-", "-", "-", _mean(row.r for row in rows)]
    return [
        *norms,
        _mean(s.norm for s in spectra),
        f"{mean(s.stable_rank for s in spectra):.1f}",
        f"{mean(s.effective_rank for s in spectra):.1f}",
        f"{mean(s.energy_rank_95 for s in spectra):.1f}",
        _mean(row.r for row in rows),
    ]


def made(result: MadeAdapter) -> None:
    """What was written, and how far it is from what was asked for."""
    notices(result.notices)
    ranks = sorted(set(result.ranks.values()))
    rank = f"r = {ranks[0]}" if len(ranks) == 1 else f"r = {ranks[0]} to {ranks[-1]}, by module"
    say(f"plain LoRA with scaling 1, {rank}; {result.num_params:,} parameters, {result.num_bytes / 2**20:,.1f} MiB")
    say(f"error: {error_text(result.error_frac)} of the update's norm, {result.norm:.4g}; measured on what was written")
    say(f"written: {result.folder} (PEFT's folder is {result.folder / 'adapter'})")


def resized(result: ResizedAdapter) -> None:
    """The ranks by name of module with what was lost, and the bound beside the error."""
    table = new_table("module", "of", "r before", "r now", "||s B A||", "error", "share")
    for name, rows in _groups(result.modules, lambda row: row.module, every_module=False).items():
        norm, error = (math.hypot(*(getattr(row, key) for row in rows)) for key in ("norm", "error"))
        sizes = (_mean(row.old_r for row in rows), _mean(row.r for row in rows))
        share = error_text(error / norm if norm else 0.0)
        table.add_row(printable(name), str(len(rows)), *sizes, f"{norm:.4g}", f"{error:.3g}", share)
    stdout.print(table)
    made(result)
    expected = f"the dropped singular values give {error_text(result.expected_error_frac)}"
    say(expected if result.bound is None else f"{expected}; the bound was {result.bound:.4g}")


def diff(result: AdapterDiff, *, every_module: bool) -> None:
    """Distance, cosine and shared directions by module."""
    notices(result.notices)
    table = new_table("module", "of", "first", "second", "distance", "cosine", "inputs", "outputs")
    for name, rows in _groups(result.modules, lambda row: row.module, every_module=every_module).items():
        table.add_row(printable(name), str(len(rows)), *_diff_cells(rows))
    stdout.print(table)
    cosine = "no cosine, one of them is 0" if result.cosine is None else f"cosine {result.cosine:.3f}"
    share = "only rounding" if result.distance_frac < ROUNDING else f"{result.distance_frac:.1%} of the larger norm"
    apart = f"distance {result.distance:.4g}, {share}; {cosine}"
    say(f"in all: norms {result.norms[0]:.4g} and {result.norms[1]:.4g}, {apart}")
    say(
        "First, second: sizes of the updates. Cosine 1: the same update but for its size; 0: unrelated; -1: opposed. "
        f"Inputs, outputs: 1, both read or write the same directions{_chance(result.modules)}."
    )


def _chance(rows: Sequence[ModuleDiff]) -> str:
    """What random directions would give, where there are any to compare."""
    by_chance = [v for row in rows for v in (row.inputs_by_chance, row.outputs_by_chance) if v is not None]
    return f"; random ones give {min(by_chance):.3f} to {max(by_chance):.3f}" if by_chance else ""


def _diff_cells(rows: Sequence[ModuleDiff]) -> list[str]:
    norms = [math.hypot(*(row.norms[side] for row in rows)) for side in (0, 1)]
    distance = math.hypot(*(row.distance for row in rows))
    shared = [_mean_or_none(getattr(row, key) for row in rows) for key in _SHARED]
    return [
        f"{norms[0]:.3g}",
        f"{norms[1]:.3g}",
        f"{distance:.3g}",
        *("-" if v is None else f"{v:.3f}" for v in shared),
    ]


def say(text: str) -> None:
    """One line that wraps where the terminal ends."""
    stdout.print(Text(printable(text)), soft_wrap=True)


def notices(found: Sequence[str]) -> None:
    """What the reader should know before the figures."""
    for notice in found:
        stdout.print(Text(printable(f"note: {notice}"), "yellow"), soft_wrap=True)


def error_text(share: float) -> str:
    """A share as a percentage; what is no more than rounding of float32 says so."""
    return "only rounding" if share < ROUNDING else f"{share:.3%}"


def _groups(rows: Sequence[Row], module: Callable[[Row], str], *, every_module: bool) -> Mapping[str, list[Row]]:
    """Rows by the last name of their module, or each alone under what tells its name from the others."""
    parts = [module(row).split(".") for row in rows]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*(names[:-1] for names in parts), strict=False))
    num_shared = len(list(shared))
    groups: dict[str, list[Row]] = {}
    for row, names in zip(rows, parts, strict=True):
        groups.setdefault(".".join(names[num_shared:]) if every_module else names[-1], []).append(row)
    return groups


def _mean(values: Iterable[float]) -> str:
    return f"{mean(values):.3g}"


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return mean(present) if present else None
