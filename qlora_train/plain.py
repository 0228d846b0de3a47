"""Results as JSON knows them: dataclasses with their properties, paths as texts, tuples as lists."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Plain data for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        kinds = [kind for kind in type(value).__mro__ if dataclasses.is_dataclass(kind)]
        properties = [name for kind in kinds for name, found in vars(kind).items() if isinstance(found, property)]
        return fields | {name: to_plain(getattr(value, name)) for name in properties}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
