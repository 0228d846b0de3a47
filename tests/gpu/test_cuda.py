"""The claims of the CPU tests, with CUDA kernels. Skipped, with the reason, where there is no card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import load_base
from qlora_train.model.source import Source
from qlora_train.quant.bnb import dequantize, linear4bit_modules
from qlora_train.recipe.schema import QuantSection
from tests.commandline import run_cli, write_recipe
from tests.loading import gradients, with_adapter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quant", [{}, {"double_quant": False}, {"quant_type": "fp4"}], ids=str)
def test_gradients_equal_the_dense_reference(tiny_llama_dir: Path, quant: dict[str, object]) -> None:
    cuda = torch.device("cuda")
    base = load_base(Source("tiny", tiny_llama_dir), QuantSection(**quant), torch.float32, cuda)
    dense = load_base(Source("tiny", tiny_llama_dir), QuantSection(quant_type="none"), torch.float32, cuda)
    with torch.no_grad():
        for name, module in linear4bit_modules(base.model):
            dense.model.get_submodule(name).weight.copy_(dequantize(module.weight))
    ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids, ids.clone(), 33, (0, 1, 2), (12, 12, 12)).to(cuda)
    found = []
    for one in (base, dense):
        model = with_adapter(one)
        model.to(cuda).train()
        CausalModel(model).loss_sum(batch).backward()
        found.append(gradients(model))
    assert len(found[0]) == 28
    for name, gradient in found[0].items():
        # Two kernels may sum in different orders: float32 with TF32 off, which is torch's default for matmuls.
        assert (gradient - found[1][name]).norm() <= 1e-4 * found[1][name].norm(), name


def test_the_whole_pipeline_on_the_card(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama_dir, model__device="cuda", model__compute_dtype="bfloat16", train__checkpointing="full"
    )
    outcome = run_cli("train", recipe, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["adapter"]["loss"] < result["base"]["loss"]
    outcome = run_cli("export", tmp_path / "run", tmp_path / "merged", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["verdict"]["accepted"]
    assert run_cli("chat", tmp_path / "run", "--once", "list files", "--max-new-tokens", "4").code == 0
