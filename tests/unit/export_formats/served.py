"""Tiny random models of the families that GGUF is written for, each with a tokenizer of its kind, in memory."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny import CHAT_TEMPLATE, CORPUS

VOCAB_SIZE = 512
WINDOW = 16  # shorter than the texts that are compared
# What vLLM's own reader refuses of a config that it reads otherwise: tests/e2e/test_vllm.py asks it.
REFUSED_BY_VLLM: tuple[dict[str, Any], ...] = (
    {"modules_to_save": ["lm_head"]},
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True},
    {"init_lora_weights": "pissa"},
    {"layer_replication": [[0, 1]]},
    {"use_qalora": True},
    {"r": 600},
    {"r": 0},
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # Random weights of the usual size make attention nearly uniform: nothing would show.
    "initializer_range": 0.15,
}
_GEMMA: dict[str, Any] = {**_SIZES, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": WINDOW}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [2.0 + 0.1 * i for i in range(12)],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-3": LlamaConfig(**_SIZES, rope_parameters=_LLAMA_3_ROPE, attention_bias=True, head_dim=64),
    "llama-linear": LlamaConfig(**_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-yarn": Qwen2Config(**_SIZES, rope_parameters=_YARN),
    "qwen3": Qwen3Config(**_SIZES, head_dim=64, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    # Six layers, so that one of them sees everything.
    "gemma3": Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 6}),
    "phi": PhiConfig(**{**_SIZES, "num_key_value_heads": 4}, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**_SIZES, sliding_window=None),
    "phi3-long": Phi3Config(**_SIZES, rope_parameters=_LONG_ROPE, original_max_position_embeddings=256),
}
TOKENIZERS = {"gemma2": "gemma", "gemma3": "gemma", "mistral": "sentencepiece", "phi3": "phi-3"}
TOKENIZERS |= {"llama-3": "llama-3", "qwen2": "qwen2", "qwen3": "qwen2", "qwen2-yarn": "digits"}


def random_model(family: str) -> Any:
    """A frozen random model in float32 whose norms and biases are not the ones of every start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer as models of a family have it."""
    return build_tokenizer(TOKENIZERS.get(family, "gpt-2"))


def build_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """BPE on bytes (gpt-2, digits, llama-3, qwen2) or characters with byte fallback (sentencepiece, gemma, phi-3)."""
    build = _characters if kind in ("sentencepiece", "gemma", "phi-3") else _bytes
    tokenizer, special = build(kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False
    )


def _bytes(kind: str) -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = {"llama-3": LLAMA_3, "qwen2": QWEN_2}.get(kind)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    elif kind == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    else:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _train(tokenizer, special, alphabet, VOCAB_SIZE - 8)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    if kind == "llama-3":
        with_bos = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.post_processor = with_bos
        return tokenizer, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return tokenizer, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


def _characters(kind: str) -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    prefix = [] if kind == "gemma" else [normalizers.Prepend("\u2581")]
    tokenizer.normalizer = normalizers.Sequence([*prefix, replace])
    if kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ["<pad>", "<eos>", "<bos>", "<unk>"] if kind == "gemma" else ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    special = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_start|>", "<|im_end|>"]
    # Words are merged within spaces, as SentencePiece trains them.
    corpus = [piece for line in CORPUS for piece in line.replace(" ", " \u0000").split("\u0000")]
    _train(tokenizer, special, [], VOCAB_SIZE - 8, corpus)
    data = json.loads(tokenizer.to_str())
    # Byte tokens are plain entries of the vocabulary, and no special tokens.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    for token in data["added_tokens"] if kind == "phi-3" else ():
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    tokenizer = Tokenizer.from_str(json.dumps(data))
    bos, eos = ("<bos>", "<eos>") if kind == "gemma" else ("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer, {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>"}


def _train(
    tokenizer: Tokenizer, special: list[str], alphabet: list[str], size: int, corpus: list[str] | None = None
) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus or CORPUS, trainer)
