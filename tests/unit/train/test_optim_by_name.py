"""The optimisers by name: which they are, their state through a checkpoint, its bytes, and how they learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, RecipeError, ResumeError
from qlora_train.model.causal import CausalModel
from qlora_train.quant.moments import BNB_ADAMW, build_bnb_adamw, optimizer_state_bytes
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import TrainSection
from qlora_train.train.checkpoint import find_checkpoint, restore_checkpoint, save_checkpoint
from qlora_train.train.optim import (
    build_optimizer,
    check_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trainable_parameters,
)
from qlora_train.train.state import Binding, TrainState
from tests.loading import tiny_base, with_adapter
from tests.packs import alone, table_of

ON_CPU = ("adamw", "adamw_8bit")
PAGED = ("paged_adamw", "paged_adamw_8bit")
BINDING = Binding("base", "data", "template", {})


class Sizes(nn.Module):
    """Two parameters large enough for 8 bit, one with a last block of 192 elements; a small one; a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = nn.Parameter(torch.randn(4, 4, generator=generator), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(16, 256, generator=generator))
        self.lora_B = nn.Parameter(torch.randn(300, 16, generator=generator))
        self.small = nn.Parameter(torch.randn(8, 16, generator=generator))


def section(**settings: Any) -> TrainSection:
    return TrainSection(**{"learning_rate": 0.01, **settings})


def give_gradients(model: nn.Module, step: int) -> None:
    """Random gradients of a step; the same for every model."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(num_steps: int, **settings: Any) -> tuple[Sizes, Any]:
    model = Sizes()
    optimizer = build_optimizer(model, section(**settings))
    for step in range(num_steps):
        give_gradients(model, step)
        optimizer.step()
    return model, optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest distance between two values of the same place."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_foreach_equals_the_plain_loop_to_the_bit() -> None:
    model, optimizer = run(5, weight_decay=0.1)
    plain = Sizes()
    parameters = list(trainable_parameters(plain).values())
    loop = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, foreach=False, fused=False)
    for step in range(5):
        give_gradients(plain, step)
        loop.step()
    assert optimizer.param_groups[0]["foreach"] and not optimizer.param_groups[0]["fused"]
    assert equal(values(model), values(plain))


SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"weight_decay": 0.5},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.9},
    {"learning_rate": 0.02},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_setting_reaches_the_8bit_moments(settings: dict[str, float]) -> None:
    """The first step reads no rounded moment, so it equals AdamW's; the third is nearer to it than to any other."""
    first = apart(values(run(1, optimizer="adamw_8bit", **settings)[0]), values(run(1, **settings)[0]))
    assert first <= 1e-6, "values up to 4: a few roundings of 2.4e-7"
    found = values(run(3, optimizer="adamw_8bit", **settings)[0])
    distances = {str(other): mean_distance(found, values(run(3, **other)[0])) for other in SETTINGS}
    assert min(distances, key=distances.__getitem__) == str(settings), distances


def mean_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name] - other[name]).abs().mean()) for name in one)


@pytest.mark.parametrize("optimizer", ON_CPU)
def test_the_rate_is_read_at_each_step(optimizer: str) -> None:
    model, built = run(1, optimizer=optimizer, weight_decay=0.1)
    before = values(model)
    moves = []
    for learning_rate in (0.0, 0.01):
        for group in built.param_groups:
            group["lr"] = learning_rate
        give_gradients(model, 1)
        built.step()
        moves.append(apart(values(model), before))
    assert moves[0] == 0 and moves[1] > 1e-3


@pytest.mark.parametrize("optimizer", ON_CPU)
def test_moments_have_the_named_type(optimizer: str) -> None:
    model, built = run(2, optimizer=optimizer)
    tensors = optimizer_tensors(model, built)
    codes = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    large = {f"{moment}/{name}" for moment in ("state1", "state2") for name in ("lora_A", "lora_B")}
    assert codes == (large if optimizer == "adamw_8bit" else set())
    small = {name: tensor for name, tensor in tensors.items() if name.endswith("/small")}
    assert len(small) == 3 and all(t.dtype == torch.float32 for n, t in small.items() if not n.startswith("step"))
    assert all(tensors[f"step/{name}"].item() == 2 for name in ("lora_A", "lora_B", "small"))
    assert not any(name.endswith("base") for name in tensors)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PeftModel:
    """lora_A of every layer has 4,096 elements or more, k_proj's lora_B 2,048: moments of both kinds."""
    base = tiny_base(tiny_llama_dir)
    return with_adapter(base, r=32, target_modules=("q_proj", "k_proj", "down_proj"), dropout=0.0)


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    table = table_of([9, 14, 20, 12], seed=3)
    model.train()
    for step in steps:
        CausalModel(model).loss_sum(alone(table, step % 4)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("optimizer", ON_CPU)
def test_a_resume_is_exact(optimizer: str, model: PeftModel, tmp_path: Path) -> None:
    """Six steps against three, a checkpoint on disk, and three by another optimiser that was given its state."""
    start = values(model)
    settings = section(optimizer=optimizer, weight_decay=0.1)
    straight = build_optimizer(model, settings)
    train(model, straight, range(6))
    expected, expected_state = values(model), copies(optimizer_tensors(model, straight))
    assert apart(expected, start) > 0.01
    kinds = {tensor.dtype for tensor in expected_state.values()}
    assert kinds == ({torch.float32} if optimizer == "adamw" else {torch.uint8, torch.float32, torch.int64})

    set_values(model, start)
    first = build_optimizer(model, settings)
    train(model, first, range(3))
    run_dir = RunDir(tmp_path)
    run_dir.recipe.write_text("model: {}\n")
    save_checkpoint(run_dir, TrainState(step=3), model, first, BINDING)
    middle = values(model)
    set_values(model, start)
    second = build_optimizer(model, settings)
    restore_checkpoint(find_checkpoint(run_dir)[0], model, second, BINDING)
    train(model, second, range(3, 6))
    assert equal(values(model), expected)
    assert equal(optimizer_tensors(model, second), expected_state)

    set_values(model, middle)
    train(model, build_optimizer(model, settings), range(3, 6))
    assert not equal(values(model), expected), "negative control: without its state it goes elsewhere"
    set_values(model, start)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def set_values(model: nn.Module, to: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(to[name])


@pytest.mark.parametrize("fused", [True, False])
def test_step_lies_where_torch_keeps_it(fused: bool) -> None:
    """With the parameter for the fused update, else on the CPU. The meta device stands for a card."""
    model, optimizer = run(2)
    tensors = copies(optimizer_tensors(model, optimizer))
    there = Sizes().to("meta")
    other = torch.optim.AdamW(list(trainable_parameters(there).values()), fused=fused, foreach=not fused)
    restore_optimizer(there, other, tensors)
    state = other.state[there.lora_A]
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "meta"


@pytest.mark.parametrize("optimizer", ON_CPU)
def test_a_parameter_without_gradients_has_no_state_before_and_after(optimizer: str) -> None:
    model = Sizes()
    first = build_optimizer(model, section(optimizer=optimizer))
    give_gradients(model, 0)
    model.lora_B.grad = None
    first.step()
    tensors = copies(optimizer_tensors(model, first))
    assert not any(name.endswith("lora_B") for name in tensors)
    second = build_optimizer(model, section(optimizer=optimizer))
    restore_optimizer(model, second, tensors)
    assert equal(optimizer_tensors(model, second), tensors)
    give_gradients(model, 1)
    second.step()
    assert optimizer_tensors(model, second)["step/lora_B"].item() == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("absmax1/lora_A", None, "first difference absmax1/lora_A"),
        ("qmap1", None, "first difference qmap1"),
        ("absmax1/small", torch.zeros(1), "first difference absmax1/small"),
        ("state1/gone", torch.zeros(1), "/gone"),
        ("absmax2/lora_B", torch.zeros(18), "absmax2/lora_B has another shape or dtype"),
        ("state1/lora_A", torch.zeros(16, 256), "state1/lora_A has another shape or dtype"),
        ("step/lora_A", torch.zeros(()), "step/lora_A has another shape or dtype"),
        ("qmap2", torch.linspace(0, 1, 256), "other values than here .qmap2"),
    ],
)
def test_an_8bit_state_that_does_not_fit_is_refused(name: str, value: Tensor | None, words: str) -> None:
    model, optimizer = run(1, optimizer="adamw_8bit")
    tensors = copies(optimizer_tensors(model, optimizer))
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(ResumeError, match=words):
        restore_optimizer(model, optimizer, tensors)


def test_the_state_of_another_optimiser_is_refused() -> None:
    model, optimizer = run(1)
    tensors = copies(optimizer_tensors(model, optimizer))
    with pytest.raises(ResumeError, match=r"train\.optimizer"):
        restore_optimizer(model, build_optimizer(model, section(optimizer="adamw_8bit")), tensors)


@pytest.mark.parametrize("optimizer", (*ON_CPU, *PAGED))
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_state_bytes_are_exact(optimizer: str) -> None:
    """The bytes of the real states. A paged optimiser's are as large without pages, which a CPU cannot give."""
    model = Sizes()
    if optimizer in PAGED:
        parameters = list(trainable_parameters(model).values())
        built = build_bnb_adamw(optimizer, parameters, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    else:
        built = build_optimizer(model, section(optimizer=optimizer))
    give_gradients(model, 0)
    built.step()
    states = [value for state in built.state.values() for value in state.values() if isinstance(value, Tensor)]
    found = sum({tensor.data_ptr(): tensor.nbytes for tensor in states}.values())
    shapes = [parameter.shape for parameter in trainable_parameters(model).values()]
    assert optimizer_state_bytes(optimizer, shapes) == found


def test_state_bytes_of_a_model_of_eight_billion() -> None:
    """LoRA of r = 16 on every linear layer of Llama-3.1-8B: the table of `optimizer_state_bytes`."""
    layers = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    shapes = [shape for inputs, outputs in layers for shape in ((16, inputs), (outputs, 16))] * 32
    assert sum(math.prod(shape) for shape in shapes) == 41_943_040
    found = {name: optimizer_state_bytes(name, shapes) / 1e9 for name in (*ON_CPU, *PAGED)}
    assert {name: round(gigabytes, 3) for name, gigabytes in found.items()} == {
        "adamw": 0.336, "adamw_8bit": 0.085, "paged_adamw": 0.336, "paged_adamw_8bit": 0.085
    }  # fmt: skip


@pytest.mark.parametrize("optimizer", PAGED)
def test_paged_moments_are_refused_on_a_cpu(optimizer: str) -> None:
    settings = section(optimizer=optimizer)
    with pytest.raises(MachineError, match=rf"train.optimizer: {optimizer} .* is cpu.*: {optimizer[6:]}$"):
        check_optimizer(settings, torch.device("cpu"))
    with pytest.raises(MachineError, match="CUDA's managed memory"):
        build_optimizer(Sizes(), settings)
    check_optimizer(settings, torch.device("cuda", 0))


@pytest.mark.parametrize("optimizer", (*ON_CPU, *PAGED))
@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
def test_the_recipe_refuses_paged_moments_where_it_names_a_cpu(optimizer: str, device: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model:\n  path: org/base\n  device: {device}\ndata:\n  train: [train.jsonl]\nrun: {{dir: out}}\n"
        f"train:\n  optimizer: {optimizer}\n"
    )
    if optimizer in PAGED and device == "cpu":
        with pytest.raises(RecipeError, match=r"r.yaml:8: train.optimizer: .* model.device is cpu \(set at .*:3\)"):
            load_recipe(recipe, ())
    else:
        assert load_recipe(recipe, ()).recipe.train.optimizer == optimizer


def regression(optimizer: str, learning_rate: float) -> list[float]:
    """Losses of sixty steps towards a random map of rank 8, through A and B of rank 16, from B = 0."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(256, 8, generator=generator) @ torch.randn(8, 256, generator=generator) / math.sqrt(8 * 256)
    model = nn.Module()
    model.lora_A = nn.Parameter(torch.randn(16, 256, generator=generator) / 16)
    model.lora_B = nn.Parameter(torch.zeros(256, 16))
    built = build_optimizer(model, section(optimizer=optimizer, learning_rate=learning_rate))
    losses = []
    for _ in range(60):
        x = torch.randn(64, 256, generator=generator)
        loss = (x @ model.lora_A.T @ model.lora_B.T - x @ target.T).square().mean()
        built.zero_grad()
        loss.backward()
        built.step()
        losses.append(loss.item())
    return losses


def test_8bit_moments_learn_as_float32_ones() -> None:
    """Losses within 0.5 % of the first one at every step (seen: 0.08 %), where a tenth more rate is seen."""
    losses = regression("adamw", 0.01)
    assert losses[-1] < 0.05 * losses[0]

    def distance(others: list[float]) -> float:
        return max(abs(one - other) for one, other in zip(losses, others, strict=True)) / losses[0]

    assert 0 < distance(regression("adamw_8bit", 0.01)) < 0.005
    assert distance(regression("adamw", 0.011)) > 0.005, "negative control"


def test_the_table_of_classes_has_every_name_of_the_schema() -> None:
    names = TrainSection.model_fields["optimizer"].annotation.__args__  # type: ignore[union-attr]
    assert {"adamw", *BNB_ADAMW} == set(names)
