"""Forms with trained diagonals around A and B: AdaLoRA's singular values and AFLoRA's two scalings."""

from __future__ import annotations

from torch import Tensor, nn

from qlora_train.adapters.forms.base import Form, Shapes, Tensors, kaiming_uniform
from qlora_train.adapters.updates import Delta, Update


class SingularForm(Form):
    """AdaLoRA: `delta = scaling * P diag(E) Q` (arXiv 2303.10512); lora_A is Q, lora_B is P, lora_core_e is E (r,).

    E starts at zero, P and Q at N(0, 0.02^2). The allocator of adapters/schedules.py holds entries of E at zero; what
    it holds there is left out of the folded factors, so that an export has the rank that was kept.
    """

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """E (r,) besides."""
        return {**super().shapes(r, num_in, num_out), "lora_core_e": (r,)}

    def start(self, tensors: dict[str, Tensor], layer: object) -> None:
        """P and Q normal, E zero."""
        nn.init.normal_(tensors["lora_A"], std=0.02)
        nn.init.normal_(tensors["lora_B"], std=0.02)

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(diag(E) Q, P)."""
        return tensors["lora_core_e"][:, None] * tensors["lora_A"], tensors["lora_B"]

    def update(self, tensors: Tensors, scaling: float) -> Update:
        """Without the triplets that were given up, of which one is left where all were."""
        kept = tensors["lora_core_e"] != 0
        kept[0] |= ~kept.any()
        weight_A, weight_B = self.factors(tensors)
        return Delta(weight_A[kept], weight_B[:, kept], scaling)


class ScaledForm(Form):
    """AFLoRA: `delta = scaling * diag(b) B diag(d) A` (arXiv 2403.13269).

    lora_core_d is d (r,), lora_core_b is b (out,). A and B start kaiming-uniform, d at 0.1, b at zero. A and B are
    frozen one by one by adapters/schedules.py; d and b always train.
    """

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """d (r,) and b (out,) besides."""
        return {**super().shapes(r, num_in, num_out), "lora_core_d": (r,), "lora_core_b": (num_out,)}

    def start(self, tensors: dict[str, Tensor], layer: object) -> None:
        """As in the authors' program for GSM8K."""
        kaiming_uniform(tensors["lora_A"], a=0.0)
        kaiming_uniform(tensors["lora_B"], a=0.0)
        nn.init.constant_(tensors["lora_core_d"], 0.1)
        nn.init.zeros_(tensors["lora_core_b"])

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(diag(d) A, diag(b) B)."""
        return tensors["lora_core_d"][:, None] * tensors["lora_A"], tensors["lora_core_b"][:, None] * tensors["lora_B"]
