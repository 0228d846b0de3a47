"""Rounding to the nearest step, group by group: what our own codes are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_train.export.formats.four_bit import best_scales, nearest_codes


def quantize_groups(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (O, I) int8 in -8..7 of the nearest steps, and scales (O, I / group) bfloat16."""
    groups = weight_OI.unflatten(1, (-1, group_size))
    scale = best_scales(groups)
    return nearest_codes(groups, scale).flatten(1).to(torch.int8), scale
