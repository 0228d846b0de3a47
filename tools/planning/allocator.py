"""What torch's CUDA allocator reserves for the tensors of a traced step: many publish reserved memory, not tensors.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings. Tensors of up to 1 MiB come from
segments of 2 MiB, those of up to 10 MiB from segments of 20 MiB, larger ones from segments of their own size rounded up
to 2 MiB. The smallest free block that is large enough is taken, and split where enough is left. Freed neighbours are
joined. Segments in which nothing is left are given back only when the card is full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import UntypedStorage

from qlora_train.memory.live import LiveBytes

_MIB = 2**20
SMALLEST_BLOCK = 512
MOST_SMALL = _MIB  # larger tensors come from the pool of large blocks
SMALL_SEGMENT = 2 * _MIB
LARGE_SEGMENT = 20 * _MIB
LEAST_OWN_SEGMENT = 10 * _MIB
SEGMENT_MULTIPLE = 2 * _MIB


class Event(NamedTuple):
    """A tensor comes; or goes, where num_bytes is 0."""

    tensor: int
    num_bytes: int


class Recorder(LiveBytes):
    """LiveBytes that also writes down what comes and goes, in order."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.events: list[Event] = []
        self._names: dict[int, int] = {}  # of the storages that are there, by address
        self._num_made = 0

    def _watch(self, storage: UntypedStorage, num_bytes: int) -> None:
        is_new = storage._cdata not in self._held
        super()._watch(storage, num_bytes)
        if is_new and num_bytes:
            self._names[storage._cdata] = self._made(num_bytes)

    def _forget(self, address: int) -> None:
        super()._forget(address)
        if address in self._names:
            self.events.append(Event(self._names.pop(address), 0))

    def _note_peak(self, operator: str, inside: int) -> None:
        super()._note_peak(operator, inside)
        if inside:
            self.events.append(Event(self._made(inside), 0))

    def _made(self, num_bytes: int) -> int:
        self._num_made += 1
        self.events.append(Event(self._num_made, num_bytes))
        return self._num_made


@dataclass(eq=False)
class _Block:
    segment: int
    start: int
    size: int
    before: _Block | None = None
    after: _Block | None = None
    is_free: bool = False

    def key(self) -> tuple[int, int, int]:
        """Best fit first, then the lowest place."""
        return self.size, self.segment, self.start


class CardIsFullError(Exception):
    """No block is free, and none can be reserved."""


class CachingAllocator:
    """Segments and blocks, without memory. `reserved` and `most_reserved` are bytes."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = limit_bytes
        self.reserved = 0
        self.most_reserved = 0
        self._num_segments = 0
        self._taken: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # by whether small
        self._blocks: dict[tuple[int, int], _Block] = {}  # free ones by segment and start

    def play(self, events: Iterable[Event]) -> None:
        """Serve what comes and goes."""
        for event in events:
            if event.num_bytes:
                self.take(event.tensor, event.num_bytes)
            elif event.tensor in self._taken:
                self.give_back(event.tensor)

    def take(self, tensor: int, num_bytes: int) -> None:
        """Find a block for a tensor, or reserve a segment; CardIsFullError where the limit allows none."""
        size = -(-num_bytes // SMALLEST_BLOCK) * SMALLEST_BLOCK
        small = size <= MOST_SMALL
        free = self._free[small]
        index = bisect_left(free, (size, 0, 0))
        if index < len(free):
            _, segment, start = free.pop(index)
            block = self._blocks.pop((segment, start))
        else:
            block = self._new_segment(size, small)
        block.is_free = False
        left = block.size - size
        if left >= SMALLEST_BLOCK if small else left > MOST_SMALL:
            rest = _Block(block.segment, block.start + size, left, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._set_free(rest, small)
        self._taken[tensor] = block

    def give_back(self, tensor: int) -> None:
        """Free the tensor's block, joined with free neighbours."""
        block = self._taken.pop(tensor)
        small = block.segment < 0
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._unset_free(other, small)
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._set_free(block, small)

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            room = SMALL_SEGMENT
        elif size < LEAST_OWN_SEGMENT:
            room = LARGE_SEGMENT
        else:
            room = -(-size // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE
        if self._limit is not None and self.reserved + room > self._limit:
            self._release_empty_segments()
            if self.reserved + room > self._limit:
                raise CardIsFullError
        self._num_segments += 1
        self.reserved += room
        self.most_reserved = max(self.most_reserved, self.reserved)
        return _Block(-self._num_segments if small else self._num_segments, 0, room)

    def _release_empty_segments(self) -> None:
        for block in [each for each in self._blocks.values() if each.before is None and each.after is None]:
            self._unset_free(block, block.segment < 0)
            self.reserved -= block.size

    def _set_free(self, block: _Block, small: bool) -> None:
        block.is_free = True
        insort(self._free[small], block.key())
        self._blocks[block.segment, block.start] = block

    def _unset_free(self, block: _Block, small: bool) -> None:
        free = self._free[small]
        free.pop(bisect_left(free, block.key()))
        del self._blocks[block.segment, block.start]


def reserved_bytes(events: Iterable[Event], limit_bytes: int | None = None, repeats: int = 3) -> int:
    """Most that is reserved when the step is run so often. What is there before the step comes first in `events` and
    never goes. CardIsFullError as `take`."""
    listed = list(events)
    gone = {event.tensor for event in listed if not event.num_bytes}
    allocator = CachingAllocator(limit_bytes)
    allocator.play(event for event in listed if event.tensor not in gone)
    step = [event for event in listed if event.tensor in gone]
    for _ in range(repeats):
        allocator.play(step)
    return allocator.most_reserved


def least_limit(events: Iterable[Event], allocated: int, precision: float = 0.002) -> int:
    """The least memory with which the step goes through, when empty segments are given back, to that precision."""
    listed = list(events)
    low, high = allocated, reserved_bytes(listed)
    while high - low > precision * high:
        middle = (low + high) // 2
        try:
            reserved_bytes(listed, middle, repeats=2)
            high = middle
        except CardIsFullError:
            low = middle
    return high
