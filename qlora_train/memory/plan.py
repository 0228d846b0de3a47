"""The memory plan of a run, from the model's config alone: bytes by cause, for training, evaluation, export and disk.

The terms of a stage add up to its expected peak. Those of training and evaluation are traced: our own step runs on the
meta device (memory/trace.py). What a trace cannot see are the constants of memory/constants.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_train.data.loader import MicroBatch
from qlora_train.memory.budget import Choice, Costs
from qlora_train.memory.estimate import (
    Request,
    Shallow,
    model_style,
    settle,
    step_style,
    unseen,
    with_split,
)
from qlora_train.memory.formula import formula_peak
from qlora_train.memory.generation import generation_terms
from qlora_train.memory.meta import DeviceKind, build_meta_model
from qlora_train.memory.moments import WHOLE_WEIGHTS, optimizer_of
from qlora_train.memory.stages import disk_terms, export_terms, parameter_counts
from qlora_train.memory.terms import ON_DEVICE, STAGES, How, Stage, Term
from qlora_train.memory.trace import CAUSES, StepStyle, StepTrace, trace_step
from qlora_train.model.lord import MOMENT_BYTES
from qlora_train.recipe.schema import Recipe

__all__ = ["ON_DEVICE", "STAGES", "DeviceKind", "How", "Plan", "Request", "Stage", "Term", "plan_training"]


@dataclass(frozen=True)
class Plan:
    """What a run will hold, stage by stage."""

    request: Request
    choice: Choice  # settings of the recipe, and those that its `auto` keys come to
    costs: Costs  # the parts that predict_peak adds up, measured on one layer
    terms: tuple[Term, ...]
    peak_op: str  # the operator at which the peak of training is reached
    # The closed formula's value of the traced part of training. None: it knows no such model, or the trace is of a
    # batch of a run's own data, where the formula takes the heaviest.
    formula_bytes: int | None
    notes: tuple[str, ...] = field(default=())  # assumptions, in words

    def of(self, stage: Stage) -> tuple[Term, ...]:
        """The terms of one stage, largest first."""
        return tuple(sorted((t for t in self.terms if t.stage == stage), key=lambda t: -t.num_bytes))

    def peak_bytes(self, stage: Stage = "training") -> int:
        """Most bytes of one stage: the sum of its terms."""
        return sum(term.num_bytes for term in self.terms if term.stage == stage)

    def traced_bytes(self, stage: Stage = "training") -> int:
        """The part of a stage's peak that tensors hold: comparable with a measured peak of allocated tensors."""
        return sum(term.num_bytes for term in self.terms if term.stage == stage and term.how == "traced")

    @property
    def device_bytes(self) -> int:
        """Most that any stage holds on the device: what must fit."""
        return max(self.peak_bytes(stage) for stage in ON_DEVICE)

    @property
    def tightest(self) -> Stage:
        """The stage with the highest peak on the device."""
        return max(ON_DEVICE, key=self.peak_bytes)

    def fits(self, limit_bytes: int) -> bool:
        """Whether every stage on the device stays within so many bytes."""
        return self.device_bytes <= limit_bytes

    def settings(self) -> dict[str, Any]:
        """The values that the plan rests on."""
        recipe, policy = self.request.recipe, self.choice.checkpointing
        return {
            "device": self.request.device,
            "seq_len": recipe.data.seq_len,
            "longest_row": self.request.row_tokens,
            "micro_batch_size": recipe.train.micro_batch_size,
            "checkpointing": policy.kind,
            "checkpoint_every": policy.every,
            "offload_checkpoints": policy.offload,
            "recomputed_layers": policy.num_recomputed(self.costs.num_layers),
            "num_layers": self.costs.num_layers,
            "resident_layers": self.choice.resident_layers,
            "optimizer": recipe.train.optimizer,
            "r": recipe.adapter.r,
            "eval_batch_size": recipe.eval.batch_size,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: settings, the peak and the terms of each stage, and how far trace and formula are."""
        return {
            "model": self.request.recipe.model.path,
            "settings": self.settings(),
            "peak_bytes": {stage: self.peak_bytes(stage) for stage in STAGES},
            "traced_bytes": {stage: self.traced_bytes(stage) for stage in ON_DEVICE},
            "device_bytes": self.device_bytes,
            "tightest": self.tightest,
            "peak_op": self.peak_op,
            "formula_bytes": self.formula_bytes,
            "terms": [term.as_dict() for stage in STAGES for term in self.of(stage)],
            "notes": list(self.notes),
        }


def plan_training(
    recipe: Recipe,
    config: Any,
    *,
    device: DeviceKind,
    limit_bytes: int | None = None,
    longest_row: int | None = None,
    choice: Choice | None = None,
    training_batch: MicroBatch | None = None,
    evaluation_batch: MicroBatch | None = None,
) -> Plan:
    """The plan of a recipe on a model of this config; no weights, no data.

    `choice` gives policy and resident layers where they are settled already; else keys that are `auto` are settled for
    `limit_bytes`, the memory of the device. The heaviest micro-batch is assumed: full packs, or rows of `longest_row`
    tokens (data.seq_len where it is not known), every token supervised; unless a run gives the batches that its data
    come to. Costs a few seconds at any size.
    """
    request = Request(recipe, config, device, longest_row, limit_bytes, training_batch, evaluation_batch)
    if choice is None:
        request = with_split(request)
        recipe = request.recipe
    shallow = Shallow(request)
    costs = shallow.costs()
    choice = choice or settle(request, costs)
    style = step_style(recipe, choice)
    trace = shallow.step(style, costs) or _whole_step(request, style)
    terms = list(_traced("training", trace, device))
    if recipe.data.holds_out:
        terms += _evaluation_terms(request, shallow, style)
    terms += [*export_terms(request, shallow), *disk_terms(request, shallow)]
    return Plan(
        request=replace(request, training_batch=None, evaluation_batch=None),  # advice compares assumed batches
        choice=choice,
        costs=costs,
        terms=tuple(terms),
        peak_op=trace.peak_op,
        formula_bytes=None if training_batch else formula_peak(request, choice),
        notes=tuple(_notes(request, shallow, choice, costs)),
    )


def _whole_step(request: Request, style: StepStyle) -> StepTrace:
    """The trace of every layer: some tens of seconds for 70 billion parameters."""
    model = build_meta_model(request.config, model_style(request.recipe, request.device), request.device)
    return trace_step(model, request.batch(), style)


def _evaluation_terms(request: Request, shallow: Shallow, style: StepStyle) -> Iterator[Term]:
    yield from _traced("evaluation", shallow.evaluation(style), request.device)
    if request.recipe.eval.generate_rows:
        yield from _traced("generation", shallow.prompts(style), request.device)
        yield from generation_terms(request.recipe, request.config, request.row_tokens)


def _traced(stage: Stage, trace: StepTrace, device: DeviceKind) -> Iterator[Term]:
    for cause, num_bytes in trace.causes.items():
        yield Term(stage, cause, num_bytes, "traced", CAUSES[cause])
    for constant, num_bytes in unseen(device, trace.held_bytes, trace.peak_bytes):
        yield Term(stage, constant.cause, num_bytes, "constant", constant.source)


def _notes(request: Request, shallow: Shallow, choice: Choice, costs: Costs) -> Iterator[str]:
    recipe = request.recipe
    if (given := request.training_batch) is not None:
        sizes = f"{given.labels.numel():,} positions, {given.num_supervised_tokens:,} supervised"
        yield f"the largest micro-batch of the data: {sizes}"
    else:
        row = f"rows of {request.row_tokens:,} tokens"
        row += "" if request.longest_row else " (as long as data.seq_len lets them be)"
        packed = f"full packs of {recipe.data.seq_len:,} tokens" if recipe.data.batching == "packed" else row
        yield f"the heaviest micro-batch: {recipe.train.micro_batch_size} x {packed}, every token supervised"
        if recipe.data.holds_out:
            yield f"evaluation and prompts of generation: {recipe.eval.batch_size} x {row}"
    if choice.checkpointing.offload:
        waiting = choice.checkpointing.num_recomputed(costs.num_layers) * costs.saved_bytes["full"]
        yield f"{waiting / 2**30:.2f} GiB of pinned host memory hold the checkpoints of activations"
    if optimizer_of(recipe) == WHOLE_WEIGHTS:
        yield "adapter.rule_mode is full: moments are those of whole weights, 8 bytes for each that has an adapter"
    if recipe.model.lord_keep_frac is not None:
        num_weights, _ = parameter_counts(shallow)
        dtype: Any = getattr(torch, recipe.model.compute_dtype)
        yield (
            f"LoRD, once before training: {(dtype.itemsize * num_weights + MOMENT_BYTES) / 2**30:.2f} GiB and the "
            "factors, for the base in compute_dtype and second moments"
        )
    if recipe.train.optimizer.startswith("paged_"):
        yield "paged moments count as on the card; they may, but need not, leave it"
    if recipe.train.compile is True:
        yield "torch.compile is not traced: compiled layers keep fewer tensors"
