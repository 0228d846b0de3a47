"""One public function per verb of the command line, each with a typed result. Nothing here prints or exits.

All of them raise subclasses of `errors.UserError` for what the user can mend, with every problem that is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.artifacts import RunDir, locked
from qlora_train.data.account import Account, account_for, build_loader, write_account
from qlora_train.data.audit import Audit
from qlora_train.data.preview import PreviewRow, preview
from qlora_train.data.split import load_splits
from qlora_train.environment import environment
from qlora_train.errors import DataError, ModelError
from qlora_train.evaluate.chat import ChatSession
from qlora_train.evaluate.sides import SideScores, score_side
from qlora_train.export.run import ExportResult, run_export
from qlora_train.export.verify import load_merged
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import resolve_device
from qlora_train.model.skeleton import check_length, linear_layers, load_config, load_tokenizer, name_table
from qlora_train.model.source import Source, resolve_source
from qlora_train.model.trained import MEASURED_ON, load_trained, open_run, refuse_other_base
from qlora_train.recipe.load import LoadedRecipe, load_recipe
from qlora_train.train.metrics import Reporter, Silent
from qlora_train.train.run import TrainResult, refuse_used, run_training
from qlora_train.train.setup import load_inputs

__all__ = [
    "ChatSession",
    "ExportResult",
    "LoadedRecipe",
    "TrainResult",
    "check",
    "data",
    "env",
    "evaluate",
    "export",
    "open_chat",
    "train",
]

PREVIEW_ROWS = 5


@dataclass(frozen=True)
class CheckResult:
    """What is known of a run before any weight is loaded."""

    audits: tuple[Audit, ...]
    linear_layers: dict[str, int]  # last name -> how many layers bear it
    preview: tuple[PreviewRow, ...]
    num_steps: int
    num_params: int


@dataclass(frozen=True)
class DataResult:
    """The account of a recipe's data, and the page in the run folder that shows it."""

    account: Account
    page: Path


@dataclass(frozen=True)
class EvalResult:
    """Base and adapter side by side on the same rows."""

    base: SideScores
    adapter: SideScores


def check(recipe: Path, overrides: Sequence[str] = ()) -> CheckResult:
    """Validate recipe, data, tokenizer and model config against each other, without weights.

    Weights are neither read nor downloaded, but for a GGUF file, which is dequantised into the cache once.
    """
    settings = load_recipe(recipe, overrides).recipe
    inputs = load_inputs(settings, weights=False)
    table = inputs.train.table
    loader = build_loader(settings, inputs.train, inputs.tokenizer.pad_token_id)
    return CheckResult(
        audits=tuple(split.audit for split in (inputs.train, inputs.eval) if split),
        linear_layers=name_table(linear_layers(inputs.skeleton)),
        preview=tuple(preview(table, inputs.tokenizer, range(min(PREVIEW_ROWS, table.num_rows)))),
        num_steps=loader.num_steps(settings.train.epochs, settings.train.max_steps),
        num_params=sum(parameter.numel() for parameter in inputs.skeleton.parameters()),
    )


def data(recipe: Path, overrides: Sequence[str] = ()) -> DataResult:
    """Account for every row of a recipe's data, and write the account into its run folder; no weights, no training.

    Whether the model's vocabulary and layers suit is checked by `check` and by training.
    Raises RecipeError where the folder holds a run already, DataError and ModelError as training would for the rows,
    MachineError when the folder cannot be written.
    """
    settings = load_recipe(recipe, overrides).recipe
    run_dir = RunDir(settings.run.dir)
    refuse_used(run_dir)
    source = resolve_source(settings.model, weights=False)
    check_length(load_config(source), settings.data.seq_len)
    tokenizer = load_tokenizer(source, settings.model.chat_template)
    train_split, held_out = load_splits(settings, tokenizer)
    loader = build_loader(settings, train_split, tokenizer.pad_token_id)
    account = account_for(settings, train_split, held_out, tokenizer, loader)
    with locked(run_dir):
        write_account(run_dir, account.as_dict(settings), train_split, held_out)
    return DataResult(account, run_dir.audit_page)


def train(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    from_step: int | None = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a recipe into its run folder, or go on from its newest checkpoint that verifies (or that of `from_step`).

    Raises RecipeError, DataError, ModelError before training; ResumeError when the checkpoint is another run's;
    MachineError for disk, lock and device; NumericsError before an update that is not finite; Interrupted after
    saving when a signal asked to stop.
    """
    loaded = load_recipe(recipe, overrides)
    return run_training(loaded, resume=resume, from_step=from_step, reporter=reporter or Silent())


def evaluate(run: Path, overrides: Sequence[str] = (), *, rows: Path | None = None) -> EvalResult:
    """Measure a run's base and adapter on its held-out rows, or on those of another file.

    `overrides` may change the recipe's `eval` section, e.g. `eval.generate_rows=1000`, and say which rows:
    `data.eval=FILE`, which `rows` is short for, and how they are read.
    """
    if rows is not None:
        overrides = [*overrides, f"data.eval={json.dumps(str(rows))}"]
    finished = open_run(run, overrides, sections=("eval", *MEASURED_ON))
    recipe = finished.recipe
    if not recipe.data.holds_out:
        raise DataError("the recipe names no held-out rows", fix="give a file: qlora-train eval RUN --rows FILE")
    split = finished.load_split("eval", finished.tokenizer(finished.source()))
    trained = load_trained(finished)
    causal = CausalModel(trained.model)
    adapter = score_side(causal, trained.tokenizer, split, recipe.eval)
    with trained.model.disable_adapter():
        base = score_side(causal, trained.tokenizer, split, recipe.eval)
    return EvalResult(base, adapter)


def export(run: Path, target: Path, overrides: Sequence[str] = ()) -> ExportResult:
    """Merge a run's adapter into its dequantised base, verify the result, and publish it as the folder `target`.

    Raises RecipeError when `target` exists, MachineError when the disk is too small, and ModelError when the base is
    not the one that was trained on or the merged model is further from the trained one than the recipe allows. In
    each case nothing appears under the name `target`.
    """
    return run_export(open_run(run, overrides, sections=("export", *MEASURED_ON)), target)


def open_chat(folder: Path, *, adapters: Sequence[Path] = (), system: str | None = None) -> ChatSession:
    """A conversation with a run (its base with its adapter) or with an exported folder.

    `adapters` are further runs on the same base; each goes by its folder's name.
    """
    if RunDir(folder).recipe.is_file():
        trained = load_trained(open_run(folder))
        session = ChatSession(
            trained.model,
            trained.tokenizer,
            system=system,
            name=folder.resolve().name,
            conversations=trained.conversations,
        )
        for other in adapters:
            further = open_run(other)
            refuse_other_base(further.base_print, trained.base.print)
            session.add_adapter(other.resolve().name, further.run_dir.adapter)
        return session
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is neither a run folder nor a model folder", fix="name run.dir or an export")
    if adapters:
        raise ModelError("an exported model takes no adapter", fix="chat with a run folder instead")
    import torch

    model = load_merged(folder, torch.bfloat16, resolve_device("auto"))
    return ChatSession(model, load_tokenizer(Source(str(folder), folder)), system=system)


def env() -> dict[str, Any]:
    """Versions and machine, for run folders and bug reports."""
    return environment()
