"""Loss per supervised token on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qlora_train.data.loader import MicroBatch
from qlora_train.errors import NumericsError
from qlora_train.model.causal import CausalModel

# What to do about a loss that is not finite: of what training made, and of what it started from.
TRAINED_FIX = "lower train.learning_rate and train again, or look at the held-out rows"
BASE_FIX = "nothing is trained yet: look at the held-out rows, set model.compute_dtype: float32, or use another base"


@dataclass(frozen=True)
class Validation:
    """Mean negative log-likelihood over supervised tokens, in nats, each weighing what it weighs in training."""

    loss_sum: float
    weight_sum: float
    num_supervised_tokens: int
    num_rows: int

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / self.weight_sum

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.inference_mode()
def validate(
    causal: CausalModel, batches: Iterable[MicroBatch], device: torch.device, *, fix: str = TRAINED_FIX
) -> Validation:
    """Run all batches without gradients, in eval mode, and leave the model in the mode it was in.

    NumericsError with `fix` where the loss is not finite.
    """
    was_training = causal.model.training
    causal.model.eval()
    loss_sum, weight_sum, num_tokens, num_rows = 0.0, 0.0, 0, 0
    try:
        for batch in batches:
            loss_sum += float(causal.loss_sum(batch.to(device)))
            weight_sum += batch.weight_sum
            num_tokens += batch.num_supervised_tokens
            num_rows += len(batch.row_ids)
    finally:
        causal.model.train(was_training)
    if not math.isfinite(loss_sum):
        raise NumericsError(f"the held-out loss is {loss_sum}", fix=fix)
    return Validation(loss_sum, weight_sum, num_tokens, num_rows)
