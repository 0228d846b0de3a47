"""The command line called in this process: exit code, stdout, stderr. And recipes over the tiny model."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTIONS = ("list files", "show the date", "print the text", "remove a file", "find a word", "count lines")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run_cli(*arguments: str | Path) -> Outcome:
    """`qlora-train ARGUMENTS`, in this process: imports are paid once."""
    from qlora_train.cli import results
    from qlora_train.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        results.stdout.file = out
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Short conversations of unequal length, all different."""
    rows = []
    for index in range(start, start + count):
        question = QUESTIONS[index % len(QUESTIONS)] + f" number {index}"
        answer = "ls " * (1 + index % 5) + str(index)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe over a tiny model with 20 rows to train on and 6 held out; `changes` are `section__key=value`."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "compute_dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": ["train.jsonl"], "eval": ["test.jsonl"], "seq_len": 96},
        "train": {"micro_batch_size": 1, "grad_accum_steps": 2, "learning_rate": 0.01, "save_every": 2, "epochs": 1},
        "eval": {"every": 0, "generate_rows": 2, "max_new_tokens": 4, "batch_size": 3},
        "export": {"verify_rows": 6},
        "run": {"dir": "run"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    if not sections["eval"]["generate_rows"] and "eval__max_new_tokens" not in changes:
        del sections["eval"]["max_new_tokens"]
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", chat_rows(20))
    if not (folder / "test.jsonl").exists():
        write_rows(folder / "test.jsonl", chat_rows(6, start=100))
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(sections, indent=1), encoding="utf-8")
    return path
