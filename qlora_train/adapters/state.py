"""Save and load adapters in PEFT's format, strictly."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_train.adapters.config import AdapterConfig, build_config
from qlora_train.adapters.forms.base import EMBEDDING, FACTORS
from qlora_train.errors import ModelError, first_line
from qlora_train.names import TOKEN_ROWS
from qlora_train.recipe.methods import METHODS, Method
from qlora_train.recipe.schema import AdapterSection
from qlora_train.untrusted import read_header, read_json_object, refuse_links_out, refuse_pickles

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK, MAX_ALPHA = 4096, 1e9  # as in a recipe
MAX_TARGETS = 1000
MAX_PATTERNS = 20_000  # a module each
MAX_TOKEN_ROWS = 100_000
MAX_TOKEN_ID = 2**31 - 1
_MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
# Fields that are read, and fields that say where the adapter comes from, which nothing follows.
_KNOWN_FIELDS = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "inference_mode"}
    | {"rank_pattern", "alpha_pattern", "trainable_token_indices", "qlora_train"}
    | {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "bias", "init_lora_weights"}
)
# PEFT must not take a folder for plain LoRA that only we compute right: this kind of adapter it does not know.
_OWN_TYPE = "QLORA_TRAIN"
_TAG = "qlora_train"
# Options that a method did not have once: what a folder of that time means.
_BEFORE: dict[str, dict[str, object]] = {"mole": {"granularity": "matrix"}, "flora_core": {"r_kernel": None}}
# Starts that change no base: the saved A and B are the whole adapter.
_ALLOWED_VALUES: dict[str, tuple[object, ...]] = {
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", None),
}


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names of PEFT's file format, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into an existing folder.

    Where PEFT would compute something else from them (methods whose row says so), the config names a kind of adapter
    that PEFT does not know, and the method with its options: other programs refuse it, and `adapter fold` gives them
    what they can load.
    """
    save_file(adapter_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    inference_mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference_mode
    if isinstance(config, AdapterConfig) and not config.method.is_peft:
        path = folder / CONFIG
        tag = {"method": config.method.name, "options": config.options}
        data = json.loads(path.read_text(encoding="utf-8")) | {"peft_type": _OWN_TYPE, _TAG: tag}
        path.write_text(json.dumps(data, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder, held against the header of its weights; no tensor is read.

    Let in are plain LoRA, DoRA and the methods of our table: any field that PEFT would act on besides the ones we know
    must have its default. A pickle in the folder is a SecurityError; anything else that is missing, of another kind or
    contradictory a ModelError.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    if folder.is_dir():
        refuse_links_out(folder)
        refuse_pickles(folder.iterdir(), str(folder))
    data = read_json_object(path)
    if data.get("peft_type") not in ("LORA", _OWN_TYPE):
        raise ModelError(f"{path}: peft_type is {data.get('peft_type')!r}", fix="use a LoRA adapter")
    _check_numbers(path, data)
    targets = _target_modules(path, data.get("target_modules"))
    method, options = _method(path, data)
    _refuse_other_fields(path, data)
    if not weights.is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}", fix="use an adapter saved as safetensors")
    config = build_config(
        method,
        options,
        r=data["r"],
        lora_alpha=data["lora_alpha"],
        lora_dropout=data.get("lora_dropout", 0.0),
        target_modules=targets,
        rank_pattern=_pattern(path, data, "rank_pattern", int, MAX_RANK),
        alpha_pattern=_pattern(path, data, "alpha_pattern", float, MAX_ALPHA),
        base_model_name_or_path=str(data.get("base_model_name_or_path") or ""),
        trainable_token_indices=_token_indices(path, data, method),
    )
    _check_tensors(weights, config)
    return config


def _method(path: Path, data: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The row of the method table, and its options: from the tag, else from PEFT's own flags."""
    tag = data.get(_TAG)
    if (tag is None) != (data["peft_type"] == "LORA"):
        raise ModelError(f"{path}: peft_type and {_TAG} contradict each other", fix="restore the file")
    if tag is None:
        name = "dora" if data.get("use_dora") is True else "rslora" if data.get("use_rslora") is True else "lora"
        return METHODS[name], {}
    named, options = (tag.get("method"), tag.get("options")) if isinstance(tag, dict) else (None, None)
    row = METHODS.get(named) if isinstance(named, str) else None
    if row is None or row.is_peft or not isinstance(options, dict):
        raise ModelError(f"{path}: {_TAG} names no method of ours: {json.dumps(tag)[:80]}", fix="restore the file")
    try:
        options = _BEFORE.get(row.name, {}) | options
        if options.keys() != set(row.options):
            raise ValueError(f"the options of {row.name} are {', '.join(row.options) or 'none'}")
        # Values pass the recipe's own checks: a path is a text in JSON, a list stands for a tuple.
        section = AdapterSection.model_validate_json(json.dumps({"method": row.name, **options}))
    except ValueError as error:
        raise ModelError(f"{path}: {_TAG}: {first_line(error)}", fix="restore the file") from None
    values = section.model_dump(mode="json")
    return row, {key: values[key] for key in row.options}


def _pattern(path: Path, data: dict[str, Any], key: str, kind: type, most: float) -> dict[str, Any]:
    """A rank or alpha for some modules. PEFT reads the names as regular expressions, so they must be escaped names."""
    found = data.get(key) or {}
    kinds = (int,) if kind is int else (int, float)
    good = isinstance(found, dict) and all(
        _MODULE_NAME.fullmatch(name.replace("\\.", ".")) and type(value) in kinds and 0 < value <= most
        for name, value in found.items()
    )
    if not good or len(found) > MAX_PATTERNS:
        raise ModelError(f"{path}: {key} must give a number for names of modules", fix="restore the file")
    return dict(found)


def _token_indices(path: Path, data: dict[str, Any], method: Method) -> dict[str, list[int]] | list[int] | None:
    """Tokens whose rows are trained: a list, or one for each table. They must ascend, as the rows do that we save."""
    found = data.get("trainable_token_indices")
    if not found:
        return None
    named = found if isinstance(found, dict) else {"embed_tokens": found}
    good = len(named) <= 2 and all(_MODULE_NAME.fullmatch(name) for name in named)
    for ids in named.values():
        good = good and isinstance(ids, list) and 0 < len(ids) <= MAX_TOKEN_ROWS
        good = good and all(type(number) is int and 0 <= number <= MAX_TOKEN_ID for number in ids)
        good = good and all(one < other for one, other in pairwise(ids))
    if not good or "new_tokens" not in method.options:
        raise ModelError(
            f"{path}: trainable_token_indices must give ascending ids for the embedding and head of plain LoRA",
            fix="use an adapter of plain LoRA",
        )
    return dict(found) if isinstance(found, dict) else list(found)


def _check_numbers(path: Path, data: dict[str, Any]) -> None:
    """Rank, alpha, dropout and the flag that says how they scale."""
    numbers: dict[str, Any] = {"lora_dropout": 0.0, **data}
    r, alpha, dropout = values = [numbers.get(name, math.nan) for name in ("r", "lora_alpha", "lora_dropout")]
    if not all(type(value) in (int, float) and -math.inf < value < math.inf for value in values):
        raise ModelError(f"{path}: r, lora_alpha and lora_dropout must be finite numbers", fix="restore the file")
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ModelError(f"{path}: r must be a whole number from 1 to {MAX_RANK}", fix="restore the file")
    if not 0 < alpha <= MAX_ALPHA or not 0 <= dropout < 1:
        what = f"lora_alpha must be above 0 and at most {MAX_ALPHA:g}, lora_dropout from 0 to below 1"
        raise ModelError(f"{path}: {what}", fix="restore the file")
    for flag in ("use_rslora", "use_dora"):
        if type(data.get(flag, False)) is not bool:
            raise ModelError(f"{path}: {flag} must be true or false", fix="restore the file")
    if data.get("use_rslora") is True and data.get("use_dora") is True:
        raise ModelError(f"{path}: use_rslora with use_dora is no method of ours", fix="use one of the two")


def _target_modules(path: Path, targets: Any) -> list[str] | str:
    """`all-linear` or names. PEFT would take any other text for a regular expression, which can run for ever."""
    if targets == "all-linear":
        return "all-linear"
    named = isinstance(targets, list) and 0 < len(targets) <= MAX_TARGETS
    if not named or not all(isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in targets):
        raise ModelError(
            f"{path}: target_modules must be a list of module names, or all-linear",
            fix="write the names of the adapted layers out, such as q_proj and v_proj",
        )
    return list(targets)


def _refuse_other_fields(path: Path, data: dict[str, Any]) -> None:
    """What else PEFT's file may say changes the update, the base, or which code runs: it must say nothing."""
    defaults = LoraConfig().to_dict()
    odd = [
        name
        for name, value in data.items()
        if name not in _KNOWN_FIELDS and value not in (None, False, "", [], {}) and value != defaults.get(name)
    ]
    odd += [name for name, allowed in _ALLOWED_VALUES.items() if name in data and data[name] not in allowed]
    if odd:
        what = ", ".join(f"{name} is {json.dumps(data[name])[:60]}" for name in sorted(odd)[:5])
        raise ModelError(f"{path}: {what}: this is not plain LoRA", fix="use an adapter of plain LoRA")


def split_name(name: str) -> tuple[str, str]:
    """Module and attribute of a tensor's name in an adapter file.

    >>> split_name("base_model.model.layers.0.q_proj.lora_A.weight")
    ('base_model.model.layers.0.q_proj', 'lora_A')
    """
    if name.endswith(f".{TOKEN_ROWS}"):
        return name.removesuffix(f".{TOKEN_ROWS}"), TOKEN_ROWS
    module, _, attribute = name.rpartition(".lora_")
    return module, f"lora_{attribute.removesuffix('.weight')}"


def has_embeddings(folder: Path) -> bool:
    """Whether the adapter of a folder is on the token embedding too."""
    return any(split_name(name)[1] == EMBEDDING[0] for name in read_header(folder / WEIGHTS))


def _check_tensors(weights: Path, config: AdapterConfig) -> None:
    """The file holds what the method's form has for each of its modules, in one rank, and nothing else."""
    header = read_header(weights)
    if not header:
        raise ModelError(f"{weights} holds no tensors", fix="restore the file")
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    names: dict[tuple[str, str], str] = {}
    for name, entry in header.items():
        module, attribute = split_name(name)
        modules.setdefault(module, {})[attribute] = tuple(entry.shape)
        names[module, attribute] = name
    _check_token_rows(weights, config, modules)
    for module, found in modules.items():
        r = config.rank_of(module)
        expected = config.form.expected(r, found)
        for attribute in sorted(found.keys() - expected.keys()):
            title = "plain LoRA" if config.method.is_peft else config.method.title
            raise ModelError(
                f"{weights}: {names[module, attribute]} is no part of {title}", fix="use an adapter of plain LoRA"
            )
        for attribute in sorted(expected.keys() - found.keys()):
            there = names[module, min(found)]
            missing = f"{module}.{attribute}" + (".weight" if attribute in FACTORS else "")
            raise ModelError(f"{weights}: it holds {there} and no {missing}", fix="restore the file")
        for attribute, shape in expected.items():
            if found[attribute] != shape:
                raise ModelError(
                    f"{weights}: {names[module, attribute]} is {found[attribute]}, which is not of rank {r}, as "
                    f"{CONFIG} says",
                    fix="restore the files",
                )


def _check_token_rows(weights: Path, config: AdapterConfig, modules: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Take out the tables of which rows are trained; ModelError unless they are those that the config names."""
    tables = {module: modules.pop(module)[TOKEN_ROWS] for module in list(modules) if TOKEN_ROWS in modules[module]}
    wanted = config.trainable_token_indices or ()
    named = len(wanted) if isinstance(wanted, dict) else min(len(wanted), 1)
    if len(tables) != named:
        raise ModelError(
            f"{weights}: it holds trained rows of {len(tables)} tables, and {CONFIG} names {named}",
            fix="restore the files",
        )
    for module, shape in tables.items():
        if len(shape) != 2 or shape[0] != len(config.token_ids_of(module)):
            raise ModelError(
                f"{weights}: {module}.{TOKEN_ROWS} is {shape}, and {CONFIG} names {len(config.token_ids_of(module))} "
                "tokens for it",
                fix="restore the files",
            )


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; ModelError when the file is damaged or a value is not finite.

    An adapter that lies there in half precision, as others publish theirs, comes in float32: the same numbers.
    """
    path = folder / WEIGHTS
    read_header(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {error}", fix="restore the file from another checkpoint") from error
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelError(
            f"{path}: {len(bad)} tensors hold NaN or infinity, first {bad[0]}", fix="use another checkpoint"
        )
    in_half = {tensor.dtype for tensor in tensors.values()} in ({torch.bfloat16}, {torch.float16})
    return {name: tensor.float() for name, tensor in tensors.items()} if in_half else tensors


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Copy an adapter folder's tensors into an attached adapter: same names, same shapes, float32, to the bit."""
    own, tensors = adapter_tensors(model), read_adapter_tensors(folder)
    if problems := describe_mismatch(own, tensors):
        raise ModelError(
            f"{folder / WEIGHTS}: {problems}", fix="use the adapter with the base and recipe it belongs to"
        )
    set_peft_model_state_dict(model, tensors)


def describe_mismatch(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> str:
    """How two sets of tensors differ in names, shapes and dtypes, naming the first of each; empty when they agree."""
    parts = []
    if missing := sorted(set(own) - set(tensors)):
        parts.append(f"{len(missing)} tensors missing, first {missing[0]}")
    if extra := sorted(set(tensors) - set(own)):
        parts.append(f"{len(extra)} unknown tensors, first {extra[0]}")
    for name in sorted(set(own) & set(tensors)):
        mine, theirs = own[name], tensors[name]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            parts.append(f"{name} is {tuple(theirs.shape)} {theirs.dtype}, expected {tuple(mine.shape)} {mine.dtype}")
            break
    return "; ".join(parts)
