"""Check on the real model what people repeat about LoRA: `tools/claims.py start|rank|targets|latency|memory`.

Directions that adapters share and what they amplify are `qlora-train analyze RUN RUN2`; both are read together in
recipes/methods/README.md. `rank` and `targets` train a quarter of `shell` for each rate that they try: an hour each on
two cores. Their runs are those of compare_methods.py's ledger, with its `--keep`, `--any-code` and `--show`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from comparing.trial import FULL, WORK
from prove import show

from qlora_train.errors import Interrupted

TRAINED = ("rank", "targets")
CLAIMS = ("start", *TRAINED, "latency", "memory")


def main() -> int:
    """0 when the claim holds here, or has no bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=WORK, help="where the ledger and the runs are kept")
    parser.add_argument("--show", action="store_true", help="rank, targets: make no run, show what there is")
    parser.add_argument("--any-code", action="store_true", help="rank, targets: take runs of other states of the code")
    parser.add_argument("--keep", action="store_true", help="rank, targets: keep the runs in the repository")
    parser.add_argument("--json", type=Path, help="where the figures go; the page reads tools/figures/claim-CLAIM.json")
    parser.add_argument("shared", nargs="*", metavar="KEY=VALUE", help="recipe keys for every run, e.g. model.path=...")
    arguments = parser.parse_intermixed_args()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    import torch
    from comparing import claims
    from comparing.ledger import KEPT, Ledger, machine_words
    from comparing.sweep import Sweep

    torch.set_num_threads(arguments.threads)
    sources = [machine_words()]
    if arguments.claim in TRAINED:
        ledger = Ledger(arguments.work / "ledger.jsonl", any_code=arguments.any_code, kept=KEPT)
        sweep = Sweep(
            ledger,
            FULL,
            threads=arguments.threads,
            limit_s=300,
            say=say,
            make_missing=not arguments.show,
            work=arguments.work.resolve(),
            shared=arguments.shared,
        )
        bars = getattr(claims, arguments.claim)(sweep)
        sources = ledger.sources(sweep.used)
        if arguments.keep:
            print(f"{ledger.keep(FULL.name)} runs are kept in {KEPT.name}")
    else:
        bars = getattr(claims, arguments.claim)(arguments.shared)
    show(bars)
    if arguments.json:
        figures = [{**asdict(bar), "ok": bar.ok} for bar in bars]
        arguments.json.write_text(json.dumps({"figures": figures, "sources": sources}, indent=1) + "\n")
    return 0 if all(bar.ok for bar in bars) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped; the runs that were finished are kept: start it again to go on")
