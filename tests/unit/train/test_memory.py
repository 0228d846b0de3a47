"""The log of a run's memory: plan against measurement, warnings with their cause, advice where memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import OutOfMemory
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import Recipe
from qlora_train.train import memory as module
from qlora_train.train.memory import MemoryLog, Phase
from qlora_train.train.metrics import Silent
from tests.commandline import write_recipe

MIB = 2**20


class Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_dir: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path, tiny_llama_dir), ()).recipe


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def log(recipe: Recipe, heard: Heard) -> MemoryLog:
    recipe.run.dir.mkdir()
    return MemoryLog(recipe, RunDir(recipe.run.dir), heard)


def phase(planned: int, measured: int, name: Any = "training") -> Phase:
    return Phase(
        name,
        planned,
        measured,
        planned_by_cause={"optimiser": 100, "activations": planned - 100},
        measured_by_cause={"optimiser": 90, "activations": measured - 90},
    )


def test_a_tenth_off_is_a_warning_that_names_the_cause() -> None:
    assert phase(100 * MIB, 109 * MIB).warning() is None and phase(100 * MIB, 91 * MIB).warning() is None
    for measured in (115 * MIB, 85 * MIB):
        text = phase(100 * MIB, measured).warning()
        assert text is not None and "training: 100 MiB planned" in text and "most of it in activations" in text
    assert phase(100 * MIB, 115 * MIB).difference_frac == pytest.approx(0.15)


def test_on_a_card_no_cause_is_made_up() -> None:
    text = Phase("training", 100, 200, planned_by_cause={"optimiser": 100}).warning()
    assert text is not None and "not told by cause" in text


def test_generation_is_planned_from_above() -> None:
    assert phase(100, 50, "generation").warning() is None
    assert phase(100, 150, "generation").warning() is not None


def test_without_a_plan_nothing_is_compared() -> None:
    alone = Phase("training", None, 3 * MIB)
    assert alone.difference_frac is None and alone.warning() is None and alone.summary() == "training: 3 MiB measured"


def test_a_warning_is_said_and_kept_once(log: MemoryLog, heard: Heard) -> None:
    log.phases["training"] = phase(100, 200)
    log.compare()
    log.compare()
    log.write()
    stored = json.loads((log._run_dir.memory).read_text())
    assert len(heard.warnings) == 1 and stored["warnings"] == heard.warnings
    assert stored["phases"][0]["difference_frac"] == 1.0 and stored["plan"] is None
    assert stored["peak"] > MIB < stored["resident"]["before"]


def test_other_errors_pass_through(log: MemoryLog) -> None:
    with pytest.raises(ValueError, match="not of memory"), log.during("training", "at step 1"):
        raise ValueError("not of memory")
    assert log._exhaustion is None and log._current == "loading", "the phase around it goes on"


def test_advice_fails_softly(log: MemoryLog, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is little memory to plan in: the error must come out whatever else fails."""

    def no_room(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "plan_training", no_room)
    monkeypatch.setattr(module, "write_json", no_room)
    with pytest.raises(OutOfMemory, match="use a machine with more"), log.during("training", "at step 1"):
        raise MemoryError
    assert any("MemoryError" in text for text in heard.warnings)


def test_the_innermost_place_is_named(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_planned", lambda *_, **__: None)
    with (
        pytest.raises(OutOfMemory, match="out of memory inside") as caught,
        log.during("training", "outside"),
        log.during("evaluation", "inside", lambda error: f"kept in spite of {type(error).__name__}"),
    ):
        raise MemoryError
    assert "kept in spite of MemoryError" in str(caught.value) and "outside" not in str(caught.value)
