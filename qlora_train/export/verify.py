"""Compare the merged model with the trained one in float32, with a negative control: the adapter switched off."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from qlora_train.data.fates import Side
from qlora_train.data.loader import eval_batches
from qlora_train.data.split import Split
from qlora_train.errors import ModelError, is_out_of_memory
from qlora_train.evaluate.compare import Distance, distance, observe
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import to_float32
from qlora_train.model.trained import FinishedRun, load_trained


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
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{folder} does not load: {error}", fix="export again") from error
    if bad := {key: names for key, names in info.items() if names}:
        raise ModelError(f"{folder} does not load cleanly: {bad}", fix="export again")
    model.eval().requires_grad_(False)
    return model


def rows_to_verify(run: FinishedRun, tokenizer: Any) -> Split:
    """The first `export.verify_rows` held-out rows; training rows where the recipe names no others."""
    limit = run.recipe.export.verify_rows
    side: Side = "eval" if run.recipe.data.holds_out else "train"
    return run.load_split(side, tokenizer, max_eval_rows=limit, max_train_rows=limit)


def verify(run: FinishedRun, merged_folder: Path, split: Split, pad_token_id: int) -> Verdict:
    """Run the trained model and then the merged one, both in float32, over the same rows.

    Memory: one of the two models at a time, and the hidden states of the rows. The merged model goes to the host where
    its float32 copy does not fit on the CUDA device.
    """
    batches = list(eval_batches(split.table, run.recipe.eval.batch_size, pad_token_id))
    trained = load_trained(run)
    device = trained.base.device
    to_float32(trained.model)
    causal = CausalModel(trained.model)
    reference = observe(causal, batches, device)
    with trained.model.disable_adapter():
        off = observe(causal, batches, device)
    num_bytes = torch.float32.itemsize * run.base_print.num_params
    del trained, causal
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < 1.2 * num_bytes:
            device = torch.device("cpu")
    model = load_merged(merged_folder, getattr(torch, run.recipe.export.export_dtype), device)
    to_float32(model)
    merged = observe(CausalModel(model), batches, device)
    return Verdict(
        split.side,
        sum(len(batch.row_ids) for batch in batches),
        distance(reference, merged),
        distance(reference, off),
        run.recipe.export.max_kl_frac,
    )
