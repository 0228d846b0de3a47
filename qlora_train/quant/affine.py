"""INT4 with a scale and a zero point for each group of inputs: w = scale (q - zero), q in 0..15, zero a float.

Zero points that are floats can take up any update that is constant within a group, to the bit of the codes: QA-LoRA's
merge. Weights are held as `Params4bit` like those of bitsandbytes, with a state of their own.

Shape legend: O outputs, I inputs, G groups of a row, g weights of a group; I = G g.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

INT4 = "int4"
HIGHEST = 15
SCALE_DTYPE, ZERO_DTYPE = torch.bfloat16, torch.float32


@dataclass
class AffineState:
    """What the codes of a weight stand for, under the names of bitsandbytes' `QuantState` where it has them."""

    scale_OG: Tensor
    zero_OG: Tensor
    shape: torch.Size
    dtype: torch.dtype  # what the layer computes in
    blocksize: int
    quant_type: str = INT4
    nested: bool = False

    def to(self, device: torch.device | str | None) -> None:
        """Move the statistics, as `Params4bit.to` asks for it."""
        self.scale_OG, self.zero_OG = self.scale_OG.to(device), self.zero_OG.to(device)

    def as_dict(self, packed: bool = False) -> dict[str, Tensor]:
        """The statistics by name, for a layer's `state_dict`."""
        return {"scale": self.scale_OG, "zero": self.zero_OG}


class AffineLinear(Linear4bit):
    """A frozen linear layer with such a weight; gradients flow to the input alone."""

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b` in the dtype of x, the weight rounded to it once."""
        weight = dequantize_affine(self.weight).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight, bias)


def is_affine(weight: Params4bit) -> bool:
    """Whether a 4-bit weight is of this kind."""
    return isinstance(weight.quant_state, AffineState)


def quantize_affine(weight_OI: Tensor, group_size: int) -> Params4bit:
    """Round to the nearest of 16 values between the least and the greatest of each group.

        scale = (max - min) / 15        bfloat16, computed with as rounded
        zero  = -min / scale            float32
        q     = clamp(round(w / scale + zero), 0, 15)

    A group of equal weights w gets scale |w| (or 1), so that it is exact. 4 + 48 / g bits a weight: 5.5 with g = 32,
    4.75 with 64. |w - w'| <= 0.56 scale (tests/numerics/test_affine.py): half a step, and a sixteenth of one where
    bfloat16 rounded the scale down. ValueError where g does not divide I, or a weight is not finite.
    Source: QA-LoRA, arXiv 2309.14717, section 3.1; rounding of zero points left out, as in HQQ.
    """
    num_out, num_in = weight_OI.shape
    if num_in % group_size or not torch.isfinite(weight_OI).all():
        raise ValueError(f"a weight of shape {tuple(weight_OI.shape)} has no groups of {group_size}, or is not finite")
    groups_OGg = weight_OI.float().view(num_out, -1, group_size)
    least, greatest = groups_OGg.amin(dim=2), groups_OGg.amax(dim=2)
    scale = (greatest - least) / HIGHEST
    flat = torch.where(least == 0, torch.ones_like(least), least.abs())
    scale_OG = torch.where(scale > 0, scale, flat).to(SCALE_DTYPE)
    wide = scale_OG.float()
    zero_OG = -least / wide
    codes_OGg = (groups_OGg / wide[:, :, None] + zero_OG[:, :, None]).round_().clamp_(0, HIGHEST).to(torch.uint8)
    pairs = codes_OGg.view(num_out, -1, 2)
    packed = (pairs[:, :, 0] << 4 | pairs[:, :, 1]).reshape(-1, 1)
    return affine_weight(packed, AffineState(scale_OG, zero_OG, weight_OI.shape, weight_OI.dtype, group_size))


def affine_weight(packed: Tensor, state: AffineState) -> Params4bit:
    """A parameter of packed codes (O I / 2, 1), the first of a pair in the high nibble."""
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=False,
        quant_type=INT4,
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )


def codes_of(weight: Params4bit) -> Tensor:
    """The codes (O, I), uint8 in 0..15."""
    packed = weight.data.view(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).view(weight.quant_state.shape)


def dequantize_affine(weight: Params4bit) -> Tensor:
    """The float32 weight (O, I): scale (q - zero)."""
    state: AffineState = weight.quant_state
    codes_OGg = codes_of(weight).view(*state.scale_OG.shape, state.blocksize).to(torch.float32)
    return codes_OGg.sub_(state.zero_OG[:, :, None]).mul_(state.scale_OG.float()[:, :, None]).view(state.shape)


def with_update(weight: Params4bit, delta_OG: Tensor) -> Params4bit:
    """The weight plus an update that is delta[o, k] on all of group k: zero' = zero - delta / scale.

    Codes and scales stay as they are. Exact but for the rounding of one float32 for each group. Source: QA-LoRA, arXiv
    2309.14717, section 3.2.
    """
    state: AffineState = weight.quant_state
    moved = replace(state, zero_OG=state.zero_OG - delta_OG / state.scale_OG.float())
    return affine_weight(weight.data, moved)


def meta_state(shape: torch.Size, group_size: int, dtype: torch.dtype) -> AffineState:
    """The state of a weight of this shape on the meta device: sizes without values."""
    groups = (shape[0], shape[1] // group_size)
    scale, zero = (torch.empty(groups, dtype=kind, device="meta") for kind in (SCALE_DTYPE, ZERO_DTYPE))
    return AffineState(scale, zero, shape, dtype, group_size)
