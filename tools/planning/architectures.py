"""The models of the published figures: what their config.json says of their sizes.

Each count is the published number of parameters of the checkpoint (tied weights once), which holds the values in place:
tests/unit/tools/test_planning.py builds every model without weights and counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model_type of transformers with the sizes that differ from its defaults."""

    model_type: str
    published_params: int
    sizes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """transformers' config."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.sizes)


def _llama(
    params: int,
    hidden: int,
    layers: int,
    heads: int,
    mlp: int,
    *,
    kv: int | None = None,
    vocab: int = 32_000,
    **more: Any,
) -> Architecture:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv is None else kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 524_288,  # the longest row that was published; no weight depends on it
        "tie_word_embeddings": False,
    }
    model_type = more.pop("model_type", "llama")
    return Architecture(model_type, params, sizes | more)


_LLAMA_7B = _llama(6_738_415_616, 4096, 32, 32, 11_008)
_LLAMA_13B = _llama(13_015_864_320, 5120, 40, 40, 13_824)
_LLAMA3_8B = _llama(8_030_261_248, 4096, 32, 32, 14_336, kv=8, vocab=128_256)
_LLAMA3_70B = _llama(70_553_706_496, 8192, 80, 64, 28_672, kv=8, vocab=128_256)
_MISTRAL_7B = _llama(7_241_732_096, 4096, 32, 32, 14_336, kv=8, model_type="mistral", sliding_window=None)

ARCHITECTURES: dict[str, Architecture] = {
    "LLaMA-7B": _LLAMA_7B,
    "LLaMA-13B": _LLAMA_13B,
    "LLaMA-33B": _llama(32_528_943_616, 6656, 60, 52, 17_920),
    "LLaMA-65B": _llama(65_285_660_672, 8192, 80, 64, 22_016),
    "Llama-2-7B": _LLAMA_7B,
    "Llama-2-13B": _LLAMA_13B,
    "Llama-2-70B": _llama(68_976_648_192, 8192, 80, 64, 28_672, kv=8),
    "CodeLlama-34B": _llama(33_743_970_304, 8192, 48, 64, 22_016, kv=8),
    "Llama-3-8B": _LLAMA3_8B,
    "Llama-3.1-8B": _LLAMA3_8B,
    "Llama-3-70B": _LLAMA3_70B,
    "Llama-3.3-70B": _LLAMA3_70B,
    "Llama-3.2-1B": _llama(
        1_235_814_400, 2048, 16, 32, 8192, kv=8, vocab=128_256, head_dim=64, tie_word_embeddings=True
    ),
    "Llama-3.2-3B": _llama(
        3_212_749_824, 3072, 28, 24, 8192, kv=8, vocab=128_256, head_dim=128, tie_word_embeddings=True
    ),
    "Mistral-7B": _MISTRAL_7B,
    "Mistral-7B-v0.1": _MISTRAL_7B,
    "Mistral-7B-v0.2": _MISTRAL_7B,
    "Ministral-8B": _llama(
        8_019_808_256,
        4096,
        36,
        32,
        12_288,
        kv=8,
        vocab=131_072,
        model_type="mistral",
        head_dim=128,
        sliding_window=None,
    ),
    # Plano-4B is Qwen3-4B trained on (its card names the base).
    "Plano-4B": _llama(
        4_022_468_096,
        2560,
        36,
        32,
        9728,
        kv=8,
        vocab=151_936,
        model_type="qwen3",
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Olmo-3-7B": _llama(7_298_011_136, 4096, 32, 32, 11_008, vocab=100_278, model_type="olmo3"),
    "Apertus-8B": _llama(8_053_338_176, 4096, 32, 32, 21_504, kv=8, vocab=131_072, model_type="apertus"),
    "Hunyuan-0.5B": _llama(
        539_010_048,
        1024,
        24,
        16,
        3584,
        kv=8,
        vocab=120_818,
        model_type="hunyuan_v1_dense",
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Gemma-2B": _llama(
        2_506_172_416,
        2048,
        18,
        8,
        16_384,
        kv=1,
        vocab=256_000,
        model_type="gemma",
        head_dim=256,
        tie_word_embeddings=True,
    ),
    "Gemma-7B": _llama(
        8_537_680_896, 3072, 28, 16, 24_576, vocab=256_000, model_type="gemma", head_dim=256, tie_word_embeddings=True
    ),
    "Gemma-2-9B": _llama(
        9_241_705_984,
        3584,
        42,
        16,
        14_336,
        kv=8,
        vocab=256_000,
        model_type="gemma2",
        head_dim=256,
        tie_word_embeddings=True,
    ),
    "Phi-3-mini-4k": _llama(3_821_079_552, 3072, 32, 32, 8192, vocab=32_064, model_type="phi3"),
    # 71 heads and one key and value head; embeddings and head are tied.
    "Falcon-7B": Architecture(
        "falcon",
        6_921_720_704,
        {
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "vocab_size": 65_024,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": False,
        },
    ),
    "StableLM-Alpha-3B": Architecture(
        "gpt_neox",
        3_638_525_952,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "intermediate_size": 16_384,
            "vocab_size": 50_688,
            "tie_word_embeddings": False,
        },
    ),
}
