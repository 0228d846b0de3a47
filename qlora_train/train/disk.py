"""Before anything is loaded: is there room for what the run folder will hold?"""

from __future__ import annotations

import shutil
from typing import Any

from qlora_train.artifacts import RunDir
from qlora_train.errors import MachineError
from qlora_train.memory.estimate import Request, Shallow
from qlora_train.memory.exhausted import size_text
from qlora_train.memory.stages import disk_terms
from qlora_train.memory.terms import Term
from qlora_train.recipe.schema import Recipe

IN_RUN_FOLDER = ("checkpoints", "adapter")  # causes of memory/stages.py; exports and caches lie elsewhere


def refuse_full_disk(recipe: Recipe, config: Any, run_dir: RunDir) -> None:
    """MachineError, with the bytes by cause, when checkpoints and adapter will not fit on the disk of the run folder.

    What an earlier part of the run wrote counts as room: it makes way for what comes. A merged export may go to another
    disk; the rehearsal warns where it will not fit on this one. Costs tenths of a second.
    """
    terms = folder_terms(recipe, config)
    needed = sum(term.num_bytes for term in terms)
    folder = next(path for path in (run_dir.root, *run_dir.root.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    written = sum(path.stat().st_size for path in run_dir.checkpoints.rglob("*") if path.is_file())
    if needed <= free + written:
        return
    causes = "; ".join(f"{term.cause}: {size_text(term.num_bytes)} ({term.source})" for term in terms)
    raise MachineError(
        f"{run_dir.root} will hold {size_text(needed)}, and {size_text(free + written)} are free for it: {causes}",
        fix="free space there, choose another run.dir, or lower train.keep or adapter.r; nothing was written",
    )


def folder_terms(recipe: Recipe, config: Any) -> tuple[Term, ...]:
    """What the run folder will hold, by cause; empty for a model that cannot be traced."""
    try:
        terms = tuple(disk_terms(request := Request(recipe, config, "cpu"), Shallow(request)))
    except Exception:  # foresight only: the rehearsal writes a real checkpoint
        return ()
    return tuple(term for term in terms if term.cause in IN_RUN_FOLDER)
