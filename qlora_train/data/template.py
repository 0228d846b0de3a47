"""A row as the text that the model reads, with the character spans that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from transformers import PreTrainedTokenizerBase

from qlora_train.data.problems import RowFault, TemplateFault
from qlora_train.data.rows import Message, MessagesRow, PromptCompletionRow, Row, TextRow, Tool
from qlora_train.data.sandbox import TEMPLATE_FIX, Sandbox, Ticket, describe_fault
from qlora_train.data.spans import AnswerFinder, Beginning, Rendering, Span
from qlora_train.data.specials import SpecialText, any_of, special_tokens, to_json, without_marks
from qlora_train.errors import ModelError, SecurityError


class Rendered(NamedTuple):
    """A row's text. All ranges are half-open, in characters, in order."""

    text: str
    spans: tuple[Span, ...]
    add_special_tokens: bool  # whether the tokenizer is to add its own (BOS); a chat template has written them
    plain: tuple[tuple[int, int], ...] = ()  # special-token text that is to be encoded as text
    num_control_specials: int = 0  # special-token text in a verbatim row, which stays special
    num_context_turns: int = 0  # earlier answers whose reasoning the template drops: they are not trained

    @property
    def num_plain_specials(self) -> int:
        """Pieces of special-token text that are encoded as text."""
        return len(self.plain)


class _Asked(NamedTuple):
    """A conversation that the worker is asked for."""

    row: MessagesRow
    request: str
    cuts: tuple[tuple[int, bool], ...]  # the renderings: of how many messages, and whether a generation prompt follows
    turns: tuple[tuple[int, float], ...]  # answers to find in the first, with their weights
    everything: bool  # whether the text between them is trained too
    marked: bool  # whether it may hold special-token text


class _Batch(NamedTuple):
    entries: list[Rendered | RowFault | _Asked]
    ticket: Ticket | None


class _Templates:
    """A tokenizer's templates in their worker."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {name!r} has no chat template, which rows of messages need",
                fix=TEMPLATE_FIX,
                where=where,
            )
        try:  # a tokenizer may have a template of its own for conversations with tools
            plain, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
        except ValueError as error:
            raise ModelError(f"the tokenizer of {name!r}: {error}", fix=TEMPLATE_FIX, where=where) from None
        sources = [plain] if plain == with_tools else [plain, with_tools]
        variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        self.sandbox = Sandbox(sources, variables, name, where)
        self._facts = self.sandbox.facts
        self.special_text = SpecialText(tokenizer, "\0".join(facts.literals for facts in self._facts))

    def index(self, row: MessagesRow) -> int:
        """Which template the row is rendered with."""
        return len(self._facts) - 1 if row.tools else 0

    def marks_answers(self, row: MessagesRow) -> bool:
        """Whether that template has {% generation %} marks."""
        return self._facts[self.index(row)].marks


class Renderer:
    """Renders rows for one tokenizer and one choice of `data.loss_on`. Chat templates run in a process of their own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> None:
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._special = any_of(special_tokens(tokenizer))
        self._finder = AnswerFinder(self._special)
        self._templates: _Templates | None = None  # started with the first conversation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process of the templates, if one was needed."""
        templates, self._templates = self._templates, None
        if templates is not None:
            templates.sandbox.close()

    def render(self, batches: Iterable[Sequence[Row]]) -> Iterator[list[Rendered | RowFault]]:
        """Each batch's rows, in order; the next batch is being rendered while the caller works on one.

        ModelError where the template or the tokenizer cannot be used at all, SecurityError where a template goes over
        a limit of time, memory or length.
        """
        ahead: _Batch | None = None
        for rows in batches:
            done = None if ahead is None else self._collect(ahead)
            ahead = self._submit(rows, self._loss_on)
            if done is not None:
                yield done
        if ahead is not None:
            yield self._collect(ahead)

    def render_one(self, row: Row) -> Rendered:
        """One row; RowFault if it cannot be trained on."""
        return self._one(self._submit([row], self._loss_on))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Rendered:
        """A conversation that waits for its answer."""
        row = MessagesRow("the conversation", tuple(messages), tuple(tools))
        return self._one(self._send([self._asked(row, ((len(messages), True),))]))

    def question(self, row: Row) -> tuple[Rendered, str] | None:
        """The prompt of a row and the answer to it, as a model would write it; None for plain text.

        The answer is without special tokens and outer whitespace, as generated text is shown.
        """
        if isinstance(row, TextRow):
            return None
        rendered = self._one(self._submit([row], "completion"))
        answer = "".join(rendered.text[span.start : span.stop] for span in rendered.spans)
        reference = self._special.sub("", answer).strip()
        if isinstance(row, MessagesRow):
            return self.prompt(row.messages[:-1], row.tools), reference
        return self.verbatim_prompt(row.prompt), reference

    def verbatim_prompt(self, text: str) -> Rendered:
        """A prompt that is no conversation, as rows of prompt and completion are read."""
        return Rendered(text, (), add_special_tokens=self._takes_bos(text))

    def _one(self, batch: _Batch) -> Rendered:
        (rendered,) = self._collect(batch)
        if isinstance(rendered, RowFault):
            raise rendered
        return rendered

    def _submit(self, rows: Sequence[Row], loss_on: str) -> _Batch:
        """Render what needs no template, and ask the worker for the rest."""
        entries: list[Rendered | RowFault | _Asked] = []
        for row in rows:
            try:
                if isinstance(row, MessagesRow):
                    entries.append(self._conversation(row, loss_on))
                else:
                    entries.append(self._verbatim(row, loss_on))
            except RowFault as fault:
                entries.append(fault)
        return self._send(entries)

    def _send(self, entries: list[Rendered | RowFault | _Asked]) -> _Batch:
        asked = [entry for entry in entries if isinstance(entry, _Asked)]
        if not asked:
            return _Batch(entries, None)
        assert self._templates is not None
        requests, places = [entry.request for entry in asked], [entry.row.where for entry in asked]
        return _Batch(entries, self._templates.sandbox.submit(requests, places))

    def _collect(self, batch: _Batch) -> list[Rendered | RowFault]:
        replies: Iterator[Any] = iter(())
        if batch.ticket is not None:
            assert self._templates is not None
            try:
                replies = iter(self._templates.sandbox.collect(batch.ticket))
            except SecurityError:
                self.close()
                raise
        results: list[Rendered | RowFault] = []
        for entry in batch.entries:
            try:
                results.append(self._rendered(entry, next(replies)) if isinstance(entry, _Asked) else entry)
            except RowFault as fault:
                results.append(fault)
        return results

    def _verbatim(self, row: PromptCompletionRow | TextRow, loss_on: str) -> Rendered:
        """A row that is no conversation: its own text, ended once."""
        end = self._tokenizer.eos_token
        if not isinstance(end, str) or not end:
            raise ModelError(
                f"the tokenizer of {self._tokenizer.name_or_path!r} names no end token (eos_token)",
                fix="set eos_token in its tokenizer_config.json",
            )
        prompt = row.prompt if isinstance(row, PromptCompletionRow) else ""
        text = prompt + row.completion if isinstance(row, PromptCompletionRow) else row.text
        words = text.removesuffix(end)
        takes_bos = self._takes_bos(words)
        # Without the end token, and without the BOS in front: these are where they belong.
        num_specials = len(self._special.findall(words, 0 if takes_bos else len(self._tokenizer.bos_token)))
        spans = (Span(0 if loss_on == "all" else len(prompt), len(words) + len(end)),)
        return Rendered(words + end, spans, takes_bos, num_control_specials=num_specials)

    def _takes_bos(self, text: str) -> bool:
        bos = self._tokenizer.bos_token
        return not (isinstance(bos, str) and bos and text.startswith(bos))

    def _conversation(self, row: MessagesRow, loss_on: str) -> _Asked:
        """What the worker is asked for: the whole, and for each trained answer what it takes to find it there."""
        answers = [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]
        if loss_on == "completion":
            answers = answers[-1:]
        turns = tuple((turn, row.weights[turn] if row.weights else 1.0) for turn in answers)
        if loss_on == "all":
            turns = () if all(weight == 1 for _, weight in turns) else turns
        else:
            turns = tuple(entry for entry in turns if entry[1] > 0)
            if not turns:
                what = "the last answer has" if loss_on == "completion" else "all answers have"
                raise RowFault(f"{what} weight 0: there is nothing to train", "give one a weight, or leave the row out")
        last = len(row.messages) - 1
        cuts = [(last + 1, False)]
        if self._started(row.where).marks_answers(row):
            cuts += [(turn, True) for turn in (answers if turns else ())]  # of all: some answers have several marks
        else:
            for turn, _ in turns:
                cuts += [(turn, True)] if turn == last else [(turn, True), (turn + 1, False)]
        return self._asked(row, tuple(cuts), turns, everything=loss_on == "all")

    def _asked(
        self,
        row: MessagesRow,
        cuts: tuple[tuple[int, bool], ...],
        turns: tuple[tuple[int, float], ...] = (),
        everything: bool = False,
    ) -> _Asked:
        templates = self._started(row.where)
        content = _content(row)
        marked = templates.special_text.stands_in(content)
        if marked:
            content = _content(templates.special_text.mark(row))
        request = f"[{templates.index(row)},{content},{to_json(cuts)}]"
        return _Asked(row, request, cuts, turns, everything, marked)

    def _started(self, where: str) -> _Templates:
        if self._templates is None:
            self._templates = _Templates(self._tokenizer, where)
        return self._templates

    def _rendered(self, asked: _Asked, reply: Sequence[Any]) -> Rendered:
        """A row's text and spans from what the worker answered."""
        if reply[0] == "fault":
            raise self._fault(reply)
        _, whole, marks, others = reply
        if not whole.strip():
            raise TemplateFault("the chat template renders nothing for this row", f"mend the row, or {TEMPLATE_FIX}")
        assert self._templates is not None
        beginnings: list[Beginning] = [self._fault(other) if isinstance(other, list) else other for other in others]
        plain: tuple[tuple[int, int], ...] = ()
        if asked.marked:
            marks = [(without_marks(whole, start), without_marks(whole, stop)) for start, stop in marks]
            beginnings = [self._unmarked(beginning, whole) for beginning in beginnings]
            whole, plain = self._templates.special_text.unmark(whole)
        spans: list[Span] = [Span(0, len(whole))] if asked.everything else []
        num_context = 0
        if asked.turns:
            by_cut = list(zip(asked.cuts[1:], beginnings, strict=True))
            rendering = Rendering(
                whole,
                marks if self._templates.marks_answers(asked.row) else None,
                prompts={stop: text for (stop, is_prompt), text in by_cut if is_prompt},
                answered={stop - 1: text for (stop, is_prompt), text in by_cut if not is_prompt},
            )
            found = self._finder.find(asked.row.messages, [turn for turn, _ in asked.turns], rendering)
            weighted = [(span, weight) for span, (_, weight) in zip(found, asked.turns, strict=True) if span]
            num_context = len(found) - len(weighted)
            spans = [span if weight == 1 else span._replace(weight=weight) for span, weight in weighted]
            if asked.everything:
                spans = _with_rest(spans, len(whole), num_context)
        return Rendered(whole, tuple(spans), False, plain, num_context_turns=num_context)

    def _unmarked(self, beginning: Beginning, whole: str) -> Beginning:
        assert self._templates is not None
        if isinstance(beginning, int):
            return without_marks(whole, beginning)
        return self._templates.special_text.unmark(beginning)[0] if isinstance(beginning, str) else beginning

    def _fault(self, reply: Sequence[Any]) -> TemplateFault:
        what = describe_fault(self._tokenizer.name_or_path, reply[1], reply[2])
        return TemplateFault(what, f"mend the row, or {TEMPLATE_FIX}")


def last_question(row: Row) -> str:
    """What a person asked in a row: the turn before the answer, or the prompt."""
    if isinstance(row, MessagesRow):
        return str(row.messages[-2].get("content") or "") if len(row.messages) > 1 else ""
    return row.prompt if isinstance(row, PromptCompletionRow) else ""


def _content(row: MessagesRow) -> str:
    """Messages and tools as the worker takes them."""
    return to_json([row.messages, row.tools or None])[1:-1]


def _with_rest(answers: Sequence[Span], length: int, num_context: int) -> list[Span]:
    """The answers that have a weight, and all text between answers."""
    if num_context:
        raise RowFault(
            "the chat template drops reasoning, so that earlier answers cannot be told from the text around them",
            "leave the weights out, or train answers only (data.loss_on: assistant)",
        )
    spans: list[Span] = []
    at = 0
    for answer in answers:
        spans += [Span(at, answer.start, closed=False), answer]
        at = answer.stop
    spans.append(Span(at, length, closed=False))
    return [span for span in spans if span.weight > 0 and span.start < span.stop]
