"""The memory plan on a terminal."""

from __future__ import annotations

from rich.text import Text

from qlora_train.api import PlanResult
from qlora_train.cli.results import new_table, stdout
from qlora_train.memory.advice import Change
from qlora_train.memory.constants import CONSTANTS
from qlora_train.memory.plan import Plan
from qlora_train.memory.table import MOST_PACKS, PlanTable
from qlora_train.memory.terms import ON_DEVICE, Stage
from qlora_train.units import size_text

GIB = 2**30
EXPLAINING_WIDTH = 100  # columns
_IN_FEW_WORDS = {constant.source: constant.what for constant in CONSTANTS}
_STAGE_WORDS: dict[Stage, str] = {
    "training": "training",
    "evaluation": "evaluation of held-out rows",
    "generation": "answers of held-out rows",
    "export": "export, in host memory",
    "disk": "disk, run and export",
}


def planned(result: PlanResult) -> None:
    """Bytes by cause, the peak of each stage, the verdict, and what to change."""
    plan = result.plan
    stdout.print(Text(f"{plan.request.recipe.model.path} on {result.device}", "bold"))
    stdout.print(Text(_settings(plan)))
    stdout.print()
    _causes(plan)
    stdout.print()
    _stages(result)
    stdout.print()
    for note in plan.notes:
        stdout.print(Text(f"assumed: {note}", "dim"))
    if plan.formula_bytes is not None:
        traced = plan.traced_bytes()
        stdout.print(
            Text(
                f"cross-check: the closed formula gives {size_text(plan.formula_bytes)} for what is traced, "
                f"{plan.formula_bytes / traced - 1:+.1%}",
                "dim",
            )
        )
    _verdict(result)


def _settings(plan: Plan) -> str:
    s = plan.settings()
    recomputed = (
        "no layer is computed again"
        if not s["recomputed_layers"]
        else f"{s['recomputed_layers']} of {s['num_layers']} layers are computed again ({s['checkpointing']})"
    )
    resident = f", {s['resident_layers']} stay dense" if s["resident_layers"] else ""
    return (
        f"micro-batches of {s['micro_batch_size']} x {s['seq_len']:,} tokens, r = {s['r']}, {s['optimizer']}; "
        f"{recomputed}{resident}"
    )


def _causes(plan: Plan) -> None:
    """The terms of training, largest first; with what each is where there is room to say it."""
    is_wide = stdout.width >= EXPLAINING_WIDTH
    words = ("how", "what") if is_wide else ("how",)
    table = new_table("training", "GiB", *words, of_words=words)
    for term in plan.of("training"):
        size = f"{term.num_bytes / GIB:.2f}" if term.num_bytes >= GIB / 200 else "< 0.01"
        what = (_IN_FEW_WORDS.get(term.source, term.source),) if is_wide else ()
        table.add_row(term.cause, size, term.how, *what)
    stdout.print(table)


def _stages(result: PlanResult) -> None:
    """The peak of each stage beside what there is."""
    plan, limit = result.plan, result.limit_bytes
    table = new_table("peak of", "GiB", "", of_words=("",))
    for stage, words in _STAGE_WORDS.items():
        peak = plan.peak_bytes(stage)
        if peak:
            of_limit = f"{peak / limit:.1%} of the device" if stage in ON_DEVICE else ""
            if stage == "export" and plan.request.recipe.export.verify == "auto":
                of_limit = "or layer by layer, where less is free"
            table.add_row(words, f"{peak / GIB:.2f}", of_limit)
    stdout.print(table)


def _verdict(result: PlanResult) -> None:
    plan, limit = result.plan, result.limit_bytes
    needed, there, room = size_text(plan.device_bytes), size_text(limit), limit - plan.device_bytes
    if result.fits:
        stdout.print(Text(f"It fits: {needed} of {there}, {size_text(room)} left.", "bold green"))
        if result.changes:
            stdout.print(Text("What the room is good for:"))
            _changes(result.changes)
        return
    what = _STAGE_WORDS[plan.tightest]
    stdout.print(Text(f"It does not fit: {what} needs {needed}, there is {there}.", "bold red"))
    if result.changes:
        stdout.print(Text("What to change, in the order of what it costs in speed:"))
        _changes(result.changes)


def _changes(changes: tuple[Change, ...]) -> None:
    """Each change on a line to copy, and under it what it does."""
    for change in changes:
        stdout.print(Text(f"  {change.text}", "bold"), soft_wrap=True)
        more = -change.saved_bytes / GIB
        size = f"{change.peak_bytes / GIB:.2f} GiB ({abs(more):.2f} {'more' if more > 0 else 'less'})"
        speed = f"{abs(change.slowdown_frac):.0%} {'more' if change.slowdown_frac > 0 else 'less'} time a token"
        time = "as fast a token" if abs(change.slowdown_frac) < 0.005 else speed
        fits = "fits" if change.fits else "does not fit"
        why = change.why + ("; changes what is learnt" if change.changes_training else "")
        stdout.print(Text(f"      {size}, {fits}; {time}: {why}"), soft_wrap=True)


def table(found: PlanTable) -> None:
    """The largest micro-batch for every model, length and card."""
    for model in dict.fromkeys(row.model for row in found.rows):
        stdout.print(Text(model, "bold"))
        shown = new_table("tokens a pack", "least GiB", *(f"{c.nominal_gb} GB ({c.name})" for c in found.cards))
        for row in found.rows:
            if row.model == model:
                cells = [f"{n}+" if n == MOST_PACKS else str(n) if n else "-" for n in row.packs]
                shown.add_row(f"{row.seq_len:,}", f"{row.least_bytes / GIB:.2f}", *cells)
        stdout.print(shown)
        stdout.print()
    stdout.print(Text(f"Packs of a micro-batch that fit; - where not one does. {found.settings}.", "dim"))
    stdout.print(Text("Sizes stand for the card of that size with the least memory; --gpu names others.", "dim"))
