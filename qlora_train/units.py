"""Figures with their units, as people read them."""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that suits them, to three digits or more.

    >>> size_text(3 * 2**29), size_text(800 * 2**20), size_text(3 * 2**19), size_text(2_000), size_text(0)
    ('1.50 GiB', '800 MiB', '1.5 MiB', '2 KiB', '0')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.2f} GiB"
    if num_bytes >= 100 * 2**20:
        return f"{num_bytes / 2**20:,.0f} MiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.3g} MiB"
    return f"{num_bytes / 2**10:,.0f} KiB" if num_bytes else "0"
