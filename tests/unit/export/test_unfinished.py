"""Finished shards of a killed export: taken over only whole, and only for the same export."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from qlora_train.errors import MachineError, ModelError, RecipeError
from qlora_train.export.unfinished import finished_shards, shards_folder

KEY = {"adapter": "a", "tensors": [["w", [2, 2], "torch.bfloat16"]]}
NAME = "model-00001-of-00002.safetensors"


def leave(target: Path, *, noted: bool = True) -> Path:
    """What a killed process leaves: nothing after it is cleaned up."""
    folder = shards_folder(target)
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(b"weights")
    if noted:
        from qlora_train.export.unfinished import FinishedShards

        FinishedShards(folder).finish(NAME, KEY, hashlib.sha256(b"weights").hexdigest(), [{"name": "w"}])
    return folder


def test_a_whole_shard_is_taken_over_and_everything_goes_at_the_end(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    with finished_shards(tmp_path / "out") as finished:
        assert finished.take_over(NAME, KEY) == [{"name": "w"}] and finished.num_taken_over == 1
        assert finished.take_over("model-00002-of-00002.safetensors", KEY) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / NAME).write_bytes(b"weightz"),
        lambda folder: (folder / NAME).write_bytes(b"weight"),
        lambda folder: (folder / NAME).unlink(),
        lambda folder: (folder / f"{NAME}.json").write_text("{"),
        lambda folder: (folder / f"{NAME}.json").write_text("[]"),
        lambda folder: (folder / f"{NAME}.json").unlink(),
    ],
    ids=["a byte", "cut", "gone", "half a note", "no note", "unfinished"],
)
def test_anything_else_is_not(spoil: Any, tmp_path: Path) -> None:
    spoil(leave(tmp_path / "out"))
    with finished_shards(tmp_path / "out") as finished:
        assert finished.take_over(NAME, KEY) is None and finished.num_taken_over == 0


@pytest.mark.parametrize("change", [{"adapter": "b"}, {"tensors": []}, {"onto": "original"}])
def test_shards_of_another_export_are_not(change: dict[str, Any], tmp_path: Path) -> None:
    leave(tmp_path / "out")
    with finished_shards(tmp_path / "out") as finished:
        assert finished.take_over(NAME, {**KEY, **change}) is None


@pytest.mark.parametrize("error", [ModelError("wrong"), RecipeError("wrong"), MachineError("full"), MemoryError()])
def test_a_wrong_result_removes_them_and_nothing_else_does(tmp_path: Path, error: BaseException) -> None:
    """What found no room, no memory or no time goes on from them; leftovers of this target go in any case."""
    leave(tmp_path / "out")
    ours, others = tmp_path / ".tmp-out-123-0123abcd", tmp_path / ".tmp-out-b-123-0123abcd"
    ours.mkdir()
    others.mkdir()
    with pytest.raises(type(error)), finished_shards(tmp_path / "out"):
        assert not ours.exists() and others.exists()
        raise error
    gone = isinstance(error, ModelError | RecipeError)
    assert (list(tmp_path.iterdir()) == [others]) is gone and others.exists()


def test_two_exports_to_one_target_do_not_meet(tmp_path: Path) -> None:
    with (
        finished_shards(tmp_path / "out"),
        pytest.raises(MachineError, match="another process exports"),
        finished_shards(tmp_path / "out"),
    ):
        pass
    with finished_shards(tmp_path / "out"):
        pass
