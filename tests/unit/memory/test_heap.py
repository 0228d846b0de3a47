"""The heap of a training process: trimmed where it has grown, and not at every step."""

import resource
import sys
from pathlib import Path

import pytest

from qlora_train.memory.heap import HeapKeeper, trim_heap


class Process:
    """A heap of which `live` stays in use, and each step leaves behind what it took."""

    def __init__(self) -> None:
        self.resident = self.live = 1_000
        self.trims: list[int] = []
        self.steps = 0
        self.keeper = HeapKeeper(lambda: self.resident, self._trim)

    def _trim(self) -> None:
        self.trims.append(self.steps)
        self.resident = self.live

    def step(self, size: int) -> None:
        """A step that needs `size`, of which the heap has what earlier steps left."""
        self.resident = max(self.resident, self.live + size)
        self.steps += 1
        self.keeper.after_step()


def test_equal_steps_are_trimmed_once() -> None:
    process = Process()
    for _ in range(50):
        process.step(100)
    assert process.trims == [1]
    assert process.resident == 1_100


def test_a_heap_that_grows_is_trimmed_before_it_has_grown_by_more_than_a_tenth() -> None:
    process = Process()
    process.step(100)
    for _ in range(100):
        process.resident += 3  # blocks that split up, and find no use again
        process.step(100)
        assert process.resident <= 1_000 + 100 * 1.1 + 3
    assert 10 < len(process.trims) < 60


def test_what_a_larger_step_needs_on_a_trimmed_heap_is_no_growth() -> None:
    process = Process()
    process.step(100)
    process.step(100)
    for _ in range(20):
        process.step(150)
    assert process.trims == [1, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [bytearray(100_000) for _ in range(2_000)]  # below the threshold above which blocks are mapped alone
    del blocks[::2]
    del blocks[:-1]
    before = resident()
    trim_heap()
    assert before - resident() > 100_000_000
