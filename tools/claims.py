"""Check on the real model what people repeat about LoRA: `tools/claims.py start|rank|targets|latency|memory`.

Directions that adapters share and what they amplify are `qlora-train analyze RUN RUN2`; both are read together in
recipes/methods/README.md. `rank` and `targets` train a quarter of `shell` for each rate that they try: an hour each on
two cores; runs are kept in runs/compare/ledger.jsonl and not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from comparing.trial import FULL, WORK
from prove import show

from qlora_train.errors import Interrupted

CLAIMS = ("start", "rank", "targets", "latency", "memory")


def main() -> int:
    """0 when the claim holds here, or has no bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=WORK, help="where the ledger and the runs are kept")
    parser.add_argument("shared", nargs="*", metavar="KEY=VALUE", help="recipe keys for every run, e.g. model.path=...")
    arguments = parser.parse_intermixed_args()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    import torch
    from comparing import claims
    from comparing.ledger import Ledger
    from comparing.sweep import Sweep

    torch.set_num_threads(arguments.threads)
    if arguments.claim in ("rank", "targets"):
        ledger = Ledger(arguments.work / "ledger.jsonl")
        work = arguments.work.resolve()
        sweep = Sweep(ledger, FULL, threads=arguments.threads, limit_s=300, say=say, work=work, shared=arguments.shared)
        bars = getattr(claims, arguments.claim)(sweep)
    else:
        bars = getattr(claims, arguments.claim)(arguments.shared)
    show(bars)
    return 0 if all(bar.ok for bar in bars) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped; the runs that were finished are kept: start it again to go on")
