"""An adapter is used with what it was trained on, or not at all: both sides are named, and nothing is left behind.

transformers, PEFT and safetensors load nearly everything here without a word.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.adapters.fold import read_deltas
from qlora_train.adapters.updates import Delta
from qlora_train.artifacts.files import sha256_file
from qlora_train.artifacts.folders import MANIFEST
from tests.commandline import run_cli, write_recipe
from tests.spoil import Tensors, copy_job, edit_json, edit_tensors, flip_bit, refused, shards, sign_again, write_index
from tests.tiny import build_tiny_llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copy(job: Path, tmp_path: Path) -> Path:
    return copy_job(job, tmp_path / "copy")


def nothing_left(folder: Path) -> None:
    assert not (folder / "next").exists() and not list(folder.rglob(".tmp-*"))


def test_a_copied_job_is_whole(copy: Path) -> None:
    """The negative control of all that follows: what is refused below is refused for what was changed."""
    assert run_cli("eval", copy / "run").code == 0
    # The same model in two shards is the same base.
    write_index(copy / "model", shards(copy / "model"))
    outcome = run_cli("eval", copy / "run")
    assert outcome.code == 0, outcome.err


def test_checkpoints_and_adapter_hold_every_fingerprint(job: Path) -> None:
    checkpoints = sorted((job / "run" / "ckpt").iterdir())
    bindings = [json.loads((folder / MANIFEST).read_text())["binding"] for folder in checkpoints]
    bindings.append(json.loads((job / "run" / "adapter" / MANIFEST).read_text()))
    assert len(bindings) == 3
    for binding in bindings:
        assert all(re.fullmatch("[0-9a-f]{64}", binding[key]) for key in ("base", "data", "template", "tokenizer"))
        assert binding["recipe"]["adapter.alpha"] == 8 and binding["recipe"]["train.learning_rate"] == 0.01
    assert bindings[0]["base"] == json.loads((job / "run" / "base.json").read_text())["digest"]


def _other(**config: Any) -> Callable[[Path], object]:
    """Another model under the same name."""

    def replace(model: Path) -> None:
        shutil.rmtree(model)
        build_tiny_llama(model, **config)

    return replace


def _one_weight(model: Path) -> None:
    edit_tensors(model / "model.safetensors", lambda tensors: tensors[UP_PROJ].add_(0.01))


BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one weight changed": (_one_weight, UP_PROJ),
    "one bit changed": (lambda model: flip_bit(model / "model.safetensors"), "1 of"),
    "other weights of equal shape": (_other(seed=1), "tensors differ"),
    "more layers": (_other(num_hidden_layers=3), "model.layers.2."),
    "fewer layers": (_other(num_hidden_layers=1), "model.layers.1."),
    "another vocabulary": (_other(vocab_size=640), "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", BASES)
def test_another_base_under_the_same_name_is_refused(case: str, copy: Path) -> None:
    spoil, tensor = BASES[case]
    spoil(copy / "model")
    digest = json.loads((copy / "run" / "base.json").read_text())["digest"]
    refused(run_cli("eval", copy / "run"), 4, f"trained on base {digest[:16]}, this base is ", tensor)
    exported = run_cli("export", copy / "run", copy / "next")
    refused(exported, 4, "trained on")
    nothing_left(copy)


def test_chat_and_resume_refuse_another_base(copy: Path) -> None:
    _one_weight(copy / "model")
    refused(run_cli("chat", copy / "run", "--once", "x"), 4, "trained on base")
    (copy / "run" / "run.json").unlink()
    resumed = run_cli("train", copy / "recipe.yaml", "--resume", "--from", "1")
    refused(resumed, 5, "the base model")
    assert {path.name for path in (copy / "run" / "ckpt").iterdir()} == {"step-000001", "step-000002"}


def _swap_words(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _other_token(copy: Path) -> None:
    tokenizer = json.loads((copy / "model" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (copy / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))


def _flagged(copy: Path) -> None:
    base = json.loads((copy / "run" / "base.json").read_text())
    base["tensors"][UP_PROJ]["shape"] = "wide"
    (copy / "run" / "base.json").write_text(json.dumps(base))


def _foreign_base(copy: Path) -> None:
    base = json.loads((copy / "run" / "base.json").read_text())
    base["tensors"][UP_PROJ]["sha256"] = "0" * 64
    (copy / "run" / "base.json").write_text(json.dumps(base))


CHANGED_FACTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another tokenizer": (_other_token, ("the tokenizer is ", "trained with ")),
    "another template": (
        lambda copy: _swap_words(copy / "run" / "chat_template.jinja", "helpful", "helpless"),
        ("chat_template.jinja: the chat template is ", "trained with "),
    ),
    "an edited recipe": (
        lambda copy: _swap_words(copy / "run" / "recipe.resolved.yaml", "alpha: 8.0", "alpha: 16.0"),
        ("recipe.resolved.yaml", "adapter.alpha is 16.0, and was 8.0 in training"),
    ),
    "another description of the base": (_foreign_base, ("base.json describes the base ", "was trained on ")),
    "a base described without sense": (_flagged, ("base.json", UP_PROJ)),
    "no description of the base": (lambda copy: (copy / "run" / "base.json").write_text("[]"), ("base.json",)),
    "an adapter without a manifest": (lambda copy: (copy / "run" / "adapter" / MANIFEST).unlink(), (MANIFEST,)),
    "a manifest that names no base": (
        lambda copy: sign_again(copy / "run" / "adapter", base=None),
        ("does not say which base",),
    ),
    "a bit of the adapter": (lambda copy: flip_bit(copy / "run" / "adapter" / WEIGHTS), (WEIGHTS, "SHA-256")),
    "its scale": (lambda copy: edit_json(copy / "run" / "adapter" / CONFIG, lora_alpha=9), (CONFIG,)),
}


@pytest.mark.parametrize("case", CHANGED_FACTS)
def test_changed_facts_of_a_run_are_refused(case: str, copy: Path) -> None:
    spoil, words = CHANGED_FACTS[case]
    spoil(copy)
    refused(run_cli("eval", copy / "run"), 4, *words)
    refused(run_cli("export", copy / "run", copy / "next"), 4, *words)
    nothing_left(copy)


def _first(tensors: Tensors) -> str:
    return min(tensors)


def _renamed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.")] = tensors.pop(name)


def _set(tensors: Tensors, value: float) -> None:
    tensors[_first(tensors)][0, 0] = value


def _another_layer(tensors: Tensors) -> None:
    for half in "AB":
        name = f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight"
        tensors[name.replace("layers.1", "layers.9")] = tensors[name].clone()


ADAPTERS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "NaN": (lambda tensors: _set(tensors, float("nan")), ("1 tensors hold NaN or infinity, first ",)),
    "infinity": (lambda tensors: _set(tensors, float("-inf")), ("1 tensors hold NaN or infinity, first ",)),
    "half a pair": (lambda tensors: tensors.pop(_first(tensors)), ("and no ", "lora_A.weight")),
    "a layer missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.up_proj" in name],
        ("2 tensors missing, first ", "layers.1.mlp.up_proj.lora_A"),
    ),
    "a layer too many": (_another_layer, ("2 unknown tensors, first ", "layers.9")),
    "other names": (_renamed, ("tensors missing, first ", "unknown tensors, first ")),
    "another dtype": (
        lambda tensors: tensors.update({_first(tensors): tensors[_first(tensors)].half()}),
        ("torch.float16, expected ", "torch.float32"),
    ),
    "another width": (
        lambda tensors: tensors.update({_first(tensors): torch.zeros(4, 64)}),
        (" is (4, 64) ", "expected (4, "),
    ),
    "another rank": (
        lambda tensors: tensors.update({_first(tensors): torch.zeros(5, 256)}),
        (" is (5, 256), which is not of rank 4",),
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused_even_where_its_manifest_agrees(case: str, copy: Path) -> None:
    change, words = ADAPTERS[case]
    adapter = copy / "run" / "adapter"
    edit_tensors(adapter / WEIGHTS, change)
    sign_again(adapter)
    refused(run_cli("eval", copy / "run"), 4, *words)
    exported = run_cli("export", copy / "run", copy / "next")
    assert exported.code == 4 and "Fix:" in exported.err, exported.err
    nothing_left(copy)


@pytest.fixture
def hub(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub client's cache, as it lays it out, with the model somebody/tiny; its folder of blobs."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in tiny_llama_dir.iterdir():
        blob = blobs / sha256_file(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return blobs


def test_a_damaged_download_is_refused_with_the_command_that_removes_it(hub: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, Path("somebody/tiny"), data__eval=[], eval__generate_rows=0, train__max_steps=1)
    assert run_cli("check", recipe).code == 0
    blob = (hub.parent / "snapshots").glob("*/model.safetensors").__next__().resolve()
    flip_bit(blob)
    outcome = run_cli("train", recipe, f"run.dir={tmp_path / 'other'}")
    refused(outcome, 4, "model.safetensors is damaged", blob.name[:16], "rm ", str(blob))
    assert not (tmp_path / "other" / "ckpt").exists()
    blob.write_bytes(blob.read_bytes()[:-1000])
    refused(run_cli("train", recipe, f"run.dir={tmp_path / 'other'}"), 4, "model.safetensors is cut short")
    (hub.parent / "snapshots" / "0123456789abcdef0123456789abcdef01234567" / "x.json").symlink_to("/etc/passwd")
    refused(run_cli("train", recipe, f"run.dir={tmp_path / 'other'}"), 8, "x.json is a link to /etc/passwd")


# ---- adapters to go on from


def start_from(folder: Path, adapter: Path, **changes: Any) -> Path:
    """A recipe that goes on from an adapter."""
    settings = {"adapter__init_from": str(adapter), "train__max_steps": 1, "eval__generate_rows": 0, "data__eval": []}
    return write_recipe(folder, folder / "model", **{**settings, **changes, "run__dir": "next"})


def test_going_on_from_a_run_needs_its_base(copy: Path) -> None:
    recipe = start_from(copy, copy / "run" / "adapter")
    # Asking for another scale is told of only after the base was found to be the right one.
    refused(run_cli("train", recipe, "adapter.alpha=9"), 4, "alpha is 8.0 there and 9.0 here")
    refused(run_cli("train", recipe, "quant.double_quant=false"), 4, "trained on base", "tensors differ")
    _one_weight(copy / "model")
    refused(run_cli("train", recipe), 4, "trained on base", UP_PROJ)
    (copy / "run" / "base.json").unlink()
    refused(run_cli("train", recipe), 4, "was trained on base", "this base is", "folder of their own")
    assert not (copy / "next" / "ckpt").exists()


def test_an_adapter_from_elsewhere_is_taken_with_a_warning(copy: Path) -> None:
    adapter = copy / "foreign"
    shutil.copytree(copy / "run" / "adapter", adapter, ignore=shutil.ignore_patterns(MANIFEST))
    edit_json(adapter / CONFIG, base_model_name_or_path="somebody/model", auto_mapping={"base_model_class": "Evil"})
    outcome = run_cli("train", start_from(copy, adapter))
    assert outcome.code == 0, outcome.err
    assert "warning: adapter.init_from" in outcome.err and "somebody/model" in outcome.err
    assert read_deltas(copy / "next" / "adapter"), "what came of it is an adapter like any other"


CONFIGS: dict[str, tuple[dict[str, Any], int, str]] = {
    "rank": ({"r": 8}, 4, "which is not of rank 8"),
    "rank of no matrix": ({"r": 0}, 4, "r must be a whole number"),
    "rank beyond all": ({"r": 10**9}, 4, "r must be a whole number from 1 to 4096"),
    "rank in part": ({"r": 4.5}, 4, "r must be a whole number"),
    "rank of a switch": ({"r": True}, 4, "finite numbers"),
    "scale": ({"lora_alpha": 64}, 4, "alpha is 64 there and 8.0 here"),
    "scale of nothing": ({"lora_alpha": -1}, 4, "lora_alpha must be above 0"),
    "scale beyond all": ({"lora_alpha": 10**400}, 4, "lora_alpha must be above 0 and at most 1e+09"),
    "scale NaN": ({"lora_alpha": float("nan")}, 4, "finite numbers"),
    "dropout": ({"lora_dropout": 1.5}, 4, "lora_dropout from 0 to below 1"),
    "a pattern": ({"target_modules": "(a+)+$"}, 4, "list of module names"),
    "modules that are no names": ({"target_modules": ["../x"]}, 4, "list of module names"),
    "no modules": ({"target_modules": []}, 4, "list of module names"),
    "fewer modules": ({"target_modules": ["q_proj"]}, 4, "unknown tensors"),
    "other modules": ({"target_modules": ["lm_head"]}, 4, "tensors missing"),
    "DoRA": ({"use_dora": True}, 4, "lora_magnitude_vector"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, 4, "modules_to_save"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, 4, "init_lora_weights"),
    "layers multiplied": ({"layer_replication": [[0, 2], [1, 2]]}, 4, "layer_replication"),
    "a field of tomorrow": ({"use_magic": {"with": "code"}}, 4, "use_magic"),
    "another kind": ({"peft_type": "PREFIX_TUNING"}, 4, "PREFIX_TUNING"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_edited_adapter_config_is_refused(case: str, job: Path, tmp_path: Path) -> None:
    changes, code, word = CONFIGS[case]
    adapter = tmp_path / "foreign"
    shutil.copytree(job / "run" / "adapter", adapter, ignore=shutil.ignore_patterns(MANIFEST))
    edit_json(adapter / CONFIG, **changes)
    shutil.copytree(job / "model", tmp_path / "model")
    refused(run_cli("train", start_from(tmp_path, adapter)), code, word)
    assert not (tmp_path / "next" / "ckpt").exists()


# ---- exports


def test_export_refuses_and_leaves_nothing(job: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refused(run_cli("export", job / "run", tmp_path / "there"), 2, "exists already")
    refused(run_cli("export", tmp_path, tmp_path / "new"), 4, "not a run folder")
    refused(run_cli("export", job / "run", tmp_path / "new", "train.epochs=2"), 2, "train.epochs")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_update_that_float16_cannot_hold_is_refused(copy: Path) -> None:
    adapter = copy / "run" / "adapter"
    edit_tensors(adapter / WEIGHTS, lambda tensors: [t.mul_(3e4) for n, t in tensors.items() if "up_proj.lora_" in n])
    sign_again(adapter)
    outcome = run_cli("export", copy / "run", copy / "next", "export.export_dtype=float16")
    refused(outcome, 4, "up_proj", "values up to", "float16", "bfloat16")
    nothing_left(copy)


def test_a_merge_that_is_not_the_trained_model_is_not_published(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied = Delta.applied
    monkeypatch.setattr(Delta, "applied", lambda self, weight: 2 * applied(self, weight) - weight)
    refused(run_cli("export", copy / "run", copy / "next"), 4, "the merged model is not the trained one", "KL")
    nothing_left(copy)


def test_adapters_of_head_and_embedding_are_refused(job: Path, tmp_path: Path) -> None:
    """Merged into tied embeddings they would change the other side too."""
    shutil.copytree(job / "model", tmp_path / "model")
    for module in ("lm_head", "embed_tokens"):
        recipe = write_recipe(tmp_path, tmp_path / "model", adapter__target_modules=[module])
        refused(run_cli("train", recipe), 4, f"'{module}' matches no linear layer")
