"""Errors that say that memory ran out, and what is made of them."""

from __future__ import annotations

import errno
import gc
import weakref

import numpy as np
import pyarrow as pa
import pytest
import torch

from qlora_train.errors import MachineError, ModelError, OutOfMemory, is_out_of_memory, requested_bytes
from qlora_train.memory.exhausted import Exhaustion, Option, release
from tests.loading import CPU

MESSAGES = {
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 11 MiB": 20
    * 2**20,
    "CUDA out of memory. Tried to allocate 1.16 GiB (GPU 0; 10.76 GiB total capacity; 9.1 GiB already": int(
        1.16 * 2**30
    ),
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096 bytes. Error code 12 (Cannot allocate memory)": 4096,
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported": None,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": None,
    "std::bad_alloc": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_torch(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert requested_bytes(message) == MESSAGES[message]


def test_real_errors_of_the_libraries() -> None:
    """What they raise today, on a host: of a size that no machine has."""
    for fail in (
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.empty(2**58, dtype=np.uint8),
        lambda: pa.allocate_buffer(2**58),
        lambda: bytearray(2**62),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            fail()
        assert is_out_of_memory(caught.value), caught.value
    assert requested_bytes(str(caught.value)) is None
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert requested_bytes(str(caught.value)) == 2**60


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
        ModelError("out of memory", fix="-"),
        OutOfMemory("once is enough", fix="-"),
    ],
    ids=str,
)
def test_other_errors_are_not_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_system_and_card() -> None:
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("whatever a driver says"))
    assert issubclass(OutOfMemory, MachineError) and OutOfMemory.exit_code == 9


def test_the_error_names_figures_and_ways_out_in_order() -> None:
    found = Exhaustion.of(
        RuntimeError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0"), "at step 7", "training", CPU
    )
    assert found.requested == 3 * 2**29 and found.held > 2**20
    options = [Option("train.checkpointing=full", "slower"), Option("adapter.r=8", "another adapter")]
    text = str(found.error(planned=5 * 2**30, saved="step 6 is saved", options=options))
    for part in ("out of memory at step 7", "1.50 GiB more", "5.00 GiB were planned for training", "step 6 is saved"):
        assert part in text
    assert text.index("train.checkpointing=full") < text.index("adapter.r=8") and text.index("Fix: ") < text.index(
        "slower"
    )
    other = found.error(planned=2**30, planned_for="evaluation", saved="", options=[])
    assert "1.00 GiB were planned for evaluation" in str(other)
    assert "use a machine with more" in str(found.error(planned=None, saved="", options=[]))


def test_release_frees_what_the_failed_frames_hold() -> None:
    freed: list[bool] = []

    def hungry() -> None:
        tensor = torch.zeros(10)
        weakref.finalize(tensor.untyped_storage(), freed.append, True)
        raise MemoryError

    def computing() -> None:
        try:
            hungry()
        except MemoryError as error:
            raise RuntimeError("out of memory") from error

    try:
        computing()
    except RuntimeError as error:
        gc.collect()
        assert not freed, "a traceback keeps the tensors of its frames alive"
        release(error, CPU)
        assert freed
