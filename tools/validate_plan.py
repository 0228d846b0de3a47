"""Hold the memory plan against published figures: `python tools/validate_plan.py [--workers N] [--left-out]`.

Prints row by row what was published, what the plan says and how far it is off; the median; and why the worst are off.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from planning.compare import Comparison, compare, median_error, worst
from planning.explanations import explain
from planning.paper import COLUMNS, breakdowns
from planning.published import read_rows, why_left_out

GB, NUM_WORST = 1e9, 5


def line_of(found: Comparison) -> str:
    """One row of the table."""
    published, planned = found.row.peak_bytes / GB, found.planned_bytes / GB
    return f"{found.row.line:4}  {published:9.2f}  {planned:7.2f}  {found.error:+7.1%}  {found.row.name}"


def show_configurations(found: list[Comparison]) -> None:
    """How the rows were configured, each way once."""
    print("\nConfigured as, and counted:")
    for step, counts in {(each.step, each.counts): None for each in found}:
        lines = [str(each.row.line) for each in found if (each.step, each.counts) == (step, counts)]
        print(f"* lines {', '.join(lines)}: {step}. Counted: {counts}.")


def show_summary(found: list[Comparison]) -> None:
    """Medians, and the worst rows with what is known of them."""
    measured = [each for each in found if not each.is_on_a_line]
    print(f"\nmedian absolute error: {median_error(found):.1%} of {len(found)} rows", end="")
    print(f"; {median_error(measured):.1%} of the {len(measured)} that are not points of a vendor's straight line")
    print("\nThe worst:")
    for each in worst(found, NUM_WORST):
        print(f"* line {each.row.line}, {each.row.name}: {each.error:+.1%}. {explain(each.row)}")


def show_paper() -> None:
    """The breakdown of the QLoRA paper."""
    print(f"\nThe QLoRA paper's breakdown, MB     {'  '.join(f'{name:>22}' for name in COLUMNS)}")
    for found in breakdowns():
        cells = zip(found.published, found.planned, found.errors, strict=True)
        texts = "  ".join(f"{theirs:8,.0f} {ours:6,.0f} {error:+6.1%}" for theirs, ours, error in cells)
        print(f"{found.model:34}  {texts}")


def main() -> int:
    """Always 0: the bars are held by `make prove WHAT=fit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes that trace side by side")
    parser.add_argument("--left-out", action="store_true", help="only list the rows that cannot be planned, and why")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    left_out = [(row, reason) for row in read_rows() if (reason := why_left_out(row))]
    if arguments.left_out:
        for row, reason in left_out:
            print(f"{row.line:4}  {row.name}: {reason}")
        return 0
    print("line  published  planned    error  row (GB of 10^9 bytes)")
    found = compare(workers=arguments.workers, say=lambda each: print(line_of(each), flush=True))
    print(f"\n{len(left_out)} rows do not state their settings or are no measurements: --left-out lists them.")
    show_configurations(found)
    show_summary(found)
    show_paper()
    return 0


if __name__ == "__main__":
    sys.exit(main())
