"""Rendered text to token ids, and which of them are trained.

The whole text is encoded once, so the ids are those that the model sees at inference; which of them are trained follows
from where they stand in the text, never from what they are. A pad token that is also the end token changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_train.data.problems import RowFault
from qlora_train.data.spans import Span
from qlora_train.data.specials import special_tokens
from qlora_train.data.table import TokenRow
from qlora_train.data.template import Rendered
from qlora_train.errors import ModelError


class _Tokens(NamedTuple):
    """The tokens of one text. Token i stands for `text[starts[i]:stops[i]]`: for nothing if the tokenizer added it."""

    ids: Sequence[int]
    starts: Sequence[int]
    stops: Sequence[int]


class Encoder:
    """A tokenizer that tells for each token exactly which characters it stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} is a slow one, which cannot tell the place of its tokens",
                fix="use one with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self._backend = _with_whole_offsets(tokenizer)
        special = special_tokens(tokenizer)
        self._special_ids = frozenset(special.values())
        self._bos = tokenizer.bos_token_id
        self.longest_piece = max(map(len, tokenizer.get_vocab()))  # no token stands for more characters
        added = tokenizer.added_tokens_decoder.items()
        self._greedy_ids = frozenset(key for key, token in added if token.lstrip or token.rstrip)
        self._added_ids = {**special, **{token.content: key for key, token in added}}
        self._newline = self._backend.encode("\n", add_special_tokens=False).ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what turns a row into ids: vocabulary, normalisation, special tokens, chat template."""
        tokenizer = self.tokenizer
        backend = tokenizer.backend_tokenizer.to_str()
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        split = bool(getattr(tokenizer, "split_special_tokens", False))
        return hashlib.sha256(json.dumps([backend, tokenizer.chat_template, named, split]).encode()).hexdigest()

    def encode(self, rendered: Sequence[Rendered]) -> list[TokenRow | RowFault]:
        """The tokens of each row, or why it cannot be trained on, in order."""
        rows: list[TokenRow | RowFault] = []
        for entry, encoding in zip(rendered, self._encodings(rendered), strict=True):
            try:
                tokens = self._tokens(entry, encoding)
                rows.append(self._row(entry, tokens))
            except RowFault as fault:
                rows.append(fault)
        return rows

    def end_token_of(self, tokens: TokenRow) -> int | None:
        """The token that a row is taught to end with: its last special one, or else the end of its last trained text.

        Where all text is trained, some may follow the end token, as the newline of ChatML. Where the last answer is
        not trained, the header in front of it is, which ends nothing: None.
        """
        ids = tokens.ids.tolist()
        last = next((index for index in range(len(ids) - 1, -1, -1) if ids[index] in self._special_ids), -1)
        spans = zip(tokens.span_starts.tolist(), tokens.span_stops.tolist(), strict=True)
        end: int = ids[last if any(start <= last < stop for start, stop in spans) else tokens.span_stops[-1] - 1]
        return end if end in self._special_ids else None

    def ids(self, rendered: Rendered) -> list[int]:
        """The tokens of a prompt. RowFault if special-token text in it cannot be encoded as text."""
        (encoding,) = self._encodings([rendered])
        return list(self._tokens(rendered, encoding).ids)

    def _encodings(self, rendered: Sequence[Rendered]) -> list[Any]:
        """The tokenizer's own result for each text; None where a text has to be encoded in pieces."""
        encodings: list[Any] = [None] * len(rendered)
        for add_special_tokens in (False, True):
            chosen = [
                index
                for index, entry in enumerate(rendered)
                if entry.add_special_tokens == add_special_tokens and not entry.plain
            ]
            texts = [rendered[index].text for index in chosen]
            found = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens) if texts else []
            for index, encoding in zip(chosen, found, strict=True):
                encodings[index] = encoding
        return encodings

    def _tokens(self, rendered: Rendered, encoding: Any) -> _Tokens:
        text = rendered.text
        ids, places = (encoding.ids, encoding.offsets) if encoding else self._in_pieces(text, rendered.plain)
        # The text carries its end token already; one that the tokenizer appends would double it.
        stop = len(ids)
        while stop and places[stop - 1][0] == places[stop - 1][1]:
            stop -= 1
        if stop == 0:  # an empty prompt is its BOS
            return _Tokens([token for token in ids if token == self._bos], [0] * len(ids), [0] * len(ids))
        ids = ids[:stop]
        starts, stops = map(list, zip(*places[:stop], strict=True))
        if not self._greedy_ids.isdisjoint(ids):
            # A special token may swallow the whitespace beside it; it then stands for its own text alone.
            for index, token in enumerate(ids):
                if token in self._greedy_ids:
                    piece = text[starts[index] : stops[index]]
                    starts[index] += len(piece) - len(piece.lstrip())
                    stops[index] -= len(piece) - len(piece.rstrip())
        return _Tokens(ids, starts, stops)

    def _in_pieces(self, text: str, plain: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and places of a text of which some ranges are encoded without special tokens, each by itself.

        As transformers encodes such a text (`encode_marked_chat` in transformers/utils/chat_template_utils.py).
        """
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        edges = [0, *(edge for piece in plain for edge in piece), len(text)]
        for number, (start, stop) in enumerate(pairwise(edges)):
            piece = text[start:stop]
            if number % 2:
                found = self._as_text(piece)
                ids += found
                places += [(start, stop)] * len(found)
            elif piece:
                piece_ids, piece_places = self._piece(piece, is_first=number == 0)
                ids += piece_ids
                places += [(start + left, start + right) for left, right in piece_places]
        return ids, places

    def _piece(self, piece: str, *, is_first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and places of a part of a text, encoded after a newline so that no space is put in front of it."""
        num_newline = len(self._newline)
        if not is_first:
            encoding = self._backend.encode("\n" + piece, add_special_tokens=False)
            if encoding.ids[:num_newline] == self._newline:
                places = [(max(start - 1, 0), stop - 1) for start, stop in encoding.offsets[num_newline:]]
                return encoding.ids[num_newline:], places
        encoding = self._backend.encode(piece, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _as_text(self, piece: str) -> list[int]:
        """Ids of special-token text as text."""
        found = self._without_added_tokens("\n" + piece)
        num_newline = len(self._newline)
        ids = found[num_newline:] if found[:num_newline] == self._newline else self._without_added_tokens(piece)
        if self._added_ids.get(piece) in ids:
            raise RowFault(
                f"the row holds {piece!r} as text, which the tokenizer can only write as its special token",
                "take it out of the row",
            )
        return ids

    def _without_added_tokens(self, text: str) -> list[int]:
        # `encode_special_tokens` leaves out special tokens only, not every added one: hence by the pipeline's stages.
        backend = self._backend
        text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        splits = [text]
        if backend.pre_tokenizer is not None:
            splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in backend.model.tokenize(split)]

    def _row(self, rendered: Rendered, tokens: _Tokens) -> TokenRow:
        """The row's tokens with its spans. RowFault if they do not fit the spans to the character."""
        ids = tokens.ids
        if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
            raise RowFault(
                "the row begins with two BOS tokens",
                "leave one out, in the row or in the chat template: a model sees one",
            )
        starts: list[int] = []
        stops: list[int] = []
        weights: list[float] = []
        for span in rendered.spans:
            first, last = _inside(rendered.text, tokens, span)
            if span.closed:
                self._check_end(rendered.text, tokens, first, last)
            first = max(first, 1)  # nothing stands before the first token to predict it from
            if first < last:
                starts.append(first)
                stops.append(last)
                weights.append(span.weight)
        if not starts:
            raise RowFault("the row has no token to train", "leave it out, or give its answer some text")
        return TokenRow(
            np.array(ids, dtype=np.int32),
            np.array(starts, dtype=np.int32),
            np.array(stops, dtype=np.int32),
            np.array(weights, dtype=np.float32),
        )

    def _check_end(self, text: str, tokens: _Tokens, first: int, last: int) -> None:
        """RowFault unless the last token of a span that is not whitespace is special: the end token, as one token."""
        for index in range(last - 1, first - 1, -1):
            if tokens.ids[index] in self._special_ids:
                return
            if text[tokens.starts[index] : tokens.stops[index]].strip():
                break
        raise RowFault(
            "no end token closes the trained text, so the model would not learn to stop",
            "use a tokenizer and a chat template whose end of turn is one special token",
        )


def _inside(text: str, tokens: _Tokens, span: Span) -> tuple[int, int]:
    """The half-open range of tokens that stand for a span's text, all of it but whitespace and nothing else.

    Places never go back, so the search is by halves; several tokens may stand for one character (bytes of an emoji).
    """
    starts, stops = tokens.starts, tokens.stops
    first, last = bisect_left(starts, span.start), bisect_right(stops, span.stop)
    while first < last and stops[first] == starts[first]:  # what the tokenizer added in front
        first += 1
    while first < last and starts[last - 1] == span.stop:  # nothing of its own, and what follows begins here
        last -= 1
    if first and stops[first - 1] > span.start:
        raise _straddle("start", text, tokens, first - 1, _START_FIX)
    if last < len(starts) and starts[last] < span.stop:
        raise _straddle("end", text, tokens, last, _END_FIX)
    if first == last:
        shown = text[span.start : span.stop][:40]
        raise RowFault(f"no token stands for the trained text {shown!r}", "mend the row, or use another tokenizer")
    if (
        starts[first] == span.start
        and stops[last - 1] == span.stop
        and starts[first + 1 : last] == stops[first : last - 1]
    ):
        return first, last
    reached = span.start
    for index in range(first, last + 1):
        begin = starts[index] if index < last else span.stop
        if begin > reached and (left_out := text[reached:begin]).strip():
            raise RowFault(
                f"the tokenizer leaves out {left_out[:40]!r}, so the answer could not be written again",
                "take it out of the row, or use another tokenizer",
            )
        reached = max(reached, stops[index]) if index < last else reached
    return first, last


_START_FIX = "begin completions with a space or newline, and end prompts without one"
_END_FIX = "use a chat template whose end of turn is a special token"


def _straddle(edge: str, text: str, tokens: _Tokens, index: int, fix: str) -> RowFault:
    piece = text[tokens.starts[index] : tokens.stops[index]]
    return RowFault(f"the {edge} of the trained text falls inside one token, {piece!r}", fix)


def _with_whole_offsets(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the tokenizer's engine whose offsets hold the spaces that belong to a token.

    Byte-level tokenizers trim them by default: " ls" then seems to begin at its "l", which hides that it swallows the
    last space of a prompt, and a token of spaces alone (the indentation of code) seems to be nothing at all.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    processor = backend.post_processor
    stages = list(processor) if type(processor).__name__ == "Sequence" else [processor]
    for stage in stages:
        if hasattr(stage, "trim_offsets"):
            stage.trim_offsets = False
    if processor is not None:
        backend.post_processor = processor
    return backend
