"""GPTQ: rounding a weight to 4 bit so that what its layer puts out changes least, for the inputs that it really gets.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323),
algorithm 1, with the scale of a group chosen when its first column is reached. Columns are rounded one by one, and what
a column loses is made up for by those to come:

    H = sum over inputs x of x x^T + damping,   U = upper Cholesky factor of H^-1
    error_j = (w_j - rounded_j) / U_jj,          w_k -= error_j U_jk for k > j
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.data.loader import MicroBatch
from qlora_train.export.formats.four_bit import best_scales, nearest_codes
from qlora_train.export.layers import Weights, observe_in_layers

BLOCK_COLUMNS = 128
DAMPING = 0.01  # of the mean of H's diagonal, as in the paper


def gptq(weight_OI: Tensor, gram_II: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (O, I) int8 and scales (O, I / group) bfloat16 of a float32 weight.

    `gram_II` is the sum of x x^T over the layer's inputs. Held against plain rounding in
    tests/unit/export_formats/test_gptq.py. Cost: I^3 / 3 for the factor, O I^2 for the columns.
    """
    weight, width = weight_OI.float().clone(), weight_OI.shape[1]
    factor = _inverse_factor(gram_II)
    codes = torch.empty_like(weight, dtype=torch.int8)
    scales: list[Tensor] = []
    for start in range(0, width, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, width)
        errors = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            if column % group_size == 0:
                scales.append(best_scales(weight[:, column : column + group_size]))
            step = scales[-1].float()
            code = nearest_codes(weight[:, column, None], scales[-1])[:, 0]
            codes[:, column] = code.to(torch.int8)
            error = (weight[:, column] - code * step) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, torch.stack(scales, dim=1)


def _inverse_factor(gram_II: Tensor) -> Tensor:
    """U with H^-1 = U^T U, of the damped H. Inputs that are always zero get a diagonal of their own."""
    damped = gram_II.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = diagonal.mean().clamp(min=1e-6)
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def round_in_layers(
    model: Any,
    weights: Weights,
    batches: Sequence[MicroBatch],
    linear_layers: Mapping[str, nn.Linear],
    device: torch.device,
    take: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run rows through a hollow model, a layer at a time; `take(name, weight, gram)` gets each of its linear layers.

    Inputs are those of the model before any rounding. Memory: one layer, its grams, the hidden states of the rows.
    """
    grams: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2).float()
        found = rows.T @ rows
        grams[name] = grams[name] + found if name in grams else found

    def seen_by(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(seen_by(name)) for name, layer in linear_layers.items()]

    def leave(_: int) -> None:
        for name, gram in grams.items():
            take(name, linear_layers[name].weight.detach(), gram)
        grams.clear()

    try:
        observe_in_layers(model, weights, batches, device, after_layer=leave)
    finally:
        for hook in hooks:
            hook.remove()
