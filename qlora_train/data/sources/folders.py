"""Folders of Parquet files, and folders that `datasets` wrote with save_to_disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qlora_train.data.problems import SourceFault
from qlora_train.data.sources.arrow import ArrowSource
from qlora_train.data.sources.base import Source
from qlora_train.data.sources.parquet import ParquetSource
from qlora_train.recipe.sources import SUFFIXES
from qlora_train.untrusted import refuse_links_out

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")
_COMMON_SPLITS = "train|training|test|testing|validation|valid|val|dev|eval|evaluation"
_MAX_NAMED = 5


def open_folder(name: str, folder: Path, split: str) -> Source:
    """The source that a folder is, or SourceFault that says what it holds."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits")
        splits = [known for known in splits if isinstance(known, str)] if isinstance(splits, list) else []
        if split not in splits:
            raise _no_split(split, splits)
        if not (folder / split / "state.json").is_file():
            raise SourceFault(f"lacks {split}/state.json", "write it again with save_to_disk")
        return ArrowSource(name, _saved_files(folder / split), in_folder=True)
    if (folder / "state.json").is_file():
        if split != "train":
            raise SourceFault(f"holds one unnamed split, so none is called {split!r}", "remove `split`")
        return ArrowSource(name, _saved_files(folder), in_folder=True)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    data = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()]
    if data and all(entry.suffix.lower() == ".parquet" for entry in data):
        return ParquetSource(name, _inside(folder, _of_split(data, split)), in_folder=True)
    if data:
        names = ", ".join(entry.name for entry in data[:_MAX_NAMED])
        more = f" and {len(data) - _MAX_NAMED} more" if len(data) > _MAX_NAMED else ""
        fix = f"name a file in it, such as {data[0]}; several files are several sources"
        raise SourceFault(f"is a folder of {names}{more}; only Parquet files are read as one", fix)
    inside = next((entry for entry in entries if entry.is_dir()), None)
    fix = f"name the folder with the files, perhaps {inside}" if inside else "name a file of rows"
    raise SourceFault("is a folder without data files", fix)


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files that save_to_disk listed; others, such as caches, are not rows."""
    listed = _read_json(folder / "state.json").get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise SourceFault(f"lacks {name!r}, which its state.json lists", "copy or write the folder again")
        files.append(folder / name)
    return _inside(folder, files)


def _inside(folder: Path, files: list[Path]) -> list[Path]:
    """The files; SecurityError where one is a link that leads out of the folder."""
    refuse_links_out(folder, files)
    return files


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Of files whose names tell splits, such as train.parquet and test-00000-of-00002.parquet, those of the split.

    Where no name tells one, all of them: they are the split "train".
    """
    shards = [match[1] if (match := _SHARD.fullmatch(file.stem)) else None for file in files]
    if len({*shards} - {None}) < 2:  # part-00000-of-00002 beside its like tells no split
        shards = [None] * len(files)
    named = re.compile(f"({re.escape(split)}|{_COMMON_SPLITS})(?:[-_].*)?")
    matches = [named.fullmatch(file.stem) for file in files]
    splits = [shard or (match[1] if match else None) for shard, match in zip(shards, matches, strict=True)]
    if not any(splits):
        splits = ["train"] * len(files)
    elif None in splits:
        what = f"holds {files[splits.index(None)].name}, whose name tells no split, beside files of splits"
        raise SourceFault(what, "name the files themselves; several files are several sources")
    if split not in splits:
        raise _no_split(split, sorted({told for told in splits if told}))
    return [file for file, told in zip(files, splits, strict=True) if told == split]


def _no_split(split: str, known: list[str]) -> SourceFault:
    return SourceFault(f"has no split {split!r}; splits: {', '.join(known) or 'none'}", "set `split` to one of them")


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SourceFault(f"{path.name} is damaged", "copy or write the folder again")
    return value
