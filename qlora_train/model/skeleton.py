"""The model without its weights: enough to know its layers, its size and its limits before anything is downloaded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from qlora_train.adapters.forms.convolution import CONVOLUTIONS
from qlora_train.adapters.module_names import is_named, name_of
from qlora_train.errors import ModelError, first_line
from qlora_train.model.low_rank import FACTORS, causal_class, low_rank_layers
from qlora_train.model.source import Source
from qlora_train.quant.affine import INT4
from qlora_train.quant.bnb import cpu_width_multiple
from qlora_train.recipe.schema import QuantSection, Recipe

# Of peft 0.21.2, tuners_utils.py: these would end in a ValueError there.
_MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_PASSED_BY = frozenset({"out_proj", "conv1d"})
MAX_LAYERS = 1000  # a skeleton is built of as many; the largest models have 130


def load_config(source: Source) -> Any:
    """The model's transformers config. ModelError for one that makes no sense, or asks for more layers than any has."""
    try:
        config = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    except Exception as error:  # transformers computes with what stands there: anything may come of it
        raise ModelError(
            f"{source.name}: config.json is not usable: {_reason(error)}", fix="use a complete model folder"
        ) from error
    if type(num_layers) is not int or num_layers > MAX_LAYERS:
        raise ModelError(
            f"{source.name}: config.json asks for {num_layers!r} layers; the limit is {MAX_LAYERS:,}",
            fix="use a complete model folder",
        )
    return config


def _reason(error: Exception) -> str:
    """The first line of what a library says, with its kind where that alone tells what it is."""
    said, kind = first_line(error), type(error).__name__
    return said if isinstance(error, ValueError | OSError) or said == kind else f"{kind}: {said}"


def load_tokenizer(source: Source, chat_template: Path | None = None) -> Any:
    """The model's fast tokenizer, with the recipe's chat template in place of its own where one is given."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.folder), trust_remote_code=False)
    except Exception as error:  # a tokenizer of another make fails in ways of its own
        raise ModelError(
            f"{source.name}: the tokenizer does not load: {_reason(error)}",
            fix="add the model's tokenizer.json and tokenizer_config.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source.name}: the tokenizer has no end token", fix="set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        # Only a value to fill the matrix with: labels are masked by position, so any id serves.
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return tokenizer


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of the chat template, wherever it comes from: a file has other line ends than a string may have."""
    template = tokenizer.chat_template
    lines = template.replace("\r\n", "\n").replace("\r", "\n") if isinstance(template, str) else template
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what turns text into ids: vocabulary, merges, normalisation, added and special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # of the last call
        backend.pop(passing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


def build_skeleton(config: Any, **settings: Any) -> nn.Module:
    """The model on the meta device: every module, no memory. `settings` are those of transformers' `from_config`."""
    if hasattr(config, "vision_config"):
        raise ModelError(
            f"{config.model_type} models also see images, which this trainer does not", fix="use a text model"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = causal_class(config).from_config(config, trust_remote_code=False, **settings)
    except ValueError as error:
        raise ModelError(
            f"transformers has no causal language model for model_type {config.model_type!r}", fix="use a decoder model"
        ) from error
    except Exception as error:  # sizes that do not go together
        raise ModelError(
            f"config.json describes no model that can be built: {_reason(error)}", fix="use a complete model folder"
        ) from error
    return model


def head_name(model: nn.Module) -> str:
    """The dotted name of the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the head, by name. 4-bit layers are linear layers too."""
    head = head_name(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != head}


def name_table(names: Iterable[str]) -> dict[str, int]:
    """How often each last name occurs among dotted names: {"q_proj": 30, "up_proj.reduce": 30, ...}."""
    parts = (name.split(".") for name in names)
    return dict(Counter(".".join(part[-2:] if part[-1] in FACTORS else part[-1:]) for part in parts))


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}


def check_targets(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    key: str = "adapter.target_modules",
    *,
    with_convolutions: bool = False,
) -> None:
    """Every named target must match a linear layer, or a convolution where those can be adapted, too; ModelError names
    all that do not, with the nearest names."""
    layers: dict[str, nn.Module] = {**linear_layers(model)}
    if not layers:
        raise ModelError("the model has no linear layer to adapt", fix="use a transformer with nn.Linear layers")
    found = convolutions(model)
    if with_convolutions:
        layers |= found
    _refuse_passed_by(model, linear_layers(model) if isinstance(target_modules, str) else layers, target_modules, key)
    if isinstance(target_modules, str):
        return
    if not with_convolutions and (named := [t for t in target_modules if any(is_named(n, (t,)) for n in found)]):
        raise ModelError(
            f"{key}: {', '.join(map(repr, named))} matches a convolution, of which B A is no update",
            fix="leave it out, or set adapter.method: flora_core, which has a factor for every side of a weight",
        )
    counts = name_table(layers)
    known_names = [*layers, *(name for name, _ in low_rank_layers(model))]
    kinds = "linear layer" + (" and no convolution" if with_convolutions else "")
    missing = [t for t in target_modules if not any(is_named(n, (t,)) for n in known_names)]
    if missing:
        near = {t: get_close_matches(t, counts, n=2, cutoff=0.5) or list(counts) for t in missing}
        what = "; ".join(f"{t!r} matches no {kinds}, nearest: {', '.join(near[t])}" for t in missing)
        known = ", ".join(f"{name} ({count} layers)" for name, count in counts.items())
        raise ModelError(f"{key}: {what}", fix=f"this model has {known}; or write all-linear")


def _refuse_passed_by(model: Any, layers: Iterable[str], targets: str | tuple[str, ...], key: str) -> None:
    """What PEFT refuses to adapt: layers that fused functions compute from their weight, without calling them."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    taken = [name for name in layers if isinstance(targets, str) or is_named(name, targets)]
    if kind in _MAMBA and (passed := [name for name in taken if name_of(name) in _PASSED_BY]):
        others = name_table(name for name in taken if name not in passed)
        what = ", ".join(f"{name} ({count} layers)" for name, count in name_table(passed).items())
        raise ModelError(
            f"{key}: {kind} models read the weight of {what} without calling it: an adapter would be passed by",
            fix=f"name others: [{', '.join(others)}]" if others else "name other layers",
        )


def check_skipped(model: nn.Module, skip_modules: tuple[str, ...]) -> None:
    """Every entry of quant.skip_modules must name a linear layer, as its last name or as a whole."""
    layers = linear_layers(model)
    unknown = [s for s in skip_modules if not any(is_named(n, (s,)) for n in layers)]
    if unknown:
        raise ModelError(
            f"quant.skip_modules: {', '.join(map(repr, unknown))} matches no linear layer",
            fix=f"this model has {', '.join(name_table(layers))}",
        )


def check_widths(model: nn.Module, quant: QuantSection, device: torch.device) -> None:
    """Refuse the input widths that a quantiser cannot do on this device, of the layers that it is to quantise."""
    if quant.quant_type == INT4:
        _check_groups(model, quant)
    elif quant.quant_type != "none" and device.type == "cpu":
        _check_blocks(model, quant)


def _check_blocks(model: nn.Module, quant: QuantSection) -> None:
    """Refuse the widths that bitsandbytes dequantises wrongly on a CPU."""
    multiple, least = cpu_width_multiple(quant.block_size), cpu_width_multiple(1)
    if bad := _other_widths(model, multiple, quant.skip_modules):
        smaller = multiple > least and not _other_widths(model, least, quant.skip_modules)
        block = f"use quant.block_size: {least}, " if smaller else ""
        name, width = next(iter(bad.items()))
        raise ModelError(
            f"{len(bad)} linear layers have an input width that is no multiple of {multiple}, "
            f"first {name} with {width}: bitsandbytes gives wrong values for them on a CPU",
            fix=f"train on a CUDA device, {block}{_left_out(bad, quant)}, or set quant.quant_type: none",
        )


def _check_groups(model: nn.Module, quant: QuantSection) -> None:
    if bad := _other_widths(model, quant.block_size, quant.skip_modules):
        name, width = next(iter(bad.items()))
        raise ModelError(
            f"{len(bad)} linear layers have an input width that is no multiple of quant.block_size, "
            f"{quant.block_size}, first {name} with {width}: INT4 groups the inputs of a row",
            fix=f"use a smaller quant.block_size, {_left_out(bad, quant)}, or set quant.quant_type: nf4",
        )


def _other_widths(model: nn.Module, multiple: int, skipped: tuple[str, ...]) -> dict[str, int]:
    """Input widths that are no multiple, by layer; without the layers that quant.skip_modules leaves in 16 bit."""
    return {
        name: layer.in_features
        for name, layer in linear_layers(model).items()
        if layer.in_features % multiple and not is_named(name, skipped)
    }


def _left_out(bad: Iterable[str], quant: QuantSection) -> str:
    """How to leave these layers in 16 bit, besides those that are already."""
    names = dict.fromkeys((*quant.skip_modules, *name_table(bad)))
    return f"leave them in 16 bit (quant.skip_modules: [{', '.join(names)}])"


def check_vocabulary(largest_id: int, config: Any, num_added_rows: int = 0) -> None:
    """No token id of the data may lie outside the embedding; a tokenizer may know tokens without a row."""
    vocab_size = config.get_text_config().vocab_size + num_added_rows
    if largest_id >= vocab_size:
        raise ModelError(
            f"the data holds token id {largest_id:,}, the model's embedding has {vocab_size:,} rows",
            fix="use the tokenizer that belongs to the model",
        )


def check_length(config: Any, seq_len: int) -> None:
    """No row may be longer than the positions that the model knows."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and seq_len > limit:
        raise ModelError(
            f"data.seq_len is {seq_len:,}, the model knows {limit:,} positions",
            fix=f"set data.seq_len to {limit} or less",
        )


def check_rotary(config: Any, recipe: Recipe) -> None:
    """Refuse rows that would change the rotary embedding of the rows beside them.

    LongRoPE (Phi-3 and Phi-3.5 with 128k, Phi-4-mini) has two tables of frequencies. transformers 5.23 takes one for
    the whole micro-batch, by the largest position in it (modeling_rope_utils.longrope_frequency_update): one row of
    more than `original_max_position_embeddings` tokens gives all rows the table for long ones. Longer rows are right
    where each is alone in its batch, in training as in evaluation. Dynamic NTK changes its table past
    `max_position_embeddings` only, where `check_length` ends.
    """
    limits = [
        part["original_max_position_embeddings"]
        for part in _rotary_parts(getattr(config.get_text_config(), "rope_parameters", None))
        if part.get("rope_type") == "longrope"
    ]
    train = recipe.train
    packs = train.micro_batch_size * (train.grad_accum_steps if train.memory == "auto" else 1)
    alone = (
        recipe.data.batching != "packed" and packs == 1 and (not recipe.data.holds_out or recipe.eval.batch_size == 1)
    )
    if limits and recipe.data.seq_len > min(limits) and not alone:
        raise ModelError(
            f"data.seq_len is {recipe.data.seq_len:,}, and this model has another rotary embedding for rows of more "
            f"than {min(limits):,} tokens (longrope): one such row would change all rows beside it",
            fix=f"set data.seq_len to {min(limits)} or less; or let each row be alone, with data.batching: shuffled, "
            "train.micro_batch_size: 1, train.memory: fixed and eval.batch_size: 1",
        )


def _rotary_parts(parameters: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary embeddings: one for all layers, or one for each type of layer."""
    if isinstance(parameters, dict):
        yield parameters
        yield from (part for part in parameters.values() if isinstance(part, dict))
