"""Where the answers of a conversation stand in its rendering, told from renderings of its beginnings or from marks.

What the template adds with an answer is the answer and its end, so comparing renderings needs no marks and holds for
any template whose renderings begin with one another. `{% generation %}` marks are used where there are some. Either way
a span is believed only if it holds the answer's words and ends with an end token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_train.data.problems import RowFault, TemplateFault
from qlora_train.data.rows import Message

_END_OF_REASONING = "</think>"
_PROBE_CHARS = 32
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first that is there counts, as in templates


class Span(NamedTuple):
    """A half-open range of characters that is trained."""

    start: int
    stop: int
    weight: float = 1.0  # of its tokens in the loss
    closed: bool = True  # whether it has to end with an end token


# What is known of a beginning: its length where the whole begins with it, else its text, or why it fails.
Beginning = int | str | TemplateFault


class Rendering(NamedTuple):
    """A conversation's text, and how its beginnings render."""

    whole: str
    marks: Sequence[tuple[int, int]] | None  # of answers, as the template wrote them; None: it is one that writes none
    prompts: Mapping[int, Beginning]  # turn -> messages[:turn] with the generation prompt
    answered: Mapping[int, Beginning]  # turn -> messages[:turn + 1]


class _Words(NamedTuple):
    """What a message's text has to hold."""

    content: str
    names: tuple[str, ...]  # of called functions, after the content
    reasoning: str
    visible: str  # the content without the reasoning in it


class _MissingError(Exception):
    """A text does not hold an answer's words; the message names the field."""


class AnswerFinder:
    """Finds answers in renderings. `special` matches the tokenizer's special tokens."""

    def __init__(self, special: re.Pattern[str]) -> None:
        self._special = special

    def find(self, messages: Sequence[Message], turns: Sequence[int], rendering: Rendering) -> list[Span | None]:
        """The span of each turn; None for an earlier answer whose reasoning the template drops.

        RowFault where a span cannot be told.
        """
        marks = None if rendering.marks is None else _marks_by_turn(messages, turns, rendering.marks, rendering.prompts)
        spans: list[Span | None] = []
        for turn in turns:
            try:
                if marks is not None:
                    spans.append(self._marked(messages[turn], turn, rendering, marks[turn]))
                elif turn == len(messages) - 1:
                    spans.append(self._last(messages[turn], turn, rendering))
                else:
                    spans.append(self._earlier(messages, turn, rendering))
            except _MissingError as missing:
                if turn == len(messages) - 1 or str(missing) != "reasoning":
                    raise _not_shown(turn, str(missing)) from None
                spans.append(None)
        return spans

    def _last(self, message: Message, turn: int, rendering: Rendering) -> Span:
        start = _after_prompt(rendering.whole, turn, rendering)
        return Span(start, start + self._end_of_answer(rendering.whole[start:], message))

    def _earlier(self, messages: Sequence[Message], turn: int, rendering: Rendering) -> Span | None:
        """An answer that later turns follow: as it stood when it was the last, or without a beginning of that."""
        whole, answered = rendering.whole, rendering.answered[turn]
        if isinstance(answered, TemplateFault):
            raise answered
        alone = whole[:answered] if isinstance(answered, int) else answered
        start = _after_prompt(alone, turn, rendering)
        answer = alone[start:]
        # Some templates close a conversation with a token of its own: only what stands up to the answer's end counts.
        answer = answer[: self._end_of_answer(answer, messages[turn])]
        if isinstance(rendering.prompts[turn], int) and (stop := _end_of_overlap(answer, whole, start)) > start:
            self._end_of_answer(whole[start:stop], messages[turn])
            return Span(start, stop)
        if any(_words(entry).reasoning for entry in messages[: turn + 1] if entry["role"] == "assistant"):
            return None
        raise RowFault(
            f"the chat template rewrites messages[{turn}] when later turns follow",
            "train the last answer only (data.loss_on: completion), or give a template that leaves earlier turns alone",
        )

    def _marked(self, message: Message, turn: int, rendering: Rendering, mark: tuple[int, int]) -> Span:
        """The marked text from the end of the generation prompt, where it holds that, to the end of the end token."""
        whole, prompt = rendering.whole, rendering.prompts.get(turn)
        start, stop = mark
        if isinstance(prompt, int) and start < prompt < stop:
            start = prompt
        text = whole[start:stop].rstrip()
        if not any(found.end() == len(text) for found in self._special.finditer(text)):
            after = len(whole) - len(whole[stop:].lstrip())
            stop = end.end() if (end := self._special.match(whole, after)) else stop
        return Span(start, start + self._end_of_answer(whole[start:stop], message))

    def _end_of_answer(self, text: str, message: Message) -> int:
        """The end of an answer's end token in a text that begins where the answer does.

        _MissingError where the text does not hold the answer's words, RowFault where no end token follows them.
        """
        content = message.get("content") or ""
        if content and len(message) == 2 and text.startswith(content):  # nearly all answers
            end = self._special.match(text, len(content))
            if end and text.find(content.strip(), end.end()) < 0:
                return end.end()
        words = _words(message)
        specials = [found.span() for found in self._special.finditer(text)]
        places = list(_places(text, words.content, specials))
        if not places and words.reasoning and words.visible != words.content:
            places = list(_places(text, words.visible, specials))
        if not places:
            raise _MissingError("content")
        if words.reasoning and words.reasoning not in text:
            raise _MissingError("reasoning")
        for place in places:
            stop = _after_names(text, words.names, place)
            after = [end for start, end in specials if start >= stop]
            if after:
                return after[-1] if words.names else after[0]  # a call may have special tokens in it
        raise RowFault(
            "the chat template puts no end token after an answer, so the model would not learn to stop",
            "give a template that ends each turn with one of the tokenizer's special tokens",
        )


def _marks_by_turn(
    messages: Sequence[Message],
    turns: Sequence[int],
    marks: Sequence[tuple[int, int]],
    prompts: Mapping[int, Beginning],
) -> dict[int, tuple[int, int]]:
    """Each turn's mark: they come one an answer, or else several, which the generation prompts tell apart."""
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marks) == len(answers):
        return dict(zip(answers, marks, strict=True))
    found: dict[int, tuple[int, int]] = {}
    for turn in turns:
        first = prompts[turn]
        following = min((other for other in prompts if other > turn), default=None)
        stop = None if following is None else prompts[following]
        if isinstance(first, int) and (stop is None or isinstance(stop, int)):
            own = [mark for mark in marks if mark[1] > first and (stop is None or mark[0] < stop)]
            if own:
                found[turn] = own[0][0], own[-1][1]
                continue
        raise RowFault(
            f"the chat template marks {len(marks)} pieces of text as generated, the conversation has {len(answers)} "
            f"answers, and which are those of messages[{turn}] cannot be told",
            "put {% generation %} around the whole of each answer in the template, or around none",
        )
    return found


def _after_prompt(text: str, turn: int, rendering: Rendering) -> int:
    """Where the answer begins in a text that ends with it: after the generation prompt."""
    prompt = rendering.prompts[turn]
    if isinstance(prompt, TemplateFault):
        raise prompt
    if isinstance(prompt, int) and text is rendering.whole:
        return prompt
    beginning = rendering.whole[:prompt] if isinstance(prompt, int) else prompt
    if text.startswith(beginning):
        return len(beginning)
    raise RowFault(
        f"the chat template renders messages[{turn}] as something that does not begin with its own generation prompt",
        "give a template that does",
    )


def _end_of_overlap(answer: str, whole: str, start: int) -> int:
    """The end in `whole` of the longest end of `answer` that stands at `start`.

    Thinking templates drop reasoning, which stands in front, from earlier answers.
    """
    probe = whole[start : start + _PROBE_CHARS]  # few places of an answer have to be looked at
    cut = answer.find(probe)
    while cut >= 0:
        if whole.startswith(answer[cut:], start):
            return start + len(answer) - cut
        cut = answer.find(probe, cut + 1)
    for cut in range(max(len(answer) - _PROBE_CHARS, 0), len(answer)):
        if whole.startswith(answer[cut:], start):
            return start + len(answer) - cut
    return start


def _words(message: Message) -> _Words:
    content = (message.get("content") or "").strip()
    reasoning = next((str(message[name]) for name in _REASONING_FIELDS if message.get(name)), "").strip()
    visible = content
    if not reasoning and _END_OF_REASONING in content:
        before, _, after = content.rpartition(_END_OF_REASONING)
        reasoning, visible = before.removeprefix("<think>").strip(), after.strip()
    calls: Any = message.get("tool_calls") or ()
    return _Words(content, tuple(call["function"]["name"] for call in calls), reasoning, visible)


def _places(text: str, piece: str, specials: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The ends of a piece's occurrences, from the last to the first.

    Content as short as "i" may also stand in a header or inside a special token's own text: no place is in one.
    """
    at = text.rfind(piece) if piece else -1
    if not piece:
        yield 0
    while at >= 0:
        stop = at + len(piece)
        if not any(start <= at and stop <= end for start, end in specials):
            yield stop
        at = text.rfind(piece, 0, stop - 1)


def _after_names(text: str, names: Sequence[str], at: int) -> int:
    for index, name in enumerate(names):
        found = text.find(name, at)
        if found < 0:
            raise _MissingError(f"tool_calls[{index}]")
        at = found + len(name)
    return at


def _not_shown(turn: int, field: str) -> RowFault:
    if field == "reasoning":
        what = f"the chat template does not show the reasoning of messages[{turn}]"
        return RowFault(what, "give a template that does, or take the reasoning out of the row")
    what = f"the chat template does not show messages[{turn}].{field} as it was written"
    return RowFault(what, "mend the row, or give a template that shows it")
