"""Other trainers' steps keep what their sources say, and a step on this CPU takes what its plan says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from planning.huggingface import mixed_precision, trainer_loss, trainer_model
from planning.litgpt import Settings, litgpt_loss, litgpt_model
from planning.measured import Point, measure_points
from planning.tracing import traced_step
from planning.unsloth import unsloth_loss, unsloth_model
from transformers import LlamaConfig

from qlora_train.memory.trace import CHECKPOINTS, KEPT, StepStyle
from qlora_train.model.checkpointing import Checkpointing

HIDDEN, MLP, VOCAB, TOKENS, LAYERS = 256, 1024, 1024, 512, 3


def config(vocab: int = VOCAB) -> Any:
    """A small Llama, as many key heads as query heads."""
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(("quant", "more"), [("none", 0), ("nf4", 6 * HIDDEN + 2 * MLP)])
def test_litgpt_keeps_what_its_statements_keep(quant: str, more: int) -> None:
    """Bytes of a layer and token, counted by hand, and in 4 bit each linear layer's input besides.

    Norms: a float32 copy each. q and v's adapter: the dropped input, its mask, and the update that is padded.
    Attention: q, k (copies), v (a view of q, k and v together), output. MLP: three products.
    """
    by_hand = 2 * 4 * HIDDEN + 3 * HIDDEN + 4 * HIDDEN + (2 + 2 + 6 + 2) * HIDDEN + 3 * 2 * MLP + more
    model = litgpt_model(config(), Settings(quant, 8, ("q", "v")))
    traced = traced_step(model, 1, TOKENS, StepStyle(loss=partial(litgpt_loss, follows_another=False)))
    assert traced.causes[KEPT] == pytest.approx(LAYERS * TOKENS * by_hand, rel=0.04)


def test_transformers_loss_holds_three_copies_of_all_logits() -> None:
    """float32 logits, their shifted copy, and the softmax; or its gradient and the softmax."""
    vocab = 32 * VOCAB  # so that the loss head is the peak
    model = trainer_model(config(vocab), r=8)
    with mixed_precision() as mode:
        loss = partial(trainer_loss, head="shifted copy", mode=mode)
        style = StepStyle(checkpointing=Checkpointing("full"), recompute_last=True, loss=loss)
        many = traced_step(model, 4, TOKENS, style)
        few = traced_step(model, 2, TOKENS, style)
    kept = 2 * HIDDEN * (LAYERS + 1)  # bfloat16 inputs of layers, and what the last norm gives
    per_token = (many.allocated - few.allocated) / (2 * TOKENS)
    assert per_token == pytest.approx(12 * vocab + kept, rel=0.02)
    assert few.reserved >= few.least >= few.allocated


def test_unsloth_leaves_inputs_of_layers_on_the_host() -> None:
    """No checkpoint lies on the card where they are offloaded. The first layer's input counts as embedded tokens."""
    causes = []
    for offload in (False, True):
        model = unsloth_model(config(), 8, "nf4-dq")
        style = StepStyle(
            checkpointing=Checkpointing("full", offload=offload),
            recompute_last=True,
            loss=partial(unsloth_loss, head="kernel on all logits"),
        )
        causes.append(traced_step(model, 1, TOKENS, style).causes.get(CHECKPOINTS, 0))
    on_card, on_host = causes
    assert (on_card, on_host) == ((LAYERS - 1) * TOKENS * 2 * HIDDEN, 0)


def test_a_step_on_this_cpu_takes_what_its_plan_says() -> None:
    """Within 5 % of what torch's allocator hands out, kernels' own buffers included."""
    (found,) = measure_points([Point(hidden=128, layers=2, vocab=512, seq_len=128, row_tokens=64)])
    assert abs(found.error) < 0.05
