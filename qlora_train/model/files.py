"""Which file of a model folder holds which parameter, by the names of both sides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from qlora_train.errors import ModelError
from qlora_train.model.source import Source


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, under its name there."""

    name: str
    path: Path


def stored_tensors(source: Source, skeleton: Any) -> dict[str, StoredTensor]:
    """Parameter name to the tensor that transformers loads it from: exactly one for every parameter of the skeleton.

    transformers 5 renames tensors of some models while loading; its own table is used. What a file holds beyond the
    parameters (a tied head stored again, rotary tables) is left out. ModelError when a parameter has no tensor, or when
    it is built from several: such a model could be trained, but not exported with its weights proven.
    """
    wanted = {name for name, _ in skeleton.named_parameters()}
    found: dict[str, StoredTensor] = {}
    transforms = get_model_conversion_mapping(skeleton)
    for path in weight_files(source.folder):
        for stored in _names(path):
            name = stored
            for transform in transforms:
                name, matched = transform.rename_source_key(name)
                if matched is not None and not isinstance(transform, WeightRenaming):
                    raise ModelError(
                        f"{source.name}: transformers builds {name} from several stored tensors, first {stored}",
                        fix="use a model whose weights are stored as they are computed with",
                    )
            with_prefix = f"{skeleton.base_model_prefix}.{name}"
            name = with_prefix if name not in wanted and with_prefix in wanted else name
            if name in wanted:
                found[name] = StoredTensor(stored, path)
    if missing := sorted(wanted - set(found)):
        raise ModelError(
            f"{source.name} lacks {len(missing)} tensors, first {missing[0]}", fix="download the model again, whole"
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads, and no others that lie beside them."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {single.name} if single.is_file() else {path.name for path in folder.glob("*.safetensors")}
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not a file of this folder", fix="download the model again")
    return [folder / name for name in sorted(names)]


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights do not load: {error}", fix="download the file again") from error
