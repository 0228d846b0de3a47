"""FLoRA on convolutions: the Tucker form as the oracle, depthwise and plain ones, and a causal model that has some."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Mamba2Config

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.config import section_config
from qlora_train.adapters.fold import read_deltas, read_updates
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.forms.convolution import ConvolutionLayer
from qlora_train.adapters.layers import adapted_layers, register_layers
from qlora_train.adapters.state import load_adapter_config, save_adapter
from qlora_train.adapters.updates import Difference
from qlora_train.errors import ModelError
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing
from qlora_train.model.skeleton import build_skeleton, check_targets
from tests.commandline import run_cli, write_recipe
from tests.loading import tiny_base
from tests.methods.cases import IDS, Case, build, dense_twin_of, gradients_of, reloaded, section_of, shake
from tests.tiny import build_tiny_lfm2

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1-D": (nn.Conv1d(6, 10, 3, padding=2), (6, 11)),
    "1-D depthwise": (nn.Conv1d(6, 6, 4, groups=6, padding=3), (6, 11)),
    "1-D grouped": (nn.Conv1d(6, 10, 3, groups=2, dilation=2), (6, 11)),
    "2-D": (nn.Conv2d(6, 10, (3, 2), stride=2, padding=1, bias=False), (6, 7, 8)),
    "2-D circular": (nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"), (6, 7, 8)),
    "2-D depthwise": (nn.Conv2d(6, 12, 3, groups=6), (6, 7, 8)),
    "3-D": (nn.Conv3d(6, 4, (1, 2, 3)), (6, 3, 4, 5)),
}


@pytest.fixture(params=CONVOLUTIONS)
def case(request: pytest.FixtureRequest) -> tuple[Any, torch.Tensor]:
    """An adapted convolution, and what it may read."""
    convolution, shape = CONVOLUTIONS[request.param]
    return adapted(convolution), torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


def adapted(convolution: nn.Module, **keys: Any) -> Any:
    section = section_of("flora_core", **{"target_modules": ("0",), "r": 3, "r_out": 5, "r_kernel": 2, **keys})
    config = section_config(section)
    config.task_type = None
    torch.manual_seed(0)
    (layer,) = adapted_layers(get_peft_model(nn.Sequential(convolution), register_layers(config))).values()
    return layer


def tucker(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The authors' way: contract the first mode of what is left with the next basis; the result has (in, out, *k)."""
    product = tensors["lora_core_c"].detach()
    kernels = [tensors[name] for name in sorted(tensors) if name.startswith("lora_kernel")]
    for basis in (tensors["lora_A"].T, tensors["lora_B"], *kernels):
        product = torch.tensordot(product, basis.detach(), dims=[[0], [1]])
    return product.transpose(0, 1)


def test_the_update_is_the_tucker_form_of_the_weight_s_own_shape(case: tuple[Any, torch.Tensor]) -> None:
    layer, x = case
    base = layer.get_base_layer()
    delta = layer.scaling["default"] * tucker(shake(layer))
    assert delta.shape == base.weight.shape and float(delta.abs().max()) > 1e-3
    wanted = base._conv_forward(x, base.weight + delta, base.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight, base.weight + delta, rtol=1e-5, atol=1e-6)
    assert float((layer(x) - base(x)).abs().max()) > 1e-3, "negative control"
    updates = layer.lora_variant["default"].updates(layer_tensors(layer, "default"), layer.scaling["default"])
    torch.testing.assert_close(updates["weight"].values, delta, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_base_and_its_first_step_moves_the_core_alone(case: tuple[Any, torch.Tensor]) -> None:
    layer, x = case
    assert torch.equal(layer(x), layer.get_base_layer()(x)) and torch.equal(layer.weight, layer.get_base_layer().weight)
    tensors = layer_tensors(layer, "default")
    assert all(bool(tensor.any()) == (name != "lora_core_c") for name, tensor in tensors.items())
    found = gradients_of(layer, x, torch.randn_like(layer(x)))
    assert {name for name, gradient in found.items() if gradient is not None and gradient.any()} == {"lora_core_c"}
    shake(layer)
    found = gradients_of(layer, x, torch.randn_like(layer(x)))
    assert all(gradient is not None and bool(gradient.any()) for gradient in found.values()), "and later all"


def test_every_mode_has_its_rank_and_none_more_than_its_size() -> None:
    shapes = {
        name: tuple(tensor.shape) for name, tensor in layer_tensors(adapted(nn.Conv2d(6, 10, 3)), "default").items()
    }
    assert shapes == {
        "lora_A": (3, 6),
        "lora_B": (10, 5),
        "lora_core_c": (3, 5, 2, 2),
        "lora_kernel_0": (3, 2),
        "lora_kernel_1": (3, 2),
    }
    whole = layer_tensors(adapted(nn.Conv2d(6, 10, 3), r=64, r_out=None, r_kernel=None), "default")
    assert tuple(whole["lora_core_c"].shape) == (6, 10, 3, 3)


def test_a_depthwise_convolution_has_one_input_and_so_rank_one_there() -> None:
    layer = adapted(nn.Conv1d(64, 64, 4, groups=64), r=8, r_out=16, r_kernel=None)
    tensors = layer_tensors(layer, "default")
    assert tuple(tensors["lora_core_c"].shape) == (1, 16, 4)
    assert float(tensors["lora_A"]) == 1.0, "one number only scales: it starts at one"
    assert abs(float(tensors["lora_B"].std()) - math.sqrt(1 / 32)) < 0.02, "N(0, 1 / (2 r)), as the authors start it"
    shake(layer)
    update = layer.weight - layer.get_base_layer().weight
    assert int(torch.linalg.matrix_rank(update.detach()[:, 0, :].double(), rtol=1e-5)) == 4


def test_switched_off_it_is_the_base(case: tuple[Any, torch.Tensor]) -> None:
    layer, x = case
    shake(layer)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.get_base_layer()(x)) and layer.weight is layer.get_base_layer().weight


def test_dropout_is_refused_for_there_are_no_inputs_to_drop() -> None:
    with pytest.raises(ModelError, match=r"adapter.dropout: a convolution is adapted by its weight"):
        adapted(nn.Conv1d(4, 4, 3), dropout=0.1)


TARGETS = ("conv", "q_proj", "w1")  # in LFM2 `conv` is a block, too, around the convolution


@pytest.fixture(scope="module")
def lfm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_lfm2(tmp_path_factory.mktemp("lfm2") / "model")


@pytest.fixture
def lfm2(lfm2_dir: Path) -> Case:
    return build(lfm2_dir, section_of("flora_core", target_modules=TARGETS, r_kernel=2))


def convolution_of(case: Case) -> ConvolutionLayer:
    (layer,) = [layer for layer in adapted_layers(case.model).values() if isinstance(layer, ConvolutionLayer)]
    return layer


def test_a_name_that_a_block_shares_means_the_convolution(lfm2: Case) -> None:
    assert [name.removeprefix("base_model.model.model.") for name in adapted_layers(lfm2.model)] == [
        "layers.0.conv.conv",
        "layers.0.feed_forward.w1",
        "layers.1.self_attn.q_proj",
        "layers.1.feed_forward.w1",
    ]


def test_a_causal_model_trains_its_convolution(lfm2: Case, lfm2_dir: Path, tmp_path: Path) -> None:
    """The contracts: base at the start, trained, untouched base, saved and loaded, merged, switched off again."""
    with torch.no_grad():
        base_logits = tiny_base(lfm2_dir).model(input_ids=IDS).logits
    assert torch.equal(lfm2.logits(), base_logits)
    weight = convolution_of(lfm2).get_base_layer().weight.clone()  # type: ignore[operator]
    losses = [result.loss for result in lfm2.train(10)]
    assert losses[-1] < losses[0] - 0.01
    assert torch.equal(convolution_of(lfm2).get_base_layer().weight, weight)  # type: ignore[operator]
    assert all(bool(tensor.any()) for tensor in layer_tensors(convolution_of(lfm2), "default").values())
    save_adapter(lfm2.model, tmp_path)
    end = lfm2.logits()
    assert torch.equal(reloaded(lfm2_dir, tmp_path, lfm2.section).logits(), end)
    with lfm2.model.disable_adapter():
        assert torch.equal(lfm2.logits(), base_logits)
    updates = read_updates(tmp_path)
    assert isinstance(updates["model.layers.0.conv.conv.weight"], Difference)
    twin = dense_twin_of(reloaded(lfm2_dir, tmp_path, lfm2.section).model, lfm2_dir)
    with torch.no_grad():
        for name, update in updates.items():
            parameter = twin.get_parameter(name)
            parameter.copy_(update.applied(parameter.float()))
        torch.testing.assert_close(twin(input_ids=IDS).logits, end, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"changes 1 weights by no product of two factors, first model.layers.0.conv"):
        read_deltas(tmp_path)


def test_the_convolution_s_update_reaches_the_output_though_the_model_only_reads_its_weight(lfm2: Case) -> None:
    before = lfm2.logits()
    shake(convolution_of(lfm2))
    assert float((lfm2.logits() - before).abs().max()) > 1e-3
    changed = IDS.clone()
    changed[0, 9] = 3
    with torch.no_grad():
        one, other = lfm2.model(input_ids=IDS).logits, lfm2.model(input_ids=changed).logits
    torch.testing.assert_close(one[:, :9], other[:, :9], rtol=0, atol=1e-6)


def test_generation_with_a_cache_is_that_of_whole_passes(lfm2: Case) -> None:
    """A step of one token goes through another function of the mixer, which reads the weight, too."""
    shake(convolution_of(lfm2), std=0.5)
    lfm2.model.config.use_cache = True
    made = lfm2.model.generate(input_ids=IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]
    ids = IDS
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, lfm2.model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_a_recomputed_layer_has_the_same_gradients(lfm2: Case) -> None:
    shake(convolution_of(lfm2))
    found = []
    for policy in (Checkpointing(), Checkpointing("full")):
        apply_checkpointing(lfm2.model, policy)
        lfm2.model.train()
        lfm2.model.zero_grad()
        lfm2.causal.loss_sum(lfm2.batches[0]).backward()
        found.append([p.grad.clone() for p in lfm2.model.parameters() if p.grad is not None])
    assert found[0] and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_another_seed_is_another_start_and_the_same_seed_the_same(lfm2_dir: Path) -> None:
    section = section_of("flora_core", target_modules=TARGETS)
    starts = [
        layer_tensors(layer, "default")["lora_B"]
        for seed in (0, 0, 1)
        for layer in adapted_layers(attach_adapter(tiny_base(lfm2_dir).model, section, seed, base_name="tiny")).values()
        if isinstance(layer, ConvolutionLayer)
    ]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_run_goes_on_from_an_adapter_of_a_convolution(lfm2: Case, lfm2_dir: Path, tmp_path: Path) -> None:
    lfm2.train(2)
    save_adapter(lfm2.model, tmp_path)
    section = lfm2.section.model_copy(update={"init_from": tmp_path})
    again = attach_adapter(tiny_base(lfm2_dir).model, section, 0, base_name="tiny").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, lfm2.logits())
    other = section.model_copy(update={"r_kernel": 3})
    with pytest.raises(ModelError, match="r_kernel is 2 there and 3 here"):
        attach_adapter(tiny_base(lfm2_dir).model, other, 0, base_name="tiny")


def test_a_folder_of_before_the_kernel_s_rank_is_read(lfm2_dir: Path, tmp_path: Path) -> None:
    case = build(lfm2_dir, section_of("flora_core", target_modules=("q_proj",)))
    save_adapter(case.model, tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    del data["qlora_train"]["options"]["r_kernel"]
    path.write_text(json.dumps(data))
    assert load_adapter_config(tmp_path).options == {"r_out": 6, "r_kernel": None}


def test_a_damaged_folder_of_a_convolution_is_refused(lfm2: Case, tmp_path: Path) -> None:
    save_adapter(lfm2.model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r_kernel": 2', '"r_kernel": 1'))
    with pytest.raises(ModelError, match="lora_core_c is"):
        load_adapter_config(tmp_path)


def test_other_methods_refuse_a_convolution_before_anything_is_loaded(lfm2_dir: Path, tmp_path: Path) -> None:
    path = lfm2_recipe(tmp_path, lfm2_dir, {"method": "lora", "target_modules": ["conv.conv", "q_proj"]})
    outcome = run_cli("check", path)
    assert outcome.code == 4 and "adapter.target_modules: 'conv.conv' matches a convolution" in outcome.err, outcome.err
    path = lfm2_recipe(tmp_path, lfm2_dir, {"method": "flora_core", "target_modules": ["convv", "q_proj"]})
    outcome = run_cli("check", path)
    assert outcome.code == 4 and "'convv' matches no linear layer and no convolution, nearest: conv" in outcome.err


def test_a_convolution_that_peft_will_not_adapt_is_refused() -> None:
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}
    model = build_skeleton(Mamba2Config(vocab_size=64, num_hidden_layers=1, **sizes))
    with pytest.raises(ModelError, match=r"mamba2 models read the weight of conv1d"):
        check_targets(model, ("in_proj", "conv1d"), with_convolutions=True)
    with pytest.raises(ModelError, match="'conv1d' matches a convolution"):
        check_targets(model, ("in_proj", "conv1d"))


def lfm2_recipe(folder: Path, model: Path, adapter: dict[str, Any]) -> Path:
    path = write_recipe(folder, model, train__max_steps=4, train__save_every=2, train__keep=5, eval__generate_rows=0)
    sections = json.loads(path.read_text())
    sections["adapter"] = adapter
    sections["data"]["batching"] = "length_grouped"
    path.write_text(json.dumps(sections))
    return path


def test_trained_resumed_planned_looked_at_and_exported(lfm2_dir: Path, tmp_path: Path) -> None:
    adapter = {"method": "flora_core", "r": 4, "r_out": 6, "alpha": 16, "target_modules": list(TARGETS)}
    path = lfm2_recipe(tmp_path, lfm2_dir, adapter)
    outcome = run_cli("plan", path, "--json")
    assert outcome.code == 0, outcome.err
    (on_disk,) = [t for t in json.loads(outcome.out)["terms"] if (t["stage"], t["cause"]) == ("disk", "adapter")]
    outcome = run_cli("train", path, "--json")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    straight = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    resumed = run_cli("train", path, "--resume", "--from", "2", "--json")
    assert resumed.code == 0, resumed.err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == straight
    info = run_cli("adapter", "info", run, "--json")
    assert info.code == 0, info.err
    found = json.loads(info.out)
    assert found["num_params"] * 4 == on_disk["num_bytes"]
    spectra = {module["module"]: module["spectrum"] for module in found["modules"]}
    assert len(spectra) == 4 and [name for name, one in spectra.items() if one is None] == ["model.layers.0.conv.conv"]
    assert run_cli("adapter", "info", run).code == 0
    outcome = run_cli("adapter", "fold", run, tmp_path / "folded")
    assert outcome.code == 4 and "it cannot be plain LoRA" in outcome.err
    outcome = run_cli("export", run, tmp_path / "merged", "export.export_dtype=float32", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["verdict"]["accepted"]
    looked = run_cli("analyze", run, "--json")
    assert looked.code == 0, looked.err
    assert "convolutions are no matrices and are left out: model.layers.0.conv.conv" in looked.out + looked.err
    assert run_cli("report", run).code == 0
