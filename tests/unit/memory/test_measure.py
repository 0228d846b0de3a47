"""Measured costs: known sizes, and the peak that they predict against the peak of a whole step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.adapters.layers import use_fused
from qlora_train.memory.budget import Costs, predict_peak
from qlora_train.memory.live import LiveBytes
from qlora_train.memory.measure import measure_costs, model_bytes, trial_batch
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing, decoder_layers
from qlora_train.names import IGNORE_INDEX
from tests.adapted import adapted_model
from tests.loading import tiny_base, with_adapter

HIDDEN_SIZE = 128
POLICIES = (
    Checkpointing("none"),
    Checkpointing("full"),
    Checkpointing("selective"),
    Checkpointing("full", every=2),
)


def test_a_trial_batch_is_full() -> None:
    batch = trial_batch(2, 10, 4, packed=True)
    assert batch.row_starts == (0, 4, 8, 10, 14, 18)
    assert batch.row_lengths == (4, 4, 2, 4, 4, 2)
    assert batch.position_ids is not None
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert (batch.labels != IGNORE_INDEX).sum() == batch.num_supervised_tokens == 14
    assert batch.labels.flatten()[list(batch.row_starts)].eq(IGNORE_INDEX).all()
    padded = trial_batch(2, 10, 4, packed=False)
    assert padded.row_lengths == (10, 10) and padded.row_starts is None and padded.num_supervised_tokens == 18


def test_known_sizes() -> None:
    model = adapted_model("llama")
    costs = measure_costs(CausalModel(model), trial_batch(2, 32, 16, packed=True), "adamw")
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert costs.num_layers == 4
    assert costs.dense_layer_bytes == 0
    assert costs.saved_bytes["full"] == 64 * HIDDEN_SIZE * 4  # the output alone
    # Scores of four heads over rows of 16, and the product with the values, in float32.
    assert costs.saved_bytes["selective"] == costs.saved_bytes["full"] + 64 * (4 * 16 + HIDDEN_SIZE) * 4
    assert costs.saved_bytes["none"] > 2 * costs.saved_bytes["selective"]
    num_moments = len([p for p in model.parameters() if p.requires_grad])
    assert costs.optimizer_bytes == 12 * num_trainable + 4 * num_moments
    assert 0 <= costs.model_bytes - model_bytes(model) < 10_000  # index tensors that all layers share


def test_a_4bit_layer(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    dense = tiny_base(tiny_llama_dir, dtype=torch.bfloat16, quant_type="none")
    model = with_adapter(base)
    workspace = use_fused(model)
    before = model_bytes(model)
    costs = measure_costs(CausalModel(model), trial_batch(1, 32, 16, packed=False), "adamw_8bit")
    layer = dense.model.model.layers[0]
    weights = sum(p.nbytes for name, p in layer.named_parameters() if name.endswith("_proj.weight"))
    assert costs.dense_layer_bytes == weights
    assert workspace.num_bytes == weights <= costs.model_bytes - before  # made while measuring, and held from then on
    assert before < model_bytes(dense.model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_predicted_peak_is_that_of_a_step(family: str) -> None:
    model = adapted_model(family)
    causal, batch = CausalModel(model), trial_batch(2, 32, 16, packed=True)
    costs = measure_costs(causal, batch, "adamw")
    gradient_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for policy in POLICIES:
        apply_checkpointing(model, policy)
        expected = predict_peak(costs, policy) - costs.model_bytes - costs.optimizer_bytes + gradient_bytes
        with LiveBytes() as live:
            causal.loss_sum(batch).backward()
        model.zero_grad()
        assert 0.98 * live.peak <= expected <= 1.25 * live.peak, policy


def test_the_model_is_left_as_it_was() -> None:
    model = adapted_model("llama", dropout=0.2).eval()
    apply_checkpointing(model, Checkpointing("full"))
    causal, batch = CausalModel(model), trial_batch(1, 16, 8, packed=True)
    before = causal.loss_sum(batch).detach()
    state = torch.get_rng_state()
    costs = measure_costs(causal, batch, "adamw")
    assert isinstance(costs, Costs)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(layer.training for layer in decoder_layers(model))
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(causal.loss_sum(batch).detach(), before)
    model.train()
    causal.loss_sum(batch).backward()


def test_measuring_costs_the_same_at_any_depth() -> None:
    model = adapted_model("llama")
    calls: list[Any] = []
    for layer in decoder_layers(model)[1:]:
        layer.register_forward_pre_hook(lambda *args: calls.append(args))
    measure_costs(CausalModel(model), trial_batch(1, 16, 8, packed=True), "adamw")
    assert calls == []
