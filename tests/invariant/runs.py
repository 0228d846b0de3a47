"""What the tests of resumed runs share: the straight run, copies of it, and what a run came to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from qlora_train.quant.fingerprint import hash_tensors

STEPS = 5  # of the straight run, with checkpoints of steps 2, 4 and 5


def state_digest(run: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, by file."""
    folder = run / "ckpt" / f"step-{step:06d}"
    digests = {}
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors = load_file(folder / name)
        digests[name] = hash_tensors(*(tensors[key] for key in sorted(tensors)))
    return digests


def logged(run: Path, kind: str) -> list[dict[str, object]]:
    """The lines of a kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[str]:
    """Loss, gradient norm, learning rate and tokens of every step, to the bit."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "num_supervised_tokens")
    return [" ".join(repr(line[key]) for key in keys) for line in logged(run, "train")]


def copy_until(straight: Path, target: Path, step: int) -> Path:
    """The run folder as it was when the process was killed after `step`'s checkpoint, in another place."""
    shutil.copytree(straight, target)
    run = target / "run"
    for path in (run / "ckpt").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    return target


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file with its bytes, but for the lock, which names who held it last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
