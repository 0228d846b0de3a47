"""What a look into an adapter found, as tables with a sentence on how to read each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TypeVar

from rich.text import Text

from qlora_train.adapters.module_names import name_of
from qlora_train.analysis.look import Analysis, Look
from qlora_train.analysis.overlap import WHAT, Directions, Overlap
from qlora_train.analysis.recommend import Recommendation
from qlora_train.cli.results import new_table, stdout
from qlora_train.cli.show_adapter import notices, say
from qlora_train.printable import printable

Row = TypeVar("Row")

EMPHASIS_FROM = 1.5  # times random directions: below, an update's directions are as good as random to the weight
REPEATS_FROM = 0.5  # of what W's own first directions give


def analysis(result: Analysis, out: Path | None) -> None:
    """Each adapter, what they share, and where the plots are."""
    notices(result.notices)
    for look in result.looks:
        _heading(f"{look.name}: {look.method}, r = {look.r}")
        _ranks(look)
        _starts(look)
        _amplification(look)
        _recommendation(look.recommendation)
    if len(result.looks) == 2:
        _heading(f"{result.looks[0].name} and {result.looks[1].name}")
        _overlaps(result)
    if out is not None:
        say(f"plots and figures: {out}")


def _heading(text: str) -> None:
    stdout.print()
    stdout.print(Text(printable(text), "bold"), soft_wrap=True)


def _ranks(look: Look) -> None:
    """Sizes and numbers of directions by name of module."""
    table = new_table("module", "of", "size", "stable", "effective", "90 % in", "95 % in", "99 % in", "at most")
    for name, rows in _groups(look.spectra, lambda s: s.module).items():
        counts = [mean(getattr(s, key) for s in rows) for key in ("stable_rank", "effective_rank")]
        energy = [mean(s.energy_rank(frac) for s in rows) for frac in (0.90, 0.95, 0.99)]
        size = f"{math.hypot(*(s.norm for s in rows)):.3g}"
        most = sorted({len(s.values) for s in rows})  # several under a rank pattern
        table.add_row(
            printable(name),
            str(len(rows)),
            size,
            *(f"{v:.1f}" for v in (*counts, *energy)),
            str(most[0]) if len(most) == 1 else f"{most[0]} to {most[-1]}",
        )
    stdout.print(table)
    whole = math.hypot(*(s.norm for s in look.spectra)) or 1.0
    sizes = {
        name: math.hypot(*(s.norm for s in rows)) for name, rows in _groups(look.spectra, lambda s: s.module).items()
    }
    largest = max(sizes, key=lambda name: sizes[name])
    say(
        f"Directions of the updates, means over layers. `95 % in`: so many directions hold 95 % of the squared size; "
        f"`at most`: so many an update can have. "
        f"{largest} holds {(sizes[largest] / whole) ** 2:.0%} of the squared size of all updates."
    )


def _starts(look: Look) -> None:
    """What is left of the random start of A."""
    if not look.start_overlaps:
        return
    table = new_table("module", "phi(A, start)", "by chance")
    for row in look.start_overlaps:
        table.add_row(printable(row.name), f"{row.phi:.3f}", f"{row.by_chance:.3f}")
    stdout.print(table)
    kept = mean(row.phi for row in look.start_overlaps)
    say(
        f"How much of the space that A spans is the one it was started in: {kept:.0%}. Near 1, the random start still "
        "decides what the updates read of the input, and what was learned is in B: compare adapters by the outputs of "
        "B A."
    )


def _amplification(look: Look) -> None:
    """The paper's table 7, by name of module, by the strongest directions and by all."""
    if not look.amplifications:
        return
    table = new_table("module", "by", "||dW||", "||U'WV||", "W's own", "random", "amplified", "random's")
    for name, rows in _groups(look.amplifications, lambda a: a.module).items():
        few, whole = [a.few for a in rows], [a.whole for a in rows]
        for through in [few] if few == whole else [few, whole]:
            keys = ("delta_norm", "by_delta", "by_weight", "by_random")
            norms = [f"{mean(getattr(t, key) for t in through):.3g}" for key in keys]
            factors = [f"{median(getattr(t, key) for t in through):.3g}" for key in ("factor", "factor_random")]
            table.add_row(printable(name), f"{max(t.num_directions for t in through)}", *norms, *factors)
    stdout.print(table)
    strongest = [a.few for a in look.amplifications]
    emphasis, first = median(t.emphasis for t in strongest), median(t.of_first for t in strongest)
    by_all = median(a.whole.emphasis for a in look.amplifications)
    say(
        f"The weight W through the directions U, V of the update: by the {max(t.num_directions for t in strongest)} "
        f"strongest {emphasis:.1f} times what random directions give, by all of them {by_all:.1f} times; and "
        f"{first:.0%} of what W's own first ones give (medians): {_amplification_reading(emphasis, first)}. "
        "`amplified` is ||dW|| / ||U'WV|| as in the LoRA paper, medians; it grows with the size of the update, so it "
        "says nothing without the random control beside it."
    )
    _sizes(look)


def _amplification_reading(emphasis: float, first: float) -> str:
    """What the two medians say."""
    if emphasis < EMPHASIS_FROM:
        return "the updates do not prefer directions that the weights use"
    if first < REPEATS_FROM:
        return "the updates amplify directions that the weights use without stressing them"
    return "the updates repeat the strongest directions of the weights"


def _sizes(look: Look) -> None:
    """Updates beside their weights, and beside what quantising changed."""
    table = new_table("module", "||dW||", "||W||", "dW / W", "spectral", "quant. error", "dW / quant. error")
    for name, rows in _groups(look.amplifications, lambda a: a.module).items():
        norms = [f"{mean(getattr(a, key) for a in rows):.3g}" for key in ("delta_norm", "weight_norm")]
        shares = [f"{median(getattr(a, key) for a in rows):.2%}" for key in ("delta_frac", "spectral_frac")]
        errors = [a.quant_error_norm for a in rows if a.quant_error_norm is not None]
        above = [a.above_quant_error for a in rows if a.above_quant_error is not None]
        noise = [f"{mean(errors):.3g}", f"{median(above):.2f}"] if errors else ["-", "-"]
        table.add_row(printable(name), *norms, *shares, *noise)
    stdout.print(table)
    _quant_error(look)


def _quant_error(look: Look) -> None:
    """Whether training rose above what quantising changed."""
    above = [a.above_quant_error for a in look.amplifications if a.above_quant_error is not None]
    if above:
        rose = sum(value > 1 for value in above)
        say(
            f"In {rose} of {len(above)} modules the update is larger than what quantising changed in the weight; the "
            f"median is {median(above):.2f} of it. A smaller one is buried if the merged weight is quantised again."
        )


def _recommendation(found: Recommendation) -> None:
    shared = "" if found.shared_rank is None else f"; {found.shared_rank} of them a second run found too"
    say(
        f"rank, a heuristic: {found.r} would have held 95 % of nine updates in ten ({found.energy_rank} directions do"
        f"{shared}); trained with r = {found.trained_r}."
    )
    if found.num_bound:
        what = "use more than 80 % of the directions that their update can have"
        say(
            f"{found.num_bound} of {found.num_modules} modules {what}: "
            + ("the run is bound by its rank; train with a larger one to know." if found.is_bound else "a minority.")
        )


def _overlaps(result: Analysis) -> None:
    """phi of the first direction, of the first few, and of all, each with what chance gives."""
    first, second = result.looks
    for directions, what in WHAT.items():
        members = [overlap for overlap in result.overlaps if overlap.directions == directions]
        if not members:
            continue
        knows_start = any(overlap.control for overlap in members)
        extra = ("starts, all",) if knows_start else ()
        table = new_table(what, "first", "first 4", "all", *extra, "by chance: first", "first 4", "all")
        for overlap in members:
            sizes = _sizes_of(overlap)
            control = overlap.control_at(*sizes[-1])
            start = ("-" if control is None else f"{control:.3f}",) if knows_start else ()
            found = [f"{overlap.at(*size):.3f}" for size in sizes]
            table.add_row(printable(overlap.name), *found, *start, *(f"{overlap.baseline(*s):.3f}" for s in sizes))
        stdout.print(table)
        say(_overlap_reading(directions, members, first.name, second.name))
    say("The figures are phi. 1: the directions of one lie within those of the other; 0: none is shared.")


def _sizes_of(overlap: Overlap) -> list[tuple[int, int]]:
    """The first direction of both sides, the first four, all."""
    size = (len(overlap.grid), len(overlap.grid[0]))
    return [(1, 1), (min(4, *size), min(4, *size)), size]


def _overlap_reading(directions: Directions, members: Sequence[Overlap], first: str, second: str) -> str:
    """One sentence on one kind of directions."""
    ends = [_sizes_of(overlap)[0::2] for overlap in members]
    top, whole = (mean(o.at(*e[k]) for o, e in zip(members, ends, strict=True)) for k in (0, 1))
    by_chance = [mean(o.baseline(*e[k]) for o, e in zip(members, ends, strict=True)) for k in (0, 1)]
    text = (
        f"{first} beside {second}, {WHAT[directions]}: the strongest direction overlaps by {top:.2f} (chance "
        f"{by_chance[0]:.3f}), all of them by {whole:.2f} (chance {by_chance[1]:.3f})."
    )
    controls = [c for o, e in zip(members, ends, strict=True) if (c := o.control_at(*e[1])) is not None]
    if controls:
        text += f" Their random starts overlap by {mean(controls):.2f}: what lies above that was learned."
    return text


def _groups(rows: Sequence[Row], module: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name_of(module(row)), []).append(row)
    return groups
