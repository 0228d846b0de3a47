"""Checkpoints in pinned host memory, and attention kept with CUDA's kernels. Skipped where there is no card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_train.data.loader import MicroBatch
from qlora_train.memory.available import available_bytes
from qlora_train.memory.measure import measure_costs, trial_batch
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing
from tests.adapted import adapted_model
from tests.loading import gradients

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NUM_LAYERS = 8


def on_card(**options: Any) -> tuple[Any, MicroBatch]:
    model = adapted_model("llama", num_layers=NUM_LAYERS, dtype=torch.bfloat16, **options).to(CUDA)
    return model, trial_batch(2, 256, 64, packed=True).to(CUDA)


def run(model: Any, batch: MicroBatch, policy: Checkpointing) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes on the card between the forward and the backward pass."""
    apply_checkpointing(model, policy)
    torch.manual_seed(1)
    before = torch.cuda.memory_allocated()
    loss = CausalModel(model).loss_sum(batch)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return loss.detach(), gradients(model), held


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "policy",
    [
        Checkpointing("full"),
        Checkpointing("selective"),
        Checkpointing("full", offload=True),
        Checkpointing("selective", every=2, offload=True),
    ],
    ids=str,
)
def test_every_policy_gives_the_same_numbers(policy: Checkpointing, dropout: float) -> None:
    model, batch = on_card(dropout=dropout)
    loss, found, _ = run(model, batch, Checkpointing("none"))
    again, others, _ = run(model, batch, policy)
    assert torch.equal(loss, again)
    assert found.keys() == others.keys()
    for name, gradient in found.items():
        # The backward kernel of attention adds up in no fixed order: not the bits, but bfloat16's rounding.
        assert (gradient - others[name]).norm() <= 1e-2 * gradient.norm(), name


def test_offload_takes_the_inputs_off_the_card() -> None:
    model, batch = on_card()
    run(model, batch, Checkpointing("full"))  # buffers that stay
    _, _, kept = run(model, batch, Checkpointing("full"))
    _, _, offloaded = run(model, batch, Checkpointing("full", offload=True))
    input_bytes = batch.input_ids.numel() * 128 * 2
    # One input may still be held by another name: the first layer's is the embedding's output.
    assert kept - offloaded >= (NUM_LAYERS - 2) * input_bytes


def test_costs_are_measured_on_the_card() -> None:
    model, batch = on_card()
    costs = measure_costs(CausalModel(model), batch, "adamw")
    input_bytes = batch.input_ids.numel() * 128 * 2
    assert costs.saved_bytes["full"] == input_bytes
    # Attention's output is as large as the input; with it goes one float32 for each head and token.
    assert 2 * input_bytes < costs.saved_bytes["selective"] < 2.5 * input_bytes < costs.saved_bytes["none"]
    assert 0 < available_bytes(CUDA) < torch.cuda.get_device_properties(CUDA).total_memory
