"""A whole training run: evaluate the base, train, evaluate the adapter, and leave a run folder that explains itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_train.adapters.state import restore_adapter, save_adapter
from qlora_train.artifacts import (
    MANIFEST,
    TEMPORARY_PREFIX,
    TRASH_PREFIX,
    RunDir,
    locked,
    publishing,
    read_json,
    retire,
    sweep,
    write_file,
    write_json,
)
from qlora_train.data.account import account_for, write_account
from qlora_train.environment import environment
from qlora_train.errors import RecipeError, ResumeError
from qlora_train.evaluate.sides import SideScores, score_side
from qlora_train.evaluate.validation import Validation
from qlora_train.model.load import memory_advice
from qlora_train.model.table import dtype_table
from qlora_train.quant.fingerprint import print_base
from qlora_train.recipe.load import LoadedRecipe, resolved_yaml
from qlora_train.recipe.schema import Recipe
from qlora_train.train.checkpoint import Checkpoint, find_checkpoint, list_steps, restore_checkpoint, retire_newer
from qlora_train.train.loop import evaluate_now, rehearse, run_loop
from qlora_train.train.metrics import Metrics, Reporter, peak_memory_bytes
from qlora_train.train.selfcheck import SelfCheck, selfcheck
from qlora_train.train.setup import Prepared, prepare
from qlora_train.train.signals import stop_requests
from qlora_train.train.state import TrainState, trajectory_keys


@dataclass(frozen=True)
class TrainResult:
    """What came of a run. `base` and `adapter` are None where the recipe names no held-out rows."""

    run_dir: Path
    num_steps: int
    best_step: int | None
    base: SideScores | None
    adapter: SideScores | None
    num_trainable: int
    trainable_frac: float
    num_supervised_tokens: int
    supervised_tokens_per_s: float
    tokens_per_s: float
    peak_memory_bytes: int
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the run folder by its name, so that it can be moved."""
        return {**asdict(self), "run_dir": self.run_dir.name}

    @classmethod
    def from_dict(cls, run_dir: Path, data: dict[str, Any]) -> TrainResult:
        """The inverse of `as_dict`."""
        sides = {k: SideScores.from_dict(data[k]) if data[k] else None for k in ("base", "adapter")}
        return cls(**{**data, **sides, "run_dir": run_dir})


def run_training(loaded: LoadedRecipe, *, resume: bool, from_step: int | None, reporter: Reporter) -> TrainResult:
    """Train a recipe from start to end; see `api.train` for what it raises."""
    recipe, run_dir, started = loaded.recipe, RunDir(loaded.recipe.run.dir), time.perf_counter()
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    if not resume:
        refuse_used(run_dir)
    elif from_step is None and run_dir.summary.is_file():
        _refuse_other_recipe(run_dir, recipe)
        reporter.message(f"{run_dir.root} is already complete; nothing was done")
        return TrainResult.from_dict(run_dir.root, read_json(run_dir.summary))
    elif not run_dir.root.is_dir():
        raise ResumeError(f"{run_dir.root} does not exist: there is nothing to resume", fix="start without --resume")
    with locked(run_dir), stop_requests() as stop, memory_advice():
        sweep(run_dir.root)
        sweep(run_dir.checkpoints)
        checkpoint = _checkpoint_to_resume(run_dir, from_step, reporter) if resume else None
        prepared = prepare(recipe, run_dir, reporter)
        stop.check()
        job, state = prepared.job, TrainState()
        if checkpoint is not None:
            state = restore_checkpoint(checkpoint, job.model, job.optimizer, job.binding)
            run_dir.summary.unlink(missing_ok=True)
            retire_newer(run_dir, state.step)
            _forget_lost_best(run_dir, state, reporter)
            _forget_other_best(prepared, state)
            reporter.message(f"resumed from {checkpoint.folder.name}")
        packed = recipe.data.batching == "packed"
        checked = selfcheck(
            job.causal, prepared.inputs.train.table, job.pad_token_id, job.accelerator.device, packed=packed
        )
        reporter.message(f"selfcheck: {checked.summary()}")
        _write_facts(loaded, prepared, checked)
        _describe(prepared, reporter)
        largest = rehearse(job)
        num_lines, num_tokens = largest.input_ids.shape
        reporter.message(
            f"rehearsed the largest micro-batch, {num_lines} {'packs' if packed else 'rows'} of {num_tokens} tokens: "
            f"peak memory {peak_memory_bytes(job.accelerator.device) / 2**30:.2f} GiB"
        )
        stop.check()
        base_scores = _base_scores(prepared, resumed=checkpoint is not None)
        stop.check()
        metrics = Metrics(run_dir.metrics, after_step=state.step)
        validation = run_loop(job, state, metrics, stop)
        if metrics.failed:
            reporter.warning(f"metrics are incomplete: {metrics.failed}")
        if print_base(job.model).digest != prepared.base.print.digest:
            raise AssertionError("the frozen base changed during training")
        adapter_scores = _adapter_scores(prepared, state, validation)
        with _publishing_again(
            run_dir.adapter, {"step": state.best_step or state.step, **job.binding.as_dict()}
        ) as folder:
            save_adapter(job.model, folder)
        result = TrainResult(
            run_dir=run_dir.root,
            num_steps=state.step,
            best_step=state.best_step,
            base=base_scores,
            adapter=adapter_scores,
            num_trainable=prepared.facts.num_trainable,
            trainable_frac=prepared.facts.trainable_frac,
            num_supervised_tokens=state.num_supervised_tokens,
            supervised_tokens_per_s=state.num_supervised_tokens / max(state.train_s, 1e-9),
            tokens_per_s=state.num_tokens / max(state.train_s, 1e-9),
            peak_memory_bytes=peak_memory_bytes(job.accelerator.device),
            wall_s=time.perf_counter() - started,
        )
        write_json(run_dir.summary, result.as_dict())
        return result


def refuse_used(run_dir: RunDir) -> None:
    """A new run starts in a new folder: nothing of an older one is touched."""
    if run_dir.root.exists() and not run_dir.root.is_dir():
        raise RecipeError(f"run.dir: {run_dir.root} is a file", fix="name a folder")
    if steps := list_steps(run_dir):
        raise RecipeError(
            f"run.dir: {run_dir.root} already holds a run with checkpoints up to step {max(steps)}",
            fix="choose another run.dir, or remove the folder; training goes on with `train --resume`",
        )
    # A run that ended before its first checkpoint left facts behind that the next one writes anew.
    own = {path.name for path in run_dir.facts()}
    there = sorted(p.name for p in run_dir.root.iterdir() if p.name not in own) if run_dir.root.is_dir() else []
    if foreign := [name for name in there if not name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))]:
        raise RecipeError(
            f"run.dir: {run_dir.root} holds other things already ({', '.join(foreign[:6])})",
            fix="choose another run.dir, or empty this one",
        )


def _refuse_other_recipe(run_dir: RunDir, recipe: Recipe) -> None:
    """A finished run is only "already complete" for the recipe that it was trained with."""
    stored = read_json(run_dir.adapter / MANIFEST)["recipe"]
    now = json.loads(json.dumps(trajectory_keys(recipe)))
    if differing := [f"{k}: {stored.get(k)} then, {v} now" for k, v in now.items() if stored.get(k) != v]:
        raise ResumeError(
            f"{run_dir.root} was trained with another recipe: {'; '.join(differing)}", fix="choose another run.dir"
        )


def _checkpoint_to_resume(run_dir: RunDir, from_step: int | None, reporter: Reporter) -> Checkpoint:
    checkpoint, warnings = find_checkpoint(run_dir, from_step)
    for warning in warnings:
        reporter.warning(warning)
    return checkpoint


def _forget_lost_best(run_dir: RunDir, state: TrainState, reporter: Reporter) -> None:
    """The best adapter so far must still be there to be published in the end."""
    if state.best_step is None:
        return
    try:
        find_checkpoint(run_dir, state.best_step)
    except ResumeError as error:
        reporter.warning(f"the best checkpoint so far is lost: {error}")
        state.best_step = state.best_eval_loss = None


def _write_facts(loaded: LoadedRecipe, prepared: Prepared, checked: SelfCheck) -> None:
    """What the run is made of, before it starts."""
    run_dir = prepared.job.run_dir
    write_file(run_dir.recipe, resolved_yaml(loaded).encode())
    write_json(run_dir.environment, environment())
    inputs, recipe = prepared.inputs, loaded.recipe
    if template := inputs.tokenizer.chat_template:
        write_file(run_dir.chat_template, str(template).encode())
    source = {"name": inputs.source.name, "commit": inputs.source.commit, "file_sha256": inputs.source.file_sha256}
    write_json(run_dir.base, {"source": source, **prepared.base.print.as_dict()})
    train, held_out = inputs.train, inputs.eval
    account = account_for(recipe, train, held_out, inputs.tokenizer, prepared.job.loader)
    if unreached := account.batching.num_unreached_rows:
        prepared.job.reporter.warning(f"{unreached:,} kept rows come in none of the steps")
    facts = {
        "files": [
            {"name": source.source.name, "kind": source.source.kind, "sha256": source.digest}
            for split in (train, held_out)
            if split
            for source in split.sources
        ],
        "selfcheck": checked.as_dict(),
        "end_token_ids": train.end_token_ids,
        "conversations": train.holds_conversations(),
    }
    write_account(run_dir, {**account.as_dict(recipe), **facts}, train, held_out)


def _describe(prepared: Prepared, reporter: Reporter) -> None:
    """The table of dtypes, and the adapter against full fine-tuning."""
    for row in dtype_table(prepared.base.print):
        names = ", ".join(row.names[:8]) + (", ..." if len(row.names) > 8 else "")
        reporter.message(
            f"base: {row.num_tensors:>4} tensors in {row.kind:<8} {row.num_params / 1e6:>10,.1f}M parameters "
            f"{row.num_bytes / 2**20:>10,.1f} MiB  {names}"
        )
    for line in prepared.speed.summary():
        reporter.message(line)
    if not prepared.speed.choice.fits:
        reporter.warning(
            "more than is free, or than train.memory_limit_gib: lower train.micro_batch_size, data.seq_len or adapter.r"
        )
    facts = prepared.facts
    # float32 adapter, gradient and two AdamW moments, against bf16 weights and gradients with float32 moments.
    adapter_mib, full_mib = facts.num_trainable * 16 / 2**20, (facts.num_trainable + facts.num_frozen) * 12 / 2**20
    reporter.message(
        f"adapter: {facts.num_trainable:,} trainable parameters ({facts.trainable_frac:.2%}) on "
        f"{len(facts.modules)} layers; {adapter_mib:,.0f} MiB with gradient and AdamW moments, "
        f"full fine-tuning {full_mib:,.0f} MiB"
    )


def _measured_on(prepared: Prepared) -> dict[str, Any]:
    """What figures of base and adapter depend on besides the model: they compare only where it is the same."""
    split, section = prepared.inputs.eval, prepared.job.recipe.eval
    rows = split.table.fingerprint() if split else None
    return {"rows": rows, "generate_rows": section.generate_rows, "max_new_tokens": section.max_new_tokens}


def _stored_scores(prepared: Prepared) -> dict[str, Any]:
    """What `eval.json` holds of an earlier part of this run."""
    path = prepared.job.run_dir.evaluation
    return dict(read_json(path)) if path.is_file() else {"measured_on": {}}


def _forget_other_best(prepared: Prepared, state: TrainState) -> None:
    """A held-out loss says which checkpoint is best only among those measured on the same rows."""
    if state.best_step is None:
        return
    if _stored_scores(prepared)["measured_on"].get("rows") != _measured_on(prepared)["rows"]:
        prepared.job.reporter.warning("the held-out rows have changed: which checkpoint is best is judged from here on")
        state.best_step = state.best_eval_loss = None


def _base_scores(prepared: Prepared, *, resumed: bool) -> SideScores | None:
    """The base without the adapter; measured once per run, whatever is resumed."""
    path, split, job = prepared.job.run_dir.evaluation, prepared.inputs.eval, prepared.job
    if split is None:
        return None
    if resumed and (stored := _stored_scores(prepared))["measured_on"] == _measured_on(prepared):
        return SideScores.from_dict(stored["base"])
    with job.model.disable_adapter():
        scores = score_side(job.causal, prepared.inputs.tokenizer, split, job.recipe.eval)
    write_json(path, {"measured_on": _measured_on(prepared), "base": scores.as_dict(), "adapter": None})
    job.reporter.evaluation(0, scores.loss)
    return scores


def _adapter_scores(prepared: Prepared, state: TrainState, validation: Validation | None) -> SideScores | None:
    """Put the best adapter in place and measure it; `eval.json` then holds both sides."""
    job, split = prepared.job, prepared.inputs.eval
    if state.best_step is not None and state.best_step != state.step:
        restore_adapter(job.model, find_checkpoint(job.run_dir, state.best_step)[0].folder)
        validation = None
    if split is None:
        return None
    scores = score_side(
        job.causal,
        prepared.inputs.tokenizer,
        split,
        job.recipe.eval,
        validation=validation or evaluate_now(job, split.table),
    )
    write_json(job.run_dir.evaluation, {**read_json(job.run_dir.evaluation), "adapter": scores.as_dict()})
    return scores


@contextmanager
def _publishing_again(target: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Publish a folder in place of an older one of the same name."""
    if target.exists():
        retire(target)
    with publishing(target, manifest=manifest) as folder:
        yield folder
