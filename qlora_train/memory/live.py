"""Bytes of tensors alive while a piece of code runs, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operator makes, once however many views it has, until it is freed.

    What was there before is not counted, and neither is what a kernel allocates for itself and frees before it returns.
    Works through the backward pass. Costs tens of microseconds an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._watch(storage, 0)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._watch(storage, storage.nbytes())
        return out

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.current += num_bytes
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, storage._cdata, num_bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.current -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
