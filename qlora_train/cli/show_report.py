"""What a page of runs says, in a few lines on stdout."""

from __future__ import annotations

from qlora_train.api import ReportResult
from qlora_train.printable import fit_to_show


def reported(result: ReportResult) -> None:
    """The sentence of each run, what is missing of it, why figures may not compare, and where the page is."""
    for run in result.runs:
        print(fit_to_show(f"{run.name}: {run.sentence}"))
        for note in run.notes:
            print(fit_to_show(f"  {note}"))
    for warning in result.warnings:
        print(fit_to_show(warning))
    print(fit_to_show(f"the page: {result.page} ({result.num_bytes / 2**10:,.0f} KiB)"))
