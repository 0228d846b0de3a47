"""One public function per verb of the command line, each with a typed result. Nothing here prints or exits.

All of them raise subclasses of `errors.UserError` for what the user can mend, with every problem that is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.adapters.inits.residual import untrained
from qlora_train.adapters.updates import Delta
from qlora_train.analysis.before import NO_START, Before, corrections_of, keeps_no_start
from qlora_train.analysis.compress import Ask
from qlora_train.analysis.files import write_analysis
from qlora_train.analysis.folder import open_adapter, refuse_existing
from qlora_train.analysis.look import Analysis, Subject, look_into
from qlora_train.analysis.starts import start_of
from qlora_train.analysis.thin import matrices_of, thin
from qlora_train.analysis.tools import (
    AdapterDiff,
    AdapterInfo,
    CombinationType,
    MadeAdapter,
    ResizedAdapter,
    combine_adapters,
    describe_adapter,
    diff_adapters,
    fold_adapter,
    resize_adapter,
)
from qlora_train.artifacts.files import explained
from qlora_train.artifacts.folders import locked
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.account import Account, account_for, build_loader, steps_notice, write_account
from qlora_train.data.audit import Audit
from qlora_train.data.preview import PreviewRow, preview
from qlora_train.data.split import load_splits
from qlora_train.environment import environment
from qlora_train.errors import DataError, ModelError, RecipeError, UserError
from qlora_train.evaluate.chat import ChatSession
from qlora_train.evaluate.sides import SideScores, score_side
from qlora_train.evaluate.validation import BASE_FIX
from qlora_train.export.base import BaseReader
from qlora_train.export.formats.run import FormatResult, FormatsResult, Heard
from qlora_train.export.formats.run import export_formats as publish_formats
from qlora_train.export.run import ExportResult, run_export
from qlora_train.export.unread import SAFETENSORS, refuse_unread
from qlora_train.export.verify import load_merged
from qlora_train.memory.answer import PlanResult, answer, planned_recipe
from qlora_train.memory.table import PlanTable, plan_table
from qlora_train.model.architecture import load_architecture
from qlora_train.model.binding import refuse_other_base
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import open_model_folder
from qlora_train.model.load import memory_advice, resolve_device
from qlora_train.model.lord import planned_config
from qlora_train.model.skeleton import check_length, linear_layers, load_config, load_tokenizer, name_table
from qlora_train.model.source import resolve_source
from qlora_train.model.tokens import add_new_tokens
from qlora_train.model.trained import MEASURED_ON, load_trained, open_run
from qlora_train.recipe.advice import near_files
from qlora_train.recipe.load import LoadedRecipe, load_recipe
from qlora_train.recipe.sources import is_hub_id
from qlora_train.report.run import ReportResult, write_report
from qlora_train.train.deepcheck import Finding, deep_check, refuse_failed
from qlora_train.train.metrics import Reporter, Silent
from qlora_train.train.replay import Replay, run_replay
from qlora_train.train.run import TrainResult, refuse_used, run_training
from qlora_train.train.setup import load_inputs

__all__ = [
    "AdapterDiff",
    "AdapterInfo",
    "Analysis",
    "ChatSession",
    "CheckResult",
    "DataResult",
    "EvalResult",
    "ExportResult",
    "FormatResult",
    "FormatsResult",
    "Heard",
    "LoadedRecipe",
    "MadeAdapter",
    "PlanResult",
    "Replay",
    "ReportResult",
    "ResizedAdapter",
    "TrainResult",
    "adapter_combine",
    "adapter_diff",
    "adapter_fold",
    "adapter_info",
    "adapter_resize",
    "analyze",
    "check",
    "data",
    "env",
    "evaluate",
    "export",
    "export_formats",
    "open_chat",
    "plan",
    "plan_cards",
    "replay",
    "report",
    "train",
]

PREVIEW_ROWS = 5
# What may be said anew of a finished run that is exported.
EXPORT_SETTINGS = ("export", "eval.generate_rows", "eval.max_new_tokens", "eval.batch_size", *MEASURED_ON)


@dataclass(frozen=True)
class CheckResult:
    """What is known of a run before any weight is loaded."""

    audits: tuple[Audit, ...]
    linear_layers: dict[str, int]  # last name -> how many layers bear it
    preview: tuple[PreviewRow, ...]
    num_steps: int
    num_params: int
    notices: tuple[str, ...] = ()
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
        notices=tuple(
            filter(None, [inputs.tokens_notice(), inputs.unused_notice(), steps_notice(settings.train, loader)])
        ),
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
    with explained(run_dir.root):
        refuse_used(run_dir)
    source = resolve_source(settings.model, weights=False)
    check_length(load_config(source), settings.data.seq_len)
    tokenizer = load_tokenizer(source, settings.model.chat_template)
    add_new_tokens(tokenizer, settings.adapter.new_tokens)
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
    return answer(planned_recipe(recipe, overrides, model), vram=vram, gpu=gpu)


def plan_cards(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: Sequence[str] = (),
    models: Sequence[str] = (),
) -> PlanTable:
    """The largest micro-batch that fits, for models x cards x sequence lengths; the recipe's own model by default."""
    named = [planned_recipe(recipe, overrides, model) for model in models or (None,)]
    return plan_table([(one, planned_config(load_architecture(one.model), one)) for one in named], gpus)


def train(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    from_step: int | None = None,
    allow_change: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a recipe into its run folder, or go on from its newest checkpoint that verifies (or that of `from_step`).

    `allow_change` names keys of the recipe that decide what is trained and may differ from the checkpoint's: the run is
    a fork from there on, recorded in its folder.

    Raises RecipeError, DataError, ModelError before training; ResumeError when the checkpoint is another run's;
    MachineError for disk, lock and device; NumericsError before an update that is not finite; Interrupted after
    saving when a signal asked to stop.
    """
    loaded = load_recipe(recipe, overrides)
    shown = reporter or Silent()
    return run_training(loaded, resume=resume, from_step=from_step, allow_change=allow_change, reporter=shown)


def replay(
    recipe: Path, overrides: Sequence[str] = (), *, from_step: int | None = None, reporter: Reporter | None = None
) -> Replay:
    """Make logged steps of a run again, in memory, and compare: what a resume is worth on this machine.

    From the newest checkpoint (or that of `from_step`) after which steps were logged: two steps, or one where no second
    is not logged; or those up to the next checkpoint where it is near, whose adapter is compared too. Nothing of the
    run is changed; a line of `replays.jsonl` keeps what was compared, and where. Raises ResumeError where there is no
    such step, or the run is another one.
    """
    return run_replay(load_recipe(recipe, overrides), from_step=from_step, reporter=reporter or Silent())


def evaluate(run: Path, overrides: Sequence[str] = (), *, rows: Path | None = None) -> EvalResult:
    """Measure a run's base and adapter on its held-out rows, or on those of another file.

    `overrides` may change the recipe's `eval` section, e.g. `eval.generate_rows=1000`, and say which rows:
    `data.eval=FILE`, which `rows` is short for, and how they are read.
    """
    if rows is not None:
        if not rows.expanduser().exists() and not is_hub_id(str(rows)):
            raise RecipeError(f"there is no file {rows}", fix=near_files(rows) or "check the path", where="--rows")
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
        with untrained(trained.model):
            base = score_side(causal, trained.tokenizer, split, recipe.eval, fix=BASE_FIX)
    return EvalResult(base, adapter)


def export(
    run: Path,
    target: Path,
    overrides: Sequence[str] = (),
    *,
    push: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Merge a run's adapter into its base, verify the result, and publish it as the folder `target`.

    `push` names a repository on the hub to upload it to afterwards; `say` hears of each stage. `overrides` may change
    the recipe's `export` section, how many answers `export.base: auto` compares, and the rows.

    Raises RecipeError when `target` exists, MachineError when the disk is too small or the hub refuses, and ModelError
    when the base is not the one that was trained on or the merged model is further from the trained one, or worse,
    than the recipe allows. In each case but a failed upload nothing appears under the name `target`.
    """
    finished = open_run(run, overrides, sections=EXPORT_SETTINGS)
    refuse_unread(overrides, [SAFETENSORS], finished.recipe.export.base)
    return run_export(finished, target, repository=push, say=say)


def export_formats(
    run: Path,
    target: Path,
    formats: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    push: str | None = None,
    heard: Heard | None = None,
) -> FormatsResult:
    """Publish a run in the formats that servers load: as `target` where it is one, else as `target`/FORMAT for each.

    Formats: safetensors, gguf-f16 and others (export/formats/writers.py). `push` names a repository on the hub to
    upload them to afterwards: of several, each but safetensors goes to a repository of its own, PUSH-FORMAT. `heard`
    hears of stages, of what `export.base: auto` found, and of each format as it is published.
    Raises as `export` does, and ModelError for a model that a format's servers compute otherwise, before any work.
    """
    finished = open_run(run, overrides, sections=EXPORT_SETTINGS)
    refuse_unread(overrides, formats, finished.recipe.export.base)
    return publish_formats(finished, target, formats, repository=push, heard=heard)


def open_chat(folder: Path, *, adapters: Sequence[Path] = (), system: str | None = None) -> ChatSession:
    """A conversation with a run (its base with its adapter) or with an exported folder.

    `adapters` are further runs on the same base; each goes by its folder's name.
    """
    if RunDir(folder).recipe.is_file():
        run, others = open_run(folder), [open_run(other) for other in adapters]
        for further in others:
            refuse_other_base(further.base_print, run.base_print)
        if others and any(one.recipe.adapter.new_tokens for one in (run, *others)):
            raise ModelError(
                "an adapter with new tokens (adapter.new_tokens) has a tokenizer of its own", fix="chat with it alone"
            )
        trained = load_trained(run)
        session = ChatSession(
            trained.model,
            trained.tokenizer,
            system=system,
            name=folder.resolve().name,
            conversations=trained.conversations,
        )
        for other, further in zip(adapters, others, strict=True):
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


def adapter_info(adapter: Path) -> AdapterInfo:
    """Method, rank, scaling, targets, norms and effective ranks of an adapter, and the base that it belongs to.

    Here and below an adapter is a run folder, one of its checkpoints, or a folder that PEFT saved. ModelError where it
    is none, or is damaged.
    """
    return describe_adapter(adapter)


def adapter_combine(
    adapters: Sequence[Path],
    target: Path,
    *,
    weights: Sequence[float] | None = None,
    combination_type: CombinationType = "cat",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> MadeAdapter:
    """The weighted sum of adapters of one base as the folder `target`, laid out like a run; weights may be negative.

    `cat` is exact, of rank r1 + r2 + ...; with `r` it is the nearest of that rank. `ties` and `dare` take all but
    `density` of the values out of each update first, and need `r`. Raises RecipeError for arguments that do not go
    together and when `target` exists; ModelError for adapters of different bases, naming both, or of other shapes.
    """
    return combine_adapters(
        adapters, target, weights=weights, combination_type=combination_type, r=r, density=density, seed=seed
    )


def adapter_resize(
    adapter: Path,
    target: Path,
    *,
    r: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    per_module: bool = False,
    seed: int = 0,
) -> ResizedAdapter:
    """An adapter of another rank as the folder `target`: `r` itself, or the smallest that keeps what is asked.

    `energy`: every module keeps this share of its squared norm. `error`: over all modules together, at most this share
    of the norm is lost. All modules get one rank; with `per_module` each its own. Raises as `adapter_combine`.
    """
    return resize_adapter(adapter, target, Ask(r, energy, error), per_module=per_module, seed=seed)


def adapter_fold(adapter: Path, target: Path) -> MadeAdapter:
    """The same update as plain LoRA with scaling 1, as the folder `target`. ModelError where no plain LoRA does it."""
    return fold_adapter(adapter, target)


def adapter_diff(first: Path, second: Path) -> AdapterDiff:
    """How far two adapters of one base are from each other. ModelError for different bases, naming both."""
    return diff_adapters(first, second)


def analyze(runs: Sequence[Path], target: Path | None = None, *, with_base: bool = True) -> Analysis:
    """Look into one adapter, or into two and what they share; with `target`, write figures and plots there.

    With `with_base` each adapted weight of the base is read, quantised as in training and compared with its update;
    where the base is not at hand, a notice says so. Raises RecipeError for more than two and when `target` exists.
    """
    if not 1 <= len(runs) <= 2:
        raise RecipeError(f"{len(runs)} adapters; one or two can be looked into", fix="name one or two")
    if target is not None:
        refuse_existing(target)
    notices: list[str] = []
    analysis = look_into([_subject(run, with_base, notices) for run in runs], notices)
    if target is not None:
        write_analysis(analysis, target)
    return analysis


def _subject(run: Path, with_base: bool, notices: list[str]) -> Subject:
    """An adapter with what can be known of its start and its base."""
    opened = open_adapter(run)
    name, method, r = run.resolve().name, opened.method.name, opened.config.r
    start = before = None
    if opened.run_dir is not None and with_base:
        try:
            finished = open_run(opened.run_dir.root)
            source = finished.source()
            reader = BaseReader(finished, source)
            before = Before(reader, corrections_of(reader, opened.updates()) if keeps_no_start(opened.config) else {})
            start = start_of(finished, source)
        except UserError as error:
            notices.append(f"{run}: its base is not looked at: {error.problems[0].what}")
    starts = before.corrections if before else {}
    if keeps_no_start(opened.config) and not starts:
        notices.append(f"{run}: what A and B began with counts as change: {NO_START}")
    read_weight = before.weight if before else None
    updates, left_out = matrices_of(opened.changes(starts))
    notices += [f"{run}: {what}" for what in left_out]
    plain = {module: update for module, update in updates.items() if isinstance(update, Delta)}
    if len(plain) == len(updates) or read_weight is None:
        return Subject(name, method, r, plain if len(plain) == len(updates) else opened.deltas(), start, read_weight)
    deltas, notice = thin(updates, read_weight, 4 * r)
    notices.append(f"{run}: {notice}")
    return Subject(name, method, r, deltas, None, read_weight)


def env() -> dict[str, Any]:
    """Versions and machine, for run folders and bug reports."""
    return environment()
