"""A line in the run folder for each merge: what was exported where, and the verdict on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from qlora_train.artifacts.files import append_json_line
from qlora_train.errors import MachineError
from qlora_train.export.tensors import adapter_sha256
from qlora_train.export.verify import Verdict
from qlora_train.model.trained import FinishedRun


def record_export(
    run: FinishedRun, target: Path, verdict: Verdict, say: Callable[[str], None], stored: str | None = None
) -> None:
    """Append to exports.jsonl how the weights are stored (default: export.export_dtype), and the verdict.

    A run folder that cannot be written to does not undo an export: the line is missing, and `say` hears of it.
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
    try:
        append_json_line(run.run_dir.exports, line)
    except MachineError as error:
        say(f"the run's report will not know of this export: {error.problems[0].what}")
