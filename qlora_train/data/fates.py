"""Which rows of a table a side of the recipe gets, as one fate a row; each choice is a pure function of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_train.data.audit import FATES, Fate
from qlora_train.data.duplicates import exact_duplicates
from qlora_train.data.table import TokenTable
from qlora_train.recipe.schema import DataSection
from qlora_train.seeds import derive_seed

Side = Literal["train", "eval"]
SIDES: tuple[Side, ...] = ("train", "eval")
CODE: dict[Fate, int] = {fate: code for code, fate in enumerate(FATES)}
ELSEWHERE = -1  # a row of the other side: it is counted there
_CARVE_KEY = np.uint64(0x9E3779B97F4A7C15)  # so that the choice has nothing to do with other uses of the hash


def choose(
    whole: TokenTable, section: DataSection, side: Side, seed: int, text_sources: Sequence[int] = ()
) -> NDArray[np.int8]:
    """The fate of every row of `whole` (an index into FATES, or ELSEWHERE) on one side.

    `text_sources`: those whose rows are plain text, which `data.overlong: split` divides.
    """
    fates = np.full(whole.num_rows, CODE["kept"], dtype=np.int8)
    if section.split is not None:
        held_out = carve(whole.column("prompt_hash"), section.split)
        fates[held_out if side == "train" else ~held_out] = CODE["held_out"] if side == "train" else ELSEWHERE
    _judge_lengths(fates, whole, section, text_sources)
    if side == "train" and section.duplicates == "drop":
        kept = _among(fates, "kept", "cut")
        fates[kept[exact_duplicates(whole.column("content_hash")[kept])]] = CODE["duplicate"]
    _limit(fates, section.max_train_rows if side == "train" else section.max_eval_rows, side, seed)
    return fates


def carve(prompt_hashes: NDArray[np.uint64], frac: float) -> NDArray[np.bool_]:
    """Which rows are held out: the share `frac` of them (at least one) with the lowest mixed hashes.

    What a row asks alone decides its rank, so the choice depends neither on the order of rows nor on a seed, and rows
    that ask the same stay on one side.
    """
    if not len(prompt_hashes):
        return np.zeros(0, dtype=np.bool_)
    mixed = (prompt_hashes ^ (prompt_hashes >> np.uint64(31))) * _CARVE_KEY
    count = max(1, round(frac * len(mixed)))
    held_out: NDArray[np.bool_] = mixed <= np.partition(mixed, count - 1)[count - 1]
    return held_out


def _judge_lengths(
    fates: NDArray[np.int8], whole: TokenTable, section: DataSection, text_sources: Sequence[int]
) -> None:
    """Rows longer than seq_len are dropped, or cut where something is left to train; of text that is split, kept."""
    long = _among(fates, "kept")
    long = long[whole.lengths[long] > section.seq_len]
    if section.overlong == "split":
        long = long[~np.isin(whole.column("source")[long], text_sources)]
    if section.overlong == "cut" and len(long):
        left = whole.take(long, section.seq_len).num_supervised > 0
        fates[long[left]] = CODE["cut"]
        long = long[~left]
    fates[long] = CODE["dropped"]


def _limit(fates: NDArray[np.int8], limit: int | None, side: Side, seed: int) -> None:
    """Training rows: a random subset that follows from the seed. Held-out rows: the first ones, whatever the seed."""
    rows = _among(fates, "kept", "cut")
    if limit is None or limit >= len(rows):
        return
    if side == "train":
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "subset")))
        rows = generator.permutation(rows)
    fates[rows[limit:]] = CODE["not_selected"]


def _among(fates: NDArray[np.int8], *names: Fate) -> NDArray[np.int64]:
    found: NDArray[Any] = np.flatnonzero(np.isin(fates, [CODE[name] for name in names]))
    return found.astype(np.int64)
