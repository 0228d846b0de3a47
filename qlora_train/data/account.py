"""The whole account of a recipe's data: audits, duplicates, overlap, batching, rows to look at; as JSON and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_train.artifacts.files import explained, write_file, write_json, write_json_lines
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.audit import Audit
from qlora_train.data.duplicates import (
    MAX_ROWS,
    ExactDuplicates,
    NearDuplicates,
    Overlap,
    find_exact,
    near_duplicates,
    overlap,
)
from qlora_train.data.loader import Loader
from qlora_train.data.page import length_histogram, render_page
from qlora_train.data.preview import PreviewRow, rows_to_look_at
from qlora_train.data.split import Split
from qlora_train.recipe.schema import Recipe, TrainSection

STREAMED_SAMPLE = 20_000  # rows of which near-duplicates are looked for where each has to be tokenised anew


@dataclass(frozen=True)
class Batching:
    """How the rows of the first epoch meet. A line is a pack, or one padded row."""

    kind: str
    num_lines: int
    num_steps: int
    num_unreached_rows: int  # kept, but in no step: the weights are low, or the steps few
    padding_frac: float  # share of the positions that hold no token, each micro-batch as wide as its longest line
    unfilled_frac: float  # the same with every line as wide as seq_len


@dataclass(frozen=True)
class SplitAccount:
    """One split: the audit, and what was found by comparing rows."""

    audit: Audit
    duplicates: ExactDuplicates
    near_duplicates: NearDuplicates
    histogram: dict[str, Any]
    rows: tuple[PreviewRow, ...]


@dataclass(frozen=True)
class Account:
    """Everything that is known of the data before training."""

    splits: tuple[SplitAccount, ...]
    overlap: Overlap | None
    batching: Batching

    def as_dict(self, recipe: Recipe) -> dict[str, Any]:
        """Plain data for JSON and for the page, with the settings that the figures depend on."""
        return {
            "recipe": recipe.run.dir.name,
            "model": recipe.model.path,
            "seq_len": recipe.data.seq_len,
            "max_lost_frac": recipe.data.max_lost_frac,
            "splits": [
                {
                    **account.audit.as_dict(),
                    "histogram": account.histogram,
                    "duplicates": account.duplicates.as_dict(),
                    "near_duplicates": account.near_duplicates.as_dict(),
                    "batching": asdict(self.batching) if account.audit.split == "train" else None,
                    "previews": [asdict(row) for row in account.rows],
                }
                for account in self.splits
            ],
            "overlap": self.overlap.as_dict() if self.overlap else None,
        }


def build_loader(recipe: Recipe, split: Split, pad_token_id: int) -> Loader:
    """The loader of a recipe's training rows."""
    return Loader(
        split.table,
        recipe.data.batching,
        recipe.train.micro_batch_size,
        recipe.train.grad_accum_steps,
        pad_token_id,
        recipe.run.seed,
        seq_len=recipe.data.seq_len,
        source_passes=[source.weight for source in recipe.data.train],
    )


def steps_notice(section: TrainSection, loader: Loader) -> str | None:
    """What to say where the data ends before train.max_steps."""
    if section.max_steps is None:
        return None
    num_steps = loader.num_steps(section.epochs, section.max_steps)
    if num_steps == section.max_steps:
        return None
    given = f"the data gives {num_steps:,} steps in {section.epochs:g} epoch{'' if section.epochs == 1 else 's'}"
    return f"train.max_steps is {section.max_steps:,}, but {given}: raise train.epochs for more"


def account_for(
    recipe: Recipe, train: Split, held_out: Split | None, tokenizer: PreTrainedTokenizerBase, loader: Loader
) -> Account:
    """Compare the rows of both sides, and choose some to look at. A minute for a million rows of 60 tokens."""
    splits = [split for split in (train, held_out) if split is not None]
    return Account(
        splits=tuple(_split_account(recipe, split, tokenizer) for split in splits),
        overlap=overlap(train.undivided, held_out.undivided) if held_out else None,
        batching=_batching(recipe, loader, train.table.num_rows),
    )


def write_account(run_dir: RunDir, plain: Mapping[str, Any], train: Split, held_out: Split | None) -> None:
    """data.json, audit.html, fates.jsonl, and rejected.jsonl where rows were skipped, into a run folder.

    `plain` is `Account.as_dict()`, and whatever else data.json is to hold.
    """
    write_json(run_dir.data, plain)
    write_file(run_dir.audit_page, render_page(plain).encode())
    splits = [split for split in (train, held_out) if split is not None]
    write_json_lines(
        run_dir.fates,
        (
            {"split": split.side, "where": where, "fate": fate, "reason": reason}
            for split in splits
            for where, fate, reason in split.listed()
        ),
    )
    with explained(run_dir.rejected):
        run_dir.rejected.unlink(missing_ok=True)
    if any(split.audit.counts["rejected"] for split in splits):
        write_json_lines(run_dir.rejected, (entry for split in splits for entry in split.rejected()))


def _split_account(recipe: Recipe, split: Split, tokenizer: PreTrainedTokenizerBase) -> SplitAccount:
    table = split.table
    return SplitAccount(
        audit=split.audit,
        duplicates=find_exact(split.undivided.column("content_hash"), split.undivided.where),
        near_duplicates=near_duplicates(split.undivided, STREAMED_SAMPLE if recipe.data.streaming else MAX_ROWS),
        histogram=length_histogram(split.lengths_as_read(), recipe.data.seq_len),
        rows=tuple(rows_to_look_at(table, tokenizer, recipe.run.seed)),
    )


def _batching(recipe: Recipe, loader: Loader, num_rows: int) -> Batching:
    num_lines, padding_frac = loader.num_lines(0), loader.padding_frac(0)
    num_steps = loader.num_steps(recipe.train.epochs, recipe.train.max_steps)
    return Batching(
        kind=recipe.data.batching,
        num_lines=num_lines,
        num_steps=num_steps,
        num_unreached_rows=num_rows - loader.num_rows_reached(num_steps),
        padding_frac=padding_frac,
        unfilled_frac=1 - loader.num_tokens(0) / (num_lines * recipe.data.seq_len),
    )
