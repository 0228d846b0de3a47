"""Tiny random models on disk, built without a network. Sizes are multiples of 64, as bitsandbytes needs on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

# ChatML that adds a system turn where the conversation has none, as SmolLM2's does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "system\nYou are a helpful assistant.\n",
    "user\nList the files of the current directory, newest first, with their sizes.\n",
    "assistant\nls -lt --human-readable\n",
    "Which command shows how much space is left on the disk? Answer with one shell command: df -h\n",
    "The quick brown fox jumps over the lazy dog while 0123456789 numbers are counted.\n",
    "Find every file that ends in .py and count its lines: find . -name '*.py' -exec wc -l {} +\n",
    "Copy the folder to another machine, and show what is being transferred: rsync -av source/ host:target/\n",
    "What does this program do? It reads a text, splits it into words, and prints the words that it found.\n",
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences: any text round-trips, at most 512 tokens, pad is eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_llama(folder: Path, *, tie: bool = True, seed: int = 0, **sizes: int) -> Path:
    """A random LlamaForCausalLM with grouped-query attention: q 128, k and v 64, MLP 256, two layers, or `sizes`."""
    from transformers import LlamaConfig

    return _save(LlamaConfig(**{**SIZES, **sizes}, num_key_value_heads=2, tie_word_embeddings=tie), folder, seed)


def build_tiny_neox(folder: Path, *, seed: int = 0) -> Path:
    """A random GPTNeoXForCausalLM: q, k and v in one linear layer, `query_key_value` (384, 128), with biases."""
    from transformers import GPTNeoXConfig

    return _save(GPTNeoXConfig(**SIZES), folder, seed)


def build_tiny_phi3(folder: Path, *, seed: int = 0) -> Path:
    """A random Phi3ForCausalLM: `qkv_proj` (256, 128) and `gate_up_proj` (512, 128) are fused."""
    from transformers import Phi3Config

    return _save(Phi3Config(**SIZES, num_key_value_heads=2), folder, seed)


def _save(config: Any, folder: Path, seed: int) -> Path:
    """Seeded random weights in bf16 safetensors, with the tokenizer beside them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def build_tiny_gemma2(folder: Path, *, seed: int = 0) -> Path:
    """A random Gemma2ForCausalLM: capped scores and logits, alternating windows; transformers has no sdpa for it."""
    from transformers import Gemma2Config

    sizes = {**SIZES, "max_position_embeddings": 1024}
    return _save(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=32, sliding_window=16), folder, seed)


def build_tiny_lfm2(folder: Path, *, seed: int = 0) -> Path:
    """A random Lfm2ForCausalLM: a layer with a depthwise convolution over 3 tokens, `conv.conv` (128, 1, 3), and one
    with attention."""
    from transformers import Lfm2Config

    kinds = ["conv", "full_attention"]
    config = Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=kinds, block_auto_adjust_ff_dim=False)
    return _save(config, folder, seed)
