"""Bytes of tensors alive while a piece of code runs, on any device, by cause and with the operator at the peak."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_BLOCK_BYTES = 512
"""What CUDA's caching allocator rounds every tensor up to (kMinBlockSize in torch's c10/cuda/CUDACachingAllocator)."""
UNNAMED = "unnamed"
INSIDE = "inside operators"
"""The cause of what operators allocate for themselves."""

Workspaces = Mapping[Any, Callable[..., int]]
"""Bytes that an operator allocates and frees before it returns, from its arguments."""


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Inside, `gc.collect` looks at new objects alone: with torch and transformers loaded, the old cost a second."""
    outermost = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        yield
    finally:
        if outermost:
            gc.unfreeze()


@dataclass
class _Held:
    num_bytes: int
    cause: str


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operator makes, once however many views it has, until it is freed.

    What was there before is not counted unless given to `hold`. Sizes are rounded up to `block_bytes`. What a kernel
    allocates for itself and frees before it returns counts only where `workspaces` tells. Works through the backward
    pass and on the meta device. `causes` names what single operators make, whatever the cause around them. Costs tens
    of microseconds an operator.
    """

    def __init__(
        self,
        *,
        block_bytes: int = 1,
        workspaces: Workspaces | None = None,
        causes: Mapping[Any, str] | None = None,
    ) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.peak_op = ""
        self.at_peak: dict[str, int] = {}  # bytes by cause at the first moment of the peak
        self._block_bytes = block_bytes
        self._workspaces = workspaces or {}
        self._causes = causes or {}
        self._kept: list[Tensor] = []
        self._cause = UNNAMED
        self._by_cause: Counter[str] = Counter()
        self._held: dict[int, _Held] = {}
        self._scopes: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        fresh = [storage for storage in _storages(out) if storage._cdata not in self._held]
        if fresh:
            there = {storage._cdata for storage in _storages((args, kwargs))}
            before, self._cause = self._cause, self._causes.get(func, self._cause)
            for storage in fresh:
                self._watch(storage, 0 if storage._cdata in there else storage.nbytes())
            self._cause = before
        inside = self._rounded(self._workspaces[func](*args, **kwargs)) if func in self._workspaces else 0
        self._note_peak(str(func), inside)
        return out

    @contextmanager
    def cause(self, name: str, *, kept_as: str | None = None) -> Iterator[None]:
        """What is made from here on counts as `name`; what of it is still alive at the end, as `kept_as`."""
        before, self._cause = self._cause, name
        made: list[int] = []
        self._scopes.append(made)
        try:
            yield
        finally:
            self._scopes.pop()
            self._cause = before
            for address in made if kept_as else ():
                self._rename(address, str(kept_as))

    def hold(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Count tensors that are there already, or give what is counted another cause."""
        for storage in _storages(list(tensors)):
            if storage._cdata in self._held and self._held[storage._cdata].num_bytes:
                self._rename(storage._cdata, cause)
                continue
            self._held.pop(storage._cdata, None)
            before, self._cause = self._cause, cause
            self._watch(storage, storage.nbytes())
            self._cause = before
        self._note_peak("held before", 0)

    def keep(self, tensor: Tensor, cause: str) -> None:
        """As `hold`, and keep it alive as long as this counter."""
        self._kept.append(tensor)
        self.hold([tensor], cause)

    def now(self) -> dict[str, int]:
        """Bytes by cause at this moment."""
        return {cause: count for cause, count in self._by_cause.items() if count}

    def _note_peak(self, operator: str, inside: int) -> None:
        if self.current + inside > self.peak:
            self.peak, self.peak_op = self.current + inside, operator
            self.at_peak = self.now() | ({INSIDE: inside} if inside else {})

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._block_bytes) * self._block_bytes

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        address = storage._cdata
        if address in self._held:
            return
        num_bytes = self._rounded(num_bytes)
        self._held[address] = _Held(num_bytes, self._cause)
        self.current += num_bytes
        self._by_cause[self._cause] += num_bytes
        for made in self._scopes:
            made.append(address)
        weakref.finalize(storage, self._forget, address)

    def _rename(self, address: int, cause: str) -> None:
        held = self._held.get(address)
        if held is not None:
            self._by_cause[held.cause] -= held.num_bytes
            self._by_cause[cause] += held.num_bytes
            held.cause = cause

    def _forget(self, address: int) -> None:
        held = self._held.pop(address, None)
        if held is not None:
            self.current -= held.num_bytes
            self._by_cause[held.cause] -= held.num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree.untyped_storage()]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [storage for branch in tree for storage in _storages(branch)]
