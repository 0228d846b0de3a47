"""Compare the adapter methods on the same rows, each at its own best learning rate: tools/figures/compare.json.

Each run is a line of runs/compare/ledger.jsonl, so that an interrupted comparison goes on where it was; start it again.
`--keep` puts the lines beside the figures, from where another checkout goes on; after a change of the code with
`--any-code`, which the table then says.
Rates are searched on a quarter of `shell`, the best one trains the whole of it with two seeds, the methods that are
worth it on NF4 learn `spelling` too, and step times are taken in turns with LoRA's. Hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from comparing.entrants import entrants
from comparing.ledger import KEPT, Ledger, code_digest
from comparing.sweep import Compared, Sweep
from comparing.table import COLUMNS, NOTES, cells, figures
from comparing.trial import FULL, SAMPLE, WORK, Scale
from rich.console import Console
from rich.table import Table

from qlora_train.errors import Interrupted

FIGURES = Path(__file__).resolve().parent / "figures" / "compare.json"
STAGES = ("search", "final", "cost", "spelling")
MAX_RUN_S = 300.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    known = tuple(entrants())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="minutes: few rows, one seed, no search, four methods")
    parser.add_argument("--methods", help=f"separated by commas, of {', '.join(known)}")
    parser.add_argument("--stages", default=None, help=f"separated by commas, of {', '.join(STAGES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run")
    parser.add_argument("--show", action="store_true", help="make no run: the table of what there is")
    parser.add_argument("--any-code", action="store_true", help="take runs that other states of the code made too")
    parser.add_argument("--keep", action="store_true", help="keep the runs of the whole comparison in the repository")
    parser.add_argument("--work", type=Path, default=WORK, help="where the ledger and the runs are kept")
    parser.add_argument("shared", nargs="*", metavar="KEY=VALUE", help="recipe keys for every run, e.g. model.path=...")
    parser.add_argument("--limit-s", type=float, default=MAX_RUN_S, help="a training over it is given up")
    parser.add_argument("--json", type=Path, help=f"where the figures go; of the whole: tools/figures/{FIGURES.name}")
    parsed = parser.parse_intermixed_args(arguments)
    sample_methods = ("lora", "dora", "pissa", "lora_ga")
    default = sample_methods if parsed.sample else known
    parsed.methods = tuple(parsed.methods.split(",")) if parsed.methods else default
    parsed.stages = tuple((parsed.stages or ("final,cost" if parsed.sample else ",".join(STAGES))).split(","))
    for names, allowed, key in ((parsed.methods, known, "--methods"), (parsed.stages, STAGES, "--stages")):
        if unknown := [name for name in names if name not in allowed]:
            parser.error(f"{key}: {unknown[0]!r} is none of {', '.join(allowed)}")
    if parsed.threads < 1:
        parser.error("--threads begins at 1")
    return parsed


def missing(compared: Sequence[Compared], scale: Scale, stages: Sequence[str]) -> list[str]:
    """Entrants of which a run is still to be made."""
    return [
        each.entrant.title
        for each in compared
        if len(each.finals) < len(scale.seeds) or ("search" in stages and not each.rates)
    ]


def show(rows: list[dict[str, object]], console: Console) -> None:
    """The table and what its columns mean."""
    table = Table()
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for note in NOTES:
        console.print(f"  {note}", style="dim", highlight=False)
    for row in rows:
        for failure in row["failures"]:  # type: ignore[attr-defined]
            console.print(f"  {row['title']}: {failure}", highlight=False, markup=False)


def main() -> int:
    """0 when every run that was asked for has a result."""
    arguments = parse(sys.argv[1:])
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    scale = SAMPLE if arguments.sample else FULL
    ledger = Ledger(arguments.work / "ledger.jsonl", any_code=arguments.any_code, kept=KEPT)
    sweep = Sweep(
        ledger,
        scale,
        threads=arguments.threads,
        limit_s=arguments.limit_s,
        say=say,
        make_missing=not arguments.show,
        work=arguments.work.resolve(),
        shared=arguments.shared,
    )
    compared = sweep.compare(arguments.methods, arguments.stages)
    if arguments.keep:
        print(f"{ledger.keep(FULL.name)} runs of the whole comparison are kept in {KEPT.name}")
    rows = figures(compared)
    show(rows, Console(width=None if sys.stdout.isatty() else 160))
    absent = missing(compared, scale, arguments.stages)
    if absent:
        print(f"not measured yet: {', '.join(absent)}")
    is_whole = not arguments.sample and not arguments.shared and set(arguments.methods) == set(entrants())
    target = arguments.json or (FIGURES if is_whole and set(arguments.stages) == set(STAGES) else None)
    if target is not None:
        from qlora_train.environment import environment

        report = {
            "sample": arguments.sample,
            "code": code_digest(),
            "threads": arguments.threads,
            "shared": arguments.shared,
            "machine": environment(),
            "sources": ledger.sources(entry for each in compared for entry in each.trained()),
            "cost_sources": ledger.sources(each.cost for each in compared if each.cost is not None),
            "missing": absent,
            "rows": rows,
        }
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(bool(absent) or any(row["failures"] for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped; the runs that were finished are kept: start it again to go on")
