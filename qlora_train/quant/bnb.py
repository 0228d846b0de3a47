"""The only module that calls bitsandbytes' 4-bit functions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.cextension import lib as native
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from qlora_train.quant.affine import INT4, AffineLinear, dequantize_affine, is_affine, meta_state, quantize_affine

__all__ = ["Linear4bit", "Params4bit"]

NESTED_BLOCK_SIZE = 256  # absmax values that share a statistic of their own; fixed in bitsandbytes
_NESTED_CODE = torch.empty(256, device="meta")  # bitsandbytes has one table for all


@dataclass(frozen=True)
class QuantSettings:
    """How a weight is quantised: enough, with the weight itself, to get the same codes again."""

    quant_type: str
    double_quant: bool
    block_size: int
    storage_dtype: str

    @classmethod
    def of(cls, quant_type: str, double_quant: bool, block_size: int, storage_dtype: str) -> QuantSettings:
        """What a recipe's section comes to: the scales and zero points of INT4 are never quantised themselves."""
        return cls(quant_type, double_quant and quant_type != INT4, block_size, storage_dtype)


def cpu_width_multiple(block_size: int) -> int:
    """What an input width must be a multiple of on a CPU.

    bitsandbytes 0.50.2's AVX-512 dequantisation reads one absmax per row segment and is wrong where a block straddles
    two rows (csrc/cpu_ops.cpp; the ARM path has the guard), by up to the weight's own size. Delete when a fixed version
    is the minimum.
    """
    return max(64, block_size)


def linear4bit_modules(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    """Every 4-bit linear layer with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def forbid_cpu_repacking(model: nn.Module) -> None:
    """Keep every 4-bit layer in the training layout for ever.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a weight in place at the first forward in eval mode
    (nn/modules.py, `Linear4bit.forward`). From then on gradients through the layer are missing, without an error, and
    `dequantize_4bit` returns garbage (bitsandbytes issue 2078, pull request 2083). Held by
    tests/numerics/test_cpu_repacking.py. Delete when the minimum version no longer repacks what it trains.
    """
    for _, module in linear4bit_modules(model):
        module.support_avx512bf16_for_cpu = False


def settings_of(weight: Params4bit) -> QuantSettings:
    """What the loaded weight says of itself, read back from its `quant_state`."""
    state = weight.quant_state
    return QuantSettings(
        quant_type=state.quant_type,
        double_quant=bool(state.nested),
        block_size=int(state.blocksize),
        storage_dtype=str(weight.quant_storage).removeprefix("torch."),
    )


def quantize(weight_OI: Tensor, settings: QuantSettings) -> Params4bit:
    """Quantise one weight on the device where it lies, by the routine that loading uses, so the codes are equal."""
    if settings.quant_type == INT4:
        return quantize_affine(weight_OI, settings.block_size)
    weight = Params4bit(
        weight_OI,
        requires_grad=False,
        blocksize=settings.block_size,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        quant_storage=getattr(torch, settings.storage_dtype),
    )
    return weight.to(weight_OI.device)


def packed_state(weight: Params4bit) -> dict[str, Tensor]:
    """What transformers stores beside a weight's codes, to load them without quantising: by the ends of the names."""
    state: dict[str, Tensor] = weight.quant_state.as_dict(packed=True)
    return state


def from_packed(codes: Tensor, state: dict[str, Tensor]) -> Params4bit:
    """The weight that `packed_state` was taken of."""
    made: Params4bit = Params4bit.from_prequantized(codes, dict(state), device=codes.device)
    return made


def meta_linear4bit(layer: nn.Linear, settings: QuantSettings) -> Linear4bit:
    """The 4-bit layer that loading makes of a linear layer, on the meta device: every tensor's size, and no value.

    bitsandbytes cannot quantise a meta tensor where statistics are quantised too (it reads them). The sizes are those
    of `quantize`: tests/unit/quant/test_meta.py.
    """
    dtype = layer.weight.dtype
    made = (AffineLinear if settings.quant_type == INT4 else Linear4bit)(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, device="meta"
    )
    storage_dtype: torch.dtype = getattr(torch, settings.storage_dtype)
    num_packed = (layer.weight.numel() + 1) // (2 * storage_dtype.itemsize)
    made.weight = Params4bit(
        torch.empty(num_packed, 1, dtype=storage_dtype, device="meta"),
        quant_state=_meta_state(layer.weight.shape, settings, dtype),
        blocksize=settings.block_size,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        quant_storage=storage_dtype,
        bnb_quantized=True,
    )
    if layer.bias is not None:
        made.bias = layer.bias
    return made


def _meta_state(shape: torch.Size, settings: QuantSettings, dtype: torch.dtype) -> QuantState:
    if settings.quant_type == INT4:
        return meta_state(shape, settings.block_size, dtype)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    num_blocks = math.ceil(math.prod(shape) / settings.block_size)
    nested: dict[str, object] = {}
    if settings.double_quant:
        statistics = QuantState(
            absmax=empty(math.ceil(num_blocks / NESTED_BLOCK_SIZE)),
            code=_NESTED_CODE,
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        nested = {"offset": empty(), "state2": statistics}
    return QuantState(
        absmax=empty(num_blocks, dtype=torch.uint8 if settings.double_quant else torch.float32),
        shape=shape,
        code=empty(16),
        blocksize=settings.block_size,
        quant_type=settings.quant_type,
        dtype=dtype,
        **nested,
    )


def dequantize(weight: Params4bit) -> Tensor:
    """The float32 weight (O, I) that the 4-bit layer computes with: code[index] * absmax, before any rounding.

    Raises RuntimeError when bitsandbytes has repacked the weight for CPU inference: its values are lost then.
    """
    if is_affine(weight):
        return dequantize_affine(weight)
    state = weight.quant_state
    codes, absmax = _codes(weight), _absmax(weight)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, state.blocksize, state.quant_type, state.shape, torch.float32
    )


def dequantize_into(weight: Params4bit, out_OI: Tensor) -> None:
    """As `dequantize`, rounded once to the dtype of `out_OI` (bfloat16, float16 or float32) and written there.

    On a CPU, writing into memory that was written before takes a quarter of the time of a fresh tensor.
    """
    if is_affine(weight):
        out_OI.copy_(dequantize_affine(weight))
        return
    state = weight.quant_state
    torch.ops.qlora_train.dequantize_into(_codes(weight), _absmax(weight), state.blocksize, state.quant_type, out_OI)


def _codes(weight: Params4bit) -> Tensor:
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise RuntimeError("a 4-bit weight was repacked for CPU inference: forbid_cpu_repacking() was not called")
    return weight.data.view(torch.uint8).view(-1, 1)


def _absmax(weight: Params4bit) -> Tensor:
    """One float32 value a block; doubly quantised ones are dequantised."""
    state = weight.quant_state
    if not state.nested:
        return state.absmax.to(torch.float32)
    inner = state.state2  # what bitsandbytes' own function calls, without its half a dozen looks at the arguments
    found = torch.ops.bitsandbytes.dequantize_blockwise.default(
        state.absmax, inner.absmax, inner.code, inner.blocksize, torch.float32
    )
    return found.add_(state.offset)


def _into_by_copy(codes: Tensor, absmax: Tensor, block_size: int, quant_type: str, out: Tensor) -> None:
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    out.copy_(op(codes, absmax, block_size, quant_type, out.shape, out.dtype))


def _into_cpu(codes: Tensor, absmax: Tensor, block_size: int, quant_type: str, out: Tensor) -> None:
    """bitsandbytes 0.50.2 has this kernel, and no operator that takes its output (backends/cpu/ops.py, whose conditions
    and arguments these are). Delete when `dequantize_4bit.out` exists for the CPU."""
    suffix = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[out.dtype]
    function = getattr(_CPU_LIBRARY, f"cdequantize_blockwise_cpu_{quant_type}_{suffix}", None)
    width = out.shape[-1]
    if function is None or block_size >= 2048 or width % 2 or not out.is_contiguous():
        _into_by_copy(codes, absmax, block_size, quant_type, out)
        return
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes.contiguous(), absmax.contiguous(), out)]
    sizes = [ctypes.c_longlong(size) for size in (block_size, math.prod(out.shape[:-1]), width)]
    function(*pointers, *sizes)


def _into_cuda(codes: Tensor, absmax: Tensor, block_size: int, quant_type: str, out: Tensor) -> None:
    op = torch.ops.bitsandbytes.dequantize_4bit.out
    op(codes, absmax, block_size, quant_type, list(out.shape), out.dtype, out=out)


_CPU_LIBRARY = getattr(native, "_lib", None)  # None where no build of bitsandbytes fits the machine
# An operator of its own, so that it can be counted, traced on meta, and called from compiled code.
_OPERATORS = torch.library.Library("qlora_train", "DEF")
_OPERATORS.define("dequantize_into(Tensor codes, Tensor absmax, int block_size, str quant_type, Tensor(a!) out) -> ()")
_OPERATORS.impl("dequantize_into", _into_cpu, "CPU")
_OPERATORS.impl("dequantize_into", _into_cuda, "CUDA")
_OPERATORS.impl("dequantize_into", lambda *_: None, "Meta")


def packed_parts(weight: Params4bit) -> dict[str, Tensor]:
    """The stored tensors of a 4-bit weight: packed codes, absmax, and absmax's own statistics where it is quantised.

    Of an INT4 weight: codes, scales, zero points.
    """
    state = weight.quant_state
    if is_affine(weight):
        return {"codes": weight.data, "scale": state.scale_OG, "zero": state.zero_OG}
    parts = {"codes": weight.data, "absmax": state.absmax}
    if state.nested:
        parts |= {"absmax_of_absmax": state.state2.absmax, "offset": state.offset}
    return parts


def packed_tensors(weight: Params4bit) -> list[Tensor]:
    """Every tensor that a 4-bit weight holds on its device: `packed_parts`, and the tables of what codes stand for."""
    state = weight.quant_state
    if is_affine(weight):
        return list(packed_parts(weight).values())
    tables = [state.code, state.state2.code] if state.nested else [state.code]
    return [*packed_parts(weight).values(), *tables]


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every 4-bit layer compute, forward and backward, in `dtype`; the codes stay as they are."""
    for _, module in linear4bit_modules(model):
        module.compute_dtype = dtype
        module.compute_type_is_set = True
        module.weight.quant_state.dtype = dtype
