"""Only plain LoRA is merged: what else an adapter folder may hold is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from qlora_train.adapters.fold import read_deltas
from qlora_train.adapters.state import CONFIG, WEIGHTS
from qlora_train.errors import ModelError

STEM = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """r = 4, alpha = 6 on two layers."""
    LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"]).save_pretrained(str(tmp_path))
    tensors = {}
    for stem in (STEM, STEM.replace("layers.0", "layers.1")):
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, 64)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(32, 4)
    save_file(tensors, tmp_path / WEIGHTS)
    return tmp_path


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors as copies: what `load_file` gives is mapped, and the file is about to be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def change_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_deltas_by_the_base_s_names(folder: Path, rslora: bool, scaling: float) -> None:
    change_config(folder, use_rslora=rslora)
    deltas = read_deltas(folder)
    assert list(deltas) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    tensors = read(folder)
    dense = deltas["model.layers.0.mlp.up_proj.weight"].dense(torch.device("cpu"))
    expected = scaling * (tensors[f"{STEM}.lora_B.weight"].double() @ tensors[f"{STEM}.lora_A.weight"].double())
    assert dense.shape == (32, 64) and dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qalora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_is_refused(folder: Path, changes: dict[str, object]) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=f"{next(iter(changes))} is .*: this is not plain LoRA"):
        read_deltas(folder)


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_refused(folder: Path, half: str) -> None:
    tensors = read(folder)
    del tensors[f"{STEM}.lora_{half}.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=rf"holds {STEM}.lora_[AB].weight and no {STEM}.lora_{half}.weight"):
        read_deltas(folder)


@pytest.mark.parametrize("name", [f"{STEM}.lora_magnitude_vector", "base_model.model.lm_head.weight"])
def test_a_stray_tensor_is_refused(folder: Path, name: str) -> None:
    save_file(read(folder) | {name: torch.ones(4)}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=f"{name} is no part of plain LoRA"):
        read_deltas(folder)
