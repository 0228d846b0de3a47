"""A model run over rows with one decoder layer in memory: every batch goes through it before the next is filled.

Each batch is an ordinary call of the model, on a thread of its own that waits at the door of every layer. So nothing of
an architecture has to be known, and the numbers are those of the model run whole. One thread works at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora_train.errors import ModelError


@dataclass
class Walk:
    """One call of the model, made under `context`, such as one that switches the adapter off."""

    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]]
    result: Any = None
    error: BaseException | None = None
    waits_at: int = -1  # layer; -1 before the first
    started: bool = False
    ended: bool = False
    _may_go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _has_stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self) -> None:
        """Go to the door of the first layer."""
        self.started = True
        threading.Thread(target=self._run, daemon=True).start()
        self._stopped()

    def go_on(self) -> None:
        """Go through the layer that it waits at, to the next door or to the end. Raises what the call raised."""
        self._may_go.release()
        self._stopped()

    def arrive(self, layer: int) -> None:
        """Called on the walk's own thread at the door of a layer: wait."""
        self.waits_at = layer
        self._has_stopped.release()
        self._may_go.acquire()
        if self.error is not None:
            raise self.error

    def give_up(self) -> None:
        """End the thread of a walk that will not be finished."""
        if self.started and not self.ended:
            self.error = self.error or InterruptedError("the walk was given up")
            self._may_go.release()
            self._has_stopped.acquire()

    def _stopped(self) -> None:
        self._has_stopped.acquire()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        _here.walk = self
        try:
            with torch.inference_mode():
                self.result = self.call()
        except BaseException as error:  # raised again by the thread that leads
            self.error = self.error or error
        self.ended = True
        self._has_stopped.release()


class _Here(threading.local):
    walk: Walk


_here = _Here()


def walk_through(
    layers: Sequence[nn.Module],
    walks: Sequence[Walk],
    fill: Callable[[int], None],
    empty: Callable[[int], None],
) -> list[Any]:
    """The result of every walk; `fill(i)` and `empty(i)` give layer i its weights and take them away.

    ModelError for a model that does not run its layers once each, in order.
    """
    for index, layer in enumerate(layers):
        layer.forward = partial(_through_door, index, layer.forward)
    try:
        for walk in walks:
            with walk.context():
                walk.start()
        for index in range(len(layers)):
            fill(index)
            for walk in walks:
                _expect(walk, index)
                with walk.context():
                    walk.go_on()
            empty(index)
        if not all(walk.ended for walk in walks):
            _expect(walks[0], len(layers))
    finally:
        for layer in layers:
            del layer.forward  # the class's own again
        for walk in walks:
            walk.give_up()
    return [walk.result for walk in walks]


def _through_door(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _here.walk.arrive(index)
    return forward(*args, **kwargs)


def _expect(walk: Walk, layer: int) -> None:
    if walk.ended or walk.waits_at != layer:
        raise ModelError(
            f"this model does not run its layers one after the other (at {walk.waits_at}, expected {layer})",
            fix="export with export.verify=whole, where the whole model fits in memory",
        )
