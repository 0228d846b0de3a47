"""Tokenizers as llama.cpp is told of them, and those that are refused. That it reads them so: tests/e2e."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_train.errors import ModelError
from qlora_train.export.formats.vocabulary import Vocabulary, general_name, read_vocabulary
from tests.unit.export_formats.served import VOCAB_SIZE, build_tokenizer


def read(tokenizer: Any, num_rows: int = VOCAB_SIZE, ends: tuple[int, ...] = ()) -> Vocabulary:
    return read_vocabulary(tokenizer, num_rows, ends)


def changed(kind: str, **parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with other parts, by their names in tokenizer.json; `model__x` is a key of the model."""
    spec = json.loads(build_tokenizer(kind).backend_tokenizer.to_str())
    for name, value in parts.items():
        where, _, key = name.rpartition("__")
        (spec[where] if where else spec)[key] = value
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|im_end|>")


@pytest.mark.parametrize(
    ("kind", "model", "pre", "bos", "prefix"),
    [
        ("gpt-2", "gpt2", "gpt-2", False, False),
        ("digits", "gpt2", "smollm", False, False),
        ("llama-3", "gpt2", "dbrx", True, False),
        ("qwen2", "gpt2", "qwen2", False, False),
        ("sentencepiece", "llama", "default", True, True),
        ("gemma", "llama", "default", True, False),
        ("phi-3", "llama", "default", True, True),
    ],
)
def test_kinds(kind: str, model: str, pre: str, bos: bool, prefix: bool) -> None:
    found = read(build_tokenizer(kind))
    assert (found.kind, found.pre_tokenizer, found.add_bos, found.add_space_prefix) == (model, pre, bos, prefix)
    assert not found.add_eos and found.chat_template is not None and not found.notices
    assert bool(found.merges) == (model == "gpt2") and bool(found.scores) == (model == "llama")


def test_whole_words_without_merges_are_told_apart() -> None:
    assert read(changed("llama-3", model__ignore_merges=True)).pre_tokenizer == "llama-bpe"
    assert read(changed("llama-3", model__ignore_merges=False)).pre_tokenizer == "dbrx"


def test_white_space_after_special_tokens_is_told_by_the_name() -> None:
    assert read(build_tokenizer("phi-3")).strips_right and not read(build_tokenizer("phi-3")).notices
    assert not read(build_tokenizer("sentencepiece")).strips_right
    assert general_name("Phi-3 mini", strips_right=True) == "Phi-3 mini"
    assert general_name("Phi-3 mini", strips_right=False) == "phi 3 mini"
    assert "Phi-3" in general_name("mine", strips_right=True)


def test_tokens_have_their_kinds_and_rows_without_one_a_name() -> None:
    tokenizer = build_tokenizer("sentencepiece")
    tokenizer.add_tokens([AddedToken("\u2581two\u2581spaces", normalized=False)])
    number = tokenizer.convert_tokens_to_ids("\u2581two\u2581spaces")
    found = read(tokenizer, num_rows=number + 3)
    kinds = {token: TokenType(kind) for token, kind in zip(found.tokens, found.types, strict=True)}
    assert kinds["<unk>"] == TokenType.UNKNOWN and kinds["<s>"] == TokenType.CONTROL
    assert kinds["<0x0A>"] == TokenType.BYTE and kinds["e"] == TokenType.NORMAL
    assert kinds[" two spaces"] == TokenType.USER_DEFINED, "llama.cpp finds such tokens in the text as it is"
    assert found.tokens[-2:] == (f"[PAD{number + 1}]", f"[PAD{number + 2}]") and found.types[-1] == TokenType.UNUSED


def test_tokens_without_a_row_are_left_out() -> None:
    tokenizer = build_tokenizer("gpt-2")
    found = read(tokenizer, num_rows=400)
    assert len(found.tokens) == len(found.types) == 400 and len(tokenizer) > 400


def test_scores_join_in_the_order_of_the_merges() -> None:
    tokenizer = build_tokenizer("sentencepiece")
    found = read(tokenizer)
    merges = [left + right for left, right in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    scores = [found.scores[found.tokens.index(piece)] for piece in dict.fromkeys(merges)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores) > 50
    assert min(scores) > found.scores[found.tokens.index("e")], "what is not joined comes last"


def test_merges_of_one_piece_that_lie_apart_are_refused() -> None:
    merges = [["a", "b"], ["b", "c"], ["a", "bc"], ["c", "a"], ["ab", "c"]]
    vocab = {token: i for i, token in enumerate(["<unk>", "a", "b", "c", "ab", "bc", "abc", "ca"])}
    with pytest.raises(ModelError, match="'abc' at several places"):
        read(changed("sentencepiece", model__vocab=vocab, model__merges=merges, added_tokens=[], post_processor=None))


def test_ends_that_are_not_the_tokenizers_end_the_turn() -> None:
    tokenizer = build_tokenizer("sentencepiece")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert read(tokenizer, ends=(tokenizer.eos_token_id, turn)).special_ids["eot"] == turn
    assert "eot" not in read(tokenizer, ends=(tokenizer.eos_token_id,)).special_ids
    ends = (tokenizer.eos_token_id, turn, *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<unk>"]))
    several = read(tokenizer, ends=ends)
    assert several.special_ids["eom"] == ends[2] and "stop at '<unk>' too" in several.notices[-1]


@pytest.mark.parametrize(
    ("kind", "parts", "words"),
    [
        ("gpt-2", {"pre_tokenizer": {"type": "Whitespace"}}, "prepares text|no tokens for single bytes"),
        (
            "gpt-2",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "a space before every text",
        ),
        (
            "qwen2",
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                    ],
                }
            },
            "x[+], which has no name there",
        ),
        ("sentencepiece", {"normalizer": {"type": "Lowercase"}}, "that SentencePiece does not"),
        ("sentencepiece", {"model__byte_fallback": False}, "no tokens for single bytes"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(kind: str, parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read(changed(kind, **parts))


def test_what_it_leaves_out_is_a_notice() -> None:
    composing = read(changed("qwen2", normalizer={"type": "NFC"}))
    assert "NFC" in composing.notices[0]
    tokenizer = build_tokenizer("gpt-2")
    tokenizer.add_tokens([AddedToken("<x>", rstrip=True)])
    assert "<x>" in read(tokenizer).notices[0]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    first = read(changed("sentencepiece", normalizer=None, pre_tokenizer=metaspace))
    assert first.add_space_prefix and "first word only" in first.notices[0]
    never = read(changed("sentencepiece", normalizer=None, pre_tokenizer={**metaspace, "prepend_scheme": "never"}))
    assert not never.add_space_prefix and not never.notices


def test_several_chat_templates_are_a_notice() -> None:
    tokenizer = build_tokenizer("gpt-2")
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "default": "{{ messages }}"}
    found = read(tokenizer)
    assert found.chat_template is None
    assert "several chat templates (default, tool_use)" in found.notices[0] and "none of them" in found.notices[0]
