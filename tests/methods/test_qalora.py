"""QA-LoRA on an INT4 base: trained by a recipe, merged into zero points, exported to a GGUF with the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.fold import read_deltas
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.forms.qalora import GroupedForm
from qlora_train.adapters.layers import lora_layers
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import ModelError, RecipeError
from qlora_train.export.base import BaseReader
from qlora_train.export.formats.families import Layout
from qlora_train.export.formats.run import export_formats
from qlora_train.export.run import run_export
from qlora_train.model.load import Base
from qlora_train.model.skeleton import load_config
from qlora_train.model.trained import FinishedRun, load_trained, open_run
from qlora_train.quant.affine import AffineLinear, codes_of, with_update
from qlora_train.quant.bnb import Params4bit, dequantize
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import AdapterSection
from qlora_train.train.metrics import Silent
from qlora_train.train.run import run_training
from tests.commandline import write_recipe
from tests.loading import tiny_base
from tests.tiny import build_tiny_llama

IDS = torch.arange(3, 19)[None]
INT4: dict[str, Any] = {"quant__quant_type": "int4", "quant__block_size": 32}
QALORA: dict[str, Any] = {"adapter__method": "qalora", "adapter__dropout": 0.0, "eval__generate_rows": 0, **INT4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("qalora"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("run"), folder, **QALORA), ())
    result = run_training(recipe, resume=False, from_step=None, reporter=Silent())
    assert result.adapter is not None and result.base is not None and result.adapter.loss < result.base.loss
    return open_run(recipe.recipe.run.dir)


def int4_base(folder: Path, **quant: Any) -> Base:
    return tiny_base(folder, **{"quant_type": "int4", "block_size": 32, **quant})


def test_the_base_is_int4_and_reads_back_as_such(folder: Path) -> None:
    base = int4_base(folder)
    linear = [module for module in base.model.modules() if isinstance(module, AffineLinear)]
    assert len(linear) == 7 and all(int(codes_of(layer.weight).max()) == 15 for layer in linear)
    assert base.print.quant == {"quant_type": "int4", "double_quant": False, "block_size": 32, "storage_dtype": "uint8"}
    assert sum(tensor.dtype == "int4" for tensor in base.print.tensors.values()) == 7
    coarse = int4_base(folder, block_size=128)
    assert coarse.print.digest != base.print.digest
    with torch.no_grad():
        original = tiny_base(folder, quant_type="none").model(input_ids=IDS).logits
        near, far = (float((b.model(input_ids=IDS).logits - original).norm()) for b in (base, coarse))
    assert near < far, "smaller groups are more exact"


def test_widths_without_whole_groups_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no multiple of quant\.block_size, 256"):
        int4_base(folder, block_size=256)


def test_a_has_one_column_a_group_and_the_layer_reads_means(folder: Path) -> None:
    section = AdapterSection(method="qalora", r=4, alpha=8.0, group_size=32)
    base = int4_base(folder)
    with torch.no_grad():
        plain = base.model(input_ids=IDS).logits
        model = attach_adapter(base.model, section, 0, base_name="tiny").eval()
        assert torch.equal(model(input_ids=IDS).logits, plain)
        for layer in lora_layers(model).values():
            tensors = layer_tensors(layer, "default")
            assert tensors["lora_A"].shape == (4, layer.in_features // 32)
            tensors["lora_B"].normal_(std=0.1)
            x = torch.randn(3, layer.in_features)
            means = x.view(3, -1, 32).mean(dim=2)
            expected = layer.base_layer(x) + 2.0 * means @ tensors["lora_A"].t() @ tensors["lora_B"].t()
            assert torch.allclose(layer(x), expected, atol=1e-5) and layer.num_fallbacks == 0


def merged_weights(run: FinishedRun) -> dict[str, tuple[Params4bit, Tensor]]:
    """Each adapted weight with its update in the zero points, and base + update in float32."""
    trained = load_trained(run)
    found = {}
    for name, layer in lora_layers(trained.model).items():
        weight, form = layer.get_base_layer().weight, layer.lora_variant["default"]
        assert isinstance(form, GroupedForm)
        tensors = {key: value.detach() for key, value in layer_tensors(layer, "default").items()}
        merged = with_update(weight, form.group_update(tensors, layer.scaling["default"]))
        assert torch.equal(codes_of(merged), codes_of(weight))
        name = f"{name.removeprefix('base_model.model.')}.weight"
        update = read_deltas(run.run_dir.adapter)[name]
        found[name] = merged, update.applied(dequantize(weight))
    return found


def test_the_trained_update_goes_into_the_zero_points_without_loss(run: FinishedRun) -> None:
    for name, (merged, wanted) in merged_weights(run).items():
        assert torch.allclose(dequantize(merged), wanted, atol=1e-6), name


def test_a_merged_export_is_the_trained_model(run: FinishedRun, tmp_path: Path) -> None:
    result = run_export(run, tmp_path / "merged")
    assert result.verdict.kl_frac < 1e-3
    assert BaseReader(run, run.source()).print.quant["quant_type"] == "int4"


def test_gguf_q4_1_holds_the_very_codes_that_were_trained(run: FinishedRun, tmp_path: Path) -> None:
    """What llama.cpp and Ollama serve as INT4: nothing is rounded but step and lowest value, to fp16."""
    export_formats(run, tmp_path / "served", ["gguf-q4_1"])
    path = next((tmp_path / "served").rglob("*.gguf"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    layout = Layout(load_config(run.source()))
    for name, (merged, _) in merged_weights(run).items():
        stored = tensors[layout.name(name)]
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_1
        blocks = np.array(stored.data).reshape(-1, 20)  # fp16 step, fp16 lowest, 16 bytes of codes
        low, high = blocks[:, 4:] & 15, blocks[:, 4:] >> 4
        codes = torch.from_numpy(np.concatenate([low, high], axis=1)).view(codes_of(merged).shape)
        expected = layout.to_file(name, codes_of(merged).float())
        assert torch.equal(codes.float(), expected), name
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant__quant_type": "nf4"}, "merges into the zero points of an int4 base, and quant.quant_type is nf4"),
        ({"quant__block_size": 64}, "adapter.group_size: 32 are not the groups of the base"),
        ({"quant__double_quant": True}, "quant.double_quant has no effect"),
        ({"quant__storage_dtype": "bfloat16"}, "does not go with int4"),
    ],
    ids=str,
)
def test_recipes_that_do_not_go_together_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path, folder, **{**QALORA, **changes}), ())


def test_the_run_folder_says_what_the_base_was(run: FinishedRun) -> None:
    assert RunDir(run.run_dir.root).base.read_text().count('"int4"') == 8, "seven weights and the settings"
