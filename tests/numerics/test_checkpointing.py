"""Every checkpointing policy gives the same bits, and computes again what it says and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_train.adapters.layers import use_fused
from qlora_train.data.loader import MicroBatch
from qlora_train.model.attention import ATTENTION_NAME, PLAIN_TOKENS
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import ATTENTION_OPS, Checkpointing, apply_checkpointing, decoder_layers
from tests.adapted import adapted_model
from tests.loading import gradients, tiny_base, with_adapter
from tests.packs import alone, packed, table_of

POLICIES = (
    Checkpointing("full"),
    Checkpointing("selective"),
    Checkpointing("full", every=2),
    Checkpointing("selective", every=2),
)
PACKS = ([0, 1], [2])


def some_packs() -> MicroBatch:
    return packed(table_of([9, 14, 21]), *PACKS)


def loss_and_gradients(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)  # dropout
    loss = CausalModel(model).loss_sum(batch)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_all_alike(model: Any, batch: MicroBatch) -> None:
    apply_checkpointing(model, Checkpointing("none"))
    loss, found = loss_and_gradients(model, batch)
    assert all(gradient.any() for gradient in found.values())
    for policy in POLICIES:
        apply_checkpointing(model, policy)
        again, others = loss_and_gradients(model, batch)
        assert torch.equal(loss, again), policy
        assert found.keys() == others.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, others[name]), (policy, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_every_policy_gives_the_same_bits(family: str, dtype: torch.dtype) -> None:
    assert_all_alike(adapted_model(family, dtype=dtype), some_packs())


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_is_drawn_again(fused: bool) -> None:
    model, batch = adapted_model("llama", dropout=0.3, fused=fused), some_packs()
    assert_all_alike(model, batch)
    loss, _ = loss_and_gradients(model, batch)
    assert loss != loss_and_gradients(model.eval(), batch)[0]  # it is there at all


def test_the_same_bits_on_a_4bit_base(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir))
    use_fused(model)
    model.train()
    batch = alone(table_of([14]), 0)
    for _ in range(2):  # the second step finds weights of the first one's backward pass in the workspace
        assert_all_alike(model, batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_bits_with_padded_batches(attention: str) -> None:
    assert_all_alike(adapted_model("llama", num_layers=2, attention=attention), alone(table_of([14]), 0))


def test_the_same_bits_with_rows_that_go_through_sdpa() -> None:
    assert_all_alike(adapted_model("llama", num_layers=2), packed(table_of([PLAIN_TOKENS + 8]), [0]))


class CountAttention(TorchDispatchMode):
    """How often each operator of attention runs, and what the policies leave out of a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION_OPS:
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count_backward(model: Any, batch: MicroBatch, policy: Checkpointing) -> int:
    apply_checkpointing(model, policy)
    loss = CausalModel(model).loss_sum(batch)
    with CountAttention() as count:
        loss.backward()
    return count.calls.total()


@pytest.mark.parametrize(
    ("attention", "length", "num_ops"),
    [
        # Forward: scores and their product with the values, for one bucket. Backward: two matmuls for each.
        pytest.param(ATTENTION_NAME, 14, 2, id="matmuls"),
        pytest.param(ATTENTION_NAME, PLAIN_TOKENS + 8, 1, id="rows-by-sdpa"),
        pytest.param("eager", 14, 2, id="eager"),
        pytest.param("sdpa", 14, 1, id="sdpa"),
    ],
)
def test_selective_never_runs_attention_again(attention: str, length: int, num_ops: int) -> None:
    model, table = adapted_model("llama", attention=attention), table_of([length])
    batch = packed(table, [0]) if attention == ATTENTION_NAME else alone(table, 0)
    none, selective, full = (
        count_backward(model, batch, Checkpointing(kind)) for kind in ("none", "selective", "full")
    )
    assert selective == none
    assert full == none + 3 * num_ops  # every layer but the last: the count can tell


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [
        (Checkpointing("none"), [1, 1, 1, 1]),
        (Checkpointing("full"), [2, 2, 2, 1]),
        (Checkpointing("selective"), [2, 2, 2, 1]),
        (Checkpointing("full", every=2), [2, 1, 2, 1]),
        (Checkpointing("full", every=3), [2, 1, 1, 1]),
    ],
    ids=str,
)
def test_each_layer_runs_as_often_as_the_policy_says(policy: Checkpointing, forwards: list[int]) -> None:
    model, batch = adapted_model("llama"), some_packs()
    apply_checkpointing(model, policy)
    calls: Counter[int] = Counter()
    for index, layer in enumerate(decoder_layers(model)):
        norm = layer.get_submodule("input_layernorm")  # the first thing that a layer runs

        def count(module: nn.Module, args: Any, index: int = index) -> None:
            calls[index] += 1

        norm.register_forward_pre_hook(count)
    CausalModel(model).loss_sum(batch).backward()
    assert [calls[index] for index in range(4)] == forwards
    assert sum(forwards) == 4 + policy.num_recomputed(4)
    calls.clear()
    model.eval()
    CausalModel(model).loss_sum(batch).backward()
    assert [calls[index] for index in range(4)] == [1, 1, 1, 1]  # evaluation computes nothing twice
