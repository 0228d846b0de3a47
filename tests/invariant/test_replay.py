"""`train --resume --replay`: a logged step made again, held against the log; nothing of the run changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.commandline import run_cli
from tests.invariant.runs import contents, copy_until


def edit_loss(run: Path, step: int, factor: float) -> None:
    """Let the log say something else of a step."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and line["step"] == step:
            line["loss"] *= factor
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_last_steps_are_made_again_to_the_bit(straight: Path) -> None:
    before = contents(straight / "run")
    outcome = run_cli("train", straight / "recipe.yaml", "--resume", "--replay", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["from_step"], found["level"], found["compared_with"], found["same_adapter"]) == (4, "D2", 5, True)
    assert [step["step"] for step in found["steps"]] == [5] and found["steps"][0]["is_equal"]
    assert contents(straight / "run") == before


def test_from_a_step_to_the_next_checkpoint(straight: Path) -> None:
    outcome = run_cli("train", straight / "recipe.yaml", "--resume", "--replay", "--from", "2")
    assert outcome.code == 0 and "2 logged steps, from the checkpoint of step 2" in outcome.out, outcome.err
    assert "step 4: equal to the bit" in outcome.out and "D2: equal to the bit" in outcome.out


@pytest.mark.parametrize(("factor", "code", "level"), [(1 + 1e-9, 0, "D1"), (1.001, 5, "D0")])
def test_another_loss_is_told_by_its_distance(
    straight: Path, tmp_path: Path, factor: float, code: int, level: str
) -> None:
    """Negative control: what is no rounding is refused."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    edit_loss(folder / "run", 5, factor)
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--replay")
    assert outcome.code == code and f"{level}: " in outcome.out, outcome.err
    assert code == 0 or "step 5 is not the one that was logged" in outcome.err


@pytest.mark.slow
def test_without_a_later_step_the_first_one_is_made_again(straight: Path, tmp_path: Path) -> None:
    """Whose start follows from the seed."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for step in (2, 4):
        shutil.rmtree(folder / "run" / "ckpt" / f"step-{step:06d}")
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--replay")
    assert outcome.code == 0 and "1 logged step, from the start" in outcome.out, outcome.err
    assert "D2: equal to the bit" in outcome.out


def test_another_recipe_and_no_run_are_refused(straight: Path, tmp_path: Path) -> None:
    outcome = run_cli("train", straight / "recipe.yaml", "--resume", "--replay", "run.seed=4")
    assert outcome.code == 5 and "run.seed" in outcome.err
    folder = copy_until(straight, tmp_path / "run", 2)
    shutil.rmtree(folder / "run")
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--replay")
    assert outcome.code == 5 and "nothing to replay" in outcome.err
    outcome = run_cli("train", folder / "recipe.yaml", "--replay")
    assert outcome.code == 2 and "--resume" in outcome.err
