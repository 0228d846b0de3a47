"""New tokens in a tokenizer: what is known, what is added and as what, and what would tear words apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_train.data.encode import Encoder
from qlora_train.data.specials import special_tokens
from qlora_train.errors import ModelError
from qlora_train.model.skeleton import tokenizer_digest
from qlora_train.model.tokens import add_new_tokens, describe, unused_tokens
from tests.packs import table_of
from tests.tiny import build_tiny_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return build_tiny_tokenizer()


def test_unknown_tokens_get_the_next_ids_and_known_ones_keep_theirs(tokenizer: Any) -> None:
    count, before = len(tokenizer), tokenizer_digest(tokenizer)
    tokens = add_new_tokens(tokenizer, ["<tool>", "<|im_end|>", "</tool>", " the"])
    assert tokens is not None
    assert tokens.ids[:3] == (count, 2, count + 1) and tokens.added == (True, False, True, False)
    assert len(tokenizer) == count + 2 and tokenizer_digest(tokenizer) != before
    ids = tokenizer("x<tool>ls</tool>y", add_special_tokens=False)["input_ids"]
    assert ids.count(count) == ids.count(count + 1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<tool>ls</tool>y", "an answer shows them"
    assert tokens.num_lacking(count) == 2 and tokens.num_lacking(count + 2) == 0
    assert "<tool> " in describe(tokens, count) and "gets 2 more" in describe(tokens, count)
    again = build_tiny_tokenizer()
    add_new_tokens(again, tokens.texts)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer), "made anew, it is the same"


def test_a_token_that_the_template_writes_is_a_special_one(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokens = add_new_tokens(tokenizer, ["<|turn|>", "<tool>"])
    assert tokens is not None
    special = special_tokens(tokenizer)
    assert special["<|turn|>"] == tokens.ids[0] and "<tool>" not in special
    assert Encoder(tokenizer).fingerprint != Encoder(build_tiny_tokenizer()).fingerprint


def test_none_changes_nothing(tokenizer: Any) -> None:
    before = tokenizer_digest(tokenizer)
    assert add_new_tokens(tokenizer, ()) is None and tokenizer_digest(tokenizer) == before


def test_an_id_that_another_word_has_is_refused(tokenizer: Any) -> None:
    """A pruned vocabulary: two words are gone, and the ids of the others are what they were."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, last = model["model"]["vocab"], max(model["model"]["vocab"].values())
    gone = [word for word, number in vocab.items() if number in (last - 8, last - 7)]
    model["model"]["merges"] = [pair for pair in model["model"]["merges"] if "".join(pair) not in gone]
    for word in gone:
        del vocab[word]
    pruned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)))
    other = next(word for word, number in vocab.items() if number == last - 1)
    with pytest.raises(ModelError) as error:
        add_new_tokens(pruned, ["<tool>"])
    assert f"'<tool>' was added with the id {last - 1:,}, which is that of {other!r}" in str(error.value)
    assert "name a token that the tokenizer knows" in str(error.value)
    assert add_new_tokens(pruned, [" the"]) is not None, "what has an id is no trouble"
    vocab["<unreached>"] = last - 8
    unreached = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)))
    tokens = add_new_tokens(unreached, ["<unreached>"])
    assert tokens is not None and tokens.ids == (last - 8,), "a word of the vocabulary that no merge leads to"


@pytest.mark.parametrize(
    "text", ["xylophones", "two words", "2026", "e-mail", "don't", "l\u2019\u00e9t\u00e9", "हिन्दी", "a\u0308pfel"]
)
def test_ordinary_words_are_refused(text: str, tokenizer: Any) -> None:
    count = len(tokenizer)
    with pytest.raises(ModelError, match="is an ordinary word, which the tokenizer writes as '") as error:
        add_new_tokens(tokenizer, ["<tool>", text])
    assert f"<{text.replace(' ', '_')}> say" in str(error.value) and len(tokenizer) == count


@pytest.mark.parametrize("text", ["<e-mail>", "-x", "a-b-c", "it's-", "1\ufe0f\u20e3", "\u2764\ufe0f", "C++"])
def test_what_is_no_word_becomes_a_token(text: str, tokenizer: Any) -> None:
    tokens = add_new_tokens(tokenizer, [text])
    assert tokens is not None and tokens.added == (True,)


def test_tokens_that_no_row_holds_are_told(tokenizer: Any) -> None:
    tokens = add_new_tokens(tokenizer, ["<tool>", "<|im_end|>"])
    assert tokens is not None
    table = table_of([20, 30])
    assert unused_tokens(table, tokens) == ["<tool>", "<|im_end|>"]
    seen = table.rows([1])[0].ids[3]
    assert unused_tokens(table, type(tokens)(("a", "b"), (int(seen), 1), (False, False))) == ["b"]
