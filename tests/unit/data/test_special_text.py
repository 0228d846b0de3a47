"""Special-token text that anyone writes in a conversation is text, and everything else is encoded as it always was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_train.data.encode import Encoder
from qlora_train.data.problems import RowFault
from qlora_train.data.rows import Message, MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.table import TokenRow
from qlora_train.data.template import Rendered, Renderer

pytestmark = pytest.mark.usefixtures("shared_workers")

Build = Callable[..., PreTrainedTokenizerFast]
S, E = "<|im_start|>", "<|im_end|>"
AS_TEXT = ["<", "|", "i", "m", "_", "e", "n", "d", "|", ">"]  # how the small tokenizer writes <|im_end|> as text


def said(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def render(tokenizer: Any, row: Row) -> Rendered:
    with Renderer(tokenizer, "assistant") as renderer:
        return renderer.render_one(row)


def ids_of(tokenizer: Any, *messages: Message, tools: tuple[Any, ...] = ()) -> list[int]:
    rendered = render(tokenizer, MessagesRow("a:1", messages, tools))
    (row,) = Encoder(tokenizer).encode([rendered])
    assert isinstance(row, TokenRow), row
    oracle = tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, sanitize_control_tokens=True)
    assert row.ids.tolist() == oracle["input_ids"]
    return row.ids.tolist()


def test_special_text_of_users_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    found = ids_of(tokenizer, said("user", f"the {E} files"), said("assistant", "ls"))
    assert tokenizer.convert_ids_to_tokens(found) == [
        *(S, "user", "Ċ", "the", "Ġ", *AS_TEXT, "Ġfiles", E, "Ċ"),
        *(S, "assistant", "Ċ", "ls", E, "Ċ"),
    ]


def test_special_text_of_answers_is_text_and_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(tokenizer, MessagesRow("a:1", (said("user", "list"), said("assistant", f"the {E} files"))))
    (row,) = Encoder(tokenizer).encode([rendered])
    assert isinstance(row, TokenRow)
    trained = tokenizer.convert_ids_to_tokens(row.ids[row.span_starts[0] : row.span_stops[0]].tolist())
    assert trained == ["the", "Ġ", *AS_TEXT, "Ġfiles", E]


def test_answers_may_write_the_added_tokens_of_the_template(build_tokenizer: Build) -> None:
    """A call or a thought in so many words: the tokens are not special, and the template writes them too."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.chat_template += "{% if false %}<call>{% endif %}"
    rendered = render(tokenizer, MessagesRow("a:1", (said("user", "<call>"), said("assistant", "<call> ls"))))
    (row,) = Encoder(tokenizer).encode([rendered])
    assert isinstance(row, TokenRow) and row.ids.tolist().count(tokenizer.convert_tokens_to_ids("<call>")) == 1


def test_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(tokenizer, MessagesRow("a:1", (said("user", f"{E}{S}"), said("assistant", f"a{E}b{S}c{E}d"))))
    assert (rendered.num_plain_specials, rendered.num_control_specials) == (5, 0)
    assert [rendered.text[start:stop] for start, stop in rendered.plain] == [E, S, E, S, E]
    plain = render(tokenizer, MessagesRow("a:1", (said("user", "a"), said("assistant", "b"))))
    assert (plain.num_plain_specials, plain.num_control_specials) == (0, 0)


@pytest.mark.parametrize(
    ("row", "count"),
    [
        (TextRow("a:1", "list"), 0),
        (TextRow("a:1", f"list{E}"), 0),
        (TextRow("a:1", f"list{E}files{S}"), 2),
        (PromptCompletionRow("a:1", f"list{E}", f" files{E}"), 1),
        (PromptCompletionRow("a:1", "<|bos|>list", " files"), 0),
    ],
)
def test_verbatim_rows_keep_their_special_tokens(build_tokenizer: Build, row: Row, count: int) -> None:
    rendered = render(build_tokenizer(bos_token="<|bos|>"), row)
    assert (rendered.num_plain_specials, rendered.num_control_specials) == (0, count)


def test_places_in_tools_and_results(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "ls", "description": f"the {E}", "enum": [S, {"a": S}]}}
    messages = (said("system", S), said("user", E), said("assistant", "ls"), said("tool", E), said("assistant", "the"))
    found = ids_of(tokenizer, *messages, tools=(tool,))
    starts, ends = (tokenizer.convert_tokens_to_ids(token) for token in (S, E))
    assert (found.count(starts), found.count(ends)) == (5, 5)


CALLING = "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"


@pytest.mark.parametrize("literal", [E, "<call>"])
def test_names_of_fields_cannot_hold_special_text(build_tokenizer: Build, literal: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['content'] }}" + CALLING)
    tokenizer.chat_template += "{% if false %}<call>{% endif %}"

    def row(argument: str, schema: str) -> MessagesRow:
        call = {"type": "function", "function": {"name": "ls", "arguments": {"deep": [{argument: 1}]}}}
        tool = {"type": "function", "function": {"name": "ls", "parameters": {"properties": {schema: {}}}}}
        return MessagesRow("a:1", (said("user", E), said("assistant", "", tool_calls=[call])), (tool,))

    assert '"path"' in render(tokenizer, row("path", "path")).text
    for refused in (row(f"a{literal}b", "path"), row("path", f"a{literal}b")):
        with pytest.raises(RowFault, match=re.escape(f"the row holds '{literal}' in the name of a field")) as caught:
            render(tokenizer, refused)
        assert caught.value.fix == "rename it"


def test_added_tokens_that_the_template_writes(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<call>", "<other>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n{# <other> #}")
    tokenizer.chat_template += "{% if false %}<call>{% endif %}"
    found = ids_of(tokenizer, said("user", "<call> <other>"), said("assistant", "ls"))
    assert tokenizer.convert_tokens_to_ids("<call>") not in found
    assert tokenizer.convert_tokens_to_ids("<other>") in found


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1"])
def test_marks_of_our_own_are_refused(tokenizer: PreTrainedTokenizerFast, mark: str) -> None:
    for messages in ((said("user", f"a{mark}"), said("assistant", "b")), (said("user", "a"), said("assistant", mark))):
        with pytest.raises(RowFault, match="holds U\\+FDD0 or U\\+FDD1"):
            render(tokenizer, MessagesRow("a:1", messages))


def test_template_that_takes_special_text_to_pieces(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'][:-3]")
    with pytest.raises(RowFault, match="takes special-token text in the row to pieces"):
        render(tokenizer, MessagesRow("a:1", (said("user", f"a{E}b"), said("assistant", "ls..."))))


def test_marks_of_answers_keep_their_place(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rendered = render(tokenizer, MessagesRow("a:1", (said("user", f"{E} {S}"), said("assistant", "ls"))))
    assert [rendered.text[span.start : span.stop] for span in rendered.spans] == [f"ls{E}"]
    assert [rendered.text[start:stop] for start, stop in rendered.plain] == [E, S]


def test_text_that_the_tokenizer_can_only_write_as_the_token(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["list"]})  # which is a piece of its own too
    rendered = render(tokenizer, MessagesRow("a:1", (said("user", "list"), said("assistant", "ls"))))
    assert rendered.num_plain_specials == 1
    (fault,) = Encoder(tokenizer).encode([rendered])
    assert isinstance(fault, RowFault) and "holds 'list' as text" in fault.what


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words as SentencePiece writes them: a space is put in front of a text, and belongs to the word after it."""
    pieces = ["<unk>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyz<>|_:/", "▁the", "▁ls"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("l", "s"), ("▁", "ls")]
    pieces += ["th", "the", "ls"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("question", ["the </s> ls", "</s>", "the</s><s>the", " </s>\n", "</s> the"])
def test_tokenizers_that_put_a_space_in_front(question: str) -> None:
    tokenizer = spaced_tokenizer()
    found = ids_of(tokenizer, said("user", question), said("assistant", "ls"))
    assert found.count(tokenizer.eos_token_id) == 1 and found[-1] == tokenizer.eos_token_id
