"""DoRA: each row of the adapted weight has a trained length, and LoRA turns its direction (arXiv 2402.09353)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_train.adapters.forms.base import Form, Shapes, Tensors, base_weight
from qlora_train.adapters.updates import Delta, RescaledRows, Update
from qlora_train.kernels.dense import content_state

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name: it loads what we save


class DoraForm(Form):
    """`W' = diag(m) (W + scaling * B A) / ||W + scaling * B A||`, the norm per output row, detached (section 4.3).

    m starts at the row norms of the dequantised weight, which is what the forward pass computes with: the start is the
    base to the bit. The norms are had without the dense sum:

        ||w_o + s (B A)_o||^2 = ||w_o||^2 + 2 s <(W A^T)_o, B_o> + s^2 (B (A A^T) B^T)_oo

    with ||w_o||^2 kept from the start (out floats per layer). Cost per call: 2 r in out, that of r more tokens; PEFT
    builds an in x in identity and the dense delta. Dropout acts on the adapter's branch alone: PEFT also multiplies
    the dropped input with W, which costs another dense matmul. In float32 equal to PEFT's (tests/methods/test_dora.py).
    """

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """m (out,) besides."""
        return {**super().shapes(r, num_in, num_out), MAGNITUDE: (num_out,)}

    def start(self, tensors: dict[str, Tensor], layer: Any) -> None:
        """m = ||W||, row by row."""
        if tensors[MAGNITUDE].is_meta:
            return
        layer.base_row_squares = base_weight(layer).square().sum(dim=1)
        tensors[MAGNITUDE].copy_(layer.base_row_squares.sqrt())

    def gain(self, tensors: Tensors, layer: Any, adapter: str, dtype: torch.dtype) -> Tensor:
        """m / ||W + scaling * B A||; gradients flow to m alone."""
        return tensors[MAGNITUDE] / row_norms(
            layer, tensors["lora_A"], tensors["lora_B"], layer.scaling[adapter], dtype
        )

    def update(self, tensors: Tensors, scaling: float) -> Update:
        """A row rescaling, of full rank."""
        return RescaledRows(Delta(*self.factors(tensors), scaling), tensors[MAGNITUDE])


@torch.no_grad()
def row_norms(layer: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """||W + scaling * B A|| of each row (out,) in float32, W as the layer multiplies with it in `dtype`.

    While nothing is trained they are kept: generating a token must not dequantise every weight anew.
    """
    if lora_A.is_meta:  # a plan: sizes without values
        return torch.ones(lora_B.shape[0], device=lora_A.device)
    state = None if layer.training else (content_state(lora_A), content_state(lora_B), dtype)
    if state is not None and getattr(layer, "kept_row_norms", (None,))[0] == state:
        kept: Tensor = layer.kept_row_norms[1]
        return kept
    weight_A, weight_B = lora_A.float(), lora_B.float()
    weight_OI = base_weight(layer) if layer.frozen is None else layer.frozen.dense(dtype)
    cross = ((weight_OI @ weight_A.to(weight_OI.dtype).T).float() * weight_B).sum(dim=1)
    quadratic = ((weight_B @ (weight_A @ weight_A.T)) * weight_B).sum(dim=1)
    norms = (layer.base_row_squares + 2 * scaling * cross + scaling**2 * quadratic).clamp_min(0).sqrt()
    layer.kept_row_norms = (state, norms)
    return norms
