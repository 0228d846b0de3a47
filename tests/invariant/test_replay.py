"""`train --resume --replay`: a logged step made again, held against the log; but for its record nothing changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_train.cli import show_replay
from qlora_train.train.replay import Replay, ReplayedStep, _two_steps
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


@pytest.fixture
def own(straight: Path, tmp_path: Path) -> Path:
    """A copy of the straight run, which a replay may write its record into."""
    return Path(shutil.copytree(straight, tmp_path / "own"))


def test_the_last_steps_are_made_again_to_the_bit(own: Path) -> None:
    run = own / "run"
    before = contents(run)
    outcome = run_cli("train", own / "recipe.yaml", "--resume", "--replay", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["from_step"], found["level"], found["compared_with"], found["same_adapter"]) == (4, "D2", 5, True)
    assert [step["step"] for step in found["steps"]] == [5] and found["steps"][0]["is_equal"]
    after = contents(run)
    entry = json.loads(after.pop(run / "replays.jsonl"))
    assert after == before
    assert {key: entry[key] for key in found if key != "run_dir"} == {k: v for k, v in found.items() if k != "run_dir"}
    assert entry["environment"] == json.loads((run / "environment.json").read_text())


def test_from_a_step_to_the_next_checkpoint(own: Path) -> None:
    outcome = run_cli("train", own / "recipe.yaml", "--resume", "--replay", "--from", "2")
    assert outcome.code == 0 and "2 logged steps, from the checkpoint of step 2" in outcome.out, outcome.err
    assert "step 4: equal to the bit" in outcome.out and "D2: equal to the bit" in outcome.out


@pytest.mark.parametrize(("factor", "code", "level"), [(1 + 1e-9, 0, "D1"), (1.001, 5, "D0")])
def test_another_loss_is_told_by_its_distance(own: Path, factor: float, code: int, level: str) -> None:
    """Negative control: what is no rounding is refused. Either verdict is recorded, and the report shows it."""
    edit_loss(own / "run", 5, factor)
    outcome = run_cli("train", own / "recipe.yaml", "--resume", "--replay")
    assert outcome.code == code and f"{level}: " in outcome.out, outcome.err
    assert code == 0 or "step 5 is not the one that was logged" in outcome.err
    entry = json.loads((own / "run" / "replays.jsonl").read_text())
    assert entry["level"] == level and entry["steps"][0]["loss"] != entry["steps"][0]["logged_loss"]
    assert run_cli("report", own / "run").code == 0
    page = (own / "run" / "report.html").read_text()
    assert "step 5 made again from the checkpoint of step 4" in page and f"({level})" in page


@pytest.mark.slow
def test_without_a_later_step_the_first_one_is_made_again(straight: Path, tmp_path: Path) -> None:
    """Whose start follows from the seed."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for step in (2, 4):
        shutil.rmtree(folder / "run" / "ckpt" / f"step-{step:06d}")
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--replay")
    assert outcome.code == 0 and "2 logged steps, from the start" in outcome.out, outcome.err
    assert "D2: equal to the bit" in outcome.out


def test_lost_moments_are_no_rounding(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: step 5 has its loss and gradient norm before the update that the moments decide."""
    from qlora_train.train import checkpoint

    monkeypatch.setattr(checkpoint, "restore_optimizer", lambda *_: None)
    outcome = run_cli("train", own / "recipe.yaml", "--resume", "--replay", "--from", "4")
    assert outcome.code == 5 and "equal gradients, another update: the optimiser's state" in outcome.err, outcome.err
    assert "D0: " in outcome.out


def replay_of(*losses: float, same_adapter: bool | None = None, repeats: bool = True) -> Replay:
    """Steps that were logged with a loss of 1."""
    steps = tuple(
        ReplayedStep(i + 3, 1.0, loss, logged_grad_norm=2.0, grad_norm=2.0, same_tokens=True)
        for i, loss in enumerate(losses)
    )
    target = None if same_adapter is None else 2 + len(steps)
    return Replay(Path("run"), 2, steps, target, same_adapter, rounding=(), tolerance=1e-2, repeats=repeats)


def test_what_an_update_shows_and_what_only_a_gradient_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_of(1.0, 1.0).level == "D2" and replay_of(1.001, 1.001).level == "D1"
    for other in (replay_of(1.0, 1.001), replay_of(1.0, same_adapter=False)):
        assert other.level == "D0" and other.is_other_update
    assert replay_of(1.0, same_adapter=False, repeats=False).level == "D1", "a card adds up in any order"
    show_replay.replayed(replay_of(1.0))
    assert "as the undisturbed run would" not in capsys.readouterr().out
    show_replay.replayed(replay_of(1.0, 1.0))
    assert "as the undisturbed run would" in capsys.readouterr().out


def test_where_no_checkpoint_is_near_the_second_step_sees_the_update() -> None:
    assert _two_steps(3, {3: {}, 4: {}}) == (3, 4) and _two_steps(3, {3: {}}) == (3,)


def test_another_recipe_and_no_run_are_refused(straight: Path, tmp_path: Path) -> None:
    outcome = run_cli("train", straight / "recipe.yaml", "--resume", "--replay", "run.seed=4")
    assert outcome.code == 5 and "run.seed" in outcome.err
    folder = copy_until(straight, tmp_path / "run", 2)
    shutil.rmtree(folder / "run")
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--replay")
    assert outcome.code == 5 and "nothing to replay" in outcome.err
    outcome = run_cli("train", folder / "recipe.yaml", "--replay")
    assert outcome.code == 2 and "--resume" in outcome.err
