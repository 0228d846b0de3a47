"""From run folders to a page on disk; a file that is not a page of ours is never written over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_train.artifacts.files import write_file
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, RecipeError
from qlora_train.report.facts import RunFacts, read_runs
from qlora_train.report.page import GENERATOR, MAX_RUNS, render_page
from qlora_train.report.story import comparability, sentence

_HEAD_BYTES = 2000  # in which a page names its generator


@dataclass(frozen=True)
class ReportedRun:
    """What the page's head says of one run."""

    name: str
    sentence: str
    is_complete: bool
    base_loss: float | None
    adapter_loss: float | None
    merge_accepted: bool | None  # None: not exported
    notes: tuple[str, ...]  # what is absent or damaged


@dataclass(frozen=True)
class ReportResult:
    """A page, and what it says of its runs."""

    page: Path
    num_bytes: int
    runs: tuple[ReportedRun, ...]
    warnings: tuple[str, ...]  # why figures of several runs do not compare


def write_report(folders: Sequence[Path], target: Path | None) -> ReportResult:
    """Write the page of these runs; see `api.report` for what it raises."""
    if not folders:
        raise RecipeError("no run was named", fix="qlora-train report RUN [RUN2 ...]")
    if len(folders) > MAX_RUNS:
        raise RecipeError(
            f"{len(folders)} runs on one page are more than a reader can tell apart", fix=f"name at most {MAX_RUNS}"
        )
    runs = read_runs(folders)
    page = target or (RunDir(folders[0]).report_page if len(folders) == 1 else Path(RunDir(Path()).report_page.name))
    _refuse_other_file(page)
    content = render_page(runs).encode()
    write_file(page, content)
    return ReportResult(
        page=page,
        num_bytes=len(content),
        runs=tuple(_reported(run) for run in runs),
        warnings=tuple(comparability(runs)) if len(runs) > 1 else (),
    )


def _refuse_other_file(page: Path) -> None:
    """A page of ours may be written over, and nothing else."""
    if page.is_dir():
        raise RecipeError(f"{page} is a folder", fix=f"name a file: --out {page / 'report.html'}")
    if not page.exists():
        return
    try:
        with page.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise MachineError(f"cannot read {page}: {error.strerror}", fix="choose another file with --out") from error
    if f'<meta name="generator" content="{GENERATOR}">'.encode() not in head:
        raise RecipeError(f"{page} exists and is no report page", fix="choose another file with --out")


def _reported(run: RunFacts) -> ReportedRun:
    base, adapter = (run.evaluation.base, run.evaluation.adapter) if run.evaluation else (None, None)
    return ReportedRun(
        name=run.name,
        sentence=sentence(run),
        is_complete=run.summary is not None,
        base_loss=base.loss if base else None,
        adapter_loss=adapter.loss if adapter else None,
        merge_accepted=run.export.accepted if run.export else None,
        notes=run.notes,
    )
