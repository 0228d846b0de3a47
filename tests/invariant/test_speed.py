"""Each key that says how a run uses the machine changes what it does; what is left open is settled by measuring."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from qlora_train.adapters.layers import lora_layers
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, RecipeError
from qlora_train.model.checkpointing import decoder_layers
from qlora_train.recipe.load import load_recipe
from qlora_train.train import speed as module
from qlora_train.train.metrics import Silent
from qlora_train.train.run import run_training
from qlora_train.train.setup import Prepared, prepare
from tests.commandline import write_recipe


def prepared(folder: Path, model: Path, **keys: Any) -> Prepared:
    sections = {key if "__" in key else f"train__{key}": value for key, value in keys.items()}
    recipe = write_recipe(folder, model, **sections)
    return prepare(load_recipe(recipe, ()).recipe, RunDir(folder / "run"), Silent())


def num_resident(found: Prepared) -> int:
    return sum(
        layer.frozen is not None and layer.frozen._resident is not None
        for layer in lora_layers(found.job.model).values()
    )


def test_plenty_of_memory_recomputes_nothing_and_keeps_all_layers_dense(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir)
    assert found.speed.memory.choice.checkpointing.kind == "none" and found.speed.memory.choice.fits
    assert num_resident(found) == 14 == 7 * found.speed.memory.choice.resident_layers
    assert not found.speed.compiled and "too short to win back" in found.speed.compiling.why
    assert "0 of 2 layers" in found.speed.summary()[0]


def test_a_small_limit_recomputes_and_keeps_nothing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, memory_limit_gib=1e-6)
    assert found.speed.memory.choice.checkpointing.kind == "full" and not found.speed.memory.choice.fits
    assert num_resident(found) == 0
    assert [layer.gradient_checkpointing for layer in decoder_layers(found.job.model)] == [True, False]


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_checkpointing_is_what_the_recipe_says(kind: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, checkpointing=kind)
    assert found.speed.memory.choice.checkpointing.kind == kind


def test_every_second_layer(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, checkpointing="full", checkpoint_every=2)
    assert found.speed.memory.choice.checkpointing.every == 2


def test_resident_layers(tmp_path: Path, tiny_llama_dir: Path) -> None:
    assert num_resident(prepared(tmp_path / "one", tiny_llama_dir, resident_layers=1)) == 7
    with pytest.raises(RecipeError, match="resident_layers is 3, but the model has 2"):
        prepared(tmp_path / "three", tiny_llama_dir, resident_layers=3)


def test_evaluations_find_the_room_that_resident_layers_leave(tmp_path: Path, tiny_llama_dir: Path) -> None:
    roomy = prepared(tmp_path / "roomy", tiny_llama_dir, checkpointing="none").speed.memory
    assert roomy.choice.resident_layers == 2
    limit = {"checkpointing": "none", "memory_limit_gib": (roomy.choice.peak_bytes + 1) / 2**30}
    assert prepared(tmp_path / "same", tiny_llama_dir, **limit).speed.memory.choice == roomy.choice
    wide = prepared(tmp_path / "wide", tiny_llama_dir, eval__batch_size=512, **limit).speed.memory.choice
    assert wide.resident_layers == 0 and wide.checkpointing == roomy.choice.checkpointing


def split_of(found: Prepared) -> tuple[int, int]:
    """Micro-batch size and count of what is trained, and of what a checkpoint is bound to."""
    train, bound = found.job.recipe.train, found.job.binding.recipe
    assert bound["train.micro_batch_size"] == train.micro_batch_size
    assert bound["train.grad_accum_steps"] == train.grad_accum_steps
    assert len(found.job.loader.step(0)[0].input_ids) == train.micro_batch_size
    return train.micro_batch_size, train.grad_accum_steps


STEP = {"micro_batch_size": 2, "grad_accum_steps": 4}


def test_the_largest_micro_batch_that_fits_is_taken(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Packs of a step stay; a limit that holds the whole step gives one micro-batch, a smaller one gives smaller."""
    assert split_of(prepared(tmp_path / "fixed", tiny_llama_dir, **STEP)) == (2, 4)
    plenty = prepared(tmp_path / "plenty", tiny_llama_dir, memory="auto", **STEP)
    assert split_of(plenty) == (8, 1)
    needed = {}
    for size in (1, 2, 4):
        keys = {"micro_batch_size": size, "grad_accum_steps": 8 // size, "checkpointing": "none", "resident_layers": 0}
        needed[size] = prepared(tmp_path / str(size), tiny_llama_dir, **keys).speed.memory.choice.peak_bytes
    assert sorted(needed.values()) == list(needed.values())
    for size in (1, 2):
        gib = (needed[size] + 1) / 2**30
        found = prepared(tmp_path / f"limit {size}", tiny_llama_dir, memory="auto", memory_limit_gib=gib, **STEP)
        assert split_of(found) == (size, 8 // size)
        assert found.speed.memory.choice.checkpointing.kind == "none", "nothing is computed again for a larger one"
    found = prepared(tmp_path / "nothing", tiny_llama_dir, memory="auto", memory_limit_gib=1e-6, **STEP)
    assert split_of(found) == (1, 8) and not found.speed.memory.choice.fits


def test_a_micro_batch_that_is_too_large_to_measure_is_passed_over(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, sizes = module.measure_costs, []

    def measured(causal: Any, batch: Any, optimizer: str) -> Any:
        sizes.append(len(batch.input_ids))
        if sizes[-1] == 4:
            raise MemoryError
        return original(causal, batch, optimizer)

    monkeypatch.setattr(module, "measure_costs", measured)
    assert split_of(prepared(tmp_path, tiny_llama_dir, memory="auto", **STEP)) == (2, 4)
    assert sizes == [1, 2, 4]


def test_the_packs_of_each_step_stay(tmp_path: Path, tiny_llama_dir: Path) -> None:
    def rows_of(found: Prepared) -> list[list[int]]:
        loader = found.job.loader
        return [[row for batch in loader.step(step) for row in batch.row_ids] for step in range(found.job.num_steps)]

    keys = {"micro_batch_size": 2, "grad_accum_steps": 2}
    one = prepared(tmp_path / "fixed", tiny_llama_dir, **keys)
    other = prepared(tmp_path / "auto", tiny_llama_dir, memory="auto", **keys)
    assert other.job.recipe.train.micro_batch_size == 4 and rows_of(one) == rows_of(other)


def test_a_resumed_run_splits_as_it_did(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Whatever the memory is by then; what is not as many packs is left for the binding to refuse."""
    recipe = load_recipe(write_recipe(tmp_path, tiny_llama_dir, train__memory="auto", train__micro_batch_size=6), ())
    for stored, split in (((3, 4), (3, 4)), ((2, 2), (6, 2))):
        bound = {"train.micro_batch_size": stored[0], "train.grad_accum_steps": stored[1]}
        found = prepare(recipe.recipe, RunDir(tmp_path / "run"), Silent(), bound=bound)
        train = found.job.recipe.train
        assert (train.micro_batch_size, train.grad_accum_steps) == split


def test_fused_off_is_the_plain_twin(tmp_path: Path, tiny_llama_dir: Path) -> None:
    found = prepared(tmp_path, tiny_llama_dir, fused=False)
    assert all(layer.frozen is None for layer in lora_layers(found.job.model).values())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"checkpointing": "full", "offload_checkpoints": True}, "offload_checkpoints .* the device is cpu"),
        ({"compile": True}, "train.compile: no g\\+\\+"),
        ({"resident_layers": 3}, "resident_layers is 3, but the model has 2 layers"),
    ],
    ids=["offload", "compile", "resident"],
)
def test_what_machine_or_model_lack_is_said_before_weights_are_read(
    keys: dict[str, Any], said: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compiler_fault", lambda device: "no g++")
    monkeypatch.setattr("qlora_train.train.setup.load_recipe_base", None)
    recipe = load_recipe(write_recipe(tmp_path, tiny_llama_dir), ()).recipe
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=keys)})  # past the checks of the recipe
    with pytest.raises((MachineError, RecipeError), match=said):
        prepare(recipe, RunDir(tmp_path / "run"), Silent())


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
    assert found.speed.compiled and found.job.environment["layers_compiled"] and len(compiled) == 2
    assert not prepared(tmp_path / "watched", tiny_llama_dir, checkpointing="selective").speed.compiled
    monkeypatch.setattr(module, "compiler_fault", lambda device: "no g++")
    assert "no g++" in prepared(tmp_path / "none", tiny_llama_dir).speed.summary()[1]
    with pytest.raises(MachineError, match="no g\\+\\+"):
        prepared(tmp_path / "asked", tiny_llama_dir, compile=True)


def test_compiling_is_settled_before_memory(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves more than selective checkpointing, which rules it out; and a resume with other free memory keeps it."""
    monkeypatch.setattr(module, "compile_layers", lambda model: None)
    monkeypatch.setattr(module, "compiler_fault", lambda device: None)
    monkeypatch.setitem(module.LEAST_WORK, "cpu", 1.0)
    most = prepared(tmp_path / "most", tiny_llama_dir, checkpointing="none", resident_layers=0, compile=False)
    keys = {"resident_layers": 0, "memory_limit_gib": (most.speed.memory.choice.peak_bytes - 1) / 2**30}
    plain = prepared(tmp_path / "plain", tiny_llama_dir, compile=False, **keys)
    assert plain.speed.memory.choice.checkpointing.kind == "selective", "negative control"
    tight = prepared(tmp_path / "tight", tiny_llama_dir, **keys)
    assert tight.speed.compiled and tight.speed.memory.choice.checkpointing.kind == "full"


class Watching(Silent):
    """Notes at each step how many objects the garbage collector passes over."""

    def __init__(self) -> None:
        self.frozen: list[int] = []

    def step(self, progress: Any) -> None:
        self.frozen.append(gc.get_freeze_count())


def test_the_collector_passes_over_the_libraries_while_steps_run(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Hundreds of thousands of objects of torch and transformers: to walk them takes as long as a step on a card."""
    recipe = write_recipe(tmp_path, tiny_llama_dir, train__max_steps=2, eval__generate_rows=0)
    reporter = Watching()
    run_training(load_recipe(recipe, ()), resume=False, from_step=None, reporter=reporter)
    assert len(reporter.frozen) == 2 and min(reporter.frozen) > 100_000
    assert gc.get_freeze_count() == 0, "afterwards it looks at everything again"
