"""Deploying what was trained: merging in bounded memory, the price of each base, faults that verification catches.

A random model of 1 billion weights is made on disk (8 with FULL=1) and merged in a process of its own; the rest runs on
SmolLM2-135M, fine-tuned on `spelling`. An earlier run of that counts only where it verifies (proofs/main_job.py). The
short form trains on few rows and makes all other exports in this process, where each tensor of the base is quantised,
and held against the run's record, once; what it judges is judged by the same bars.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from serving.bars import formats_bars

from proofs.common import ROOT, WORK, Bar, earlier, fresh, verb, verb_here

FOLDER = WORK / "deploy"
SPELLING = WORK / "main-job" / "spelling"
RECIPE = ROOT / "recipes" / "spelling.yaml"
MAX_GIB = 3.0
# Of the short form: rows that are trained on, and held-out rows that training looks at. After 320 rows half of one
# layer's update is within rounding, and at twice the rate the next tokens of the merge are not the trained model's.
SHORT_ROWS, SHORT_EVAL_ROWS = 800, 64
# Rows and answers on which the ways to merge are compared.
COMPARED, SHORT_COMPARED, ANSWERS, SHORT_ANSWERS = 200, 64, 200, 32
LAYER_ROWS, FAULT_ROWS = 2, 8  # rows that a large merge is verified on, and those that faults are planted in
LAYER = "model.layers.7"
EARLIER = "an earlier run that verifies"


def measure(full: bool) -> list[Bar]:
    """All bars of deployment."""
    run, note = _spelling(full)
    bars = memory_bars("8B" if full else "1B")
    with nullcontext() if full else base_once():
        bars += base_bars(run, full, note)
        bars += fault_bars(run)
        bars += formats_bars(run, full)
    return bars


@contextmanager
def base_once() -> Iterator[None]:
    """Within the block a tensor of a base is quantised, and proven to be the trained one, when it is first asked for.

    Holds the base as training held it.
    """
    from qlora_train.export.base import BaseReader

    made = BaseReader.as_trained
    known: dict[tuple[Path, str], Any] = {}

    def as_trained(self: Any, name: str, original: Any = None) -> Any:
        key = (self.stored[name].path, name)
        if key not in known:
            known[key] = made(self, name, original)
        return known[key]

    with mock.patch.object(BaseReader, "as_trained", as_trained):
        yield


def memory_bars(size: str) -> list[Bar]:
    """A merge, with its verification a layer at a time, in a process that is watched."""
    made, merged = fresh(FOLDER / size), fresh(FOLDER / f"{size}-merged")
    started = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_model.py"), size, str(made)], check=True)
    made_s = time.perf_counter() - started
    said = ["export.verify=layers", f"export.verify_rows={LAYER_ROWS}", "export.shard_gib=1"]
    result, export_s = verb("export", made / "run", merged, *said)
    seconds, verdict = result["seconds"], result["verdict"]
    bars = [
        Bar(f"{size}: weights", json.loads((merged / "export.json").read_text())["num_weights"] / 1e9, "billion"),
        Bar(f"{size}: peak resident memory of the export", result["peak_memory_bytes"] / 2**30, "GiB", at_most=MAX_GIB),
        Bar(f"{size}: KL as a share of the adapter's effect", verdict["kl_frac"], at_most=0.01),
        Bar(f"{size}: making model and run folder", made_s, "s"),
        Bar(f"{size}: export", export_s, "s"),
        *(Bar(f"{size}: of that, {what}", seconds[what], "s") for what in seconds),
    ]
    for folder in (made, merged):
        shutil.rmtree(folder)
    return bars


def base_bars(run: Path, full: bool, note: str) -> list[Bar]:
    """The three ways to merge, on held-out rows and answers."""
    rows, answers = (COMPARED, ANSWERS) if full else (SHORT_COMPARED, SHORT_ANSWERS)
    asked = ("export.base=auto", f"eval.generate_rows={answers}", f"export.compare_rows={rows}")
    target = fresh(FOLDER / "auto")
    result = verb("export", run, target, *asked)[0] if full else verb_here("export", run, target, *asked)
    choice = result["choice"]
    by_name = {candidate["onto"]: candidate for candidate in choice["candidates"]}
    ours, again = by_name["dequantized"], by_name["requantized"]
    print(f"\n{choice['sentence']}")
    bars = [
        Bar("spelling: answers compared", choice["num_answers"], "rows", at_least=answers, note=note),
        Bar("spelling: exact match of the trained model", choice["trained_exact_match"]),
    ]
    for onto, candidate in by_name.items():
        found = candidate["distance"]
        bars += [
            Bar(f"spelling, {onto}: KL", found["mean_kl"], "nats", at_most=5e-4 if onto == "dequantized" else None),
            Bar(f"spelling, {onto}: top-1", found["top1_agreement"], at_least=0.99 if onto == "dequantized" else None),
            Bar(f"spelling, {onto}: loss above the trained model's", candidate["loss_rise"], "nats"),
            Bar(f"spelling, {onto}: exact match", candidate["exact_match"]),
        ]
    nearer = again["distance"]["mean_kl"] / max(ours["distance"]["mean_kl"], 1e-12)
    bars.append(Bar("spelling: KL of re-quantising over that of the export", nearer, "times", at_least=10))
    return bars


def fault_bars(run: Path) -> list[Bar]:
    """Planted faults that verification must catch, and the merge without one, which it must not."""
    from qlora_train.adapters.fold import read_updates
    from qlora_train.errors import ModelError
    from qlora_train.export.clock import Clock
    from qlora_train.export.run import measure_trained, rows_to_verify, run_export
    from qlora_train.model.trained import open_run

    finished = open_run(run, [f"export.verify_rows={FAULT_ROWS}"], sections=("export",))
    source = finished.source()
    tokenizer = finished.tokenizer(source)
    trained = measure_trained(finished, source, tokenizer, rows_to_verify(finished, tokenizer), Clock())
    bars = []
    for what, spoil in {"none": dict, **FAULTS}.items():
        said, spoiled = "", spoil(read_updates(run / "adapter"))
        try:
            with mock.patch("qlora_train.export.tensors.read_updates", return_value=spoiled):
                run_export(finished, fresh(FOLDER / "fault"), measured=trained)
        except ModelError as error:
            said = str(error)
        caught = float(bool(said) if what == "none" else "is not the trained one" in said)
        if what == "none":
            bars.append(Bar("no fault planted: refused", caught, at_most=0))
        else:
            bars.append(Bar(f"planted fault, {what}: refused", caught, at_least=1, note=said.partition(": ")[2][:100]))
    return bars


def _half_of_one(updates: Mapping[str, Any]) -> dict[str, Any]:
    name = f"{LAYER}.mlp.up_proj.weight"
    return {**updates, name: dataclasses.replace(updates[name], scaling=updates[name].scaling / 2)}


def _half(updates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.replace(update, scaling=update.scaling / 2) for name, update in updates.items()}


def _one_missing(updates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: update for name, update in updates.items() if name != f"{LAYER}.mlp.up_proj.weight"}


def _swapped(updates: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers of one shape: in this model k and v."""
    one, other = (f"{LAYER}.self_attn.{name}_proj.weight" for name in "kv")
    return {**updates, one: updates[other], other: updates[one]}


FAULTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "half the scale": _half,
    "half the scale of one module": _half_of_one,
    "one module missing": _one_missing,
    "k and v swapped in one layer": _swapped,
}


def _spelling(full: bool) -> tuple[Path, str]:
    """A run of the recipe: that of the main job, where it is one of now; else one made here, short unless `full`."""
    if not full and earlier(SPELLING, RECIPE) is not None:
        return SPELLING, EARLIER
    run = fresh(FOLDER / "spelling")
    short = [] if full else [
        f"data.max_train_rows={SHORT_ROWS}",
        f"data.max_eval_rows={SHORT_EVAL_ROWS}",
        "eval.generate_rows=0",
    ]  # fmt: skip
    verb("train", "recipes/spelling.yaml", f"run.dir={run}", *short)
    return run, "" if full else f"trained on {SHORT_ROWS} rows only"
