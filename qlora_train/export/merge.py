"""Write the merged weights: quantise as training did, prove it, dequantise, add the delta in float32, cast once.

    merged = cast(dequantise(quantise(W)) + scaling * B A)

The base is read from the safetensors files that training read; no model is built and nothing is held but one tensor.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.folders import MANIFEST
from qlora_train.environment import code_sha256, versions
from qlora_train.errors import ModelError
from qlora_train.export.clock import Clock
from qlora_train.export.safetensors_writer import Planned, plan_shards, shard_names, write_index, write_shard
from qlora_train.export.tensors import MergedTensors, Onto, difference_norm
from qlora_train.export.unfinished import FinishedShards
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun
from qlora_train.quant.fingerprint import is_finite


@dataclass(frozen=True)
class ModuleRow:
    """What the merge did to one weight. Norms are Frobenius norms."""

    name: str
    weight_norm: float
    delta_norm: float
    quant_error_norm: float  # of quantisation: ||W - W4||; 0 where the base is not quantised
    rounding_norm: float  # of the cast to export_dtype: ||merged - (W4 + delta)||


@dataclass(frozen=True)
class Merged:
    """What was written, and what it took."""

    onto: Onto
    rows: list[ModuleRow]  # one for every adapted weight
    seconds: dict[str, float]  # read, quantise, prove, merge, cast, write
    num_shards: int
    num_taken_over: int  # shards that an earlier export, killed, had finished
    left_out: tuple[str, ...] = ()  # tensors of the base's files that the model does not compute with


@dataclass
class Caster:
    """Merged tensors in the export dtype, with a row about each adapted weight."""

    tensors: MergedTensors
    export_dtype: torch.dtype
    rows: list[ModuleRow] = field(default_factory=list)

    def planned(self) -> list[Planned]:
        """All tensors of the merged model."""
        return [Planned(stored, self.tensors.shape(stored), self.export_dtype) for stored in self.tensors.names]

    def produce(self, stored: str) -> Tensor:
        """One merged tensor (O, I) in the export dtype.

        ModelError when the base's tensor is not the one of the run, and when the dtype cannot hold a value.
        """
        name = self.tensors.parameter(stored)
        exact = self.tensors.exact(stored, self.export_dtype)
        with self.tensors.base.clock.of("cast"):
            exported = exact.to(self.export_dtype)
            if not is_finite(exported):
                raise ModelError(
                    f"{name}: values up to {float(exact.abs().max()):.3g} do not fit {self.export_dtype}",
                    fix="export with export.export_dtype=bfloat16",
                )
            if (change := self.tensors.changes.get(name)) is not None:
                rounding = change.rounding_norm + difference_norm(exported, exact)  # one of the two is 0
                self.rows.append(ModuleRow(name, **asdict(replace(change, rounding_norm=rounding))))
        return exported


def merge_to(
    folder: Path, run: FinishedRun, source: Source, onto: Onto, finished: FinishedShards, clock: Clock
) -> Merged:
    """Write the merged weights into `folder`, taking over finished shards. Quantising again takes most of the time."""
    export = run.recipe.export
    tensors = MergedTensors(run, source, onto, clock)
    caster = Caster(tensors, getattr(torch, export.export_dtype))
    shards = plan_shards(caster.planned(), int(export.shard_gib * 2**30))
    rows: list[ModuleRow] = []
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        key = _key(run, onto, shard)
        noted = finished.take_over(name, key)
        clock.say(f"{'writing' if noted is None else 'already there:'} {name} ({len(shard)} tensors)")
        if noted is None:
            caster.rows = []
            with clock.of("write"):
                digest = write_shard(finished.folder / name, shard, caster.produce)
            finished.finish(name, key, digest, noted := [asdict(row) for row in caster.rows])
        rows += [ModuleRow(**row) for row in noted]
        _same_file(finished.folder / name, folder / name)
    write_index(folder, shards)
    if unused := sorted({tensors.merged_name(name) for name in tensors.updates} - {row.name for row in rows}):
        raise ModelError(f"{len(unused)} updates were not merged, first {unused[0]}", fix="report this")
    return Merged(onto, rows, dict(clock.seconds), len(shards), finished.num_taken_over, tensors.base.left_out)


def _key(run: FinishedRun, onto: Onto, shard: list[Planned]) -> dict[str, Any]:
    """Whatever the bytes of a shard depend on."""
    return {
        "adapter": read_json(run.run_dir.adapter / MANIFEST)["files"],
        "base": run.base_print.digest,
        "onto": onto,
        "tensors": [[planned.name, list(planned.shape), str(planned.dtype)] for planned in shard],
        "code": code_sha256(),
        "versions": versions(),
    }


def _same_file(shard: Path, name: Path) -> None:
    """A second name for a shard, so that a kill before publishing loses nothing; moved where a file has one name."""
    try:
        name.hardlink_to(shard)
    except OSError:
        shutil.move(shard, name)
