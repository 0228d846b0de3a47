"""A section of which some keys are wrong: what is right can be read, so that all conflicts are found at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import create_model

from qlora_train.recipe.schema import Section


class Unread(Exception):
    """A key was asked for whose value is wrong."""


class _Partial(Section):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unread(name)


def partial_section(model: type[Section], values: Mapping[str, Any], wrong: Collection[str]) -> Section:
    """The section without its wrong keys; asking for one of them raises `Unread`."""
    fields: Any = {key: (field.annotation, field) for key, field in model.model_fields.items() if key not in wrong}
    right = {key: value for key, value in values.items() if key in fields}
    return create_model(model.__name__, __base__=_Partial, **fields)(**right)
