"""Randomness as a pure function of (seed, purpose, position): a resume needs no saved generator."""

from __future__ import annotations

import hashlib


def derive_seed(run_seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for one purpose at one position, e.g. `derive_seed(0, "dropout", step, micro_step)`.

    Equal arguments give equal seeds on every machine and Python; different arguments give independent ones (SHA-256).

    >>> derive_seed(0, "dropout", 3, 1) == derive_seed(0, "dropout", 3, 1) != derive_seed(0, "dropout", 3, 2)
    True
    """
    text = "/".join([str(run_seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
