"""How a run uses the machine: what its memory is spent on, and whether its layers are compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_train.adapters.layers import keep_dense
from qlora_train.data.loader import Loader
from qlora_train.data.table import TokenTable
from qlora_train.errors import MachineError
from qlora_train.memory.available import available_bytes
from qlora_train.memory.budget import Asked, Choice, choose
from qlora_train.memory.measure import measure_costs, trial_batch
from qlora_train.model.attention import PLAIN_TOKENS
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import apply_checkpointing, decoder_layers
from qlora_train.model.compiling import compile_layers, compiler_fault
from qlora_train.recipe.schema import Recipe

# Floating-point operations of a run (6 per weight and token) from which compiling pays back. On a CPU, compiling takes
# most of a minute and saves some 10 % of a step at 0.3 to 0.6 Tflop/s (README.md, "Speed"): ten minutes of work. For
# CUDA it is the same ten minutes at a twentieth of an A100's rate, not measured.
LEAST_WORK = {"cpu": 3e14, "cuda": 1e16}


@dataclass(frozen=True)
class Speed:
    """What was settled, and why."""

    choice: Choice
    num_layers: int
    compiled: bool
    why: str  # of compiled

    def summary(self) -> list[str]:
        """Lines for people."""
        policy, resident = self.choice.checkpointing, self.choice.resident_layers
        return [
            f"memory: {policy.num_recomputed(self.num_layers)} of {self.num_layers} layers are computed again "
            f"({policy.kind}), {resident} stay dense: {self.choice.peak_bytes / 2**30:.2f} GiB expected for training",
            f"torch.compile: {'on' if self.compiled else 'off'}, {self.why}",
        ]


def settle_speed(
    recipe: Recipe, causal: CausalModel, table: TokenTable, loader: Loader, num_weights: int, dtype: torch.dtype
) -> Speed:
    """Choose what the recipe leaves open, for the heaviest micro-batch the data can give, and put it in place."""
    device = causal.head.weight_VH.device
    choice = _choose(recipe, causal, table, device)
    compiled, why = _settle_compile(recipe, choice, loader, num_weights, device)
    if compiled:
        compile_layers(causal.model)
    apply_checkpointing(causal.model, choice.checkpointing)
    layers = decoder_layers(causal.model)
    for layer in layers[: choice.resident_layers]:
        keep_dense(layer, dtype)
    return Speed(choice, len(layers), compiled, why)


def _choose(recipe: Recipe, causal: CausalModel, table: TokenTable, device: torch.device) -> Choice:
    section, packed = recipe.train, recipe.data.batching == "packed"
    longest = int(table.lengths.max())
    # Above PLAIN_TOKENS attention holds no scores: rows of just that length are the heaviest.
    num_tokens, row_tokens = (recipe.data.seq_len, min(longest, PLAIN_TOKENS)) if packed else (longest, longest)
    batch = trial_batch(section.micro_batch_size, num_tokens, row_tokens, packed=packed).to(device)
    costs = measure_costs(causal, batch, section.optimizer)
    if section.memory_limit_gib is None:
        limit_bytes = available_bytes(device, costs.model_bytes)
    else:
        limit_bytes = int(section.memory_limit_gib * 2**30)
    resident = section.resident_layers if section.fused else 0
    asked = Asked(section.checkpointing, section.checkpoint_every, section.offload_checkpoints, resident)
    return choose(costs, limit_bytes, asked)


def _settle_compile(
    recipe: Recipe, choice: Choice, loader: Loader, num_weights: int, device: torch.device
) -> tuple[bool, str]:
    """A function of the recipe, the data and the kind of device, so that a resumed run settles alike."""
    asked = recipe.train.compile
    if asked is False:
        return False, "as train.compile says"
    num_steps = loader.num_steps(recipe.train.epochs, recipe.train.max_steps)
    packs = num_steps * recipe.train.grad_accum_steps * recipe.train.micro_batch_size
    work, least = 6.0 * num_weights * packs * recipe.data.seq_len, LEAST_WORK[device.type]
    if asked == "auto" and work < least:
        return False, f"{work:.1e} floating-point operations do not pay for compiling, which takes {least:.0e}"
    if choice.checkpointing.kind == "selective":
        return False, "selective checkpointing watches single operators"
    if fault := compiler_fault(device):
        if asked is True:
            raise MachineError(f"train.compile: {fault}", fix="install a C++ compiler, or set train.compile: false")
        return False, f"this machine cannot: {fault}"
    return True, "as train.compile says" if asked is True else f"{work:.1e} floating-point operations pay for it"
