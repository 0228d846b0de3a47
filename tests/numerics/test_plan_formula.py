"""The closed formula against the trace, over ranks, lengths, policies, vocabularies and grouped attention."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config

from qlora_train.memory.budget import Choice
from qlora_train.memory.estimate import Request, Shallow, step_style
from qlora_train.memory.formula import formula_peak
from qlora_train.model.checkpointing import Checkpointing
from tests.unit.memory.planned import recipe_of, tiny_config

TOLERANCE = 0.02
"""Of what is traced. The largest difference found is the transient part, of which the formula knows the MLP alone."""

WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
}
GRID = [
    (LlamaConfig, {"num_key_value_heads": 8, "vocab_size": 32_000}, 1, 512, 8),
    (LlamaConfig, {"num_key_value_heads": 2, "vocab_size": 128_256}, 1, 2048, 16),
    (LlamaConfig, {"num_key_value_heads": 2, "vocab_size": 32_000, "tie_word_embeddings": True}, 4, 1024, 64),
    (LlamaConfig, {"num_key_value_heads": 8, "vocab_size": 4096, "intermediate_size": 1024}, 16, 2048, 8),  # last norm
    (Qwen3Config, {"num_key_value_heads": 4, "vocab_size": 151_936, "head_dim": 128}, 2, 4096, 16),
]


@pytest.mark.parametrize(("kind", "sizes", "packs", "seq_len", "rank"), GRID)
def test_formula_and_trace_agree(kind: Any, sizes: dict[str, Any], packs: int, seq_len: int, rank: int) -> None:
    recipe = recipe_of(
        adapter={"r": rank}, data={"seq_len": seq_len}, train={"micro_batch_size": packs, "optimizer": "adamw_8bit"}
    )
    request = Request(recipe, kind(**{**WIDE, **sizes}), "cuda")
    shallow = Shallow(request)
    costs = shallow.costs()
    for policy in (Checkpointing("none"), Checkpointing("full"), Checkpointing("selective", every=2)):
        choice = Choice(policy, 1, 0, fits=True)
        trace = shallow.step(step_style(recipe, choice), costs)
        formula = formula_peak(request, choice)
        assert trace is not None and formula is not None
        assert formula == pytest.approx(trace.peak_bytes, rel=TOLERANCE), policy


def test_what_the_formula_does_not_know_it_does_not_answer() -> None:
    choice = Choice(Checkpointing("full"), 0, 0, fits=True)
    llama = tiny_config("llama", 2)
    assert formula_peak(Request(recipe_of(), llama, "cuda"), choice) is not None
    unknown = [
        Request(recipe_of(), tiny_config("gemma2", 2), "cuda"),
        Request(recipe_of(), llama, "cpu"),
        Request(recipe_of(adapter={"target_modules": ("q_proj",)}), llama, "cuda"),
        Request(recipe_of(train={"fused": False}), llama, "cuda"),
    ]
    assert [formula_peak(request, choice) for request in unknown] == [None] * 4
