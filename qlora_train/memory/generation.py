"""What generated answers hold, by formulas of what the code holds: they are not traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qlora_train.memory.terms import Term
from qlora_train.recipe.schema import Recipe


def generation_terms(recipe: Recipe, config: Any, num_prompt: int) -> Iterator[Term]:
    """What answers of held-out rows hold besides the model: prompts of so many tokens, and the new ones."""
    section, config = recipe.eval, config.get_text_config()
    num_lines, num_positions = section.batch_size, num_prompt + section.max_new_tokens
    width = getattr(torch, recipe.model.compute_dtype).itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layer = 2 * num_lines * num_positions * num_kv_heads * head_dim * width
    yield Term(
        "generation",
        "keys and values",
        (config.num_hidden_layers + 1) * layer,
        "formula",
        "2 x rows x positions x key heads x head dim x bytes, each layer; one layer twice while it grows",
    )
    repeated = 2 * num_lines * num_prompt * config.num_attention_heads * head_dim * width
    yield Term(
        "generation",
        "attention of prompts",
        num_lines * num_prompt**2 + (repeated if num_kv_heads != config.num_attention_heads else 0),
        "formula",
        "mask of rows x prompt x prompt bytes (prompts are padded on the left); keys and values of every query head",
    )
