"""MoLE: gates, masks, causality, frozen experts, and the penalty that keeps experts in use."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_train.adapters.attach import load_adapter
from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.forms.mole import GATE, TAU, MixtureForm
from qlora_train.adapters.layers import lora_layers
from qlora_train.adapters.schedules import Balance
from qlora_train.adapters.state import load_adapter_config, save_adapter
from qlora_train.analysis.folder import open_adapter
from qlora_train.errors import ModelError
from tests.commandline import run_cli
from tests.loading import tiny_base
from tests.methods.cases import IDS, Case, build, section_of


@pytest.fixture
def case(tiny_dir: Path, experts: list[Path]) -> Case:
    return build(tiny_dir, section_of("mole", experts))


def form(case: Case) -> MixtureForm:
    found = case.model.peft_config["default"].form  # type: ignore[attr-defined]
    assert isinstance(found, MixtureForm)
    return found


def scatter(case: Case) -> None:
    """Gates that differ from token to token and layer to layer."""
    for layer in lora_layers(case.model).values():
        torch.nn.init.normal_(layer_tensors(layer, "default")[GATE], std=1.0)


def alone(folder: Path, expert: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_adapter(tiny_base(folder).model, expert).eval()(input_ids=IDS).logits
    return logits


def test_gates_are_shares_for_every_token_and_layer(case: Case) -> None:
    scatter(case)
    for layer in lora_layers(case.model).values():
        x = torch.randn(2, 5, layer.in_features)
        gates = form(case).gates(layer_tensors(layer, "default"), x)
        assert gates.shape == (2, 5, 2) and bool((gates >= 0).all())
        torch.testing.assert_close(gates.sum(dim=-1), torch.ones(2, 5))
        assert float(gates[..., 0].std()) > 0.01, "they differ from token to token"


@pytest.mark.parametrize("index", [0, 1])
def test_a_one_hot_gate_is_that_expert_alone(index: int, case: Case, tiny_dir: Path, experts: list[Path]) -> None:
    form(case).masked = frozenset({1 - index})
    torch.testing.assert_close(case.logits(), alone(tiny_dir, experts[index]), rtol=1e-5, atol=1e-5)
    other = alone(tiny_dir, experts[1 - index])
    assert not torch.allclose(case.logits(), other, atol=1e-3), "negative control"


def test_equal_gates_over_the_same_expert_are_the_expert(tiny_dir: Path, experts: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(experts[0])
    case = build(tiny_dir, section_of("mole", [experts[0], twin]))
    torch.testing.assert_close(case.logits(), alone(tiny_dir, experts[0]), rtol=1e-5, atol=1e-5)


def test_a_masked_expert_s_share_goes_to_the_others(tiny_dir: Path, experts: list[Path], tmp_path: Path) -> None:
    third = tmp_path / "third"
    third.symlink_to(experts[1])
    case = build(tiny_dir, section_of("mole", [*experts, third]))
    scatter(case)
    layer = next(iter(lora_layers(case.model).values()))
    tensors, x = layer_tensors(layer, "default"), torch.randn(7, layer.in_features)
    before = form(case).gates(tensors, x)
    form(case).masked = frozenset({1})
    after = form(case).gates(tensors, x)
    assert not bool(after[:, 1].any())
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]] / before[:, [0, 2]].sum(dim=1, keepdim=True))


def test_no_output_depends_on_a_later_token(case: Case) -> None:
    scatter(case)
    changed = IDS.clone()
    changed[0, 9] = 3
    with torch.no_grad():
        one, other = case.model(input_ids=IDS).logits, case.model(input_ids=changed).logits
    torch.testing.assert_close(one[:, :9], other[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 9:], other[:, 9:], atol=1e-4), "negative control"


def test_training_moves_the_router_and_no_expert(case: Case, experts: list[Path], tmp_path: Path) -> None:
    before = {
        name: {key: tensor.clone() for key, tensor in layer_tensors(layer, "default").items()}
        for name, layer in lora_layers(case.model).items()
    }
    assert all(result.extra_loss is not None for result in case.train(3))
    for name, layer in lora_layers(case.model).items():
        for key, tensor in layer_tensors(layer, "default").items():
            assert torch.equal(tensor, before[name][key]) == (key in ("lora_A", "lora_B")), (name, key)
    save_adapter(case.model, tmp_path)
    digests = [hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest() for folder in experts]
    assert load_adapter_config(tmp_path).options["experts"] == [f"expert{i}@{digests[i][:12]}" for i in range(2)]
    with pytest.raises(ModelError, match="neither merged nor folded"):
        read_updates(tmp_path)


def test_the_penalty_is_least_where_all_experts_are_used_alike(case: Case) -> None:
    """And it reaches the gates through recomputation, too: `mean_gates` are those of the forward pass."""
    section = case.section.model_copy(update={"balance": 1.0})
    balance = Balance(case.model, section)
    case.model.train()
    case.causal.loss_sum(case.batches[0])
    least = balance.extra_loss(1.0)
    assert least is not None and float(least) == pytest.approx(2 * math.log(2), rel=1e-5)
    layers = lora_layers(case.model)
    for layer in layers.values():
        with torch.no_grad():  # the first expert is preferred on most tokens
            tensors = layer_tensors(layer, "default")
            tensors[GATE].zero_()
            tensors[TAU].fill_(0.5)
            tensors[GATE][0] = 0.3
    case.causal.loss_sum(case.batches[0])
    peaked = balance.extra_loss(1.0)
    assert peaked is not None and float(peaked) > float(least)
    peaked.backward()
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.05)
    optimizer.step()
    case.causal.loss_sum(case.batches[0])
    after = balance.extra_loss(1.0)
    assert after is not None and float(after) < float(peaked), "its gradient evens the gates out"
    assert set(balance.figures()) == {"gate_0", "gate_1"}
    for index, layer in enumerate(layers.values()):  # half of the layers prefer the one, half the other
        layer.mean_gates = torch.tensor([0.9, 0.1] if index % 2 else [0.1, 0.9])
    if len(layers) % 2:
        layer.mean_gates = torch.tensor([0.5, 0.5])
    opposed = balance.extra_loss(1.0)
    assert opposed is not None and float(opposed) == pytest.approx(float(least), rel=1e-5), "the mean is over layers"


def test_an_expert_of_another_model_is_refused(case: Case, tiny_llama_dir: Path, experts: list[Path]) -> None:
    with pytest.raises(ModelError, match=r"adapter.experts: .*fits no adapted layer|matches no layer|fits no"):
        build(tiny_llama_dir, section_of("mole", experts))


def test_the_penalty_s_gradient_survives_recomputation(case: Case) -> None:
    """Gates of the forward pass, whose graph a checkpoint computes again; those of the recomputation are not taken."""
    layer = next(iter(lora_layers(case.model).values()))
    gate = layer_tensors(layer, "default")[GATE]
    torch.nn.init.normal_(gate)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    balance = Balance(case.model, case.section.model_copy(update={"balance": 1.0}))
    grads = []
    for recompute in (False, True):
        gate.grad = None
        out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        penalty = balance.extra_loss(1.0)
        assert penalty is not None
        (out.square().sum() * 1e-3 + penalty).backward()
        assert "mean_gates" not in vars(layer), "nothing of the recomputation is left"
        assert gate.grad is not None
        grads.append(gate.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    assert bool(grads[0].any())


def test_the_gate_learns_which_expert_a_token_belongs_to(case: Case) -> None:
    """Two kinds of inputs, each answered as one expert would: the router finds it."""
    layer = next(iter(lora_layers(case.model).values()))
    tensors = layer_tensors(layer, "default")
    kinds = torch.randn(2, layer.in_features)
    xs = [kind + 0.3 * torch.randn(100, layer.in_features) for kind in kinds]
    wanted = []
    for index, x in enumerate(xs):
        form(case).masked = frozenset({1 - index})
        wanted.append(layer(x).detach())
    form(case).masked = frozenset()
    optimizer = torch.optim.Adam([tensors[GATE], tensors[TAU]], lr=0.05)
    for _ in range(60):
        loss = sum((layer(x) - y).square().mean() for x, y in zip(xs, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = [float(form(case).gates(tensors, x)[:, index].mean()) for index, x in enumerate(xs)]
    assert min(shares) > 0.9, "chance is one half"


def test_info_tells_of_the_experts_and_of_no_update(case: Case, tmp_path: Path) -> None:
    save_adapter(case.model, tmp_path)
    outcome = run_cli("adapter", "info", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["method"] == "mole" and found["num_experts"] == 2 and len(found["modules"]) == 7
    assert all(module["spectrum"] is None and module["lora_B_norm"] > 0 for module in found["modules"])
    shown = run_cli("adapter", "info", tmp_path).out
    assert f"2 experts of r = {found['r'] // 2}, weighed anew for each token" in shown
    with pytest.raises(ModelError, match="neither merged nor folded"):
        open_adapter(tmp_path).updates()
