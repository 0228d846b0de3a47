"""The oracle: blockwise 4-bit quantisation in readable torch. Slow, exact, and independent of bitsandbytes.

Shape suffixes: O out_features, I in_features, N = O * I weights, K blocks of weights, V values per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QuantType = Literal["nf4", "fp4"]

# NF4: quantiles of N(0, 1), divided by the largest so that they span [-1, 1]. 8 values above zero, 7 below, and an
# exact zero, so that padding and pruned weights survive. The outermost quantile is at probability NF4_OFFSET, not at 1
# where it would be infinite: 1 - (1/32 + 1/30) / 2, the mean of the ends for 16 and for 15 equal shares.
# Source: QLoRA, arXiv 2305.14314, section 3 and appendix E; the digits are those that bitsandbytes 0.50.2 ships.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_OFFSET = 0.9677083

# FP4: a sign bit (8) and three bits that name a magnitude, in twelfths of the largest: 0, 1/16, 8, 12, 4, 6, 2, 3. One
# mantissa bit and two exponent bits, with the exponents numbered in bitsandbytes' own way, so codes are not in order
# of value, and zero has two of them. Source: bitsandbytes 0.50.2, functional.get_4bit_type.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

ABSMAX_BLOCK_SIZE = 256  # absmax values that share one second-level absmax (QLoRA, section 3, "Double Quantization")
_SMALLEST_ABSMAX = 1e-38  # what an all-zero block is divided by: its weights stay zero


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bits: `codes` (O, I) uint8 in 0..15, `absmax` (K,) float32, one per block of the flat weight."""

    codes: Tensor
    absmax: Tensor
    quant_type: QuantType
    block_size: int

    @property
    def packed(self) -> Tensor:
        """Two codes per byte, the first in the high nibble, (ceil(N / 2), 1) uint8: as `Linear4bit.weight` has it."""
        return pack(self.codes)


@dataclass(frozen=True)
class QuantizedAbsmax:
    """absmax in 8 bits. `codes` (K,) uint8; `absmax` (ceil(K / 256),) float32; `offset` the mean, float32 scalar."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor


def nf4_code() -> Tensor:
    """The 16 values of NF4, (16,) float32, ascending."""
    return torch.tensor(NF4_CODE, dtype=torch.float32)


def nf4_from_quantiles() -> Tensor:
    """NF4 from its definition, (16,) float64: the second source of `NF4_CODE`, equal to it within 1.1e-7.

    positive_i = Q(OFFSET + (0.5 - OFFSET) i / 8), i = 0..7; negative_i = -Q(OFFSET + (0.5 - OFFSET) i / 7), i = 0..6;
    all divided by Q(OFFSET), where Q is the quantile function of N(0, 1).
    """
    positive = torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive])
    return values.sort().values / values.max()


def fp4_code() -> Tensor:
    """The 16 values of FP4, (16,) float32, by code: 0..7 the magnitudes, 8..15 the same with a minus.

    >>> [round(value, 4) for value in fp4_code()[:8].tolist()]
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    """
    magnitudes = torch.tensor(FP4_MAGNITUDES, dtype=torch.float32)
    return torch.cat([magnitudes, 0.0 - magnitudes]) / magnitudes.max()


def code_of(quant_type: QuantType) -> Tensor:
    """The 16 float32 values of a quant type; ValueError when there is no such type."""
    if quant_type == "nf4":
        return nf4_code()
    if quant_type == "fp4":
        return fp4_code()
    raise ValueError(f"quant_type must be 'nf4' or 'fp4', not {quant_type!r}")


def quantize_blockwise(weight_OI: Tensor, quant_type: QuantType, block_size: int) -> Quantized:
    """Quantise a weight to 4 bits in blocks of `block_size` values.

    For the block b of the *flattened* weight (row after row; a row whose length is no multiple of the block size shares
    a block with the next, and the last block may be short):

        absmax_b = max |w|                      float32
        code     = argmin_j |w * (1 / absmax_b) - value_j|       ties to the smaller value

    `weight_OI` is float32, bfloat16 or float16 of any shape; all arithmetic is float32. Raises ValueError for another
    dtype, an unknown quant type, a block size below 2 or an odd one, an empty weight, or one that is not finite (a
    single NaN would spoil its whole block). Invariants, held by tests/numerics/test_reference.py: codes, absmax and
    dequantised values equal bitsandbytes' bit for bit; the extreme of each block maps to -1 or 1; zeros stay zeros;
    quantising again what was dequantised gives the same codes; |w - w'| <= half the widest gap * absmax.
    Source: QLoRA, arXiv 2305.14314, section 2, equations 1 and 2, and section 3.

    >>> quantized = quantize_blockwise(torch.tensor([[0.5, -1.0, 0.1, 0.0]]), "nf4", 4)
    >>> quantized.codes.tolist(), quantized.absmax.tolist(), quantized.packed.tolist()
    ([[12, 0, 8, 7]], [1.0], [[192], [135]])
    """
    _check_weight(weight_OI, block_size)
    absmax, scaled = _scale_blocks(weight_OI.reshape(-1).float(), block_size)
    codes = nearest(scaled, code_of(quant_type).to(weight_OI.device))
    return Quantized(codes.view(weight_OI.shape), absmax, quant_type, block_size)


def dequantize_blockwise(quantized: Quantized, absmax: Tensor | None = None) -> Tensor:
    """value[code] * absmax of its block, float32, in the weight's shape. `absmax` (K,) stands in for the exact one.

    >>> dequantize_blockwise(quantize_blockwise(torch.tensor([[0.0, -2.0, 2.0, 1.4]]), "nf4", 4)).tolist()
    [[0.0, -2.0, 2.0, 1.4459136724472046]]
    """
    absmax = quantized.absmax if absmax is None else absmax
    values = code_of(quantized.quant_type).to(absmax.device)[quantized.codes.reshape(-1).long()]
    absmax_N = absmax.repeat_interleave(quantized.block_size)[: values.numel()]
    return (values * absmax_N).view(quantized.codes.shape)


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15 of any shape -> (ceil(N / 2), 1) uint8, the first of a pair in the high nibble; an odd end gets a 0.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
    [[18], [240]]
    """
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[::2] << 4 | flat[1::2]).unsqueeze(1)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: uint8 bytes -> codes of the given shape.

    >>> unpack(torch.tensor([[18], [240]], dtype=torch.uint8), (3,)).tolist()
    [1, 2, 15]
    """
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 0xF], dim=1).reshape(-1)[: math.prod(shape)].view(shape)


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, (256,) float32, ascending in [-0.993, 1]; widest gap 0.0141.

    Floating point whose exponent is unary, so small numbers have few fraction bits and large ones many: for decade
    d = 0..6 the magnitudes are 10^(d - 6) times the midpoints of 2^d equal parts of [0.1, 1]. That makes 127 magnitudes
    of either sign; zero and 1.0 fill the rest. Source: bitsandbytes 0.50.2, functional.create_dynamic_map, which cites
    Dettmers, arXiv 1511.04561.

    >>> values = dynamic_map()
    >>> values.shape, values[127].item(), values[-1].item()
    (torch.Size([256]), 0.0, 1.0)
    """
    magnitudes = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        magnitudes.append(10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(magnitudes)
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


def quantize_absmax(absmax: Tensor, *, on_cpu_grid: bool = False) -> QuantizedAbsmax:
    """Double quantisation: absmax (K,) float32 to 8 bits around its mean, in blocks of 256.

        offset = mean(absmax);  a_b = max |absmax - offset|;  code = argmin_j |(absmax - offset) * (1 / a_b) - map_j|

    |absmax' - absmax| <= 0.00704 * a_b. `on_cpu_grid` rounds the scaled value to a grid of 65,536 points first, as
    bitsandbytes' CPU kernel does (csrc/cpu_ops.cpp, norm_to_lut_index): what is dequantised then equals that kernel's
    to the bit. Without it about 0.15 % of the codes differ from the CPU kernel's, by at most a grid step of 3.1e-5 in
    the scaled value. Raises ValueError for an empty absmax or another dtype. Source: QLoRA, arXiv 2305.14314,
    section 3, "Double Quantization", which quantises to FP8; bitsandbytes, and so we, to the dynamic map.

    >>> double = quantize_absmax(torch.tensor([1.0, 2.0, 3.0]))
    >>> double.codes.tolist(), double.absmax.tolist(), double.offset.item()
    ([0, 127, 255], [1.0], 2.0)
    """
    if absmax.dtype != torch.float32 or absmax.numel() == 0:
        raise ValueError(f"absmax must be float32 and not empty, not {absmax.dtype} of {absmax.numel()} values")
    offset = absmax.mean()
    second_absmax, scaled = _scale_blocks(absmax - offset, ABSMAX_BLOCK_SIZE, divide_short=False)
    if on_cpu_grid:
        scaled = _on_cpu_grid(scaled)
    codes = nearest(scaled, dynamic_map().to(absmax.device))
    return QuantizedAbsmax(codes, second_absmax, offset)


def dequantize_absmax(quantized: QuantizedAbsmax) -> Tensor:
    """map[code] * absmax of its block + offset, (K,) float32.

    >>> dequantize_absmax(quantize_absmax(torch.tensor([1.0, 2.0, 3.0]))).tolist()
    [1.0070312023162842, 2.0, 3.0]
    """
    values = dynamic_map().to(quantized.codes.device)[quantized.codes.long()]
    return values * quantized.absmax.repeat_interleave(ABSMAX_BLOCK_SIZE)[: values.numel()] + quantized.offset


def round_trip(
    weight_OI: Tensor, quant_type: QuantType, block_size: int, *, double_quant: bool, on_cpu_grid: bool = False
) -> Tensor:
    """The float32 weight that a 4-bit layer computes with: quantised, and dequantised again.

    >>> round_trip(torch.tensor([[0.5, -1.0, 0.1, 0.0]]), "nf4", 4, double_quant=False).tolist()
    [[0.44070982933044434, -1.0, 0.07958029955625534, 0.0]]
    """
    quantized = quantize_blockwise(weight_OI, quant_type, block_size)
    if not double_quant:
        return dequantize_blockwise(quantized)
    return dequantize_blockwise(
        quantized, dequantize_absmax(quantize_absmax(quantized.absmax, on_cpu_grid=on_cpu_grid))
    )


def nearest(scaled: Tensor, code: Tensor) -> Tensor:
    """The index, uint8, of the nearest code value; a tie goes to the smaller value.

    FP4's two zeros: 0 for what is negative or zero, 8 for what is positive. Both mean zero.
    """
    ascending = code.argsort(stable=True)
    midpoints = (code[ascending[:-1]] + code[ascending[1:]]) / 2
    return ascending[torch.bucketize(scaled, midpoints)].to(torch.uint8)


def _scale_blocks(values: Tensor, block_size: int, *, divide_short: bool = True) -> tuple[Tensor, Tensor]:
    """absmax per block, and the values scaled to [-1, 1] by it.

    bitsandbytes multiplies by the reciprocal, but divides in a last, short block of weights. The two differ in the
    last bit, which decides ties, so we do as it does.
    """
    num_full = values.numel() // block_size * block_size
    blocks, short = values[:num_full].view(-1, block_size), values[num_full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)).reshape(-1)
    if short.numel():
        short_absmax = short.abs().max().clamp(min=_SMALLEST_ABSMAX)
        short_scaled = short / short_absmax if divide_short else short * (1.0 / short_absmax)
        absmax, scaled = torch.cat([absmax, short_absmax.view(1)]), torch.cat([scaled, short_scaled])
    return absmax, scaled.clamp(-1, 1)


def _on_cpu_grid(scaled: Tensor) -> Tensor:
    """Round to the nearest of 65,536 equal steps of [-1, 1]; the products in float64 stand for a fused multiply-add."""
    step = ((scaled + 1).double() * 0.5 * 65535 + 0.5).float().floor()
    return (-1 + (2 * step) / 65535).float()


def _check_weight(weight: Tensor, block_size: int) -> None:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a weight must be float32, bfloat16 or float16 to be quantised, not {weight.dtype}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even and at least 2, not {block_size}")
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is empty or not finite: it cannot be quantised")
