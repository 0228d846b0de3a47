"""The flight recorder: what is first not finite, found by computing a step once more."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qlora_train.adapters.hooks import NO_HOOKS
from qlora_train.data.loader import collate
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing
from qlora_train.train.flight import Culprit, FlightRecorder, find_culprit, trained_values_are_finite
from qlora_train.train.last_steps import LastSteps
from qlora_train.train.optim import trainable_parameters
from qlora_train.train.step import StepResult, gradient_norms, norms
from tests.loading import tiny_base, with_adapter
from tests.packs import table_of

NAN = float("nan")


@pytest.fixture(scope="module")
def job(tiny_llama_dir: Path) -> Any:
    """As much of a job as a step's gradients need."""
    model = with_adapter(tiny_base(tiny_llama_dir))
    model.train()
    parameters = list(trainable_parameters(model).values())
    optimizer: Any = SimpleNamespace(param_groups=[{"params": parameters}])
    return SimpleNamespace(
        model=model,
        causal=CausalModel(model),
        accelerator=Accelerator(cpu=True),
        recipe=SimpleNamespace(run=SimpleNamespace(seed=0)),
        hooks=NO_HOOKS,
        optimizer=optimizer,
        last_steps=LastSteps(model, optimizer),
    )


def batches() -> list[Any]:
    table = table_of([12, 9, 11])
    return [collate(table, [[0], [1]], 0), collate(table, [[2]], 0)]


@pytest.fixture(autouse=True)
def without_gradients(job: Any) -> Any:
    yield
    job.model.zero_grad(set_to_none=True)


def test_a_sound_step_has_no_culprit(job: Any) -> None:
    assert find_culprit(job, batches(), 3) is None and trained_values_are_finite(job.model)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_innermost_module_is_named_and_its_micro_batch(job: Any, checkpointing: Any) -> None:
    """The second micro-batch alone is bad; with checkpointing, modules run a second time in the backward pass."""
    apply_checkpointing(job.model, Checkpointing(checkpointing))
    module = job.model.get_submodule("base_model.model.model.layers.1.mlp.act_fn")
    seen: list[int] = []

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("inf") if output.shape[-2] == 11 else seen.append(1)

    handle = module.register_forward_hook(spoil)
    try:
        found = find_culprit(job, batches(), 3)
    finally:
        handle.remove()
        apply_checkpointing(job.model, Checkpointing("none"))
    assert found == Culprit("output", "model.layers.1.mlp.act_fn", 1) and seen
    assert str(found) == "the output of model.layers.1.mlp.act_fn, in micro-batch 2"


def test_a_trained_value_is_named_before_anything_is_computed(job: Any) -> None:
    parameter = job.model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    before = parameter.data[0, 0].clone()
    parameter.data[0, 0] = NAN
    try:
        found = find_culprit(job, batches(), 3)
        assert not trained_values_are_finite(job.model)
    finally:
        parameter.data[0, 0] = before
    assert found == Culprit("value", "model.layers.0.mlp.up_proj.lora_A", None)


def test_a_gradient_is_named_where_the_loss_is_finite(job: Any) -> None:
    parameter = job.model.get_parameter("base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight")
    handle = parameter.register_hook(lambda gradient: gradient * NAN)
    try:
        found = find_culprit(job, batches(), 3)
    finally:
        handle.remove()
    assert found == Culprit("gradient", "model.layers.0.self_attn.v_proj.lora_B", 0)


def test_norms_are_those_of_each_tensor_and_zero_without_gradient() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [2.0], [2.0]])]
    assert norms(tensors).tolist() == [5.0, 3.0]
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[1].grad = torch.tensor([6.0, 8.0])
    assert gradient_norms(parameters).tolist() == [0.0, 10.0, 0.0]


def test_the_last_steps_are_kept_by_name(job: Any) -> None:
    recorder = FlightRecorder(job, "qlora-train train recipe.yaml")
    parameters = job.optimizer.param_groups[0]["params"]
    for step in range(25):
        result = StepResult(2.0 + step, 1.0, 1, 1, 1, grad_norms=torch.full((len(parameters),), float(step)))
        recorder.note(step, result, 0.5)
    kept = job.last_steps.as_dict()
    assert kept["step"] == list(range(6, 26)) and kept["loss"][-1] == 26.0
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert kept["grad_norm_of"][name] == [float(step) for step in range(5, 25)]
    weight = job.model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    assert kept["norm_of"][name][0] == pytest.approx(float(weight.detach().norm()))
    assert len(kept["norm_of"]) == len(parameters) == 28


def test_what_a_checkpoint_keeps_of_the_last_steps_is_gone_on_from(job: Any) -> None:
    """Through JSON and to the bit; of a model with other tensors nothing is taken over."""
    there = LastSteps(job.model, job.optimizer)
    for step in range(1, 24):
        grad_norms = torch.rand(len(there.names)) / 3
        there.note(step, StepResult(1 / step, step / 7, 1, 1, 1, grad_norms=grad_norms), 0.1 / step)
    kept = json.loads(json.dumps(there.as_dict()))
    here = LastSteps(job.model, job.optimizer)
    here.restore(kept)
    assert here.as_dict() == there.as_dict() and len(kept["step"]) == 20
    here.note(24, StepResult(1.0, 1.0, 1, 1, 1, grad_norms=grad_norms), 0.1)
    assert here.as_dict()["step"] == list(range(5, 25))
    other = LastSteps(job.model, job.optimizer)
    other.restore(kept | {"norm_of": {**kept["norm_of"], "another": [1.0] * 20}})
    other.restore({})
    assert other.as_dict()["step"] == []
