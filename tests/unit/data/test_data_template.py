"""Where the trained text lies in a rendering, for templates of all kinds, and who is at fault where it is not known."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_train.data.formats import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.template import Renderer, Unrenderable, prompt_and_answer
from qlora_train.errors import ModelError

Build = Callable[..., PreTrainedTokenizerFast]
S, E = "<|im_start|>", "<|im_end|>"


def chat(*contents: str, where: str = "train.jsonl:1") -> MessagesRow:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return MessagesRow(where, tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def trained(tokenizer: PreTrainedTokenizerFast, row: Row, loss_on: str = "assistant") -> list[str]:
    rendered = Renderer(tokenizer, loss_on).render(row)
    return [rendered.text[start:end] for start, end in rendered.spans]


def changed(build_tokenizer: Build, old: str, new: str) -> PreTrainedTokenizerFast:
    """The ChatML tokenizer with a part of its template replaced."""
    tokenizer = build_tokenizer()
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return tokenizer


def test_each_answer_is_a_span_with_its_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("a", "b", "c", " d\n")
    assert trained(tokenizer, row) == [f"b{E}", f" d\n{E}"]
    assert trained(tokenizer, row, "completion") == [f" d\n{E}"]
    (whole,) = trained(tokenizer, row, "all")
    assert whole.startswith(f"{S}user\na{E}") and whole.endswith(f" d\n{E}\n")


@pytest.mark.parametrize("answer", ["i", "end", "im_end", "assistant", "\n.\n", "user", "|>", f"a{E}b"])
def test_answer_that_also_stands_in_the_markup(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    assert trained(tokenizer, chat("a", answer)) == [answer + E]


def test_answer_after_a_header_between_special_tokens(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}<|bos|>files<|bos|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    assert trained(tokenizer, chat("list", "files")) == [f"<|bos|>files<|bos|>files{E}"]


def test_end_token_whose_text_begins_anothers(build_tokenizer: Build) -> None:
    tokenizer = changed(build_tokenizer, E, "<|end|><|bos|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end", "<|end|>"]})
    assert trained(tokenizer, chat("a", "b")) == ["b<|end|>"]
    assert trained(tokenizer, chat("a", "end")) == ["end<|end|>"]  # which also stands between two special tokens


def test_template_that_trims_answers(build_tokenizer: Build) -> None:
    tokenizer = changed(build_tokenizer, "m['content']", "m['content'] | trim")
    assert trained(tokenizer, chat("a", "  ls\n")) == [f"ls{E}"]


def test_template_that_rewrites_earlier_turns(build_tokenizer: Build) -> None:
    shortened = "{{ m['content'] if loop.last or m['role'] == 'user' else 'the' }}"
    tokenizer = changed(build_tokenizer, "{{ m['content'] }}", shortened)
    row = chat("a", "b", "c", "d")
    with pytest.raises(Unrenderable, match=r"rewrites messages\[1\] when later turns follow"):
        trained(tokenizer, row)
    assert trained(tokenizer, row, "completion") == [f"d{E}"]


def test_template_without_a_consistent_generation_prompt(build_tokenizer: Build) -> None:
    tokenizer = changed(build_tokenizer, "%}<|im_start|>assistant\n{%", "%}Answer:{%")
    with pytest.raises(Unrenderable, match="does not begin with its own generation prompt"):
        trained(tokenizer, chat("a", "b"))


def test_template_that_hides_the_answer(build_tokenizer: Build) -> None:
    with pytest.raises(Unrenderable, match=r"does not show messages\[1\].content"):
        trained(changed(build_tokenizer, "m['content']", "m['content'] | upper"), chat("a", "b"))


def test_template_without_end_tokens(build_tokenizer: Build) -> None:
    with pytest.raises(Unrenderable, match="puts no end token after an answer"):
        trained(changed(build_tokenizer, E, ""), chat("a", "b"))


def test_missing_chat_template(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="'tiny' has no chat template") as caught:
        trained(tokenizer, chat("a", "b"))
    assert "chat_template: FILE" in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}\n{{ m['content'] }\n{% endfor %}", "fails at line 2: TemplateSyntaxError"),
        ("a\nb\n{{ raise_exception('roles must alternate') }}", "fails at line 3: TemplateError: roles must alternate"),
        ("a\n{{ messages[9]['content'] }}", "fails at line 2: UndefinedError"),
        ("a\n\n\n{{ messages[0]['content'] + 1 }}", "fails at line 4: TypeError"),
    ],
)
def test_template_error_names_its_line_and_the_row(build_tokenizer: Build, template: str, says: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=re.escape(says)) as caught:
        trained(tokenizer, chat("a", "b", where="train.jsonl:9"))
    assert caught.value.problems[0].where == "train.jsonl:9"


def test_prompt_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    head = f"{S}user\na{E}\n{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\n"
    assert prompt_and_answer(chat("a", "b", "c", " d "), tokenizer) == (head, "d")
    assert prompt_and_answer(PromptCompletionRow("a:1", "list", f" ls {E}"), tokenizer) == ("list", "ls")
    assert prompt_and_answer(TextRow("a:1", "ls"), tokenizer) is None


def test_the_prompt_is_what_stands_before_the_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("a", "b", "c", "d")
    found, rendered = prompt_and_answer(row, tokenizer), Renderer(tokenizer, "completion").render(row)
    assert found is not None and rendered.text[: rendered.spans[0][0]] == found[0]
