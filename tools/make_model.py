"""A random Llama of a chosen size on disk, and a run folder with an adapter bound to it; the model is never held.

    python tools/make_model.py 1B /tmp/made        ->  /tmp/made/model  /tmp/made/run  /tmp/made/recipe.yaml

What merging, planning and verification cost does not depend on what the weights are worth: this makes models of any
size to measure it on. The weights are bfloat16 shards, the tokenizer is a real one of few tokens, the adapter has the
size of one that was trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests' tokenizer, whatever runs this
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from qlora_train.artifacts.files import write_file, write_json
from qlora_train.artifacts.folders import publishing
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.account import account_for, build_loader, write_account
from qlora_train.data.split import load_splits
from qlora_train.export.safetensors_reader import read_tensor
from qlora_train.export.safetensors_writer import Planned, plan_shards, write_shards
from qlora_train.model.files import stored_tensors
from qlora_train.model.skeleton import (
    build_skeleton,
    linear_layers,
    load_config,
    load_tokenizer,
    template_digest,
    tokenizer_digest,
)
from qlora_train.model.source import Source, resolve_source
from qlora_train.quant.bnb import QuantSettings, quantize
from qlora_train.quant.fingerprint import BasePrint, TensorPrint, print_tensor
from qlora_train.recipe.load import LoadedRecipe, load_recipe, resolved_yaml
from qlora_train.recipe.schema import Recipe
from tests.commandline import chat_rows, write_rows
from tests.tiny import VOCAB_SIZE, build_tiny_tokenizer

# hidden, MLP, layers, heads, heads of keys and values, vocabulary, tied head: as in Llama 3
SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (128, 256, 2, 4, 2, VOCAB_SIZE, True),
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "8B": (4096, 14336, 32, 32, 8, 128_256, False),
}
WEIGHT_STD = 0.02
POOL = 2**24 + 77  # odd: the blocks that quantising shares a scale in differ wherever values come again
LORA_B_STD = 0.01  # an update of some percent of the weight's norm


def make_model(size: str, folder: Path, *, shard_bytes: int = 2**31, seed: int = 0) -> Path:
    """Config, tokenizer and bfloat16 shards. Memory: one tensor and a pool of 32 MiB."""
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    tokenizer = build_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    pool = (WEIGHT_STD * torch.randn(POOL, generator=generator)).bfloat16()
    shapes = {name: tuple(p.shape) for name, p in build_skeleton(config).named_parameters()}
    planned = [Planned(name, shape, torch.bfloat16) for name, shape in sorted(shapes.items())]
    write_shards(folder, plan_shards(planned, shard_bytes), lambda name: _values(shapes[name], pool, generator))
    return folder


def _values(shape: tuple[int, ...], pool: Tensor, generator: torch.Generator) -> Tensor:
    """Ones for a norm; else values of the pool, from a place of the tensor's own."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    start = int(torch.randint(len(pool), (), generator=generator))
    values = torch.empty(math.prod(shape), dtype=pool.dtype)
    filled = 0
    while filled < len(values):
        part = pool[start : start + len(values) - filled]
        values[filled : filled + len(part)] = part
        filled, start = filled + len(part), 0
    return values.view(shape)


def make_run(folder: Path, model: Path, *, seed: int = 0) -> Path:
    """A run folder as training leaves it, as far as export, eval and chat read it."""
    loaded = load_recipe(_write_recipe(folder, model))
    recipe = loaded.recipe
    run_dir = RunDir(recipe.run.dir)
    run_dir.root.mkdir(parents=True)
    source = resolve_source(recipe.model)
    tokenizer = load_tokenizer(source)
    write_file(run_dir.recipe, resolved_yaml(loaded).encode())
    write_file(run_dir.chat_template, str(tokenizer.chat_template).encode())
    data = _write_data(run_dir, loaded, tokenizer)
    base = print_base_of_files(source, recipe)
    origin = {"name": source.name, "commit": source.commit, "file_sha256": source.file_sha256}
    write_json(run_dir.base, {"source": origin, **base.as_dict()})
    binding = {
        "base": base.digest,
        "data": data,
        "template": template_digest(tokenizer),
        "tokenizer": tokenizer_digest(tokenizer),
        "recipe": {},
        "step": 1,
    }
    with publishing(run_dir.adapter, manifest=binding) as temporary:
        save_file(dict(_adapter(source, recipe, seed)), temporary / "adapter_model.safetensors", {"format": "pt"})
        section = recipe.adapter
        LoraConfig(
            r=section.r, lora_alpha=int(section.alpha), target_modules="all-linear", task_type="CAUSAL_LM",
            inference_mode=True,
        ).save_pretrained(str(temporary))  # fmt: skip
    return run_dir.root


def print_base_of_files(source: Source, recipe: Recipe) -> BasePrint:
    """The fingerprint that loading the base would take, from its files, one tensor at a time."""
    skeleton = build_skeleton(load_config(source))
    quantised = {f"{name}.weight" for name in linear_layers(skeleton)} if recipe.quant.quant_type != "none" else set()
    section = recipe.quant
    settings = QuantSettings(section.quant_type, section.double_quant, section.block_size, section.storage_dtype)
    compute_dtype: torch.dtype = getattr(torch, recipe.model.compute_dtype)
    tensors: dict[str, TensorPrint] = {}
    for name, stored in stored_tensors(source, skeleton).items():
        tensor = read_tensor(stored.path, stored.name).to(compute_dtype)
        tensors[name] = print_tensor(quantize(tensor, settings) if name in quantised else tensor)
    return BasePrint(tensors, dict(settings.__dict__) if quantised else {})


def _write_recipe(folder: Path, model: Path) -> Path:
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"r": 16, "alpha": 32},
        "data": {"train": ["train.jsonl"], "eval": ["test.jsonl"], "seq_len": 256},
        "eval": {"generate_rows": 0},
        "run": {"dir": "run"},
    }
    write_rows(folder / "train.jsonl", chat_rows(20))
    write_rows(folder / "test.jsonl", chat_rows(16, start=100))
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(sections, indent=1), encoding="utf-8")
    return path


def _write_data(run_dir: RunDir, loaded: LoadedRecipe, tokenizer: Any) -> str:
    """data.json and its companions; the fingerprint of the training rows."""
    recipe = loaded.recipe
    train, held_out = load_splits(recipe, tokenizer)
    loader = build_loader(recipe, train, tokenizer.pad_token_id)
    account = account_for(recipe, train, held_out, tokenizer, loader)
    files = [
        {"name": source.source.name, "kind": source.source.kind, "sha256": source.digest}
        for split in (train, held_out)
        if split is not None
        for source in split.sources
    ]
    facts = {"files": files, "end_token_ids": train.end_token_ids, "conversations": train.holds_conversations()}
    write_account(run_dir, {**account.as_dict(recipe), **facts}, train, held_out)
    return str(train.table.fingerprint())


def _adapter(source: Source, recipe: Recipe, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A as PEFT starts it, B as if training had moved it."""
    generator = torch.Generator().manual_seed(seed + 1)
    r = recipe.adapter.r
    for name, layer in linear_layers(build_skeleton(load_config(source))).items():
        bound = 1 / math.sqrt(layer.in_features)
        stem = f"base_model.model.{name}"
        yield f"{stem}.lora_A.weight", bound * (2 * torch.rand(r, layer.in_features, generator=generator) - 1)
        yield f"{stem}.lora_B.weight", LORA_B_STD * torch.randn(layer.out_features, r, generator=generator)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES, help="of the model")
    parser.add_argument("folder", type=Path, help="a new folder for model, rows, recipe and run")
    parser.add_argument("--shard-gib", type=float, default=2.0, help="largest weight file")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    model = make_model(arguments.size, folder / "model", shard_bytes=int(arguments.shard_gib * 2**30))
    print(make_run(folder, model))


if __name__ == "__main__":
    main()
