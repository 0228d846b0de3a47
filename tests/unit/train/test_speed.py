"""Each key that says how a run uses the machine changes what it does; what is left open is settled by measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_train.adapters.layers import lora_layers
from qlora_train.artifacts import RunDir
from qlora_train.errors import MachineError, RecipeError
from qlora_train.model.checkpointing import decoder_layers
from qlora_train.recipe.load import load_recipe
from qlora_train.train import speed as module
from qlora_train.train.metrics import Silent
from qlora_train.train.setup import Prepared, prepare
from tests.commandline import write_recipe


def prepared(folder: Path, model: Path, **keys: Any) -> Prepared:
    recipe = write_recipe(folder, model, **{f"train__{key}": value for key, value in keys.items()})
    return prepare(load_recipe(recipe, ()).recipe, RunDir(folder / "run"), Silent())


def num_resident(found: Prepared) -> int:
    return sum(
        layer.frozen is not None and layer.frozen._resident is not None
        for layer in lora_layers(found.job.model).values()
    )


def test_plenty_of_memory_recomputes_nothing_and_keeps_all_layers_dense(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir)
    assert found.speed.choice.checkpointing.kind == "none" and found.speed.choice.fits
    assert num_resident(found) == 14 == 7 * found.speed.choice.resident_layers
    assert not found.speed.compiled and "do not pay" in found.speed.why
    assert "0 of 2 layers" in found.speed.summary()[0]


def test_a_small_limit_recomputes_and_keeps_nothing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, memory_limit_gib=1e-6)
    assert found.speed.choice.checkpointing.kind == "full" and not found.speed.choice.fits
    assert num_resident(found) == 0
    assert [layer.gradient_checkpointing for layer in decoder_layers(found.job.model)] == [True, False]


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_checkpointing_is_what_the_recipe_says(kind: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, checkpointing=kind)
    assert found.speed.choice.checkpointing.kind == kind


def test_every_second_layer(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, checkpointing="full", checkpoint_every=2)
    assert found.speed.choice.checkpointing.every == 2


def test_resident_layers(tmp_path: Path, tiny_llama_dir: Path) -> None:
    assert num_resident(prepared(tmp_path / "one", tiny_llama_dir, resident_layers=1)) == 7
    with pytest.raises(RecipeError, match="resident_layers is 3, but the model has 2"):
        prepared(tmp_path / "three", tiny_llama_dir, resident_layers=3)


def test_fused_off_is_the_plain_twin(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, fused=False)
    assert all(layer.frozen is None for layer in lora_layers(found.job.model).values())


def test_offload_without_a_card_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises((MachineError, RecipeError), match="offload_checkpoints"):
        prepared(tmp_path, tiny_llama_dir, checkpointing="full", offload_checkpoints=True)


def test_compile_follows_the_recipe_the_work_and_the_machine(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(module, "compile_layers", lambda model: compiled.append(True))
    monkeypatch.setattr(module, "compiler_fault", lambda device: None)
    assert prepared(tmp_path / "on", tiny_llama_dir, compile=True).speed.compiled
    assert not prepared(tmp_path / "off", tiny_llama_dir, compile=False).speed.compiled
    assert not prepared(tmp_path / "short", tiny_llama_dir).speed.compiled
    monkeypatch.setitem(module.LEAST_WORK, "cpu", 1.0)
    found = prepared(tmp_path / "long", tiny_llama_dir)
    assert found.speed.compiled and found.job.binding.recipe["layers compiled"] and len(compiled) == 2
    assert not prepared(tmp_path / "watched", tiny_llama_dir, checkpointing="selective").speed.compiled
    monkeypatch.setattr(module, "compiler_fault", lambda device: "no g++")
    assert "no g++" in prepared(tmp_path / "none", tiny_llama_dir).speed.summary()[1]
    with pytest.raises(MachineError, match="no g\\+\\+"):
        prepared(tmp_path / "asked", tiny_llama_dir, compile=True)
