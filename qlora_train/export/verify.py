"""Compare the merged model with the trained one in float32, with a negative control: the adapter switched off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from qlora_train.data.loader import eval_batches
from qlora_train.data.split import load_split
from qlora_train.errors import ModelError
from qlora_train.evaluate.compare import Distance, adapter_off, compare, plain
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import to_float32
from qlora_train.model.trained import Trained


@dataclass(frozen=True)
class Verdict:
    """What the comparison found. `merged` and `adapter_off` are distances from the trained model."""

    split: str  # where the rows came from: held-out ones, or training rows when the recipe names no others
    num_rows: int
    merged: Distance
    adapter_off: Distance
    max_kl_frac: float

    @property
    def kl_frac(self) -> float:
        """KL of the merged model as a share of the adapter's whole effect; infinite when the adapter has none."""
        effect = self.adapter_off.mean_kl
        return self.merged.mean_kl / effect if effect > 0 else float("inf")

    @property
    def accepted(self) -> bool:
        """Whether the merged model may be published."""
        return self.kl_frac <= self.max_kl_frac


def load_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The merged model as any user of transformers gets it. ModelError when a tensor is missing, extra or misshapen."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} does not load: {error}", fix="export again") from error
    if bad := {key: names for key, names in info.items() if names}:
        raise ModelError(f"{folder} does not load cleanly: {bad}", fix="export again")
    model.eval().requires_grad_(False)
    return model


def verify(trained: Trained, merged_folder: Path) -> Verdict:
    """Measure on the first `export.verify_rows` held-out rows. Puts the trained model into float32.

    Memory: the trained model with its other tensors in float32, and the merged one in float32.
    """
    recipe, device = trained.run.recipe, trained.base.device
    split: Literal["eval", "train"] = "eval" if recipe.data.eval else "train"
    limits = {"max_eval_rows": recipe.export.verify_rows, "max_train_rows": recipe.export.verify_rows}
    rows = load_split(recipe.data.model_copy(update=limits), split, trained.tokenizer, recipe.run.seed)
    merged = CausalModel(load_merged(merged_folder, torch.float32, device))
    to_float32(trained.model)
    reference = CausalModel(trained.model)
    batches = [b.to(device) for b in eval_batches(rows.table, recipe.eval.batch_size, trained.tokenizer.pad_token_id)]
    distances = compare(reference, {"merged": plain(merged), "adapter_off": adapter_off(reference)}, batches)
    return Verdict(split, rows.table.num_rows, distances["merged"], distances["adapter_off"], recipe.export.max_kl_frac)
