"""A resume goes on with exactly the rows that would have come, or not at all."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.adapters.hooks import NO_HOOKS
from qlora_train.data.loader import Loader
from qlora_train.errors import ResumeError
from qlora_train.recipe.schema import DataSection, ModelSection, Recipe, RunSection, SourceSection, TrainSection
from qlora_train.train import loop
from qlora_train.train.job import Job
from qlora_train.train.loop import check_position, run_loop
from qlora_train.train.state import TrainState
from qlora_train.train.step import StepResult
from tests.loading import CPU
from tests.packs import table_of


def loader_of(seed: int = 0) -> Loader:
    """Packs of at most 10: (8), (5, 5), (5, 5) in some order, one a step."""
    return Loader(table_of([5, 8, 5, 5, 5]), "packed", 1, 1, 0, seed, seq_len=10)


def test_the_position_of_a_checkpoint_must_be_the_loader_s() -> None:
    loader = loader_of()
    rows = [len(loader.step(step)[0].row_ids) for step in range(6)]
    assert sorted(rows[:3]) == sorted(rows[3:]) == [1, 2, 2]
    digests = [loader.plan_digest(0)] * 3 + [loader.plan_digest(3)] * 3 + [loader.plan_digest(6)]
    for step in range(7):
        check_position(loader, TrainState(step=step, num_rows=sum(rows[:step]), plan_sha256=digests[step]))
    with pytest.raises(ResumeError, match="6 rows were consumed by step 3, 5 in today's order"):
        check_position(loader, TrainState(step=3, num_rows=6, plan_sha256=digests[3]))


def test_as_many_rows_in_another_order_are_refused() -> None:
    then, now = loader_of(seed=1), loader_of()
    state = TrainState(step=3, num_rows=5, plan_sha256=then.plan_digest(3))
    check_position(then, state)
    with pytest.raises(ResumeError, match="library versions that began the run") as caught:
        check_position(now, state)
    assert f"{now.plan_digest(3)[:16]} today" in str(caught.value)
    assert f"was {then.plan_digest(3)[:16]}" in str(caught.value)


def test_a_new_run_has_no_order_to_compare() -> None:
    check_position(loader_of(), TrainState())


def test_the_loop_saves_the_order_of_the_next_step_s_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved: list[TrainState] = []

    def list_of(*_: Any) -> list[str]:
        return []

    def step_of(_causal: Any, batches: Any, *_: Any, **__: Any) -> StepResult:
        return StepResult(1.0, 1.0, sum(len(batch.row_ids) for batch in batches), 1, 1)

    monkeypatch.setattr(loop, "train_step", step_of)
    monkeypatch.setattr(loop, "save_checkpoint", lambda _run_dir, state, *_: saved.append(replace(state)) or anything)
    monkeypatch.setattr(loop, "retire_old", lambda *_: None)
    monkeypatch.setattr(loop, "trained_values_are_finite", lambda _: True)
    recipe = Recipe(
        model=ModelSection(path="/models/tiny"),
        data=DataSection(train=(SourceSection(path="a.jsonl"),)),
        train=TrainSection(epochs=1e9, max_steps=4, save_every=1),
        run=RunSection(dir=tmp_path),
    )
    names = ("train", "step", "write", "sync", "saved_in", "check", "as_dict")
    anything: Any = SimpleNamespace(
        **{name: lambda *_, **__: None for name in names}, device=CPU, peak_bytes=0, folder=tmp_path
    )
    anything.during, anything.wants_checkpoint, anything.save_requested = lambda *_: nullcontext(), False, False
    monkeypatch.setattr(loop, "FlightRecorder", lambda *_: SimpleNamespace(recording=anything.during, note=list_of))
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    names = [field.name for field in fields(Job)]
    parts: dict[str, Any] = dict.fromkeys(names, anything)
    parts |= {"recipe": recipe, "loader": loader_of(), "eval_table": None, "optimizer": optimizer, "hooks": NO_HOOKS}
    run_loop(Job(**parts), TrainState(), anything, anything, anything, command="")
    digests = [loader_of().plan_digest(step) for step in (1, 2, 3, 4)]
    assert [(state.step, state.plan_sha256) for state in saved] == list(zip((1, 2, 3, 4), digests, strict=True))
    assert digests[0] == digests[1] != digests[2] == digests[3]
