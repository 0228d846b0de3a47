"""The rehearsal meets what the plan says, warns of what will not fit, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.artifacts.layout import RunDir
from qlora_train.memory.plan import Plan
from qlora_train.recipe.load import load_recipe
from qlora_train.train import rehearsal as module
from qlora_train.train.memory import MemoryLog
from qlora_train.train.rehearsal import largest_batches, rehearse
from qlora_train.train.scores import Scorer
from qlora_train.train.setup import Prepared, prepare
from qlora_train.train.state import TrainState
from tests.commandline import write_recipe
from tests.unit.train.test_memory import Heard

# Beyond the tables of 4-bit codes, 1 KiB a layer, that a plan counts once and loading makes for each.
TOLERANCE_FRAC = 0.02


def rehearsed(folder: Path, model: Path, **keys: Any) -> tuple[Prepared, MemoryLog, Heard]:
    recipe = load_recipe(write_recipe(folder, model, **keys), ()).recipe
    run_dir, heard = RunDir(recipe.run.dir), Heard()
    run_dir.root.mkdir(exist_ok=True)
    run_dir.recipe.write_text("model: {}\n")
    memory = MemoryLog(recipe, run_dir, heard)
    prepared = prepare(recipe, run_dir, heard)
    batches = largest_batches(prepared.job)
    longest = int(prepared.inputs.train.table.lengths.max())
    memory.settle(prepared.job.recipe, prepared.inputs.config, prepared.speed, longest, batches)
    rehearse(prepared, batches, Scorer(prepared, memory).questions, TrainState(), memory)
    return prepared, memory, heard


@pytest.fixture(scope="module")
def usual(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path
) -> Iterator[tuple[Prepared, MemoryLog, Heard]]:
    yield rehearsed(tmp_path_factory.mktemp("usual"), tiny_llama_dir)


def test_plan_and_measurement_agree(usual: tuple[Prepared, MemoryLog, Heard]) -> None:
    _, memory, heard = usual
    memory.compare()
    for name in ("training", "evaluation"):
        difference = memory.phases[name].difference_frac
        assert difference is not None and abs(difference) <= TOLERANCE_FRAC, memory.phases[name]
    assert memory.phases["generation"].measured is not None
    assert heard.warnings == []


@pytest.mark.parametrize(
    "keys",
    [
        {"train__checkpointing": "full", "train__resident_layers": 0, "train__micro_batch_size": 3},
        {"train__checkpointing": "selective", "model__compute_dtype": "bfloat16", "train__optimizer": "adamw_8bit"},
        {"data__batching": "shuffled", "train__grad_accum_steps": 1, "quant__quant_type": "none", "adapter__r": 16},
    ],
    ids=["full", "selective", "unquantised"],
)
def test_they_agree_for_other_settings(tmp_path: Path, tiny_llama_dir: Path, keys: dict[str, Any]) -> None:
    _, memory, _ = rehearsed(tmp_path, tiny_llama_dir, eval__generate_rows=0, **keys)
    for name in ("training", "evaluation"):
        difference = memory.phases[name].difference_frac
        assert difference is not None and abs(difference) <= TOLERANCE_FRAC, memory.phases[name]
    assert memory.phases["generation"].measured is None


def test_nothing_is_left(usual: tuple[Prepared, MemoryLog, Heard]) -> None:
    prepared, memory, _ = usual
    job = prepared.job
    assert all(parameter.grad is None for parameter in job.model.parameters())
    assert not job.optimizer.state, "moments that were made for the occasion are gone"
    assert all("lora_B" not in name or not p.any() for name, p in job.model.named_parameters())
    assert [path.name for path in job.run_dir.root.iterdir()] == [job.run_dir.recipe.name]
    assert memory.rehearsal is not None and memory.rehearsal["checkpoint_bytes"] > 3 * 65536, "adapter and two moments"


def test_what_will_not_fit_is_said_with_figures(
    usual: tuple[Prepared, MemoryLog, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, memory, heard = usual
    before = len(heard.warnings)
    module._look_ahead(memory)
    assert len(heard.warnings) == before, "there is room enough"
    monkeypatch.setattr(Plan, "peak_bytes", lambda self, stage: 2**50)
    module._look_ahead(memory)
    (host,) = heard.warnings[before:]
    assert "1,048,576.00 GiB of host memory" in host and "the run folder can be moved" in host


def test_a_dead_adapter_is_found(usual: tuple[Prepared, MemoryLog, Heard]) -> None:
    job = usual[0].job
    extra = torch.nn.Parameter(torch.zeros(1))
    job.model.register_parameter("unused", extra)
    try:
        with pytest.raises(AssertionError, match="no gradient reaches unused"):
            module.rehearse_micro_batch(job, largest_batches(job).training)
    finally:
        del job.model._parameters["unused"]
