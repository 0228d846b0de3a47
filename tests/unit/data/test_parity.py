"""The tokenizer of an export is held against training, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_train.data.parity import GOLDEN_FILE, check_parity, frozen_clock, golden_prompts, write_golden
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.errors import ModelError
from tests.tiny import build_tiny_tokenizer

pytestmark = pytest.mark.usefixtures("shared_workers")
S, E = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{S}system\nYou are a helpful assistant.{E}\n"
CHAT = MessagesRow("a:1", ({"role": "user", "content": "df"}, {"role": "assistant", "content": "ls"}))
ROWS: list[Row] = [CHAT, PromptCompletionRow("a:2", "The quick", " fox"), TextRow("a:3", "lazy dog")]


@pytest.fixture
def tokenizer() -> Any:
    return build_tiny_tokenizer()


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Callable[[], Path]:
    def _saved() -> Path:
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return _saved


def test_golden_prompts_of_rows(tokenizer: Any) -> None:
    golden = golden_prompts(ROWS, tokenizer)
    assert [prompt["text"] for prompt in golden[:5]] == [
        f"{SYSTEM}{S}user\ndf{E}\n{S}assistant\n",
        f"{SYSTEM}{S}user\ndf{E}\n{S}assistant\nls{E}\n",
        "The quick",
        "The quick fox",
        "lazy dog",
    ]
    assert golden[0]["messages"] == [{"role": "user", "content": "df"}]
    assert [golden[0]["generation_prompt"], golden[1]["generation_prompt"]] == [True, False]
    assert golden[4]["ids"] == tokenizer("lazy dog")["input_ids"]


def test_built_in_prompts(tokenizer: Any) -> None:
    golden = golden_prompts([], tokenizer)
    assert [len(prompt["messages"]) for prompt in golden] == [1, 2, 4, 5, 1, 1]
    special = [prompt for prompt in golden if prompt["special_text"]]
    assert len(special) == 1
    ids = special[0]["ids"]
    # Two each of the template's own <|im_start|> and <|im_end|> for system and user, and the start of the answer.
    assert (ids.count(1), ids.count(2), ids.count(0)) == (3, 2, 0)
    tokenizer.chat_template = None
    assert golden_prompts([], tokenizer) == []


def test_what_the_template_refuses_is_left_out(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + (
        tokenizer.chat_template
    )
    assert [len(prompt["messages"]) for prompt in golden_prompts([], tokenizer)] == [1, 1, 1]


def test_nothing_to_compare_is_no_parity(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ModelError, match="no prompt could be compared with training"):
        golden_prompts([CHAT], tokenizer)
    assert [prompt["text"] for prompt in golden_prompts(ROWS[2:], tokenizer)] == ["lazy dog"]


def test_a_faithful_export_passes(tokenizer: Any, saved: Callable[[], Path]) -> None:
    check_parity(saved(), golden_prompts(ROWS, tokenizer))


def test_answers_that_write_special_tokens(tokenizer: Any, saved: Callable[[], Path]) -> None:
    answer = {"role": "assistant", "content": f"It is {E}."}
    alone = MessagesRow("a:1", (CHAT.messages[0], answer))
    both = MessagesRow("a:1", ({"role": "user", "content": f"What is {E}?"}, answer))
    for row in (alone, both):
        golden = golden_prompts([row], tokenizer)
        assert len(golden) == 2 + 6
        check_parity(saved(), golden)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("system\nYou", "system You", r"token 2 is ' ', in training it was '\n'"),
        ("You are a helpful", "You were a helpful", "prompt 0 of golden_prompts.json"),
        ("{{ '<|im_start|>assistant\n' }}", "", r"is the end, in training it was '<|im_start|>'"),
    ],
)
def test_a_changed_template_is_found(tokenizer: Any, saved: Callable[[], Path], old: str, new: str, says: str) -> None:
    golden = golden_prompts(ROWS, tokenizer)
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ModelError) as caught:
        check_parity(saved(), golden)
    assert says in caught.value.problems[0].what


def test_a_changed_tokenizer_is_found_by_plain_text(tokenizer: Any, saved: Callable[[], Path]) -> None:
    golden = golden_prompts(ROWS[2:], tokenizer)[:1]
    tokenizer.add_tokens(["lazy"])
    with pytest.raises(ModelError, match="token 0 is 'lazy', in training it was 'l'"):
        check_parity(saved(), golden)


def test_dates_are_frozen_on_both_sides(tokenizer: Any, saved: Callable[[], Path]) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    golden = golden_prompts([CHAT], tokenizer)
    assert golden[0]["text"].startswith("26 Jul 2024")
    folder = saved()
    check_parity(folder, golden)
    served = AutoTokenizer.from_pretrained(str(folder))
    with frozen_clock():
        frozen = served.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert frozen.startswith("26 Jul 2024")
    assert not served.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("26 Jul 2024")


def test_golden_file(tokenizer: Any, saved: Callable[[], Path]) -> None:
    folder, golden = saved(), golden_prompts(ROWS, tokenizer)
    write_golden(folder, golden)
    stored = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
    assert stored["prompts"] == golden and "2024-07-26" in stored["note"]
    check_parity(folder, stored["prompts"])
