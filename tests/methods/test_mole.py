"""MoLE: gates, masks, causality, frozen experts, and the penalty that keeps experts in use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.adapters.attach import load_adapter
from qlora_train.adapters.config import section_config
from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.forms.mole import GATE, TAU, Granularity, MixtureForm
from qlora_train.adapters.layer_gates import decoder_layer_of
from qlora_train.adapters.layers import lora_layers
from qlora_train.adapters.schedules import Balance
from qlora_train.adapters.state import load_adapter_config, save_adapter
from qlora_train.analysis.folder import open_adapter
from qlora_train.errors import ModelError
from qlora_train.model import compiling
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing
from qlora_train.model.compiling import compile_layers
from qlora_train.recipe.schema import AdapterSection
from tests.commandline import run_cli, write_recipe
from tests.loading import tiny_base
from tests.methods.cases import IDS, Case, build, section_of, write_experts
from tests.tiny import build_tiny_llama


@pytest.fixture(params=get_args(Granularity))
def granularity(request: pytest.FixtureRequest) -> str:
    """What has a gate of its own."""
    return str(request.param)


@pytest.fixture
def case(tiny_dir: Path, experts: list[Path], granularity: str) -> Case:
    return build(tiny_dir, section_of("mole", experts, granularity=granularity))


def form(case: Case) -> MixtureForm:
    found = case.model.peft_config["default"].form  # type: ignore[attr-defined]
    assert isinstance(found, MixtureForm)
    return found


def gated(case: Case) -> list[Any]:
    """The adapted matrices in which gates lie: all of them, or the first of each decoder layer."""
    return [layer for layer in lora_layers(case.model).values() if GATE in layer_tensors(layer, "default")]


def width_of(layer: Any) -> int:
    """What a gate reads of a token."""
    return int(layer_tensors(layer, "default")[GATE].shape[1])


def run(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """An adapted matrix by itself, whose decoder layer reads what it reads."""
    with layer.layer_gate.reading(x) if layer.layer_gate else nullcontext():
        out: torch.Tensor = layer(x)
    return out


def scatter(case: Case) -> None:
    """Gates that differ from token to token and layer to layer."""
    for layer in gated(case):
        torch.nn.init.normal_(layer_tensors(layer, "default")[GATE], std=1.0)


def alone(folder: Path, expert: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_adapter(tiny_base(folder).model, expert).eval()(input_ids=IDS).logits
    return logits


def test_gates_are_shares_for_every_token_and_layer(case: Case) -> None:
    scatter(case)
    for layer in gated(case):
        x = torch.randn(2, 5, width_of(layer))
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


def test_equal_gates_over_the_same_expert_are_the_expert(
    tiny_dir: Path, experts: list[Path], tmp_path: Path, granularity: str
) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(experts[0])
    case = build(tiny_dir, section_of("mole", [experts[0], twin], granularity=granularity))
    torch.testing.assert_close(case.logits(), alone(tiny_dir, experts[0]), rtol=1e-5, atol=1e-5)


def test_a_masked_expert_s_share_goes_to_the_others(
    tiny_dir: Path, experts: list[Path], tmp_path: Path, granularity: str
) -> None:
    third = tmp_path / "third"
    third.symlink_to(experts[1])
    case = build(tiny_dir, section_of("mole", [*experts, third], granularity=granularity))
    scatter(case)
    layer = gated(case)[0]
    tensors, x = layer_tensors(layer, "default"), torch.randn(7, width_of(layer))
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
    layers = gated(case)
    for layer in layers:
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
    for index, layer in enumerate(layers):  # half of the layers prefer the one, half the other
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
    layer = gated(case)[0]
    gate = layer_tensors(layer, "default")[GATE]
    torch.nn.init.normal_(gate)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    balance = Balance(case.model, case.section.model_copy(update={"balance": 1.0}))
    grads = []
    for recompute in (False, True):
        gate.grad = None
        out = checkpoint(run, layer, x, use_reentrant=False) if recompute else run(layer, x)
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
    layer = gated(case)[0]
    tensors = layer_tensors(layer, "default")
    kinds = torch.randn(2, layer.in_features)
    xs = [kind + 0.3 * torch.randn(100, layer.in_features) for kind in kinds]
    wanted = []
    for index, x in enumerate(xs):
        form(case).masked = frozenset({1 - index})
        wanted.append(run(layer, x).detach())
    form(case).masked = frozenset()
    optimizer = torch.optim.Adam([tensors[GATE], tensors[TAU]], lr=0.05)
    for _ in range(60):
        loss = sum((run(layer, x) - y).square().mean() for x, y in zip(xs, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = [float(form(case).gates(tensors, x)[:, index].mean()) for index, x in enumerate(xs)]
    assert min(shares) > 0.9, "chance is one half"


def test_info_tells_of_the_experts_and_of_no_update(case: Case, tmp_path: Path, granularity: str) -> None:
    save_adapter(case.model, tmp_path)
    outcome = run_cli("adapter", "info", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["method"] == "mole" and found["num_experts"] == 2 and len(found["modules"]) == 7
    assert all(module["spectrum"] is None and module["lora_B_norm"] > 0 for module in found["modules"])
    shown = run_cli("adapter", "info", tmp_path).out
    who = {"matrix": "every matrix", "layer": "all matrices of a decoder layer alike"}[granularity]
    assert f"2 experts of r = {found['r'] // 2}, weighed anew for each token, for {who}" in " ".join(shown.split())
    assert found["granularity"] == granularity
    with pytest.raises(ModelError, match="neither merged nor folded"):
        open_adapter(tmp_path).updates()


@pytest.fixture
def layered(tiny_llama_dir: Path, tmp_path: Path) -> Case:
    """Two decoder layers, with a gate each."""
    return build(tiny_llama_dir, section_of("mole", write_experts(tiny_llama_dir, tmp_path), granularity="layer"))


def gates_seen(case: Case) -> dict[str, list[torch.Tensor]]:
    """By adapted matrix, the gates it weighs with from now on."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in lora_layers(case.model)}
    for name, layer in lora_layers(case.model).items():
        gates = layer.layer_gate.gates

        def noted(
            x: torch.Tensor, to: list[torch.Tensor] = seen[name], gates: Callable[..., Any] = gates
        ) -> torch.Tensor:
            to.append(gates(x))
            return to[-1]

        layer.layer_gate = SimpleNamespace(gates=noted)
    return seen


def test_all_matrices_of_a_decoder_layer_weigh_alike(layered: Case) -> None:
    scatter(layered)
    seen = gates_seen(layered)
    layered.logits()
    by_layer: dict[str, list[torch.Tensor]] = {}
    for name, (gates,) in seen.items():
        by_layer.setdefault(name.split(".layers.")[1][0], []).append(gates)
    assert [len(found) for found in by_layer.values()] == [7, 7]
    for found in by_layer.values():
        assert found[0].shape == (*IDS.shape, 2) and all(torch.equal(gates, found[0]) for gates in found)
    assert not torch.allclose(by_layer["0"][0], by_layer["1"][0], atol=1e-3), "negative control"


def test_a_gate_of_a_layer_has_the_model_s_width_and_there_are_as_many_as_layers(
    layered: Case, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    def num_trained(case: Case) -> int:
        return sum(p.numel() for p in case.model.parameters() if p.requires_grad)

    width, middle, num_layers, num_experts = 128, 256, 2, 2
    assert num_trained(layered) == num_layers * (num_experts * width + 1)
    (tmp_path / "again").mkdir()
    each = build(tiny_llama_dir, section_of("mole", write_experts(tiny_llama_dir, tmp_path / "again")))
    inputs = 6 * width + middle  # of q, k, v, o, gate and up; of down
    assert num_trained(each) == num_layers * (num_experts * inputs + 7)


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_a_recomputed_layer_computes_its_gates_again(
    kind: Any, granularity: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The same loss and the same gradients, the penalty's among them, to the bit; nothing is left behind."""
    section = section_of("mole", write_experts(tiny_llama_dir, tmp_path), granularity=granularity, balance=1.0)
    case = build(tiny_llama_dir, section)
    scatter(case)
    balance, found = Balance(case.model, section), []
    case.model.train()
    for policy in (Checkpointing(), Checkpointing(kind)):
        apply_checkpointing(case.model, policy)
        case.model.zero_grad()
        loss = case.causal.loss_sum(case.batches[0])
        penalty = balance.extra_loss(1.0)
        assert penalty is not None
        (loss + penalty).backward()
        found.append([loss.detach(), *(p.grad.clone() for p in case.model.parameters() if p.grad is not None)])
        assert not any("mean_gates" in vars(layer) for layer in lora_layers(case.model).values())
        assert all(layer.layer_gate is None or layer.layer_gate.is_closed for layer in lora_layers(case.model).values())
    assert len(found[0]) > 2 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_recomputed_gate_is_of_the_layer_s_own_input(layered: Case) -> None:
    """Counted: the first layer's gate is computed in the forward pass and again in the backward pass."""
    calls: list[Any] = []
    gates_noted = MixtureForm.gates_noted
    apply_checkpointing(layered.model, Checkpointing("full"))
    layered.model.train()
    with pytest.MonkeyPatch.context() as patch:

        def counted(self: MixtureForm, layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
            calls.append((id(layer), x.detach().clone()))
            return gates_noted(self, layer, adapter, x)

        patch.setattr(MixtureForm, "gates_noted", counted)
        layered.causal.loss_sum(layered.batches[0]).backward()
    first, second, again = calls
    assert first[0] == again[0] != second[0], "the last layer is not recomputed"
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], second[1])


def test_compiled_decoder_layers_keep_their_gates(layered: Case) -> None:
    """Compiled is what lies inside a layer; its gate is opened around it, in recomputation too."""
    called: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **_: lambda *args, **kwargs: called.append(f) or f(*args, **kwargs))
        compiling._compiled.cache_clear()
        compile_layers(layered.model)
    compiling._compiled.cache_clear()
    scatter(layered)
    apply_checkpointing(layered.model, Checkpointing())
    with torch.no_grad():
        plain = layered.model.eval()(input_ids=IDS).logits
        assert not called, "evaluation is not compiled"
        assert torch.equal(layered.model.train()(input_ids=IDS).logits, plain)
    assert len(called) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.experts.1.up_proj", "is one of several in its decoder layer"),
        ("lm_head", "lies in no decoder layer"),
    ],
)
def test_matrices_that_cannot_share_a_gate_are_refused(name: str, words: str) -> None:
    model = nn.Module()
    model.get_submodule = lambda path: (  # type: ignore[method-assign]
        GradientCheckpointingLayer() if path == "model.layers.0" else nn.Module()
    )
    with pytest.raises(ModelError, match=f"adapter.granularity: {name} {words}"):
        decoder_layer_of(model, name)


def test_a_matrix_that_sees_other_tokens_than_its_layer_is_refused(layered: Case) -> None:
    layer = gated(layered)[0]
    with (
        layer.layer_gate.reading(torch.randn(1, 6, 128)),
        pytest.raises(ModelError, match="is given 5 tokens, and its decoder layer 6"),
    ):
        layer(torch.randn(5, 128))
    with layer.layer_gate.reading(torch.randn(2, 3, 128)):
        assert layer(torch.randn(6, 128)).shape == (6, 128), "the same tokens laid end to end"


def test_a_folder_of_before_the_granularity_has_a_gate_for_every_matrix(
    tiny_dir: Path, experts: list[Path], tmp_path: Path
) -> None:
    case = build(tiny_dir, section_of("mole", experts))
    save_adapter(case.model, tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    del data["qlora_train"]["options"]["granularity"]
    path.write_text(json.dumps(data))
    assert load_adapter_config(tmp_path).options["granularity"] == "matrix"


def test_a_gate_cannot_be_of_another_granularity_than_its_folder_says(
    layered: Case, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    save_adapter(layered.model, folder)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"layer"', '"matrix"'))
    with pytest.raises(ModelError, match="lora_mole"):
        load_adapter(tiny_base(tiny_llama_dir).model, folder)


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_a_mixture_on_a_deep_model_is_planned(granularity: str, tmp_path: Path) -> None:
    """From a few of its layers, of which the experts have more; the gates are counted as they are trained."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
    model = build_tiny_llama(tmp_path / "deep", **sizes)
    path = write_recipe(tmp_path, model)
    sections = json.loads(path.read_text())
    experts = [str(folder) for folder in write_experts(model, tmp_path)]
    sections["adapter"] = {"method": "mole", "experts": experts, "granularity": granularity}
    path.write_text(json.dumps(sections))
    outcome = run_cli("plan", path, "--json")
    assert outcome.code == 0, outcome.err
    case = build(model, section_of("mole", [Path(folder) for folder in experts], granularity=granularity))
    trained = sum(parameter.numel() for parameter in case.model.parameters() if parameter.requires_grad)
    (on_disk,) = [
        term for term in json.loads(outcome.out)["terms"] if term["cause"] == "adapter" and term["stage"] == "disk"
    ]
    assert on_disk["num_bytes"] == 4 * trained


def test_beside_another_adapter_the_gates_hold_too(case: Case) -> None:
    """PEFT adds up what is active, through the form's other forward pass."""
    scatter(case)
    layer = gated(case)[0]
    x = torch.randn(5, width_of(layer))
    alone, base = run(layer, x), layer.get_base_layer()(x)
    case.model.add_adapter("other", section_config(AdapterSection(r=2, target_modules=("q_proj",))))
    with torch.no_grad():
        weight_A, weight_B = layer.lora_A["other"].weight, torch.nn.init.normal_(layer.lora_B["other"].weight)
        other = torch.nn.functional.linear(torch.nn.functional.linear(x, weight_A), weight_B) * layer.scaling["other"]
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(run(layer, x), alone + other, rtol=1e-5, atol=1e-5)
    assert float((alone - base).abs().max()) > 1e-4 and layer.num_fallbacks == 1


def test_the_balance_is_a_mean_over_decoder_layers(layered: Case) -> None:
    """Each layer's gate counts once, however many matrices it serves."""
    balance = Balance(layered.model, layered.section.model_copy(update={"balance": 1.0}))
    layered.model.train()
    layered.causal.loss_sum(layered.batches[0])
    first, second = [layer for layer in lora_layers(layered.model).values() if "mean_gates" in vars(layer)]
    first.mean_gates, second.mean_gates = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7])
    found = balance.extra_loss(1.0)
    assert found is not None and float(found) == pytest.approx(-math.log(0.6) - math.log(0.4), rel=1e-5)
    assert balance.figures() == pytest.approx({"gate_0": 0.6, "gate_1": 0.4})
