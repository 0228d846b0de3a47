"""QA-LoRA: an adapter that reads the means of groups of inputs, so that its update is constant within each group."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qlora_train.adapters.forms.base import Form, Shapes, Tensors


class GroupedForm(Form):
    """`delta = scaling * B (A kron 1^T) / g` for groups of g inputs; lora_A (r, in / g), lora_B (out, r).

    `A mean(x)` is `A' x` with each column of A standing g times, over g: the layers run it as any other pair of
    factors. On an INT4 base with the same groups the update goes into the zero points without a rounding of codes
    (`quant.affine.with_update`). A starts Xavier-uniform, B at zero, as in the authors' program.
    Source: QA-LoRA, arXiv 2309.14717, section 3.2. The paper's listing adds up a group where the authors' program and
    we take its mean; PEFT's variant multiplies the mean by the number of groups, and is for GPTQ only.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """A reads one number a group."""
        return {"lora_A": (r, num_in // self.group_size), "lora_B": (num_out, r)}

    def sizes(self, found: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(in, out)."""
        return found["lora_A"][1] * self.group_size, found["lora_B"][0]

    def start(self, tensors: dict[str, Tensor], layer: object) -> None:
        """A Xavier-uniform."""
        nn.init.xavier_uniform_(tensors["lora_A"])

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(A kron 1^T / g, B)."""
        return tensors["lora_A"].repeat_interleave(self.group_size, dim=1) / self.group_size, tensors["lora_B"]

    def group_update(self, tensors: Tensors, scaling: float) -> Tensor:
        """delta[o, k], what the update is on all inputs of group k, (out, in / g) in float32."""
        product = tensors["lora_B"].float() @ tensors["lora_A"].float()
        return product.mul_(scaling / self.group_size)
