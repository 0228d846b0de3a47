"""What LoftQ began with is made again from its base, and no longer counted as change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.adapters.config import build_config
from qlora_train.adapters.updates import Delta
from qlora_train.analysis.before import NO_START, Before, corrections_of, keeps_no_start
from qlora_train.analysis.folder import open_adapter
from qlora_train.api import analyze
from qlora_train.export.base import BaseReader
from qlora_train.model.trained import open_run
from qlora_train.recipe.methods import METHODS
from tests.commandline import run_cli, write_recipe
from tests.methods.cases import build, section_of
from tests.tiny import build_tiny_llama

WIDE = {"hidden_size": 64, "intermediate_size": 1088, "num_hidden_layers": 1}


def trained(folder: Path, model: Path, **keys: Any) -> Path:
    """The run folder of three steps of LoftQ."""
    folder.mkdir(exist_ok=True)
    path = write_recipe(folder, model, train__max_steps=3, train__learning_rate=1e-3, eval__generate_rows=0)
    sections = json.loads(path.read_text())
    sections["adapter"] = {"method": "loftq", "r": 4, "alpha": 8, **keys}
    path.write_text(json.dumps(sections))
    outcome = run_cli("train", path, "--json")
    assert outcome.code == 0, outcome.err
    return folder / "run"


@pytest.fixture(scope="module")
def run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("loftq"), tiny_dir)


def reader_of(run: Path) -> BaseReader:
    finished = open_run(run)
    return BaseReader(finished, finished.source())


def start_of_training(model: Path) -> dict[str, Delta]:
    """As training makes it: a function of the weights alone."""
    from qlora_train.adapters.layers import layer_update, lora_layers

    layers = lora_layers(build(model, section_of("loftq", r=4, alpha=8.0)).model)
    found = {name.removeprefix("base_model.model."): layer_update(layer, "default") for name, layer in layers.items()}
    assert all(isinstance(update, Delta) for update in found.values())
    return found  # type: ignore[return-value]


def test_the_start_is_made_again_to_the_bit(run: Path, tiny_dir: Path) -> None:
    """In float32 compute, too: the recipe's base is quantised from the same file, by way of its compute dtype."""
    opened, wanted = open_adapter(run), start_of_training(tiny_dir)
    found = corrections_of(reader_of(run), opened.updates())
    assert found.keys() == {f"{module}.weight" for module in wanted}
    for module, update in wanted.items():
        made = found[f"{module}.weight"]
        assert torch.equal(made.factors.lora_A, update.lora_A) and torch.equal(made.factors.lora_B, update.lora_B), (
            module
        )
        assert made.scaling == update.scaling == 2.0


def test_what_training_changed_is_counted_and_the_start_is_not(run: Path, tiny_dir: Path) -> None:
    cpu, updates = torch.device("cpu"), open_adapter(run).updates()
    moved = {
        module: float((updates[module].dense(cpu) - start.dense(cpu)).norm())  # type: ignore[attr-defined]
        for module, start in start_of_training(tiny_dir).items()
    }
    whole = {module: float(update.dense(cpu).norm()) for module, update in updates.items()}  # type: ignore[attr-defined]
    (look,) = analyze([run]).looks
    assert {s.module: s.norm for s in look.spectra} == pytest.approx(moved, rel=1e-4)
    assert {s.module: s.norm for s in analyze([run], with_base=False).looks[0].spectra} == pytest.approx(
        whole, rel=1e-4
    )
    assert sum(moved.values()) < 0.8 * sum(whole.values()), "negative control: they differ"


def test_without_the_base_it_says_that_the_start_counts(run: Path, tmp_path: Path) -> None:
    assert analyze([run]).notices == ()
    (notice,) = analyze([run], with_base=False).notices
    assert notice.endswith(NO_START)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((run / "adapter" / name).read_bytes())
    assert any(notice.endswith(NO_START) for notice in analyze([bare]).notices), "a folder without its run"
    outcome = run_cli("analyze", run, "--no-base")
    assert outcome.code == 0 and "counts as change" in " ".join((outcome.out + outcome.err).split())


def test_the_weight_before_training_holds_the_start(run: Path, tiny_dir: Path) -> None:
    """As PiSSA's does: the update is compared with what the model computed with at its first step."""
    reader, start = reader_of(run), start_of_training(tiny_dir)
    before = Before(reader, corrections_of(reader, open_adapter(run).updates()))
    for module, update in start.items():
        weight, error = before.weight(module)
        without, same_error = Before(reader).weight(module)
        torch.testing.assert_close(weight, update.applied(without))
        assert error == same_error and error is not None and error > 0
        original = reader.original(f"{module}.weight").float()
        assert float((original - weight).norm()) < error, "it corrects the error of quantisation"


def test_a_start_that_is_not_the_adapter_s_is_not_subtracted(run: Path) -> None:
    """As one from another kind of device may be, where the decomposition is an iteration: then the notice is given."""
    reader, updates = reader_of(run), open_adapter(run).updates()
    others = {
        module: Delta(update.lora_A.flip(1), update.lora_B, update.scaling)  # type: ignore[attr-defined]
        for module, update in updates.items()
    }
    assert corrections_of(reader, updates) and corrections_of(reader, others) == {}


def test_the_iterated_decomposition_is_made_again_too(tmp_path: Path) -> None:
    """Of matrices with more than 1,024 directions."""
    model = build_tiny_llama(tmp_path / "wide", **{**WIDE, "hidden_size": 1088, "num_attention_heads": 4})
    run = trained(tmp_path / "a", model, target_modules=["up_proj"])
    (module,) = (updates := open_adapter(run).updates())
    assert min(updates[module].shape) > 1024  # type: ignore[attr-defined]
    found = corrections_of(reader_of(run), updates)
    assert found and analyze([run]).notices == ()


@pytest.mark.parametrize(("method", "rounds", "kept"), [("loftq", 1, False), ("loftq", 2, True), ("pissa", 1, True)])
def test_only_one_round_of_loftq_keeps_no_start(method: str, rounds: int, kept: bool) -> None:
    options = {"start_iters": rounds}
    config = build_config(METHODS[method], options, r=2, lora_alpha=2, target_modules=["q_proj"])
    assert keeps_no_start(config) is not kept
