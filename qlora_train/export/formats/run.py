"""Formats: check all, then write, read back, measure and publish one after the other, each by its own rename."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.folders import publishing
from qlora_train.data.parity import MAX_ROWS, golden_prompts
from qlora_train.errors import MachineError, ModelError, RecipeError
from qlora_train.export.formats.card import format_card, format_figures
from qlora_train.export.formats.measure import FormatVerdict, measure
from qlora_train.export.formats.writers import FORMATS, Job, Written, refuse_unknown
from qlora_train.export.licence import copy_texts, find_licence
from qlora_train.export.record import record_export
from qlora_train.export.run import ExportResult, rows_to_verify, run_export
from qlora_train.export.verify import Reference, how_to_verify, observe_trained
from qlora_train.model.trained import FinishedRun

SAFETENSORS = "safetensors"
_ADAPTER_BYTES = 2**26  # room for a file of an adapter, where it is not known to be larger


@dataclass(frozen=True)
class FormatResult:
    """A published format."""

    format: str
    title: str
    folder: Path
    num_bytes: int
    verdict: FormatVerdict
    commands: tuple[str, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class FormatsResult:
    """All formats that were asked for."""

    formats: tuple[FormatResult, ...]
    merged: ExportResult | None = None  # where safetensors were among them


def export_formats(
    run: FinishedRun, target: Path, names: Sequence[str], *, on_done: Callable[[FormatResult], None] | None = None
) -> FormatsResult:
    """Publish a run in several formats: as `target` where it is one, else as `target`/NAME for each.

    Everything that can be refused beforehand is, for all formats, before anything is written. A format that is further
    from the trained model than the recipe allows ends the export: those before it stay published, it is not.
    `on_done` hears of each as it is published.
    Raises RecipeError for unknown formats and names that are taken, MachineError for want of room, ModelError as above.
    """
    names = list(dict.fromkeys(names))
    refuse_unknown(names)
    _refuse_unmeasured(run, names)
    folders = {name: target if len(names) == 1 else target / name for name in names}
    _refuse_taken(folders)
    source = run.source()
    tokenizer = run.tokenizer(source)
    rows = rows_to_verify(run, tokenizer)
    golden = golden_prompts(rows.read(range(min(MAX_ROWS, rows.table.num_rows))), tokenizer)
    ends = read_json(run.run_dir.data)["end_token_ids"]
    licence = find_licence(run, source)
    job = Job(run, source, tokenizer, ends, golden, target.absolute().name, licence)
    wanted = [name for name in names if name != SAFETENSORS]
    for name in wanted:
        FORMATS[name].check(job)
    _check_room(run, target, wanted)
    merged = run_export(run, folders[SAFETENSORS]) if SAFETENSORS in names else None
    if not wanted:
        return FormatsResult((), merged)
    reference = observe_trained(run, source, rows, tokenizer.pad_token_id, how_to_verify(run))
    results = []
    for name in wanted:
        results.append(_publish(job, reference, name, folders[name]))
        if on_done is not None:
            on_done(results[-1])
    return FormatsResult(tuple(results), merged)


def _publish(job: Job, reference: Reference, name: str, target: Path) -> FormatResult:
    kind, run = FORMATS[name], job.run
    with publishing(target, manifest={"base_digest": run.base_print.digest, "format": name}) as folder:
        written = kind.write(job, folder)
        onto = kind.onto(job)
        verdict = measure(run, job.source, reference, written.weights, onto=onto, lossy=kind.lossy, dtype=kind.dtype)
        if not verdict.accepted:
            record_export(run, target, verdict)
            raise _too_far(name, verdict, lossy=kind.lossy)
        card = format_card(kind.title, job.name, run, verdict, job.licence, written.commands, written.notices)
        copy_texts(job.source, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        figures = format_figures(name, run, verdict, written.notices)
        (folder / "export.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    record_export(run, target, verdict)
    return _result(name, target, verdict, written)


def _result(name: str, target: Path, verdict: FormatVerdict, written: Written) -> FormatResult:
    num_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    commands = tuple(command.replace("THIS_FOLDER", shlex.quote(str(target))) for command in written.commands)
    return FormatResult(name, FORMATS[name].title, target, num_bytes, verdict, commands, written.notices)


def _too_far(name: str, verdict: FormatVerdict, *, lossy: bool) -> ModelError:
    """Why a format was not published, with its measured price and how to accept it."""
    kl, off = verdict.merged, verdict.adapter_off
    if not verdict.layers_hold and verdict.worst_layer is not None:
        return ModelError(
            f"--format {name}: {verdict.worst_layer.name} is not the trained one: the layer's output is off by "
            f"{verdict.worst_layer.ratio:.3g} times what rounding explains",
            fix="report this; nothing of this format was published",
        )
    what = (
        f"--format {name} is not the model that was trained: KL {kl.mean_kl:.3g} nats per token is "
        f"{verdict.kl_frac:.1%} of the adapter's own effect ({off.mean_kl:.3g}); it agrees on {kl.top1_agreement:.1%} "
        f"of tokens, and the loss is {kl.candidate_nll:.4f} in place of {kl.reference_nll:.4f}"
    )
    if verdict.onto == "original":
        rise = f"export.max_loss_rise={verdict.loss_rise * 1.05:.2g}"
        return ModelError(what, fix=f"give export.base=dequantized, or take the loss knowingly: {rise}")
    if not lossy:
        finer = "use gguf-f32" if FORMATS[name].dtype in (torch.float16, torch.bfloat16) else "report this"
        return ModelError(what, fix=f"{finer}; nothing of this format was published")
    if kl.mean_kl >= off.mean_kl:
        return ModelError(
            f"{what}: nothing of the training is left",
            fix="serve the 4-bit base with the adapter on it: --format nf4-lora; nothing of this format was published",
        )
    return ModelError(
        what,
        fix="use --format nf4-lora, which is exact in 4 bit, or gguf-q8_0; or accept this one: "
        f"export.max_kl={kl.mean_kl * 1.1:.2g}; nothing of this format was published",
    )


def _refuse_unmeasured(run: FinishedRun, names: Sequence[str]) -> None:
    """What to merge onto is measured on safetensors only."""
    if run.recipe.export.base == "auto" and list(names) != [SAFETENSORS]:
        raise RecipeError(
            "export.base: auto compares ways to merge, and formats are written from one of them",
            fix="export without --format first, and give export.base=dequantized or export.base=original for these",
        )


def _refuse_taken(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        if folder.exists():
            raise RecipeError(f"{folder} exists already", fix="remove it or choose another folder; it was not touched")


def _check_room(run: FinishedRun, target: Path, names: Sequence[str]) -> None:
    needed = sum(
        _ADAPTER_BYTES if FORMATS[name].adapter_only else int(run.num_merged_params * FORMATS[name].bits / 8)
        for name in names
    )
    folder = next(path for path in target.absolute().parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MachineError(
            f"{target} needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} GiB free", fix="free space"
        )
