"""Which file of a model folder holds which parameter, by the names of both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from qlora_train.errors import ModelError
from qlora_train.model.source import Source, check_model_folder
from qlora_train.untrusted import TensorEntry, inside, read_header, read_json_object

_FLOATS = ("BF16", "F16", "F32", "F64")


def open_model_folder(folder: Path) -> Source:
    """A folder of a whole model to talk to, such as an export; refused like a base (see `check_model_folder`)."""
    source = Source(str(folder), folder)
    check_model_folder(source, weights=True)
    for path in weight_files(folder):
        read_header(path)
    return source


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, under its name there."""

    name: str
    path: Path


def stored_tensors(source: Source, skeleton: Any) -> dict[str, StoredTensor]:
    """Parameter name to the tensor that transformers loads it from: exactly one for every parameter of the skeleton.

    transformers 5 renames tensors of some models while loading; its own table is used. What a file holds beyond the
    parameters (a tied head stored again, rotary tables) is left out. ModelError when a parameter has no tensor, two of
    them, or one of another shape or of no floating-point type, and when it is built from several: such a model could
    be trained, but not exported with its weights proven. Reads headers only.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    found: dict[str, StoredTensor] = {}
    transforms = get_model_conversion_mapping(skeleton)
    for path in weight_files(source.folder):
        for stored, entry in read_header(path).items():
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
            if name not in wanted:
                continue
            if name in found:
                where = f"{found[name].path.name} ({found[name].name}) and in {path.name} ({stored})"
                raise ModelError(f"{source.name}: {name} is stored twice, in {where}", fix="download the model again")
            _check_entry(source, name, entry, wanted[name])
            found[name] = StoredTensor(stored, path)
    if missing := sorted(set(wanted) - set(found)):
        raise ModelError(
            f"{source.name} lacks {len(missing)} tensors, first {missing[0]}", fix="download the model again, whole"
        )
    return found


def _check_entry(source: Source, name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ModelError(
            f"{source.name}: {name} is stored as {entry.shape}, and config.json asks for {shape}",
            fix="use the config.json that belongs to these weights",
        )
    if entry.dtype not in _FLOATS:
        raise ModelError(
            f"{source.name}: {name} is stored as {entry.dtype}; weights are {', '.join(_FLOATS)}",
            fix="use the 16-bit model; it is quantised while loading",
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers 5.23 reads, in its order of preference, and no others beside them.

    SecurityError when an index names a file outside of the folder; ModelError when one that it names is not there, or
    holds other tensors than the index says.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    shards: dict[str, set[str]] = {}
    for tensor, name in _weight_map(index).items():
        shards.setdefault(inside(folder, name).name, set()).add(tensor)
    for name, listed in sorted(shards.items()):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks {name}, which its index names", fix="download the model again, whole")
        if differing := sorted(listed ^ read_header(folder / name).keys()):
            said = "lists {} in {}, which lacks it" if differing[0] in listed else "leaves out {}, which {} holds"
            raise ModelError(
                f"{index} {said.format(differing[0], name)} (one of {len(differing)})",
                fix="download the model again, whole",
            )
    return [folder / name for name in sorted(shards)]


def _weight_map(index: Path) -> dict[str, Any]:
    """Tensor name to the name of its shard, as an index has it."""
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index} names no shards", fix="download the model again")
    return shards


def count_not_finite(stored: StoredTensor, dtype: torch.dtype) -> tuple[int, int]:
    """How many values of a stored tensor are NaN, and how many infinite, once they are of `dtype`."""
    with safe_open(stored.path, framework="pt") as file:
        values = file.get_tensor(stored.name).to(dtype)
    return int(values.isnan().sum()), int(values.isinf().sum())
