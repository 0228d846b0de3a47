"""The job of every contender: the same rows in the same order, from the same adapter, with the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SETS = ("shell", "text_jargon")
# Rows of exactly seq_len tokens, one a step: the Jargon File end to end.
LONG_SET = "long"
# Rows of TRL's default micro-batch: a step holds a multiple of them, so that padded and packed steps are equal.
PADDED_ROWS = 8
# A pack holds at least this share of seq_len, as packs of a training do.
LEAST_FILL = 0.99
_TRIES = 100_000


@dataclass(frozen=True)
class Options:
    """What all contenders share. Numbers are tokens, rows and optimiser steps."""

    seq_len: int = 512
    rows: int | None = None  # of a step; default: as many as usually fill a pack
    r: int = 16
    alpha: float = 32.0
    learning_rate: float = 1e-3
    vocabulary: int | None = None  # of a random head in place of the model's, for ours only
    device: str = "cpu"
    model: str | None = None  # a folder in place of the quickstart's model


@dataclass(frozen=True)
class Rows:
    """The rows of a set, as every contender gets them, and which of them each step trains: one pack a step."""

    table: Any  # qlora_train.data.table.TokenTable
    steps: tuple[tuple[int, ...], ...]  # row numbers, in no order of length
    pad_token_id: int


def choose_steps(lengths: NDArray[np.integer], options: Options, num_steps: int) -> tuple[tuple[int, ...], ...]:
    """Rows of each step: drawn at random (seed 0) until they fill one pack; at most twice the mean they must have.

    Raises ValueError when such rows are not found, or their number is no multiple of TRL's micro-batch.
    """
    seq_len = options.seq_len
    count = options.rows or PADDED_ROWS * max(1, round(seq_len / float(lengths.mean()) / PADDED_ROWS))
    if count % PADDED_ROWS:
        raise ValueError(f"{count} rows a step: TRL's micro-batches hold {PADDED_ROWS}, choose a multiple")
    pool = np.flatnonzero(lengths <= 2 * seq_len / count)
    rng = np.random.default_rng(0)
    steps: list[tuple[int, ...]] = []
    for _ in range(_TRIES if len(pool) >= count else 0):
        rows = rng.choice(pool, count, replace=False)
        if LEAST_FILL * seq_len <= lengths[rows].sum() <= seq_len:
            steps.append(tuple(rows.tolist()))
            if len(steps) == num_steps:
                return tuple(steps)
    raise ValueError(f"no {count} rows fill a pack of {seq_len} tokens: choose other --rows or --seq-len")


def recipe_of(set_name: str, options: Options, *overrides: str) -> Any:
    """Our recipe for a set: the quickstart's model or another, everything else said here."""
    from qlora_train.recipe.load import load_recipe

    recipes = ROOT / "recipes"
    said = (
        f"data.train=[{recipes / 'data' / set_name / 'train.jsonl'}]",
        "data.eval=[]",
        f"data.seq_len={max(options.seq_len, 1024)}",
        "data.max_lost_frac=1",
        f"adapter.r={options.r}",
        f"adapter.alpha={options.alpha}",
        f"train.learning_rate={options.learning_rate}",
        "train.schedule=constant",
        "train.warmup_frac=0",
        f"model.device={options.device}",
        *([f"model.path={options.model}"] if options.model else []),
        *overrides,
    )
    return load_recipe(recipes / "quickstart.yaml", said).recipe


def load_rows(set_name: str, options: Options, num_steps: int) -> Rows:
    """The tokens and supervised spans of a set, from our own data path, and the steps drawn from them."""
    from qlora_train.train.setup import load_inputs

    inputs = load_inputs(recipe_of("text_jargon" if set_name == LONG_SET else set_name, options))
    table = inputs.train.table
    if set_name == LONG_SET:
        return _long_rows(table, options.seq_len, num_steps, inputs.tokenizer.pad_token_id)
    return Rows(table, choose_steps(table.lengths, options, num_steps), inputs.tokenizer.pad_token_id)


def _long_rows(table: Any, seq_len: int, num_steps: int, pad_token_id: int) -> Rows:
    """Documents end to end, cut into rows of `seq_len` tokens; all but a row's first token are supervised."""
    from qlora_train.data.table import TokenRow, TokenTable

    ids = np.concatenate([row.ids for row in table.rows(range(table.num_rows))])
    if len(ids) < seq_len * num_steps:
        raise ValueError(f"the set has {len(ids)} tokens, too few for {num_steps} rows of {seq_len}")
    start, stop = (np.array([edge], dtype=np.int32) for edge in (1, seq_len))
    weight = np.ones(1, dtype=np.float32)
    rows = [TokenRow(ids[k * seq_len : (k + 1) * seq_len], start, stop, weight) for k in range(num_steps)]
    return Rows(TokenTable.of_rows(rows), tuple((k,) for k in range(num_steps)), pad_token_id)


def start_adapter(model: Any) -> None:
    """The same start for everyone: A uniform within 1 / sqrt(inputs), drawn module by module in order of name; B 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parameters = [(name, parameter) for name, parameter in sorted(model.named_parameters()) if ".lora_" in name]
    if not parameters:
        raise ValueError("the model has no adapter")
    with torch.no_grad():
        for name, parameter in parameters:
            if ".lora_A." in name:
                values = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(values * parameter.shape[1] ** -0.5)
            else:
                parameter.zero_()
