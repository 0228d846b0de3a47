"""What is written down when the program itself is at fault: the traceback, versions and machine, and the recipe."""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_train.artifacts.layout import RunDir, cache_dir
from qlora_train.printable import fit_to_show

FOLDER = "bugs"  # in the cache


def write_bug_report(error: BaseException, verb: str, options: Mapping[str, Any]) -> str:
    """Write the report into the cache, or else the temporary folder; a sentence that says where it is."""
    text = fit_to_show(_report(error, verb, options))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_dir() / FOLDER, Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return f"this is a bug of qlora-train; the report to send with it, without secrets: {folder / name}"
    return "this is a bug of qlora-train; no report could be written: send this traceback, and `qlora-train env`"


def _report(error: BaseException, verb: str, options: Mapping[str, Any]) -> str:
    parts = [f"qlora-train {verb}", *(f"{name}: {value}" for name, value in options.items())]
    parts.append("\n" + "".join(traceback.format_exception(error)))
    try:
        from qlora_train.environment import environment

        parts.append(json.dumps(environment(), indent=1))
    except Exception as second:  # whatever is broken, the first error is worth a report
        parts.append(f"the environment could not be read: {second}")
    for value in options.values():
        with suppress(OSError):  # a recipe that cannot be read must not hide the bug
            if isinstance(value, Path) and (recipe := _recipe_of(value)):
                parts.append(f"\n{recipe}:\n{recipe.read_text(encoding='utf-8', errors='replace')}")
    return "\n".join(parts) + "\n"


def _recipe_of(path: Path) -> Path | None:
    """The recipe that an argument names, or that of the run folder it names."""
    recipe = RunDir(path).recipe if path.is_dir() else path
    return recipe if recipe.is_file() and recipe.suffix in (".yaml", ".yml") else None
