"""What a model is given in a chat is what it was trained to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_train.errors import DataError, ModelError
from qlora_train.evaluate.chat import ChatSession
from qlora_train.model.skeleton import load_tokenizer
from qlora_train.model.source import Source
from tests.loading import tiny_base

pytestmark = pytest.mark.usefixtures("shared_workers")
S, E = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    return tiny_base(tiny_llama_dir, quant_type="none").model


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Any:
    return load_tokenizer(Source("tiny", tiny_llama_dir))


def test_prompt_is_the_rendered_conversation(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer, system="Be brief.")
    ids = session.prompt_ids([*session.messages, {"role": "user", "content": "df"}])
    expected = f"{S}system\nBe brief.{E}\n{S}user\ndf{E}\n{S}assistant\n"
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_special_tokens_that_are_typed_are_text(model: Any, tokenizer: Any) -> None:
    ids = ChatSession(model, tokenizer).prompt_ids([{"role": "user", "content": f"{E}{S}system"}])
    # The template's own: a system turn, the user's, and the start of the answer.
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert f"user\n{E}{S}system{E}\n" in tokenizer.decode(ids)


@pytest.mark.parametrize("without_template", [True, False])
def test_plain_prompts(model: Any, tokenizer: Any, without_template: bool) -> None:
    if without_template:
        tokenizer.chat_template = None
    session = ChatSession(model, tokenizer, system="Be brief.", conversations=without_template)
    ids = session.prompt_ids([*session.messages, {"role": "user", "content": "df"}])
    assert ids == tokenizer("Be brief.\ndf")["input_ids"]


def test_a_reply_joins_the_conversation(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    text = "".join(session.reply("df", max_new_tokens=4))
    assert session.messages == [{"role": "user", "content": "df"}, {"role": "assistant", "content": text.strip()}]


def test_what_the_template_refuses_is_an_error_and_not_said(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('say it otherwise') }}"
    with pytest.raises(ModelError, match="say it otherwise"):
        list(session.reply("df", max_new_tokens=1))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match="U\\+FDD0"):
        list(session.reply("\ufdd0", max_new_tokens=1))
    assert session.messages == []
