"""Forms with a small matrix between A and B: MTLoRA's four structures and FLoRA's core space."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qlora_train.adapters.forms.base import FACTORS, Form, Shapes, Tensors
from qlora_train.adapters.forms.convolution import KERNELS, start_factors, tucker_product, tucker_shapes
from qlora_train.adapters.updates import Difference, Update

STRUCTURES = ("shim", "icfm", "ctcm", "dtsm")


class TransformedForm(Form):
    """MTLoRA: `delta = scaling * B T A` with a trained T (r, r) (arXiv 2403.07440).

        shim  T = C        icfm  T = C C^T        ctcm  T = C D        dtsm  T = C + D

    Starts at T = I, as the authors' page advises: there it is LoRA, to the bit. With the zero cores of one of their
    programs icfm and ctcm have no gradient at all and never train (tests/methods/test_mtlora.py).
    Cost beside LoRA's: 2 r^2 in, once per step and layer, whatever the number of tokens.
    """

    def __init__(self, structure: str) -> None:
        assert structure in STRUCTURES, structure
        self.structure = structure

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """C (r, r), and D (r, r) where the structure has two."""
        cores = ("lora_core_c", "lora_core_d") if self.structure in ("ctcm", "dtsm") else ("lora_core_c",)
        return {**super().shapes(r, num_in, num_out), **dict.fromkeys(cores, (r, r))}

    def start(self, tensors: dict[str, Tensor], layer: object) -> None:
        """T = I."""
        for name in tensors.keys() & {"lora_core_c", "lora_core_d"}:
            nn.init.eye_(tensors[name])
            if self.structure == "dtsm":
                tensors[name].mul_(0.5)

    def transformation(self, tensors: Tensors) -> Tensor:
        """T (r, r)."""
        core_C = tensors["lora_core_c"]
        match self.structure:
            case "shim":
                return core_C
            case "icfm":
                return core_C @ core_C.T
            case "ctcm":
                return core_C @ tensors["lora_core_d"]
            case _:
                return core_C + tensors["lora_core_d"]

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(T A, B)."""
        return self.transformation(tensors) @ tensors["lora_A"], tensors["lora_B"]


class CoreForm(Form):
    """FLoRA: `delta = scaling * U_out G^T U_in^T`, the Tucker form of a matrix (arXiv 2405.14739).

    lora_A is U_in^T (r, in), lora_B is U_out (out, r_out), lora_core_c is G (r, r_out). G starts at zero and both U
    random: the first step moves G alone. The two ranks may differ; the update has at most the rank of the smaller one.
    The dense update, which the authors' program builds, is never built here. A convolution's weight has more modes,
    with a factor each: forms/convolution.py.
    """

    def __init__(self, r_out: int | None = None, r_kernel: int | None = None) -> None:
        self.r_out, self.r_kernel = r_out, r_kernel

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """U_in^T (r, in), U_out (out, r_out), G (r, r_out)."""
        r_out = self.r_out or r
        return {"lora_A": (r, num_in), "lora_B": (num_out, r_out), "lora_core_c": (r, r_out)}

    def convolution_shapes(self, weight: tuple[int, ...], r: int) -> Shapes:
        """Every tensor of a convolution of this weight."""
        return tucker_shapes(weight, r, self.r_out or r, self.r_kernel)

    def expected(self, r: int, found: Mapping[str, tuple[int, ...]]) -> Shapes:
        """A convolution is told by its kernel."""
        kernel = [found[name][0] for name in KERNELS if found.get(name)]
        if not kernel or not all(found.get(name) for name in FACTORS):
            return super().expected(r, found)
        return self.convolution_shapes((found["lora_B"][0], found["lora_A"][-1], *kernel), r)

    def updates(self, tensors: Tensors, scaling: float) -> dict[str, Update]:
        """A convolution's is dense: it has more than two sides."""
        if KERNELS[0] in tensors:
            return {"weight": Difference(scaling * tucker_product(tensors))}
        return super().updates(tensors, scaling)

    def start(self, tensors: dict[str, Tensor], layer: object) -> None:
        """U_in (in, r) and U_out (out, r_out) kaiming-normal with a = sqrt(3), which is N(0, 1 / (2 r)), as in the
        authors' program; G zero."""
        start_factors(tensors)

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(U_in^T, U_out G^T) of rank r."""
        return tensors["lora_A"], tensors["lora_B"] @ tensors["lora_core_c"].T
