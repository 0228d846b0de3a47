"""Which tokens are trained. Every expected mask is written by hand: the tokens in [brackets] and no others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_train.data.encode import Encoder
from qlora_train.data.problems import RowFault
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.spans import Span
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.data.template import Rendered, Renderer
from qlora_train.errors import ModelError

pytestmark = pytest.mark.usefixtures("shared_workers")

Build = Callable[..., PreTrainedTokenizerFast]
S, E = "<|im_start|>", "<|im_end|>"


def chat(*turns: str, where: str = "train.jsonl:1") -> MessagesRow:
    """A conversation from turns such as "user: list"."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return MessagesRow(where, tuple({"role": role, "content": content} for role, content in pairs))


def pair(prompt: str, completion: str, where: str = "train.jsonl:1") -> PromptCompletionRow:
    return PromptCompletionRow(where, prompt, completion)


def encoded(tokenizer: PreTrainedTokenizerFast, *rows: Row, loss_on: str = "assistant") -> list[TokenRow | RowFault]:
    with Renderer(tokenizer, loss_on) as renderer:
        return Encoder(tokenizer).encode([renderer.render_one(row) for row in rows])


def tokens(tokenizer: PreTrainedTokenizerFast, row: Row, loss_on: str = "assistant") -> TokenRow:
    (found,) = encoded(tokenizer, row, loss_on=loss_on)
    assert isinstance(found, TokenRow), found
    return found


def marked(tokenizer: PreTrainedTokenizerFast, row: Row, loss_on: str = "assistant") -> list[str]:
    """The row's tokens as their pieces (Ġ is a space, Ċ a newline), the trained ones in brackets."""
    found = tokens(tokenizer, row, loss_on)
    pieces = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    return [f"[{piece}]" if mask else piece for piece, mask in zip(pieces, found.supervised(), strict=True)]


def refused(tokenizer: PreTrainedTokenizerFast, rendered: Rendered | Row) -> str:
    """Why a row is refused, beside one that is not."""
    other = Rendered("list<|im_end|>", (Span(0, 14),), add_special_tokens=False)
    with Renderer(tokenizer, "assistant") as renderer:
        entry = rendered if isinstance(rendered, Rendered) else renderer.render_one(rendered)
    fault, row = Encoder(tokenizer).encode([entry, other])
    assert isinstance(fault, RowFault) and isinstance(row, TokenRow)
    return f"{fault.what}; {fault.fix}"


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
    row = chat("user: list", "assistant: ls")
    tables = [TokenTable.of_rows([tokens(tokenizer, row)]) for tokenizer in (same, other)]
    assert tables[0].fingerprint() == tables[1].fingerprint()
    assert marked(same, row)[-2] == marked(other, row)[-2] == f"[{E}]"


@pytest.mark.parametrize("nested", [False, True])
def test_straddling_token_is_refused(build_tokenizer: Build, nested: bool) -> None:
    tokenizer = build_tokenizer(nested=nested)
    reason = refused(tokenizer, pair("list ", "files"))
    assert "the start of the trained text falls inside one token, ' files'; begin completions with a space" in reason
    assert refused(tokenizer, pair("li", "st the")).startswith("the start of the trained text falls inside")


def plain(text: str, *spans: Span) -> Rendered:
    return Rendered(text, spans, add_special_tokens=False)


def test_span_end_inside_a_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    reason = refused(tokenizer, plain("list files", Span(4, 8)))
    assert reason.startswith("the end of the trained text falls inside one token, ' files'")


def test_text_that_no_end_token_closes_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    assert refused(tokenizer, plain("list files", Span(4, 10))).startswith("no end token closes the trained text")
    (row,) = Encoder(tokenizer).encode([plain("list files", Span(4, 10, closed=False))])
    assert isinstance(row, TokenRow) and row.supervised().tolist() == [False, True]


def test_text_that_the_tokenizer_leaves_out_is_refused(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    assert "leaves out '?'" in refused(tokenizer, pair("list", " the? files"))
    assert "leaves out '?'" in refused(tokenizer, pair("list", " the files?"))
    assert marked(tokenizer, pair("list?", " files")) == ["list", "[Ġfiles]", f"[{E}]"]


def test_row_with_nothing_but_its_first_token_to_train_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    assert refused(tokenizer, pair("", "")).startswith("the row has no token to train")


def test_spans_and_weights_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    row = MessagesRow(
        "a:1", chat("user: list", "assistant: ls", "user: the", "assistant: files").messages, (), (0, 2, 0, 0.5)
    )
    found = tokens(tokenizer, row)
    # <|im_start|> user \n list <|im_end|> \n are six tokens; so many again before the second answer's own.
    assert (found.span_starts.tolist(), found.span_stops.tolist()) == ([9, 21], [11, 23])
    assert found.span_weights.tolist() == [2, 0.5]
    assert {array.dtype for array in (found.ids, found.span_starts, found.span_stops)} == {np.dtype(np.int32)}


def test_ids_are_those_of_the_tokenizer_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("user: list  the\tfiles é", "assistant:  ls \n ls ")
    text = tokenizer.apply_chat_template(list(row.messages), tokenize=False)
    assert isinstance(text, str)
    assert tokens(tokenizer, row).ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_with_and_without_bos_share_a_batch_and_keep_their_order(build_tokenizer: Build) -> None:
    tokenizer = with_post_processor(build_tokenizer(bos_token="<|bos|>"), "<|bos|> $A")
    rows: list[Row] = [
        pair("list", " ls"),
        pair("<|bos|>the", " ls"),
        chat("user: list", "assistant: the"),
        pair("ls", " ls"),
    ]
    texts = [tokenizer.decode(row.ids) for row in encoded(tokenizer, *rows) if isinstance(row, TokenRow)]
    chatted = f"{S}user\nlist{E}\n{S}assistant\nthe{E}\n"
    assert texts == [f"<|bos|>list ls{E}", f"<|bos|>the ls{E}", chatted, f"<|bos|>ls ls{E}"]


def test_prompt_ids(build_tokenizer: Build) -> None:
    tokenizer = with_post_processor(build_tokenizer(bos_token="<|bos|>"), f"<|bos|> $A {E}")
    encoder, names = Encoder(tokenizer), tokenizer.convert_ids_to_tokens
    assert names(encoder.ids(Rendered("list", (), add_special_tokens=True))) == ["<|bos|>", "list"]
    assert names(encoder.ids(Rendered("", (), add_special_tokens=True))) == ["<|bos|>"]
    assert names(encoder.ids(Rendered("list", (), add_special_tokens=False))) == ["list"]


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_end_token_is_not_what_follows_it(build_tokenizer: Build, loss_on: str) -> None:
    tokenizer = build_tokenizer()
    encoder, end = Encoder(tokenizer), tokenizer.convert_tokens_to_ids(E)
    messages = chat("user: list", "assistant: ls", "user: the", "assistant: files").messages
    first, last = (MessagesRow("a:1", messages, (), weights) for weights in ((0, 1, 0, 0), (0, 0.5, 0, 2)))
    for row in (MessagesRow("a:1", messages), last, TextRow("a:1", "list"), pair("list", " files")):
        assert encoder.end_token_of(tokens(tokenizer, row, loss_on)) == end
    # The first answer ends with it. Of all text but the last answer, the last special token is the start of a header.
    assert encoder.end_token_of(tokens(tokenizer, first, loss_on)) == (None if loss_on == "all" else end)
    tokenizer.chat_template = tokenizer.chat_template.replace(f"{E}\n", f"{E} the\n")
    assert encoder.end_token_of(tokens(tokenizer, last, loss_on)) == end


def test_rows_without_special_tokens_have_no_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = Encoder(tokenizer).encode([plain("list files", Span(4, 10, closed=False))])
    assert isinstance(row, TokenRow) and Encoder(tokenizer).end_token_of(row) is None


def test_longest_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Encoder(tokenizer).longest_piece == len("<|im_start|>")


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


def test_two_bos_tokens_are_refused(build_tokenizer: Build) -> None:
    tokenizer = with_post_processor(build_tokenizer(bos_token="<|bos|>"), "<|bos|> $A")
    assert "begins with two BOS tokens" in refused(tokenizer, pair("<|bos|><|bos|>list", " ls"))
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    assert "begins with two BOS tokens" in refused(tokenizer, chat("user: list", "assistant: ls"))


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
        encoded(build_tokenizer(eos_token=None), pair("list", " files"))


def test_slow_tokenizer(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    with pytest.raises(ModelError, match="slow"):
        encoded(tokenizer, pair("list", " files"))
