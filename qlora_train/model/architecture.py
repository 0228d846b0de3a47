"""A model's config from whatever holds it, without weights: enough to plan with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora_train.errors import ModelError, first_line
from qlora_train.model.gguf_header import check_gguf
from qlora_train.model.skeleton import load_config
from qlora_train.model.source import GGUF_SUFFIX, PACKAGE_PREFIX, Source, package_file, resolve_source
from qlora_train.recipe.schema import ModelSection
from qlora_train.untrusted import read_json_object


def load_architecture(section: ModelSection) -> Any:
    """The transformers config of a model folder, a hub id, a GGUF file's header, or a bare config.json.

    Nothing is converted, and of a hub id only small files are downloaded. ModelError where no config is found.
    """
    in_package = section.path.startswith(PACKAGE_PREFIX)
    path = package_file(section.path) if in_package else Path(section.path)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        check_gguf(path)
        try:
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        except Exception as error:  # transformers computes with what stands there: anything may come of it
            raise ModelError(
                f"{section.path} holds no usable config: {first_line(error)[:200]}", fix="use another file"
            ) from error
    if path.suffix == ".json" and path.is_file():
        read_json_object(path)
        return load_config(Source(section.path, path))
    return load_config(resolve_source(section, weights=False))
