"""Where a policy is set, what it refuses, and that it does not outlive training mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_train.errors import MachineError, ModelError
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing, decoder_layers
from tests.adapted import adapted_model


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Checkpointing("none"), []),
        (Checkpointing("none", every=2), []),
        (Checkpointing("full"), [0, 1, 2, 3, 4]),
        (Checkpointing("selective", every=2), [0, 2, 4]),
        (Checkpointing("full", every=5), [0]),
        (Checkpointing("full", every=99), [0]),
    ],
    ids=str,
)
def test_which_of_six_layers_run_again(policy: Checkpointing, expected: list[int]) -> None:
    assert [index for index in range(6) if policy.recomputes(index, 6)] == expected
    assert policy.num_recomputed(6) == len(expected)


def test_a_single_layer_is_the_last_one() -> None:
    assert Checkpointing("full").num_recomputed(1) == 0


def test_a_later_policy_replaces_an_earlier_one() -> None:
    model = adapted_model("llama")
    apply_checkpointing(model, Checkpointing("full"))
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, True, True, False]
    apply_checkpointing(model, Checkpointing("full", every=2))
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, False, True, False]
    apply_checkpointing(model, Checkpointing("none"))
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [False] * 4


def test_the_embedding_is_not_made_to_want_gradients() -> None:
    """transformers' own switch adds a hook for that, which costs the first layer's dx; non-reentrant needs none."""
    model = adapted_model("llama", num_layers=2)
    apply_checkpointing(model, Checkpointing("full"))
    assert not model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


def test_offload_is_refused_on_a_cpu_by_name() -> None:
    model = adapted_model("llama", num_layers=2)
    with pytest.raises(MachineError, match=r"train\.offload_checkpoints .* device is cpu"):
        apply_checkpointing(model, Checkpointing("full", offload=True))
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(model))


def test_a_model_without_decoder_layers_is_refused() -> None:
    apply_checkpointing(nn.Linear(2, 2), Checkpointing("none"))
    with pytest.raises(ModelError, match=r"Linear has no decoder layers"):
        apply_checkpointing(nn.Linear(2, 2), Checkpointing("full"))


def test_attention_dropout_cannot_be_kept() -> None:
    model = adapted_model("llama", num_layers=2, attention="sdpa")
    model.config.attention_dropout = 0.1
    apply_checkpointing(model, Checkpointing("full"))
    with pytest.raises(ModelError, match=r"attention_dropout of 0\.1"):
        apply_checkpointing(model, Checkpointing("selective"))


def test_generation_is_the_same() -> None:
    model = adapted_model("llama", num_layers=2, attention="sdpa").eval()
    prompt = torch.tensor([[5, 6, 7]])
    before = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=2)
    apply_checkpointing(model, Checkpointing("selective"))
    after = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=2)
    assert torch.equal(before, after)
