"""What no trace can see: the memory of CUDA's runtime and of the allocator. Stated, never fitted to single rows."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Constant:
    """An amount from outside the trace, the range in which it lies, and where that is known from."""

    cause: str
    what: str  # in a few words
    num_bytes: int  # 0 where it is a share
    share: float  # of what the step adds to what is held all the time
    low: float  # of the same kind as the value: bytes, or the share
    high: float
    source: str


CUDA_CONTEXT = Constant(
    "CUDA context",
    "driver, loaded kernels, handles",
    470 * MIB,
    0.0,
    70 * MIB,
    650 * MIB,
    "memory in use, less allocated, less reserved, in torch's out-of-memory messages: median of 13 public ones; 12 lie "
    "in this range",
)
CUBLAS_WORKSPACE = Constant(
    "cuBLAS workspace",
    "what torch sets aside for matmuls",
    32 * MIB,
    0.0,
    8 * MIB,
    64 * MIB,
    "torch allocates 4096 KiB x 2 + 16 KiB x 8 for each handle and stream, 32 MiB on Hopper (PyTorch documentation, "
    "CUBLAS_WORKSPACE_CONFIG), and as much for cuBLASLt",
)
FRAGMENTATION = Constant(
    "fragmentation",
    "gaps between the allocator's blocks: 5 % of what a step adds",
    0,
    0.05,
    0.0,
    0.15,
    "torch's caching allocator takes blocks above 1 MiB from segments of 20 MiB, above 10 MiB from segments in "
    "steps of 2 MiB; in 15 public reports 0.5 to 51 %, median 3 %, of all that is allocated lay reserved beside it",
)
HOST_LIBRARIES = Constant(
    "Python and libraries",
    "the process before a model is loaded",
    700 * MIB,
    0.0,
    500 * MIB,
    1000 * MIB,
    "resident memory of the process after its imports, before a model is loaded",
)
HOST_FRAGMENTATION = Constant(
    "fragmentation",
    "gaps of the heap: 15 % of what a step adds",
    0,
    0.15,
    0.0,
    0.5,
    "gaps of the C library's heap, and buffers of matmuls: grows where blocks of many sizes are freed and made again",
)
CONSTANTS = (CUDA_CONTEXT, CUBLAS_WORKSPACE, FRAGMENTATION, HOST_LIBRARIES, HOST_FRAGMENTATION)
