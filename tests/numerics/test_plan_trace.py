"""The step traced without values, against the same step run on this CPU; and what other ways to run it change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.layers import lora_layers
from qlora_train.errors import ModelError
from qlora_train.memory.live import LiveBytes
from qlora_train.memory.measure import trial_batch
from qlora_train.memory.meta import MetaModel, ModelStyle, as_on, build_meta_model
from qlora_train.memory.trace import (
    ADAPTER,
    CHECKPOINTS,
    DEQUANTISED,
    GRADIENTS,
    HEAD,
    KEPT,
    OPTIMISER,
    QUANTISED,
    RESIDENT,
    UNQUANTISED,
    Loss,
    StepStyle,
    full_logits_loss,
    our_loss,
    trace_evaluation,
    trace_step,
)
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing
from qlora_train.recipe.schema import AdapterSection, QuantSection
from tests.packs import tiny_model
from tests.unit.memory.planned import tiny_config

DENSE = QuantSection(quant_type="none", double_quant=False)
SMALL = AdapterSection(r=4, alpha=8.0)


def real_peak(family: str, policy: Checkpointing, batch: Any) -> int:
    """Bytes that a step makes on this CPU, at the most."""
    model = attach_adapter(tiny_model(family), SMALL, 0, base_name="tiny").train()
    causal = CausalModel(model)
    apply_checkpointing(model, policy)
    causal.loss_sum(batch).backward()  # buffers are made once
    model.zero_grad()
    with LiveBytes() as live:
        (causal.loss_sum(batch) / 8).backward()
    return live.peak


@pytest.mark.parametrize(
    ("family", "packed", "kind"),
    [
        ("llama", True, "none"),
        ("llama", True, "full"),
        ("llama", True, "selective"),
        ("llama", False, "full"),
        ("neox", True, "full"),
        ("gemma2", True, "selective"),
        ("qwen3", False, "none"),
    ],
)
def test_the_traced_peak_is_the_measured_one(family: str, packed: bool, kind: Any) -> None:
    batch, policy = trial_batch(2, 64, 16, packed=packed), Checkpointing(kind)
    style = ModelStyle(adapter=SMALL, quant=DENSE, compute_dtype=torch.float32)
    model = build_meta_model(tiny_config(family, 2), style, "cpu")
    trace = trace_step(model, batch, StepStyle(checkpointing=policy, accumulates=False))
    measured = real_peak(family, policy, batch)
    inputs = 4 * batch.input_ids.nbytes  # ids, labels, positions and indices are there already when a step is measured
    assert abs(trace.peak_bytes - trace.held_bytes - measured) <= inputs
    assert trace.causes and sum(trace.causes.values()) == trace.peak_bytes


@pytest.fixture(scope="module")
def model() -> MetaModel:
    return build_meta_model(tiny_config("llama", 3), ModelStyle(adapter=SMALL), "cuda")


BATCH = trial_batch(2, 64, 64, packed=True)


def test_what_is_held_all_the_time(model: MetaModel) -> None:
    """Llama of hidden 128, MLP 256, keys of 64, three layers, r = 4."""
    causes = trace_step(model, BATCH, StepStyle(checkpointing=Checkpointing("full"))).causes
    weights = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128
    assert causes[DEQUANTISED] == 2 * weights
    assert 0.516 * 3 * weights <= causes[QUANTISED] <= 0.516 * 3 * weights + 3 * 7 * 5 * 512
    assert causes[UNQUANTISED] >= 2 * (2 * 512 * 128 + 7 * 128)
    num_adapter = 3 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert causes[ADAPTER] == causes[GRADIENTS] == 4 * num_adapter
    assert 8 * num_adapter <= causes[OPTIMISER] <= 8 * num_adapter + 1024
    # The first layer's output, from which the second runs again, and where rows begin. The last layer, which does not
    # run again, works on a copy in float32.
    assert 0 <= causes[CHECKPOINTS] - 2 * 64 * 128 * 2 <= 512
    assert RESIDENT not in causes


def test_resident_layers_and_repeated_traces(model: MetaModel) -> None:
    style = StepStyle(checkpointing=Checkpointing("full"))
    first = trace_step(model, BATCH, style)
    resident = trace_step(model, BATCH, replace(style, resident_layers=2))
    assert resident.causes[RESIDENT] == 2 * first.causes[DEQUANTISED]
    assert trace_step(model, BATCH, style) == first


def test_policies_and_accumulation(model: MetaModel) -> None:
    peaks = {kind: trace_step(model, BATCH, StepStyle(checkpointing=Checkpointing(kind))).peak_bytes for kind in KINDS}
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    offloaded = StepStyle(checkpointing=Checkpointing("full", offload=True))
    assert trace_step(model, BATCH, offloaded).peak_bytes < peaks["full"]
    without = StepStyle(checkpointing=Checkpointing("full"), accumulates=False)
    with_gradients = trace_step(model, BATCH, replace(without, accumulates=True))
    assert trace_step(model, BATCH, without).peak_bytes < with_gradients.peak_bytes


KINDS: tuple[Any, ...] = ("full", "selective", "none")


def test_evaluation_keeps_no_activations(model: MetaModel) -> None:
    style = StepStyle(checkpointing=Checkpointing("none"))
    trained = trace_step(model, BATCH, style)
    evaluated = trace_evaluation(model, trial_batch(2, 64, 64, packed=False), style)
    assert evaluated.peak_bytes < trained.peak_bytes and GRADIENTS not in evaluated.causes
    assert evaluated.held_bytes == trained.held_bytes - trained.causes[GRADIENTS]


def test_full_logits_cost_what_they_weigh() -> None:
    config = tiny_config("llama", 3)
    config.vocab_size = 32_768
    model = build_meta_model(config, ModelStyle(adapter=SMALL), "cuda")
    style, logits = StepStyle(checkpointing=Checkpointing("full")), 2 * 64 * 32_768

    def work(loss: Loss) -> int:
        trace = trace_step(model, BATCH, replace(style, loss=loss))
        assert trace.causes[HEAD] > 0
        return trace.peak_bytes - trace.held_bytes

    ours, theirs = work(our_loss), work(full_logits_loss)
    assert 12 * logits < theirs and ours < 11 * logits  # 12: log-softmax and two gradients in float32


def test_other_trainers_ways_take_more() -> None:
    config, style = tiny_config("llama", 3), StepStyle(checkpointing=Checkpointing("full"), recompute_last=True)
    peaks = {}
    for linear in ("fused", "plain", "peft"):
        model = build_meta_model(config, ModelStyle(adapter=SMALL, linear=linear), "cuda")
        peaks[linear] = trace_step(model, BATCH, style)
    assert peaks["peft"].peak_bytes - peaks["peft"].held_bytes > peaks["fused"].peak_bytes - peaks["fused"].held_bytes
    upcast = build_meta_model(config, ModelStyle(adapter=SMALL, linear="peft", upcast="all"), "cuda")
    as_float32 = replace(style, loss=full_logits_loss)
    held = trace_step(upcast, BATCH, as_float32).causes[UNQUANTISED]
    assert 2 * peaks["peft"].causes[UNQUANTISED] - 20 * 512 <= held <= 2 * peaks["peft"].causes[UNQUANTISED]
    halves = ModelStyle(adapter=SMALL, linear="peft", adapter_dtype=torch.bfloat16)
    small = trace_step(build_meta_model(config, halves, "cuda"), BATCH, style)
    assert 2 * small.causes[ADAPTER] == peaks["peft"].causes[ADAPTER]


def test_dropout_takes_masks_where_they_are_kept() -> None:
    """The plain twin keeps one for each layer, a byte for an input; the fused function draws it again from its seed."""

    def kept(linear: Any, dropout: float) -> tuple[int, int]:
        style = ModelStyle(adapter=SMALL.model_copy(update={"dropout": dropout}), linear=linear)
        model = build_meta_model(tiny_config("llama", 2), style, "cuda")
        trace = trace_step(model, BATCH, StepStyle(checkpointing=Checkpointing("none")))
        return trace.causes[KEPT], sum(layer.in_features for layer in lora_layers(model.model).values())

    (plain, width), (without, _) = kept("plain", 0.1), kept("plain", 0.0)
    assert plain - without >= BATCH.labels.numel() * width
    assert kept("fused", 0.1) == kept("fused", 0.0)


def test_new_tokens_are_planned_past_the_tables_rows(model: MetaModel) -> None:
    section = SMALL.model_copy(update={"new_tokens": ("<a>", "<b>")})
    grown = build_meta_model(tiny_config("llama", 3), ModelStyle(adapter=section), "cuda")
    assert grown.head.vocab_size == model.head.vocab_size + 2
    style = StepStyle(checkpointing=Checkpointing("full"))
    more, plain = (trace_step(each, BATCH, style) for each in (grown, model))
    assert more.causes[ADAPTER] - plain.causes[ADAPTER] == 2 * 2 * 128 * 4, "two rows in each of two tables"
    assert more.peak_bytes > plain.peak_bytes


def test_a_model_that_decides_by_values_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be traced without its weights"), as_on("cuda"):
        bool(torch.empty(1, device="meta"))
    with pytest.raises(RuntimeError, match="other"), as_on("cuda"):
        raise RuntimeError("other")
