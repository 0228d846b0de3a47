"""`make quickstart`: train, export and verify a real model on this machine, then show what came of it.

A second call goes on where the first one was stopped, and shows the result again when there is nothing left to do.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path("recipes/quickstart.yaml")
RUN = Path("runs/quickstart")
MERGED = Path("runs/quickstart-merged")
SAMPLES = 3


def run_verb(*arguments: str) -> None:
    """Show a command as a user would type it, and run it."""
    print(f"\n$ qlora-train {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "qlora_train", *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def summary(run: dict[str, Any], export: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The closing table: what, before, after."""
    base, adapter, check = run["base"], run["adapter"], export["verification"]
    return [
        (
            f"held-out loss, {adapter['num_rows']} rows (nats per token)",
            f"{base['loss']:.3f}",
            f"{adapter['loss']:.3f}",
        ),
        (
            f"character similarity of {adapter['scores']['num_answers']} answers",
            f"{base['scores']['char_similarity']:.3f}",
            f"{adapter['scores']['char_similarity']:.3f}",
        ),
        ("right program (first word)", f"{base['scores']['first_word']:.0%}", f"{adapter['scores']['first_word']:.0%}"),
        (
            "KL of the export from the trained model",
            f"{check['adapter_off']['mean_kl']:.2e} (adapter off)",
            f"{check['merged']['mean_kl']:.2e}",
        ),
    ]


def show(rows: list[tuple[str, str, str]], run: dict[str, Any]) -> None:
    """Print the table and sample answers."""
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    print(f"\n{'':{widths[0]}}  {'before':>{widths[1]}}  {'after':>{widths[2]}}")
    for what, before, after in rows:
        print(f"{what:{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}")
    pairs = list(zip(run["base"]["answers"], run["adapter"]["answers"], strict=True))
    for before, after in pairs[:SAMPLES]:
        print(f"\n  asked   {flat(before['asked'])}\n  before  {flat(before['text'])}\n  after   {flat(after['text'])}")
        print(f"  wanted  {flat(after['reference'])}")


def flat(text: str, limit: int = 100) -> str:
    """One line of text that cannot steer a terminal."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
    return line if len(line) <= limit else line[:limit] + "..."


def main() -> None:
    """Train, export, show."""
    started = time.perf_counter()
    checkpoints = any((ROOT / RUN / "ckpt").glob("step-*"))
    run_verb("train", str(RECIPE), *(["--resume"] if checkpoints else []))
    if (ROOT / MERGED).is_dir():
        print(f"\n{MERGED} exists: exported before")
    else:
        run_verb("export", str(RUN), str(MERGED))
    run = json.loads((ROOT / RUN / "run.json").read_text(encoding="utf-8"))
    export = json.loads((ROOT / MERGED / "export.json").read_text(encoding="utf-8"))
    show(summary(run, export), run)
    print(f"\n{time.perf_counter() - started:,.0f} s. Next: qlora-train chat {RUN}    (or {MERGED}, the merged model)")


if __name__ == "__main__":
    main()
