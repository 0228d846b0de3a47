"""Compare the merged model with the trained one in float32, with a negative control: the adapter switched off.

Whole models where they fit in memory, else one decoder layer at a time: the numbers are the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.adapters.attach import load_adapter
from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.inits.residual import untrained
from qlora_train.adapters.updates import Delta, Update, VocabularyRows
from qlora_train.data.loader import MicroBatch, eval_batches
from qlora_train.data.split import Split
from qlora_train.errors import ModelError, is_out_of_memory
from qlora_train.evaluate.compare import Distance, Observed, distance, observe
from qlora_train.evaluate.tasks import Answer, Question, answer
from qlora_train.export.base import BaseReader, as_float32
from qlora_train.export.copied import worst_copy
from qlora_train.export.layers import FolderWeights, TrainedWeights, Weights, observe_in_layers
from qlora_train.export.merge import Merged
from qlora_train.export.probe import Deviation, Probe, deviations, probing, recheck
from qlora_train.export.tensors import MergedTensors, Onto
from qlora_train.memory.available import available_bytes
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import stored_tensors
from qlora_train.model.hollow import build_hollow
from qlora_train.model.load import resolve_attention, resolve_device, to_float32
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun, load_trained

How = Literal["whole", "layers"]
# Of the float32 model's bytes: activations, and what the allocator leaves between tensors.
WHOLE_SHARE = 1.2
# Of a layer's output over what rounding its weight explains (probe.py). SmolLM2-135M in bfloat16: 0.87 to 1.35; where
# one layer has half its scale 8.2, without its update 16, while the KL stays below a thousandth of the adapter's
# effect.
MAX_DEVIATION = 3.0


@dataclass(frozen=True)
class Verdict:
    """What the comparison found. `merged` and `adapter_off` are distances from the trained model."""

    split: str  # where the rows came from: held-out ones, or training rows when the recipe names no others
    num_rows: int
    merged: Distance
    adapter_off: Distance
    max_kl_frac: float
    onto: Onto = "dequantized"  # what the adapter was merged onto
    max_loss_rise: float = 0.0  # that a model which is knowingly another one may have
    how: How = "whole"
    worst_layer: Deviation | None = None  # by its own output; None where no layer can be held to one

    @property
    def kl_frac(self) -> float:
        """KL of the merged model as a share of the adapter's whole effect; infinite when the adapter has none."""
        effect = self.adapter_off.mean_kl
        return self.merged.mean_kl / effect if effect > 0 else float("inf")

    @property
    def loss_rise(self) -> float:
        """How much higher the merged model's loss is than the trained model's, in nats per supervised token."""
        return self.merged.candidate_nll - self.merged.reference_nll

    @property
    def accepted(self) -> bool:
        """Whether the merged model may be published: as the model that was trained, or as one that is no worse."""
        if self.onto == "original":
            return self.loss_rise <= self.max_loss_rise and self.layers_hold
        return self.kl_frac <= self.max_kl_frac and self.layers_hold

    @property
    def layers_hold(self) -> bool:
        """Whether rounding explains what every single layer is off by."""
        return self.worst_layer is None or self.worst_layer.ratio <= MAX_DEVIATION


@dataclass(frozen=True)
class Reference:
    """The trained model on some rows, with its adapter and without; what every candidate is measured against."""

    split: str
    batches: Sequence[MicroBatch]
    trained: Observed
    off: Observed
    how: How
    device: torch.device
    answers: Sequence[Answer] = field(default=())  # of the trained model to the questions that were asked
    probes: Mapping[str, Probe] = field(default_factory=dict)  # of its adapted layers

    @property
    def num_rows(self) -> int:
        """Rows that were read."""
        return sum(len(batch.row_ids) for batch in self.batches)


def load_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The merged model as any user of transformers gets it. ModelError when a tensor is missing, extra or misshapen."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{folder} does not load: {error}", fix="export again") from error
    if bad := {key: names for key, names in info.items() if names}:
        raise ModelError(f"{folder} does not load cleanly: {bad}", fix="export again")
    model.eval().requires_grad_(False)
    return model


def how_to_verify(run: FinishedRun) -> How:
    """As the recipe says; `auto`: whole where the float32 model fits in what is free of the host's memory.

    ModelError where layers are asked for of an adapter that looks at the base's weights while it is attached.
    """
    asked = run.recipe.export.verify
    if not all(isinstance(update, Delta | VocabularyRows) for update in read_updates(run.run_dir.adapter).values()):
        if asked == "layers":
            method = run.recipe.adapter.method
            raise ModelError(
                "export.verify: layers serves adapters that add products of two factors or rows of tokens, and this "
                f"one is {method}",
                fix="export with export.verify=whole",
            )
        return "whole"
    if asked != "auto":
        return asked
    needed = WHOLE_SHARE * torch.float32.itemsize * run.num_merged_params
    return "whole" if needed <= available_bytes(torch.device("cpu")) else "layers"


def observe_trained(
    run: FinishedRun, source: Source, split: Split, pad_token_id: int, how: How, questions: Sequence[Question] = ()
) -> Reference:
    """Run the trained model in float32 over the rows, and over them again with the adapter switched off.

    `questions` are answered too; only a whole model can. Memory: the trained model, or one layer of it; hidden states.
    """
    batches = list(eval_batches(split.table, run.recipe.eval.batch_size, pad_token_id))
    if how == "layers":
        model, device = _hollow_trained(run, source)
        weights = TrainedWeights(BaseReader(run, source))
        with probing(model) as probes:
            seen = observe_in_layers(model, weights, batches, device, (nullcontext, partial(untrained, model)))
        return Reference(split.side, batches, seen[0], seen[1], how, device, probes=probes)
    trained = load_trained(run)
    to_float32(trained.model)
    causal, device = CausalModel(trained.model), trained.base.device
    with probing(trained.model) as probes:
        reference = observe(causal, batches, device)
    with untrained(trained.model):
        off = observe(causal, batches, device)
    given = answer(
        trained.model, trained.tokenizer, questions,
        max_new_tokens=run.recipe.eval.max_new_tokens, batch_size=run.recipe.eval.batch_size,
    )  # fmt: skip
    return Reference(split.side, batches, reference, off, how, device, given, probes)


def verify(run: FinishedRun, merged_folder: Path, reference: Reference, merged: Merged) -> Verdict:
    """Run the files of a merged model over the rows of the reference, and each layer over its own input; in float32.

    Memory: the merged model, or one layer of it. Whole, it goes to the host where its float32 copy does not fit on the
    CUDA device.
    """
    device = reference.device
    gc.collect()  # the trained model
    folder = Source(str(merged_folder), merged_folder)
    config = load_config(folder)
    weights = FolderWeights(stored_tensors(folder, build_skeleton(config)))
    export_dtype: torch.dtype = getattr(torch, run.recipe.export.export_dtype)
    worst = worst_layer(run, reference, weights, weights.stored.__contains__, export_dtype, merged.onto)
    if reference.how == "layers":
        (seen,) = observe_in_layers(build_hollow(config, device), weights, reference.batches, device)
    else:
        device = room_for(run, device)
        model = load_merged(merged_folder, getattr(torch, run.recipe.export.export_dtype), device)
        to_float32(model)
        seen = observe(CausalModel(model), reference.batches, device)
    return Verdict(
        reference.split,
        reference.num_rows,
        distance(reference.trained, seen),
        distance(reference.trained, reference.off),
        run.recipe.export.max_kl_frac,
        merged.onto,
        run.recipe.export.max_loss_rise,
        reference.how,
        worst,
    )


def worst_layer(
    run: FinishedRun,
    reference: Reference,
    weights: Weights,
    has: Callable[[str], bool],
    dtype: torch.dtype,
    onto: Onto = "dequantized",
) -> Deviation | None:
    """Of all layers the one whose output is furthest from the trained layer's, over what rounding explains.

    `weights` are the written tensors by the base's names, `has` finds one; `dtype` is what they were rounded to. Where
    a layer exceeds the limit, its weight is merged once more and its roundings are taken as they are. Tensors that are
    copied count with the value that is furthest off (export/copied.py). `onto`: what they were merged onto.
    """

    def value(name: str) -> Tensor:
        return weights.value(name).float()

    base, updates = BaseReader(run, run.source()), read_updates(run.run_dir.adapter)
    probes = reference.probes if onto == "dequantized" else _on_original(base, updates, reference.probes)
    copied = worst_copy(base, updates, weights, has, dtype, original=onto == "original")
    copies = [] if copied is None else [copied]
    found = deviations(probes, value, has, dtype)
    if not found or found[0].ratio <= MAX_DEVIATION:
        return max([*found[:1], *copies], key=lambda deviation: deviation.ratio, default=None)
    tensors = MergedTensors(run, run.source(), onto)
    stored = tensors.stored_names
    certain = []
    for each in found:
        if each.ratio > MAX_DEVIATION and each.name in stored:
            bias = f"{each.name.removesuffix('weight')}bias"
            bias_O = value(bias).cpu() if has(bias) else None
            exact_OI = tensors.exact(stored[each.name]).float().cpu()
            each = recheck(each, probes[each.name], value(each.name).cpu(), exact_OI, bias_O, dtype)
        certain.append(each)
    return max([*certain, *copies], key=lambda deviation: deviation.ratio)


def _on_original(base: BaseReader, updates: Mapping[str, Update], probes: Mapping[str, Probe]) -> dict[str, Probe]:
    """What trained layers would put out on the original weights: y + x (W - W4)^T, for updates that are only added.

    Quantises every such weight once more. Memory: two weights in float32.
    """
    moved = {}
    for name, probe in probes.items():
        if name in base.stored and isinstance(updates.get(name), Delta | None):
            original = base.original(name)
            change_OI = base.started(name, original).float() - as_float32(base.as_trained(name, original))
            moved[name] = Probe(probe.x_NI, probe.y_NO + probe.x_NI @ change_OI.cpu().T)
    return moved


def _hollow_trained(run: FinishedRun, source: Source) -> tuple[Any, torch.device]:
    """The trained model without the base's weights; the adapter is whole."""
    device = resolve_device(run.recipe.model.device)
    section = run.recipe.model
    attention = resolve_attention(
        section.attn_implementation, device, run.recipe.data.seq_len, run.recipe.data.batching
    )
    model = build_hollow(load_config(source), device, run.base_print, attention)
    return load_adapter(model, run.run_dir.adapter).eval(), device


def room_for(run: FinishedRun, device: torch.device) -> torch.device:
    """The device where it has room for the float32 model, else the host."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()
    num_bytes = WHOLE_SHARE * torch.float32.itemsize * run.num_merged_params
    return device if torch.cuda.mem_get_info(device)[0] >= num_bytes else torch.device("cpu")
