"""Stages of a run that are not traced: export and disk, by formulas of what the code holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlora_train.memory.constants import HOST_LIBRARIES
from qlora_train.memory.estimate import Request, Shallow
from qlora_train.memory.terms import Term
from qlora_train.model.checkpointing import decoder_layers
from qlora_train.model.low_rank import low_rank_layers
from qlora_train.model.source import GGUF_SUFFIX


def parameter_counts(shallow: Shallow) -> tuple[int, int]:
    """Weights of the whole base, every layer whole and 4-bit ones counted as weights, and of its largest tensor."""
    sizes, layer = _sizes(shallow.model.model), _sizes(decoder_layers(shallow.model.model)[-1])
    return sum(sizes) + shallow.num_more * sum(layer) + _saved_weights(shallow), max(sizes)


def _saved_weights(shallow: Shallow) -> int:
    """Weights that decomposed layers (model.lord_keep_frac) have fewer than whole ones."""
    model = shallow.model.model
    return _saved_in(model) + shallow.num_more * _saved_in(decoder_layers(model)[-1])


def _saved_in(module: nn.Module) -> int:
    return sum(layer.num_saved for _, layer in low_rank_layers(module))


def _sizes(module: nn.Module) -> list[int]:
    return [
        math.prod(p.quant_state.shape if hasattr(p, "quant_state") else p.shape)
        for p in module.parameters()
        if not p.requires_grad
    ]


def export_terms(request: Request, shallow: Shallow) -> Iterator[Term]:
    """Host memory of an export: merging holds one tensor at a time, the verification a model or a layer in float32."""
    num_weights, largest = parameter_counts(shallow)
    width = _export_width(request)
    if request.recipe.export.verify == "layers":
        last = decoder_layers(shallow.model.model)[-1]
        layer = sum(_sizes(last)) + _saved_in(last)
        yield Term("export", "one layer in float32", 4 * layer, "formula", "4 bytes a weight of the layer in hand")
    else:
        yield Term(
            "export",
            "a model in float32",
            4 * num_weights,
            "formula",
            "4 bytes a weight; where less is free, the verification goes layer by layer (export.verify: auto)",
        )
    yield Term("export", "largest tensor", (width + 4) * largest, "formula", "once as stored, once in float32")
    yield Term("export", HOST_LIBRARIES.cause, HOST_LIBRARIES.num_bytes, "constant", HOST_LIBRARIES.source)


def disk_terms(request: Request, shallow: Shallow) -> Iterator[Term]:
    """What a run and its export leave on disk, and need for a moment."""
    recipe = request.recipe
    num_weights, _ = parameter_counts(shallow)
    adapter = 4 * shallow.num_trainable
    checkpoint = adapter + shallow.optimizer_bytes()
    if recipe.model.path.endswith(GGUF_SUFFIX):
        yield Term("disk", "cache of the base", 2 * num_weights, "formula", "the GGUF file's weights in bfloat16, once")
    elif not recipe.model.path.startswith(("/", "package:")):
        yield Term("disk", "download of the base", 2 * num_weights, "formula", "16-bit weights, in the hub's cache")
    if recipe.model.lord_keep_frac is not None:
        dtype: Any = getattr(torch, recipe.model.compute_dtype)
        num_left, per_weight = num_weights - _saved_weights(shallow), dtype.itemsize
        yield Term(
            "disk", "decomposed base", per_weight * num_left, "formula", f"{per_weight} bytes a weight: LoRD's factors"
        )
    count = recipe.train.keep + 1 + (1 if recipe.data.holds_out else 0)
    kept = "train.keep, the best" if recipe.data.holds_out else "train.keep"
    yield Term(
        "disk", "checkpoints", count * checkpoint, "formula", f"adapter and optimiser, {count} times: {kept}, a new one"
    )
    yield Term("disk", "adapter", adapter, "formula", "4 bytes a parameter")
    width = _export_width(request)
    yield Term("disk", "merged model", width * num_weights, "formula", f"{width} bytes a weight: export.export_dtype")


def _export_width(request: Request) -> int:
    dtype: Any = getattr(torch, request.recipe.export.export_dtype)
    return int(dtype.itemsize)
