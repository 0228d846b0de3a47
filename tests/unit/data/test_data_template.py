"""Where the trained text lies in a rendering, for templates of all kinds, and who is at fault where it is not known."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_train.data.problems import RowFault, TemplateFault
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.template import Rendered, Renderer, last_question
from qlora_train.errors import ModelError

pytestmark = pytest.mark.usefixtures("shared_workers")

Build = Callable[..., PreTrainedTokenizerFast]
S, E = "<|im_start|>", "<|im_end|>"


def chat(*contents: str, where: str = "train.jsonl:1") -> MessagesRow:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return MessagesRow(where, tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def render(tokenizer: PreTrainedTokenizerFast, row: Row, loss_on: str = "assistant") -> Rendered:
    with Renderer(tokenizer, loss_on) as renderer:
        return renderer.render_one(row)


def trained(tokenizer: PreTrainedTokenizerFast, row: Row, loss_on: str = "assistant") -> list[str]:
    rendered = render(tokenizer, row, loss_on)
    return [rendered.text[span.start : span.stop] for span in rendered.spans]


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
    with pytest.raises(RowFault, match=r"rewrites messages\[1\] when later turns follow"):
        trained(tokenizer, row)
    assert trained(tokenizer, row, "completion") == [f"d{E}"]


def marking(build_tokenizer: Build, answer: str, prompt: str = f"{S}assistant\n") -> PreTrainedTokenizerFast:
    """ChatML whose answers are rendered by `answer`, a piece of a template with {% generation %} marks."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    "answer",
    [
        f"{S}assistant\n{{% generation %}}{{{{ m.content }}}}{E}{{% endgeneration %}}{{{{ '\n' }}}}",
        f"{S}assistant\n{{% generation %}}{{{{ m.content }}}}{{% endgeneration %}}{E}{{{{ '\n' }}}}",  # without the end
        f"{S}assistant\n{{% generation %}}{{{{ m.content }}}}{E}{{{{ '\n' }}}}{{% endgeneration %}}",  # and more
        f"{{% generation %}}{S}assistant\n{{{{ m.content }}}}{E}{{% endgeneration %}}{{{{ '\n' }}}}",  # with the header
        f"{{% generation %}}{S}assistant\n{{{{ m.content }}}}{{% endgeneration %}}{E}{{{{ '\n' }}}}",
    ],
)
def test_marks_are_brought_to_the_answer_and_its_end(build_tokenizer: Build, answer: str) -> None:
    tokenizer = marking(build_tokenizer, answer)
    assert trained(tokenizer, chat("a", "b", "c", "d")) == [f"b{E}", f"d{E}"]
    assert trained(tokenizer, chat("a", "b", "c", "d"), "completion") == [f"d{E}"]


def test_marks_serve_where_renderings_do_not_begin_with_one_another(build_tokenizer: Build) -> None:
    answer = f"{S}assistant\n{{% generation %}}{{{{ m.content }}}}{E}{{% endgeneration %}}{{{{ '\n' }}}}"
    tokenizer = marking(build_tokenizer, answer, prompt="Answer:")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    assert trained(tokenizer, chat("a", "b", "c", "d")) == [f"b{E}", f"d{E}"]


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
def test_several_marks_in_an_answer(build_tokenizer: Build, loss_on: str) -> None:
    piece = "{% generation %}{{ m.content }}{% endgeneration %}"
    tokenizer = marking(build_tokenizer, f"{S}assistant\n{piece}, {piece}{E}{{{{ '\n' }}}}")
    assert trained(tokenizer, chat("a", "b", "c", "d"), loss_on)[-1] == f"d, d{E}"
    row = chat("a", "b", "c", "d")
    weighted_row = MessagesRow(row.where, row.messages, weights=(0, 1, 0, 0))
    if loss_on == "assistant":
        assert trained(tokenizer, row)[0] == trained(tokenizer, weighted_row)[0] == f"b, b{E}"


def test_marks_that_cannot_be_told_apart(build_tokenizer: Build) -> None:
    piece = "{% generation %}{{ m.content }}{% endgeneration %}"
    tokenizer = marking(build_tokenizer, f"{S}assistant\n{piece}, {piece}{E}{{{{ '\n' }}}}", prompt="Answer:")
    with pytest.raises(RowFault, match="marks 4 pieces of text as generated, the conversation has 2 answers"):
        trained(tokenizer, chat("a", "b", "c", "d"))


def test_mark_that_does_not_hold_the_answer(build_tokenizer: Build) -> None:
    tokenizer = marking(build_tokenizer, f"{S}assistant\n{{{{ m.content }}}}{{% generation %}}{E}{{% endgeneration %}}")
    with pytest.raises(RowFault, match=r"does not show messages\[1\].content"):
        trained(tokenizer, chat("a", "b"))


def test_template_without_a_consistent_generation_prompt(build_tokenizer: Build) -> None:
    tokenizer = changed(build_tokenizer, "%}<|im_start|>assistant\n{%", "%}Answer:{%")
    with pytest.raises(RowFault, match="does not begin with its own generation prompt"):
        trained(tokenizer, chat("a", "b"))


def test_template_that_hides_the_answer(build_tokenizer: Build) -> None:
    with pytest.raises(RowFault, match=r"does not show messages\[1\].content"):
        trained(changed(build_tokenizer, "m['content']", "m['content'] | upper"), chat("a", "b"))


def test_template_without_end_tokens(build_tokenizer: Build) -> None:
    with pytest.raises(RowFault, match="puts no end token after an answer"):
        trained(changed(build_tokenizer, E, ""), chat("a", "b"))


def test_missing_chat_template(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="'tiny' has no chat template") as caught:
        trained(tokenizer, chat("a", "b"))
    assert "chat_template: FILE" in caught.value.problems[0].fix


def test_template_that_does_not_compile(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}\n{{ m['content'] }\n{% endfor %}"
    with pytest.raises(ModelError, match="'tiny' fails at line 2: TemplateSyntaxError") as caught:
        trained(tokenizer, chat("a", "b", where="train.jsonl:9"))
    assert caught.value.problems[0].where == "train.jsonl:9"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("a\nb\n{{ raise_exception('roles must alternate') }}", "fails at line 3: TemplateError: roles must alternate"),
        ("a\n{{ messages[9]['content'] }}", "fails at line 2: UndefinedError"),
        ("a\n\n\n{{ messages[0]['content'] + 1 }}", "fails at line 4: TypeError"),
        ("{{ '\\ud800' }}", "fails: UnicodeEncodeError"),
    ],
)
def test_template_error_names_its_line(build_tokenizer: Build, template: str, says: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateFault, match=re.escape(says)) as caught:
        trained(tokenizer, chat("a", "b"))
    assert caught.value.error is ModelError


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
@pytest.mark.parametrize("template", ["{% for m in message %}{{ m.content }}{% endfor %}", "\n {{ unknown }}\n"])
def test_template_that_renders_nothing(build_tokenizer: Build, template: str, loss_on: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateFault, match="the chat template renders nothing for this row"):
        render(tokenizer, chat("a", "b"), loss_on)


def test_a_row_that_fails_leaves_its_neighbours_alone(build_tokenizer: Build) -> None:
    tokenizer = changed(
        build_tokenizer, "{{ m['content'] }}", "{{ m['content'] }}{% if 'x' in m['content'] %}{{ 1/0 }}{% endif %}"
    )
    with Renderer(tokenizer, "assistant") as renderer:
        batches = list(renderer.render([[chat("a", "b"), chat("x", "b")], [TextRow("t:1", "t")], [chat("c", "d")]]))
    assert [[isinstance(entry, RowFault) for entry in batch] for batch in batches] == [[False, True], [False], [False]]
    assert isinstance(fault := batches[0][1], TemplateFault) and "ZeroDivisionError" in fault.what
    assert [entry.text for entry in batches[1] + batches[2] if isinstance(entry, Rendered)] == [
        f"t{E}",
        f"{S}user\nc{E}\n{S}assistant\nd{E}\n",
    ]


def test_rows_may_be_rendered_while_a_batch_is_ahead(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = len(f"{S}user\n")
    with Renderer(tokenizer, "assistant") as renderer:
        seen = ""
        for (entry,) in renderer.render([[chat("a", "b")], [chat("c", "d")], [chat("e", "f")]]):
            assert isinstance(entry, Rendered)
            seen += entry.text[asked] + renderer.render_one(chat("u", "v")).text[asked]
    assert seen == "aucueu"


def test_question(tokenizer: PreTrainedTokenizerFast) -> None:
    head = f"{S}user\na{E}\n{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\n"
    with Renderer(tokenizer, "all") as renderer:
        assert renderer.question(chat("a", "b", "c", " d ")) == (Rendered(head, (), add_special_tokens=False), "d")
        asked = renderer.question(PromptCompletionRow("a:1", "list", f" ls {E}"))
        assert asked == (Rendered("list", (), add_special_tokens=True), "ls")
        assert renderer.question(TextRow("a:1", "ls")) is None
        assert renderer.prompt(chat("a", "b", "c").messages).text == head


def test_last_question() -> None:
    assert last_question(chat("a", "b", "c", "d")) == "c"
    assert last_question(PromptCompletionRow("a:1", "list", "ls")) == "list"
    assert last_question(TextRow("a:1", "ls")) == ""


def weighted(*weights: float) -> MessagesRow:
    """Two questions and answers, their messages weighted so."""
    row = chat("a", "b", "c", "d")
    return MessagesRow(row.where, row.messages, weights=weights)


def test_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(tokenizer, weighted(0, 0.5, 0, 1))
    assert [span.weight for span in rendered.spans] == [0.5, 1.0]
    assert trained(tokenizer, weighted(0, 0, 0, 2)) == [f"d{E}"]
    assert render(tokenizer, weighted(0, 0, 0, 2), "completion").spans[0].weight == 2
    assert trained(tokenizer, weighted(0, 1, 0, 0)) == [f"b{E}"]
    with pytest.raises(RowFault, match="the last answer has weight 0"):
        trained(tokenizer, weighted(0, 1, 0, 0), "completion")
    with pytest.raises(RowFault, match="all answers have weight 0"):
        trained(tokenizer, weighted(0, 0, 0, 0))


def test_weights_where_all_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(tokenizer, weighted(0, 0, 0, 1), "all") == [
        f"{S}user\na{E}\n{S}assistant\n",
        f"\n{S}user\nc{E}\n{S}assistant\n",
        f"d{E}",
        "\n",
    ]
    rendered = render(tokenizer, weighted(0, 3, 0, 1), "all")
    assert [span.weight for span in rendered.spans] == [1, 3, 1, 1, 1]
    assert len(render(tokenizer, weighted(0, 1, 0, 1), "all").spans) == 1
