"""The ceiling: the bare bf16 model with attention per row; no adapter, no head, no checkpointing, nothing quantised.

Forward to the last hidden state, and backward from a random gradient to the embeddings, so that every gradient of an
activation is computed, and none of a weight.
"""

from __future__ import annotations

from typing import Any

from contenders.job import Options, Rows, recipe_of
from contenders.worker import Loaded, Turns


def load(options: Options, variant: str) -> Loaded:
    """The base as our own loader makes it without quantisation."""
    import torch

    from qlora_train.data.loader import collate
    from qlora_train.model.causal import CausalModel
    from qlora_train.model.load import load_recipe_base
    from qlora_train.model.source import resolve_source

    recipe = recipe_of("shell", options, "quant.quant_type=none")
    model = load_recipe_base(resolve_source(recipe.model), recipe).model
    causal = CausalModel(model)
    model.train()
    model.get_input_embeddings().register_forward_hook(_require_grad)

    def train(rows: Rows, turns: Turns) -> None:
        generator = torch.Generator().manual_seed(0)
        device = torch.device(options.device)
        batches = [collate(rows.table, [step], rows.pad_token_id, packed=True).to(device) for step in rows.steps]
        sizes = [(*batch.input_ids.shape, model.config.hidden_size) for batch in batches]
        gradients = [torch.randn(size, generator=generator).to(device, torch.bfloat16) for size in sizes]
        for batch, gradient in zip(batches, gradients, strict=True):
            turns.begin()
            causal.hidden(batch).backward(gradient)
            turns.end(None)

    settings = {
        "base": "bf16",
        "adapter": "none",
        "attention": "per row",
        "checkpointing": "none",
        "micro-batch": f"1 pack of {options.seq_len} tokens",
    }
    return Loaded(model, causal.decoder, settings, train, lambda rows: 1)


def _require_grad(module: Any, args: Any, output: Any) -> Any:
    return output.requires_grad_(True)
