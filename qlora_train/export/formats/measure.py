"""How far a written format is from the model that was trained, and whether that may be published."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from qlora_train.evaluate.compare import distance, observe
from qlora_train.export.layers import Weights, fill_whole, observe_in_layers
from qlora_train.export.tensors import Onto
from qlora_train.export.verify import Reference, Verdict, room_for, worst_layer
from qlora_train.model.causal import CausalModel
from qlora_train.model.hollow import build_hollow
from qlora_train.model.low_rank import dense_name, ranks_of
from qlora_train.model.skeleton import load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun


@dataclass(frozen=True)
class FormatVerdict(Verdict):
    """A verdict on a format that may round the weights further than 16 bit do."""

    max_kl: float | None = None  # that the user accepts of such a format, in nats per token

    @property
    def accepted(self) -> bool:
        """As any export; else by what the user accepts, though never where nothing of the training is left."""
        if super().accepted:
            return True
        within = self.max_kl is not None and self.merged.mean_kl <= self.max_kl
        return within and self.merged.mean_kl < self.adapter_off.mean_kl


def measure(
    run: FinishedRun,
    source: Source,
    reference: Reference,
    weights: Weights,
    *,
    onto: Onto,
    lossy: bool,
    dtype: torch.dtype | None,
) -> FormatVerdict:
    """Run the model with what was read back over the rows of the reference, in float32.

    `dtype`: what the weights were rounded to; None, where that is coarser than 16 bit and no layer can be held to it.
    Memory: as for the reference: a whole model, or one of its layers.
    """
    gc.collect()
    worst = None
    if dtype is not None:
        ranks = ranks_of(load_config(source))
        names = {dense_name(name, ranks) for name in run.base_print.tensors}
        worst = worst_layer(run, reference, weights, names.__contains__, dtype, onto)
    if reference.how == "layers":
        model = build_hollow(run.config(source), reference.device)
        (seen,) = observe_in_layers(model, weights, reference.batches, reference.device)
    else:
        device = room_for(run, reference.device)
        model = build_hollow(run.config(source), device)
        fill_whole(model, weights)
        seen = observe(CausalModel(model), reference.batches, device)
    export = run.recipe.export
    return FormatVerdict(
        reference.split,
        reference.num_rows,
        distance(reference.trained, seen),
        distance(reference.trained, reference.off),
        export.max_kl_frac,
        onto,
        export.max_loss_rise,
        reference.how,
        worst,
        max_kl=export.max_kl if lossy else None,
    )
