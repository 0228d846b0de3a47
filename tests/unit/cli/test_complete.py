"""What the shell offers: recipes, keys and values; asked for as bash does, in a process that never loads torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.cli import complete
from qlora_train.recipe.advice import KEYS

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "accelerate")


def offered(incomplete: str, *before: str) -> list[str]:
    context: Any = SimpleNamespace(params={"overrides": list(before)})
    return [value for value, _ in complete.overrides(context, incomplete)]


def test_every_key_is_offered_with_its_meaning() -> None:
    context: Any = SimpleNamespace(params={})
    keys = dict(complete.overrides(context, ""))
    assert set(keys) == {f"{section}.{key}=" for section, names in KEYS.items() for key in names}
    assert all(keys.values()), "each has a description"


@pytest.mark.parametrize(
    ("incomplete", "before", "expected"),
    [
        ("train.adam", (), ["train.adam_beta1=", "train.adam_beta2="]),
        ("train.lea", (), ["train.learning_rate=", "train.learning_rate=0.0002"]),
        ("train.schedule=", (), ["train.schedule=linear", "train.schedule=cosine", "train.schedule=constant"]),
        ("quant.doub", (), ["quant.double_quant=true", "quant.double_quant=false"]),
        ("train.compile=", (), ["train.compile=auto", "train.compile=true", "train.compile=false"]),
        ("run.trackers=", (), ["run.trackers=tensorboard", "run.trackers=wandb", "run.trackers=trackio"]),
        ("data.split", (), ["data.split=", "data.split=null"]),
        ("co", ("train.epochs=2", "train.schedule", "="), ["linear", "cosine", "constant"]),
        ("x", ("no.such", "="), []),
        ("nothing", (), []),
        ("train.nothing=", (), []),
    ],
)
def test_what_fits_is_offered(incomplete: str, before: tuple[str, ...], expected: list[str]) -> None:
    assert offered(incomplete, *before) == expected


def test_recipes_are_offered_through_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes/a.yaml", "recipes/b.yml", "recipes/deep/c.yaml", "recipes/notes.md", "here.yaml", ".no.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert complete.recipes("") == ["here.yaml", "recipes/a.yaml", "recipes/b.yml"]
    assert complete.recipes("rec") == complete.recipes("recipes") == ["recipes/a.yaml", "recipes/b.yml"]
    assert complete.recipes("recipes/") == ["recipes/a.yaml", "recipes/b.yml", "recipes/deep/c.yaml"]
    assert complete.recipes("recipes/d") == ["recipes/deep/c.yaml"]
    assert complete.recipes(f"{tmp_path}/h") == [f"{tmp_path}/here.yaml"]
    assert complete.recipes("gone/x") == []


def test_run_folders_and_cards_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one/recipe.resolved.yaml", "runs/two/recipe.resolved.yaml", "runs/merged/config.json"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    assert complete.runs("ru") == complete.runs("runs/") == ["runs/one", "runs/two"]
    assert complete.runs("runs/t") == ["runs/two"] and complete.runs("gone/x") == []
    assert complete.cards("rtx 409") == ["RTX 4090"] and complete.cards("no") == []


def test_bash_gets_its_answer_without_torch(tmp_path: Path) -> None:
    """The protocol of the installed completion script, for a key and for a value, in one process each."""
    program = (
        "import sys; sys.argv = ['qlora-train']\n"
        "from qlora_train.cli.main import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )

    def bash(*words: str) -> str:
        env = os.environ | {
            "_QLORA_TRAIN_COMPLETE": "complete_bash",
            "COMP_WORDS": "\n".join(("qlora-train", *words)),
            "COMP_CWORD": str(len(words)),
        }
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr.strip() == "[]"
        return done.stdout

    assert bash("train", "recipe.yaml", "train.lea").split() == ["train.learning_rate=", "train.learning_rate=0.0002"]
    assert bash("check", "recipe.yaml", "train.schedule", "=", "co").split() == ["cosine", "constant"]
    assert "qlora-train" not in bash("exp")
