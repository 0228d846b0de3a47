"""Each mistake of a user gets its one clear error and exit code, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.commandline import chat_rows, run_cli, write_recipe, write_rows
from tests.spoil import edit_json, edit_tensors, refused
from tests.tiny import build_tiny_llama


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


# Texts in place of a recipe, or behind a sound one (`...`), with the place and the words of the answer.
TEXTS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a tab": ("model:\n\tpath: x\n", ("recipe.yaml:2:1", "tabs")),
    "an open bracket": ("model: {path: x\nrun: y\n", ("recipe.yaml:2:", "the line reads: run: y")),
    "two documents": ("model: {path: x}\n---\nrun: {dir: y}\n", ("recipe.yaml:2:1", "one document")),
    "code": ("model: !!python/object/apply:os.system ['touch marker']\n", ("recipe.yaml:1:8", "is not allowed")),
    "an alias": ("model: &a {path: *a}\n", ("recipe.yaml:1:8", "anchors, aliases and merge keys")),
    "depth": ("[" * 5000, ("recipe.yaml:1:", "levels of nesting")),
    "nothing": ("", ("recipe.yaml:1:1", "the file is empty")),
    "a list": ("- a\n", ("recipe.yaml:1:1", "a mapping of sections")),
    "UTF-16": ("model: x\n".encode("utf-16"), ("recipe.yaml:1:1", "UTF-8")),
    "NUL": ("model: \0\n", ("recipe.yaml:1:8", "is not allowed in YAML")),
    "a newer schema": ("version: 3\n...", ("recipe.yaml:1:10", "schema 3, this build knows 1")),
    "a key of another place": ("...lr: 1\n", ("recipe.yaml:", "learning_rate in the section train")),
    "one key twice": ("...train: {epochs: 1}\ntrain: {epochs: 2}\n", ("given twice, at line", "keep one")),
    "not a number": ("...train: {learning_rate: .nan}\n", ("train.learning_rate", ".nan")),
    "a word of YAML 1.1": ("...train: {fused: yes}\n", ("train.fused: yes is not true or false",)),
    "a time of YAML 1.1": ("...train: {max_steps: 12:30}\n", ("train.max_steps", "12:30")),
    "an octal": ("...train: {max_steps: 010}\n", ("train.max_steps", "010")),
    "a variable": ("...adapter: {init_from: '${HOME}/x'}\n", ("adapter.init_from", "variable")),
    "a home of nobody": ("...adapter: {init_from: '~nobody-here/x'}\n", ("adapter.init_from", "home folder")),
    "keys at odds": (
        "...quant: {quant_type: none, block_size: 64}\n",
        ("quant.block_size has no effect", "quant_type"),
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_recipe(case: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    text, words = TEXTS[case]
    write_rows(tmp_path / "train.jsonl", chat_rows(2))
    sound = f"model: {{path: {tiny_llama_dir}}}\ndata: {{train: [train.jsonl]}}\nrun: {{dir: run}}\n"
    if isinstance(text, str):
        text = text.replace("...", sound).encode()
    (tmp_path / "recipe.yaml").write_bytes(text)
    refused(run_cli("check", tmp_path / "recipe.yaml"), 2, *words)
    assert not Path("marker").exists()


def test_a_byte_order_mark_windows_line_ends_and_1e_4_are_fine(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """PyYAML reads 1e-4 as a text."""
    text = write_recipe(tmp_path, tiny_llama_dir).read_text()
    text = text.replace('"learning_rate": 0.01', '"learning_rate": 1e-4').replace("\n", "\r\n")
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    outcome = run_cli("check", tmp_path / "recipe.yaml")
    assert outcome.code == 0, outcome.err


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
    edit_tensors(model / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _with(value: float) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        edit_tensors(model / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"][0, :2].fill_(value))

    return spoil


def _smaller_vocabulary(model: Path) -> None:
    shutil.rmtree(model)
    build_tiny_llama(model, vocab_size=64)


def _pickle_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


MODELS: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "no config": (_model_without("config.json"), 4, ("config.json",)),
    "no weights": (_model_without("model.safetensors"), 4, ("safetensors",)),
    "truncated weights": (_truncated, 4, ("model.safetensors is cut short", "bytes, where its header asks for")),
    "a tensor missing": (_without_a_tensor, 4, ("lacks 1 tensors", "up_proj")),
    "NaN in a weight": (_with(float("nan")), 4, ("model.layers.1.mlp.up_proj.weight (2 NaN, 0 infinite)",)),
    "infinity in a weight": (_with(float("-inf")), 4, ("model.layers.1.mlp.up_proj.weight (0 NaN, 2 infinite)",)),
    "pickle only": (_pickle_only, 8, ("pickle",)),
    "own code": (
        lambda m: edit_json(m / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        8,
        ("code",),
    ),
    "quantised already": (
        lambda m: edit_json(m / "config.json", quantization_config={"quant_method": "gptq"}),
        4,
        ("gptq",),
    ),
    "tokenizer too large": (_smaller_vocabulary, 4, ("the data holds token id", "embedding has 64 rows")),
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


def test_a_run_folder_with_a_name_too_long_to_look_for(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, run__dir="x" * 300)
    for arguments in (("train", recipe), ("train", recipe, "--resume"), ("data", recipe)):
        outcome = run_cli(*arguments)
        assert outcome.code in (2, 6) and "name too long" in outcome.err and "Traceback" not in outcome.err, outcome.err
