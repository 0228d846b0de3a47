"""Each adapted or quantised layer by itself: what it made of some tokens in training, and what its merged weight makes.

A fault in one of hundreds of layers can hide in the mean over tokens; here it stands alone, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.adapters.layers import lora_layers
from qlora_train.model.low_rank import low_rank_layers
from qlora_train.quant.bnb import linear4bit_modules
from qlora_train.quant.fingerprint import base_parameter_name

NUM_TOKENS = 8
ROWS_AT_A_TIME = 1024
# float32 sums of thousands of products, in other orders: relative to ||W|| ||x|| / sqrt(in).
SUM_ERROR = 1e-4
_EXPONENT_BITS = 0x7F800000  # of a float32


@dataclass(frozen=True)
class Probe:
    """Input (N, in) and output (N, out) of one layer in float32, on the host."""

    x_NI: Tensor
    y_NO: Tensor


@dataclass(frozen=True)
class Deviation:
    """How far a merged layer's output is from the trained layer's, over what rounding its weight explains."""

    name: str
    ratio: float


@contextmanager
def probing(model: nn.Module) -> Iterator[dict[str, Probe]]:
    """Within the block, the first call of every adapted or 4-bit layer is noted, by its weight's name when merged.

    A layer in two factors is one there, and always noted: its weight is a product, adapted or not.
    """
    found: dict[str, Probe] = {}
    in_two, adapted = dict(low_rank_layers(model)), lora_layers(model)
    single = {name: layer for name, layer in linear4bit_modules(model) if name.rpartition(".")[0] not in adapted}
    layers = {n: layer for n, layer in (single | adapted).items() if n.rpartition(".")[0] not in in_two} | in_two
    handles = [
        layer.register_forward_hook(_noting(found, str(base_parameter_name(f"{name}.weight"))))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _noting(found: dict[str, Probe], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name not in found:
            x, y = (tensor.reshape(-1, tensor.shape[-1])[:NUM_TOKENS] for tensor in (args[0], output))
            found[name] = Probe(x.float().cpu().clone(), y.float().cpu().clone())

    return note


def deviations(
    probes: Mapping[str, Probe],
    value: Callable[[str], Tensor],
    has: Callable[[str], bool],
    export_dtype: torch.dtype,
) -> list[Deviation]:
    """One for every linear layer that is adapted or quantised in the trained model, worst first.

    `value` reads a merged tensor in float32 by the base's name, `has` finds one.

        ratio^2 = ||x (W_merged - W_trained)^T||^2 / (sum of x_i^2 ulp_oi^2 / 12 + (SUM_ERROR ||W|| ||x||)^2 / in)

    Rounding to the nearest leaves an error that is even over one unit in the last place (ulp), of variance ulp^2 / 12
    and independent from weight to weight, so a right merge gives 1 within some percent, whatever the input's channels.
    Memory: the weight in float32, and blocks of its rows. Reads every such weight once.
    """
    found = []
    for name, probe in probes.items():
        weight_OI, bias = value(name).cpu(), f"{name.removesuffix('weight')}bias"
        off_NO = probe.x_NI @ weight_OI.T - probe.y_NO
        if has(bias):
            off_NO += value(bias).cpu()
        squares_I = probe.x_NI.square().sum(0)
        parts = weight_OI.split(ROWS_AT_A_TIME)
        rounding = sum(float((ulp(part, export_dtype).square() @ squares_I).sum()) / 12 for part in parts)
        sums = (SUM_ERROR * float(weight_OI.norm())) ** 2 * float(squares_I.mean())
        found.append(Deviation(name, float(off_NO.norm()) / max((rounding + sums) ** 0.5, 1e-30)))
    return sorted(found, key=lambda deviation: -deviation.ratio)


def recheck(
    suspect: Deviation, probe: Probe, written_OI: Tensor, exact_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Deviation:
    """A suspect held against what rounding really did to its weight, from the merged weight before it was rounded.

    Roundings are not always independent: weights of one code in one block are rounded alike, and with the small gain of
    a DoRA row their errors add up over the inputs. Where each written weight is the exact one rounded to the nearest,
    the ratio is over the output of those roundings; where one is not, the suspect stays as it is.
    """
    rounding_OI = written_OI - exact_OI
    if bool((rounding_OI.abs() > 0.51 * ulp(exact_OI, dtype) + torch.finfo(torch.float32).tiny).any()):
        return suspect
    off_NO = probe.x_NI @ written_OI.T - probe.y_NO + (0 if bias_O is None else bias_O)
    sums = SUM_ERROR * float(written_OI.norm()) * float(probe.x_NI.square().sum(0).mean()) ** 0.5
    rounded = float((probe.x_NI @ rounding_OI.T).norm())
    return Deviation(suspect.name, float(off_NO.norm()) / max((rounded**2 + sums**2) ** 0.5, 1e-30))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a dtype at each value; none at zero, which nothing was rounded to.

    >>> ulp(torch.tensor([1.0, -1.5, 2.0, 0.0]), torch.bfloat16).tolist()
    [0.0078125, 0.0078125, 0.015625, 0.0]
    """
    info = torch.finfo(dtype)
    # A float32 without sign and mantissa is the power of two below it; 0 for zero and for denormal numbers.
    power = (values.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    ulp = (power * info.eps).clamp(min=info.smallest_normal * info.eps)
    return torch.where(values == 0, 0.0, ulp)
