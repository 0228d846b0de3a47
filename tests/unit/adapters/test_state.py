"""Adapter folders: what is refused before any tensor is read, and what is restored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_train.adapters.config import section_config
from qlora_train.adapters.layers import register_layers
from qlora_train.adapters.state import (
    CONFIG,
    WEIGHTS,
    adapter_tensors,
    describe_mismatch,
    load_adapter_config,
    read_adapter_tensors,
    restore_adapter,
    save_adapter,
)
from qlora_train.errors import ModelError, SecurityError
from qlora_train.recipe.schema import AdapterSection


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as copies: what `load_file` gives is mapped, and the file is about to be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def model() -> PeftModel:
    """Two adapted layers of a plain model; B is random."""
    plain = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    peft_model = get_peft_model(plain, register_layers(LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"])))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return peft_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(model(), tmp_path)
    return tmp_path


def test_a_saved_folder_holds_two_files_ready_for_inference(tmp_path: Path) -> None:
    one = model()
    one.peft_config["default"].inference_mode = False
    save_adapter(one, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    assert json.loads((tmp_path / CONFIG).read_text())["inference_mode"] is True
    assert one.peft_config["default"].inference_mode is False, "saving changes nothing in memory"
    names = set(load_file(tmp_path / WEIGHTS))
    assert names == {f"base_model.model.{i}.lora_{half}.weight" for i in (0, 1) for half in "AB"}


def test_the_config_is_read_back(folder: Path) -> None:
    config = load_adapter_config(folder)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 6, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": float("nan")}, "finite"),
        ({"lora_alpha": float("inf")}, "finite"),
        ({"lora_alpha": "8"}, "finite"),
        ({"r": None}, "finite"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
    ],
    ids=str,
)
def test_a_config_of_another_kind_is_refused(folder: Path, changes: dict[str, object], words: str) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        load_adapter_config(folder)


@pytest.mark.parametrize("content", [None, "", '{"r": 4', "[]", "null", "\x00"])
def test_a_config_that_is_missing_or_damaged_is_refused(folder: Path, content: str | None) -> None:
    (folder / CONFIG).unlink()
    if content is not None:
        (folder / CONFIG).write_text(content)
    with pytest.raises(ModelError, match=CONFIG):
        load_adapter_config(folder)


def test_weights_that_are_missing_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=f"holds no {WEIGHTS}"):
        load_adapter_config(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "notes.txt"])
def test_a_pickle_in_the_folder_is_refused_by_name_or_content(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04N." if name == "notes.txt" else b"anything")
    with pytest.raises(SecurityError, match=f"{name}, a pickle"):
        load_adapter_config(folder)


def test_weights_that_are_cut_or_not_finite_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    whole, tensors = path.read_bytes(), read(path)
    assert read_adapter_tensors(folder).keys() == tensors.keys()
    for content in (whole[:-1], whole[:4], b""):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=WEIGHTS):
            read_adapter_tensors(folder)
    tensors[max(tensors)][0, 0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"1 tensors hold NaN or infinity, first {max(tensors)}"):
        read_adapter_tensors(folder)


def test_restoring_brings_every_bit_back(folder: Path) -> None:
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    saved = read(folder / WEIGHTS)
    assert not torch.equal(adapter_tensors(other)[min(saved)], saved[min(saved)])
    restore_adapter(other, folder)
    found = adapter_tensors(other)
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["zzz"] = torch.zeros(1)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = torch.zeros(4, 63)


def _cast(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)].half()


FIRST = "base_model.model.0.lora_A.weight"
MISMATCHES: dict[Callable[[dict[str, torch.Tensor]], None], str] = {
    _drop: f"1 tensors missing, first {FIRST}",
    _add: "1 unknown tensors, first zzz",
    _reshape: f"{FIRST} is (4, 63) torch.float32, expected (4, 64) torch.float32",
    _cast: f"{FIRST} is (4, 64) torch.float16, expected (4, 64) torch.float32",
}


@pytest.mark.parametrize("spoil", MISMATCHES, ids=lambda f: f.__name__)
def test_a_mismatch_is_described_and_nothing_is_restored(
    folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    tensors = read(folder / WEIGHTS)
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    assert describe_mismatch(own, tensors) == ""
    spoil(tensors)
    assert describe_mismatch(own, tensors) == MISMATCHES[spoil]
    save_file(tensors, folder / WEIGHTS)
    other = model()
    before = {name: tensor.clone() for name, tensor in adapter_tensors(other).items()}
    with pytest.raises(ModelError):
        restore_adapter(other, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(other).items())


def test_all_differences_are_described_at_once() -> None:
    own = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    theirs = {"b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(1)}
    parts = describe_mismatch(own, theirs).split("; ")
    assert len(parts) == 3 and parts[2].startswith("b is (2,)"), "the first shape only"


def change(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """An adapter of a method that plain PEFT computes otherwise."""
    config = section_config(
        AdapterSection(method="mtlora", structure="dtsm", r=4, alpha=6.0, target_modules=("0", "1"))
    )
    config.task_type = None
    plain = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    save_adapter(get_peft_model(plain, register_layers(config)), tmp_path)
    return tmp_path


def test_peft_refuses_what_it_would_compute_otherwise(tagged: Path) -> None:
    """Under PEFT's own name it would load the factors and leave the core out without a word."""
    with pytest.raises(Exception, match="QLORA_TRAIN"):
        PeftConfig.from_pretrained(str(tagged))
    data = json.loads((tagged / CONFIG).read_text())
    assert data["qlora_train"] == {"method": "mtlora", "options": {"structure": "dtsm"}}
    config = load_adapter_config(tagged)
    assert (config.method.name, config.options, config.r) == ("mtlora", {"structure": "dtsm"}, 4)
    change(tagged, peft_type="LORA", qlora_train=None)
    assert PeftConfig.from_pretrained(str(tagged)).peft_type == "LORA", "negative control"
    with pytest.raises(ModelError, match="lora_core_c is no part of plain LoRA"):
        load_adapter_config(tagged)


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (None, "contradict each other"),
        ("mtlora", "names no method of ours"),
        ({"method": "lora", "options": {}}, "names no method of ours"),
        ({"method": "nothing", "options": {}}, "names no method of ours"),
        ({"method": ["mtlora"], "options": {}}, "names no method of ours"),
        ({"method": "mtlora", "options": {}}, "the options of mtlora are structure"),
        ({"method": "mtlora", "options": {"structure": "shim", "r": 3}}, "the options of mtlora are structure"),
        ({"method": "mtlora", "options": {"structure": "other"}}, "1 validation error"),
        ({"method": "mtlora", "options": {"structure": "shim"}}, "lora_core_d is no part of MTLoRA"),
        ({"method": "flora_core", "options": {"r_out": None}}, "lora_core_d is no part of FLoRA"),
        ({"method": "aflora", "options": {}}, "the options of aflora are"),
    ],
    ids=str,
)
def test_a_tag_that_does_not_hold_is_refused(tagged: Path, tag: object, words: str) -> None:
    change(tagged, qlora_train=tag)
    with pytest.raises(ModelError, match=words):
        load_adapter_config(tagged)


def test_a_plain_folder_may_not_bear_a_tag(folder: Path) -> None:
    change(folder, qlora_train={"method": "mtlora", "options": {"structure": "shim"}})
    with pytest.raises(ModelError, match="contradict each other"):
        load_adapter_config(folder)
    change(folder, qlora_train=None, use_dora=True)
    with pytest.raises(ModelError, match=r"lora_A.weight and no .*lora_magnitude_vector"):
        load_adapter_config(folder)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"rank_pattern": {"0": 4}}, None),
        ({"rank_pattern": {"0": 4}, "alpha_pattern": {"0": 2.0}}, None),
        ({"rank_pattern": {"0": 8}}, "which is not of rank 8"),
        ({"rank_pattern": {"(a+)+$": 4}}, "must give a number for names of modules"),
        ({"rank_pattern": {"0": "4"}}, "must give a number for names of modules"),
        ({"alpha_pattern": {"0": -1}}, "must give a number for names of modules"),
        ({"rank_pattern": ["0"]}, "must give a number for names of modules"),
    ],
    ids=str,
)
def test_ranks_of_single_modules_are_names_and_numbers(
    folder: Path, patterns: dict[str, object], words: str | None
) -> None:
    """PEFT matches the names as regular expressions, which can run for ever."""
    change(folder, **patterns)
    if words is not None:
        with pytest.raises(ModelError, match=words):
            load_adapter_config(folder)
        return
    config = load_adapter_config(folder)
    scaling = 2.0 / 4 if "alpha_pattern" in patterns else 6 / 4
    assert (config.scaling_of("base_model.model.0"), config.scaling_of("base_model.model.1")) == (scaling, 6 / 4)
