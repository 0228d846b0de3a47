"""The counter of live bytes, against sizes known beforehand."""

from __future__ import annotations

import pytest
import torch

from qlora_train.memory.live import INSIDE, UNNAMED, LiveBytes

KIB = 1024


def test_storages_count_once_and_until_they_are_freed() -> None:
    before = torch.ones(256)
    with LiveBytes() as live:
        made = before + 1
        views = (made.view(2, 128), made[3:], before.t())
        assert live.current == KIB
        made.mul_(2)
        assert live.current == KIB
        del made, views
        assert live.current == 0
    assert live.peak == KIB


def test_the_backward_pass_is_seen() -> None:
    weight = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight * 2).exp().sum()  # exp saves its result
        assert live.current == KIB + 4
        loss.backward()
        del loss
        assert live.current == weight.grad.nbytes == KIB  # type: ignore[union-attr]
        weight.grad = None
        assert live.current == 0
    assert live.peak >= 2 * KIB


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    with LiveBytes(block_bytes=512) as live:
        small, large = torch.ones(1), torch.ones(129)
        assert live.current == 512 + 1024
        del small, large
        assert live.current == 0


def test_bytes_are_told_by_cause() -> None:
    with LiveBytes() as live:
        with live.cause("work", kept_as="kept"):
            kept, lost = torch.ones(256), torch.ones(512)
            assert live.now() == {"work": 3 * KIB}
            del lost
        assert live.now() == {"kept": KIB}
        other = torch.ones(256)
        assert live.now() == {"kept": KIB, UNNAMED: KIB}
        live.hold([other], "named")
        assert live.now() == {"kept": KIB, "named": KIB}
        del kept
        assert live.now() == {"named": KIB}
    assert live.at_peak == {"work": 3 * KIB} and live.peak_op.startswith("aten.")


def test_what_was_there_before_counts_when_it_is_held() -> None:
    before = torch.ones(256)
    live = LiveBytes()
    live.hold([before, before[3:]], "model")
    with live:
        assert live.current == KIB
        made = before * 2
        assert live.now() == {"model": KIB, UNNAMED: KIB}
        del made
    assert live.peak == 2 * KIB


def test_an_exception_ends_a_scope() -> None:
    live = LiveBytes()
    with live:
        with pytest.raises(RuntimeError), live.cause("outer"), live.cause("inner", kept_as="kept"):
            made = torch.ones(256)
            raise RuntimeError
        assert live.now() == {"kept": KIB}
        after = torch.ones(256)
        assert live.now() == {"kept": KIB, UNNAMED: KIB}
        del made, after


def test_what_an_operator_allocates_inside_counts_at_the_peak_alone() -> None:
    exp = torch.ops.aten.exp.default
    with LiveBytes(workspaces={exp: lambda x: 5 * x.nbytes}, causes={exp: "powers"}) as live:
        x = torch.ones(256)
        y = x.exp()
        assert live.now() == {UNNAMED: KIB, "powers": KIB}
        del x, y
    assert live.peak == 7 * KIB and live.peak_op == "aten.exp.default"
    assert live.at_peak == {UNNAMED: KIB, "powers": KIB, INSIDE: 5 * KIB}
