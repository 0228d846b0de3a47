"""Formats: check all, then write, read back, measure and publish one after the other, each by its own rename."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.folders import publishing
from qlora_train.data.parity import MAX_ROWS, golden_prompts
from qlora_train.data.split import Split
from qlora_train.errors import Collected, MachineError, ModelError, RecipeError
from qlora_train.export.choice import Choice
from qlora_train.export.clock import Clock
from qlora_train.export.formats.card import FormatFacts, format_card, format_figures
from qlora_train.export.formats.measure import FormatVerdict, measure
from qlora_train.export.formats.writers import FORMATS, Format, Job, Written, refuse_unknown
from qlora_train.export.licence import copy_texts, find_licence
from qlora_train.export.push import check_push, push
from qlora_train.export.record import record_export
from qlora_train.export.run import (
    ExportResult,
    Measured,
    measure_trained,
    memory_advice,
    onto_of,
    rows_to_verify,
    run_export,
)
from qlora_train.export.unread import SAFETENSORS
from qlora_train.model.trained import FinishedRun

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
    pushed_to: str | None = None  # its address on the hub


@dataclass(frozen=True)
class FormatsResult:
    """All formats that were asked for."""

    formats: tuple[FormatResult, ...]
    merged: ExportResult | None = None  # where safetensors were among them
    choice: Choice | None = None  # what was measured for `export.base: auto`


@dataclass(frozen=True)
class Heard:
    """Who hears of an export while it goes on: of each stage, of what to merge onto, of each published format."""

    stage: Callable[[str], None] = lambda line: None
    choice: Callable[[Choice], None] = lambda choice: None
    published: Callable[[FormatResult], None] = lambda result: None


def export_formats(
    run: FinishedRun,
    target: Path,
    names: Sequence[str],
    *,
    repository: str | None = None,
    heard: Heard | None = None,
) -> FormatsResult:
    """Publish a run in several formats: as `target` where it is one, else as `target`/NAME for each.

    Everything that can be refused beforehand is, for all formats, before anything is written. What to merge onto is
    measured once for all of them. A format that is further from the trained model than the recipe allows ends the
    export: those before it stay published, it is not. `repository`: all are uploaded once all are published, to the
    names that `repositories` gives.
    Raises RecipeError for unknown formats and names that are taken, MachineError for want of room and where the hub
    refuses, ModelError as above.
    """
    heard, names = heard or Heard(), list(dict.fromkeys(names))
    refuse_unknown(names)
    _refuse_unmerged(run, names)
    folders = {name: target if len(names) == 1 else target / name for name in names}
    _refuse_taken(folders)
    pushed = {} if repository is None else repositories(repository, names)
    for address in pushed.values():
        check_push(address)
    clock = Clock(heard.stage)
    job, reads = _job(run, target.absolute().name)
    wanted = [name for name in names if name != SAFETENSORS]
    for name in wanted:
        FORMATS[name].check(job)
    _check_room(run, target, names)
    with memory_advice(run, "while the trained model was run"):
        measured = measure_trained(run, job.source, job.tokenizer, reads, clock)
    if measured.choice is not None:
        heard.choice(measured.choice)
    job = replace(job, onto=onto_of(run, measured.choice))
    merged: ExportResult | None = None
    results: list[FormatResult] = []
    addresses: dict[str, str] = {}
    failed = Collected()
    with failed:
        for name in names:
            if name == SAFETENSORS:
                merged = run_export(run, folders[name], say=heard.stage, measured=measured)
                continue
            heard.stage(f"writing {name}")
            with memory_advice(run, f"while {name} was written and measured", saved=f"nothing of {name} was published"):
                results.append(_publish(job, measured, name, folders[name], heard.stage))
            heard.published(results[-1])
    with failed:  # also where a later format was refused: a folder that is there was published now
        there = {name: repository for name, repository in pushed.items() if folders[name].is_dir()}
        addresses = _push_all(folders, there, heard.stage)
    failed.raise_if_any()
    return FormatsResult(
        tuple(replace(result, pushed_to=addresses.get(result.format)) for result in results),
        merged if merged is None else replace(merged, pushed_to=addresses.get(SAFETENSORS)),
        measured.choice,
    )


def repositories(repository: str, names: Sequence[str]) -> dict[str, str]:
    """Where on the hub each format goes: one alone, and safetensors, to the name itself; of several each to its own.

    >>> repositories("me/model", ["gguf-f16"]), repositories("me/model", ["safetensors", "lora"])
    ({'gguf-f16': 'me/model'}, {'safetensors': 'me/model', 'lora': 'me/model-lora'})
    """
    alone = len(names) == 1
    return {name: repository if alone or name == SAFETENSORS else f"{repository}-{name}" for name in names}


def _push_all(folders: Mapping[str, Path], pushed: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """The addresses of what was uploaded. MachineError, once all were tried, that names each upload that failed."""
    addresses: dict[str, str] = {}
    failed = Collected()
    for name, repository in pushed.items():
        say(f"uploading {name} to {repository}")
        with failed:
            addresses[name] = push(folders[name], repository, what=name)
            say(f"uploaded {name}: {addresses[name]}")
    failed.raise_if_any()
    return addresses


def _job(run: FinishedRun, name: str) -> tuple[Job, Split]:
    """What the writers work from, and the rows that what they write is measured on."""
    source = run.source()
    tokenizer = run.tokenizer(source)
    rows = rows_to_verify(run, tokenizer)
    golden = golden_prompts(rows.read(range(min(MAX_ROWS, rows.table.num_rows))), tokenizer)
    ends = read_json(run.run_dir.data)["end_token_ids"]
    return Job(run, source, tokenizer, ends, golden, name, find_licence(run, source)), rows


def _publish(job: Job, measured: Measured, name: str, target: Path, say: Callable[[str], None]) -> FormatResult:
    kind, run = FORMATS[name], job.run
    with publishing(target, manifest={"base_digest": run.base_print.digest, "format": name}) as folder:
        written = kind.write(job, folder)
        onto = kind.onto(job)
        verdict = measure(
            run, job.source, measured.reference, written.weights, onto=onto, lossy=kind.lossy, dtype=kind.dtype
        )
        if not verdict.accepted:
            record_export(run, target, verdict, say, stored=name)
            raise _too_far(name, verdict, lossy=kind.lossy)
        facts = _facts(job, measured, name, kind, verdict, written)
        copy_texts(job.source, folder)
        (folder / "README.md").write_text(format_card(facts), encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(format_figures(facts), indent=1), encoding="utf-8")
    record_export(run, target, verdict, say, stored=name)
    return _result(name, target, verdict, written)


def _facts(
    job: Job, measured: Measured, name: str, kind: Format, verdict: FormatVerdict, written: Written
) -> FormatFacts:
    return FormatFacts(
        run=job.run,
        audit=read_json(job.run.run_dir.data),
        format=name,
        title=kind.title,
        name=job.name,
        merges=kind.merges,
        verdict=verdict,
        licence=job.licence,
        commands=written.commands,
        notices=written.notices,
        choice=measured.choice if kind.merges else None,
    )


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


def _refuse_unmerged(run: FinishedRun, names: Sequence[str]) -> None:
    """An adapter alone stands on the base that it was trained on: there is nothing to choose."""
    base = run.recipe.export.base
    if base != "dequantized" and not any(name == SAFETENSORS or FORMATS[name].merges for name in names):
        raise RecipeError(
            f"export.base: {base} has no effect on {', '.join(names)}: an adapter that is not merged stays on the base "
            "that it was trained on",
            fix="give export.base=dequantized, or name a format that merges, as gguf-f16",
        )


def _refuse_taken(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        if folder.exists():
            raise RecipeError(f"{folder} exists already", fix="remove it or choose another folder; it was not touched")


def _check_room(run: FinishedRun, target: Path, names: Sequence[str]) -> None:
    needed = sum(max(_ADAPTER_BYTES, int(run.num_merged_params * _bits(run, name) / 8)) for name in names)
    folder = next(path for path in target.absolute().parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MachineError(
            f"{target} needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} GiB free", fix="free space"
        )


def _bits(run: FinishedRun, name: str) -> float:
    """Of a weight in a format."""
    if name != SAFETENSORS:
        return FORMATS[name].bits
    dtype: torch.dtype = getattr(torch, run.recipe.export.export_dtype)
    return 8.0 * dtype.itemsize
