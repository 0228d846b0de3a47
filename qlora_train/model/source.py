"""Where the base comes from: a hub id, a folder, a GGUF file or a file inside an installed package, made one folder."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from qlora_train.artifacts import cache_dir, manifest_faults, publishing, sha256_file
from qlora_train.errors import MachineError, ModelError, SecurityError
from qlora_train.recipe.schema import ModelSection

PACKAGE_PREFIX = "package:"
GGUF_SUFFIX = ".gguf"
# Part of the cache key: raise it when the conversion changes.
GGUF_CONVERSION = 1
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Source:
    """A base as one folder of safetensors, config and tokenizer."""

    name: str  # as the user wrote it
    folder: Path
    commit: str | None = None  # of a hub id
    file_sha256: str | None = None  # of a GGUF file


def resolve_source(section: ModelSection, *, weights: bool = True) -> Source:
    """Find the base. With `weights=False` a hub id brings its config and tokenizer only.

    Raises ModelError when nothing is there, SecurityError when it would need pickle or code from the model's folder.
    """
    if section.path.startswith(PACKAGE_PREFIX):
        source = _from_path(section.path, _package_file(section.path))
    elif section.path.startswith("/"):
        source = _from_path(section.path, Path(section.path))
    else:
        source = _from_hub(section, weights)
    _check_folder(source, weights)
    return source


def _package_file(path: str) -> Path:
    """The file that `package:NAME/FILE` names."""
    package, _, file = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        raise ModelError(
            f"model.path: no installed package {package!r}", fix=f"pip install {package.replace('_', '-')}"
        )
    root = Path(roots[0]).resolve()
    found = (root / file).resolve()
    if not found.is_relative_to(root):
        raise SecurityError(f"model.path: {file!r} points outside the package {package!r}", fix="name a file inside it")
    return found


def _from_path(name: str, path: Path) -> Source:
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        there = f"; there is: {', '.join(siblings[:8])}" if siblings else ""
        raise ModelError(f"model.path: {path} does not exist{there}", fix="correct the path")
    if path.is_dir():
        return Source(name, path)
    if path.suffix == GGUF_SUFFIX:
        digest = sha256_file(path)
        return Source(name, _dequantised_gguf(path, digest), file_sha256=digest)
    raise ModelError(f"model.path: {path} is not a folder and not a .gguf file", fix="name the model's folder")


def _dequantised_gguf(path: Path, digest: str) -> Path:
    """The folder of bf16 safetensors made once from a GGUF file, in a cache keyed by the file's hash.

    transformers 5.23 keeps GGUF weights packed unless told to dequantise, and refuses a bitsandbytes config beside it.
    """
    folder = cache_dir() / "gguf" / f"{digest[:32]}-v{GGUF_CONVERSION}"
    if folder.exists():
        if faults := manifest_faults(folder):
            raise ModelError(f"the cached model {folder} is damaged: {'; '.join(faults)}", fix=f"rm -r {folder}")
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model.path: {path} could not be read as GGUF: {error}", fix="use a file of another kind"
        ) from error
    try:
        with publishing(folder, manifest={"source": path.name, "source_sha256": digest}) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except MachineError:
        if not folder.exists():  # else another process published the same folder first
            raise
    return folder


def _from_hub(section: ModelSection, weights: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = HUB_PATTERNS if weights else [p for p in HUB_PATTERNS if p != "*.safetensors"]
    try:
        folder = Path(snapshot_download(section.path, revision=section.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.path: {section.path!r} is no file or folder, and the hub did not give it: {reason}",
            fix="write ./NAME for a folder beside the recipe, or correct the id; private models need `hf auth login`",
        ) from error
    return Source(section.path, folder, commit=folder.name)


def _check_folder(source: Source, weights: bool) -> None:
    """Refuse what is incomplete, what needs pickle, and what asks to run its own code."""
    config_file = source.folder / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source.folder} holds no readable config.json: {error}", fix="name the folder that save_pretrained wrote"
        ) from error
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise SecurityError(
            f"{source.name} asks to run code from its own folder (auto_map in config.json)",
            fix="use a model that transformers implements itself",
        )
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{source.name} is already quantised ({method}): training needs the weights it was made from",
            fix="use the 16-bit model; it is quantised while loading and never held whole in 16 bit",
        )
    if weights and not any(source.folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in source.folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise SecurityError(
                f"{source.name} holds pickle weights only ({pickles[0]}), which can run code when loaded",
                fix="convert it to safetensors in a place you trust",
            )
        raise ModelError(f"{source.folder} holds no *.safetensors", fix="name a folder with weights")
