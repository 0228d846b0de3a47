"""Frozen weights in the compute dtype: dequantised into buffers that all layers share, or kept for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_train.quant.bnb import Params4bit, dequantize_into


def content_state(tensor: Tensor) -> tuple[int, int]:
    """Differs when the tensor has been written to, or given other memory."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Workspace:
    """One buffer for each place in a decoder layer ("mlp.down_proj"), which holds what was last asked for there.

    A layer's backward pass follows its recomputation, so it finds its weights where that left them: under full
    checkpointing a step costs two dequantisations per weight instead of three (tests/numerics/test_fused_linear.py
    counts them). Costs the dense weights of one layer: 2 bytes per weight in bfloat16, 436 MB for an 8B model.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._owners: dict[tuple[object, ...], tuple[Params4bit, tuple[int, int]]] = {}

    def dense(self, place: str, weight: Params4bit, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`, valid until another weight of the same place is asked for."""
        shape = weight.quant_state.shape
        key = (place, shape, dtype, weight.device)
        state, owner = content_state(weight), self._owners.get(key)
        if owner is None or owner[0] is not weight or owner[1] != state:
            if key not in self._buffers:
                with torch.inference_mode(False):  # an evaluation may come first, and training writes here too
                    self._buffers[key] = torch.empty(shape, dtype=dtype, device=weight.device)
            self._owners.pop(key, None)
            dequantize_into(weight, self._buffers[key])
            self._owners[key] = (weight, state)
        return self._buffers[key]

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers so far."""
        return list(self._buffers.values())

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers so far."""
        return sum(buffer.nbytes for buffer in self.buffers)


class FrozenLinear:
    """A frozen linear layer as the fused function wants it: its dense weight and its bias, whatever holds them."""

    def __init__(self, layer: nn.Module, place: str, workspace: Workspace) -> None:
        self._layer = layer
        self._place = place
        self.workspace = workspace
        self._resident: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        bias: Tensor | None = getattr(self._layer, "bias", None)
        return bias

    @property
    def is_quantised(self) -> bool:
        """Whether the dense weight is made from 4-bit codes."""
        return isinstance(self._layer.weight, Params4bit)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that the layer computes with, in `dtype`; valid until the next weight of its place."""
        if self._resident is not None and self._resident.dtype == dtype:
            return self._resident
        weight = self._layer.weight
        if isinstance(weight, Params4bit):
            return self.workspace.dense(self._place, weight, dtype)
        assert isinstance(weight, Tensor)
        return weight.to(dtype)

    def make_resident(self, dtype: torch.dtype) -> int:
        """Keep a dense copy from now on: nothing is dequantised for this layer again. Returns its bytes.

        The base is frozen: a copy of a weight that changes afterwards would be stale.
        """
        weight = self._layer.weight
        if self._resident is None and isinstance(weight, Params4bit):
            self._resident = torch.empty(weight.quant_state.shape, dtype=dtype, device=weight.device)
            dequantize_into(weight, self._resident)
        return 0 if self._resident is None else self._resident.nbytes

    def drop_resident(self) -> None:
        """Keep no dense copy any more."""
        self._resident = None
