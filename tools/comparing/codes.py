"""The 4-bit codes of the quantisation study: what each makes of a weight, and how far that is from it.

All by the readable reference (quant/reference.py), in float32: the same path for every code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_train.quant.affine import dequantize_affine, quantize_affine
from qlora_train.quant.reference import round_trip

BLOCK_SIZE = 64
AFFINE_GROUP = 32
_INT4_LEVELS = 7  # on either side of zero
SAMPLES = 1024  # weights of a synthetic matrix in each direction


def int4_absmax(weight_OI: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """15 even steps: round(7 w / absmax) absmax / 7 in blocks of the flat weight, float32; as the QLoRA paper's Int4.

    Source: QLoRA, arXiv 2305.14314, section 2, equation 1, with 7 in place of 127.

    >>> int4_absmax(torch.tensor([[7.0, -3.4, 0.4, 0.6]]), 4).tolist()
    [[7.0, -3.0, 0.0, 1.0]]
    """
    blocks = weight_OI.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    return ((blocks / absmax * _INT4_LEVELS).round() * absmax / _INT4_LEVELS).view(weight_OI.shape)


# A weight (out, in) through the code and back, float32.
CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda weight: weight.float(),
    "int4": int4_absmax,
    "fp4": lambda weight: round_trip(weight, "fp4", BLOCK_SIZE, double_quant=False),
    "nf4": lambda weight: round_trip(weight, "nf4", BLOCK_SIZE, double_quant=False),
    # As bitsandbytes quantises absmax on the device where the weight is: then the 4-bit layer's weight, to the bit.
    "nf4_dq": lambda weight: round_trip(weight, "nf4", BLOCK_SIZE, double_quant=True, on_cpu_grid=not weight.is_cuda),
    "int4_affine": lambda weight: dequantize_affine(quantize_affine(weight, AFFINE_GROUP)),
}


def synthetic_weights() -> dict[str, Tensor]:
    """Weights of known distributions, (1024, 1024) float32, from a fixed seed: the tails grow from row to row."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(SAMPLES, SAMPLES, generator=generator)

    def student(freedom: int) -> Tensor:
        squares = sum((normal() ** 2 for _ in range(freedom)), torch.zeros(SAMPLES, SAMPLES))
        return normal() / (squares / freedom).sqrt()

    return {"Gaussian": normal(), "Student t, 5 degrees": student(5), "Student t, 3 degrees": student(3)}


def relative_error(weight_OI: Tensor, code: str) -> float:
    """||W - W'||_F / ||W||_F."""
    weight = weight_OI.double()
    return float((weight - CODES[code](weight_OI).double()).norm() / weight.norm())
