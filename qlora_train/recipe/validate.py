"""What is wrong in a recipe alone: names that do not exist, and conflicts, each with both keys and their places."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_train.errors import Problem
from qlora_train.recipe.adapter import ADAPTER_CHECKS, check_rule
from qlora_train.recipe.advice import near_files, nearest
from qlora_train.recipe.methods import METHODS, ON_LORD
from qlora_train.recipe.origins import Origins, at, is_given, place_of
from qlora_train.recipe.partial import Unread
from qlora_train.recipe.reader import kind_of, one_line
from qlora_train.recipe.schema import Recipe, SourceSection
from qlora_train.recipe.sources import COLUMN_NAMES


def cross_check(recipe: Recipe, origins: Origins, *, with_data: bool = True) -> list[Problem]:
    """Every conflict in the recipe. A check ends at a key whose value is wrong; files of rows can be left out."""
    problems: list[Problem] = []
    for check in _CHECKS:
        if with_data or check is not _data_files:
            with suppress(Unread):
                problems.extend(check(recipe, origins))
    return problems


def _quant_off(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.quant.quant_type != "none":
        return
    for key in ("double_quant", "block_size", "storage_dtype", "skip_modules"):
        dotted = f"quant.{key}"
        asked = getattr(recipe.quant, key) not in (False, ())  # `double_quant: false` agrees with quant_type none
        if is_given(origins, dotted) and asked:
            what = f"{dotted} has no effect: quant.quant_type is none ({at(origins, 'quant.quant_type')})"
            yield Problem(what, f"remove {key}, or set quant_type to nf4", place_of(origins, dotted))


def _export_base(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    base, where = recipe.export.base, place_of(origins, "export.base")
    if base != "dequantized" and recipe.quant.quant_type == "none":
        what = f"export.base: {base} has no effect: nothing is quantised ({at(origins, 'quant.quant_type')})"
        yield Problem(what, "remove base", where)
    if base != "auto" and is_given(origins, "export.compare_rows"):
        what = f"export.compare_rows has no effect: export.base is {base} ({at(origins, 'export.base')})"
        yield Problem(what, "set base to auto, or remove compare_rows", place_of(origins, "export.compare_rows"))


def _int4(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """What INT4 codes have none of; and QA-LoRA's groups, which must be those of the base."""
    quant, adapter = recipe.quant, recipe.adapter
    if quant.quant_type == "int4":
        chosen = f"quant.quant_type is int4 ({at(origins, 'quant.quant_type')})"
        if quant.double_quant and is_given(origins, "quant.double_quant"):
            what = f"quant.double_quant has no effect: {chosen}, whose scales and zero points are kept as they are"
            yield Problem(what, "remove double_quant", place_of(origins, "quant.double_quant"))
        if quant.storage_dtype != "uint8":
            what = f"quant.storage_dtype: {quant.storage_dtype} does not go with int4: {chosen}"
            yield Problem(what, "remove storage_dtype", place_of(origins, "quant.storage_dtype"))
    if adapter.method == "qalora":
        if quant.quant_type != "int4":
            what = (
                f"adapter.method: qalora merges into the zero points of an int4 base, and quant.quant_type is "
                f"{quant.quant_type} ({at(origins, 'quant.quant_type')}), which has none"
            )
            yield Problem(what, "set quant.quant_type to int4", place_of(origins, "adapter.method"))
        elif adapter.group_size != quant.block_size:
            what = (
                f"adapter.group_size: {adapter.group_size} are not the groups of the base: quant.block_size is "
                f"{quant.block_size} ({at(origins, 'quant.block_size')})"
            )
            yield Problem(what, "give both the same value", place_of(origins, "adapter.group_size"))


def _lord(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Keys of LoRD without it, and what does not go with a decomposed base."""
    model, adapter = recipe.model, recipe.adapter
    if model.lord_keep_frac is None:
        for key in ("lord_modules", "lord_batches"):
            if is_given(origins, f"model.{key}"):
                what = f"model.{key} has no effect: model.lord_keep_frac is not set, so nothing is decomposed"
                yield Problem(what, f"set lord_keep_frac, or remove {key}", place_of(origins, f"model.{key}"))
        return
    chosen = f"model.lord_keep_frac decomposes the base ({at(origins, 'model.lord_keep_frac')})"
    reasons = {
        "adapter.method": (
            adapter.method in METHODS and adapter.method not in ON_LORD,
            f"adapter.method: {adapter.method} is not made for a base in two factors",
            f"use {', '.join(ON_LORD)}, or remove lord_keep_frac",
        ),
        "adapter.init_from": (
            adapter.init_from is not None,
            "adapter.init_from names an adapter of another base",
            "remove init_from or lord_keep_frac",
        ),
        "adapter.embeddings": (adapter.embeddings, "adapter.embeddings was never tried on it", "remove one of the two"),
        "adapter.new_tokens": (
            bool(adapter.new_tokens),
            "adapter.new_tokens was never tried on it",
            "remove one of the two",
        ),
        "quant.quant_type": (
            recipe.quant.quant_type == "int4",
            "quant.quant_type: int4 was never tried on it",
            "use nf4, fp4 or none, or remove lord_keep_frac",
        ),
        "export.base": (
            recipe.export.base != "dequantized",
            f"export.base: {recipe.export.base} has no meaning: there are no original weights to merge onto",
            "remove base",
        ),
    }
    for dotted, (holds, what, fix) in reasons.items():
        if holds:
            where = place_of(origins, dotted) or place_of(origins, "model.lord_keep_frac")
            yield Problem(f"{what}; {chosen}", fix, where)


def _eval_without_data(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.data.eval or recipe.data.split is not None:
        return
    wanted = {
        "eval.every": recipe.eval.every > 0,
        "eval.generate_rows": recipe.eval.generate_rows > 0,
        "data.max_eval_rows": recipe.data.max_eval_rows is not None,
    }
    for dotted, asked in wanted.items():
        if asked and is_given(origins, dotted):
            what = f"{dotted} has no rows to evaluate: data.eval is empty ({at(origins, 'data.eval')})"
            name = dotted.partition(".")[2]
            fix = f"give data.eval a file of held-out rows, set data.split: 5%, or remove {name}"
            yield Problem(what, fix, place_of(origins, dotted))


def _answers_off(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """The length of answers where none are generated. `eval.generate_rows=0` in an override leaves a file as it is."""
    dotted, switch = "eval.max_new_tokens", "eval.generate_rows"
    if recipe.eval.generate_rows or not is_given(origins, dotted):
        return
    if is_given(origins, switch) and ":" not in origins[switch] and ":" in origins[dotted]:
        return
    placed = f" ({at(origins, switch)})" if is_given(origins, switch) else ""
    what = f"{dotted} has no effect: {switch} is 0{placed}, and no answer is generated"
    yield Problem(what, "remove max_new_tokens, or set generate_rows to some", place_of(origins, dotted))


def _loss_on_text(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A choice between answers where no source has any. Where one has, text rows beside it are trained whole."""
    data = recipe.data
    if data.loss_on == "all" or not is_given(origins, "data.loss_on"):
        return
    sources = (*data.train, *data.eval)
    if any((source.format or data.format) != "text" for source in sources):
        return
    own = [source.path for source in sources if source.format is not None]
    told = "" if len(own) == len(sources) else f"data.format is text ({at(origins, 'data.format')})"
    named = f"the format of {', '.join(own)} is text" if own else ""
    what = (
        f"data.loss_on: {data.loss_on} has no effect: {' and '.join(filter(None, (told, named)))}, "
        "and text rows have no answers: all of their tokens are trained"
    )
    yield Problem(what, "set loss_on to all, or remove it", place_of(origins, "data.loss_on"))


def _same_file(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    def identity(source: SourceSection) -> tuple[str, str, str | None]:
        path, kind = os.path.realpath(source.path), kind_of(Path(source.path))
        if kind is None:
            return path, source.split, source.subset
        return path, "" if kind == "file" else source.split, None

    train = {identity(source) for source in recipe.data.train}
    for source in recipe.data.eval:
        if identity(source) in train:
            what = (
                f"data.eval: {source.path} is also in data.train ({at(origins, 'data.train')}), so no row of it is "
                "held out"
            )
            fix = "hold other rows out (data.split: 5% does), or remove the file from one of the two"
            yield Problem(what, fix, place_of(origins, "data.eval"))


def _two_held_out(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.data.split is not None and recipe.data.eval:
        what = f"data.split and data.eval ({at(origins, 'data.eval')}) both name the held-out rows"
        yield Problem(what, "keep one of them", place_of(origins, "data.split"))


def _source_keys(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Keys of a source that nothing would read."""
    for key in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, key)):
            name = f"data.{key}[{index}]"
            if Path(source.path).is_absolute():
                for field in ("revision", "subset"):
                    if getattr(source, field) is not None:
                        what = f"{name}.{field} has no effect: {source.path} is a local path"
                        yield Problem(what, f"remove {field}; it belongs to hub ids", place_of(origins, f"data.{key}"))
            if source.split != "train" and kind_of(Path(source.path)) == "file":
                what = f"{name}.split has no effect: {source.path} is one file, read whole"
                fix = "remove split; it belongs to hub ids and folders"
                yield Problem(what, fix, place_of(origins, f"data.{key}"))
            if key == "eval" and source.weight != 1:
                what = f"{name}.weight has no effect: held-out rows are measured once each"
                yield Problem(what, "remove weight", place_of(origins, "data.eval"))


def _column_names(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Names in column maps that no format has."""
    data = recipe.data
    maps = [("data.columns", "data.columns", data.columns)]
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        maps += [(key, f"{key}[{index}].columns", source.columns) for index, source in enumerate(sources)]
    for key, name, columns in maps:
        for ours in columns:
            if ours not in COLUMN_NAMES:
                close = nearest(ours, COLUMN_NAMES)
                fix = f"did you mean {' or '.join(close)}? " if close else ""
                fix += f"Write our name first, then the file's. Ours are: {', '.join(COLUMN_NAMES)}"
                yield Problem(f"{name}: no format has a column {one_line(ours)!r}", fix, place_of(origins, key))


def _attention_of_packs(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.data.batching == "packed" and recipe.model.attn_implementation != "auto":
        what = (
            f"model.attn_implementation: {recipe.model.attn_implementation} does not keep the rows of a pack apart, "
            f"and data.batching is packed ({at(origins, 'data.batching')})"
        )
        fix = "remove attn_implementation, or set data.batching to length_grouped"
        yield Problem(what, fix, place_of(origins, "model.attn_implementation"))


def _paged_on_cpu(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    optimizer = recipe.train.optimizer
    if optimizer.startswith("paged_") and recipe.model.device == "cpu":
        what = f"train.optimizer: {optimizer} needs CUDA, and model.device is cpu ({at(origins, 'model.device')})"
        fix = f"set optimizer to {optimizer.removeprefix('paged_')}"
        yield Problem(what, fix, place_of(origins, "train.optimizer"))


def _checkpointing(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Keys that only a policy chosen by hand reads, and what needs a card."""
    train = recipe.train
    asked = {"checkpoint_every": train.checkpoint_every > 1, "offload_checkpoints": train.offload_checkpoints}
    if train.checkpointing in ("auto", "none"):
        for key in (key for key, is_asked in asked.items() if is_asked):
            dotted, chosen = f"train.{key}", f"train.checkpointing is {train.checkpointing}"
            what = f"{dotted} has no effect: {chosen} ({at(origins, 'train.checkpointing')})"
            yield Problem(what, f"set checkpointing to full or selective, or remove {key}", place_of(origins, dotted))
    if train.offload_checkpoints and recipe.model.device == "cpu":
        what = f"train.offload_checkpoints needs CUDA, and model.device is cpu ({at(origins, 'model.device')})"
        yield Problem(what, "remove offload_checkpoints", place_of(origins, "train.offload_checkpoints"))


def _memory_auto(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A choice of the micro-batch that would change which rows a step holds, or that has nothing to choose."""
    train, batching = recipe.train, recipe.data.batching
    if train.memory != "auto":
        return
    where = place_of(origins, "train.memory")
    if batching == "length_grouped":
        what = (
            "train.memory: auto would change which rows meet in a step: data.batching is length_grouped "
            f"({at(origins, 'data.batching')}), which puts rows of like length into one micro-batch"
        )
        yield Problem(what, "set memory to fixed, or data.batching to packed", where)
    if train.micro_batch_size * train.grad_accum_steps == 1:
        what = "train.memory: auto has nothing to choose: micro_batch_size x grad_accum_steps is one pack per step"
        yield Problem(what, "remove memory, or raise grad_accum_steps", where)


def _compiled_selective(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.train.compile is True and recipe.train.checkpointing == "selective":
        what = (
            "train.compile: true does not go with train.checkpointing: selective "
            f"({at(origins, 'train.checkpointing')}), which watches single operators"
        )
        yield Problem(what, "set checkpointing to full or auto, or compile to auto", place_of(origins, "train.compile"))


def _resident_layers(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.train.resident_layers in ("auto", 0):
        return
    reasons = {
        f"quant.quant_type is none ({at(origins, 'quant.quant_type')}), nothing is dequantised": (
            recipe.quant.quant_type == "none"
        ),
        f"train.fused is false ({at(origins, 'train.fused')})": not recipe.train.fused,
    }
    for reason, holds in reasons.items():
        if holds:
            what = f"train.resident_layers has no effect: {reason}"
            yield Problem(what, "remove resident_layers", place_of(origins, "train.resident_layers"))


def _missing(dotted: str, path: Path, origins: Origins, kind: str) -> Iterator[Problem]:
    """A problem if there is no file, folder or either (`kind`: file, folder, file or folder) at `path`."""
    where, found = place_of(origins, dotted), kind_of(path)
    if found is None:
        yield Problem(f"{dotted}: there is no {kind} {path}", near_files(path) or "check the path", where)
    elif found not in kind:
        fix = "name the file in it" if found == "folder" else f"name its folder: {path.parent}"
        yield Problem(f"{dotted}: {path} is a {found}, not a {kind}", fix, where)


def _data_files(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    for key in ("train", "eval"):
        for source in getattr(recipe.data, key):
            if Path(source.path).is_absolute():
                yield from _missing(f"data.{key}", Path(source.path), origins, "file or folder")


def _model_files(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    model = recipe.model
    local = Path(model.path).is_absolute()
    if model.revision is not None and (local or model.path.startswith("package:")):
        kind = "is a local path" if local else "names an installed package"
        what = f"model.revision has no effect: model.path {kind} ({at(origins, 'model.path')})"
        yield Problem(what, "remove revision; it belongs to hub ids", place_of(origins, "model.revision"))
    if local:
        yield from _missing("model.path", Path(model.path), origins, "file or folder")
    if model.chat_template is not None:
        yield from _missing("model.chat_template", model.chat_template, origins, "file")


def _adapter_folder(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.adapter.init_from is not None:
        yield from _missing("adapter.init_from", recipe.adapter.init_from, origins, "folder")


def _run_dir(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if kind_of(recipe.run.dir) == "file":
        what = f"run.dir: {recipe.run.dir} is a file, not a folder"
        yield Problem(what, "name a folder; it is made where there is none", place_of(origins, "run.dir"))


def _trackers(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Trackers that are not installed, named twice, or have no project."""
    names, where = recipe.run.trackers, place_of(origins, "run.trackers")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield Problem(f"run.trackers: {name} is given twice", "keep one of them", where)
        try:
            version(name)
        except PackageNotFoundError:
            yield Problem(f"run.trackers: {name} is not installed", f"run `pip install {name}`, or leave it out", where)
    dotted = "run.tracker_project"
    if is_given(origins, dotted) and not {"wandb", "trackio"} & set(names):
        what = f"{dotted} has no effect: run.trackers ({at(origins, 'run.trackers')}) names neither wandb nor trackio"
        yield Problem(what, "remove tracker_project, or name one of them", place_of(origins, dotted))


_CHECKS: tuple[Callable[[Recipe, Origins], Iterator[Problem]], ...] = (
    *ADAPTER_CHECKS,
    _adapter_folder,
    _quant_off,
    _int4,
    _lord,
    check_rule,
    _export_base,
    _eval_without_data,
    _answers_off,
    _two_held_out,
    _source_keys,
    _column_names,
    _attention_of_packs,
    _paged_on_cpu,
    _checkpointing,
    _memory_auto,
    _compiled_selective,
    _resident_layers,
    _loss_on_text,
    _same_file,
    _data_files,
    _model_files,
    _run_dir,
    _trackers,
)
