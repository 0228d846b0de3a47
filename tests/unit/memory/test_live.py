"""The counter of live bytes, against sizes known beforehand."""

from __future__ import annotations

import torch

from qlora_train.memory.live import LiveBytes

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
