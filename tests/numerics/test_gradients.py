"""Training in 4 bit is training on the dequantised weights: loss and every LoRA gradient, also after an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_train.data.loader import MicroBatch
from qlora_train.evaluate.validation import validate
from qlora_train.model.causal import CausalModel
from tests.loading import CPU, dense_twin, gradients, tiny_base, with_adapter
from tests.tiny import build_tiny_neox, build_tiny_phi3


def _batch(seed: int = 0, rows: int = 3, length: int = 12) -> MicroBatch:
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return MicroBatch(ids, labels, rows * (length - length // 2), tuple(range(rows)), (length,) * rows)


def _loss_and_gradients(model: object, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()  # type: ignore[attr-defined]
    loss = CausalModel(model).loss_sum(batch)  # type: ignore[arg-type]
    loss.backward()
    return loss.detach(), gradients(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", [{}, {"double_quant": False}, {"quant_type": "fp4"}, {"block_size": 128}], ids=str)
def test_float32_gradients_equal_the_dense_reference_to_the_bit(tiny_llama_dir: Path, quant: dict[str, object]) -> None:
    base = tiny_base(tiny_llama_dir, **quant)
    twin = with_adapter(dense_twin(base, tiny_llama_dir))
    model = with_adapter(base)
    batch = _batch()
    expected_loss, expected = _loss_and_gradients(twin, batch)
    for when in ("before any evaluation", "after an evaluation"):
        loss, found = _loss_and_gradients(model, batch)
        assert torch.equal(loss, expected_loss), when
        assert found.keys() == expected.keys() and len(found) == 2 * 14, when
        for name in found:
            assert torch.equal(found[name], expected[name]), (when, name)
        assert all(float(g.abs().max()) > 0 for g in found.values())
        validate(CausalModel(model), [_batch(1)], CPU)


def test_bfloat16_gradients_are_near_the_dense_reference(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    twin = with_adapter(dense_twin(base, tiny_llama_dir))
    model = with_adapter(base)
    expected_loss, expected = _loss_and_gradients(twin, _batch())
    loss, found = _loss_and_gradients(model, _batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    for name in found:
        # Dequantising to bf16 and copying float32 values into bf16 round the same way; what may differ is the order of
        # one matmul's sums. Measured worst: 0 (AVX-512 with AMX, torch 2.15); the bound is one bf16 place of the norm.
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error <= 2**-8, (name, float(error))


@pytest.mark.parametrize("build", [build_tiny_neox, build_tiny_phi3])
def test_fused_projections_train_like_their_dense_twin(build: object, tmp_path: Path) -> None:
    folder = build(tmp_path / "model")  # type: ignore[operator]
    base = tiny_base(folder)
    twin = with_adapter(dense_twin(base, folder))
    model = with_adapter(base)
    _, expected = _loss_and_gradients(twin, _batch())
    _, found = _loss_and_gradients(model, _batch())
    assert any(("query_key_value" in name) or ("qkv_proj" in name) for name in found)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_our_forward_equals_peft(tiny_llama_dir: Path) -> None:
    """Merged, disabled and several adapters fall back to PEFT; the plain case gives PEFT's numbers in float32."""
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    from qlora_train.adapters.layers import lora_layers

    model = with_adapter(tiny_base(tiny_llama_dir))
    name, layer = next(iter(lora_layers(model).items()))
    x = torch.randn(2, 5, layer.in_features)
    ours, before = layer(x), layer.num_fallbacks
    torch.testing.assert_close(ours, PeftLinear4bit.forward(layer, x), rtol=1e-5, atol=1e-6)
    assert layer.num_fallbacks == before == 0, name
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x), rtol=0, atol=0)
    assert layer.num_fallbacks == 1
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), PeftLinear4bit.forward(layer, x), rtol=0, atol=0)
    assert layer.num_fallbacks == 2
    model.set_adapter("default")
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer(x), PeftLinear4bit.forward(layer, x), rtol=0, atol=0)
    assert layer.merged and layer.num_fallbacks == 3


def test_padding_does_not_change_a_row(tiny_llama_dir: Path) -> None:
    """Right padding without a mask: the loss of a padded batch is the sum of its rows' alone."""
    causal = CausalModel(with_adapter(tiny_base(tiny_llama_dir)))
    batch = _batch(rows=2, length=16)
    batch.labels[1, 9:] = -100
    together = causal.loss_sum(batch)
    alone = [
        causal.loss_sum(MicroBatch(batch.input_ids[i : i + 1, :n], batch.labels[i : i + 1, :n], 0, (i,), (n,)))
        for i, n in ((0, 16), (1, 9))
    ]
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=1e-6, atol=0)
