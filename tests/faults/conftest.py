"""What the tests of killed and starved runs share: a process to fork from, and an undisturbed run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commandline import run_cli, write_recipe
from tests.faults.harness import (
    Launcher,
    Point,
    Scene,
    changing_points,
    points_of_save,
    trace_of_save,
    why_not_traceable,
)
from tests.spoil import SECRETS
from tests.tiny import build_tiny_llama


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts runs in processes of their own."""
    launcher = Launcher(tmp_path_factory.mktemp("children"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def scene(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Scene:
    """An undisturbed run, and copies of its folder to spoil."""
    return Scene(launcher, tmp_path_factory.mktemp("scene"), tiny_llama_dir)


@pytest.fixture(scope="session")
def traceable() -> None:
    """Skip, with the reason, where strace cannot be used."""
    if reason := why_not_traceable():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def save_trace(traceable: None, scene: Scene) -> Path:
    """What strace saw from the beginning of a save to the end of the run."""
    return trace_of_save(scene)


@pytest.fixture(scope="session")
def save_points(save_trace: Path) -> list[Point]:
    """Every call that changes files while a checkpoint is saved."""
    return points_of_save(changing_points(save_trace))


@pytest.fixture
def model(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A sound model to be spoilt."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps and its export, made while secrets were in the environment. Never written to.

    `said` holds all that was printed. `spoil.copy_job` copies it.
    """
    folder = tmp_path_factory.mktemp("faults") / "job"
    changes = {"train__max_steps": 2, "train__save_every": 1, "eval__generate_rows": 1, "eval__max_new_tokens": 1}
    recipe = write_recipe(folder, build_tiny_llama(folder / "model"), **changes)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        outcomes = [run_cli("train", recipe), run_cli("export", folder / "run", folder / "out"), run_cli("env")]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes[0].err + outcomes[1].err
    (folder / "said").write_text("".join(outcome.out + outcome.err for outcome in outcomes))
    return folder
