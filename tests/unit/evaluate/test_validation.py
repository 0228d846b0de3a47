"""The held-out loss against torch's cross-entropy, in eval mode, with the mode restored."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody reads

from qlora_train.data.loader import MicroBatch
from qlora_train.errors import NumericsError
from qlora_train.evaluate.validation import BASE_FIX, Validation, validate
from qlora_train.model.causal import CausalModel
from qlora_train.names import IGNORE_INDEX
from tests.loading import CPU, tiny_base, with_adapter


def batch(seed: int, rows: int, length: int) -> MicroBatch:
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : 2 + seed] = IGNORE_INDEX
    return MicroBatch(ids, labels, rows * (length - 2 - seed), tuple(range(rows)), (length,) * rows)


BATCHES = [batch(0, 3, 9), batch(1, 1, 14)]


def by_hand(model: CausalModel) -> float:
    """Mean over all supervised tokens of both batches, which are of unequal size."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model.model(input_ids=b.input_ids).logits[:, :-1].flatten(0, 1),
                b.labels[:, 1:].flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
            for b in BATCHES
        ]
    return float(torch.cat(losses).sum()) / (3 * 7 + 11)


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_mean_by_hand_and_restores_the_mode(training: bool, tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir), dropout=0.5)
    causal = CausalModel(model.eval())
    expected = by_hand(causal)
    model.train(training)
    found = validate(causal, iter(BATCHES), CPU)
    assert model.training == training and causal.decoder.training == training
    assert (found.num_supervised_tokens, found.num_rows) == (32, 4)
    assert found.loss == pytest.approx(expected, rel=1e-5), "dropout is off"
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert validate(causal, BATCHES[::-1], CPU).loss == pytest.approx(found.loss, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokens_weigh_what_they_weigh_in_training(tiny_llama_dir: Path) -> None:
    """A batch of weight 3 beside one of weight 1: not the mean over tokens, and the count of tokens stays."""
    causal = CausalModel(tiny_base(tiny_llama_dir, quant_type="none").model)
    heavy = replace(BATCHES[0], weights=torch.full((3, 9), 3.0) * (BATCHES[0].labels != IGNORE_INDEX))
    first, second = (validate(causal, [one], CPU).loss_sum for one in BATCHES)
    found = validate(causal, [heavy, BATCHES[1]], CPU)
    assert found.loss == pytest.approx((3 * first + second) / (3 * 21 + 11), rel=1e-5)
    assert (found.weight_sum, found.num_supervised_tokens) == (74.0, 32)


def test_the_mode_is_restored_after_a_failure(tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model.train()
    outside = MicroBatch(torch.tensor([[1, 10**6]]), torch.tensor([[1, 2]]), 1, (0,), (2,))
    with pytest.raises(IndexError):
        validate(CausalModel(model), [outside], CPU)
    assert model.training


def test_a_loss_beyond_all_numbers_has_a_finite_perplexity() -> None:
    assert math.isfinite(Validation(1e6, 1.0, 1, 1).perplexity)
    assert Validation(4.0, 2.0, 5, 1).loss == 2.0


def test_a_loss_that_is_not_finite_is_told_with_the_caller_s_advice(tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NumericsError, match=r"loss is nan\. Fix: lower train\.learning_rate"):
        validate(CausalModel(model), BATCHES[:1], CPU)
    with pytest.raises(NumericsError, match=r"loss is nan\. Fix: nothing is trained yet: .*model\.compute_dtype"):
        validate(CausalModel(model), BATCHES[:1], CPU, fix=BASE_FIX)
