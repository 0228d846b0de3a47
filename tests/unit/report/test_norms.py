"""Norms of updates without the updates: against the dense product, in PEFT's scaling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qlora_train.errors import ModelError
from qlora_train.report.norms import ModuleNorm, module_norms, norm_grid
from tests.runfolders import write_adapter


@pytest.mark.parametrize(("config", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75)])
def test_norms_of_a_folder_are_those_of_its_tensors(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    tensors = write_adapter(tmp_path / "adapter", **config)
    norms = {norm.module: norm for norm in module_norms(tmp_path / "adapter")}
    assert list(norms) == ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj", "lm_head"]
    for module in ("layers.1.q_proj", "lm_head"):
        lora_A, lora_B = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        found = norms[module]
        assert found.delta_weight == pytest.approx(scaling * float((lora_B @ lora_A).norm()), rel=1e-5)
        assert (found.lora_A, found.lora_B) == pytest.approx((float(lora_A.norm()), float(lora_B.norm())), rel=1e-5)


def test_an_adapter_with_nan_has_no_norms(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="NaN"):
        module_norms(tmp_path / "adapter")


def test_grid_puts_modules_in_their_layers_and_experts_together() -> None:
    norms = [
        ModuleNorm("m.layers.0.q_proj", 1, 1, 2.0),
        ModuleNorm("m.layers.3.q_proj", 1, 1, 5.0),
        ModuleNorm("m.layers.3.experts.0.up", 1, 1, 3.0),
        ModuleNorm("m.layers.3.experts.1.up", 1, 1, 4.0),
        ModuleNorm("lm_head", 1, 1, 9.0),
    ]
    grid = norm_grid(norms)
    assert (grid.names, grid.layers) == (("q_proj", "up"), (0, 3))
    assert grid.values == ((2.0, 5.0), (None, 5.0)), "a layer without the module is empty, the head lies in no layer"
