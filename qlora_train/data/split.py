"""A recipe's training or held-out rows: a view of the table of all rows, and the account of every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qlora_train.data.audit import EXAMPLES, FATES, TRAINED, Audit, Fate, Reasons, SourceAccount, losses
from qlora_train.data.build import LEAST_CHARS_LIMIT, Reading
from qlora_train.data.cache import CachedSource, cached
from qlora_train.data.encode import Encoder
from qlora_train.data.fates import CODE, ELSEWHERE, SIDES, Side, choose
from qlora_train.data.problems import ProblemList, SourceFault
from qlora_train.data.reencode import Reencoder, read_rows
from qlora_train.data.rows import MessagesRow, Row
from qlora_train.data.sources.open import open_source
from qlora_train.data.table import TokenTable, joined
from qlora_train.errors import Collected, DataError, ModelError
from qlora_train.recipe.schema import DataSection, Recipe, SourceSection

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Split:
    """Rows as tokens, the account of all rows that they were chosen from, and a way back to the rows as written."""

    table: TokenTable
    whole: TokenTable  # every row of the sources that became tokens
    fates: NDArray[np.int8]  # of the rows of `whole`: indices into FATES, or ELSEWHERE
    sources: tuple[CachedSource, ...]
    section: DataSection
    side: Side

    @cached_property
    def undivided(self) -> TokenTable:
        """The rows of `table`, each once where they are split."""
        if self.section.overlong != "split":
            return self.table
        return self.whole.take(np.flatnonzero(self._is_trained))

    @property
    def _is_trained(self) -> NDArray[np.bool_]:
        return np.isin(self.fates, [CODE[fate] for fate in TRAINED])

    @property
    def largest_id(self) -> int:
        """The largest token id in any row of the sources."""
        return max(source.facts.largest_id for source in self.sources)

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens that rows of the sources were taught to end with."""
        return sorted({token_id for source in self.sources for token_id in source.facts.end_token_ids})

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Rows of `table` as they were written, read again from their sources."""
        return read_rows(self.sources, self.table.origins(indices))

    def holds_conversations(self) -> bool:
        """Whether the first row of any source is a conversation, which a chat template renders."""
        firsts = np.unique(self.table.column("source"), return_index=True)[1]
        return any(isinstance(row, MessagesRow) for row in self.read(firsts.tolist()))

    @cached_property
    def audit(self) -> Audit:
        """Every row counted, with the reasons of those that are not trained on whole."""
        reasons = Reasons()
        counts: dict[Fate, int] = {fate: int((self.fates == CODE[fate]).sum()) for fate in FATES}
        for fate in FATES[1:]:
            if counts[fate]:
                first = np.flatnonzero(self.fates == CODE[fate])[:EXAMPLES].tolist()
                told = [f"{self.whole.where(index)}: {self._reason(index, fate)}" for index in first]
                reasons.add_kind(fate, self._kind(fate), counts[fate], told)
        lost = int(self.whole.lengths[self.fates == CODE["dropped"]].sum())
        lost += int((self.whole.lengths[self.fates == CODE["cut"]] - self.section.seq_len).sum())
        read = self.lengths_as_read()
        num_chars = int(self.whole.column("num_chars").sum(dtype=np.int64))
        tokens_per_char = int(self.whole.lengths.sum(dtype=np.int64)) / num_chars if num_chars else 0.25
        num_unread = 0
        for where, fate, fault in self._faults():
            counts[fate] += 1
            num_unread += fault["num_tokens"] or round(fault["num_chars"] * tokens_per_char)
            reasons.add(fate, fault["what"], where)
        return Audit(
            split=self.side,
            counts=counts,
            reasons=reasons.listed(),
            sources=self._accounts(),
            num_pieces=self.table.num_rows,
            num_tokens=int(self.table.lengths.sum()),
            num_supervised_tokens=int(self.table.num_supervised.sum()),
            num_read_tokens=int(read.sum()) + num_unread,
            num_lost_tokens=lost + num_unread,
            num_plain_specials=int(self.undivided.column("num_plain_specials").sum()),
            num_control_specials=int(self.undivided.column("num_control_specials").sum()),
            num_context_turns=int(self.undivided.column("num_context_turns").sum()),
            notes=tuple(note for source in self.sources if self._owns_faults for note in _notes(source)),
        )

    def listed(self) -> Iterator[tuple[str, Fate, str]]:
        """Place, fate and reason of each row that is not trained on whole."""
        others = np.flatnonzero((self.fates != CODE["kept"]) & (self.fates != ELSEWHERE)).tolist()
        for first in range(0, len(others), _ROWS_AT_ONCE):
            indices = others[first : first + _ROWS_AT_ONCE]
            for index, where in zip(indices, self.whole.places(indices), strict=True):
                fate = FATES[self.fates[index]]
                yield where, fate, self._reason(index, fate)
        for where, fate, fault in self._faults():
            yield where, fate, fault["what"]

    def rejected(self) -> Iterator[dict[str, str]]:
        """The rows that `data.bad_rows: skip` left out: where, reason, fix, and the row as it was written."""
        for where, fate, fault in self._faults():
            if fate == "rejected":
                yield {"where": where, "reason": fault["what"], "fix": fault["fix"], "row": fault["row"]}

    def lengths_as_read(self) -> NDArray[np.int32]:
        """Tokens of each row that became tokens, before any is cut or left out."""
        return self.whole.lengths[(self.fates != ELSEWHERE) & (self.fates != CODE["held_out"])]

    def _faults(self) -> Iterator[tuple[str, Fate, dict[str, Any]]]:
        """Rows that never became tokens. Those of a set that is carved in two count on the training side."""
        for source in self.sources if self._owns_faults else ():
            for fault in source.faults():
                fate: Fate = "dropped" if fault["kind"] == "overlong" else "rejected"
                yield source.source.place(fault["number"]), fate, fault

    def _accounts(self) -> tuple[SourceAccount, ...]:
        count = len(self.sources)
        read = np.bincount(self.whole.column("source")[self.fates != ELSEWHERE], minlength=count)
        trained = np.bincount(self.undivided.column("source"), minlength=count)
        return tuple(
            SourceAccount(
                source.source.name,
                source.facts.row_format,
                entry.weight,
                int(read[index]) + (source.facts.num_faults if self._owns_faults else 0),
                int(trained[index]),
            )
            for index, (source, entry) in enumerate(zip(self.sources, _entries(self.section, self.side), strict=True))
        )

    @property
    def _owns_faults(self) -> bool:
        """Rows that never became tokens, of a set that is carved in two, count on the training side."""
        return self.side == "train" or self.section.split is None

    def _kind(self, fate: Fate) -> str:
        """The reason without what differs from row to row."""
        if fate == "cut":
            return f"longer than {self.section.seq_len:,} tokens: cut there"
        if fate == "dropped":
            return f"longer than {self.section.seq_len:,} tokens{self._why_dropped}"
        if fate == "duplicate":
            return "repeats an earlier row"
        return f"held out: data.split is {self.section.split}" if fate == "held_out" else self._limit

    @property
    def _why_dropped(self) -> str:
        if self.section.overlong == "split":
            return ": only plain text is split"
        return ": cut there, it has nothing left to train" if self.section.overlong == "cut" else ""

    @property
    def _limit(self) -> str:
        if self.side == "train":
            return f"the recipe asks for a random subset of {self.section.max_train_rows:,} rows"
        return f"the recipe asks for the first {self.section.max_eval_rows:,} rows"

    def _reason(self, index: int, fate: Fate) -> str:
        length, seq_len = int(self.whole.lengths[index]), self.section.seq_len
        if fate == "cut":
            return f"cut from {length:,} to {seq_len:,} tokens: it loses its end"
        if fate == "dropped":
            return f"the row is {length:,} tokens long; data.seq_len is {seq_len:,}{self._why_dropped}"
        if fate == "duplicate":
            return f"repeats {self.whole.where(self._first_of(index))}"
        return self._kind(fate)

    @cached_property
    def _first_of(self) -> Callable[[int], int]:
        """A row's index -> that of the first row of the same content."""
        hashes = self.whole.column("content_hash")
        unique, first = np.unique(hashes, return_index=True)
        return lambda index: int(first[np.searchsorted(unique, hashes[index])])


def load_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
    """Both sides of a recipe; None where it names no held-out rows. See `load_split` for what it raises."""
    section, seed, encoder = recipe.data, recipe.run.seed, Encoder(tokenizer)
    if not section.holds_out:
        return _choose(_read(section, "train", encoder), section, "train", seed), None
    if section.split is not None:
        rows = _read(section, "train", encoder)
        return _choose(rows, section, "train", seed), _choose(rows, section, "eval", seed)
    collected, sides = Collected(), []
    for side in SIDES:
        with collected:
            sides.append(_choose(_read(section, side, encoder), section, side, seed))
    collected.raise_if_any()
    return sides[0], sides[1]


def load_split(section: DataSection, side: Side, tokenizer: PreTrainedTokenizerBase, seed: int) -> Split:
    """Read, tokenise (or find in the cache), choose and account for the rows of one side.

    Raises DataError when a source cannot be read, no row is left, a row is bad or too long and the recipe says `fail`,
    or more tokens are lost than `data.max_lost_frac`; ModelError when the chat template fails on a row. Held-out rows
    are the same whatever the seed.
    """
    return _choose(_read(section, side, Encoder(tokenizer)), section, side, seed)


@dataclass(frozen=True, eq=False)
class _Rows:
    """All rows of some sources; a set that is carved in two is read once for both sides."""

    whole: TokenTable
    sources: tuple[CachedSource, ...]


def _choose(rows: _Rows, section: DataSection, side: Side, seed: int) -> Split:
    """One side's rows; see `load_split`."""
    text_sources = [index for index, source in enumerate(rows.sources) if source.facts.row_format == "text"]
    fates = choose(rows.whole, section, side, seed, text_sources)
    chosen = np.flatnonzero((fates == CODE["kept"]) | (fates == CODE["cut"]))
    if section.overlong == "split":
        table = rows.whole.take_pieces(chosen, section.seq_len)
    else:
        table = rows.whole.take(chosen, section.seq_len if section.overlong == "cut" else None)
    split = Split(table, rows.whole, fates, rows.sources, section, side)
    _refuse_bad(split)
    if not table.num_rows:
        raise _nothing_left(split)
    if split.audit.lost_token_frac > section.max_lost_frac:
        raise _too_much_lost(split)
    return split


def _notes(source: CachedSource) -> list[str]:
    """What of a source was not taken as it was written."""
    found = [f"in {count:,} row{'' if count == 1 else 's'} {note}" for note, count in source.facts.notes.items()]
    kind, _, delimiter = source.source.kind.partition(":")
    if kind == "csv" and delimiter != "," and not source.source.name.lower().endswith(".tsv"):
        found.append(f"cells are parted by {delimiter!r}, as the header of {source.source.name} shows")
    return found


def _entries(section: DataSection, side: Side) -> tuple[SourceSection, ...]:
    return section.eval if side == "eval" and section.split is None else section.train


def _read(section: DataSection, side: Side, encoder: Encoder) -> _Rows:
    """The sources of a side as one table; DataError with what is wrong in any of them."""
    max_chars = max(LEAST_CHARS_LIMIT, section.seq_len * encoder.longest_piece)
    found, problems = [], ProblemList(_MEND_FIX)
    for entry in _entries(section, side):
        reading = Reading(
            row_format=entry.format or section.format,
            columns={**section.columns, **entry.columns},
            loss_on=section.loss_on,
            max_chars=max_chars,
            with_ids=not section.streaming,
        )
        try:
            source = open_source(entry.path, revision=entry.revision, subset=entry.subset, split=entry.split)
            found.append(cached(source, reading, encoder))
        except SourceFault as fault:
            problems.add(fault.what, fault.fix, entry.path)
    problems.raise_if_any()
    sources = tuple(found)
    encode = Reencoder(sources, encoder, section.loss_on) if section.streaming else None
    return _Rows(joined([source.table(encode) for source in sources], encode), sources)


def _refuse_bad(split: Split) -> None:
    """The first rows, and the number of all, that the recipe does not allow to be left out."""
    section, bad, overlong = split.section, ProblemList(_MEND_FIX, _SKIP_FIX), ProblemList(_OVERLONG_FIX)
    for where, fate, fault in split._faults():
        if fate == "rejected" and section.bad_rows == "fail":
            error = ModelError if fault["kind"] == "template" else DataError
            bad.add(fault["what"], fault["fix"], where, error)
        elif fate == "dropped" and section.overlong == "fail":
            overlong.add(fault["what"], _OVERLONG_FIX, where)
    bad.raise_if_any()
    if section.overlong == "fail":
        for index in np.flatnonzero(split.fates == CODE["dropped"]).tolist():
            overlong.add(split._reason(index, "dropped"), _OVERLONG_FIX, split.whole.where(index))
    overlong.raise_if_any()


_MEND_FIX = "mend them and start again"
_SKIP_FIX = "set data.bad_rows: skip to leave such rows out and list them"
_OVERLONG_FIX = "raise data.seq_len, or set data.overlong: drop"


def _nothing_left(split: Split) -> DataError:
    """The error for a side of which no row can be trained on, with the commonest reason."""
    audit = split.audit
    causes = losses(audit.reasons)
    if not causes and audit.counts["held_out"]:
        what = f"data.split holds out all {audit.num_rows:,} rows: rows of equal content stay on one side"
        return DataError(what, fix="give more rows that differ, or name held-out rows in data.eval")
    if not causes:
        return DataError(f"0 trainable rows of {audit.num_rows:,} in {split.side}", fix="give more rows")
    cause = causes[0]
    return DataError(
        f"0 trainable rows of {audit.num_rows:,} in {split.side}. Likely cause ({cause.count:,} rows): "
        f"{cause.examples[0]}",
        fix="mend that first",
    )


def _too_much_lost(split: Split) -> DataError:
    audit = split.audit
    causes = "; ".join(
        f"{entry.count:,} {entry.fate}, such as {entry.examples[0]}" for entry in losses(audit.reasons)[:3]
    )
    return DataError(
        f"{audit.lost_token_frac:.1%} of the tokens in {split.side} would be lost, more than data.max_lost_frac "
        f"({split.section.max_lost_frac:.1%}): {causes}",
        fix="raise data.seq_len, mend the rows, or raise data.max_lost_frac if that is meant",
    )
