"""AdamW whose moments bitsandbytes holds: in 8 bit, in pages that move to the host, or both; and what moments weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit
from torch import nn

BNB_ADAMW: dict[str, Any] = {
    "adamw_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw_8bit": PagedAdamW8bit,
}
EIGHT_BIT = frozenset({"adamw_8bit", "paged_adamw_8bit"})
PAGED = frozenset({"paged_adamw", "paged_adamw_8bit"})
MIN_8BIT_SIZE = 4096  # elements; the moments of smaller parameters stay float32
BLOCK_SIZE = 256  # elements that share an absmax; fixed in bitsandbytes' optim/optimizer.py
TABLE_SIZE = 256  # values that an 8-bit code can stand for


def build_bnb_adamw(
    optimizer: str,
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW of that name, decoupled decay, eps 1e-8 like torch's.

    8-bit moments: code * absmax of each block of 256 elements, code from a table of 256 values that is dense near zero
    (bitsandbytes' `create_dynamic_map`; the paper is arXiv 2110.02861). Meant for CUDA: on a CPU a step over 5.4
    million parameters took 1.7 s with 8-bit moments, and 0.11 s with torch's AdamW (one thread, bitsandbytes 0.50.2).
    Paged moments of 100,000 elements and more lie in CUDA's managed memory; bitsandbytes never frees them, so a process
    that trains again adds to them.
    """
    return BNB_ADAMW[optimizer](
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, min_8bit_size=MIN_8BIT_SIZE
    )


def optimizer_state_bytes(optimizer: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of every tensor in the state of an optimiser over parameters of these shapes; exact, allocator apart.

    With n elements in a parameter: `adamw` 8 n + 4 (two float32 moments and the step); bitsandbytes' 8 n with 32 bit
    and below 4,096 elements, else 2 n + 8 ceil(n / 256), and two tables of 1 KiB for all parameters together. Paged
    moments count too: they may, but need not, leave the card. LoRA on every linear layer, in GB:

        model          r    parameters   adamw   adamw_8bit
        Llama-3.1-8B   16   41.9e6       0.336   0.085
        Llama-3-70B    64   828e6        6.63    1.68

    >>> optimizer_state_bytes("adamw", [(16, 4096), (4096, 16)])
    1048584
    >>> optimizer_state_bytes("adamw_8bit", [(16, 4096), (4096, 16)])
    268288
    """
    counts = [math.prod(shape) for shape in shapes]
    if optimizer == "adamw":
        return sum(8 * count + 4 for count in counts)
    in_8bit = [count for count in counts if count >= MIN_8BIT_SIZE] if optimizer in EIGHT_BIT else []
    codes = sum(2 * count + 8 * math.ceil(count / BLOCK_SIZE) for count in in_8bit)
    tables = 2 * TABLE_SIZE * 4 if in_8bit else 0
    return codes + tables + 8 * (sum(counts) - sum(in_8bit))
