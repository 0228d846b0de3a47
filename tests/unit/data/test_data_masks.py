"""Which tokens are trained. Every expected mask is written by hand: the tokens in [brackets] and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_train.data.audit import Audit
from qlora_train.data.encode import Encoder
from qlora_train.data.formats import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.problems import Rejection
from qlora_train.data.template import Rendered, adds_special_tokens
from qlora_train.data.tokenize import TokenTable, tokenize_rows
from qlora_train.errors import DataError, ModelError
from qlora_train.recipe.schema import DataSection

Build = Callable[..., PreTrainedTokenizerFast]
S, E = "<|im_start|>", "<|im_end|>"


def section(**changes: Any) -> DataSection:
    return DataSection(train=(Path("train.jsonl"),), **changes)


def chat(*turns: str, where: str = "train.jsonl:1") -> MessagesRow:
    """A conversation from turns such as "user: list"."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return MessagesRow(where, tuple({"role": role, "content": content} for role, content in pairs))


def pair(prompt: str, completion: str, where: str = "train.jsonl:1") -> PromptCompletionRow:
    return PromptCompletionRow(where, prompt, completion)


def tokenized(tokenizer: PreTrainedTokenizerFast, *rows: Row, **changes: Any) -> tuple[TokenTable, Audit]:
    return tokenize_rows(rows, tokenizer, section(**changes), "train")


def marked(tokenizer: PreTrainedTokenizerFast, row: Row, **changes: Any) -> list[str]:
    """The row's tokens as their pieces (Ġ is a space, Ċ a newline), the trained ones in brackets."""
    table, _ = tokenized(tokenizer, row, **changes)
    ids, supervised = table.row(0)
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [f"[{piece}]" if mask else piece for piece, mask in zip(pieces, supervised, strict=True)]


def rejection(tokenizer: PreTrainedTokenizerFast, row: Row, **changes: Any) -> str:
    """The reason for which `row` is rejected beside a row that is kept."""
    _, audit = tokenized(tokenizer, row, TextRow("train.jsonl:2", "ls"), **changes)
    (fate,) = audit.fates
    assert fate.where == row.where and fate.fate == "rejected"
    return fate.reason


@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
def test_single_turn(tokenizer: PreTrainedTokenizerFast, loss_on: str) -> None:
    assert marked(tokenizer, chat("user: list the files", "assistant: ls"), loss_on=loss_on) == [
        *(S, "user", "Ċ", "list", "Ġthe", "Ġfiles", E, "Ċ"),
        *(S, "assistant", "Ċ", "[ls]", f"[{E}]", "Ċ"),
    ]


def test_system_prompt_is_never_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, chat("system: the files", "user: list", "assistant: ls ls")) == [
        *(S, "system", "Ċ", "the", "Ġfiles", E, "Ċ", S, "user", "Ċ", "list", E, "Ċ"),
        *(S, "assistant", "Ċ", "[ls]", "[Ġls]", f"[{E}]", "Ċ"),
    ]


@pytest.mark.parametrize(("loss_on", "first"), [("assistant", ["[ls]", f"[{E}]", "Ċ"]), ("completion", ["ls", E, "Ċ"])])
def test_multi_turn(tokenizer: PreTrainedTokenizerFast, loss_on: str, first: list[str]) -> None:
    row = chat("user: list", "assistant: ls", "user: the", "assistant: files")
    assert marked(tokenizer, row, loss_on=loss_on) == [
        *(S, "user", "Ċ", "list", E, "Ċ", S, "assistant", "Ċ", *first),
        *(S, "user", "Ċ", "the", E, "Ċ", S, "assistant", "Ċ", "[files]", f"[{E}]", "Ċ"),
    ]


def test_loss_on_all_leaves_out_only_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, chat("user: list", "assistant: ls"), loss_on="all") == [
        *(S, "[user]", "[Ċ]", "[list]", f"[{E}]", "[Ċ]", f"[{S}]", "[assistant]", "[Ċ]", "[ls]", f"[{E}]", "[Ċ]"),
    ]


def test_prompt_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, pair("list the", " files")) == ["list", "Ġthe", "[Ġfiles]", f"[{E}]"]
    assert marked(tokenizer, pair("list the", " files"), loss_on="all") == ["list", "[Ġthe]", "[Ġfiles]", f"[{E}]"]


def test_completion_that_ends_with_the_end_token_ends_once(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, pair("list", f" files{E}")) == ["list", "[Ġfiles]", f"[{E}]"]


def test_empty_prompt_cannot_train_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, pair("", "list files")) == ["list", "[Ġfiles]", f"[{E}]"]


def test_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, TextRow("a:1", "list the files")) == ["list", "[Ġthe]", "[Ġfiles]", f"[{E}]"]


def test_tokens_of_spaces_alone_are_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    # The tokenizer's own offsets give a token of spaces alone no text, as if it stood for nothing.
    assert marked(tokenizer, pair("the:", "   ls")) == ["the", ":", "[ĠĠ]", "[Ġls]", f"[{E}]"]
    assert marked(tokenizer, pair("the:", " ls  ")) == ["the", ":", "[Ġls]", "[ĠĠ]", f"[{E}]"]


def test_every_byte_of_a_character_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, pair("ls", " é")) == ["ls", "[Ġ]", "[Ã]", "[©]", f"[{E}]"]
    assert marked(tokenizer, pair("ls\U0001f600", "\U0001f600"))[-9:] == (
        ["ð", "Ł", "ĺ", "Ģ", "[ð]", "[Ł]", "[ĺ]", "[Ģ]", f"[{E}]"]
    )


def test_padding_id_equal_to_the_end_token_changes_nothing(build_tokenizer: Build) -> None:
    same, other = build_tokenizer(), build_tokenizer(pad_token="<|bos|>")
    assert same.pad_token_id == same.eos_token_id != other.pad_token_id
    rows = [chat("user: list", "assistant: ls", where=f"a:{line}") for line in range(5)]
    table, _ = tokenized(same, *rows)
    assert table.fingerprint() == tokenized(other, *rows)[0].fingerprint()
    trained_ends = (table.ids == same.eos_token_id) & table.supervised
    assert trained_ends.sum() == len(rows)


@pytest.mark.parametrize("nested", [False, True])
def test_straddling_token_is_rejected(build_tokenizer: Build, nested: bool) -> None:
    tokenizer = build_tokenizer(nested=nested)
    reason = rejection(tokenizer, pair("list ", "files"))
    assert "the start of the trained text falls inside one token, ' files'; begin completions with a space" in reason
    assert rejection(tokenizer, pair("li", "st the")).startswith("the start of the trained text falls inside")


def test_span_end_inside_a_token_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder, rendered = Encoder(tokenizer), Rendered("list files", ((4, 8),), add_special_tokens=True)
    with pytest.raises(Rejection, match="the end of the trained text falls inside one token, ' files'"):
        encoder.supervised(rendered, *encoder.encode([rendered]))


def test_text_that_no_end_token_closes_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder, rendered = Encoder(tokenizer), Rendered("list files", ((4, 10),), add_special_tokens=True)
    with pytest.raises(Rejection, match="no end token closes the trained text"):
        encoder.supervised(rendered, *encoder.encode([rendered]))


def test_text_that_the_tokenizer_leaves_out_is_rejected(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    assert "leaves out '?'" in rejection(tokenizer, pair("list", " the? files"))
    assert marked(tokenizer, pair("list?", " files")) == ["list", "[Ġfiles]", f"[{E}]"]


def test_ids_are_those_of_the_tokenizer_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("user: list  the\tfiles é", "assistant:  ls \n ls ")
    text = tokenizer.apply_chat_template(list(row.messages), tokenize=False)
    assert isinstance(text, str)
    table, _ = tokenized(tokenizer, row)
    assert table.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_across_batches_keep_their_order(tokenizer: PreTrainedTokenizerFast, monkeypatch: Any) -> None:
    monkeypatch.setattr("qlora_train.data.tokenize._BATCH_ROWS", 3)
    rows = [pair("ls" * (line % 4 + 1), " ls", where=f"a:{line}") for line in range(10)]
    table, _ = tokenized(tokenizer, *rows)
    assert table.where == tuple(row.where for row in rows)
    for index, row in enumerate(rows):
        assert tokenizer.decode(table.row(index)[0].tolist()) == row.prompt + " ls" + E


def with_post_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Like Llama's (BOS first) or T5's (end token last), after the byte-level stage."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", E)]
    stages = [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(template, special_tokens=ids)]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(stages)
    return tokenizer


def test_bos_of_the_tokenizer_stands_once(build_tokenizer: Build) -> None:
    tokenizer = with_post_processor(build_tokenizer(bos_token="<|bos|>"), "<|bos|> $A")
    assert marked(tokenizer, TextRow("a:1", "list")) == ["<|bos|>", "[list]", f"[{E}]"]
    assert marked(tokenizer, TextRow("a:1", "<|bos|>list")) == ["<|bos|>", "[list]", f"[{E}]"]
    assert marked(tokenizer, pair("", "list")) == ["<|bos|>", "[list]", f"[{E}]"]
    assert marked(tokenizer, chat("user: list", "assistant: ls"))[0] == S
    assert [adds_special_tokens(row, tokenizer) for row in (pair("a", "b"), pair("<|bos|>a", "b"))] == [True, False]
    assert not adds_special_tokens(chat("user: list", "assistant: ls"), tokenizer)


def test_what_the_tokenizer_adds_in_front_is_never_trained(build_tokenizer: Build) -> None:
    tokenizer = with_post_processor(build_tokenizer(), f"<|bos|> {E} $A")
    assert marked(tokenizer, TextRow("a:1", "list")) == ["<|bos|>", E, "[list]", f"[{E}]"]


def test_end_token_of_the_tokenizer_stands_once(build_tokenizer: Build) -> None:
    tokenizer = with_post_processor(build_tokenizer(), f"$A {E}")
    assert marked(tokenizer, pair("list", " files")) == ["list", "[Ġfiles]", f"[{E}]"]


@pytest.mark.parametrize("side", [{"lstrip": True}, {"rstrip": True}])
def test_end_token_that_swallows_whitespace_ends_its_answer(build_tokenizer: Build, side: dict[str, bool]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True, **side)]})
    tokenizer.chat_template = tokenizer.chat_template.replace(f"{E}\n", "\n<|end|>\n")
    row = chat("user: list", "assistant: ls")
    tail = ["[ls]", "[Ċ]", "[<|end|>]", "Ċ"]
    tail.remove("[Ċ]" if "lstrip" in side else "Ċ")  # swallowed
    assert marked(tokenizer, row)[-3:] == tail


def test_special_token_that_swallows_the_space_of_a_completion(build_tokenizer: Build) -> None:
    # "list" + " <|end|> files": the token takes the space before it, which is the completion's.
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True, lstrip=True)]})
    assert marked(tokenizer, pair("list ", "<|end|> files")) == ["list", "[<|end|>]", "[Ġfiles]", f"[{E}]"]


def test_tokenizer_without_end_token(build_tokenizer: Build) -> None:
    with pytest.raises(ModelError, match="names no end token"):
        tokenized(build_tokenizer(eos_token=None), pair("list", " files"))


def test_slow_tokenizer(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    with pytest.raises(ModelError, match="slow"):
        tokenized(tokenizer, pair("list", " files"))


def test_overlong_rows_are_dropped_with_their_length(tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = pair("list", " ls" * 6), pair("list", " ls" * 7, where="train.jsonl:2")
    table, audit = tokenized(tokenizer, short, long, seq_len=8)
    assert table.lengths().tolist() == [8]
    (fate,) = audit.fates
    assert (fate.where, fate.fate, fate.num_tokens, fate.num_supervised_tokens) == ("train.jsonl:2", "dropped", 9, 8)
    assert fate.reason == "the row is 9 tokens long; data.seq_len is 8"


def test_overlong_rows_fail_on_request(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("list", " ls" * 9, where=f"a:{line}") for line in range(25)]
    with pytest.raises(DataError) as caught:
        tokenized(tokenizer, *rows, pair("list", " ls"), seq_len=8, overlong="fail")
    problems = caught.value.problems
    assert len(problems) == 21 and problems[0].where == "a:0" and "25 problems" in problems[-1].what


def test_row_far_too_long_is_dropped_before_it_is_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    giant = TextRow("a:1", "ls" * 2**20)
    _, audit = tokenized(tokenizer, giant, pair("list", " ls"))
    (fate,) = audit.fates
    # 2**21 characters and the end token's 10; the longest piece is <|im_start|> with 12.
    assert fate.fate == "dropped" and fate.num_tokens == 174_763
    assert "2,097,162 characters, so at least 174,763 tokens long" in fate.reason


@pytest.mark.parametrize(
    ("rows", "changes", "says"),
    [
        ([pair("li", "st", where=f"a:{n}") for n in range(3)], {}, "0 trainable rows of 3 .* falls inside one token"),
        ([pair("list", " ls" * n, where=f"a:{n}") for n in (20, 21)], {"seq_len": 8}, "rows of 2 .* 22 tokens long"),
        ([], {}, "holds no rows"),
    ],
)
def test_nothing_left_names_the_likely_cause(
    tokenizer: PreTrainedTokenizerFast, rows: list[Row], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        tokenized(tokenizer, *rows, **changes)


def test_fingerprint_tells_ids_masks_and_borders_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("user: list", "assistant: ls")
    table, _ = tokenized(tokenizer, row)
    moved, _ = tokenized(tokenizer, MessagesRow("elsewhere.jsonl:9", row.messages))
    assert table.fingerprint() == moved.fingerprint()
    others = [
        tokenized(tokenizer, row, loss_on="all")[0],
        tokenized(tokenizer, chat("user: list", "assistant: the"))[0],
        TokenTable(table.ids, table.supervised, np.array([0, 3, len(table.ids)]), ("a:1", "a:2")),
    ]
    assert len({table.fingerprint(), *(other.fingerprint() for other in others)}) == 4
