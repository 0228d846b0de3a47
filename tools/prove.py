"""Measure a claim again on this machine and hold it against its bars: `make prove WHAT=main-job [FULL=1] [JSON=path]`.

Exits 1 when a figure falls short. The README's figures are printed by this program.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from proofs.common import Bar

from qlora_train.environment import environment, processor_text

PROOFS = Path(__file__).resolve().parent / "proofs"


def claims() -> list[str]:
    """What can be proven."""
    return sorted(p.stem.replace("_", "-") for p in PROOFS.glob("*.py") if p.stem not in ("__init__", "common"))


def show(bars: list[Bar]) -> None:
    """The table."""
    width = max(len(bar.what) for bar in bars)
    print(f"\n{'':{width}}  {'measured':>12}  {'bar':>10}")
    for bar in bars:
        verdict = ("ok" if bar.ok else "SHORT") if bar.bar else ""
        note = f"  ({bar.note})" if bar.note else ""
        print(f"{bar.what:{width}}  {bar.value:>12.4g}  {bar.bar:>10}  {verdict:5}  {bar.unit}{note}")


def main() -> int:
    """0 when every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=claims(), help="the claim")
    parser.add_argument("--full", action="store_true", help="the long form: nothing is taken from an earlier run")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    started = time.perf_counter()
    bars: list[Bar] = importlib.import_module(f"proofs.{arguments.what.replace('-', '_')}").measure(arguments.full)
    wall_s = time.perf_counter() - started
    show(bars)
    machine = environment()
    machine["versions"]["trl"] = importlib.metadata.version("trl")
    libraries = ("torch", "transformers", "bitsandbytes", "peft", "trl")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in libraries)
    print(f"\n{wall_s:,.0f} s on {processor_text(machine)}, Python {machine['python']}, {versions}")
    if arguments.json:
        report = {"what": arguments.what, "full": arguments.full, "wall_s": wall_s, "machine": machine}
        figures = [{**asdict(bar), "ok": bar.ok} for bar in bars]
        arguments.json.write_text(json.dumps({**report, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(bar.ok for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
