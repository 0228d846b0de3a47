"""4-bit folders, read by the libraries that their servers use: compressed-tensors and bitsandbytes by transformers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.errors import ModelError
from qlora_train.export.configs import write_configs
from qlora_train.export.formats.four_bit import (
    ShardWriter,
    encode_nf4,
    group_size_for,
    nf4_config,
    packed_parts,
    w4a16_config,
)
from qlora_train.export.formats.readers import FourBitFolder, unpack_groups
from qlora_train.export.formats.run import _result
from qlora_train.export.formats.writers import FORMATS
from qlora_train.model.load import to_float32
from qlora_train.model.skeleton import linear_layers
from qlora_train.model.source import Source
from qlora_train.quant.bnb import forbid_cpu_repacking
from tests.unit.export_formats.rounding import quantize_groups
from tests.unit.export_formats.served import random_model


def test_groups_are_as_good_as_the_plain_rule_or_better() -> None:
    weight = torch.randn(64, 256)
    codes, scale = quantize_groups(weight, 128)
    assert codes.min() >= -8 and codes.max() <= 7 and scale.dtype == torch.bfloat16 and scale.shape == (64, 2)
    groups = weight.unflatten(1, (2, 128))
    plain = (groups.abs().amax(-1) / 7.5).bfloat16().float()[..., None]
    rounded = (groups / plain).round().clamp(-8, 7) * plain
    ours = codes.unflatten(1, (2, 128)) * scale.float()[..., None]
    error, plain_error = ((values - groups).square().sum(-1) for values in (ours, rounded))
    assert bool((error <= plain_error * (1 + 1e-6)).all()) and error.sum() < 0.95 * plain_error.sum()


def test_a_group_of_zeros_stays_zero() -> None:
    codes, scale = quantize_groups(torch.zeros(2, 64), 32)
    assert not codes.any() and torch.isfinite(scale).all()


def test_compressed_tensors_unpacks_what_was_packed() -> None:
    compressor = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = torch.randn(48, 128)
    codes, scale = quantize_groups(weight, 64)
    parts = packed_parts("a.b.weight", codes, scale)
    shape = torch.Size(parts["a.b.weight_shape"].tolist())
    assert shape == weight.shape and torch.equal(parts["a.b.weight_scale"], scale)
    assert torch.equal(compressor.unpack_from_int32(parts["a.b.weight_packed"], 4, shape), codes)
    assert torch.equal(parts["a.b.weight_packed"], compressor.pack_to_int32(codes, 4))
    own = unpack_groups(parts["a.b.weight_packed"], parts["a.b.weight_scale"])
    torch.testing.assert_close(own, (codes.unflatten(1, (2, 64)) * scale.float()[..., None]).flatten(1))


@pytest.mark.parametrize(("widths", "size"), [({128, 256}, 128), ({128, 576}, 64), ({96}, 32)])
def test_the_largest_group_that_fits(widths: set[int], size: int) -> None:
    assert group_size_for(widths) == size


def test_widths_that_no_group_fits_are_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 32"):
        group_size_for({128, 100})


def write(folder: Path, kind: str, shard_bytes: int = 2**30) -> tuple[dict[str, Tensor], FourBitFolder]:
    """The random model in 4 bit; what our own reader makes of it."""
    model = random_model("llama")
    linear = {f"{name}.weight" for name in linear_layers(model)}

    def encode(name: str, weight: Tensor) -> dict[str, Tensor]:
        return encode_nf4(name, weight) if kind == "nf4" else packed_parts(name, *quantize_groups(weight, 128))

    writer = ShardWriter(folder, shard_bytes)
    for name, values in model.named_parameters():
        writer.add(encode(name, values) if name in linear else {name: values.bfloat16()})
    writer.close()
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config["quantization_config"] = nf4_config(["lm_head"]) if kind == "nf4" else w4a16_config(128, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(model.named_parameters())
    return weights, FourBitFolder(folder, {name: name for name in weights})


@pytest.mark.parametrize("kind", ["nf4", "w4a16"])
def test_transformers_loads_the_weights_that_our_reader_reads(kind: str, tmp_path: Path) -> None:
    if kind == "w4a16":
        pytest.importorskip("compressed_tensors")
    weights, read = write(tmp_path, kind)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    if kind == "nf4":
        forbid_cpu_repacking(loaded)
        to_float32(loaded)
    dense = random_model("llama")
    for name, parameter in dense.named_parameters():
        parameter.data = read.value(name)
        error = (read.value(name) - weights[name]).norm() / weights[name].norm()
        assert 0.05 < error < 0.15 if name.endswith("proj.weight") else error < 0.01, name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours, trained = (m(input_ids=ids).logits for m in (loaded, dense, random_model("llama")))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert (ours - trained).abs().max() > 0.1, "negative control: 4 bit show"


def test_of_a_tensor_that_is_not_quantised_only_the_rows_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, read = write(tmp_path, "nf4")
    name, packed = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    whole, rows = read.value(name), read.value(packed)[3:9]
    assert torch.equal(read.rows(packed, 3, 9), rows)
    monkeypatch.setattr(FourBitFolder, "_read", None)
    assert torch.equal(read.rows(name, 30, 47), whole[30:47]) and read.rows(name, 0, 1).dtype == torch.float32


def test_the_compute_dtype_is_the_one_given() -> None:
    assert nf4_config([], compute_dtype="float32")["bnb_4bit_compute_dtype"] == "float32"
    assert nf4_config([])["bnb_4bit_compute_dtype"] == "bfloat16"


def test_served_commands_quote_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    written: Any = SimpleNamespace(commands=("vllm serve THIS_FOLDER/base",), notices=())
    (command,) = _result("nf4", folder, None, written).commands  # type: ignore[arg-type]
    assert shlex.split(command) == ["vllm", "serve", f"{folder}/base"]


def test_room_for_q4_1_counts_its_16_bit_vocabulary() -> None:
    """Llama 3.2 1B: the tied embedding is 128,256 x 2,048 of 1,235.8 M weights."""
    embedding = 128_256 * 2_048 / 1_235_814_400
    assert FORMATS["gguf-q4_1"].bits >= 16 * embedding + 5 * (1 - embedding)


def test_configs_are_the_bases_own_with_what_changes(tmp_path: Path) -> None:
    base = {"torch_dtype": "float16", "auto_map": {}, "hidden_size": 8, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(base))
    (tmp_path / "out").mkdir()
    write_configs(tmp_path / "out", Source("base", tmp_path), [7], "bfloat16", {"quant_method": "x"})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {
        "hidden_size": 8,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "x"},
    }
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [2, 7]


def test_shards_are_the_single_file_cut_up(tmp_path: Path) -> None:
    for name, shard_bytes in (("whole", 2**30), ("cut", 60_000)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "nf4", shard_bytes)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    parts: dict[str, Tensor] = {}
    for path in sorted((tmp_path / "cut").glob("*.safetensors")):
        here = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in here)
        parts |= here
    assert len(set(index["weight_map"].values())) > 2 and parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_tensors_of_no_weight_and_weights_without_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "w4a16")
    names = {name: name for name, _ in random_model("llama").named_parameters()}
    missing = dict(names)
    del missing["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight, which belongs to no weight"):
        FourBitFolder(tmp_path, missing)
    with pytest.raises(ModelError, match=r"lacks 1 weights, first model\.other"):
        FourBitFolder(tmp_path, names | {"model.other.weight": "model.other.weight"})
