"""The breakdown of memory in the QLoRA paper (arXiv 2305.14314), under the assumptions that give its figures.

The paper does not list them. These do, with no number left to choose: NF4 without double quantisation, embeddings and
head in float32 as `prepare_model_for_kbit_training` leaves them, and the CUDA context; adapters and their gradients in
16 bit, on layers whose MLP has two matrices of 4 d (an OPT, not a LLaMA, whose real adapters are a tenth larger);
AdamW's moments in float32. Megabytes are 2^20 bytes; its gigabytes are thousands of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import OPTConfig

from planning.architectures import ARCHITECTURES
from qlora_train.memory.constants import CUDA_CONTEXT
from qlora_train.memory.meta import ModelStyle, base_tensors, build_meta_model
from qlora_train.quant.moments import optimizer_state_bytes
from qlora_train.recipe.schema import AdapterSection, QuantSection

MB = 2**20
R = 64
COLUMNS = ("model", "adapters", "optimiser", "all")
# Megabytes; the sum in thousands of megabytes. Weight gradients are as large as the adapters.
PUBLISHED: dict[str, tuple[float, float, float, float]] = {
    "LLaMA-7B": (5046, 288, 1152, 6.9e3),
    "LLaMA-13B": (8476, 450, 1800, 11.3e3),
    "LLaMA-33B": (19302, 877.5, 3510, 24.7e3),
    "LLaMA-65B": (37074, 1440, 5760, 45.0e3),
}


@dataclass(frozen=True)
class Breakdown:
    """Megabytes of one model, column by column."""

    model: str
    published: tuple[float, float, float, float]
    planned: tuple[float, float, float, float]

    @property
    def errors(self) -> tuple[float, ...]:
        """Planned to published, less one."""
        return tuple(ours / theirs - 1 for ours, theirs in zip(self.planned, self.published, strict=True))


def breakdowns() -> list[Breakdown]:
    """All models of the figure."""
    return [breakdown(name) for name in PUBLISHED]


@cache
def breakdown(name: str) -> Breakdown:
    """One model of the figure."""
    return Breakdown(name, PUBLISHED[name], _planned(name))


def _planned(name: str) -> tuple[float, float, float, float]:
    config = ARCHITECTURES[name].config()
    style = ModelStyle(adapter=AdapterSection(r=R), quant=QuantSection(double_quant=False), upcast="all")
    quantised, others, _ = base_tensors(build_meta_model(config, style, "cuda").model)
    model = _bytes(quantised) + _bytes(others) + CUDA_CONTEXT.num_bytes
    simple = ModelStyle(adapter=AdapterSection(r=R), linear="peft", adapter_dtype=torch.bfloat16, attention="sdpa")
    _, _, trained = base_tensors(build_meta_model(_two_matrix_mlp(config), simple, "cuda").model)
    adapters, optimiser = _bytes(trained), optimizer_state_bytes("adamw", [each.shape for each in trained])
    return model / MB, adapters / MB, optimiser / MB, (model + 2 * adapters + optimiser) / MB


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _two_matrix_mlp(config: Any) -> Any:
    return OPTConfig(
        hidden_size=config.hidden_size,
        word_embed_proj_dim=config.hidden_size,
        ffn_dim=4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
    )
