"""What the machine can do: bf16 matmuls of the shapes of this model, on its own."""

from __future__ import annotations

import time

ROWS, SHAPES, REPEATS = 2048, ((1536, 576), (576, 1536)), 8


def matmul_flops_per_s(threads: int) -> float:
    """The best rate of several repeats, over the shapes together: x (2048, in) W^T, in FLOP/s."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for _ in range(REPEATS):
        seconds = flops = 0.0
        for num_out, num_in in SHAPES:
            x, weight = (
                torch.ones(ROWS, num_in, dtype=torch.bfloat16),
                torch.ones(num_out, num_in, dtype=torch.bfloat16),
            )
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds += time.perf_counter() - started
            flops += 2 * ROWS * num_in * num_out
        best = max(best, flops / seconds)
    return best
