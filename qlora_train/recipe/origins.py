"""Where each value of a recipe was written, for the middle and the end of a message."""

from __future__ import annotations

from collections.abc import Mapping

Origins = Mapping[str, str]  # dotted key -> "FILE:LINE", "command line" or "default"


def is_given(origins: Origins, key: str) -> bool:
    """Whether somebody wrote the key."""
    return origins.get(key, "default") != "default"


def at(origins: Origins, key: str) -> str:
    """The place of a key for the middle of a sentence."""
    origin = origins.get(key, "default")
    if origin == "default":
        return "left at its default"
    return f"set at {origin}" if ":" in origin else f"set on the {origin}"


def place_of(origins: Origins, key: str) -> str | None:
    """The place of a key for a problem; None for a default."""
    return origins[key] if is_given(origins, key) else None
