"""Where the base comes from: a hub id, a folder, a GGUF file or a file inside an installed package, made one folder."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from qlora_train.artifacts.files import sha256_file
from qlora_train.artifacts.folders import manifest_faults, publishing
from qlora_train.artifacts.layout import cache_dir
from qlora_train.errors import MachineError, ModelError, SecurityError, first_line
from qlora_train.model.gguf_header import check_gguf
from qlora_train.model.low_rank import RANKS
from qlora_train.recipe.schema import ModelSection
from qlora_train.untrusted import read_json_object, refuse_links_out, refuse_pickles

PACKAGE_PREFIX = "package:"
GGUF_SUFFIX = ".gguf"
# Part of the cache key: raise it when the conversion changes.
GGUF_CONVERSION = 2
ADAPTER_CONFIG = "adapter_config.json"
MAX_TOKENIZER_BYTES = 256 * 2**20  # the largest in use have 35 MB
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "generation_config.json"),
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What says under which licence a model is given: exports carry it on.
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
# A second copy of the weights, under the names of the model's makers (Mistral, Llama): tens of gigabytes for nothing.
HUB_IGNORED = ["consolidated*.safetensors", "*/*.safetensors"]
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", *LICENCE_PATTERNS]


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
        source = _from_path(section.path, package_file(section.path))
    elif section.path.startswith("/"):
        source = _from_path(section.path, Path(section.path))
    else:
        source = _from_hub(section, weights)
    config = check_model_folder(source, weights=weights)
    if RANKS in config:
        raise ModelError(
            f"{source.name} is the decomposed base of a run ({RANKS} in its config.json)",
            fix="name the model that it was made from, with the model.lord_* keys of that run",
        )
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise ModelError(
            f"{source.name} is already quantised ({str(method)[:40]}): training needs the weights it was made from",
            fix="use the 16-bit model; it is quantised while loading and never held whole in 16 bit",
        )
    return source


def package_file(path: str) -> Path:
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
    check_gguf(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:  # the readers of transformers and gguf raise whatever their first surprise raises
        raise ModelError(
            f"model.path: {path} could not be read as GGUF: {type(error).__name__}: {error}",
            fix="use a file of another kind",
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
        folder = Path(
            snapshot_download(
                section.path, revision=section.revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.path: {section.path!r} is no file or folder, and the hub did not give it: {first_line(error)}",
            fix="write ./NAME for a folder beside the recipe, or correct the id; private models need `hf auth login`",
        ) from error
    return Source(section.path, folder, commit=folder.name)


def check_model_folder(source: Source, *, weights: bool) -> dict[str, Any]:
    """Refuse what is incomplete, what needs pickle, what leads out of the folder, and what asks to run its own code.

    The content of config.json. Raises ModelError for the first, SecurityError for the others. Reads JSON only.
    """
    folder = source.folder
    if not (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(f"{folder} holds no config.json", fix="name the folder that save_pretrained wrote")
    refuse_links_out(folder)
    if (folder / ADAPTER_CONFIG).exists():
        # transformers 5.23 would put such an adapter on the base without a word, or load the base that it names.
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}), not a base alone",
            fix="name the base in model.path and the adapter in adapter.init_from",
        )
    config = read_json_object(folder / "config.json")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise SecurityError(
            f"{source.name} asks to run code from its own folder (auto_map in config.json)",
            fix="use a model that transformers implements itself",
        )
    if config.get("transformers_weights") is not None:
        raise ModelError(f"{folder / 'config.json'} names its weights itself (transformers_weights)", fix="remove it")
    _check_tokenizer_files(source)
    _check_generation_config(source)
    if weights and not any(folder.glob("*.safetensors")):
        refuse_pickles(sorted(folder.iterdir()), source.name)
        raise ModelError(f"{folder} holds no *.safetensors", fix="name a folder with weights")
    return config


def _check_generation_config(source: Source) -> None:
    """What export reads of it, and generation stops at."""
    path = source.folder / "generation_config.json"
    if not path.exists():
        return
    ends = read_json_object(path).get("eos_token_id")
    if ends is not None and not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise ModelError(f"{path}: eos_token_id must be a number or a list of numbers", fix="restore the file")


def _check_tokenizer_files(source: Source) -> None:
    """Files that only the tokenizer's own code could read, or that are larger than any tokenizer."""
    path = source.folder / "tokenizer_config.json"
    if path.exists():
        settings = read_json_object(path)
        own_code = isinstance(settings.get("auto_map"), dict) and "AutoTokenizer" in settings["auto_map"]
        if own_code and not (source.folder / "tokenizer.json").is_file():
            raise SecurityError(
                f"{source.name} asks to run code from its own folder (auto_map in tokenizer_config.json)",
                fix="use a model with a tokenizer.json",
            )
    for name in TOKENIZER_FILES:
        path = source.folder / name
        if path.is_file() and (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise ModelError(
                f"{path} is {size:,} bytes long; the limit is {MAX_TOKENIZER_BYTES:,}", fix="restore the file"
            )
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no regular file", fix="put the file itself there")


def verify_download(source: Source) -> None:
    """Hold the weights of a hub id against the names of their files in the cache, which are their SHA-256.

    ModelError with the command that removes a damaged one. Cost: one read of every byte. The hub client does not do so
    (huggingface_hub#3643). Files that are kept otherwise, as in a plain folder, have no such name and are passed over.
    """
    for path in sorted(source.folder.glob("*.safetensors")):
        blob = path.resolve()
        if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and sha256_file(blob) != blob.name:
            raise ModelError(
                f"{path} is damaged: the SHA-256 of its bytes is not {blob.name[:16]}..., by which the hub knows it",
                fix=f"rm {shlex.quote(str(path))} {shlex.quote(str(blob))} and start again: it is downloaded anew",
            )
