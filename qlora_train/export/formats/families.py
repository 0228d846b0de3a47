"""The model families that llama.cpp computes as transformers does: hyperparameters, layouts, and what is refused.

Each was held against llama.cpp itself on a random model (tests/e2e/test_serve_llama_cpp.py). The keys are those of
ggml's docs/gguf.md; what llama.cpp fixes in its code for a family (src/models/*.cpp) and a config may set otherwise, as
the pattern of Gemma's windows, is refused where it differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, Keys, get_tensor_name_map
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_train.errors import ModelError

Value = int | float | bool | str | list[float] | list[int]
_SUFFIXES = (".weight", ".bias")
_GEMMA_2_LARGE, _GEMMA_3_LARGE = 46, 62  # layers of the 27B models, whose scores llama.cpp scales otherwise
_GEMMA_3_PATTERN = 6  # every sixth layer sees everything
_PARTLY_ROTATED = ("phi", "phi3")
_SILU = ("silu", "swish")
_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three ways to write the approximation by tanh


@dataclass(frozen=True)
class Family:
    """How a transformers model type lies in a GGUF file."""

    arch: MODEL_ARCH
    rotary_pairs: bool = False  # llama.cpp rotates neighbouring channels, transformers the two halves of a head
    norm_shift: float = 0.0  # Gemma stores weight - 1
    activations: tuple[str, ...] = _SILU  # transformers' names of the one that llama.cpp computes

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(MODEL_ARCH_NAMES[self.arch])


FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, rotary_pairs=True),
    "mistral": Family(MODEL_ARCH.LLAMA, rotary_pairs=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, norm_shift=1.0, activations=_GELU),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, norm_shift=1.0, activations=_GELU),
    "phi": Family(MODEL_ARCH.PHI2, activations=_GELU),
    "phi3": Family(MODEL_ARCH.PHI3),
}


class Layout:
    """Names, shapes and values of one model's parameters on the side of GGUF."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.family = family_of(config)
        self._names = get_tensor_name_map(self.family.arch, config.num_hidden_layers)
        self._num_heads = {"q_proj": config.num_attention_heads, "k_proj": _num_kv_heads(config)}

    def name(self, parameter: str) -> str:
        """The tensor's name in the file. ModelError for a parameter that llama.cpp has no place for."""
        name = self._names.get_name(parameter, try_suffixes=_SUFFIXES)
        if name is None:
            raise ModelError(
                f"llama.cpp's {self.family.name} models have no place for {parameter}", fix="export safetensors instead"
            )
        return str(name)

    def to_file(self, parameter: str, rows: Tensor) -> Tensor:
        """Rows (first dimension, any dtype) in llama.cpp's order: those of q and k change places within a head."""
        heads = self._rotated_heads(parameter)
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous() if heads else rows

    def to_model(self, parameter: str, rows: Tensor) -> Tensor:
        """The inverse of `to_file`."""
        heads = self._rotated_heads(parameter)
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous() if heads else rows

    def shift(self, parameter: str) -> float:
        """What llama.cpp's values are above transformers'."""
        return self.family.norm_shift if parameter.endswith("norm.weight") else 0.0

    def _rotated_heads(self, parameter: str) -> int:
        """Into how many heads the rows of a parameter are split for the rotation; 0 for none."""
        module = parameter.rpartition(".")[0].rpartition(".")[2]
        return int(self._num_heads.get(module, 0)) if self.family.rotary_pairs else 0


def family_of(config: Any) -> Family:
    """ModelError, with all that stands in the way, for a model that llama.cpp would compute otherwise."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"GGUF is written for {', '.join(sorted(FAMILIES))}, and this is a {config.model_type} model",
            fix="export safetensors, or convert those with llama.cpp's convert_hf_to_gguf.py if it knows the model",
        )
    reasons = _CHECKS.get(config.model_type, _no_reasons)(config) + _rope_reasons(config)
    if reasons := reasons + _activation_reasons(config, family):
        raise ModelError(
            f"llama.cpp would not compute this {config.model_type} model as it was trained: {'; '.join(reasons)}",
            fix="export safetensors instead",
        )
    return family


def hyperparameters(config: Any) -> tuple[dict[str, Value], list[str]]:
    """Keys and values that describe the model, and what a user of the file must know."""
    family = family_of(config)
    head_dim = _head_dim(config)
    context, notices = _context_length(config)
    keys: dict[str, Value] = {
        Keys.LLM.CONTEXT_LENGTH: context,
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.Attention.HEAD_COUNT: config.num_attention_heads,
        Keys.Attention.HEAD_COUNT_KV: _num_kv_heads(config),
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        **_rope_keys(config),
    }
    if config.model_type == "phi":
        keys[Keys.Attention.LAYERNORM_EPS] = float(config.layer_norm_eps)
    else:
        keys[Keys.Attention.LAYERNORM_RMS_EPS] = float(config.rms_norm_eps)
    if config.model_type in ("gemma2", "gemma3_text"):
        keys[Keys.Attention.SLIDING_WINDOW] = config.sliding_window
    if config.model_type == "gemma2":
        keys[Keys.LLM.ATTN_LOGIT_SOFTCAPPING] = float(config.attn_logit_softcapping)
        keys[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = float(config.final_logit_softcapping)
    return {key.format(arch=family.name): value for key, value in keys.items()}, notices


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Float32 tensors that no parameter stands for: factors by which the rotary frequencies are divided."""
    rope = _rope(config)
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        rotated = torch.arange(0, _rotary_dim(config), 2, dtype=torch.int64).float() / _rotary_dim(config)
        plain = 1.0 / float(rope["rope_theta"]) ** rotated
        return {f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight": (plain / scaled).float()}
    if rope["rope_type"] == "longrope":
        factors = {MODEL_TENSOR.ROPE_FACTORS_LONG: "long_factor", MODEL_TENSOR.ROPE_FACTORS_SHORT: "short_factor"}
        return {f"{TENSOR_NAMES[name]}.weight": torch.tensor(rope[key]).float() for name, key in factors.items()}
    return {}


def _context_length(config: Any) -> tuple[int, list[str]]:
    """Positions; no more than llama.cpp computes as transformers does, and why."""
    positions, window, short = int(config.max_position_embeddings), _window(config), _short_length(config)
    context, notices = positions, []
    says = "the file says that its context is {0:,} tokens, up to which both are the same"
    if config.model_type in ("mistral", "phi3") and window and window < context:
        context = window
        attends = f"llama.cpp's {family_of(config).name} models to all"
        notices.append(f"the model attends to the last {window:,} tokens, {attends}: {says.format(window)}")
    if short is not None and short < context:
        context = short
        notices.append(
            f"texts of more than {short:,} tokens have rotary factors of their own, which llama.cpp takes for all "
            f"texts once its context is longer: {says.format(short)}; for longer texts alone give llama-server a "
            "larger -c"
        )
    return context, notices


def _short_length(config: Any) -> int | None:
    """Length of text up to which long rotary positions have factors of their own; None for other positions.

    transformers chooses by the length of the text, llama.cpp (llama_model::get_rope_factors) by that of its context.
    """
    rope = _rope(config)
    return int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None


def _window(config: Any) -> int | None:
    """The sliding window, where one is in use."""
    in_use = getattr(config, "use_sliding_window", True)
    window: int | None = getattr(config, "sliding_window", None) if in_use else None
    return window


def _rope_keys(config: Any) -> Mapping[str, Value]:
    rope = _rope(config)
    keys: dict[str, Value] = {
        Keys.Rope.DIMENSION_COUNT: _rotary_dim(config),
        Keys.Rope.FREQ_BASE: float(rope["rope_theta"]),
    }
    if config.model_type == "gemma3_text":
        keys[Keys.Rope.FREQ_BASE_SWA] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        keys[Keys.Rope.SCALING_TYPE] = kind
        keys[Keys.Rope.SCALING_FACTOR] = _stretch(config, rope)
    if kind == "yarn":
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = int(rope["original_max_position_embeddings"])
    if kind == "longrope":
        original = int(rope["original_max_position_embeddings"])
        stretch = _stretch(config, rope)
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = original
        keys[Keys.Rope.SCALING_ATTN_FACTOR] = float(rope.get("attention_factor") or scale)
    return keys


def _stretch(config: Any, rope: Mapping[str, Any]) -> float:
    """By what positions are scaled. A config that leaves it open means the ratio of its two lengths."""
    if (factor := rope.get("factor")) is not None:
        return float(factor)
    return float(config.max_position_embeddings / rope["original_max_position_embeddings"])


def _rope(config: Any) -> dict[str, Any]:
    """The rotary settings of the layers that see everything."""
    settings = dict(config.rope_parameters or {})
    settings = dict(settings.get("full_attention", settings))
    if settings.get("rope_type") == "longrope":
        settings.setdefault("original_max_position_embeddings", config.original_max_position_embeddings)
    return {"rope_type": "default", **settings}


def _rope_reasons(config: Any) -> list[str]:
    rope = _rope(config)
    known = {"phi3": ("default", "longrope"), "llama": ("default", "linear", "llama3", "yarn")}
    kinds = known.get(config.model_type, ("default", "linear", "yarn"))
    if rope["rope_type"] not in kinds:
        return [f"rotary positions of type {rope['rope_type']} (known: {', '.join(kinds)})"]
    if rope["rope_type"] == "yarn":
        changed = {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"} & {
            key for key, value in rope.items() if value is not None
        }
        return [f"yarn with {', '.join(sorted(changed))}"] if changed else []
    return []


def _activation_reasons(config: Any, family: Family) -> list[str]:
    name = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    found = getattr(config, name)
    return [] if found in family.activations else [f"{name} is {found}, not {family.activations[0]}"]


def _num_kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_dim(config: Any) -> int:
    if config.model_type not in _PARTLY_ROTATED:  # transformers' code of the others does not look at the key
        return _head_dim(config)
    frac = (config.rope_parameters or {}).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(_head_dim(config) * (1.0 if frac is None else frac))


def _no_reasons(_: Any) -> list[str]:
    return []


def _bias_reasons(config: Any) -> list[str]:
    return ["biases in the attention (attention_bias)"] if getattr(config, "attention_bias", False) else []


def _llama_reasons(config: Any) -> list[str]:
    return ["biases in the MLP (mlp_bias)"] if getattr(config, "mlp_bias", False) else []


def _qwen_reasons(config: Any) -> list[str]:
    return ["a sliding window (use_sliding_window)"] if _window(config) else []


def _qwen3_reasons(config: Any) -> list[str]:
    return _qwen_reasons(config) + _bias_reasons(config)


def _gemma_reasons(config: Any, pattern: int, large: int) -> list[str]:
    """Windows, scale of the scores and their caps, which llama.cpp fixes."""
    layers = config.num_hidden_layers
    expected = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    reasons = _bias_reasons(config)
    if list(config.layer_types) != expected:
        reasons.append(f"windows in other layers than all but each {pattern}th (layer_types)")
    scale = config.hidden_size // config.num_attention_heads if layers == large else _head_dim(config)
    if config.query_pre_attn_scalar != scale:
        reasons.append(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scale}")
    if not _window(config):
        reasons.append("no sliding window")
    return reasons


def _gemma2_reasons(config: Any) -> list[str]:
    reasons = _gemma_reasons(config, 2, _GEMMA_2_LARGE)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            reasons.append(f"no {name}")
    return reasons + ([] if config.tie_word_embeddings else ["a head of its own"])


def _gemma3_reasons(config: Any) -> list[str]:
    reasons = _gemma_reasons(config, _GEMMA_3_PATTERN, _GEMMA_3_LARGE)
    near = config.rope_parameters["sliding_attention"].get("rope_type", "default")
    if near != "default":
        reasons.append(f"rotary positions of type {near} within the windows")
    return reasons + [
        f"{name} is {value}"
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
        if (value := getattr(config, name, None))
    ]


def _phi_reasons(config: Any) -> list[str]:
    reasons = ["normalised queries and keys (qk_layernorm)"] if getattr(config, "qk_layernorm", False) else []
    return reasons + (["a head tied to the embedding"] if config.tie_word_embeddings else [])


def _phi3_reasons(config: Any) -> list[str]:
    wide = config.num_attention_heads * _head_dim(config)
    return [] if wide == config.hidden_size else [f"heads {wide} wide together, {config.hidden_size} in the model"]


_CHECKS: dict[str, Callable[[Any], list[str]]] = {
    "llama": _llama_reasons,
    "qwen2": _qwen_reasons,
    "qwen3": _qwen3_reasons,
    "gemma2": _gemma2_reasons,
    "gemma3_text": _gemma3_reasons,
    "phi": _phi_reasons,
    "phi3": _phi3_reasons,
}
