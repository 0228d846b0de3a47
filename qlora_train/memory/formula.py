"""The closed formula of a step's memory on a card: the trace's cross-check, by arithmetic alone.

Legend: M tokens of a micro-batch, H hidden size, I intermediate size, A query heads x head dim, K key heads x head dim,
V vocabulary, r that of the adapter. Activations are in bfloat16 (2 bytes), norms work in float32 (4 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qlora_train.loss import chunk_tokens
from qlora_train.memory.budget import Choice, Costs, predict_peak
from qlora_train.memory.estimate import Request, estimate, heaviest_batch, settle, unseen_bytes
from qlora_train.memory.moments import optimizer_of, state_bytes
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import QuantSection

# Decoders of RMS norms, rotary embedding, grouped attention and gated MLPs without biases that matter.
KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    heads: int
    queries: int  # A
    keys: int  # K
    has_head_norms: bool

    @classmethod
    def of(cls, config: Any) -> _Sizes:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            heads,
            heads * head_dim,
            config.num_key_value_heads * head_dim,
            config.model_type == "qwen3",
        )

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of q, k, v, o, gate, up, down."""
        h, i, a, k = self.hidden, self.intermediate, self.queries, self.keys
        return [(a, h), (k, h), (k, h), (h, a), (i, h), (i, h), (h, i)]


def formula_costs(request: Request) -> Costs | None:
    """Costs of a step of the fused path on a card; None for models and settings that the formula does not know.

        kept by a layer     M (2 (6 H + 4) + 4 A + 4 K + 4 heads + 8 I + 14 r), and its output, 2 M H
        by a recomputed one 2 M H; under selective checkpointing attention's product besides, M (2 A + 4 heads)
        at work backward    M (2 H + 4 I)
        loss head           4 N H + chunk x 2 V + block x 8 V, and what the last norm saves, 4 M H
        last norm backward  22 M H

    N of the M tokens are supervised. Within some per cent of the trace: tests/numerics/test_plan_formula.py.
    """
    recipe, config = request.recipe, request.config.get_text_config()
    plain = recipe.adapter.target_modules == "all-linear" and not recipe.quant.skip_modules and recipe.train.fused
    plain = plain and METHODS[recipe.adapter.method].form == "plain"
    plain = plain and not (recipe.adapter.embeddings or recipe.adapter.new_tokens)
    in_half = recipe.model.compute_dtype == "bfloat16"
    if config.model_type not in KNOWN or request.device != "cuda" or not (plain and in_half):
        return None
    sizes, num_layers, r = _Sizes.of(config), config.num_hidden_layers, recipe.adapter.r
    batch = heaviest_batch(recipe, request.row_tokens, request.device)
    tokens, supervised = batch.labels.numel(), batch.num_supervised_tokens
    h, i, a, k = sizes.hidden, sizes.intermediate, sizes.queries, sizes.keys
    out = 2 * tokens * h
    norms = 2 * (6 * h + 4) + (4 * (a + k) + 4 * (a + k) // (a // sizes.heads) if sizes.has_head_norms else 0)
    kept = tokens * (norms + 4 * a + 4 * k + 4 * sizes.heads + 8 * i + 14 * r) + out
    product = tokens * (2 * a + 4 * sizes.heads)
    loss_sizes = chunk_tokens(config.vocab_size, torch.bfloat16, torch.device(request.device))
    chunk, block = (min(size, supervised) for size in loss_sizes)
    head = 4 * supervised * h + config.vocab_size * (2 * chunk + 8 * block) + tokens * (4 * h + 4)
    shapes = [shape for o, n in sizes.linear_shapes for shape in ((r, n), (o, r))] * num_layers
    adapter = 4 * sum(math.prod(shape) for shape in shapes)
    dense = sum(o * n for o, n in sizes.linear_shapes)
    is_quantised = recipe.quant.quant_type != "none"
    base = num_layers * sum(weight_bytes(o * n, recipe.quant) for o, n in sizes.linear_shapes)
    vocabularies = 1 if config.tie_word_embeddings else 2
    unquantised = 2 * (vocabularies * config.vocab_size * h + (2 * num_layers + 1) * h)
    return Costs(
        model_bytes=int(base) + unquantised + adapter + (2 * dense if is_quantised else 0),
        optimizer_bytes=adapter + state_bytes(optimizer_of(recipe), shapes),
        head_bytes=max(head, 22 * tokens * h),
        num_layers=num_layers,
        saved_bytes={"none": kept, "selective": out + product, "full": out},
        transient_bytes=tokens * (2 * h + 4 * i),
        dense_layer_bytes=2 * dense if is_quantised else 0,
    )


def formula_peak(request: Request, choice: Choice) -> int | None:
    """Most bytes of tensors in a step under the chosen policy; None where the formula does not apply."""
    costs = formula_costs(request)
    if costs is None:
        return None
    policy, num_layers = choice.checkpointing, costs.num_layers
    # RMS norms save a copy in float32: a layer's output goes, unless the next layer is computed again from it.
    unread = sum(not policy.recomputes(index, num_layers) for index in range(1, num_layers))
    return predict_peak(costs, policy, choice.resident_layers) - unread * costs.saved_bytes["full"]


def training_bytes(request: Request, choice: Choice | None = None) -> int:
    """The peak of training with what no trace sees: by the formula in no time, where it applies, else by a trace.

    Without `choice`, keys that are `auto` are settled for the request's limit.
    """
    costs = formula_costs(request)
    if costs is None:
        return estimate(request, choice).training_bytes
    choice = choice or settle(request, costs)
    peak = formula_peak(request, choice)
    assert peak is not None
    held = costs.model_bytes + costs.optimizer_bytes + choice.resident_layers * costs.dense_layer_bytes
    return peak + unseen_bytes(request.device, held, peak)


def weight_bytes(num_weights: int, quant: QuantSection) -> float:
    """Bytes of a weight matrix: half a byte a weight, and the statistics of each block; 2 a weight without codes.

    With double quantisation of blocks of 64: 1/2 + 1/64 + 4 / (64 x 256) = 0.516 bytes, 4.127 bits
    (QLoRA, arXiv 2305.14314, section 3).

    >>> 8 * weight_bytes(2**20, QuantSection()) / 2**20
    4.126953125
    """
    if quant.quant_type == "none":
        return 2 * num_weights
    num_blocks = num_weights / quant.block_size
    if quant.quant_type == "int4":  # a bfloat16 scale and a float32 zero point for each group
        return num_weights / 2 + 6 * num_blocks
    return num_weights / 2 + (num_blocks + 4 * num_blocks / 256 if quant.double_quant else 4 * num_blocks)
