"""Delta-tuning: only what was selected moves, theta_0 stays, and what is saved is the difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.forms.delta import DeltaLayer
from qlora_train.adapters.layers import adapted_layers
from qlora_train.adapters.state import WEIGHTS, save_adapter
from qlora_train.adapters.updates import Difference
from qlora_train.errors import ModelError
from qlora_train.quant.fingerprint import print_base
from qlora_train.train.optim import parameter_groups
from tests.loading import tiny_base
from tests.methods.cases import IDS, build, section_of
from tests.tiny import build_tiny_llama, build_tiny_neox

BUILDERS: dict[str, Callable[[Path], Path]] = {"llama": build_tiny_llama, "neox": build_tiny_neox}


@pytest.mark.parametrize(
    ("family", "wanted", "names", "count"),
    [
        ("llama", ("norm",), {"input_layernorm", "post_attention_layernorm", "norm"}, 5 * 128),
        ("llama", ("layers.0.input_layernorm",), {"input_layernorm"}, 128),
        (
            "neox",
            ("bias",),
            {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
            2 * (384 + 128 + 256 + 128),
        ),
        ("neox", ("norm",), {"input_layernorm", "post_attention_layernorm", "final_layer_norm"}, 5 * 2 * 128),
    ],
)
def test_what_was_selected_trains_and_is_what_is_saved(
    family: str, wanted: tuple[str, ...], names: set[str], count: int, tmp_path: Path
) -> None:
    folder = BUILDERS[family](tmp_path / family)
    case = build(folder, section_of("delta", parameters=wanted))
    assert {name.rpartition(".")[2] for name in adapted_layers(case.model)} == names
    digest = print_base(case.model).digest
    assert torch.equal(case.logits(), tiny_logits(folder)), "a difference of zero"
    case.train(2)
    assert print_base(case.model).digest == digest, "theta_0 is where it was"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(case.model, adapter)
    assert sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values()) == count
    updates = read_updates(adapter)
    assert {type(update) for update in updates.values()} == {Difference} and len(updates) >= len(names)
    assert all(bool(update.applied(torch.zeros(update.shape)).any()) for update in updates.values())
    assert not torch.equal(case.logits(), tiny_logits(folder))


def tiny_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = tiny_base(folder).model(input_ids=IDS).logits
    return logits


def test_a_difference_too_small_for_bfloat16_still_acts(tiny_dir: Path) -> None:
    """0.001 beside one is nothing in bfloat16: the norm computes with the float32 sum."""
    case = build(tiny_dir, section_of("delta"), fused=False)
    layer = next(one for one in adapted_layers(case.model).values() if isinstance(one, DeltaLayer))
    base: Any = layer.get_base_layer()
    base.to(torch.bfloat16)
    x = torch.randn(400, 64, dtype=torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        layer.lora_delta_weight["default"].fill_(0.003)
    after = layer(x)
    assert after.dtype == torch.bfloat16
    assert float(after.double().abs().sum() / before.double().abs().sum()) == pytest.approx(1.003, abs=3e-4)
    assert torch.equal((base.weight + 0.001).to(torch.bfloat16), base.weight)


def test_differences_decay_to_the_base(tiny_dir: Path) -> None:
    (group,) = parameter_groups(build(tiny_dir, section_of("delta")).model, section_of("delta"))
    assert group.decays and {parameter.ndim for parameter in group.parameters} == {1}


def test_the_difference_of_a_bias_is_added_before_it_is_rounded(tmp_path: Path) -> None:
    """Just above half a step of bfloat16 at 1; rounded by itself it is half a step, and the sum goes down to 1."""
    section = section_of("delta", parameters=("bias",))
    case = build(build_tiny_neox(tmp_path / "neox"), section, fused=False, quant_type="none")
    layer = next(one for one in adapted_layers(case.model).values() if isinstance(one, DeltaLayer))
    base: Any = layer.get_base_layer().to(torch.bfloat16)
    with torch.no_grad():
        base.weight.zero_()
        base.bias.fill_(1.0)
        layer.lora_delta_bias["default"].fill_(2**-8 * 1.0005)
    assert float(layer(torch.ones(1, base.in_features, dtype=torch.bfloat16))[0, 0]) == 1 + 2**-7


@pytest.mark.parametrize(
    ("word", "near"), [("bias", "norm"), ("input_layernrm", "input_layernorm"), ("q_proj", "norm")]
)
def test_a_word_that_matches_nothing_is_refused(word: str, near: str, tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match=rf"adapter.parameters: '{word}' matches no small parameter.*{near}"):
        build(tiny_dir, section_of("delta", parameters=(word,)))
