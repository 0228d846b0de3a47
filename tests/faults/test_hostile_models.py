"""A model, an adapter or a folder of rows that is not what it says is refused before any library reads it.

Where an exit code is 8, the file reaches for something outside of its folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.commandline import run_cli, write_recipe
from tests.spoil import (
    ESCAPE,
    edit_header,
    edit_json,
    edit_tensors,
    harmless,
    read_raw_header,
    refused,
    shards,
    split_file,
    train_once,
    write_index,
    write_raw,
)
from tests.unit.model.test_gguf_header import BAD as BAD_GGUF

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def _index(change: Callable[[dict[str, str], Path], object]) -> Callable[[Path], object]:
    def spoil(model: Path) -> None:
        index = shards(model)
        change(index["weight_map"], model)
        write_index(model, index)

    return spoil


def _move_out(weight_map: dict[str, str], model: Path) -> None:
    (model / "model-0.safetensors").rename(model.parent / "outside.safetensors")
    weight_map.update(
        {name: "../outside.safetensors" for name, file in weight_map.items() if file.startswith("model-0")}
    )


def _stored_twice(weight_map: dict[str, str], model: Path) -> None:
    edit_tensors(model / "model-1.safetensors", lambda t: t.update({"model.norm.weight": torch.zeros(128)}))
    edit_tensors(model / "model-0.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(128)}))
    write_index(model, {"weight_map": weight_map})


def _link(name: str, target: str = "outside") -> Callable[[Path], object]:
    def spoil(model: Path) -> None:
        outside = model.parent / target
        (model / name).rename(outside)
        (model / name).symlink_to(outside)

    return spoil


def _pipe(name: str) -> Callable[[Path], object]:
    def spoil(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return spoil


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda model: edit_header(model / "model.safetensors", change)


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda model: edit_json(model / "config.json", **changes)


def _config_text(text: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(text)


def _raw(header: bytes, data: bytes = b"") -> Callable[[Path], object]:
    return lambda model: write_raw(model / "model.safetensors", header, data)


def _claimed_length(length: int) -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")


def _twice(model: Path) -> None:
    path = model / "model.safetensors"
    entry = json.dumps(read_raw_header(path)[UP_PROJ])
    header = json.dumps(read_raw_header(path))
    write_raw(path, f'{header[:-1]}, "{UP_PROJ}": {entry}}}'.encode(), split_file(path))


def _adapter_beside(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/base"}))


MODELS: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "an index that leads out": (_index(_move_out), 8, ("'../outside.safetensors'", "outside of it")),
    "an index with an absolute path": (
        _index(lambda names, _: names.update({UP_PROJ: "/etc/passwd"})),
        8,
        ("'/etc/passwd'",),
    ),
    "an index of numbers": (_index(lambda names, _: names.update({UP_PROJ: 1})), 8, ("names 1",)),  # type: ignore[dict-item]
    "an index that leaves out tensors": (
        _index(lambda names, _: [names.pop(name) for name in list(names) if "layers.1" in name]),
        4,
        ("leaves out", "layers.1"),
    ),
    "an index that leaves out a shard": (
        _index(
            lambda names, _: [names.pop(name) for name, file in list(names.items()) if file == "model-1.safetensors"]
        ),
        4,
        ("lacks 10 tensors",),
    ),
    "an index of a tensor that is not there": (
        _index(lambda names, _: names.update({"a.weight": "model-0.safetensors"})),
        4,
        ("lists a.weight in model-0.safetensors, which lacks it",),
    ),
    "a missing shard": (_index(lambda _, model: (model / "model-1.safetensors").unlink()), 4, ("lacks model-1",)),
    "a cut shard": (
        _index(lambda _, model: os.truncate(model / "model-1.safetensors", 5000)),
        4,
        ("model-1.safetensors is cut short",),
    ),
    "a tensor in two shards": (_index(_stored_twice), 4, ("model.norm.weight",)),
    "an index that is a list": (lambda model: (shards(model), write_index(model, [])), 4, ("no JSON object",)),
    "an index of nothing": (lambda model: (shards(model), write_index(model, {"weight_map": {}})), 4, ("no shards",)),
    "weights behind a link": (_link("model.safetensors"), 8, ("model.safetensors is a link to", "outside of")),
    "a config behind a link": (_link("config.json"), 8, ("config.json is a link to",)),
    "a tokenizer behind a link": (_link("tokenizer.json"), 8, ("tokenizer.json is a link to",)),
    "a config that is a pipe": (_pipe("config.json"), 4, ("config.json is no regular file",)),
    "weights that are a pipe": (_pipe("model.safetensors"), 4, ("model.safetensors",)),
    "a template that is a pipe": (_pipe("chat_template.jinja"), 4, ("chat_template.jinja is no regular file",)),
    "a header of 2^63 bytes": (_claimed_length(2**63), 4, ("its header alone is",)),
    "a header of 2^64 - 1 bytes": (_claimed_length(2**64 - 1), 4, ("its header alone is",)),
    "a header beyond any": (
        _raw(b"{" + b" " * (11 * 2**20) + b"}"),
        4,
        ("header has 11,534,338 bytes; the limit is 10,485,760",),
    ),
    "a header that is no JSON": (_raw(b"{{{{"), 4, ("not readable",)),
    "a header nested without end": (_raw(b"[" * 2**20), 4, ("not readable",)),
    "a header that is a list": (_raw(b"[]"), 4, ("no JSON object",)),
    "a negative offset": (
        _header(lambda header: header[UP_PROJ].update(data_offsets=[-8, 65528])),
        4,
        (UP_PROJ, "no place in the file"),
    ),
    "an offset beyond the file": (
        _header(lambda header: header[UP_PROJ].update(data_offsets=[2**40, 2**40 + 65536])),
        4,
        ("of the data, not at",),
    ),
    "two tensors in one place": (
        _header(lambda header: header[UP_PROJ].update(data_offsets=header[UP_PROJ.replace("1", "0")]["data_offsets"])),
        4,
        ("starts at byte",),
    ),
    "a shape that takes more": (
        _header(lambda header: header[UP_PROJ].update(shape=[2**31, 2**31])),
        4,
        (UP_PROJ, "takes", "bytes, and has 65,536"),
    ),
    "another shape": (
        _header(lambda header: header[UP_PROJ].update(shape=[128, 256])),
        4,
        (UP_PROJ, "(128, 256)", "config.json asks for (256, 128)"),
    ),
    "numbers read as others": (
        _header(lambda header: header[UP_PROJ].update(dtype="I16")),
        4,
        (UP_PROJ, "stored as I16"),
    ),
    "a dtype that is none": (
        _header(lambda header: header[UP_PROJ].update(dtype="F17")),
        4,
        ("'F17', which is unknown",),
    ),
    "a dtype that is no name": (
        _header(lambda header: header[UP_PROJ].update(dtype=["F32"])),
        4,
        ("which is unknown",),
    ),
    "bytes after the end": (
        lambda model: (model / "model.safetensors").open("ab").write(b"PK\x03\x04"),
        4,
        ("bytes, where its header asks for",),
    ),
    "a tensor told twice": (_twice, 4, (f"'{UP_PROJ}' twice",)),
    "a name that steers the terminal": (
        _header(lambda header: header.update({ESCAPE: header.pop(UP_PROJ)})),
        4,
        ("is not plain text",),
    ),
    "an adapter in the base": (_adapter_beside, 4, ("holds an adapter", "adapter.init_from")),
    "weights of another name": (_config(transformers_weights="../x.safetensors"), 4, ("transformers_weights",)),
    "quantised by bitsandbytes": (
        _config(quantization_config={"quant_method": "bitsandbytes"}),
        4,
        ("already quantised (bitsandbytes)",),
    ),
    "quantised by AWQ": (_config(quantization_config={"quant_method": "awq"}), 4, ("already quantised (awq)",)),
    "quantised by nobody": (_config(quantization_config="x"), 4, ("already quantised (unknown)",)),
    "a billion layers": (_config(num_hidden_layers=10**9), 4, ("1000000000 layers; the limit is 1,000",)),
    "layers in words": (_config(num_hidden_layers="two"), 4, ("config.json",)),
    "no heads": (_config(num_attention_heads=0), 4, ("config.json",)),
    "a config of nothing": (_config_text("[]"), 4, ("no JSON object",)),
    "a config nested without end": (_config_text('{"a":' * 200_000), 4, ("nested too deeply",)),
    "a config beyond any": (_config_text('{"a": "' + "x" * 2**24 + '"}'), 4, ("the limit is 16,777,216",)),
    "a tokenizer beyond any": (
        lambda model: os.truncate(model / "tokenizer.json", 2**29),
        4,
        ("tokenizer.json is 536,870,912 bytes long",),
    ),
    "a generation config of nothing": (
        lambda model: (model / "generation_config.json").write_text("{"),
        4,
        ("no readable generation_config.json",),
    ),
    "an end in words": (
        lambda model: edit_json(model / "generation_config.json", eos_token_id=["stop"]),
        4,
        ("eos_token_id must be",),
    ),
    "a tokenizer of nothing": (lambda model: (model / "tokenizer.json").write_text("{}"), 4, ("tokenizer",)),
    "no linear layer": (
        _config(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=2, n_embd=128, n_head=4),
        4,
        ("no linear layer to adapt",),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_what_it_says_is_refused(case: str, tmp_path: Path, model: Path) -> None:
    spoil, code, words = MODELS[case]
    spoil(model)
    started = time.monotonic()
    outcome = train_once(tmp_path, model)
    assert time.monotonic() - started < 20
    refused(outcome, code, *words)
    assert not (tmp_path / "run" / "ckpt").exists()
    harmless(outcome)


@pytest.mark.parametrize("case", ["keys without end", "a tensor beyond the file", "not GGUF"])
def test_a_gguf_file_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    """All cases: tests/unit/model/test_gguf_header.py."""
    content, words = BAD_GGUF[case]
    (tmp_path / "base.gguf").write_bytes(content)
    refused(run_cli("check", write_recipe(tmp_path, tmp_path / "base.gguf")), 4, words)


def test_a_folder_of_rows_with_a_link_out_of_it_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"text": ["abc"] * 8}), tmp_path / "outside.parquet")
    (tmp_path / "rows" / "train.parquet").symlink_to(tmp_path / "outside.parquet")
    recipe = write_recipe(tmp_path, model, data__train=["rows"], data__eval=[], eval__generate_rows=0)
    refused(run_cli("check", recipe), 8, "train.parquet is a link to", "outside of")
