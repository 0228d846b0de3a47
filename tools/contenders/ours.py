"""This project's own training step, with full checkpointing or none, on a 4-bit or a bf16 base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from contenders.job import Options, Rows, recipe_of, start_adapter
from contenders.worker import Loaded, Turns

_ALWAYS = {
    "train.checkpointing": "full",
    "train.fused": "true",
    "train.compile": "true",
    "train.resident_layers": "0",
}
_VARIANTS: dict[str, dict[str, str]] = {
    "full": {},
    # What `auto` chooses where memory is to spare: and every layer dense.
    "none": {"train.checkpointing": "none"},
    "bf16": {"quant.quant_type": "none"},
    "eager": {"train.compile": "false"},
}


def load(options: Options, variant: str) -> Loaded:
    """Through the same preparation as `qlora-train train`."""
    from qlora_train.artifacts.layout import RunDir
    from qlora_train.data.loader import collate
    from qlora_train.model.skeleton import load_config
    from qlora_train.model.source import resolve_source
    from qlora_train.train.metrics import Silent
    from qlora_train.train.setup import prepare
    from qlora_train.train.step import accumulate_gradients, train_step

    said = _ALWAYS | _VARIANTS[variant]
    if variant == "none":
        model = load_config(resolve_source(recipe_of("shell", options).model))
        said["train.resident_layers"] = str(model.get_text_config().num_hidden_layers)
    recipe = recipe_of("shell", options, *(f"{key}={value}" for key, value in said.items()))
    job = prepare(recipe, RunDir(Path("unused")), Silent()).job
    if options.vocabulary is not None:
        job.causal.head = _random_head(job.causal.head, options.vocabulary)

    def train(rows: Rows, turns: Turns) -> None:
        start_adapter(job.model)
        job.optimizer.state.clear()
        job.model.train()
        if recipe.train.compile:  # compiling is not what is timed
            batch = collate(rows.table, [rows.steps[0]], rows.pad_token_id, packed=True)
            accumulate_gradients(job.causal, [batch], job.accelerator, seed=0, step=0)
            job.optimizer.zero_grad(set_to_none=True)
        for number, step in enumerate(rows.steps):
            turns.begin()
            result = train_step(
                job.causal,
                [collate(rows.table, [step], rows.pad_token_id, packed=True)],
                job.optimizer,
                job.accelerator,
                seed=0,
                step=number,
                learning_rate=options.learning_rate,
                max_grad_norm=recipe.train.max_grad_norm,
            )
            turns.end(result.loss)

    quantised = recipe.quant.quant_type != "none"
    settings = {
        "base": f"{recipe.quant.quant_type}, double quantisation" if quantised else "bf16",
        "adapter": "float32",
        "attention": "per row",
        "checkpointing": recipe.train.checkpointing,
        "dense layers": str(recipe.train.resident_layers),
        "torch.compile": "each layer" if recipe.train.compile else "no",
        "micro-batch": f"1 pack of {options.seq_len} tokens",
    }
    return Loaded(job.model, job.causal.decoder, settings, train, lambda rows: 1)


def _random_head(head: Any, vocabulary: int) -> Any:
    """A head of another vocabulary, as spread as the model's own."""
    import torch

    weight = head.weight_VH
    rows = torch.randn(vocabulary, weight.shape[1], dtype=weight.dtype) * weight.float().std().to(weight.dtype)
    return replace(head, weight_VH=rows)
