"""Rendered text to token ids, and the mask of the tokens that are trained.

The whole text is encoded once, so the ids are those that the model sees at inference; which of them are trained follows
from where they stand in the text, never from what they are. A pad token that is also the end token changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qlora_train.data.problems import Rejection
from qlora_train.data.template import Rendered, special_tokens
from qlora_train.errors import ModelError


@dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of one text. Token i stands for `text[starts[i]:ends[i]]`: for nothing if the tokenizer added it."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class Encoder:
    """A tokenizer that tells for each token exactly which characters it stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} is a slow one, which cannot tell the place of its tokens",
                fix="use one with a tokenizer.json",
            )
        self._tokenizer = _with_whole_offsets(tokenizer)
        self._special_ids = np.array(sorted(set(special_tokens(tokenizer).values())), dtype=np.int32)
        self.longest_piece = max(map(len, tokenizer.get_vocab()))  # no token stands for more characters
        added = tokenizer.added_tokens_decoder.items()
        self._greedy_ids = np.array([key for key, token in added if token.lstrip or token.rstrip], dtype=np.int32)

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """The tokens of each text, in order."""
        encoded: list[Encoded] = []
        for add_special_tokens, group in groupby(rendered, key=lambda entry: entry.add_special_tokens):
            texts = [entry.text for entry in group]
            batch = self._tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
                encoded.append(self._encoded(text, ids, offsets))
        return encoded

    def supervised(self, rendered: Rendered, encoded: Encoded) -> NDArray[np.bool_]:
        """Which tokens are trained: those inside a span. Rejection if the tokens do not fit the spans to the character.

        The first token of a row is never trained: nothing stands before it to predict it from.
        """
        mask = np.zeros(len(encoded.ids), dtype=np.bool_)
        for start, end in rendered.spans:
            inside = (encoded.starts >= start) & (encoded.ends <= end) & (encoded.ends > encoded.starts)
            _check_straddle(rendered.text, encoded, start, end)
            _check_cover(rendered.text, encoded, inside, start, end)
            self._check_end(rendered.text, encoded, inside)
            mask |= inside
        mask[:1] = False
        if not mask.any():
            raise Rejection("the row has no token to train")
        return mask

    def _encoded(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        token_ids, starts, ends = np.array(ids, dtype=np.int32), places[:, 0].copy(), places[:, 1].copy()
        # A special token may swallow the whitespace beside it; it then stands for its own text alone.
        for index in np.flatnonzero(np.isin(token_ids, self._greedy_ids)):
            piece = text[starts[index] : ends[index]]
            starts[index] += len(piece) - len(piece.lstrip())
            ends[index] -= len(piece) - len(piece.rstrip())
        # The text carries its end token already; one that the tokenizer appends would double it.
        shown = np.flatnonzero(ends > starts)
        stop = int(shown[-1]) + 1 if len(shown) else 0
        return Encoded(token_ids[:stop], starts[:stop], ends[:stop])

    def _check_end(self, text: str, encoded: Encoded, inside: NDArray[np.bool_]) -> None:
        """Rejection unless the last token of a span that is not whitespace is special: the end token, as one token."""
        for index in np.flatnonzero(inside)[::-1]:
            if text[encoded.starts[index] : encoded.ends[index]].strip():
                if encoded.ids[index] in self._special_ids:
                    return
                break
        raise Rejection("no end token closes the trained text, so the model would not learn to stop")


def _with_whole_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose offsets hold the spaces that belong to a token.

    Byte-level tokenizers trim them by default: " ls" then seems to begin at its "l", which hides that it swallows the
    last space of a prompt, and a token of spaces alone (the indentation of code) seems to be nothing at all.
    """
    clone = copy.deepcopy(tokenizer)
    backend = clone.backend_tokenizer
    processor = backend.post_processor
    stages = list(processor) if type(processor).__name__ == "Sequence" else [processor]
    for stage in stages:
        if hasattr(stage, "trim_offsets"):
            stage.trim_offsets = False
    if processor is not None:
        backend.post_processor = processor
    return clone


def _check_straddle(text: str, encoded: Encoded, start: int, end: int) -> None:
    """Rejection if one token stands on both sides of a span's start or end."""
    edges = (
        (start, "start", "begin completions with a space or newline, and end prompts without one"),
        (end, "end", "use a chat template whose end of turn is a special token"),
    )
    for edge, name, fix in edges:
        across = np.flatnonzero((encoded.starts < edge) & (encoded.ends > edge))
        if len(across):
            piece = text[encoded.starts[across[0]] : encoded.ends[across[0]]]
            raise Rejection(f"the {name} of the trained text falls inside one token, {piece!r}; {fix}")


def _check_cover(text: str, encoded: Encoded, inside: NDArray[np.bool_], start: int, end: int) -> None:
    """Rejection if the tokens of a span leave out any of its text but whitespace."""
    if not inside.any():
        raise Rejection(f"no token stands for the trained text {text[start:end][:40]!r}")
    # Several tokens may share one character (the bytes of an emoji), so ends are compared with the furthest so far.
    reached = np.concatenate([[start], np.maximum.accumulate(encoded.ends[inside])])
    begins = np.concatenate([encoded.starts[inside], [end]])
    for gap in np.flatnonzero(begins > reached):
        left_out = text[reached[gap] : begins[gap]]
        if left_out.strip():
            raise Rejection(f"the tokenizer leaves out {left_out[:40]!r}, so the answer could not be written again")
