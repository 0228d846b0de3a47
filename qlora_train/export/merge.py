"""Merge one module at a time: quantise as training did, prove it, dequantise, add the delta in float32, cast once.

    merged = cast(dequantise(quantise(W)) + scaling * B A)

The base is read from the safetensors files that training read; no model is built and nothing is held but one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from qlora_train.adapters.state import load_adapter_config, read_adapter_tensors
from qlora_train.errors import ModelError
from qlora_train.export.safetensors_writer import Planned, plan_shards, write_shards
from qlora_train.model.binding import refuse_other_shape
from qlora_train.model.files import stored_tensors
from qlora_train.model.load import resolve_device
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun
from qlora_train.quant.bnb import QuantSettings, dequantize, quantize
from qlora_train.quant.fingerprint import BasePrint, TensorPrint, print_tensor

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Delta:
    """The low-rank update of one weight: `scaling * B A`."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def dense(self, device: torch.device) -> Tensor:
        """The update (O, I) in float32."""
        return (self.lora_B.to(device).float() @ self.lora_A.to(device).float()) * self.scaling


@dataclass(frozen=True)
class ModuleRow:
    """What the merge did to one weight. Norms are Frobenius norms."""

    name: str
    weight_norm: float
    delta_norm: float
    quant_error_norm: float  # of quantisation: ||W - W4||; 0 where the base is not quantised
    rounding_norm: float  # of the cast to export_dtype: ||merged - (W4 + delta)||


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """The updates of an adapter folder by the base's parameter name. Refuses what is not plain LoRA."""
    config = load_adapter_config(adapter)  # refuses what is no pair of lora_A and lora_B
    tensors = read_adapter_tensors(adapter)
    stems = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {
        f"{stem.removeprefix(_PEFT_PREFIX)}.weight": Delta(
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"], _scaling(config)
        )
        for stem in stems
    }


def _scaling(config: LoraConfig) -> float:
    return float(config.lora_alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)


class Merger:
    """Produces merged tensors by name; keeps a row about each adapted weight."""

    def __init__(self, run: FinishedRun, source: Source, export_dtype: torch.dtype) -> None:
        self.deltas = read_deltas(run.run_dir.adapter)
        self.rows: list[ModuleRow] = []
        self._print: BasePrint = run.base_print
        self._export_dtype = export_dtype
        # Loading hands weights to the quantiser in this dtype.
        self._compute_dtype: torch.dtype = getattr(torch, run.recipe.model.compute_dtype)
        self._device = resolve_device(run.recipe.model.device)
        self._settings = QuantSettings(**run.base_print.quant) if run.base_print.quant else None  # type: ignore[arg-type]
        skeleton = build_skeleton(load_config(source))
        refuse_other_shape(run.base_print, skeleton)
        stored = stored_tensors(source, skeleton)
        # Merged tensors keep the names of the base's files: other programs know the model by them.
        self._parameter = {tensor.name: name for name, tensor in stored.items()}
        self._paths = {tensor.name: tensor.path for tensor in stored.values()}
        self._account_for_every_delta()

    def _account_for_every_delta(self) -> None:
        """Every update has a weight of its shape."""
        for name, delta in self.deltas.items():
            shape = self._print.tensors[name].shape if name in self._print.tensors else None
            if shape != (delta.lora_B.shape[0], delta.lora_A.shape[1]):
                raise ModelError(
                    f"the adapter's update of {name} fits no weight of the base", fix="use the base of the run"
                )

    def planned(self) -> list[Planned]:
        """All tensors of the merged model."""
        return [
            Planned(stored, self._print.tensors[name].shape, self._export_dtype)
            for stored, name in sorted(self._parameter.items())
        ]

    def produce(self, stored: str) -> Tensor:
        """One merged tensor (O, I) in the export dtype. ModelError when the base's tensor is not the one of the run."""
        name = self._parameter[stored]
        recorded = self._print.tensors[name]
        loaded = _read_tensor(self._paths[stored], stored).to(self._device)
        weight = loaded.to(getattr(torch, recorded.dtype)) if not recorded.quantised else loaded
        base = self._as_trained(name, weight, recorded)
        delta = self.deltas.get(name)
        merged = base if delta is None else base + delta.dense(base.device)
        exported = merged.to(self._export_dtype)
        if not bool(torch.isfinite(exported).all()):
            raise ModelError(
                f"{name}: values up to {float(merged.abs().max()):.3g} do not fit {self._export_dtype}",
                fix="export with export.export_dtype=bfloat16",
            )
        if delta is not None:
            self.rows.append(
                ModuleRow(
                    name,
                    weight_norm=float(base.norm()),
                    delta_norm=float((merged - base).norm()),
                    quant_error_norm=float((loaded.float() - base).norm()) if recorded.quantised else 0.0,
                    rounding_norm=float((exported.float() - merged).norm()),
                )
            )
        return exported

    def _as_trained(self, name: str, weight: Tensor, recorded: TensorPrint) -> Tensor:
        """The float32 weight that the training computed with, proven by its fingerprint."""
        stored = weight
        if recorded.quantised:
            assert self._settings is not None
            stored = quantize(weight.to(self._compute_dtype), self._settings)
        if print_tensor(stored).sha256 != recorded.sha256:
            raise ModelError(
                f"{name} is not the tensor that was trained on"
                + (" after quantising it again" if recorded.quantised else ""),
                fix="export on the kind of device that trained (quantisers may differ), from the same base files",
            )
        return dequantize(stored) if recorded.quantised else stored.float()

    def unused(self) -> list[str]:
        """Updates that no produced tensor consumed."""
        return sorted(set(self.deltas) - {row.name for row in self.rows})


def merge_to(folder: Path, run: FinishedRun, source: Source) -> list[ModuleRow]:
    """Write the merged weights into `folder`; one row per adapted weight. Time is dominated by quantising again."""
    export = run.recipe.export
    merger = Merger(run, source, getattr(torch, export.export_dtype))
    write_shards(folder, plan_shards(merger.planned(), int(export.shard_gib * 2**30)), merger.produce)
    if unused := merger.unused():
        raise ModelError(f"{len(unused)} updates were not merged, first {unused[0]}", fix="report this")
    return merger.rows


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
