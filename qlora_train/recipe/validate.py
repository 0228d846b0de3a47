"""What is wrong in a recipe alone: names that do not exist, and conflicts, each with both keys and their places."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from qlora_train.errors import Problem
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.reader import kind_of, printable
from qlora_train.recipe.schema import Recipe, SourceSection
from qlora_train.recipe.sources import COLUMN_NAMES

Origins = Mapping[str, str]

KEYS: dict[str, tuple[str, ...]] = {
    name: tuple(field.annotation.model_fields)  # type: ignore[union-attr]  # every field of Recipe is a section
    for name, field in Recipe.model_fields.items()
}

# What peers call our keys and sections. An entry is a courtesy in a message, never an alias that loads.
OLD_KEYS: dict[str, str] = {
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model"), "model.path"),
    **dict.fromkeys(("torch_dtype", "dtype", "bf16", "bnb_4bit_compute_dtype"), "model.compute_dtype"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "bnb_4bit_quant_type", "bits"), "quant.quant_type"),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "use_double_quant"), "quant.double_quant"),
    **dict.fromkeys(("bnb_4bit_quant_storage", "bnb_4bit_quant_storage_dtype"), "quant.storage_dtype"),
    **dict.fromkeys(("lora_r", "rank", "lora_rank"), "adapter.r"),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), "adapter.target_modules"),
    **{"lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "lora_model_dir": "adapter.init_from"},
    **dict.fromkeys(("max_seq_length", "max_length", "cutoff_len", "sequence_len", "model_max_length"), "data.seq_len"),
    **dict.fromkeys(("train_file", "train_files", "dataset", "datasets", "dataset_path"), "data.train"),
    **dict.fromkeys(("eval_file", "validation_file", "eval_dataset", "test_datasets"), "data.eval"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "data.max_train_rows"),
    **{"max_eval_samples": "data.max_eval_rows", "train_on_inputs": "data.loss_on"},
    **dict.fromkeys(("group_by_length", "packing", "sample_packing", "neat_packing", "multipack"), "data.batching"),
    **dict.fromkeys(("val_set_size", "test_size", "validation_split", "split_dataset_ratio"), "data.split"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "train.epochs"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "micro_batch"), "train.micro_batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation"), "train.grad_accum_steps"),
    **{"lr": "train.learning_rate", "warmup_ratio": "train.warmup_frac", "gradient_clipping": "train.max_grad_norm"},
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "train.schedule"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "train.checkpointing"),
    **{"save_steps": "train.save_every", "save_total_limit": "train.keep"},
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "eval.batch_size"),
    **{"eval_steps": "eval.every"},
    **{"output_dir": "run.dir", "logging_steps": "run.log_every", "random_seed": "run.seed"},
    **dict.fromkeys(("report_to", "log_with", "logger", "use_wandb"), "run.trackers"),
    **dict.fromkeys(("wandb_project", "project_name"), "run.tracker_project"),
}
OLD_SECTIONS: dict[str, str] = {
    **dict.fromkeys(("base", "models"), "model"),
    **dict.fromkeys(("quantization", "quantisation", "bnb", "bitsandbytes"), "quant"),
    **dict.fromkeys(("lora", "peft", "qlora"), "adapter"),
    **dict.fromkeys(("training", "trainer", "optim", "optimizer"), "train"),
    **{"dataset": "data", "datasets": "data", "evaluation": "eval", "output": "run"},
}


def edit_distance(a: str, b: str) -> int:
    """Least number of inserted, deleted, replaced and swapped neighbouring letters between the two."""
    older: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        oldest, older, row = older, row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(older[j + 1] + 1, row[j] + 1, older[j] + (x != y)))
            if i and j and x == b[j - 1] and a[i - 1] == y:
                row[-1] = min(row[-1], oldest[j - 1] + 1)
    return row[-1]


def nearest(word: str, names: Collection[str]) -> list[str]:
    """The names at the least edit distance from a misspelt word (at most 2 edits); else what difflib finds like it."""
    word = word.lower().replace("-", "_")
    if len(word) > 40:  # no misspelling of ours, and the time grows with the length
        return []
    likely = [name for name in names if abs(len(name) - len(word)) <= 2]
    edits = {name: edit_distance(word, name) for name in likely}
    least = min(edits.values(), default=99)
    close = [name for name in likely if edits[name] == least <= min(2, len(name))]
    return close[:3] or get_close_matches(word, names, n=2, cutoff=0.7)


def advise_key(section: str, key: str) -> tuple[str, list[str]]:
    """What to do about a key that `section` lacks, and the dotted keys that were probably meant."""
    word = key.lower().replace("-", "_")
    old = OLD_KEYS.get(word)
    if old:
        there, _, name = old.partition(".")
        return f"it is called {name} here" + ("" if there == section else f", in the section {there}"), [old]
    homes = [name for name, keys in KEYS.items() if word in keys and name != section]
    if word in KEYS[section]:
        return f"did you mean {word}?", [f"{section}.{word}"]
    close = nearest(key, KEYS[section])
    if homes and not (close and edit_distance(word, close[0]) == 1):
        return f"it belongs to the section {' or '.join(homes)}", [f"{home}.{word}" for home in homes]
    if close:
        return f"did you mean {' or '.join(close)}?", [f"{section}.{name}" for name in close]
    for name, keys in KEYS.items():
        close = nearest(key, keys)
        if close:
            return f"did you mean {close[0]} in the section {name}?", [f"{name}.{close[0]}"]
    return f"remove it; the keys of {section} are: {', '.join(KEYS[section])}", []


def advise_section(name: str) -> tuple[str, str | None]:
    """What to do about a top-level name that is no section, and the section that was probably meant."""
    word = name.lower().replace("-", "_")
    if word in OLD_SECTIONS:
        return f"it is called {OLD_SECTIONS[word]} here", OLD_SECTIONS[word]
    homes = [section for section, keys in KEYS.items() if word in keys]
    if word in OLD_KEYS or homes:
        target = OLD_KEYS.get(word) or f"{homes[0]}.{word}"
        section, _, key = target.partition(".")
        return f"it is {section}.{key} here: {key} in the section {section}", None
    close = nearest(name, KEYS)
    if close:
        return f"did you mean {' or '.join(close)}?", close[0]
    return f"remove it; the sections are: {', '.join(KEYS)}", None


def cross_check(
    recipe: Recipe, origins: Origins, unparsed: Collection[str] = (), *, with_data: bool = True
) -> list[Problem]:
    """Every conflict in the recipe; checks that need a section named in `unparsed`, or files of rows, are left out."""
    problems: list[Problem] = []
    for needed, check in _CHECKS:
        if not set(needed) & set(unparsed) and (with_data or check is not _data_files):
            problems.extend(check(recipe, origins))
    return problems


def near_files(path: Path) -> str:
    """A phrase naming the files beside `path` that are called almost the same; empty if there are none."""
    try:
        names = sorted(entry.name for entry in islice(path.parent.iterdir(), 10_000))
    except (OSError, ValueError):
        return ""
    close = get_close_matches(path.name, names, n=3, cutoff=0.6)
    close = close or [name for name in names if Path(name).stem == path.stem][:3]
    return f"nearest in {path.parent}: {', '.join(close)}" if close else ""


def _given(origins: Origins, key: str) -> bool:
    return origins.get(key, "default") != "default"


def _at(origins: Origins, key: str) -> str:
    """The place of a key for the middle of a sentence."""
    origin = origins.get(key, "default")
    if origin == "default":
        return "left at its default"
    return f"set at {origin}" if ":" in origin else f"set on the {origin}"


def _where(origins: Origins, key: str) -> str | None:
    return origins[key] if _given(origins, key) else None


def _method(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    name = recipe.adapter.method
    if name not in METHODS:
        close = get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]}? " if close else ""
        fix += f"The methods are: {', '.join(METHODS)}"
        yield Problem(f"adapter.method: '{name}' is not a known method", fix, _where(origins, "adapter.method"))


def _quant_off(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.quant.quant_type != "none":
        return
    for key in ("double_quant", "block_size", "storage_dtype", "skip_modules"):
        dotted = f"quant.{key}"
        asked = getattr(recipe.quant, key) not in (False, ())  # `double_quant: false` agrees with quant_type none
        if _given(origins, dotted) and asked:
            what = f"{dotted} has no effect: quant.quant_type is none ({_at(origins, 'quant.quant_type')})"
            yield Problem(what, f"remove {key}, or set quant_type to nf4", _where(origins, dotted))


def _eval_without_data(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.data.holds_out:
        return
    wanted = {
        "eval.every": recipe.eval.every > 0,
        "eval.generate_rows": recipe.eval.generate_rows > 0,
        "data.max_eval_rows": recipe.data.max_eval_rows is not None,
    }
    for dotted, asked in wanted.items():
        if asked and _given(origins, dotted):
            what = f"{dotted} has no rows to evaluate: data.eval is empty ({_at(origins, 'data.eval')})"
            name = dotted.partition(".")[2]
            fix = f"give data.eval a file of held-out rows, set data.split: 5%, or remove {name}"
            yield Problem(what, fix, _where(origins, dotted))


def _loss_on_text(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A choice between answers where no source has any. Where one has, text rows beside it are trained whole."""
    data = recipe.data
    if data.loss_on == "all" or not _given(origins, "data.loss_on"):
        return
    sources = (*data.train, *data.eval)
    if any((source.format or data.format) != "text" for source in sources):
        return
    own = [source.path for source in sources if source.format is not None]
    told = "" if len(own) == len(sources) else f"data.format is text ({_at(origins, 'data.format')})"
    named = f"the format of {', '.join(own)} is text" if own else ""
    what = (
        f"data.loss_on: {data.loss_on} has no effect: {' and '.join(filter(None, (told, named)))}, "
        "and text rows have no answers: all of their tokens are trained"
    )
    yield Problem(what, "set loss_on to all, or remove it", _where(origins, "data.loss_on"))


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
                f"data.eval: {source.path} is also in data.train ({_at(origins, 'data.train')}), so no row of it is "
                "held out"
            )
            fix = "hold other rows out (data.split: 5% does), or remove the file from one of the two"
            yield Problem(what, fix, _where(origins, "data.eval"))


def _two_held_out(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.data.split is not None and recipe.data.eval:
        what = f"data.split and data.eval ({_at(origins, 'data.eval')}) both name the held-out rows"
        yield Problem(what, "keep one of them", _where(origins, "data.split"))


def _source_keys(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Keys of a source that nothing would read."""
    for key in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, key)):
            name = f"data.{key}[{index}]"
            if Path(source.path).is_absolute():
                for field in ("revision", "subset"):
                    if getattr(source, field) is not None:
                        what = f"{name}.{field} has no effect: {source.path} is a local path"
                        yield Problem(what, f"remove {field}; it belongs to hub ids", _where(origins, f"data.{key}"))
            if source.split != "train" and kind_of(Path(source.path)) == "file":
                what = f"{name}.split has no effect: {source.path} is one file, read whole"
                fix = "remove split; it belongs to hub ids and folders"
                yield Problem(what, fix, _where(origins, f"data.{key}"))
            if key == "eval" and source.weight != 1:
                what = f"{name}.weight has no effect: held-out rows are measured once each"
                yield Problem(what, "remove weight", _where(origins, "data.eval"))


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
                yield Problem(f"{name}: no format has a column {printable(ours)!r}", fix, _where(origins, key))


def _attention_of_packs(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.data.batching == "packed" and recipe.model.attn_implementation != "auto":
        what = (
            f"model.attn_implementation: {recipe.model.attn_implementation} does not keep the rows of a pack apart, "
            f"and data.batching is packed ({_at(origins, 'data.batching')})"
        )
        fix = "remove attn_implementation, or set data.batching to length_grouped"
        yield Problem(what, fix, _where(origins, "model.attn_implementation"))


def _paged_on_cpu(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    optimizer = recipe.train.optimizer
    if optimizer.startswith("paged_") and recipe.model.device == "cpu":
        what = f"train.optimizer: {optimizer} needs CUDA, and model.device is cpu ({_at(origins, 'model.device')})"
        fix = f"set optimizer to {optimizer.removeprefix('paged_')}"
        yield Problem(what, fix, _where(origins, "train.optimizer"))


def _checkpointing(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Keys that only a policy chosen by hand reads, and what needs a card."""
    train = recipe.train
    asked = {"checkpoint_every": train.checkpoint_every > 1, "offload_checkpoints": train.offload_checkpoints}
    if train.checkpointing in ("auto", "none"):
        for key in (key for key, is_asked in asked.items() if is_asked):
            dotted, chosen = f"train.{key}", f"train.checkpointing is {train.checkpointing}"
            what = f"{dotted} has no effect: {chosen} ({_at(origins, 'train.checkpointing')})"
            yield Problem(what, f"set checkpointing to full or selective, or remove {key}", _where(origins, dotted))
    if train.offload_checkpoints and recipe.model.device == "cpu":
        what = f"train.offload_checkpoints needs CUDA, and model.device is cpu ({_at(origins, 'model.device')})"
        yield Problem(what, "remove offload_checkpoints", _where(origins, "train.offload_checkpoints"))


def _memory_auto(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A choice of the micro-batch that would change which rows a step holds, or that has nothing to choose."""
    train, batching = recipe.train, recipe.data.batching
    if train.memory != "auto":
        return
    where = _where(origins, "train.memory")
    if batching == "length_grouped":
        what = (
            "train.memory: auto would change which rows meet in a step: data.batching is length_grouped "
            f"({_at(origins, 'data.batching')}), which puts rows of like length into one micro-batch"
        )
        yield Problem(what, "set memory to fixed, or data.batching to packed", where)
    if train.micro_batch_size * train.grad_accum_steps == 1:
        what = "train.memory: auto has nothing to choose: micro_batch_size x grad_accum_steps is one pack per step"
        yield Problem(what, "remove memory, or raise grad_accum_steps", where)


def _compiled_selective(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.train.compile is True and recipe.train.checkpointing == "selective":
        what = (
            "train.compile: true does not go with train.checkpointing: selective "
            f"({_at(origins, 'train.checkpointing')}), which watches single operators"
        )
        yield Problem(what, "set checkpointing to full or auto, or compile to auto", _where(origins, "train.compile"))


def _resident_layers(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    if recipe.train.resident_layers in ("auto", 0):
        return
    reasons = {
        f"quant.quant_type is none ({_at(origins, 'quant.quant_type')}), nothing is dequantised": (
            recipe.quant.quant_type == "none"
        ),
        f"train.fused is false ({_at(origins, 'train.fused')})": not recipe.train.fused,
    }
    for reason, holds in reasons.items():
        if holds:
            what = f"train.resident_layers has no effect: {reason}"
            yield Problem(what, "remove resident_layers", _where(origins, "train.resident_layers"))


def _missing(dotted: str, path: Path, origins: Origins, kind: str) -> Iterator[Problem]:
    """A problem if there is no file, folder or either (`kind`: file, folder, file or folder) at `path`."""
    where, found = _where(origins, dotted), kind_of(path)
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
        what = f"model.revision has no effect: model.path {kind} ({_at(origins, 'model.path')})"
        yield Problem(what, "remove revision; it belongs to hub ids", _where(origins, "model.revision"))
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
        yield Problem(what, "name a folder; it is made where there is none", _where(origins, "run.dir"))


def _trackers(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Trackers that are not installed, named twice, or have no project."""
    names, where = recipe.run.trackers, _where(origins, "run.trackers")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield Problem(f"run.trackers: {name} is given twice", "keep one of them", where)
        try:
            version(name)
        except PackageNotFoundError:
            yield Problem(f"run.trackers: {name} is not installed", f"run `pip install {name}`, or leave it out", where)
    dotted = "run.tracker_project"
    if _given(origins, dotted) and not {"wandb", "trackio"} & set(names):
        what = f"{dotted} has no effect: run.trackers ({_at(origins, 'run.trackers')}) names neither wandb nor trackio"
        yield Problem(what, "remove tracker_project, or name one of them", _where(origins, dotted))


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Recipe, Origins], Iterator[Problem]]], ...] = (
    (("adapter",), _method),
    (("adapter",), _adapter_folder),
    (("quant",), _quant_off),
    (("eval", "data"), _eval_without_data),
    (("data",), _two_held_out),
    (("data",), _source_keys),
    (("data",), _column_names),
    (("data", "model"), _attention_of_packs),
    (("train", "model"), _paged_on_cpu),
    (("train", "model"), _checkpointing),
    (("train", "data"), _memory_auto),
    (("train",), _compiled_selective),
    (("train", "quant"), _resident_layers),
    (("data",), _loss_on_text),
    (("data",), _same_file),
    (("data",), _data_files),
    (("model",), _model_files),
    (("run",), _run_dir),
    (("run",), _trackers),
)
