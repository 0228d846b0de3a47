"""A model run one layer at a time from its files gives what it gives whole, to the bit, in every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_train.data.loader import eval_batches
from qlora_train.evaluate.compare import distance, observe
from qlora_train.export import layers as layers_module
from qlora_train.export.layers import FolderWeights, observe_in_layers
from qlora_train.export.run import rows_to_verify
from qlora_train.export.verify import Reference, observe_trained
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import stored_tensors
from qlora_train.model.hollow import build_hollow
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import open_run
from tests.packs import CONFIGS, table_of

CPU = torch.device("cpu")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of a family on disk."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[request.param]), dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms too
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
def test_every_family_gives_its_own_hidden_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "ROWS_AT_A_TIME", 100)  # the vocabulary of 512 in uneven parts
    source = Source(str(folder), folder)
    config = load_config(source)
    batches = list(eval_batches(table_of([9, 31, 5, 17, 12]), 2, 0))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = observe(CausalModel(whole), batches, CPU)
    weights = FolderWeights(stored_tensors(source, build_skeleton(config)))
    (found,) = observe_in_layers(build_hollow(config, CPU), weights, batches, CPU)
    assert torch.equal(found.hidden_NH, expected.hidden_NH)
    assert torch.equal(found.labels_N, expected.labels_N) and torch.equal(found.rows_N, expected.rows_N)
    apart = distance(expected, found)
    assert abs(apart.mean_kl) < 1e-6 and apart.top1_agreement == 1.0
    assert apart.candidate_nll == pytest.approx(apart.reference_nll, abs=1e-6)


def trained(made: Path, how: Any) -> Reference:
    run = open_run(made / "run")
    source = run.source()
    tokenizer = run.tokenizer(source)
    return observe_trained(run, source, rows_to_verify(run, tokenizer), tokenizer.pad_token_id, how)


def test_the_trained_model_with_and_without_its_adapter(made: Path) -> None:
    """4-bit layers with the adapter on them: the code that training ran, not the merge's."""
    whole, layered = trained(made, "whole"), trained(made, "layers")
    assert torch.equal(layered.trained.hidden_NH, whole.trained.hidden_NH)
    assert torch.equal(layered.off.hidden_NH, whole.off.hidden_NH)
    assert not torch.allclose(layered.trained.hidden_NH, layered.off.hidden_NH, atol=1e-3), "the adapter does something"
    assert layered.num_rows == whole.num_rows == 16


def test_no_more_than_a_layer_is_in_memory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that own their bytes, looked at whenever a layer has been filled."""
    held: list[list[int]] = []
    real = layers_module.walk_through

    def watched(layers: Any, walks: Any, fill: Any, empty: Any) -> Any:
        def looked(index: int) -> None:
            fill(index)
            filled = [[p for p in layer.parameters() if p.is_contiguous()] for layer in layers]
            held.append([sum("lora_" not in name for name, p in layer.named_parameters()
                             if p.numel() == 1 or p.stride() != (0,) * p.ndim) for layer in layers])  # fmt: skip
            assert filled

        return real(layers, walks, looked, empty)

    monkeypatch.setattr(layers_module, "walk_through", watched)
    trained(made, "layers")
    assert held == [[9, 0], [0, 9]], "seven linear layers and two norms, one layer after the other"
