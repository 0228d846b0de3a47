"""Starts on a real NF4 base: what the model computes at step 0, what a saved adapter gives back, and what is folded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from qlora_train.adapters.attach import attach_adapter, load_adapter
from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.forms.base import base_weight, layer_tensors
from qlora_train.adapters.inits.residual import read_taken, taken_by, untrained
from qlora_train.adapters.layers import delta_weight, lora_layers
from qlora_train.adapters.state import save_adapter
from qlora_train.adapters.updates import Delta
from qlora_train.analysis.folder import open_adapter
from qlora_train.model.load import Base
from qlora_train.model.start import Weights, parameter_of, rebuild, start_from_weights
from qlora_train.quant.bnb import dequantize
from qlora_train.quant.fingerprint import print_base
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection, TrainSection
from qlora_train.train.optim import parameter_groups
from tests.commandline import run_cli, write_recipe
from tests.loading import CPU, tiny_base
from tests.methods.cases import build, one_layer, section_of
from tests.tiny import build_tiny_llama

IDS = torch.tensor([[3, 7, 100, 250, 31, 2, 8]])
OFFSETS = ("milora", "olora")
RESIDUALS = (("pissa", 1), ("pissa", 3), ("loftq", 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose spectra fall off, as trained ones do: of flat ones no start can make anything."""
    from safetensors.torch import load_file, save_file

    made = build_tiny_llama(tmp_path_factory.mktemp("starts"), num_hidden_layers=1)
    path = made / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            left = torch.randn(tensor.shape[0], 3, generator=generator)
            right = torch.randn(3, tensor.shape[1], generator=generator)
            tensors[name] = (tensor.float() + 0.01 * left @ right).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    return made


def started(folder: Path, method: str, quant: dict[str, Any] | None = None, **keys: Any) -> tuple[Base, PeftModel]:
    section = AdapterSection(**{"method": method, "r": 4, "alpha": 8.0, **keys})
    base = tiny_base(folder, **(quant or {}))
    model = attach_adapter(base.model, section, 0, base_name="tiny")
    return start_from_weights(base, model, section), model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@torch.no_grad()
def train_a_little(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def errors(base: Base, model: PeftModel) -> tuple[float, float]:
    """Relative distance from the original weights: of the base as loaded, and of the started base with its adapter."""
    weights, plain = Weights(base), tiny_base(base.source.folder)
    loaded = found = total = 0.0
    for name, layer in lora_layers(model).items():
        original = weights.read(parameter_of(name), CPU)
        module = plain.model.get_submodule(name.removeprefix("base_model.model."))
        loaded += float((dequantize(module.weight) - original).square().sum())
        found += float((base_weight(layer) + delta_weight(layer, "default") - original).square().sum())
        total += float(original.square().sum())
    return (loaded / total) ** 0.5, (found / total) ** 0.5


@pytest.mark.parametrize("method", OFFSETS)
def test_an_offset_start_changes_nothing_to_the_bit(folder: Path, method: str) -> None:
    plain = tiny_base(folder)
    base, model = started(folder, method)
    assert base.print.digest == plain.print.digest == print_base(base.model).digest
    assert torch.equal(logits(model), logits(plain.model))
    for layer in lora_layers(model).values():
        tensors = layer_tensors(layer, "default")
        assert torch.equal(tensors["lora_A"], tensors["lora_start_A"]) and bool(tensors["lora_B"].any())
    train_a_little(model)
    assert float((logits(model) - logits(plain.model)).abs().max()) > 1e-2, "negative control: training shows"


@pytest.mark.parametrize("method", OFFSETS)
def test_an_offset_adapter_is_plain_lora_of_twice_the_rank(folder: Path, method: str, tmp_path: Path) -> None:
    _, model = started(folder, method)
    train_a_little(model)
    save_adapter(model, tmp_path)
    updates = read_updates(tmp_path)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            update = updates[parameter_of(name)]
            assert isinstance(update, Delta) and update.lora_A.shape[0] == 8
            x = torch.randn(3, layer.in_features)
            dense = torch.nn.functional.linear(x, update.applied(base_weight(layer)))
            assert torch.allclose(layer(x), dense, atol=1e-5)
            tensors = layer_tensors(layer, "default")
            product = 2.0 * (tensors["lora_B"] @ tensors["lora_A"] - tensors["lora_start_B"] @ tensors["lora_start_A"])
            assert torch.allclose(update.dense(CPU), product, atol=1e-5)
    again = load_adapter(tiny_base(folder).model, tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("method", "iters"), RESIDUALS)
def test_a_residual_base_is_rebuilt_from_the_adapter_to_the_bit(
    folder: Path, method: str, iters: int, tmp_path: Path
) -> None:
    plain = tiny_base(folder)
    base, model = started(folder, method, start_iters=iters)
    assert base.print == print_base(base.model), "the fingerprint is that of what is there"
    adapted = {parameter_of(name) for name in lora_layers(model)}
    changed = {name for name, tensor in base.print.tensors.items() if tensor != plain.print.tensors[name]}
    assert changed == adapted
    at_start = logits(model)
    train_a_little(model)
    assert not torch.equal(logits(model), at_start)
    save_adapter(model, tmp_path)

    fresh = tiny_base(folder)
    again = load_adapter(fresh.model, tmp_path).eval()
    assert rebuild(fresh, again).print == base.print
    assert torch.equal(logits(again), logits(model))
    taken = read_taken(tmp_path)
    assert taken.keys() == adapted
    for name, layer in lora_layers(model).items():
        own = taken_by(layer)
        assert own is not None and torch.equal(own.factors.lora_B, taken[parameter_of(name)].factors.lora_B)

    without = load_adapter(tiny_base(folder).model, tmp_path).eval()
    assert not torch.equal(logits(without), logits(model)), (
        "negative control: on the base as loaded it is another model"
    )


@pytest.mark.parametrize(("method", "iters"), RESIDUALS)
def test_untrained_puts_back_what_was_taken(folder: Path, method: str, iters: int) -> None:
    _, model = started(folder, method, start_iters=iters)
    original = logits(tiny_base(folder, quant_type="none").model)
    trained_before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_a_little(model)
    trained = logits(model)
    with untrained(model):
        whole = logits(model)
    with model.disable_adapter():
        rest = logits(model)
    assert float((whole - original).norm()) < (0.5 if method == "pissa" else 1) * float((rest - original).norm())
    assert torch.equal(logits(model), trained)
    assert trained_before.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_starts_that_know_the_weight_bring_the_model_nearer_to_it(folder: Path) -> None:
    found = {}
    for method, iters in (("pissa", 1), ("pissa", 3), ("loftq", 1), ("loftq", 3)):
        base, model = started(folder, method, start_iters=iters, r=8, alpha=16.0)
        loaded, found[method, iters] = errors(base, model)
        assert found[method, iters] < 0.97 * loaded, (method, iters)
    assert found["pissa", 3] < found["pissa", 1] and found["loftq", 3] < found["loftq", 1]


def test_loftq_of_one_round_leaves_the_base_alone_whatever_alpha(folder: Path) -> None:
    plain = tiny_base(folder)
    reached = []
    for alpha in (4.0, 8.0, 32.0):
        base, model = started(folder, "loftq", alpha=alpha)
        assert base.print == plain.print
        assert not torch.equal(logits(model), logits(plain.model)), "its start is a correction, no no-op"
        reached.append(errors(base, model)[1])
    assert reached[1:] == pytest.approx(reached[:-1], rel=1e-4)


@pytest.mark.parametrize("method", ["pissa", "loftq", "milora", "olora"])
def test_starts_on_an_unquantised_base(folder: Path, method: str) -> None:
    """There the residual and the adapter together are the weight itself."""
    plain = tiny_base(folder, quant_type="none")
    _, model = started(folder, method, {"quant_type": "none"})
    assert torch.allclose(logits(model), logits(plain.model), atol=2e-4)
    if method == "pissa":
        with model.disable_adapter():
            assert not torch.allclose(logits(model), logits(plain.model), atol=1e-2), "negative control: it was moved"


def test_a_start_says_what_it_did(folder: Path) -> None:
    said: list[str] = []
    for method, quant in (("pissa", "nf4"), ("milora", "nf4"), ("pissa", "none"), ("lora", "nf4")):
        base = tiny_base(folder, quant_type=quant)
        section = AdapterSection(method=method, r=8, alpha=16.0)
        start_from_weights(base, attach_adapter(base.model, section, 0, base_name="tiny"), section, said.append)
    assert len(said) == 3, "plain LoRA has nothing to say"
    found, without = (float(number) for number in re.findall(r"0\.\d{4}", said[0]))
    assert "start: PiSSA / QPiSSA of 7 weights in" in said[0] and 0 < found < without
    assert "distance" not in said[1] + said[2]


def test_other_methods_start_as_peft_does(folder: Path) -> None:
    base, model = started(folder, "lora")
    assert base.print == tiny_base(folder).print
    assert all(not layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())


def test_what_a_start_took_from_the_base_is_no_change_of_training(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """PiSSA's A and B hold the principal part of each weight before the first step."""
    recipe = write_recipe(
        tmp_path, tiny_llama_dir, adapter__method="pissa", adapter__dropout=0.0, train__learning_rate=1e-4
    )
    assert run_cli("train", recipe).code == 0
    outcome = run_cli("export", tmp_path / "run", tmp_path / "merged", "export.export_dtype=float32")
    assert outcome.code == 0, outcome.err
    opened = open_adapter(tmp_path / "run")
    changes, cpu = opened.changes(), torch.device("cpu")
    for module, update in opened.updates().items():
        trained = changes[module]
        assert isinstance(update, Delta) and isinstance(trained, Delta)
        assert 0 < trained.dense(cpu).norm() < 0.1 * update.dense(cpu).norm(), module
    assert run_cli("analyze", tmp_path / "run").code == 0
    noise = json.loads((tmp_path / "merged" / "export.json").read_text())["noise"]
    assert 0 < noise["over_weight"]["most"] < 0.02, noise


def test_random_starts_have_the_size_that_their_papers_give() -> None:
    """What a method learns at a given rate depends on it, and no identity at step 0 does."""
    side, r, group = 512, 16, 32
    triplets = layer_tensors(one_layer("adalora", num_in=side, num_out=side, r=r, target_r=8), "default")
    for name in ("lora_A", "lora_B"):
        assert float(triplets[name].detach().std()) == pytest.approx(0.02, rel=0.05), name
    vectors = layer_tensors(one_layer("aflora", num_in=side, num_out=side, r=r), "default")
    assert bool((vectors["lora_core_d"] == 0.1).all()) and not bool(vectors["lora_core_b"].any())
    assert float(vectors["lora_A"].detach().abs().max()) == pytest.approx((6 / side) ** 0.5, rel=0.02), "kaiming, a = 0"
    pooled = layer_tensors(one_layer("qalora", num_in=side, num_out=side, r=r, group_size=group), "default")
    assert float(pooled["lora_A"].detach().abs().max()) == pytest.approx((6 / (side // group + r)) ** 0.5, rel=0.05)


WITH_FACTORS = [name for name, row in METHODS.items() if "lora_A" in row.trains]
ON_ANOTHER_BASE = ("pissa", "loftq")  # zero factors are the base here, which lacks what they held at the start


@pytest.mark.parametrize("method", WITH_FACTORS)
def test_zero_factors_are_the_base_where_the_table_says_so(method: str, folder: Path) -> None:
    """Decay pulls A and B towards zero: for the other methods it is refused."""
    section = section_of(method)
    model = build(folder, section).model
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        for group in parameter_groups(model, section):
            for parameter in group.parameters if group.decays else ():
                parameter.zero_()
        is_base = torch.allclose(model(input_ids=IDS).logits, base, atol=1e-5)
    assert is_base == (METHODS[method].zero_is_base or method in ON_ANOTHER_BASE)
    assert not (METHODS[method].zero_is_base and method in ON_ANOTHER_BASE)


@pytest.mark.parametrize("method", ["pissa", "loftq", "milora", "olora", "lora_ga"])
def test_decay_and_dropout_that_would_undo_a_start_are_refused(method: str, folder: Path, tmp_path: Path) -> None:
    keys = {"adapter__method": method, "adapter__dropout": 0.1, "train__weight_decay": 0.1}
    recipe = write_recipe(tmp_path, folder, **keys)
    outcome = run_cli("check", recipe)
    assert outcome.code == 2 and "train.weight_decay: 0.1 pulls A and B towards zero" in outcome.err
    dropped = "adapter.dropout: 0.1 drops parts of the weights" in outcome.err
    assert dropped == (method in ("pissa", "loftq"))
    plain = write_recipe(tmp_path, folder, **{**keys, "adapter__method": "lora"})
    assert run_cli("check", plain).code == 0


@pytest.mark.parametrize("base", ["original", "auto"])
def test_a_correction_of_rounding_is_not_added_to_weights_without_rounding(
    base: str, folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, folder, adapter__method="loftq", adapter__dropout=0.0, train__max_steps=1)
    assert run_cli("train", recipe).code == 0
    outcome = run_cli("export", tmp_path / "run", tmp_path / "merged", f"export.base={base}")
    assert outcome.code == 2 and f"export.base: {base} adds a correction of the quantisation error" in outcome.err
    assert not (tmp_path / "merged").exists()


def test_the_schema_names_the_methods_that_refuse_decay() -> None:
    about = str(TrainSection.model_fields["weight_decay"].description)
    assert about.endswith(f": {', '.join(name for name, row in METHODS.items() if not row.zero_is_base)}.")
