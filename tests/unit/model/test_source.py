"""Where a base comes from: paths, packages, the cache of converted GGUF files; and what is refused on the way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from qlora_train.artifacts.files import sha256_file
from qlora_train.artifacts.folders import publishing
from qlora_train.errors import ModelError, SecurityError
from qlora_train.model.source import GGUF_CONVERSION, Source, cache_dir, resolve_source
from qlora_train.recipe.schema import ModelSection


def resolve(path: str | Path, *, weights: bool = True) -> Source:
    return resolve_source(ModelSection(path=str(path)), weights=weights)


def model_folder(folder: Path, **config: object) -> Path:
    """The least that passes for a model before anything is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package with a model folder inside."""
    root = tmp_path / "site" / "packaged_model_for_tests"
    model_folder(root / "model")
    (root / "__init__.py").write_text("raise RuntimeError('finding a file must not import the package')")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_cache_dir_prefers_our_own_variable_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/a/b")
    monkeypatch.delenv("QLORA_TRAIN_CACHE")
    assert cache_dir() == Path("/xdg/qlora_train")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path("/home/somebody/.cache/qlora_train")


def test_cache_dir_without_a_home_is_the_users_own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QLORA_TRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_dir().name == f"qlora_train-{os.getuid()}"


def test_a_folder_keeps_the_name_that_was_written(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    assert resolve(folder) == Source(str(folder), folder, commit=None, file_sha256=None)


def test_a_package_s_folder_is_found_without_importing_it(package: Path) -> None:
    path = "package:packaged_model_for_tests/model"
    assert resolve(path) == Source(path, (package / "model").resolve())
    assert "packaged_model_for_tests" not in sys.modules


@pytest.mark.parametrize("file", ["../x", "model/../../x", "link", "/etc/passwd"])
def test_a_package_s_file_stays_inside_it(package: Path, file: str) -> None:
    model_folder(package.parent / "x")
    (package / "link").symlink_to(package.parent / "x")
    with pytest.raises(SecurityError, match="points outside the package"):
        resolve(f"package:packaged_model_for_tests/{file}")


def test_a_package_s_missing_file_names_its_neighbours(package: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist; there is: __init__\.py, model"):
        resolve("package:packaged_model_for_tests/x.gguf")


@pytest.mark.parametrize("name", ["no_such_package", "", "no.such", "os", "a b"])
def test_a_package_that_holds_no_files_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"no installed package {name!r}"):
        resolve(f"package:{name}/x.gguf")


def test_a_missing_path_names_its_neighbours(tmp_path: Path) -> None:
    model_folder(tmp_path / "near")
    with pytest.raises(ModelError, match=r"does not exist; there is: near"):
        resolve(tmp_path / "nea")
    with pytest.raises(ModelError, match=r"x\.gguf does not exist\. Fix"):
        resolve(tmp_path / "nowhere" / "x.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"not a folder and not a \.gguf file"):
        resolve(tmp_path / "model.zip")


def test_a_gguf_file_is_looked_up_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF some bytes")
    digest = sha256_file(file)
    folder = tmp_path / "cache" / "gguf" / f"{digest[:32]}-v{GGUF_CONVERSION}"
    with publishing(folder, manifest={}) as temporary:
        model_folder(temporary)
    assert resolve(file) == Source(str(file), folder, file_sha256=digest)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cached model .* is damaged"):
        resolve(file)


def test_a_gguf_file_that_is_none_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "base.gguf"
    file.write_bytes(b"this is no GGUF file at all")
    with pytest.raises(ModelError, match="could not be read as GGUF"):
        resolve(file)
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("content", [None, "", "{", "\x00"])
def test_a_config_that_is_missing_or_damaged_is_refused(tmp_path: Path, content: str | None) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"no (readable )?config\.json"):
        resolve(folder)


def test_a_null_quantization_config_means_not_quantised(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", quantization_config=None)
    assert resolve(folder).folder == folder
    model_folder(folder, quantization_config={})
    with pytest.raises(ModelError, match="already quantised"):
        resolve(folder)


def test_weights_are_asked_for_only_when_needed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert resolve(folder, weights=False).folder == folder
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        resolve(folder)
    with pytest.raises(SecurityError, match="auto_map"):
        resolve(model_folder(folder, model_type="own", auto_map={"AutoModel": "x.Y"}), weights=False)
    known = model_folder(folder, auto_map={"AutoModel": "x.Y"})
    assert resolve(known, weights=False).folder == folder, "transformers implements it: the folder's code is not needed"


def test_safetensors_beside_pickle_are_enough(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert resolve(folder).folder == folder


@pytest.mark.parametrize("path", ["nobody/no-such-model", "no-such-model", "a/b/c", "../x", "~/model"])
def test_a_hub_id_that_cannot_be_had_is_a_model_error(path: str) -> None:
    with pytest.raises(ModelError, match=r"is no file or folder, and the hub did not give it") as caught:
        resolve(path)
    assert repr(path) in str(caught.value)


def test_of_a_hub_id_only_what_is_read_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def download(name: str, *, revision: str | None, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(model_folder(tmp_path / "commit"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve("mistralai/Some-Model")
    weights = ["model-00001-of-00002.safetensors", "model.safetensors", "consolidated.safetensors"]
    weights += ["consolidated.00.safetensors", "original/model.safetensors", "model.bin"]
    names = [*weights, "config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"]
    wanted = [*weights[:2], *names[-3:]]
    assert list(filter_repo_objects(names, **asked)) == wanted
    resolve("mistralai/Some-Model", weights=False)
    assert list(filter_repo_objects(names, **asked)) == wanted[2:]
