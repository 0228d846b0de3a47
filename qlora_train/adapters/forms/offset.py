"""Forms of adapters that start away from zero: what they start with is taken off again, in the layer or from the base.

Both keep the start in buffers beside A and B, which PEFT saves with them: lora_start_A (r, in), lora_start_B (out, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_train.adapters.forms.base import Form, Shapes, Tensors

START = ("lora_start_A", "lora_start_B")


class _StartedForm(Form):
    buffers = START

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """The start (r, in) and (out, r) besides, zero until adapters/inits gives it."""
        return {**super().shapes(r, num_in, num_out), START[0]: (r, num_in), START[1]: (num_out, r)}


class OffsetForm(_StartedForm):
    """`delta = scaling * (B A - B0 A0)` on the base as it was loaded: MiLoRA, OLoRA, LoRA-GA.

    Written B (A - A0) + (B - B0) A0, with the differences in float32: the start changes nothing, to the bit, and what
    training moves survives the rounding to a 16-bit compute dtype, in which B A - B0 A0 would cancel. As a file it is
    plain LoRA of rank 2 r. Cost: LoRA's at twice the rank, without further optimiser state.
    """

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """([A - A0; A0], [B, B - B0]) of rank 2 r."""
        lora_A, lora_B, start_A, start_B = (tensors[name] for name in ("lora_A", "lora_B", *START))
        return torch.cat([lora_A - start_A, start_A]), torch.cat([lora_B, lora_B - start_B], dim=1)


class ResidualForm(_StartedForm):
    """`delta = scaling * B A` on the base quantise(W - scaling * B0 A0): PiSSA, and LoftQ of several iterations.

    The buffers are the recipe of that base: model/start.py makes it again from them and W, wherever it is needed.
    """
