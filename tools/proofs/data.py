"""The data: every row accounted for, packs without padding or contamination, and a rate that holds for many rows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proofs.common import ROOT, WORK, Bar, fresh, tests_pass, verb

FOLDER = WORK / "data"
RECIPES = ROOT / "recipes"
# For both sets, so that what a step costs whatever its size (dequantising) is no part of the answer.
PADDED_POSITIONS, REPEATS = 6144, 2
ROWS_SHORT, ROWS_FULL = (20_000, 100_000), (20_000, 100_000, 1_000_000)
TESTS = {
    "templates": ["tests/unit/data/test_templates_public.py"],
    "faults of files and rows, through the command line": ["tests/faults/test_bad_data.py"],
    "properties of packing, spans and pre-flight": [
        *("tests/unit/data/test_pack.py", "tests/unit/data/test_sources_fuzz.py"),
        *("tests/unit/data/test_data_masks.py", "tests/unit/data/test_fates.py"),
    ],
    "packed equals unpacked": ["tests/numerics/test_packing.py", "tests/unit/model/test_attention.py"],
}


def measure(full: bool) -> list[Bar]:
    """All bars of the data."""
    return [*_accounts(), *_real_model(), *_scale(ROWS_FULL if full else ROWS_SHORT), *tests_pass(TESTS)]


def _accounts() -> list[Bar]:
    """What `qlora-train data` says of the recipes' sets."""
    bars = []
    for recipe, name in (("quickstart", "shell"), ("spelling", "spelling")):
        folder = fresh(FOLDER / recipe)
        limit = ["data.max_train_rows=null"] if recipe == "spelling" else []
        result, wall_s = verb("data", RECIPES / f"{recipe}.yaml", f"run.dir={folder}", *limit)
        audit, batching = result["account"]["splits"][0]["audit"], result["account"]["batching"]
        listed = sum(1 for _ in (folder / "fates.jsonl").open(encoding="utf-8"))
        unaccounted = audit["num_rows"] - audit["counts"]["kept"] - listed
        seq_len = json.loads((folder / "data.json").read_text(encoding="utf-8"))["seq_len"]
        bars += [
            Bar(f"{name}: rows neither trained on nor listed", unaccounted, "rows", at_most=0),
            Bar(f"{name}: empty share of the packs of {seq_len} tokens", batching["unfilled_frac"], at_most=0.02),
            Bar(f"{name}: `qlora-train data`, imports included", wall_s, "s"),
        ]
    return bars


def _real_model() -> list[Bar]:
    """Speed and isolation on the real model in 4 bit."""
    from qlora_train.artifacts.layout import RunDir
    from qlora_train.recipe.load import load_recipe
    from qlora_train.train.metrics import Silent
    from qlora_train.train.selfcheck import selfcheck
    from qlora_train.train.setup import prepare

    bars = []
    for recipe, name in (("quickstart", "shell"), ("spelling", "spelling")):
        loaded = load_recipe(RECIPES / f"{recipe}.yaml")
        seq_len = loaded.recipe.data.seq_len
        prepared = prepare(loaded.recipe, RunDir(Path("unused")), Silent())
        job, table = prepared.job, prepared.inputs.train.table
        checked = selfcheck(job.causal, table, job.pad_token_id, job.accelerator.device, packed=True)
        packed_s, padded_s, grouped_s = _seconds(job, table, seq_len)
        bars += [
            Bar(
                f"{name}: change in other rows when a token is replaced",
                _known(checked.change_in_other_rows),
                at_most=0,
            ),
            Bar(f"{name}: change in the row itself", _known(checked.change_in_the_row), at_least=1e-3),
            Bar(
                f"{name}: loss of rows together against alone, relative",
                abs(checked.loss_together / checked.loss_alone - 1),
                at_most=2e-2,
            ),
            Bar(f"{name}: times as fast as rows padded to {seq_len} tokens", padded_s / packed_s, at_least=2.5),
            Bar(f"{name}: times as fast as rows of like length padded", grouped_s / packed_s),
        ]
    return bars


def _known(value: float | None) -> float:
    return float("nan") if value is None else value  # NaN meets no bar


def _seconds(job: Any, table: Any, seq_len: int) -> tuple[float, float, float]:
    """Forward and backward of the same rows: packed, padded to `seq_len`, padded to the longest; the least of some."""
    import numpy as np

    from qlora_train.data.loader import collate
    from qlora_train.data.pack import pack
    from qlora_train.train.step import accumulate_gradients

    chosen = np.random.default_rng(0).choice(table.num_rows, PADDED_POSITIONS // seq_len, replace=False)
    packs = pack(table.lengths[chosen], seq_len, np.random.default_rng(0))
    lines = [chosen[packs.order[a:b]].tolist() for a, b in zip(packs.starts[:-1], packs.starts[1:], strict=True)]
    by_length = chosen[np.argsort(table.lengths[chosen])].tolist()
    packed = collate(table, lines, job.pad_token_id, packed=True)
    grouped = collate(table, [[row] for row in by_length], job.pad_token_id)
    padded = _widened(grouped, seq_len, job.pad_token_id)
    assert packed.num_supervised_tokens == grouped.num_supervised_tokens == padded.num_supervised_tokens
    best = [float("inf")] * 3
    for _ in range(REPEATS):
        for index, batch in enumerate((packed, padded, grouped)):
            started = time.perf_counter()
            accumulate_gradients(job.causal, [batch], job.accelerator, seed=0, step=0)
            best[index] = min(best[index], time.perf_counter() - started)
            job.optimizer.zero_grad(set_to_none=True)
    return best[0], best[1], best[2]


def _widened(batch: Any, width: int, pad_token_id: int) -> Any:
    """The batch padded on to `width` tokens a row."""
    from dataclasses import replace

    from torch.nn.functional import pad

    from qlora_train.names import IGNORE_INDEX

    more = (0, width - batch.input_ids.shape[1])
    return replace(
        batch,
        input_ids=pad(batch.input_ids, more, value=pad_token_id),
        labels=pad(batch.labels, more, value=IGNORE_INDEX),
    )


def _scale(sizes: Sequence[int]) -> list[Bar]:
    """Generated rows, each number in a process of its own."""
    bars = []
    for num_rows in sizes:
        folder = fresh(FOLDER / f"scale-{num_rows}")
        command = [sys.executable, "tools/proofs/data_scale.py", str(num_rows), str(folder), "--near"]
        print(f"$ {' '.join(command[1:])}", flush=True)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        rate = found["num_tokens"] / found["wall_s"] * 60 / 1e6
        bars += [
            Bar(f"{num_rows:,} chat rows: audited and packed", rate, "million tokens/min", at_least=5),
            Bar(f"{num_rows:,} chat rows: peak resident memory", found["peak_bytes"] / 2**30, "GiB", at_most=2),
            Bar(f"{num_rows:,} chat rows: empty share of packs of 2,048 tokens", found["unfilled_frac"], at_most=0.02),
            Bar(f"{num_rows:,} chat rows: near-duplicates", found["near_s"], "s"),
        ]
        fresh(folder)
    return bars
