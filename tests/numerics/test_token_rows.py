"""Trained rows of an embedding and a head against a dense model: values, gradients, rows that the table lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody reads
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.tokens import NewTokens, TokenLayer, token_layers
from qlora_train.data.loader import MicroBatch, collate
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.loss import ALIGNMENT, TrainedRows, head_logits, linear_cross_entropy_sum
from qlora_train.model.causal import CausalModel
from qlora_train.recipe.schema import AdapterSection
from tests.loading import tiny_base
from tests.packs import tiny_model
from tests.tiny import VOCAB_SIZE, build_tiny_llama

N, H, V = 37, 64, 200
INSIDE, GROWN = (5, 199), (5, 199, 200, 201)


@pytest.mark.parametrize("ids", [INSIDE, GROWN], ids=["inside", "grown"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_loss_with_trained_rows_equals_a_dense_head(ids: tuple[int, ...], softcap: float, chunk: int) -> None:
    num_new = sum(number >= V for number in ids)
    hidden, weight = torch.randn(N, H).requires_grad_(), torch.randn(V, H) / 8
    rows = (torch.randn(len(ids), H) / 8).requires_grad_()
    labels, weights = torch.randint(0, V + num_new, (N,)), torch.rand(N) * 2
    labels[: len(ids)] = torch.tensor(ids)
    dense = torch.cat([weight, torch.zeros(num_new, H)]).index_copy(0, torch.tensor(ids), rows)
    logits = F.linear(hidden, dense)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    loss = linear_cross_entropy_sum(
        hidden, weight, labels, rows=TrainedRows(torch.tensor(ids), rows, num_new), weights_N=weights, softcap=softcap,
        sizes=(chunk, (chunk + 1) // 2),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted, found = (torch.autograd.grad(each / 3, (hidden, rows)) for each in (expected, loss))
    for one, other in zip(wanted, found, strict=True):
        # Sums of 37 and 200 products in float32.
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        assert other.abs().max() > 1e-2


def test_bfloat16_sums_the_gradient_of_rows_in_float32() -> None:
    """Against float32 all through: what differs is one rounding of the logits and of their gradient."""
    hidden, weight = torch.randn(4096, H).bfloat16(), (torch.randn(V, H) / 8).bfloat16()
    rows = (torch.randn(2, H) / 8).requires_grad_()
    labels = torch.full((4096,), INSIDE[0])
    chosen = TrainedRows(torch.tensor(INSIDE), rows)
    exact = linear_cross_entropy_sum(hidden.float(), weight.float(), labels, rows=chosen)
    rounded = linear_cross_entropy_sum(hidden, weight, labels, rows=chosen, sizes=(64, 16))
    (wanted,), (found,) = (torch.autograd.grad(loss, rows) for loss in (exact, rounded))
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 2**-8 * wanted.norm()


@pytest.mark.parametrize("ids", [(7, 9), (7, 4096)], ids=["inside", "grown"])
def test_no_tensor_is_as_large_as_the_table(ids: tuple[int, int]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = copies = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor)
                and out.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
            ):
                self.numel = max(self.numel, out.untyped_storage().nbytes() // 4)
                self.copies += func is torch.ops.aten.constant_pad_nd.default
            return out

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(4096, 8)
    rows = TrainedRows(torch.tensor(ids), torch.randn(2, 8, requires_grad=True), ids[1] == 4096)
    with Largest() as seen:
        linear_cross_entropy_sum(hidden, weight, torch.zeros(64, dtype=torch.int64), rows=rows, sizes=(4, 4)).backward()
    assert 0 < seen.numel <= (4096 + ALIGNMENT) * 4, "a chunk's logits; the table has 4096 * 8 values"
    assert seen.copies == 0


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_computed_for_them(guard: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, labels = torch.randn(N, H), torch.randn(V, H), torch.zeros(N, dtype=torch.int64)
    rows = TrainedRows(torch.tensor(GROWN), nn.Parameter(torch.randn(len(GROWN), H)), 2)
    with guard(), FlopCounterMode(display=False) as seen:
        without = linear_cross_entropy_sum(hidden, weight, labels, rows=rows)
    assert seen.get_total_flops() == 2 * N * H * (V + len(GROWN)), "the logits, once"
    assert torch.equal(without, linear_cross_entropy_sum(hidden, weight, labels, rows=rows))


def test_a_bias_belongs_to_the_table_alone() -> None:
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    rows, labels = TrainedRows(torch.tensor(GROWN), torch.randn(len(GROWN), H), 2), torch.randint(0, V + 2, (N,))
    expected = F.cross_entropy(head_logits(hidden, weight, bias, rows), labels, reduction="sum")
    found = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, rows=rows, sizes=(7, 3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def _batch(ids: tuple[int, ...]) -> MicroBatch:
    """Two rows in which every trained token is read and predicted."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (19, 27):
        tokens = rng.integers(3, 300, length).astype(np.int32)
        tokens[2 : 2 + 2 * len(ids)] = ids * 2
        span = [np.array([value], dtype=np.int32) for value in (1, length)]
        rows.append(TokenRow(tokens, *span, np.ones(1, dtype=np.float32)))
    return collate(TokenTable.of_rows(rows), [[0], [1]], 0)


def _dense_twin(folder: Path, model: Any, num_new: int) -> nn.Module:
    """A plain model whose whole tables train, with the adapter's rows in them."""
    twin: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = twin.config.tie_word_embeddings
    for layer, module in zip(
        token_layers(model).values(), (twin.get_input_embeddings(), twin.get_output_embeddings()), strict=True
    ):
        if not (tied and module is twin.get_output_embeddings()):
            rows: Any = layer.trained()
            grown = torch.cat([module.weight.detach(), torch.zeros(num_new, module.weight.shape[1])])
            module.weight = nn.Parameter(grown.index_copy(0, rows.ids_R, rows.rows_RH.detach()))
    if tied:
        twin.get_output_embeddings().weight = twin.get_input_embeddings().weight
    return twin  # type: ignore[no-any-return]


@pytest.mark.parametrize("ids", [(5, 300), (5, 300, VOCAB_SIZE, VOCAB_SIZE + 1)], ids=["inside", "grown"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_gradients_of_a_model_s_rows_equal_a_dense_model_s(tie: bool, ids: tuple[int, ...], tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path / "llama", tie=tie)
    texts = tuple(f"<{number}>" for number in ids)
    tokens, num_new = NewTokens(texts, ids, (False,) * len(ids)), len(ids) - 2
    section = AdapterSection(r=4, alpha=8.0, new_tokens=texts)
    base = tiny_base(folder, quant_type="none")
    model: Any = attach_adapter(base.model, section, 0, base_name="tiny", tokens=tokens)
    for layer in token_layers(model).values():
        if layer.tied_adapter is None:
            nn.init.normal_(layer.trainable_tokens_delta["default"], std=0.05)
    twin, batch = _dense_twin(folder, model, num_new), _batch(ids)

    logits = twin(input_ids=batch.input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    loss = CausalModel(model.train()).loss_sum(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch.input_ids).logits, logits, rtol=1e-4, atol=1e-5)

    tables = [twin.get_input_embeddings()] + ([] if tie else [twin.get_output_embeddings()])  # type: ignore[operator]
    trained = [layer for layer in token_layers(model).values() if layer.tied_adapter is None]
    assert len(tables) == len(trained)
    for table, layer in zip(tables, trained, strict=True):
        own = layer.trainable_tokens_delta["default"].grad
        assert own is not None and own.shape == (len(ids), table.weight.shape[1])
        assert bool((own.abs().amax(1) > 1e-3).all()), "each row is reached"
        # Sums over 42 tokens in another order than the dense model's.
        torch.testing.assert_close(own, table.weight.grad[list(ids)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_embedding_with_rows_is_peft_s(family: str) -> None:
    """Gemma scales what it reads; the rows are scaled like the table's. PEFT copies the table instead."""
    base = tiny_model(family)
    tokens = NewTokens(("<a>", "<b>"), (5, 300), (False, False))
    section = AdapterSection(r=4, alpha=8.0, new_tokens=tokens.texts)
    layer = next(iter(token_layers(attach_adapter(base, section, 0, base_name="tiny", tokens=tokens)).values()))
    rows: Any = layer.trainable_tokens_delta["default"]
    nn.init.normal_(rows)
    ids, weights = torch.tensor([[5, 7, 300, 5], [511, 0, 5, 300]]), torch.randn(2, 4, 128)
    found = {}
    for forward in (layer.forward, super(TokenLayer, layer).forward):
        out = forward(ids)
        found[forward] = out, *torch.autograd.grad((out * weights).sum(), rows)
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
