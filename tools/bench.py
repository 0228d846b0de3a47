"""`make bench`: training speed on the quickstart's rows, with eager attention and with torch's sdpa, taking turns.

Prints tokens per second of forward and backward, the best of several repeats of the same micro-batches.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from qlora_train.artifacts import RunDir
from qlora_train.recipe.load import load_recipe
from qlora_train.train.loop import Job
from qlora_train.train.metrics import Silent
from qlora_train.train.setup import prepare
from qlora_train.train.step import accumulate_gradients

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
REPEATS = 4
STEPS = 2


def seconds(job: Job) -> float:
    """Forward and backward of the first steps."""
    started = time.perf_counter()
    for step in range(STEPS):
        accumulate_gradients(job.causal, job.loader.step(step), job.accelerator, seed=0, step=step)
    job.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure both, taking turns."""
    jobs = {}
    for name in ("eager", "sdpa"):
        loaded = load_recipe(RECIPE, [f"model.attn_implementation={name}"])
        jobs[name] = prepare(loaded.recipe, RunDir(Path("unused")), Silent()).job
        jobs[name].model.train()
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(REPEATS):
        for name, job in jobs.items():
            best[name] = min(best[name], seconds(job))
    num_tokens = sum(batch.num_tokens for step in range(STEPS) for batch in jobs["eager"].loader.step(step))
    for name, best_s in best.items():
        print(f"{name:6} {num_tokens / best_s:8.0f} tokens/s")
    print(f"eager is {best['sdpa'] / best['eager']:.2f} times as fast")


if __name__ == "__main__":
    main()
