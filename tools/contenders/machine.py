"""What the machine can do: bf16 matmuls on its own, of the shapes of this model on a CPU, of large ones on a card."""

from __future__ import annotations

REPEATS = 8
# (rows, (out, in) of each weight)
SHAPES = {"cpu": (2048, ((1536, 576), (576, 1536))), "cuda": (8192, ((14336, 4096), (4096, 14336)))}


def matmul_flops_per_s(threads: int, device: str = "cpu") -> float:
    """The best rate of several repeats, over the shapes together: x (rows, in) W^T, in FLOP/s."""
    import torch

    from contenders.counting import Meter

    torch.set_num_threads(threads)
    meter, (rows, shapes) = Meter(device), SHAPES[device]
    best = 0.0
    for _ in range(REPEATS):
        seconds = flops = 0.0
        for num_out, num_in in shapes:
            x, weight = (torch.randn(size, num_in, dtype=torch.bfloat16, device=device) for size in (rows, num_out))
            started = meter.now()
            torch.nn.functional.linear(x, weight)
            seconds += meter.now() - started
            flops += 2 * rows * num_in * num_out
        best = max(best, flops / seconds)
    return best
