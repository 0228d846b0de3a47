"""A row as the text that the model reads, with the character spans that are trained.

The spans of a conversation come from comparing renderings (what the template adds with an answer is the answer and its
end), so they need no marks in the template and hold for any template that does not rewrite earlier turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from qlora_train.data.conversation import Message
from qlora_train.data.formats import MessagesRow, PromptCompletionRow, Row
from qlora_train.data.problems import Rejection
from qlora_train.errors import ModelError

_TEMPLATE_FIX = "give a template that fits: `chat_template: FILE.jinja` in the recipe's model section"
FROZEN_DATE = date(2024, 7, 26)  # the date that Llama 3.1's own template falls back to
_COMPILED = ("<template>", "<unknown>")  # file names that Jinja gives to the frames of a template


@dataclass(frozen=True)
class Rendered:
    """A row's text. `spans` are half-open character ranges, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]
    add_special_tokens: bool  # whether the tokenizer is to add its own (BOS); a chat template has written them


class Unrenderable(Rejection):
    """This row cannot be rendered so that its answers are known to the character."""


class Renderer:
    """Renders rows for one tokenizer and one choice of `data.loss_on`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> None:
        self._tokenizer, self._loss_on = tokenizer, loss_on
        # Longest first: where one token's text begins another's, the tokenizer takes the longer.
        literals = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, literals)) or r"(?!)")

    def render(self, row: Row) -> Rendered:
        """The row's text and spans; Unrenderable if only this row is at fault, ModelError if the tokenizer is."""
        if isinstance(row, MessagesRow):
            text = _apply_template(row, row.messages, self._tokenizer, add_generation_prompt=False)
            spans = ((0, len(text)),) if self._loss_on == "all" else self._answer_spans(row, text)
            return Rendered(text, spans, add_special_tokens=False)
        if isinstance(row, PromptCompletionRow):
            start, content = len(row.prompt), row.prompt + row.completion
        else:
            start, content = 0, row.text
        text = _with_end_token(content, self._tokenizer)
        start = 0 if self._loss_on == "all" else start
        return Rendered(text, ((start, len(text)),), add_special_tokens=_takes_bos(text, self._tokenizer))

    def _answer_spans(self, row: MessagesRow, whole: str) -> tuple[tuple[int, int], ...]:
        """Where the trained answers stand in the rendered conversation, each with its end token."""
        turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        if self._loss_on == "completion":
            turns = turns[-1:]
        return tuple(self._answer_span(row, turn, whole) for turn in turns)

    def _answer_span(self, row: MessagesRow, turn: int, whole: str) -> tuple[int, int]:
        """From the end of the generation prompt to the end of the answer's end token."""
        before, upto = row.messages[:turn], row.messages[: turn + 1]
        prefix = _apply_template(row, before, self._tokenizer, add_generation_prompt=True)
        if len(upto) < len(row.messages):
            answered = _apply_template(row, upto, self._tokenizer, add_generation_prompt=False)
        else:
            answered = whole
        if not answered.startswith(prefix):
            raise Unrenderable(
                f"the chat template renders messages[{turn}] as something that does not begin with its own generation "
                "prompt; give a template that does"
            )
        content = row.messages[turn]["content"].strip()
        end = len(prefix) + self._end_of_answer(answered[len(prefix) :], content, turn)
        # Some templates close a conversation with a token of its own: only what stands up to the answer's end counts.
        if not whole.startswith(answered[:end]):
            raise Unrenderable(
                f"the chat template rewrites messages[{turn}] when later turns follow; train the last answer only "
                "(data.loss_on: completion), or give a template that leaves earlier turns as they are"
            )
        return len(prefix), end

    def _end_of_answer(self, tail: str, content: str, turn: int) -> int:
        """The end of the first special token after the answer's content; what follows it is no part of the answer.

        Content as short as "i" may also stand in a header or inside a special token's own text, so the content is its
        last occurrence that is in no special token and has one after it.
        """
        specials = [found.span() for found in self._special.finditer(tail)]
        found_at_all, at = False, tail.rfind(content)
        while at >= 0:
            stop = at + len(content)
            if not any(start <= at and stop <= end for start, end in specials):
                found_at_all = True
                if (end := next((end for start, end in specials if start >= stop), None)) is not None:
                    return end
            at = tail.rfind(content, 0, stop - 1)
        if found_at_all:
            raise Unrenderable(
                "the chat template puts no end token after an answer, so the model would not learn to stop; "
                "give a template that ends each turn with one of the tokenizer's special tokens"
            )
        raise Unrenderable(f"the chat template does not show messages[{turn}].content as it was written")


def last_question(row: Row) -> str:
    """What a person asked in a row: the turn before the answer, or the prompt."""
    if isinstance(row, MessagesRow):
        return row.messages[-2]["content"] if len(row.messages) > 1 else ""
    return row.prompt if isinstance(row, PromptCompletionRow) else ""


def prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The text to generate from and the reference answer without outer whitespace; None for plain text.

    Whether the tokenizer is to add its special tokens to the prompt says `adds_special_tokens`.
    """
    if isinstance(row, MessagesRow):
        prompt = _apply_template(row, row.messages[:-1], tokenizer, add_generation_prompt=True)
        return prompt, row.messages[-1]["content"].strip()
    if isinstance(row, PromptCompletionRow):
        end = tokenizer.eos_token
        completion = row.completion.removesuffix(end) if isinstance(end, str) else row.completion
        return row.prompt, completion.strip()
    return None


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation that waits for its answer, rendered as training renders it."""
    row = MessagesRow("the conversation", tuple(messages))
    return _apply_template(row, messages, tokenizer, add_generation_prompt=True)


def adds_special_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a prompt of this row is encoded with `add_special_tokens=True`, as its training text was."""
    if isinstance(row, MessagesRow):
        return False
    return _takes_bos(row.prompt if isinstance(row, PromptCompletionRow) else row.text, tokenizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text to id of every token that is special to the tokenizer, by name (eos, pad, ...) or by its file."""
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    named = {token: token_id for token, token_id in ids if token_id is not None}
    marked = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**named, **marked}


def _takes_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token
    return not (isinstance(bos, str) and bos and text.startswith(bos))


def _with_end_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text, ended once: without its end token a model does not learn to stop."""
    end = tokenizer.eos_token
    if not isinstance(end, str) or not end:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} names no end token (eos_token)",
            fix="set eos_token in its tokenizer_config.json",
        )
    return text if text.endswith(end) else text + end


def _frozen_date(date_format: str) -> str:
    """The date that a template is told, in place of the clock: the same rows must give the same tokens tomorrow."""
    return FROZEN_DATE.strftime(date_format)


def _apply_template(
    row: MessagesRow, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> str:
    """The messages as text, or ModelError with the template's line and the row."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which rows of messages need",
            fix=_TEMPLATE_FIX,
            where=row.where,
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            strftime_now=_frozen_date,
        )
    except Exception as error:  # a template is a program: whatever it raises is its own fault or the row's
        _raise_template_error(error, row, tokenizer)
    assert isinstance(text, str)
    return text


def _raise_template_error(error: Exception, row: MessagesRow, tokenizer: PreTrainedTokenizerBase) -> NoReturn:
    """ModelError with the line of the template in which `error` arose, where Jinja tells it."""
    line = getattr(error, "lineno", None)  # of a syntax error
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename in _COMPILED:
            line = frame.tb_lineno
        frame = frame.tb_next
    at = f" at line {line}" if line else ""
    what = f"the chat template of {tokenizer.name_or_path!r} fails{at}: {type(error).__name__}: {error}"
    raise ModelError(what, fix=f"mend the row, or {_TEMPLATE_FIX}", where=row.where) from error
