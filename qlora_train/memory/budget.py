"""The fastest settings that fit into memory: numbers in, a choice out.

The peak of a step lies where the forward pass ends. Then every layer holds what it saved, and either the loss head or
the backward pass of the last layer works on top. Later peaks are lower: a layer that is computed again holds its
activations when those of the last layer, which always keeps its own, are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_train.errors import RecipeError
from qlora_train.model.checkpointing import Checkpointing, Kind

# A layer's second forward pass as a share of its first. By FLOPs attention is 4 % of a layer of Llama-3.1-8B at rows of
# 2,048 tokens and 15 % at 8,192. Only the order of candidates follows from it.
RERUN_FRAC: Mapping[Kind, float] = {"none": 0.0, "selective": 0.9, "full": 1.0}


@dataclass(frozen=True)
class Costs:
    """What a training run holds, in bytes, by cause (memory/measure.py measures it)."""

    model_bytes: int  # base, adapter, and buffers that all layers share
    optimizer_bytes: int  # gradients and moments of the adapter
    head_bytes: int  # most that the loss head holds at once
    num_layers: int
    saved_bytes: Mapping[Kind, int]  # one layer, between its forward and its backward pass, its output included
    transient_bytes: int  # most that one layer holds besides while it runs forward or backward
    dense_layer_bytes: int  # the 4-bit weights of one layer in the compute dtype; 0 where none are in 4 bit
    held_out_bytes: int = 0  # what an evaluation, or its generated answers, hold beyond model and optimiser


@dataclass(frozen=True)
class Asked:
    """What the recipe leaves open, and what it fixes."""

    kind: Kind | Literal["auto"] = "auto"
    every: int = 1  # this and offload: where kind is not auto
    offload: bool = False
    resident_layers: int | Literal["auto"] = "auto"
    compiled: bool = False  # layers are: operators cannot be watched one by one, which rules selective out


@dataclass(frozen=True)
class Choice:
    """Settings of a run, and the peak to expect. Where nothing fits: the leanest settings, and fits is False."""

    checkpointing: Checkpointing
    resident_layers: int
    peak_bytes: int
    fits: bool


def predict_peak(costs: Costs, policy: Checkpointing, resident_layers: int = 0) -> int:
    """Most bytes alive at once in a step.

    model + optimizer + resident * dense + input + sum over layers (saved) + max(head, transient)

    Inputs that are offloaded are not on the device; attention's products that are kept stay there.
    """
    num_recomputed = policy.num_recomputed(costs.num_layers)
    input_bytes = costs.saved_bytes["full"]  # a layer's output is the next one's input; the first has one, too
    recomputed_bytes = costs.saved_bytes[policy.kind] - (input_bytes if policy.offload else 0)
    return (
        costs.model_bytes
        + costs.optimizer_bytes
        + resident_layers * costs.dense_layer_bytes
        + input_bytes
        + num_recomputed * recomputed_bytes
        + (costs.num_layers - num_recomputed) * costs.saved_bytes["none"]
        + max(costs.head_bytes, costs.transient_bytes)
    )


def check_resident(resident_layers: int | Literal["auto"], num_layers: int) -> None:
    """RecipeError for more resident layers than the model has."""
    if resident_layers != "auto" and resident_layers > num_layers:
        raise RecipeError(
            f"train.resident_layers is {resident_layers}, but the model has {num_layers} layers",
            fix="set it to auto, or to no more than the model has",
        )


def choose(costs: Costs, limit_bytes: int, asked: Asked) -> Choice:
    """The fastest settings within the limit, of those that `asked` leaves open.

    Memory goes first into computing less again, which costs up to a third of a step, then into resident layers, which
    save dequantisations, a tenth. Resident layers are held in evaluations, too: they leave room for those. More memory
    never gives a slower choice: tests/unit/memory/test_budget.py. Raises RecipeError as `check_resident` does.
    """
    fixed = asked.resident_layers
    check_resident(fixed, costs.num_layers)
    least = 0 if fixed == "auto" else fixed
    peaks = {policy: predict_peak(costs, policy, least) for policy in _candidates(costs, asked)}
    fitting = [policy for policy, peak in peaks.items() if peak <= limit_bytes]
    if not fitting:
        leanest = min(peaks, key=lambda policy: (peaks[policy], rerun_layers(costs, policy)))
        return Choice(leanest, least, peaks[leanest], fits=False)
    fastest = min(fitting, key=lambda policy: (rerun_layers(costs, policy), peaks[policy]))
    num_resident = least
    if fixed == "auto" and costs.dense_layer_bytes:
        spare = limit_bytes - max(peaks[fastest], costs.model_bytes + costs.optimizer_bytes + costs.held_out_bytes)
        num_resident = min(costs.num_layers, max(0, spare) // costs.dense_layer_bytes)
    return Choice(fastest, num_resident, predict_peak(costs, fastest, num_resident), fits=True)


def _candidates(costs: Costs, asked: Asked) -> Iterator[Checkpointing]:
    if asked.kind != "auto":
        yield Checkpointing(asked.kind, asked.every, asked.offload)
        return
    yield Checkpointing("none")
    for every in range(1, costs.num_layers):
        if not asked.compiled:
            yield Checkpointing("selective", every)
        yield Checkpointing("full", every)


def rerun_layers(costs: Costs, policy: Checkpointing) -> float:
    """Forward passes of a layer that a step makes twice."""
    return policy.num_recomputed(costs.num_layers) * RERUN_FRAC[policy.kind]
