"""What is done to a run, and what is wrong with it afterwards: each case ends with "" or with words for what is wrong.

For the tests of killed and starved runs, and for `make prove WHAT=resume`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from qlora_train.artifacts.folders import MANIFEST, manifest_faults
from tests.faults.harness import STEP, Point, Scene, damaged, export_with_fault, leftovers, steps_of, with_fault

# Where a signal comes: before the n-th call of a function; and the step that is saved when the run has ended.
PHASES: dict[str, tuple[str, int, int | None]] = {
    "reading the rows": ("qlora_train.train.setup:load_splits", 1, None),
    "loading the base": ("qlora_train.train.setup:load_recipe_base", 1, None),
    "the selfcheck": ("qlora_train.train.run:selfcheck", 1, None),
    "the rehearsal": ("qlora_train.train.run:rehearse", 1, None),
    "the base's evaluation": ("qlora_train.train.loop:validate", 1, None),
    "a step": ("qlora_train.train.loop:train_step", 5, 5),
    "an evaluation": ("qlora_train.train.loop:validate", 2, 3),
    "a checkpoint": ("qlora_train.train.loop:save_checkpoint", 2, 3),
    "the last step": ("qlora_train.train.loop:train_step", 9, 9),
    "the adapter's answers": ("qlora_train.train.scores:score_side", 2, 9),
    "publishing": ("qlora_train.train.run:save_adapter", 1, 9),
}
OF_ROOM = ("ENOSPC", "EDQUOT", "EIO")  # of whose messages bytes are a part
CONTROLS = ("lose_moments", "restart_rows", "shift_rows", "count_dropout", "swap_micro_batches", "fuse_optimizer")


def kill_and_resume(scene: Scene, point: Point) -> str:
    """kill -9 before a call of a save."""
    before = max(steps_of(scene.folder / "before" / "run"))
    folder, ended = with_fault(scene, point.kill)
    if ended.signal != signal.SIGKILL:
        return f"not killed: {ended}"
    if spoilt := damaged(folder / "run"):
        return f"after the kill: {spoilt}"
    if not {before, STEP} & set(steps_of(folder / "run")):
        return f"after the kill there is neither the last checkpoint nor the new one: {steps_of(folder / 'run')}"
    return scene.finish(folder)


def fail_and_resume(scene: Scene, point: Point, error: str) -> str:
    """A call of a save fails: exit code 6, a message with path (and bytes, where it is of room), older ones stay."""
    before = max(steps_of(scene.folder / "before" / "run"))
    folder, ended = with_fault(scene, point.fail(error))
    if ended.code != 6 or f"step-{STEP:06d}" not in ended.said:
        return f"{ended}"
    if (" needed" in ended.said, "MiB free" in ended.said) != (error in OF_ROOM, error == "ENOSPC"):
        return f"{ended}"
    if (spoilt := damaged(folder / "run")) or before not in steps_of(folder / "run"):
        return f"after the error: {steps_of(folder / 'run')}, damaged: {spoilt}"
    return scene.finish(folder)


def kill_export(scene: Scene, clean: Path, point: Point) -> str:
    """kill -9 before a call of an export: its target is not there, or is whole; the next export is the clean one."""
    folder, ended = export_with_fault(scene, point.kill)
    if ended.signal != signal.SIGKILL and not (folder / "merged").exists():
        return f"not killed: {ended}"
    return _exported_again(scene, folder, clean)


def fail_export(scene: Scene, clean: Path, point: Point, error: str) -> str:
    """A call of an export fails: exit code 6, a message with the path, no more than finished shards are left."""
    folder, ended = export_with_fault(scene, point.fail(error))
    if ended.code != 6 or str(folder) not in ended.said or "Fix:" not in ended.said or "Traceback" in ended.said:
        return f"{ended}"
    if not (folder / "merged").exists() and (left := [name for name in leftovers(folder) if "-shards" not in name]):
        return f"left behind: {left}"
    return _exported_again(scene, folder, clean)


def _exported_again(scene: Scene, folder: Path, clean: Path) -> str:
    target = folder / "merged"
    if not target.exists():
        ended = scene.launcher.run("export", folder / "run", target)
        if ended.code != 0 or leftovers(folder):
            return f"the next export leaves {leftovers(folder)}: {ended}"
    # A card tells of the seconds that the export took.
    names = {path.name for path in (*target.iterdir(), *clean.iterdir())} - {"export.json", MANIFEST, "README.md"}
    differing = [n for n in sorted(names) if (target / n).read_bytes() != (clean / n).read_bytes()]
    return ", ".join([*manifest_faults(target), *differing])


def kill_somewhere(scene: Scene, draw: random.Random, times: int) -> str:
    """kill -9 at random moments of a run, so many times in a row."""
    folder = scene.before_start()
    for _ in range(times):
        child = scene.start(folder, *(["--resume"] if steps_of(folder / "run") else []))
        time.sleep(draw.uniform(0, scene.seconds))
        os.kill(child.pid, signal.SIGKILL)
        ended = child.ended()
        if ended.signal != signal.SIGKILL and ended.code != 0:
            return f"{ended}"
        if spoilt := damaged(folder / "run"):
            return f"after a kill: {spoilt}"
    return scene.finish(folder)


def stop_somewhere(scene: Scene, draw: random.Random) -> str:
    """SIGTERM at a random moment of a run: it ends by it, with a whole step saved if it had made one, or had ended."""
    folder = scene.before_start()
    child = scene.start(folder)
    time.sleep(draw.uniform(0, scene.seconds))
    os.kill(child.pid, signal.SIGTERM)
    ended = child.ended()
    began = ended.signal == signal.SIGTERM  # before the command line takes signals: the child was just forked
    if not began and (ended.code not in (0, 128 + signal.SIGTERM) or "Traceback" in ended.said):
        return f"{ended}"
    if wrong := [*damaged(folder / "run"), *leftovers(folder / "run")]:
        return f"left behind: {wrong}"
    steps = steps_of(folder / "run")
    if ended.code == 128 + signal.SIGTERM and steps and f"step-{steps[-1]:06d}; go on with --resume" not in ended.said:
        return f"{ended}"
    return scene.finish(folder)


def stop_and_resume(scene: Scene, phase: str, number: int) -> str:
    """A signal in a phase: the run ends with its state saved, and without a trace where it had none."""
    where, call, saved = PHASES[phase]
    folder = scene.before_start()
    ended = scene.train(folder, setups=[("signal_at", {"where": where, "call": call, "numbers": [number]})])
    if ended.code != 128 + number or "Traceback" in ended.said:
        return f"{ended}"
    steps, left = steps_of(folder / "run"), leftovers(folder / "run")
    if steps[-1:] != ([] if saved is None else [saved]) or left or (folder / "run" / "run.json").exists():
        return f"left behind: {steps}, {left}; {ended}"
    if (f"step-{saved:06d}; go on with --resume" if saved else "stopped") not in ended.said:
        return f"{ended}"
    return scene.finish(folder)


def lose_and_resume(scene: Scene, control: str) -> str:
    """A negative control: what a resume must not lose is lost, and the run ends well all the same."""
    return scene.finish(scene.before_save(), setups=[(control, {})])
