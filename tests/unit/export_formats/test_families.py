"""What llama.cpp is told of a model, and what it would compute otherwise and is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, quants
from transformers import GPT2Config, MistralConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_train.errors import ModelError
from qlora_train.export.formats.families import Layout, extra_tensors, hyperparameters
from qlora_train.export.formats.gguf_file import GgufModel, GgufModelWriter
from qlora_train.export.formats.readers import GgufWeights
from qlora_train.export.formats.vocabulary import read_vocabulary
from qlora_train.export.licence import Licence
from tests.unit.export_formats.served import CONFIGS, random_model, tokenizer_for


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
        ("gemma2", {"attention_bias": True}, "attention_bias"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            "type linear within the windows",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("phi", {"tie_word_embeddings": True}, "tied to the embedding"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, not silu"),
        ("phi3", {"hidden_act": "gelu_new"}, "hidden_act is gelu_new, not silu"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is gelu, not gelu_pytorch_tanh"),
        ("phi", {"hidden_act": "silu"}, "hidden_act is silu, not gelu_pytorch_tanh"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    hyperparameters(config(family))  # as it is, it is taken
    with pytest.raises(ModelError, match=words):
        hyperparameters(config(family, **changes))


def test_other_names_of_the_same_activation_are_taken() -> None:
    assert hyperparameters(config("llama", hidden_act="swish")) == hyperparameters(config("llama"))
    assert hyperparameters(config("phi", hidden_act="gelu_fast")) == hyperparameters(config("phi"))


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0"])
def test_only_the_rows_that_are_asked_for_are_dequantised(
    file_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = random_model("llama"), tmp_path / "m.gguf"
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    vocabulary = read_vocabulary(tokenizer_for("llama"), model.config.vocab_size, [])
    writer = GgufModelWriter(path, model.config, vocabulary, shapes, file_type=file_type, name="tiny")
    for name, value in model.named_parameters():
        writer.add(name, value)
    writer.close()
    weights = GgufWeights(GgufModel(path, model.config))
    whole, seen, plain = weights.value("model.embed_tokens.weight"), [], quants.dequantize
    monkeypatch.setattr(quants, "dequantize", lambda data, kind: (seen.append(len(data)), plain(data, kind))[1])
    assert torch.equal(weights.rows("model.embed_tokens.weight", 30, 47), whole[30:47]) and seen == [17]


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


def keys_of(config: Any) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in hyperparameters(config)[0].items()}


@pytest.mark.parametrize("factor", [None, 16.0])
def test_long_rotary_positions_scale_the_scores_as_transformers_does(factor: float | None) -> None:
    """By the config's own factor, else by the ratio of its two lengths."""
    rope = CONFIGS["phi3-long"].rope_parameters | ({} if factor is None else {"factor": factor})
    made = config("phi3-long", rope_parameters=rope)
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](made, torch.device("cpu"))
    assert keys_of(made)["rope.scaling.attn_factor"] == pytest.approx(expected) != 1


def test_yarn_without_a_factor_means_the_ratio_of_the_lengths() -> None:
    rope = {**CONFIGS["qwen2-yarn"].rope_parameters, "factor": None}
    assert keys_of(config("qwen2-yarn", rope_parameters=rope))["rope.scaling.factor"] == 4


def test_the_context_ends_where_llama_cpp_would_compute_short_texts_otherwise() -> None:
    keys, notices = keys_of(config("phi3-long")), hyperparameters(config("phi3-long"))[1]
    assert keys["context_length"] == keys["rope.scaling.original_context_length"] == 256 and "-c" in notices[0]
    assert keys_of(config("phi3"))["context_length"] == 512 and not hyperparameters(config("phi3"))[1]
    both = hyperparameters(config("phi3-long", sliding_window=128))
    assert [value for key, value in both[0].items() if key.endswith("phi3.context_length")] == [128]
    assert len(both[1]) == 1, "within the window all texts are short"


def test_only_phi_rotates_a_part_of_a_head() -> None:
    """transformers' Llama rotates whole heads whatever its config says."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert keys_of(config("llama", rope_parameters=rope))["rope.dimension_count"] == 32
    assert keys_of(config("phi"))["rope.dimension_count"] == 16


def test_the_licence_travels_in_the_file(tmp_path: Path) -> None:
    model, path = random_model("llama"), tmp_path / "m.gguf"
    vocabulary = read_vocabulary(tokenizer_for("llama"), model.config.vocab_size, [])
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    licence = Licence("other", "README.md", "my-own", "https://example.org/licence")
    settings: dict[str, Any] = {"file_type": "F16", "name": "tiny", "licence": licence}
    writer = GgufModelWriter(path, model.config, vocabulary, shapes, **settings)
    for name, value in model.named_parameters():
        writer.add(name, value)
    writer.close()
    fields = GGUFReader(path).fields
    assert [fields[f"general.license{end}"].contents() for end in ("", ".name", ".link")] == [
        "other", "my-own", "https://example.org/licence",
    ]  # fmt: skip


def test_rotary_factors_are_tensors() -> None:
    (factors,) = extra_tensors(config("llama-3")).values()
    assert factors[0] == 1 and factors[-1] == pytest.approx(8, rel=1e-4) and bool((factors.diff() >= 0).all())
    assert set(extra_tensors(config("phi3-long"))) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    assert not extra_tensors(config("llama"))
