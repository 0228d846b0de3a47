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
from qlora_train.errors import DataError, ModelError, RecipeError
from qlora_train.evaluate.chat import ChatSession
from qlora_train.evaluate.sides import SideScores, score_side
from qlora_train.export.run import ExportResult, run_export
from qlora_train.export.verify import load_merged
from qlora_train.memory.advice import Change, advise, spend
from qlora_train.memory.available import host_free_bytes
from qlora_train.memory.cards import find_card, parse_memory
from qlora_train.memory.plan import DeviceKind, Plan, plan_training
from qlora_train.memory.table import PlanTable, plan_table
from qlora_train.model.architecture import load_architecture
from qlora_train.model.binding import refuse_other_base
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import open_model_folder
from qlora_train.model.load import memory_advice, resolve_device
from qlora_train.model.skeleton import check_length, linear_layers, load_config, load_tokenizer, name_table
from qlora_train.model.source import resolve_source
from qlora_train.model.trained import MEASURED_ON, load_trained, open_run
from qlora_train.recipe.load import LoadedRecipe, load_recipe
from qlora_train.recipe.schema import Recipe
from qlora_train.report.run import ReportResult, write_report
from qlora_train.train.deepcheck import Finding, deep_check, refuse_failed
from qlora_train.train.metrics import Reporter, Silent
from qlora_train.train.run import TrainResult, refuse_used, run_training
from qlora_train.train.setup import load_inputs

__all__ = [
    "ChatSession",
    "ExportResult",
    "LoadedRecipe",
    "PlanResult",
    "ReportResult",
    "TrainResult",
    "check",
    "data",
    "env",
    "evaluate",
    "export",
    "open_chat",
    "plan",
    "report",
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
    findings: tuple[Finding, ...] = ()  # of a deep check: what was measured on the model

    def refuse_failed(self) -> None:
        """ModelError that lists every check of the model that does not hold."""
        refuse_failed(self.findings)


@dataclass(frozen=True)
class DataResult:
    """The account of a recipe's data, and the page in the run folder that shows it."""

    account: Account
    page: Path


@dataclass(frozen=True)
class PlanResult:
    """What a run will hold, and whether that fits."""

    plan: Plan
    device: str  # of the plan, in words
    limit_bytes: int | None  # memory of the device; None where none is known
    changes: tuple[Change, ...]  # what makes it fit; or, where it fits, what the room is good for

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits on the device; None where its memory is not known."""
        return None if self.limit_bytes is None else self.plan.fits(self.limit_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **self.plan.as_dict(),
            "device": self.device,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "changes": [change.as_dict() for change in self.changes],
        }


@dataclass(frozen=True)
class EvalResult:
    """Base and adapter side by side on the same rows."""

    base: SideScores
    adapter: SideScores


def check(recipe: Path, overrides: Sequence[str] = (), *, deep: bool = False) -> CheckResult:
    """Validate recipe, data, tokenizer and model config against each other, without weights.

    Weights are neither read nor downloaded, but for a GGUF file, which is dequantised into the cache once. With `deep`
    the base is loaded as training loads it and measured (train/deepcheck.py): the result holds the findings, and its
    `refuse_failed` raises for those that do not hold. Nothing is written to the run folder.
    """
    settings = load_recipe(recipe, overrides).recipe
    findings: tuple[Finding, ...] = ()
    if deep:
        inputs, findings = deep_check(settings)
    else:
        inputs = load_inputs(settings, weights=False)
    table = inputs.train.table
    loader = build_loader(settings, inputs.train, inputs.tokenizer.pad_token_id)
    return CheckResult(
        audits=tuple(split.audit for split in (inputs.train, inputs.eval) if split),
        linear_layers=name_table(linear_layers(inputs.skeleton)),
        preview=tuple(preview(table, inputs.tokenizer, range(min(PREVIEW_ROWS, table.num_rows)))),
        num_steps=loader.num_steps(settings.train.epochs, settings.train.max_steps),
        num_params=sum(parameter.numel() for parameter in inputs.skeleton.parameters()),
        findings=findings,
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


def plan(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    vram: str | None = None,
    gpu: str | None = None,
    model: str | None = None,
) -> PlanResult:
    """What a recipe will hold of memory and disk, from the model's config alone: no weights, no data.

    `gpu` names a card ("RTX 4090"), `vram` gives its memory ("24GiB"); else it is planned for the device that training
    would find here. `model` stands in for model.path: a folder, a hub id, a GGUF file or a bare config.json.
    Raises RecipeError for an unknown card, ModelError where no config is found or the model cannot be trained.
    """
    settings = _planned_recipe(recipe, overrides, model)
    config = load_architecture(settings.model)
    check_length(config, settings.data.seq_len)
    kind, limit_bytes, device = _planned_device(settings, vram, gpu)
    found = plan_training(settings, config, device=kind, limit_bytes=limit_bytes)
    changes: tuple[Change, ...] = ()
    if limit_bytes is not None:
        changes = spend(found, limit_bytes) if found.fits(limit_bytes) else advise(found, limit_bytes)
    return PlanResult(found, device, limit_bytes, changes)


def plan_cards(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: Sequence[str] = (),
    models: Sequence[str] = (),
) -> PlanTable:
    """The largest micro-batch that fits, for models x cards x sequence lengths; the recipe's own model by default."""
    named = [_planned_recipe(recipe, overrides, model) for model in models or (None,)]
    return plan_table([(settings, load_architecture(settings.model)) for settings in named], gpus)


def _planned_recipe(recipe: Path, overrides: Sequence[str], model: str | None) -> Recipe:
    """A recipe whose files of rows may be absent."""
    if model is not None:
        path = Path(model).absolute() if Path(model).exists() else model
        overrides = [*overrides, f"model.path={json.dumps(str(path))}"]
    return load_recipe(recipe, overrides, with_data=False).recipe


def _planned_device(recipe: Recipe, vram: str | None, gpu: str | None) -> tuple[DeviceKind, int, str]:
    """What is planned for: its kind, its memory, and its name."""
    if vram is not None and gpu is not None:
        raise RecipeError("--gpu and --vram both say how much memory there is", fix="give one of them")
    if (vram is not None or gpu is not None) and recipe.model.device == "cpu":
        raise RecipeError("a card is named, and model.device is cpu", fix="remove --gpu or --vram, or model.device")
    if gpu is not None:
        card = find_card(gpu)
        older = "" if card.is_recent else "; older than its attention kernel and bfloat16, which this plan assumes"
        return "cuda", card.total_bytes, f"{card.name} ({card.total_gib:.2f} GiB{older})"
    if vram is not None:
        return "cuda", parse_memory(vram), f"a card of {vram}"
    device = resolve_device(recipe.model.device)
    if device.type == "cuda":
        import torch

        total = int(torch.cuda.get_device_properties(device).total_memory)
        return "cuda", total, torch.cuda.get_device_name(device)
    return "cpu", host_free_bytes(), "the CPUs of this machine"


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
    with memory_advice("lower eval.batch_size"):
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
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} is neither a run folder nor a model folder", fix="name run.dir or an export")
    if adapters:
        raise ModelError("an exported model takes no adapter", fix="chat with a run folder instead")
    import torch

    source = open_model_folder(folder)
    model = load_merged(folder, torch.bfloat16, resolve_device("auto"))
    return ChatSession(model, load_tokenizer(source), system=system)


def report(runs: Sequence[Path], target: Path | None = None) -> ReportResult:
    """Write one self-contained HTML page about a run, or about up to eight side by side.

    The page is `target`, else `report.html` in the run folder of a single run, and in the current folder for several.
    A run that has not ended gets its page too; what is absent or damaged is named on it and in the result.
    Raises RecipeError for a folder that is no run folder and for a file that is no page of ours, which stays as it is;
    MachineError when the page cannot be written.
    """
    return write_report(runs, target)


def env() -> dict[str, Any]:
    """Versions and machine, for run folders and bug reports."""
    return environment()
