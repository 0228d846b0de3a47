"""Where things are: the names inside a run folder, and the cache."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

_STEP_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class RunDir:
    """The names inside a run folder. Every path of a run is asked for here."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, with the origin of every value."""
        return self.root / "recipe.resolved.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device and threads."""
        return self.root / "environment.json"

    @property
    def base(self) -> Path:
        """Fingerprint of the base and the table of what was quantised."""
        return self.root / "base.json"

    @property
    def low_rank(self) -> Path:
        """Folder of the base in low-rank factors (model.lord_keep_frac), whose quantised form is what was trained."""
        return self.root / "low_rank_base"

    @property
    def data(self) -> Path:
        """The account of the data: counts, sources, duplicates, packing."""
        return self.root / "data.json"

    @property
    def fates(self) -> Path:
        """One JSON line for each row that is not trained on whole, with the reason."""
        return self.root / "fates.jsonl"

    @property
    def rejected(self) -> Path:
        """The rows that `data.bad_rows: skip` left out, as they were written, with the reason."""
        return self.root / "rejected.jsonl"

    @property
    def audit_page(self) -> Path:
        """The account of the data as a page to read."""
        return self.root / "audit.html"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """Folder of what trackers (run.trackers) keep on this machine."""
        return self.root / "trackers"

    @property
    def chat_template(self) -> Path:
        """The chat template that the rows were rendered with, where there is one."""
        return self.root / "chat_template.jinja"

    @property
    def evaluation(self) -> Path:
        """Base against adapter on held-out rows."""
        return self.root / "eval.json"

    @property
    def memory(self) -> Path:
        """What the run planned to hold in memory, and what it held: train/memory.py says how it is laid out."""
        return self.root / "memory.json"

    @property
    def summary(self) -> Path:
        """What came of the run; written last: its presence says that the run is complete."""
        return self.root / "run.json"

    @property
    def exports(self) -> Path:
        """One JSON line per export: what was merged, and the verdict."""
        return self.root / "exports.jsonl"

    @property
    def report_page(self) -> Path:
        """The run as a page to read."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of a `step-000012` folder for each checkpoint."""
        return self.root / "ckpt"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / _step_name(step)

    def checkpoint_steps(self) -> dict[int, Path]:
        """Published checkpoints by step, oldest first, verified or not."""
        return _step_folders(self.checkpoints)

    @property
    def adapter(self) -> Path:
        """The adapter that export, eval and chat use, in PEFT's format: the best by held-out loss, else the last."""
        return self.root / "adapter"

    @property
    def resumes(self) -> Path:
        """One JSON line each time that the run went on: from where, and what was not as before."""
        return self.root / "resumes.jsonl"

    @property
    def replays(self) -> Path:
        """One JSON line each time that logged steps were made again: what was compared, where, and the verdict."""
        return self.root / "replays.jsonl"

    @property
    def errors(self) -> Path:
        """One JSON line for each error, signal or bug of ours that ended a process which held the folder."""
        return self.root / "errors.jsonl"

    @property
    def flights(self) -> Path:
        """Folder of `step-000012` folders: what is known of steps that came to no finite number."""
        return self.root / "flight"

    def flight(self, step: int) -> Path:
        """The record of a step that came to no finite number."""
        return self.flights / _step_name(step)

    def flight_steps(self) -> dict[int, Path]:
        """Published flight records by step, verified or not."""
        return _step_folders(self.flights)

    @property
    def lock(self) -> Path:
        """Held while a process writes to the folder."""
        return self.root / ".lock"

    def facts(self) -> tuple[Path, ...]:
        """What a run writes before its first checkpoint, and writes anew when it starts again."""
        return (
            *(self.recipe, self.environment, self.base, self.evaluation, self.metrics, self.memory),
            *(self.data, self.fates, self.rejected, self.audit_page, self.errors, self.flights),
            *(self.chat_template, self.checkpoints, self.trackers, self.report_page, self.lock, self.low_rank),
        )


def cache_dir() -> Path:
    """QLORA_TRAIN_CACHE, else the XDG cache, else a folder of this user under the temporary directory."""
    if explicit := os.environ.get("QLORA_TRAIN_CACHE"):
        return Path(explicit)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "qlora_train"
    try:
        return Path.home() / ".cache" / "qlora_train"
    except RuntimeError:  # no HOME and no entry in the user database
        return Path(tempfile.gettempdir()) / f"qlora_train-{os.getuid()}"


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _step_folders(folder: Path) -> dict[int, Path]:
    """The folders that are named after a step, by step."""
    named = [(_STEP_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))
