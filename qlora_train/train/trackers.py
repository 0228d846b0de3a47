"""Where else the curves of a run go: TensorBoard, wandb, trackio, through accelerate. None of them can end a run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from qlora_train.artifacts.files import explained, make_folder, read_json, write_json
from qlora_train.artifacts.layout import RunDir
from qlora_train.recipe.load import recipe_as_dict
from qlora_train.recipe.schema import Recipe
from qlora_train.train.metrics import Reporter


@dataclass
class _Tracker:
    """One tracker of accelerate's, started by us: accelerate starts all or none, and one that fails takes the others
    with it."""

    name: str
    tracker: GeneralTracker
    continued: bool  # goes on with what an earlier part of this run sent
    purges: bool  # steps that are sent again replace the earlier ones
    working: bool = True


class _Trackio(TrackioTracker):
    """accelerate's leaves the run open for the end of the process, which then writes to stdout."""

    def finish(self) -> None:
        """Close the run for good."""
        importlib.import_module("trackio").finish()


class Trackers:
    """Sends on what metrics.jsonl gets. What fails is said once and left alone; metrics.jsonl stays whole."""

    def __init__(self, trackers: list[_Tracker], reporter: Reporter) -> None:
        self._trackers, self._reporter = trackers, reporter

    def log(self, kind: str, step: int, values: dict[str, Any], *, again: bool = False) -> None:
        """The values of a step under `train/` or `eval/`; `again`: an earlier part of this run came as far."""
        shown = _shown(kind, values)
        for one in self._trackers:
            if one.working and not (again and one.continued and not one.purges):
                self._guarded(one, partial(one.tracker.log, shown, step=step), f"failed at step {step}")

    def start(self, config: dict[str, bool | int | float | str]) -> None:
        """Begin the tracker runs, each with the recipe."""
        for one in self._trackers:
            self._guarded(one, one.tracker.start, "did not start")
            if one.working and not (one.continued and one.purges):  # whose folder has it already
                self._guarded(one, partial(one.tracker.store_init_configuration, config), "did not start")
            if one.working:
                self._reporter.message(f"tracker {one.name}: {_SEE[one.name](one.tracker)}")

    def finish(self) -> None:
        """Let each send what it still holds."""
        for one in self._trackers:
            if one.working:
                self._guarded(one, one.tracker.finish, "failed at the end")

    def _guarded(self, one: _Tracker, call: Callable[[], None], what: str) -> None:
        """Call a tracker. It may print nothing: stdout is for results."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call()
        except Exception as error:  # whatever a tracker raises, training is worth more
            one.working = False
            self._reporter.warning(
                f"tracker {one.name} {what}, the run goes on without it and metrics.jsonl stays complete: "
                f"{str(error).strip() or type(error).__name__}"
            )


@contextlib.contextmanager
def tracking(recipe: Recipe, run_dir: RunDir, reporter: Reporter, *, resumed: bool, step: int) -> Iterator[Trackers]:
    """The trackers of `run.trackers` for a run that goes on after `step`. Nothing is written where there are none.

    A resumed run goes on in the same tracker runs: TensorBoard hides the steps after `step` that it had, the others
    keep them.
    """
    trackers = Trackers(_build(recipe, run_dir, resumed=resumed, step=step), reporter)
    trackers.start(flat_config(recipe))
    try:
        yield trackers
    finally:
        trackers.finish()


def flat_config(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The recipe as `section.key` to a plain value, as every tracker takes it: lists and null as JSON text."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, values in recipe_as_dict(recipe).items()
        for key, value in values.items()  # type: ignore[attr-defined]
    }


def _build(recipe: Recipe, run_dir: RunDir, *, resumed: bool, step: int) -> list[_Tracker]:
    names, project, folder = recipe.run.trackers, recipe.run.tracker_project, run_dir.trackers
    if not names:
        return []
    identity = folder / "run.json"
    known = read_json(identity) if resumed and identity.is_file() else {"id": secrets.token_hex(4), "trackers": []}
    if not resumed:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with explained(folder):
        make_folder(folder)
    write_json(identity, {"id": known["id"], "trackers": sorted({*known["trackers"], *names})})
    run_name = run_dir.root.name
    built = []
    for name in names:
        continued = name in known["trackers"]
        tracker: GeneralTracker
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        elif name == "wandb":
            settings = {"console": "off", "silent": True}
            tracker = WandBTracker(
                project, id=known["id"], name=run_name, dir=str(folder), resume="allow", settings=settings
            )
        else:
            # trackio finds a run by its name, and takes the latest of several.
            own_name, resume = f"{run_name}-{known['id']}", "allow" if continued else "never"
            tracker = _Trackio(project, name=own_name, resume=resume, embed=False)
        built.append(_Tracker(name, tracker, continued, purges=name == "tensorboard"))
    return built


def _shown(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """What trackers plot of a line of metrics.jsonl."""
    if kind == "eval":
        return {"eval/loss": values["eval_loss"]}
    shown = {f"train/{key}": values[key] for key in ("loss", "grad_norm", "learning_rate", "peak_memory_gib")}
    for key in ("tokens", "supervised_tokens"):
        shown[f"train/{key}_per_s"] = values[f"num_{key}"] / values["step_s"]
    return shown


def _see_wandb(tracker: Any) -> str:
    run = tracker.tracker
    return run.url or f"kept offline, send it with: wandb sync {Path(run.dir).parent}"


_SEE: dict[str, Callable[[Any], str]] = {
    "tensorboard": lambda tracker: f"see it with: tensorboard --logdir {tracker.logging_dir}",
    "wandb": _see_wandb,
    "trackio": lambda tracker: f"run {tracker.tracker.name}, see it with: trackio show --project {tracker.run_name}",
}
