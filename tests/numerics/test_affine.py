"""Affine INT4: its error, its exact cases, QA-LoRA's merge into the zero points, and NF4 as the case that cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_train.adapters.forms.qalora import GroupedForm
from qlora_train.quant.affine import AffineLinear, affine_weight, codes_of, quantize_affine, with_update
from qlora_train.quant.bnb import (
    QuantSettings,
    dequantize,
    dequantize_into,
    packed_parts,
    packed_tensors,
    quantize,
    settings_of,
)
from qlora_train.quant.fingerprint import print_tensor

NF4 = QuantSettings("nf4", double_quant=False, block_size=64, storage_dtype="uint8")
G = 32


def weight(seed: int = 0, num_out: int = 24, num_in: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, num_in, generator=generator) * 0.02


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_half_a_step(group_size: int, dtype: torch.dtype) -> None:
    original = weight().to(dtype)
    packed = quantize(original, QuantSettings("int4", False, group_size, "uint8"))
    steps = packed.quant_state.scale_OG.float().repeat_interleave(group_size, dim=1)
    error = (dequantize(packed) - original.float()).abs()
    assert float((error / steps).max()) <= 0.5 + 1 / 16 + 1e-3, "half a step, and what rounding the scale can cost"
    assert packed.data.shape == (24 * 128 // 2, 1) and packed.data.dtype == torch.uint8
    assert int(codes_of(packed).min()) == 0 and int(codes_of(packed).max()) == 15
    assert settings_of(packed) == QuantSettings("int4", False, group_size, "uint8")
    finer = quantize_affine(original, 32)
    assert float((dequantize(finer) - original.float()).norm()) <= float(error.norm()) + 1e-7


def test_codes_equal_a_loop_over_groups() -> None:
    original = weight(num_out=3, num_in=64)
    found = dequantize(quantize_affine(original, G))
    for row in range(3):
        for start in (0, G):
            group = original[row, start : start + G]
            step = ((group.max() - group.min()) / 15).to(torch.bfloat16).float()
            codes = [min(15, max(0, round(float((w - group.min()) / step)))) for w in group]
            expected = torch.tensor([float(group.min()) + float(step) * code for code in codes])
            assert torch.allclose(found[row, start : start + G], expected, atol=1e-6)


def test_weights_on_the_grid_come_back() -> None:
    """16 even steps of a power of two from any lowest value; groups of equal weights; zeros."""
    steps = torch.arange(16).repeat(2).float() * 0.0078125 - 0.03
    original = torch.stack([steps.flip(0), torch.full((32,), 0.37), torch.zeros(32), torch.full((32,), -2e-5)])
    assert torch.allclose(dequantize(quantize_affine(original, G)), original, rtol=5e-3, atol=1e-9)
    assert torch.allclose(dequantize(quantize_affine(original[:1], G)), original[:1], atol=1e-8)
    assert not dequantize(quantize_affine(original, G))[2].any()


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="no groups of 48"):
        quantize_affine(weight(), 48)
    with pytest.raises(ValueError, match="not finite"):
        quantize_affine(weight().index_fill(1, torch.tensor([3]), float("nan")), G)


def test_a_layer_computes_with_its_weight_and_hands_gradients_to_its_input() -> None:
    layer = AffineLinear(128, 24, bias=True, compute_dtype=torch.float32)
    torch.nn.init.normal_(layer.bias)
    layer.weight = quantize_affine(weight(), G)
    x = torch.randn(5, 128, requires_grad=True)
    dense = dequantize(layer.weight)
    out = layer(x)
    assert torch.allclose(out, torch.nn.functional.linear(x, dense, layer.bias), atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(grad, dense.sum(dim=0).expand(5, -1), atol=1e-5)
    into = torch.empty(24, 128, dtype=torch.bfloat16)
    dequantize_into(layer.weight, into)
    assert torch.equal(into, dense.to(torch.bfloat16))


def test_the_fingerprint_covers_codes_scales_and_zero_points() -> None:
    packed = quantize_affine(weight(), G)
    known = print_tensor(packed)
    assert known.quantised and known.finite and known.dtype == "int4" and known.shape == (24, 128)
    assert known.num_bytes == 24 * 128 // 2 + 24 * 4 * 6 and known.is_sound()
    assert set(packed_parts(packed)) == {"codes", "scale", "zero"} and len(packed_tensors(packed)) == 3
    moved = with_update(packed, torch.full((24, 4), 1e-3))
    assert print_tensor(moved).sha256 != known.sha256 == print_tensor(quantize_affine(weight(), G)).sha256
    flipped = packed.data.clone()
    flipped[0] ^= 1
    assert print_tensor(affine_weight(flipped, packed.quant_state)).sha256 != known.sha256


def update() -> tuple[Tensor, Tensor]:
    """What a trained QA-LoRA adapter adds: dense (24, 128), and by group (24, 4)."""
    generator = torch.Generator().manual_seed(2)
    form = GroupedForm(G)
    shapes = form.shapes(4, 128, 24)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    weight_A, weight_B = form.factors(tensors)
    return 2.0 * weight_B @ weight_A, form.group_update(tensors, 2.0)


def test_the_update_is_constant_within_each_group_and_reads_means() -> None:
    dense, by_group = update()
    assert torch.allclose(dense, by_group.repeat_interleave(G, dim=1), atol=1e-7)
    x = torch.randn(5, 128)
    pooled = x.view(5, 4, G).mean(dim=2)
    assert torch.allclose(x @ dense.t(), pooled @ (by_group * G).t(), atol=1e-4)


def test_merging_into_zero_points_loses_nothing() -> None:
    packed = quantize_affine(weight(), G)
    dense, by_group = update()
    merged = with_update(packed, by_group)
    assert torch.equal(codes_of(merged), codes_of(packed))
    assert torch.equal(merged.quant_state.scale_OG, packed.quant_state.scale_OG)
    wanted = dequantize(packed) + dense
    assert float((dequantize(merged) - wanted).abs().max()) < 1e-6 * float(wanted.abs().max()) + 1e-7
    assert torch.equal(dequantize(packed), dequantize(quantize_affine(weight(), G))), "the base is as it was"


def test_nf4_cannot_take_the_update_and_neither_can_zero_points_of_whole_steps() -> None:
    """Negative controls: quantising again loses most of a small update; so does rounding the zero points."""
    dense, by_group = update()
    size = 0.05 * float(weight().norm() / dense.norm())
    dense, by_group = dense * size, by_group * size
    packed = quantize(weight(), NF4)
    base = dequantize(packed)
    again = dequantize(quantize(base + dense, NF4))
    assert float((again - (base + dense)).norm()) > 0.5 * float(dense.norm())
    merged = with_update(quantize_affine(weight(), G), by_group)
    exact = dequantize(merged)
    merged.quant_state.zero_OG = merged.quant_state.zero_OG.round()
    assert float((dequantize(merged) - exact).norm()) > 0.5 * float(dense.norm())


def test_an_update_of_float_zero_points_is_all_there() -> None:
    dense, by_group = update()
    size = 0.05 * float(weight().norm() / dense.norm())
    packed = quantize_affine(weight(), G)
    moved = dequantize(with_update(packed, by_group * size)) - dequantize(packed)
    assert float((moved - dense * size).norm()) < 1e-4 * float((dense * size).norm())
