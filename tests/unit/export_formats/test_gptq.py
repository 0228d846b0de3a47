"""Rounding with a view to the outputs: better than rounding each value to its nearest step, and nothing else."""

from __future__ import annotations

import torch

from qlora_train.export.formats.gptq import gptq
from tests.unit.export_formats.rounding import quantize_groups

GROUP = 32


def dense(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes.unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)


def inputs(width: int = 192) -> torch.Tensor:
    """Correlated, as a layer's are."""
    return torch.randn(512, 24) @ torch.randn(24, width) + 0.3 * torch.randn(512, width)


def test_outputs_change_less_than_by_the_nearest_steps() -> None:
    weight, x = torch.randn(48, 192), inputs()
    codes, scale = gptq(weight, x.T @ x, GROUP)
    assert codes.shape == weight.shape and codes.dtype == torch.int8 and scale.shape == (48, 6)
    assert codes.min() >= -8 and codes.max() <= 7
    ours = (x @ (dense(codes, scale) - weight).T).square().mean()
    nearest = (x @ (dense(*quantize_groups(weight, GROUP)) - weight).T).square().mean()
    assert ours < 0.4 * nearest


def test_inputs_without_correlation_leave_the_nearest_steps() -> None:
    weight = torch.randn(8, 64)
    codes, scale = gptq(weight, torch.eye(64), GROUP)
    nearest, plain_scale = quantize_groups(weight, GROUP)
    assert torch.equal(codes, nearest) and torch.equal(scale, plain_scale)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = torch.randn(8, 64), inputs(64)
    x[:, 5] = 0
    codes, scale = gptq(weight, x.T @ x, GROUP)
    assert torch.isfinite(dense(codes, scale)).all() and (dense(codes, scale) - weight).abs().max() < 2
