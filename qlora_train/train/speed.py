"""How a run uses the machine: whether its layers are compiled, and what its memory is spent on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_train.adapters.layers import keep_dense
from qlora_train.data.loader import Loader
from qlora_train.data.table import TokenTable
from qlora_train.errors import MachineError, is_out_of_memory
from qlora_train.memory.available import available_bytes
from qlora_train.memory.budget import Choice, Costs, choose, rerun_layers
from qlora_train.memory.estimate import asked_of, heaviest_batch, splits
from qlora_train.memory.exhausted import release
from qlora_train.memory.measure import measure_costs
from qlora_train.memory.meta import device_kind
from qlora_train.memory.moments import optimizer_of
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import apply_checkpointing, decoder_layers
from qlora_train.model.compiling import compile_layers, compiler_fault
from qlora_train.recipe.schema import Recipe, TrainSection
from qlora_train.recipe.split import split_as_stored, with_split

# Floating-point operations of a run (6 per weight and token) from which compiling pays back. On a CPU, compiling takes
# most of a minute and saves some 10 % of a step at 0.3 to 0.6 Tflop/s (README.md, "Speed"): ten minutes of work. For
# CUDA it is the same ten minutes at a twentieth of an A100's rate, not measured.
LEAST_WORK = {"cpu": 3e14, "cuda": 1e16}
_COMPILER = {"cpu": "install a C++ compiler", "cuda": "install triton as requirements.lock has it, and a C compiler"}


@dataclass(frozen=True)
class MemoryUse:
    """What the memory is spent on."""

    choice: Choice
    micro_batch_size: int
    grad_accum_steps: int
    limit_bytes: int  # what was to be kept within
    num_layers: int


@dataclass(frozen=True)
class Compiling:
    """Whether layers are compiled, and why."""

    on: bool
    why: str


@dataclass(frozen=True)
class Speed:
    """What was settled."""

    memory: MemoryUse
    compiling: Compiling

    @property
    def compiled(self) -> bool:
        """Whether layers are."""
        return self.compiling.on

    def summary(self) -> list[str]:
        """Lines for people."""
        memory, choice = self.memory, self.memory.choice
        return [
            f"memory: micro-batches of {memory.micro_batch_size}, {memory.grad_accum_steps} a step; "
            f"{choice.checkpointing.num_recomputed(memory.num_layers)} of {memory.num_layers} layers are computed "
            f"again ({choice.checkpointing.kind}), {choice.resident_layers} stay dense: "
            f"{choice.peak_bytes / 2**30:.2f} GiB expected for training, {memory.limit_bytes / 2**30:.2f} GiB to use",
            f"torch.compile: {'on' if self.compiled else 'off'}, {self.compiling.why}",
        ]


def check_machine(section: TrainSection, device: torch.device) -> None:
    """MachineError where the recipe asks for what this machine lacks. Some seconds where train.compile is true."""
    if section.offload_checkpoints and device.type != "cuda":
        raise MachineError(
            f"train.offload_checkpoints keeps memory of a card free, and the device is {device}",
            fix="remove offload_checkpoints, or train on a CUDA device",
        )
    if section.compile is True and (fault := compiler_fault(device)):
        raise MachineError(f"train.compile: {fault}", fix=f"{_COMPILER[device.type]}, or set train.compile: false")


def settle_compiling(recipe: Recipe, loader: Loader, num_weights: int, device: torch.device) -> Compiling:
    """Whether compiling pays. A function of the recipe, the data, and what the machine is, and of no free memory: a
    resumed run settles alike. It saves more than selective checkpointing, which rules it out, does over full."""
    asked = recipe.train.compile
    if asked is False:
        return Compiling(False, "as train.compile says")
    if recipe.train.checkpointing == "selective":
        return Compiling(False, "selective checkpointing watches single operators")
    num_steps = loader.num_steps(recipe.train.epochs, recipe.train.max_steps)
    packs = num_steps * recipe.train.grad_accum_steps * recipe.train.micro_batch_size
    work, least = 6.0 * num_weights * packs * recipe.data.seq_len, LEAST_WORK[device.type]
    if asked == "auto" and work < least:
        return Compiling(False, f"the run ({work:.1e} operations) is too short to win back the minute of compiling")
    if asked == "auto" and (fault := compiler_fault(device)):
        return Compiling(False, f"this machine cannot: {fault}")
    return Compiling(
        True, "as train.compile says" if asked is True else f"{work:.1e} floating-point operations pay for it"
    )


def settle_memory(
    recipe: Recipe,
    causal: CausalModel,
    table: TokenTable,
    bound: Mapping[str, Any] | None = None,
    *,
    compiled: bool = False,
    held_out_bytes: int = 0,
) -> MemoryUse:
    """Choose what the recipe leaves open, for the heaviest micro-batch that the data can give.

    `compiled`: layers will be, as `settle_compiling` says. `held_out_bytes`: of `Costs`. `bound`: the recipe's keys
    as a checkpoint to go on from has them; a step is split as it was there. Nothing of the model is changed. Costs
    a few passes through one layer and the loss head for each split that is tried.
    """
    section, device = recipe.train, causal.head.weight_VH.device
    asked, longest = replace(asked_of(recipe), compiled=compiled), int(table.lengths.max())
    settled: list[MemoryUse] = []
    for size, count in _splits(recipe, bound):
        batch = heaviest_batch(with_split(recipe, size, count), longest, device_kind(device))
        try:
            costs = measure_costs(causal, batch.to(device), optimizer_of(recipe))
            costs = replace(costs, held_out_bytes=held_out_bytes)
        except Exception as error:
            if not settled or not is_out_of_memory(error):
                raise
            release(error, device)
            break  # not even one layer fits
        limit_bytes = _limit(section, device, costs)
        choice = choose(costs, limit_bytes, asked)
        if settled and (not choice.fits or _is_slower(choice, settled[-1].choice, costs)):
            break
        settled.append(MemoryUse(choice, size, count, limit_bytes, costs.num_layers))
    return settled[-1]


def _splits(recipe: Recipe, bound: Mapping[str, Any] | None) -> list[tuple[int, int]]:
    """Micro-batch sizes to try, and how many a step has of each, smallest first: one where nothing is open."""
    if recipe.train.memory == "auto" and bound is None:
        return splits(recipe.train)
    train = (recipe if bound is None else split_as_stored(recipe, bound)).train
    return [(train.micro_batch_size, train.grad_accum_steps)]


def _limit(section: TrainSection, device: torch.device, costs: Costs) -> int:
    if section.memory_limit_gib is None:
        return available_bytes(device, costs.model_bytes)
    return int(section.memory_limit_gib * 2**30)


def _is_slower(choice: Choice, other: Choice, costs: Costs) -> bool:
    return rerun_layers(costs, choice.checkpointing) > rerun_layers(costs, other.checkpointing)


def settle_speed(memory: MemoryUse, compiling: Compiling, causal: CausalModel) -> Speed:
    """Put in place what was settled, but for the layers that stay dense."""
    if compiling.on:
        compile_layers(causal.model)
    apply_checkpointing(causal.model, memory.choice.checkpointing)
    return Speed(memory, compiling)


def spend_spare_memory(memory: MemoryUse, causal: CausalModel, dtype: torch.dtype) -> None:
    """Keep as many layers dense as was settled: last, after whatever needs room of its own before the training."""
    for layer in decoder_layers(causal.model)[: memory.choice.resident_layers]:
        keep_dense(layer, dtype)
