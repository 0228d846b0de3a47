"""Before anything is loaded: is there room for what the run folder will hold?"""

from __future__ import annotations

import shutil
from typing import Any

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError
from qlora_train.memory.estimate import Request, Shallow
from qlora_train.memory.stages import disk_terms
from qlora_train.memory.terms import Term
from qlora_train.recipe.schema import Recipe
from qlora_train.units import size_text

IN_RUN_FOLDER = ("checkpoints", "adapter", "decomposed base")  # causes of memory/stages.py; caches lie elsewhere
EXPORT = "merged model"


def refuse_full_disk(recipe: Recipe, config: Any, run_dir: RunDir) -> str | None:
    """MachineError, with the bytes by cause, when checkpoints and adapter will not fit on the disk of the run folder.

    A warning to show where they fit, and the merged model of an export would not fit beside them; it may go to another
    disk. What an earlier part of the run wrote counts as room: it makes way for what comes. Costs tenths of a second.
    """
    terms = disk_terms_of(recipe, config)
    kept = [term for term in terms if term.cause in IN_RUN_FOLDER]
    export_bytes = sum(term.num_bytes for term in terms if term.cause == EXPORT)
    needed = sum(term.num_bytes for term in kept)
    folder = next(path for path in (run_dir.root, *run_dir.root.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    free += sum(path.stat().st_size for path in run_dir.checkpoints.rglob("*") if path.is_file())
    causes = "; ".join(f"{term.cause}: {size_text(term.num_bytes)} ({term.source})" for term in kept)
    if needed > free:
        raise MachineError(
            f"{run_dir.root} will hold {size_text(needed)}, and {size_text(free)} are free for it: {causes}; an export "
            f"there needs {size_text(export_bytes)} more",
            fix="free space there, choose another run.dir, or lower train.keep or adapter.r; nothing was written",
        )
    if needed + export_bytes > free:
        return (
            f"{run_dir.root} will hold {size_text(needed)}, and an export {size_text(export_bytes)}: {size_text(free)} "
            "are free there for both. Export to another disk, or free space until then"
        )
    return None


def disk_terms_of(recipe: Recipe, config: Any) -> tuple[Term, ...]:
    """What a run and its export take of disks, by cause; empty for a model that cannot be traced."""
    try:
        return tuple(disk_terms(request := Request(recipe, config, "cpu"), Shallow(request)))
    except Exception:  # foresight only: the rehearsal writes a real checkpoint
        return ()
