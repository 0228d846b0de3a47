"""Adapter folders as the tools read and leave them: whole or absent, and only where the base can be rebuilt."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from qlora_train.adapters.config import build_config
from qlora_train.adapters.fold import Delta
from qlora_train.adapters.updates import RescaledRows
from qlora_train.analysis import folder as module
from qlora_train.analysis.compress import Ask
from qlora_train.analysis.folder import OpenedAdapter, open_adapter, publish_adapter, refuse_other_bases
from qlora_train.analysis.thin import thin
from qlora_train.analysis.tools import combine_adapters, resize_adapter
from qlora_train.errors import MachineError, ModelError
from qlora_train.recipe.methods import METHODS
from tests.runfolders import write_adapter

DELTAS = {"m.layers.0.q_proj": Delta(torch.randn(2, 8), torch.randn(6, 2), 1.0)}


def peft_folder(folder: Path, *, modules: tuple[str, ...] = ("layers.0.q_proj",), width: int = 16) -> Path:
    folder.mkdir()
    tensors = {}
    for name in modules:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, width)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(24, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).save_pretrained(str(folder))
    return folder


def unbound(path: Path, method: str) -> OpenedAdapter:
    config = build_config(METHODS[method], {}, r=2, lora_alpha=2, target_modules=["q_proj"])
    return OpenedAdapter(path, path, config, None, None, None)


def test_an_adapter_on_a_residual_base_makes_no_other(tmp_path: Path) -> None:
    """Only PiSSA's own recipe takes its part out of the base again."""
    with pytest.raises(ModelError, match="took a part of the base into its start"):
        publish_adapter(tmp_path / "out", [unbound(tmp_path, "pissa")], DELTAS, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rounds", "takes"), [(1, False), (2, True)])
def test_loftq_takes_from_the_base_from_its_second_round_on(rounds: int, takes: bool, tmp_path: Path) -> None:
    config = build_config(METHODS["loftq"], {"start_iters": rounds}, r=2, lora_alpha=2, target_modules=["q_proj"])
    folder = peft_folder(tmp_path / "a")
    source = OpenedAdapter(folder, folder, config, None, None, None)
    if takes:
        with pytest.raises(ModelError, match="took a part of the base into its start"):
            publish_adapter(tmp_path / "out", [source], DELTAS, {})
    else:
        publish_adapter(tmp_path / "out", [source], DELTAS, {})
    assert (tmp_path / "out").exists() is not takes


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_adapter(peft_folder(tmp_path / "a"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(MachineError, match="No space left"):
        publish_adapter(tmp_path / "out", [source], DELTAS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_every_file_is_on_disk_before_the_name_that_publishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter that belongs to no base too, which has no manifest."""
    source, target = open_adapter(peft_folder(tmp_path / "a")), tmp_path / "out"
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def noting_rename(old: Path, new: Path) -> None:
        done.append(f"to {new}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    publish_adapter(target, [source], DELTAS, {})
    published = done.index(f"to {target}")
    before = {Path(path).name.partition("-")[0] for path in done[:published]}
    assert before == {"adapter_model.safetensors", "adapter_config.json", "adapter", ".tmp"}
    assert done[published + 1 :] == [str(tmp_path)]


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "adapter")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match="SHA-256"):
        open_adapter(tmp_path / "run" / "adapter")


def test_targets_name_exactly_the_modules_that_are_there(tmp_path: Path) -> None:
    """Two adapters of unlike layers: their last name would also match layers that neither has."""
    first = peft_folder(tmp_path / "a", modules=("layers.0.q_proj", "layers.1.q_proj"))
    second = peft_folder(tmp_path / "b", modules=("layers.5.q_proj",))
    combine_adapters([first, second], tmp_path / "both")
    made = open_adapter(tmp_path / "both" / "adapter")
    assert sorted(made.config.target_modules or ()) == ["layers.0.q_proj", "layers.1.q_proj", "layers.5.q_proj"]
    resize_adapter(first, tmp_path / "small", Ask(r=2))
    assert list(open_adapter(tmp_path / "small" / "adapter").config.target_modules or ()) == ["q_proj"]


def test_modules_of_other_shapes_are_named(tmp_path: Path) -> None:
    first, second = peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", width=32)
    with pytest.raises(ModelError, match=r"layers.0.q_proj is \(24, 16\) in .*a and \(24, 32\) in .*b"):
        combine_adapters([first, second], tmp_path / "both")


def test_the_seed_draws_the_room_that_growth_adds(tmp_path: Path) -> None:
    source, rows = peft_folder(tmp_path / "a"), []
    for seed in (0, 0, 1):
        target = tmp_path / f"out{len(rows)}"
        resize_adapter(source, target, Ask(r=6), seed=seed)
        rows.append(open_adapter(target / "adapter").deltas()["layers.0.q_proj"].lora_A)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0][:4], rows[2][:4])
    assert not torch.equal(rows[0][4:], rows[2][4:])


def test_who_does_not_say_its_base_is_only_noticed(tmp_path: Path) -> None:
    notices = refuse_other_bases([open_adapter(peft_folder(tmp_path / name)) for name in "ab"])
    assert len(notices) == 2 and all("does not prove" in notice for notice in notices)


def test_rescaled_rows_are_looked_at_by_their_strongest_directions() -> None:
    """A DoRA update is W' - W; with as many directions as the matrix has, all of it is held."""
    cpu = torch.device("cpu")
    weight = torch.randn(10, 12)
    update = RescaledRows(Delta(torch.randn(2, 12), torch.randn(10, 2), 0.1), 1.2 * weight.norm(dim=1))
    found, notice = thin({"m": update}, lambda _: (weight, None), 10)
    torch.testing.assert_close(found["m"].dense(cpu), update.applied(weight) - weight, rtol=0, atol=1e-5)
    assert "hold 100% of" in notice
    few, notice = thin({"m": update}, lambda _: (weight, None), 3)
    assert few["m"].lora_A.shape == (3, 12) and "first 3 directions" in notice and "100%" not in notice
