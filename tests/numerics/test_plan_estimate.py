"""Three layers that stand for all: to the byte what the whole model takes, where all layers are alike."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_train.memory.budget import Choice
from qlora_train.memory.estimate import (
    Request,
    Shallow,
    costs_on_meta,
    estimate,
    evaluation_batch,
    heaviest_batch,
    model_style,
    step_style,
    tensor_limit,
)
from qlora_train.memory.meta import DeviceKind, build_meta_model
from qlora_train.memory.trace import trace_evaluation, trace_step
from qlora_train.model.checkpointing import Checkpointing
from tests.unit.memory.planned import recipe_of, tiny_config

POLICIES = (
    (Checkpointing("none"), 0),
    (Checkpointing("full"), 2),
    (Checkpointing("selective"), 6),
    (Checkpointing("full", every=2), 0),
    (Checkpointing("selective", every=4), 0),
    (Checkpointing("full", offload=True), 0),
)


@pytest.mark.parametrize(
    ("family", "device", "policies"),
    [("llama", "cuda", POLICIES), ("neox", "cuda", (POLICIES[0], POLICIES[3])), ("qwen3", "cpu", POLICIES[:1])],
    ids=("llama", "neox", "qwen3"),
)
def test_the_multiplied_trace_is_the_whole_trace(
    family: str, device: DeviceKind, policies: tuple[tuple[Checkpointing, int], ...]
) -> None:
    recipe = recipe_of(
        data={"seq_len": 64},
        train={"micro_batch_size": 2, "grad_accum_steps": 2},
        eval={"batch_size": 2, "generate_rows": 0},
    )
    request = Request(recipe, tiny_config(family, 6), device)
    whole, shallow = build_meta_model(request.config, model_style(recipe, device), device), Shallow(request)
    batch, costs = heaviest_batch(recipe, 64, device), shallow.costs()
    assert replace(costs, held_out_bytes=0) == costs_on_meta(whole, batch, "adamw")
    for policy, resident in policies:
        style = step_style(recipe, Choice(policy, resident, 0, fits=True))
        assert shallow.step(style, costs) == trace_step(whole, batch, style), policy
    held_out = trace_evaluation(whole, evaluation_batch(recipe, 64), style)
    assert shallow.evaluation(style) == held_out
    dense = trace_evaluation(whole, evaluation_batch(recipe, 64), replace(style, resident_layers=0))
    assert costs.model_bytes + costs.optimizer_bytes + costs.held_out_bytes == dense.peak_bytes


def test_without_accumulation_gradients_may_outgrow_activations() -> None:
    """Then the peak lies at the end of the backward pass, which three layers do not show."""
    config = tiny_config("llama", 6)
    steps = {}
    for seq_len in (16, 512):
        recipe = recipe_of(data={"seq_len": seq_len}, train={"micro_batch_size": 1, "grad_accum_steps": 1})
        request = Request(recipe, config, "cuda")
        shallow = Shallow(request)
        costs = shallow.costs()
        style = step_style(recipe, Choice(Checkpointing("full"), 0, 0, fits=True))
        steps[seq_len] = shallow.step(style, costs)
        whole = build_meta_model(config, model_style(recipe, "cuda"), "cuda")
        if steps[seq_len] is not None:
            assert steps[seq_len] == trace_step(whole, heaviest_batch(recipe, seq_len, "cuda"), style)
    assert steps[16] is None and steps[512] is not None


def test_a_model_of_two_layers_is_whole_already() -> None:
    request = Request(recipe_of(data={"seq_len": 32}), tiny_config("llama", 2), "cuda")
    assert Shallow(request).num_more == 0
    assert estimate(request).training_bytes > 0


def test_auto_settings_plan_as_a_run_will() -> None:
    recipe, config = recipe_of(data={"seq_len": 32}), tiny_config("llama", 2)
    gib = 2**30
    assert tensor_limit(Request(recipe, config, "cuda")) is None
    assert 0.84 * 8 * gib < (tensor_limit(Request(recipe, config, "cuda", limit_bytes=8 * gib)) or 0) < 0.9 * 8 * gib
    fixed = recipe_of(data={"seq_len": 32}, train={"memory_limit_gib": 3.0})
    assert tensor_limit(Request(fixed, config, "cuda", limit_bytes=8 * gib)) == 3 * gib
    leanest, roomy = (estimate(Request(recipe, config, "cuda", limit_bytes=limit)) for limit in (None, 8 * gib))
    assert leanest.choice.checkpointing.kind == "full" and leanest.choice.resident_layers == 0 and leanest.choice.fits
    assert roomy.choice.checkpointing.kind == "none" and roomy.choice.resident_layers == 2
