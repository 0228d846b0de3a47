"""Serving parity: plain transformers, and an export's own tokenizer, give prompts the token ids that training gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from qlora_train.data.encode import Encoder
from qlora_train.data.problems import RowFault
from qlora_train.data.rows import Message, MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.sandbox import FROZEN_DATE
from qlora_train.data.specials import special_tokens
from qlora_train.data.template import Renderer
from qlora_train.errors import ModelError

GOLDEN_FILE = "golden_prompts.json"
MAX_ROWS = 8
NOTE = (
    "Prompts with the token ids that training gives them. A server that renders `messages` and `tools` with the "
    "tokenizer's chat template, with its generation prompt where `generation_prompt` is true, must come to `text` and "
    "`ids`. Where `special_text` is true, special-token text in the messages has to be encoded as text (transformers: "
    f"sanitize_control_tokens=True). {FROZEN_DATE} stands for today in templates that print the date. Prompts without "
    "messages are encoded as they are."
)
Golden = dict[str, Any]


def golden_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Golden]:
    """Prompts as training sees them: those of the first rows and the rows whole, and some that are easily got wrong.

    Left out is what the chat template refuses, as a system prompt in some, and a conversation with special-token text
    in which an answer writes tokens such as <think>: no switch of transformers tells the two apart. ModelError where
    nothing is left though there is a chat template.
    """
    encoder = Encoder(tokenizer)
    golden: list[Golden] = []
    with Renderer(tokenizer, "all") as renderer:
        for row in [*rows[:MAX_ROWS], *(_built_in(tokenizer) if tokenizer.chat_template else ())]:
            for prompt in _prompts_of(row):
                try:
                    golden += _golden(prompt, renderer, encoder, tokenizer)
                except RowFault:
                    continue
    if tokenizer.chat_template and not golden:
        raise ModelError(
            f"no prompt could be compared with training: the chat template of {tokenizer.name_or_path!r} refuses all",
            fix="give a chat template that renders a question of a user and its answer",
        )
    return golden


def write_golden(folder: Path, golden: Sequence[Golden]) -> None:
    """Store the prompts with the model, so that any server can be held against them."""
    content = {"note": NOTE, "prompts": list(golden)}
    (folder / GOLDEN_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_parity(folder: Path, golden: Sequence[Golden]) -> None:
    """ModelError, with the first token that differs, unless the tokenizer in `folder` gives every prompt its ids."""
    if what := parity_fault(golden, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)):
        raise ModelError(
            f"the exported tokenizer reads {what}",
            fix="export with the tokenizer and the chat template of the run",
            where=str(folder),
        )


def parity_fault(golden: Sequence[Golden], tokenizer: Any) -> str:
    """The first prompt that plain transformers reads otherwise than training did, and how; empty if none is."""
    for number, prompt in enumerate(golden):
        served, trained = _served(prompt, tokenizer), prompt["ids"]
        if served != trained:
            return (
                f"prompt {number} of {GOLDEN_FILE} otherwise than training did: "
                f"{_difference(trained, served, tokenizer)}; the prompt is {prompt['text'][:200]!r}"
            )
    return ""


@contextmanager
def frozen_clock() -> Iterator[None]:
    """Let chat templates that transformers renders see the date that those of training see.

    transformers 5.23 makes plain data of what it is given for a template, so `strftime_now` cannot be passed.
    """
    real = chat_template_utils.datetime
    chat_template_utils.datetime = _Frozen
    try:
        yield
    finally:
        chat_template_utils.datetime = real


class _Frozen(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        """Midnight of the frozen date."""
        return cls(FROZEN_DATE.year, FROZEN_DATE.month, FROZEN_DATE.day, tzinfo=tz)


def _prompts_of(row: Row) -> list[tuple[MessagesRow | str, bool]]:
    """What is compared of a row: a text, or a conversation and whether it waits for its answer."""
    if isinstance(row, TextRow):
        return [(row.text, False)]
    if isinstance(row, PromptCompletionRow):
        return [(row.prompt, False), (row.prompt + row.completion, False)]
    if row.messages[-1]["role"] != "assistant":
        return [(row, True)]
    return [(replace(row, messages=row.messages[:-1]), True), (row, False)]


def _golden(
    prompt: tuple[MessagesRow | str, bool], renderer: Renderer, encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> list[Golden]:
    """A prompt as it is stored; nothing if it cannot be compared."""
    given, is_prompt = prompt
    if isinstance(given, str):
        rendered = renderer.verbatim_prompt(given)
        special: Golden = {"add_special_tokens": rendered.add_special_tokens}
    else:
        rendered = renderer.prompt(given.messages, given.tools) if is_prompt else renderer.render_one(given)
        if rendered.plain and _writes_added_tokens(given, tokenizer):
            return []
        special = {
            "messages": [dict(message) for message in given.messages],
            "tools": [dict(tool) for tool in given.tools],
            "generation_prompt": is_prompt,
            "special_text": bool(rendered.plain),
        }
    return [{**special, "text": rendered.text, "ids": encoder.ids(rendered)}]


def _writes_added_tokens(row: MessagesRow, tokenizer: Any) -> bool:
    """Whether an answer holds the text of a token that is added but not special."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    answers = [json.dumps(message, ensure_ascii=False) for message in row.messages if message["role"] == "assistant"]
    return any(text in answer for text in added for answer in answers)


def _served(prompt: Golden, tokenizer: Any) -> list[int]:
    """The ids that plain transformers gives a prompt."""
    if "messages" not in prompt:
        ids: list[int] = tokenizer(prompt["text"], add_special_tokens=prompt["add_special_tokens"])["input_ids"]
        # Some tokenizers end every text, which is not asked for in front of an answer.
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and ids[:-1] == prompt["ids"] else ids
    with frozen_clock():
        encoded = tokenizer.apply_chat_template(
            prompt["messages"],
            tools=prompt["tools"] or None,
            add_generation_prompt=prompt["generation_prompt"],
            sanitize_control_tokens=prompt["special_text"],
        )
    return list(encoded["input_ids"])


def _difference(trained: Sequence[int], served: Sequence[int], tokenizer: Any) -> str:
    pairs = zip(trained, served, strict=False)
    at = next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(trained), len(served)))
    left, right = (
        repr(tokenizer.decode(ids[at : at + 1])) if at < len(ids) else "the end" for ids in (trained, served)
    )
    return f"token {at} is {right}, in training it was {left}"


def _built_in(tokenizer: PreTrainedTokenizerBase) -> list[MessagesRow]:
    """Conversations that servers are known to read otherwise than trainers."""
    ask = {"role": "user", "content": "What is the capital of France?"}
    system = {"role": "system", "content": "Answer in one word."}
    answer = {"role": "assistant", "content": "Paris."}
    special = " ".join(sorted(special_tokens(tokenizer)))
    edges = (
        "  spaces, \ttabs,\r\n\n\nbreaks; é, e\u0301, \u00a0, 日本語, \U0001f468\u200d\U0001f469\u200d\U0001f467  \n"
    )
    conversations: list[list[Message]] = [
        [ask],
        [system, ask],
        [
            system,
            ask,
            answer,
            {"role": "user", "content": "And of Spain?"},
            {"role": "assistant", "content": "Madrid."},
        ],
        [{"role": "user", "content": f"What do {special} mean?{special}"}],
        [{"role": "user", "content": edges}],
    ]
    return [MessagesRow("built in", tuple(messages)) for messages in conversations]
