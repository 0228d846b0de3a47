"""Three ways to merge, each against an independent way to the same numbers; every tensor accounted for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_train.adapters.fold import read_deltas
from qlora_train.errors import ModelError
from qlora_train.export.tensors import MergedTensors
from qlora_train.model.load import load_recipe_base
from qlora_train.model.trained import FinishedRun, load_trained, open_run
from qlora_train.quant.bnb import dequantize, linear4bit_modules

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def run(made: Path) -> FinishedRun:
    return open_run(made / "run")


def merged(run: FinishedRun, onto: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in MergedTensors(run, run.source(), onto)}


def test_dequantised_and_original(run: FinishedRun) -> None:
    base = load_recipe_base(run.source(), run.recipe)
    stored = load_file(run.source().folder / "model.safetensors")
    deltas = {name: delta.dense(torch.device("cpu")) for name, delta in read_deltas(run.run_dir.adapter).items()}
    ours, onto_original = merged(run, "dequantized"), merged(run, "original")
    assert ours.keys() == onto_original.keys() == stored.keys(), "every tensor of the base, the tied head once"
    layers = {f"{name}.weight": module for name, module in linear4bit_modules(base.model)}
    assert layers.keys() == deltas.keys()
    for name, tensor in stored.items():
        if name in deltas:
            assert torch.equal(ours[name], dequantize(layers[name].weight) + deltas[name])
            assert torch.equal(onto_original[name], tensor.float() + deltas[name])
        else:
            assert torch.equal(ours[name], tensor.float()) and torch.equal(onto_original[name], tensor.float())


def test_requantised_is_what_pefts_merge_gives(run: FinishedRun) -> None:
    """PEFT 0.21's own function on a plain 4-bit model, with its sum in float32: the same values to the bit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(run.source().folder, quantization_config=quant, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.run_dir.adapter)).merge_and_unload()
    ours, exact = merged(run, "requantized"), merged(run, "dequantized")
    layers = dict(linear4bit_modules(model))
    assert len(layers) == 14
    for name, module in layers.items():
        torch.testing.assert_close(ours[f"{name}.weight"], dequantize(module.weight), rtol=0, atol=0)
    lost = (ours[UP] - exact[UP]).norm() / exact[UP].norm()
    assert lost > 0.05, "negative control: quantising again costs more than that"


def test_what_changed_is_noted(run: FinishedRun) -> None:
    tensors = MergedTensors(run, run.source())
    assert len(tensors.unused()) == 14
    exact = tensors.exact(UP)
    assert tensors.unused() == sorted(set(tensors.updates) - {UP})
    change = tensors.changes[UP]
    delta = tensors.updates[UP].applied(torch.zeros(exact.shape))
    stored = load_file(run.source().folder / "model.safetensors")[UP].float()
    assert change.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert change.quant_error_norm == pytest.approx(float((stored - (exact - delta)).norm()), rel=1e-4)
    assert change.weight_norm == pytest.approx(float((exact - delta).norm()), rel=1e-4)


def copied(made: Path, folder: Path) -> FinishedRun:
    shutil.copytree(made / "model", folder / "model")
    run = open_run(made / "run")
    recipe = run.recipe.model_copy(
        update={"model": run.recipe.model.model_copy(update={"path": str(folder / "model")})}
    )
    return FinishedRun(run.run_dir, recipe, run.base_print, run.commit, run.binding)


def test_another_base_is_refused_at_the_tensor_that_differs(made: Path, tmp_path: Path) -> None:
    run = copied(made, tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    stored[UP] += 0.01
    save_file(stored, path)
    tensors = MergedTensors(run, run.source())
    tensors.exact("model.norm.weight")
    with pytest.raises(ModelError, match=f"{UP} is not the tensor that was trained on after quantising it again"):
        tensors.exact(UP)


def test_tensors_that_the_model_does_not_use_are_named(made: Path, tmp_path: Path) -> None:
    run = copied(made, tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    save_file(
        {**stored, "model.extra.weight": torch.zeros(3), "lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        path,
    )
    tensors = MergedTensors(run, run.source())
    assert tensors.base.left_out == ("lm_head.weight", "model.extra.weight")
    assert not set(tensors.base.left_out) & set(tensors.names)


def test_stored_buffers_are_refused(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.export import base as base_module

    real = base_module.build_skeleton

    def with_buffer(config: Any) -> Any:
        skeleton = real(config)
        skeleton.register_buffer("running_mean", torch.zeros(2))
        return skeleton

    monkeypatch.setattr(base_module, "build_skeleton", with_buffer)
    with pytest.raises(ModelError, match="stores 1 buffers beside its weights, first running_mean"):
        MergedTensors(run, run.source())


def test_an_update_without_a_weight_is_refused(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.export import tensors as tensors_module

    real = tensors_module.read_updates

    def renamed(folder: Path) -> Any:
        found = dict(real(folder))
        found["model.layers.9.mlp.up_proj.weight"] = found.pop(UP)
        return found

    monkeypatch.setattr(tensors_module, "read_updates", renamed)
    with pytest.raises(ModelError, match=r"layers\.9\.mlp\.up_proj\.weight fits no weight of the base"):
        MergedTensors(run, run.source())


def test_the_trained_model_is_what_was_made(run: FinishedRun) -> None:
    """The run folder of tools/make_model.py is one that loading proves."""
    assert load_trained(run).base.print.digest == run.base_print.digest
