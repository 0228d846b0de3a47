"""`make bench`: training speed on the quickstart's rows, packed, and padded with two kinds of attention, taking turns.

Prints tokens per second of forward and backward, padding not counted, the best of several repeats of the same steps.
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


PADDED = ("data.batching=length_grouped", "train.micro_batch_size=12")
WAYS = {
    "packed": (),
    "padded, eager": (*PADDED, "model.attn_implementation=eager"),
    "padded, sdpa": (*PADDED, "model.attn_implementation=sdpa"),
}


def main() -> None:
    """Measure all, taking turns."""
    jobs = {}
    for name, overrides in WAYS.items():
        loaded = load_recipe(RECIPE, overrides)
        jobs[name] = prepare(loaded.recipe, RunDir(Path("unused")), Silent()).job
        jobs[name].model.train()
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(REPEATS):
        for name, job in jobs.items():
            best[name] = min(best[name], seconds(job))
    for name, job in jobs.items():
        num_tokens = sum(batch.num_tokens for step in range(STEPS) for batch in job.loader.step(step))
        print(f"{name:14} {num_tokens / best[name]:8.0f} tokens/s")


if __name__ == "__main__":
    main()
