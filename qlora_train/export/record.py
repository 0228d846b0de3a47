"""A line in the run folder for each merge: what was exported where, and the verdict on it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from qlora_train.export.tensors import adapter_sha256
from qlora_train.export.verify import Verdict
from qlora_train.model.trained import FinishedRun


def record_export(run: FinishedRun, target: Path, verdict: Verdict, stored: str | None = None) -> None:
    """Append to exports.jsonl how the weights are stored (default: export.export_dtype), and the verdict.

    A run folder that cannot be written to does not undo an export: the line is missing.
    """
    line = {
        "folder": str(target.absolute()),
        "export_dtype": stored or run.recipe.export.export_dtype,
        "merged_onto": verdict.onto,
        "adapter_sha256": adapter_sha256(run),
        "accepted": verdict.accepted,
        "num_rows": verdict.num_rows,
        "split": verdict.split,
        "max_kl_frac": verdict.max_kl_frac,
        "merged": asdict(verdict.merged),
        "adapter_off": asdict(verdict.adapter_off),
    }
    with contextlib.suppress(OSError), run.run_dir.exports.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
