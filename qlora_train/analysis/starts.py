"""The A that a run began with, without its weights: the start is a function of the seed, the layers and the rank."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.state import adapter_tensors
from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.folders import MANIFEST
from qlora_train.model.hollow import build_hollow
from qlora_train.model.skeleton import load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun
from qlora_train.names import PEFT_PREFIX
from qlora_train.recipe.methods import METHODS


def start_of(run: FinishedRun, source: Source) -> dict[str, Tensor] | None:
    """lora_A (r, in) of each module before the first step; None where more than the seed decides it.

    PEFT draws the factors layer by layer, so all of them are drawn, on a model without values. Memory: the adapter's.
    """
    adapter = run.recipe.adapter.model_copy(update={"new_tokens": ()})  # their rows are drawn from nothing
    method = METHODS[adapter.method]
    if method.start != "zero" or method.form not in ("plain", "dora") or adapter.init_from is not None:
        return None
    if "made" in read_json(run.run_dir.adapter / MANIFEST):  # one of the adapter tools did, not a training
        return None
    hollow = build_hollow(load_config(source), torch.device("cpu"), run.base_print)
    model = attach_adapter(hollow, adapter, run.recipe.run.seed, base_name="", fused=False)
    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight"): tensor
        for name, tensor in adapter_tensors(model).items()
        if name.endswith(".lora_A.weight")
    }
