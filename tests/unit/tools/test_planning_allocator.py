"""torch's caching allocator, played without memory."""

from __future__ import annotations

import pytest
from planning.allocator import CachingAllocator, CardIsFullError, Event, least_limit, reserved_bytes

MIB = 2**20


def reserved(*events: tuple[int, int]) -> int:
    """Bytes reserved after tensors came (tensor, bytes) and went (tensor, 0)."""
    allocator = CachingAllocator()
    allocator.play(Event(*event) for event in events)
    return allocator.reserved


def test_segments_by_size() -> None:
    """2 MiB for small tensors, 20 MiB below 10 MiB, else the size in steps of 2 MiB; small ones share a segment."""
    assert reserved((1, 1)) == reserved((1, MIB)) == reserved((1, 600), (2, MIB)) == 2 * MIB
    assert reserved((1, MIB + 1)) == reserved((1, 9 * MIB), (2, 9 * MIB)) == 20 * MIB
    assert reserved((1, 11 * MIB)) == 12 * MIB
    assert reserved((1, MIB), (2, MIB), (3, 512)) == 4 * MIB


def test_a_freed_block_serves_again() -> None:
    """The best fitting block is taken; what is left of it serves others; neighbours are joined when freed."""
    assert reserved((1, 40 * MIB), (1, 0), (2, 30 * MIB), (3, 10 * MIB)) == 40 * MIB
    assert reserved((1, 20 * MIB), (2, 40 * MIB), (1, 0), (2, 0), (3, 18 * MIB), (4, 40 * MIB)) == 60 * MIB
    split = ((1, 40 * MIB), (1, 0), (2, 20 * MIB), (3, 20 * MIB), (2, 0), (3, 0), (4, 40 * MIB))
    assert reserved(*split) == 40 * MIB


def test_gaps_between_living_blocks_are_fragmentation() -> None:
    """Two free halves around a living block hold no whole."""
    events = ((1, 60 * MIB), (1, 0), (2, 20 * MIB), (3, 20 * MIB), (4, 20 * MIB), (2, 0), (4, 0), (5, 40 * MIB))
    assert reserved(*events) == 100 * MIB


def test_a_full_card_gets_empty_segments_back() -> None:
    """Only then; and it is full where that is not enough."""
    steps = [(1, 40 * MIB), (1, 0), (2, 60 * MIB), (2, 0)]
    events = [Event(*each) for each in steps]
    assert reserved_bytes(events) == 100 * MIB
    assert reserved_bytes(events, 64 * MIB) == 60 * MIB
    with pytest.raises(CardIsFullError):
        reserved_bytes(events, 59 * MIB)
    assert least_limit(events, allocated=30 * MIB) == pytest.approx(60 * MIB, rel=0.01)


def test_what_never_goes_is_there_first() -> None:
    """Weights are counted once, however often the step is played."""
    events = [Event(1, 40 * MIB), Event(2, 30 * MIB), Event(2, 0)]
    assert reserved_bytes(events, repeats=5) == 70 * MIB
