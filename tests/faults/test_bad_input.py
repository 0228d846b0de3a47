"""Each mistake of a user gets its one clear error and exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commandline import Outcome, chat_rows, run_cli, write_recipe, write_rows
from tests.tiny import build_tiny_llama


def refused(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err and "Fix:" in outcome.err, outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def no_trace(folder: Path) -> None:
    assert not (folder / "run" / "ckpt").exists() and not (folder / "run" / "adapter").exists()
    assert not list(folder.rglob(".tmp-*"))


Spoil = Callable[[Path], dict[str, object]]


def _rows(path: str, rows: list[object]) -> Spoil:
    def spoil(folder: Path) -> dict[str, object]:
        write_rows(folder / path, rows)
        return {}

    return spoil


MASKED = [{"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "x"}]}]

CASES: dict[str, tuple[Spoil, int, tuple[str, ...]]] = {
    "missing data file": (lambda _: {"data__train": ["trian.jsonl"]}, 2, ("data.train", "trian.jsonl")),
    "unknown key": (lambda _: {"train__learnig_rate": 1e-3}, 2, ("recipe.yaml:", "learning_rate")),
    "unknown method": (lambda _: {"adapter__method": "lorra"}, 2, ("adapter.method", "lora")),
    "two mistakes": (lambda _: {"train__epochs": -1, "adapter__r": "x"}, 2, ("train.epochs", "adapter.r")),
    "wrong column": (_rows("train.jsonl", [{"mesages": []}]), 3, ("train.jsonl:1", "mesages", "messages")),
    "empty set": (_rows("train.jsonl", []), 3, ("train.jsonl",)),
    "all rows too long": (_rows("train.jsonl", MASKED), 3, ("0 trainable rows", "data.seq_len")),
    "overlong fail": (
        lambda folder: _rows("train.jsonl", chat_rows(3) + MASKED)(folder) | {"data__overlong": "fail"},
        3,
        ("train.jsonl:4", "seq_len"),
    ),
    "unknown target": (
        lambda _: {"adapter__target_modules": ["q_projj", "v_proj"]},
        4,
        ("'q_projj' matches no linear layer", "q_proj"),
    ),
    "a choice of answers in text": (
        lambda _: (
            {"data__train": [{"path": "train.jsonl", "format": "text"}], "data__eval": []}
            | {"data__loss_on": "completion"}
        ),
        2,
        ("data.loss_on", "no effect", "train.jsonl is text"),
    ),
    "seq_len past the model": (lambda _: {"data__seq_len": 100_000}, 4, ("positions",)),
    "cuda without a card": (
        lambda _: {"model__device": "cuda"},
        0 if torch.cuda.is_available() else 6,
        () if torch.cuda.is_available() else ("CUDA",),
    ),
    "block size the CPU gets wrong": (lambda _: {"quant__block_size": 256}, 4, ("multiple of 256",)),
    "no such adapter": (lambda _: {"adapter__init_from": "nowhere"}, 2, ("adapter.init_from",)),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_in_recipe_and_data(case: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    spoil, code, words = CASES[case]
    write_recipe(tmp_path, tiny_llama_dir)
    recipe = write_recipe(tmp_path, tiny_llama_dir, **spoil(tmp_path))
    if code == 0:
        pytest.skip("this machine has a CUDA device")
    refused(run_cli("train", recipe), code, *words)
    no_trace(tmp_path)


def _model_without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _without_a_tensor(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def _with_nan(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def _edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickle_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


MODELS: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "no config": (_model_without("config.json"), 4, ("config.json",)),
    "no weights": (_model_without("model.safetensors"), 4, ("safetensors",)),
    "truncated weights": (_truncated, 4, ("do not load",)),
    "a tensor missing": (_without_a_tensor, 4, ("lacks 1 tensors", "up_proj")),
    "NaN in a weight": (_with_nan, 4, ("NaN or infinity", "up_proj")),
    "pickle only": (_pickle_only, 8, ("pickle",)),
    "own code": (
        lambda m: _edit_config(m, model_type="own", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        8,
        ("code",),
    ),
    "quantised already": (lambda m: _edit_config(m, quantization_config={"quant_method": "gptq"}), 4, ("gptq",)),
    "tokenizer too large": (lambda m: _edit_config(m, vocab_size=64), 4, ("embedding",)),
    "no chat template": (_model_without("chat_template.jinja"), 4, ("chat_template",)),
}


@pytest.mark.parametrize("case", MODELS)
def test_unusable_models(case: str, tmp_path: Path) -> None:
    spoil, code, words = MODELS[case]
    model = build_tiny_llama(tmp_path / "model")
    spoil(model)
    refused(run_cli("train", write_recipe(tmp_path, model)), code, *words)
    no_trace(tmp_path)


def test_a_set_is_not_accounted_for_at_a_length_that_the_model_lacks(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__seq_len=100_000)
    refused(run_cli("data", recipe), 4, "data.seq_len is 100,000", "positions")
    assert not (tmp_path / "run" / "data.json").exists()


def test_missing_model_and_package(tmp_path: Path, tiny_llama_dir: Path) -> None:
    for path, code in (("/nowhere/model", 2), ("package:no_such_package/x.gguf", 4), ("package:numpy/../../etc", 8)):
        recipe = write_recipe(tmp_path, tiny_llama_dir, model__path=path)
        refused(run_cli("train", recipe), code, "model")


def test_several_processes_are_refused(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(run_cli("train", write_recipe(tmp_path, tiny_llama_dir)), 6, "WORLD_SIZE is 2")


def test_resume_of_nothing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    refused(run_cli("train", write_recipe(tmp_path, tiny_llama_dir), "--resume"), 5, "nothing to resume")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    model = build_tiny_llama(folder / "model")
    recipe = write_recipe(folder, model, train__max_steps=2, eval__generate_rows=0)
    assert run_cli("train", recipe).code == 0
    return folder


def test_export_refuses_and_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refused(run_cli("export", finished / "run", tmp_path / "there"), 2, "exists already")
    refused(run_cli("export", tmp_path, tmp_path / "new"), 4, "not a run folder")
    refused(run_cli("export", finished / "run", tmp_path / "new", "train.epochs=2"), 2, "train.epochs")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_another_base_is_refused(finished: Path, tmp_path: Path) -> None:
    """The base changed under the adapter: export, eval and chat say so instead of merging into another model."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    weights = finished / "model" / "model.safetensors"
    original = weights.read_bytes()
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
        tensors["model.layers.0.mlp.up_proj.weight"] += 0.01
        save_file(tensors, weights, metadata={"format": "pt"})
        refused(run_cli("export", folder / "run", tmp_path / "out"), 4, "up_proj", "trained on")
        refused(run_cli("eval", folder / "run"), 4, "up_proj", "trained on base")
        refused(run_cli("chat", folder / "run", "--once", "x"), 4, "trained on base")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))
    finally:
        weights.write_bytes(original)


def _spoil_adapter(run: Path, name: str) -> str:
    path = run / "adapter" / "adapter_model.safetensors"
    if name == "alpha":
        config = run / "adapter" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": float("nan")}))
        return "adapter_config.json"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    first = min(tensors)
    if name == "nan":
        tensors[first][0, 0] = float("nan")
    elif name == "missing":
        tensors.pop(first)
    elif name == "extra":
        tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 128)
    save_file(tensors, path, metadata={"format": "pt"})
    return ""


@pytest.mark.parametrize("damage", ["nan", "missing", "extra", "alpha"])
def test_a_spoilt_adapter_is_refused(finished: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    word = _spoil_adapter(tmp_path / "run", damage)
    refused(run_cli("export", tmp_path / "run", tmp_path / "out"), 4, word)
    refused(run_cli("eval", tmp_path / "run"), 4, word)
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_train.model.causal import CausalModel

    original, calls = CausalModel.loss_sum, []

    def poisoned(self: CausalModel, batch: object) -> torch.Tensor:
        loss = original(self, batch)  # type: ignore[arg-type]
        calls.append(self.model.training)
        return loss * float("nan") if sum(calls) == 9 else loss  # measuring, rehearsal, then step 4's second

    monkeypatch.setattr(CausalModel, "loss_sum", poisoned)
    recipe = write_recipe(tmp_path, tiny_llama_dir, eval__generate_rows=0)
    outcome = run_cli("train", recipe)
    refused(outcome, 7, "step 4", "rows")
    steps = sorted(p.name for p in (tmp_path / "run" / "ckpt").iterdir())
    assert steps == ["step-000002"]
    tensors = load_file(tmp_path / "run" / "ckpt" / "step-000002" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
