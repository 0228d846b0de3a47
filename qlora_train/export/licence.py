"""Under which licence the base was given: the merged model is a derived work, and carries it on."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader

from qlora_train.model.source import GGUF_SUFFIX, LICENCE_PATTERNS, PACKAGE_PREFIX, Source, package_file
from qlora_train.model.trained import FinishedRun

MAX_FILE_BYTES = 2**20
# As the hub's cards have them: a short name such as apache-2.0; `other` goes with a name and a link.
_HEADER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(
    r"^(license|license_name|license_link): *[\"']?([A-Za-z0-9][\w.+:/~-]{0,199})[\"']? *$", re.MULTILINE
)


@dataclass(frozen=True)
class Licence:
    """What is known of it. `name` None: nothing names it."""

    name: str | None  # as the hub writes it
    found_in: str  # which file or key says so
    own_name: str | None = None  # of a licence that the hub has no short name for
    link: str | None = None
    files: tuple[str, ...] = ()  # texts that the export holds a copy of


def find_licence(run: FinishedRun, source: Source) -> Licence:
    """From the recipe, the header of the base's README, or its GGUF file; texts of a licence beside it are listed."""
    files = tuple(path.name for path in _texts(source.folder))
    if run.recipe.export.license is not None:
        return Licence(run.recipe.export.license, "export.license of the recipe", files=files)
    # A card names no folder of the machine that trained.
    base = source.name.rstrip("/").rpartition("/")[2] if source.name.startswith("/") else source.name
    fields = _card_fields(source.folder / "README.md")
    if "license" in fields:
        own_name, link = fields.get("license_name"), fields.get("license_link")
        return Licence(fields["license"], f"README.md of {base}", own_name, link, files)
    if (named := _gguf_licence(source)) is not None:
        return Licence(named, f"general.license of {base}", files=files)
    return Licence("other" if files else None, files[0] if files else "", files=files)


def copy_texts(source: Source, folder: Path) -> None:
    """The base's licence, notice and policy files, as they are."""
    for path in _texts(source.folder):
        shutil.copyfile(path, folder / path.name)


def _texts(folder: Path) -> list[Path]:
    found = {path for pattern in LICENCE_PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES)


def _card_fields(card: Path) -> dict[str, str]:
    """Its licence fields, read as lines: no parser meets what others wrote."""
    if not card.is_file() or card.stat().st_size > MAX_FILE_BYTES:
        return {}
    header = _HEADER.match(card.read_text(encoding="utf-8", errors="replace"))
    return dict(_FIELD.findall(header.group(1))) if header else {}


def _gguf_licence(source: Source) -> str | None:
    """The licence that a GGUF file names. Its header was checked when it was converted."""
    if not source.name.endswith(GGUF_SUFFIX):
        return None
    path = package_file(source.name) if source.name.startswith(PACKAGE_PREFIX) else Path(source.name)
    field = GGUFReader(path).get_field("general.license")
    named = field.contents() if field is not None else None
    return named if isinstance(named, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,59}", named) else None
