"""What llama.cpp is told of a model, and what it would compute otherwise and is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2Config, MistralConfig, Phi3Config

from qlora_train.errors import ModelError
from qlora_train.export.formats.families import Layout, extra_tensors, hyperparameters
from tests.unit.export_formats.served import CONFIGS


def config(family: str, **changes: Any) -> Any:
    made = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_the_layout_is_undone_to_the_bit() -> None:
    layout = Layout(config("llama"))
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
        parameter = f"model.layers.0.self_attn.{name}"
        values = torch.randn(128 if name.startswith("q") else 64, 128)
        there = layout.to_file(parameter, values)
        assert torch.equal(layout.to_model(parameter, there), values)
        assert torch.equal(there, values) == name.startswith("v"), "queries and keys change places, values do not"


def test_rows_of_a_head_alternate_between_its_halves() -> None:
    """llama.cpp rotates channels 2i and 2i + 1, transformers i and i + half."""
    rows = torch.arange(128.0)
    there = Layout(config("llama")).to_file("model.layers.1.self_attn.q_proj.bias", rows)
    assert there[:6].tolist() == [0, 16, 1, 17, 2, 18] and there[32:34].tolist() == [32, 48]


def test_gemmas_norms_are_shifted() -> None:
    layout = Layout(config("gemma2"))
    assert layout.shift("model.layers.0.input_layernorm.weight") == layout.shift("model.norm.weight") == 1
    assert layout.shift("model.layers.0.mlp.up_proj.weight") == 0
    assert Layout(config("llama")).shift("model.norm.weight") == 0


def test_a_parameter_without_a_place_is_named() -> None:
    with pytest.raises(ModelError, match=r"no place for model\.layers\.0\.mystery\.weight"):
        Layout(config("llama")).name("model.layers.0.mystery.weight")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window"),
        (
            "qwen2-yarn",
            {"rope_parameters": {**CONFIGS["qwen2-yarn"].rope_parameters, "beta_fast": 16}},
            "yarn with beta_fast",
        ),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100, not 64"),
        ("gemma2", {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
        ("gemma2", {"tie_word_embeddings": False}, "a head of its own"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 6}, "layer_types"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    hyperparameters(config(family))  # as it is, it is taken
    with pytest.raises(ModelError, match=words):
        hyperparameters(config(family, **changes))


def test_other_models_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"gemma2.*qwen3.*a gpt2 model"):
        hyperparameters(GPT2Config())


@pytest.mark.parametrize("kind", [MistralConfig, Phi3Config])
def test_a_window_that_llama_cpp_ignores_bounds_the_context(kind: Any) -> None:
    sizes = CONFIGS["mistral"].to_diff_dict() | {"model_type": kind.model_type, "max_position_embeddings": 512}
    keys, notices = hyperparameters(kind(**{**sizes, "sliding_window": 128}))
    assert [value for key, value in keys.items() if key.endswith("context_length")] == [128] and "128" in notices[0]
    keys, notices = hyperparameters(kind(**{**sizes, "sliding_window": None}))
    assert [value for key, value in keys.items() if key.endswith("context_length")] == [512] and not notices


def test_rotary_factors_are_tensors() -> None:
    (factors,) = extra_tensors(config("llama-3")).values()
    assert factors[0] == 1 and factors[-1] == pytest.approx(8, rel=1e-4) and bool((factors.diff() >= 0).all())
    assert set(extra_tensors(config("phi3-long"))) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    assert not extra_tensors(config("llama"))
