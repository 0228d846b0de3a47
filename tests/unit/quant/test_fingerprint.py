"""A fingerprint is the same exactly where the codes are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.quant.bnb import QuantSettings, packed_parts, quantize
from qlora_train.quant.fingerprint import BasePrint, base_parameter_name, hash_tensors, print_base, print_tensor
from tests.loading import tiny_base, with_adapter

NESTED = QuantSettings("nf4", True, 64, "uint8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quant_type": "fp4"},
        {"double_quant": False},
        {"block_size": 32, "quant_type": "fp4", "double_quant": False},
        {"block_size": 128},
    ],
    ids=str,
)
def test_quantising_a_weight_again_gives_the_loaded_codes(
    options: dict[str, Any], dtype: torch.dtype, tiny_llama_dir: Path
) -> None:
    """What export stands on."""
    base_print = tiny_base(tiny_llama_dir, dtype=dtype, **options).print
    settings = QuantSettings(**base_print.quant)  # type: ignore[arg-type]
    stored = load_file(tiny_llama_dir / "model.safetensors")
    quantised = {name for name, entry in base_print.tensors.items() if entry.quantised}
    assert len(quantised) == 14
    for name in quantised:
        assert print_tensor(quantize(stored[name].to(dtype), settings)) == base_print.tensors[name], name
    name = min(quantised)
    other = QuantSettings("fp4" if settings.quant_type == "nf4" else "nf4", settings.double_quant, 64, "uint8")
    assert print_tensor(quantize(stored[name].to(dtype), other)).sha256 != base_print.tensors[name].sha256
    for name in set(base_print.tensors) - quantised:
        assert print_tensor(stored[name].to(dtype)) == base_print.tensors[name], name


@pytest.mark.parametrize("part", ["codes", "absmax", "absmax_of_absmax", "offset"])
def test_one_changed_bit_of_any_part_changes_the_fingerprint(part: str) -> None:
    weight = quantize(torch.randn(64, 128), NESTED)
    before = print_tensor(weight)
    tensor = packed_parts(weight)[part]
    tensor.view(-1).view(torch.uint8)[0].bitwise_xor_(1)
    after = print_tensor(weight)
    assert after.sha256 != before.sha256
    tensor.view(-1).view(torch.uint8)[0].bitwise_xor_(1)
    assert print_tensor(weight) == before


def test_shape_and_dtype_take_part_in_the_hash() -> None:
    flat = torch.arange(12, dtype=torch.float32)
    hashes = [
        hash_tensors(flat),
        hash_tensors(flat.view(3, 4)),
        hash_tensors(flat.view(torch.int32)),
        hash_tensors(flat[:6], flat[6:]),
    ]
    assert len(set(hashes)) == 4
    assert hash_tensors(flat.view(3, 4).t()) == hash_tensors(flat.view(3, 4).t().contiguous())
    assert hash_tensors(torch.tensor(1.0)) != hash_tensors(torch.tensor([1.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    plain = torch.randn(64, 128)
    assert print_tensor(plain).finite and print_tensor(quantize(plain, NESTED)).finite
    plain[3, 5] = bad
    assert not print_tensor(plain).finite
    assert not print_tensor(plain.bfloat16()).finite
    assert not print_tensor(quantize(plain, QuantSettings("nf4", False, 64, "uint8"))).finite
    assert print_tensor(torch.tensor([1, 2])).finite


@pytest.mark.parametrize("storage_dtype", ["bfloat16", "float32"])
def test_packed_codes_in_a_float_container_are_no_numbers(storage_dtype: str) -> None:
    """Sixteen or more bits of codes spell NaN somewhere in any larger weight."""
    weight = quantize(torch.randn(128, 512), QuantSettings("nf4", True, 64, storage_dtype))
    assert not bool(torch.isfinite(weight.data).all()), "the case is there"
    assert print_tensor(weight).finite


def test_the_whole_survives_json(tiny_llama_dir: Path) -> None:
    base_print = tiny_base(tiny_llama_dir).print
    data = json.loads(json.dumps(base_print.as_dict()))
    again = BasePrint.from_dict(data)
    assert again == base_print and again.digest == base_print.digest == data["digest"]
    assert all(isinstance(entry.shape, tuple) for entry in again.tensors.values())
    name = min(data["tensors"])
    data["tensors"][name]["sha256"] = "0" * 64
    assert BasePrint.from_dict(data).digest != base_print.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": 1},
        {"sha256": "\ud800" * 64},
        {"dtype": "manual_seed"},
        {"dtype": ["nf4"]},
        {"shape": [2, -1]},
        {"num_bytes": "4"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_description_that_fits_no_tensor_is_refused(changes: dict[str, Any]) -> None:
    entry = {"sha256": "a" * 64, "shape": [2], "dtype": "float32", "num_bytes": 8, "quantised": False, "finite": True}
    data: dict[str, object] = {"tensors": {"a": entry}, "quant": {}}
    assert BasePrint.from_dict(data).num_params == 2
    for bad in ({"a": entry | changes}, {"\ud800": entry}):
        with pytest.raises((TypeError, ValueError)):
            BasePrint.from_dict({**data, "tensors": bad})
    with pytest.raises(TypeError):
        BasePrint.from_dict({**data, "quant": {"quant_type": "nf4"}})


def test_the_digest_follows_names_and_not_their_order() -> None:
    entries = {name: print_tensor(torch.tensor([float(i)])) for i, name in enumerate("ab")}
    forward, backward = BasePrint(entries, {}), BasePrint(dict(reversed(entries.items())), {})
    assert forward.digest == backward.digest
    swapped = BasePrint({"a": entries["b"], "b": entries["a"]}, {})
    assert swapped.digest != forward.digest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("base_model.model.gpt_neox.layers.1.mlp.dense.base_layer.bias", "gpt_neox.layers.1.mlp.dense.bias"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", None),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", None),
    ],
)
def test_base_parameter_name(name: str, expected: str | None) -> None:
    assert base_parameter_name(name) == expected


def test_an_adapter_does_not_change_the_base_s_fingerprint(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir)
    assert print_base(with_adapter(base)) == base.print
