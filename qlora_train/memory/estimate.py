"""Peaks of a run within a second: three layers are traced on the meta device, and multiplied.

For plans, and for many settings at once: tables, advice, the largest micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_train.data.loader import MicroBatch
from qlora_train.memory.available import CUDA_SHARE, HOST_SHARE
from qlora_train.memory.budget import Asked, Choice, Costs, choose, predict_peak, rerun_layers
from qlora_train.memory.constants import (
    CUBLAS_WORKSPACE,
    CUDA_CONTEXT,
    FRAGMENTATION,
    HOST_FRAGMENTATION,
    HOST_LIBRARIES,
    Constant,
)
from qlora_train.memory.generation import generation_terms
from qlora_train.memory.live import CUDA_BLOCK_BYTES, LiveBytes
from qlora_train.memory.measure import measure_costs, trial_batch
from qlora_train.memory.meta import DeviceKind, MetaModel, ModelStyle, as_on, base_tensors, build_meta_model
from qlora_train.memory.moments import optimizer_of, state_bytes
from qlora_train.memory.trace import (
    ADAPTER,
    CHECKPOINTS,
    GRADIENTS,
    KEPT,
    OPTIMISER,
    QUANTISED,
    RESIDENT,
    UNQUANTISED,
    StepStyle,
    StepTrace,
    cuda_workspaces,
    now,
    trace_evaluation,
    trace_step,
)
from qlora_train.model.attention import PLAIN_TOKENS
from qlora_train.model.checkpointing import Checkpointing, decoder_layers
from qlora_train.model.load import resolve_attention
from qlora_train.quant.bnb import linear4bit_modules
from qlora_train.recipe.schema import Recipe, TrainSection

_SHALLOW = 3  # layers; all are taken to be alike


@dataclass(frozen=True)
class Request:
    """What a plan answers: everything that it follows from."""

    recipe: Recipe
    config: Any  # transformers' config of the base
    device: DeviceKind
    longest_row: int | None = None  # tokens of the longest row of the data; None: not known, data.seq_len counts
    limit_bytes: int | None = None  # memory of the device; None: not known, `auto` settings come to the leanest
    training_batch: MicroBatch | None = None  # the largest that the data give; None: as heavy as one can be
    evaluation_batch: MicroBatch | None = None  # the same, of the held-out rows

    def batch(self) -> MicroBatch:
        """The micro-batch of a training step that is planned for."""
        return self.training_batch or heaviest_batch(self.recipe, self.row_tokens, self.device)

    def held_out_batch(self) -> MicroBatch:
        """The batch of the held-out loss that is planned for."""
        return self.evaluation_batch or evaluation_batch(self.recipe, self.row_tokens)

    @property
    def row_tokens(self) -> int:
        """The longest row that may come."""
        return min(self.longest_row or self.recipe.data.seq_len, self.recipe.data.seq_len)

    def with_changes(self, **sections: dict[str, Any]) -> Request:
        """The same with other values of the recipe, by section."""
        changed = {
            name: getattr(self.recipe, name).model_copy(update=values) for name, values in sections.items() if values
        }
        recipe = self.recipe.model_copy(update=changed)
        return replace(self, recipe=recipe, training_batch=None, evaluation_batch=None)


@dataclass(frozen=True)
class Estimate:
    """Peaks of the stages on the device, in bytes, with what `auto` settings come to."""

    costs: Costs
    choice: Choice
    training_bytes: int
    evaluation_bytes: int

    @property
    def device_bytes(self) -> int:
        """Most of both."""
        return max(self.training_bytes, self.evaluation_bytes)


def model_style(recipe: Recipe, device: DeviceKind) -> ModelStyle:
    """How a recipe's model is made on a device of this kind."""
    section = recipe.model
    attention = resolve_attention(
        section.attn_implementation, torch.device(device), recipe.data.seq_len, recipe.data.batching
    )
    return ModelStyle(
        adapter=recipe.adapter,
        quant=recipe.quant,
        compute_dtype=getattr(torch, section.compute_dtype),
        attention=attention,
        linear="fused" if recipe.train.fused else "plain",
    )


def heaviest_batch(recipe: Recipe, longest_row: int, device: DeviceKind) -> MicroBatch:
    """The micro-batch of a training step that takes most memory: full packs, or rows of the longest.

    On a CPU attention holds scores of rows up to PLAIN_TOKENS: rows of just that length are the heaviest. On a card it
    never does, and one row a pack has the most supervised tokens.
    """
    num_lines = recipe.train.micro_batch_size
    if recipe.data.batching != "packed":
        return trial_batch(num_lines, longest_row, longest_row, packed=False)
    row_tokens = min(longest_row, PLAIN_TOKENS) if device == "cpu" else longest_row
    return trial_batch(num_lines, recipe.data.seq_len, row_tokens, packed=True)


def evaluation_batch(recipe: Recipe, longest_row: int) -> MicroBatch:
    """The largest batch of the held-out loss."""
    return trial_batch(recipe.eval.batch_size, longest_row, longest_row, packed=False)


def asked_of(recipe: Recipe) -> Asked:
    """What the recipe leaves open, and what it fixes. Whether `compile: auto` comes to compiling follows from the data,
    which a plan does not know: it counts as off."""
    section = recipe.train
    resident = section.resident_layers if section.fused and recipe.quant.quant_type != "none" else 0
    return Asked(
        section.checkpointing,
        section.checkpoint_every,
        section.offload_checkpoints,
        resident,
        compiled=section.compile is True,
    )


def tensor_limit(request: Request) -> int | None:
    """What `auto` settings may plan with, as a run will find it: most of what the device has left."""
    if request.recipe.train.memory_limit_gib is not None:
        return int(request.recipe.train.memory_limit_gib * 2**30)
    if request.limit_bytes is None:
        return None
    if request.device == "cuda":
        return int(CUDA_SHARE * (request.limit_bytes - CUDA_CONTEXT.num_bytes))
    return int(HOST_SHARE * request.limit_bytes)


def settle(request: Request, costs: Costs) -> Choice:
    """What the recipe's `auto` keys come to. Without a limit: the leanest."""
    limit = tensor_limit(request)
    choice = choose(costs, 0 if limit is None else limit, asked_of(request.recipe))
    return replace(choice, fits=True) if limit is None else choice


def splits(train: TrainSection) -> list[tuple[int, int]]:
    """The ways to split a step of as many packs: micro-batch sizes, and how many of each, smallest first."""
    packs = train.micro_batch_size * train.grad_accum_steps
    return [(size, packs // size) for size in range(1, packs + 1) if packs % size == 0]


def with_split(request: Request) -> Request:
    """The request with the micro-batch that `train.memory: auto` comes to: as many packs a step, split as a run will.

    The largest that fits without computing more again than a smaller one does.
    """
    train = request.recipe.train
    if train.memory != "auto" or tensor_limit(request) is None:
        return request
    settled: list[tuple[Request, float]] = []
    for size, count in splits(train):
        split = request.with_changes(train={"micro_batch_size": size, "grad_accum_steps": count})
        costs = Shallow(split).costs()
        choice = settle(split, costs)
        again = rerun_layers(costs, choice.checkpointing)
        if settled and (not choice.fits or again > settled[-1][1]):
            break
        settled.append((split, again))
    return settled[-1][0]


def unseen(device: DeviceKind, held_bytes: int, peak_bytes: int) -> list[tuple[Constant, int]]:
    """What comes on top of tensors: constants, and the allocator's share of what a step adds to what is held."""
    on_cuda = device == "cuda"
    share = FRAGMENTATION if on_cuda else HOST_FRAGMENTATION
    constants = (CUDA_CONTEXT, CUBLAS_WORKSPACE) if on_cuda else (HOST_LIBRARIES,)
    gaps = int(share.share * max(0, peak_bytes - held_bytes))
    return [*((constant, constant.num_bytes) for constant in constants), (share, gaps)]


def tracker(model: MetaModel) -> LiveBytes:
    """A counter that sees what the device's allocator and kernels do."""
    if model.device == "cpu":
        return LiveBytes()
    return LiveBytes(block_bytes=CUDA_BLOCK_BYTES, workspaces=cuda_workspaces(model.style.compute_dtype))


def costs_on_meta(model: MetaModel, batch: MicroBatch, optimizer: str) -> Costs:
    """`measure_costs` on a model without values."""
    with as_on(model.device):
        return measure_costs(model, batch.to(torch.device("meta")), optimizer, partial(tracker, model))


class Shallow:
    """A model of a few layers that stands for the whole one: what each further layer adds is added.

    Exact where all layers are alike: the peak lies where the last layer turns from its forward to its backward pass,
    and each other layer adds what it holds all the time and what it saves (tests/numerics/test_plan_estimate.py). Costs
    tenths of a second at any depth.
    """

    def __init__(self, request: Request) -> None:
        config = request.config.to_json_string(use_diff=False)
        style = model_style(request.recipe, request.device)
        self.model = _built(config, cast(Hashable, type(request.config)), style, request.device)
        self.request = request
        self._depth = len(decoder_layers(self.model.model))
        self.num_layers: int = request.config.get_text_config().num_hidden_layers

    def costs(self) -> Costs:
        """Costs of training on the heaviest micro-batch."""
        recipe = self.request.recipe
        costs = costs_on_meta(self.model, self.request.batch(), optimizer_of(recipe))
        layer = self._layer(rounded=False)
        gradient_bytes = sum(p.nbytes for p in self._trainable) + self.num_more * layer[ADAPTER]
        costs = replace(
            costs,
            num_layers=self.num_layers,
            model_bytes=costs.model_bytes + self.num_more * sum(layer.values()),
            optimizer_bytes=gradient_bytes + self.optimizer_bytes(whole=True),
        )
        if not recipe.data.holds_out:
            return costs
        return replace(costs, held_out_bytes=self._held_out_peak() - costs.model_bytes - costs.optimizer_bytes)

    def _held_out_peak(self) -> int:
        """Most of an evaluation and of the answers it generates, with no layer dense."""
        recipe = self.request.recipe
        style = StepStyle(optimizer=optimizer_of(recipe))
        peak = self.evaluation(style).peak_bytes
        if recipe.eval.generate_rows:
            terms = generation_terms(recipe, self.request.config, self.request.row_tokens)
            peak = max(peak, self.prompts(style).peak_bytes + sum(term.num_bytes for term in terms))
        return peak

    def step(self, style: StepStyle, costs: Costs) -> StepTrace | None:
        """The trace of a training step of the whole model; None where only the whole model's own would be right.

        That is where gradients grow faster through the backward pass than activations go.
        """
        policy = style.checkpointing
        saved = costs.saved_bytes[policy.kind] - (costs.saved_bytes["full"] if policy.offload else 0)
        if not style.accumulates and self._layer()[ADAPTER] > min(saved, costs.saved_bytes["none"]):
            return None
        num_resident = style.resident_layers
        here = self._depth if num_resident == self.num_layers else min(num_resident, self._depth - 1)
        own = replace(policy, every=min(policy.every, self._depth))
        style = replace(style, checkpointing=own, resident_layers=here)
        trace = trace_step(self.model, self.request.batch(), style)
        whole, shallow = self._saved(policy, self.num_layers, costs), self._saved(own, self._depth, costs)
        static = self._static(accumulates=style.accumulates)
        resident = {RESIDENT: (num_resident - here) * costs.dense_layer_bytes}
        return _with_more(
            trace,
            {**static, **resident, **{cause: whole[cause] - shallow[cause] for cause in whole}},
            held=(*static, RESIDENT),
        )

    def _saved(self, policy: Checkpointing, num_layers: int, costs: Costs) -> dict[str, int]:
        """What all layers but the last save for their backward pass.

        A layer's output is kept where the next layer is computed again from it, and else where that saves its input.
        """
        out = costs.saved_bytes["full"]
        saved = {CHECKPOINTS: 0, KEPT: 0}
        for index in range(num_layers - 1):
            kind = policy.kind if policy.recomputes(index, num_layers) else "none"
            next_again = policy.recomputes(index + 1, num_layers)
            keeps_out = not policy.offload if next_again else self._saves_input
            cause = KEPT if kind == "none" else CHECKPOINTS
            saved[cause] += costs.saved_bytes[kind] - out + (out if keeps_out else 0)
        return saved

    @cached_property
    def _saves_input(self) -> bool:
        """Whether a layer that is not computed again saves its input as it came: LayerNorm does, RMS norms do not."""
        batch = trial_batch(1, 16, 16, packed=False)
        grown: list[int] = []

        def watched(model: MetaModel, batch: MicroBatch) -> Tensor:
            layers = decoder_layers(model.model)
            hooks = [layer.register_forward_hook(lambda *_: grown.append(now(KEPT))) for layer in layers]
            hidden = model.hidden(batch)
            for hook in hooks:
                hook.remove()
            return hidden.float().sum()

        trace_step(self.model, batch, StepStyle(loss=watched))
        costs = costs_on_meta(self.model, batch, optimizer_of(self.request.recipe))
        return len(grown) > 2 and grown[-1] - grown[-2] >= costs.saved_bytes["none"]

    def evaluation(self, style: StepStyle) -> StepTrace:
        """The trace of a batch of the held-out loss."""
        here = min(style.resident_layers, self._depth)
        trace = trace_evaluation(self.model, self.request.held_out_batch(), replace(style, resident_layers=here))
        dense = _dense_layer_bytes(self.model)
        static = self._static(accumulates=False)
        more = {**static, RESIDENT: (style.resident_layers - here) * dense}
        return _with_more(trace, more, held=tuple(more))

    def prompts(self, style: StepStyle) -> StepTrace:
        """The same of the prompts of answers: no head, no loss."""
        return self.evaluation(replace(style, loss=lambda model, batch: model.hidden(batch)))

    @property
    def num_more(self) -> int:
        """Layers that the whole model has besides."""
        return self.num_layers - self._depth

    @property
    def num_trainable(self) -> int:
        """Parameters of the adapter on the whole model."""
        layer = [p for p in decoder_layers(self.model.model)[-1].parameters() if p.requires_grad]
        return sum(p.numel() for p in self._trainable) + self.num_more * sum(p.numel() for p in layer)

    @property
    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.model.parameters() if p.requires_grad]

    def _static(self, *, accumulates: bool) -> dict[str, int]:
        """What the other layers hold all the time, by cause."""
        layer = self._layer()
        causes = {cause: self.num_more * count for cause, count in layer.items()}
        if accumulates:
            causes[GRADIENTS] = causes[ADAPTER]
        whole, here = (self._rounded(self.optimizer_bytes(whole=flag)) for flag in (True, False))
        return {**causes, OPTIMISER: whole - here}

    def _layer(self, *, rounded: bool = True) -> dict[str, int]:
        """What one layer holds all the time, by cause."""
        layer = decoder_layers(self.model.model)[-1]
        quantised, frozen, trainable = base_tensors(layer)
        shared = {id(linear.weight.quant_state.state2.code) for _, linear in _nested(layer)}
        parts = {QUANTISED: [t for t in quantised if id(t) not in shared], UNQUANTISED: frozen, ADAPTER: trainable}
        size = self._rounded if rounded else int
        return {cause: sum(size(t.nbytes) for t in tensors) for cause, tensors in parts.items()}

    def optimizer_bytes(self, *, whole: bool = True) -> int:
        """The optimiser's state, of the whole model or of these layers."""
        shapes = [p.shape for p in self._trainable]
        layer = [p.shape for p in decoder_layers(self.model.model)[-1].parameters() if p.requires_grad]
        return state_bytes(optimizer_of(self.request.recipe), shapes + layer * (self.num_more if whole else 0))

    def _rounded(self, num_bytes: int) -> int:
        block = CUDA_BLOCK_BYTES if self.request.device == "cuda" else 1
        return -(-num_bytes // block) * block


def estimate(request: Request, choice: Choice | None = None) -> Estimate:
    """Peaks of a recipe, with its `auto` keys settled for the request's limit unless `choice` gives them."""
    shallow = Shallow(request)
    costs = shallow.costs()
    choice = choice or settle(request, costs)
    style = step_style(request.recipe, choice)
    held = costs.model_bytes + costs.optimizer_bytes + choice.resident_layers * costs.dense_layer_bytes
    trace = shallow.step(style, costs)
    peak = trace.peak_bytes if trace else predict_peak(costs, choice.checkpointing, choice.resident_layers)
    training = peak + unseen_bytes(request.device, trace.held_bytes if trace else held, peak)
    evaluation = 0
    if request.recipe.data.holds_out:
        found = shallow.evaluation(style)
        evaluation = found.peak_bytes + unseen_bytes(request.device, found.held_bytes, found.peak_bytes)
    return Estimate(costs, choice, training, evaluation)


def step_style(recipe: Recipe, choice: Choice) -> StepStyle:
    """How a step of a recipe runs once its settings are chosen."""
    return StepStyle(
        checkpointing=choice.checkpointing,
        resident_layers=choice.resident_layers,
        optimizer=optimizer_of(recipe),
        accumulates=recipe.train.grad_accum_steps > 1,
    )


def unseen_bytes(device: DeviceKind, held_bytes: int, peak_bytes: int) -> int:
    """The sum of `unseen`."""
    return sum(count for _, count in unseen(device, held_bytes, peak_bytes))


def _with_more(trace: StepTrace, more: Mapping[str, int], held: Collection[str]) -> StepTrace:
    causes = {cause: trace.causes.get(cause, 0) + more.get(cause, 0) for cause in {*trace.causes, *more}}
    return StepTrace(
        peak_bytes=trace.peak_bytes + sum(more.values()),
        peak_op=trace.peak_op,
        causes=dict(sorted(((c, n) for c, n in causes.items() if n), key=lambda item: -item[1])),
        held_bytes=trace.held_bytes + sum(more[cause] for cause in held),
    )


def _dense_layer_bytes(model: MetaModel) -> int:
    layer, width = decoder_layers(model.model)[0], model.style.compute_dtype.itemsize
    return sum(linear.weight.quant_state.shape.numel() * width for _, linear in linear4bit_modules(layer))


def _nested(layer: nn.Module) -> list[tuple[str, Any]]:
    return [(name, linear) for name, linear in linear4bit_modules(layer) if linear.weight.quant_state.nested]


@lru_cache(maxsize=16)
def _built(config_json: str, kind: Hashable, style: ModelStyle, device: DeviceKind) -> MetaModel:
    config = cast(Any, kind).from_dict(json.loads(config_json))
    return build_meta_model(config, style, device, min(_SHALLOW, config.get_text_config().num_hidden_layers))
