"""Save and load adapters in PEFT's format, strictly."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_train.errors import ModelError
from qlora_train.untrusted import read_header, read_json_object, refuse_links_out, refuse_pickles

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK, MAX_ALPHA = 4096, 1e9  # as in a recipe
MAX_TARGETS = 1000
_MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
# Fields that are read, and fields that say where the adapter comes from, which nothing follows.
_KNOWN_FIELDS = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "inference_mode"}
    | {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "bias", "init_lora_weights"}
)
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
    """Write `adapter_model.safetensors` and `adapter_config.json` into an existing folder."""
    save_file(adapter_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    inference_mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference_mode


def load_adapter_config(folder: Path) -> LoraConfig:
    """The LoRA config of an adapter folder, held against the header of its weights; no tensor is read.

    Only plain LoRA is let in: any field that PEFT would act on besides the ones we know must have its default. A pickle
    in the folder is a SecurityError; anything else that is missing, of another kind or contradictory a ModelError.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    if folder.is_dir():
        refuse_links_out(folder)
        refuse_pickles(folder.iterdir(), str(folder))
    data = read_json_object(path)
    if data.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {data.get('peft_type')!r}", fix="use a LoRA adapter")
    _check_numbers(path, data)
    targets = _target_modules(path, data.get("target_modules"))
    _refuse_other_fields(path, data)
    if not weights.is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}", fix="use an adapter saved as safetensors")
    _check_pairs(weights, data["r"])
    return LoraConfig(
        r=data["r"],
        lora_alpha=data["lora_alpha"],
        lora_dropout=data.get("lora_dropout", 0.0),
        use_rslora=data.get("use_rslora", False),
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(data.get("base_model_name_or_path") or ""),
    )


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
    if type(data.get("use_rslora", False)) is not bool:
        raise ModelError(f"{path}: use_rslora must be true or false", fix="restore the file")


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


def _check_pairs(weights: Path, r: int) -> None:
    """The file holds lora_A (r, in) and lora_B (out, r), each with the other, and nothing else."""
    header = read_header(weights)
    for name, entry in header.items():
        stem, _, half = name.removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            raise ModelError(f"{weights}: {name} is no part of plain LoRA", fix="use an adapter of plain LoRA")
        other = f"{stem}.{'lora_B' if half == 'lora_A' else 'lora_A'}.weight"
        if other not in header:
            raise ModelError(f"{weights}: it holds {name} and no {other}", fix="restore the file")
        rank = entry.shape[0 if half == "lora_A" else 1] if len(entry.shape) == 2 else None
        if rank != r:
            raise ModelError(
                f"{weights}: {name} is {entry.shape}, which is not of rank {r}, as {CONFIG} says",
                fix="restore the files",
            )
    if not header:
        raise ModelError(f"{weights} holds no tensors", fix="restore the file")


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; ModelError when the file is damaged or a value is not finite."""
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
    return tensors


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
