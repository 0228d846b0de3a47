"""Save and load adapters in PEFT's format, strictly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_train.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


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
    """The LoRA config of an adapter folder; ModelError when it is missing, of another kind, or not finite."""
    path = folder / CONFIG
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}", fix="name a folder with an adapter in PEFT's format") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object", fix="restore the file")
    if data.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {data.get('peft_type')!r}", fix="use a LoRA adapter")
    if not all(isinstance(data.get(k), int | float) and math.isfinite(data[k]) for k in ("r", "lora_alpha")):
        raise ModelError(f"{path}: r and lora_alpha must be finite numbers", fix="restore the file")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}", fix="use an adapter saved as safetensors")
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; ModelError when the file is damaged or a value is not finite."""
    path = folder / WEIGHTS
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
