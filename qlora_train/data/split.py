"""A recipe's training or held-out rows, read, chosen, tokenised and accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from qlora_train.data.audit import Audit, first_rows, select_rows
from qlora_train.data.formats import Row, read_rows
from qlora_train.data.tokenize import TokenTable, tokenize_rows
from qlora_train.recipe.schema import DataSection


@dataclass(frozen=True, eq=False)
class Split:
    """Chosen rows in file order, and the table of those that became tokens."""

    rows: Sequence[Row]
    table: TokenTable
    audit: Audit


def load_split(
    section: DataSection, split: Literal["train", "eval"], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Split:
    """DataError when a row cannot be read or none is left. Held-out rows are the same whatever the seed."""
    rows = read_rows(section.train if split == "train" else section.eval, section.format)
    if split == "train":
        chosen, left = select_rows(rows, section.max_train_rows, seed)
    else:
        chosen, left = first_rows(rows, section.max_eval_rows)
    table, audit = tokenize_rows(chosen, tokenizer, section, split, left)
    return Split(chosen, table, audit)
