"""Every option of `quant` is read back from the weights that were loaded; float32 keeps the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_train.errors import MachineError
from qlora_train.model.attention import ATTENTION_NAME
from qlora_train.model.load import EAGER_CPU_TOKENS, Base, resolve_attention, resolve_device, to_float32
from qlora_train.model.skeleton import head_name, linear_layers
from qlora_train.quant.bnb import Linear4bit, dequantize, linear4bit_modules, packed_parts
from qlora_train.quant.fingerprint import hash_tensors
from tests.loading import tiny_base

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"quant_type": "fp4"},
    {"double_quant": False},
    {"block_size": 32},
    {"block_size": 128, "double_quant": False},
    {"storage_dtype": "bfloat16"},
    {"storage_dtype": "float32", "quant_type": "fp4"},
)


def test_auto_attention_is_ours_for_packs_and_eager_for_short_rows_on_a_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_attention("auto", cpu, EAGER_CPU_TOKENS, "shuffled") == "eager"
    assert resolve_attention("auto", cpu, EAGER_CPU_TOKENS + 1, "shuffled") is None
    assert resolve_attention("auto", cuda, 8, "length_grouped") is None
    assert {resolve_attention("auto", device, n, "packed") for device in (cpu, cuda) for n in (8, 10**6)} == {
        ATTENTION_NAME
    }
    for name in ("sdpa", "eager"):
        assert {resolve_attention(name, device, n, "packed") for device in (cpu, cuda) for n in (8, 10**6)} == {name}


def test_resolve_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(MachineError, match="no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_quant_option_reaches_every_linear_layer(options: dict[str, Any], tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, **options)
    wanted = {"quant_type": "nf4", "double_quant": True, "block_size": 64, "storage_dtype": "uint8", **options}
    assert base.print.quant == wanted
    layers = dict(linear4bit_modules(base.model))
    assert set(layers) == set(linear_layers(base.model)) and len(layers) == 14
    for name, module in layers.items():
        state = module.weight.quant_state
        assert state.quant_type == wanted["quant_type"], name
        assert state.blocksize == wanted["block_size"] and bool(state.nested) == wanted["double_quant"], name
        assert module.weight.dtype == getattr(torch, wanted["storage_dtype"]), name
        assert module.weight.numel() * module.weight.element_size() == module.in_features * module.out_features / 2
        blocks = module.in_features * module.out_features / wanted["block_size"]
        assert state.absmax.numel() == blocks and state.absmax.dtype == (
            torch.uint8 if wanted["double_quant"] else torch.float32
        )
        assert not module.support_avx512bf16_for_cpu and module.compute_dtype == torch.float32, name
    kinds = {entry.dtype for entry in base.print.tensors.values() if entry.quantised}
    assert kinds == {wanted["quant_type"]}


def test_the_base_is_frozen_and_its_head_is_not_quantised(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config.use_cache is False
    head = base.model.get_submodule(head_name(base.model))
    assert isinstance(head, nn.Linear) and not isinstance(head, Linear4bit)
    dtypes = {p.dtype for p in base.model.parameters() if not hasattr(p, "quant_state")}
    assert dtypes == {torch.bfloat16} and base.compute_dtype == torch.bfloat16


def test_quant_none_loads_plain_layers(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, quant_type="none")
    assert base.print.quant == {} and not list(linear4bit_modules(base.model))
    assert not any(entry.quantised for entry in base.print.tensors.values())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_skipped_modules_stay_as_they_are(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16, skip_modules=("down_proj",))
    kinds = {name: type(layer) for name, layer in linear_layers(base.model).items()}
    assert len(kinds) == 14
    for name, kind in kinds.items():
        assert kind is (nn.Linear if name.endswith("down_proj") else Linear4bit), name
        assert base.print.tensors[f"{name}.weight"].quantised == (not name.endswith("down_proj"))


@pytest.mark.parametrize(
    ("quant_type", "step"), [("nf4", "Params4bit._quantize"), ("int4", "quantize_affine")], ids=["nf4", "int4"]
)
def test_an_error_of_the_quantiser_ends_the_loading_as_what_it_is(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, quant_type: str, step: str
) -> None:
    """transformers would log it, go on with the next weight, and say that the weights cannot be converted."""
    calls: list[int] = []

    def fail(error: Exception) -> None:
        calls.clear()

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            raise error

        monkeypatch.setattr(f"qlora_train.quant.bnb.{step}", failing)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB"))
    with pytest.raises(torch.OutOfMemoryError, match=r"1\.50 GiB"):
        tiny_base(tiny_llama_dir, quant_type=quant_type)
    assert len(calls) == 1
    fail(RuntimeError("Method 'cquantize' not available in CPU-only version of bitsandbytes.\nReinstall"))
    with pytest.raises(MachineError, match=r"quantise on cpu: Method .* of bitsandbytes\. Fix: `python -m bitsandb"):
        tiny_base(tiny_llama_dir, quant_type=quant_type)
    fail(KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        tiny_base(tiny_llama_dir, quant_type=quant_type)


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: dequantize(module.weight) for name, module in linear4bit_modules(base.model)}


def test_the_container_changes_no_weight_and_the_codes_do(tiny_llama_dir: Path) -> None:
    plain = weights(tiny_base(tiny_llama_dir))
    stored = weights(tiny_base(tiny_llama_dir, storage_dtype="bfloat16"))
    assert all(torch.equal(plain[name], stored[name]) for name in plain)
    for other in ({"quant_type": "fp4"}, {"block_size": 32}, {"double_quant": False}):
        found = weights(tiny_base(tiny_llama_dir, **other))
        assert not any(torch.equal(plain[name], found[name]) for name in plain), other


def test_the_same_folder_gives_the_same_fingerprint(tiny_llama_dir: Path) -> None:
    first, second = tiny_base(tiny_llama_dir), tiny_base(tiny_llama_dir)
    assert first.print == second.print and first.print.digest == second.print.digest
    assert tiny_base(tiny_llama_dir, quant_type="fp4").print.digest != first.print.digest


def test_to_float32_keeps_the_codes_and_computes_with_the_exact_weights(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    layers = dict(linear4bit_modules(base.model))
    codes = {name: hash_tensors(*packed_parts(module.weight).values()) for name, module in layers.items()}
    others = {n: p.detach().clone() for n, p in base.model.named_parameters() if not hasattr(p, "quant_state")}
    name, module = next(iter(layers.items()))
    x = torch.randn(3, module.in_features)
    exact = nn.functional.linear(x, dequantize(module.weight))
    assert not torch.equal(module(x.bfloat16()).float(), exact), "negative control: bfloat16 rounds"

    to_float32(base.model)
    assert {n: hash_tensors(*packed_parts(m.weight).values()) for n, m in layers.items()} == codes
    for other, before in others.items():
        parameter = base.model.get_parameter(other)
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before.float()), other
        assert not parameter.requires_grad
    assert torch.equal(module(x), exact), name
    assert base.model(input_ids=torch.arange(1, 9)[None]).logits.dtype == torch.float32


def test_to_float32_keeps_tied_weights_tied(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    to_float32(base.model)
    head, embedding = base.model.get_output_embeddings().weight, base.model.get_input_embeddings().weight
    assert torch.equal(head, embedding)
