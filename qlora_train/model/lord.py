"""LoRD: linear layers in two factors, fitted to what the base makes of training rows, before anything is quantised.

    W ~ expand reduce = V_k (V_k^T W),   V_k: the k leading eigenvectors of the second moment of the outputs y = W x + b

Of all matrices of rank k it has the least mean squared error of y over the rows: the sum of the other eigenvalues. A
layer with a bias is centred (covariance, bias V_k V_k^T (b - mu) + mu); one without has none afterwards either, so
that the merged weight fits the architecture. Source: LORD, arXiv 2309.14021, section 3; the form of the bias is ours.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_train.adapters.module_names import is_named
from qlora_train.artifacts.files import explained, sha256_file
from qlora_train.artifacts.folders import manifest_faults, publishing, read_manifest
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import stored_tensors, weight_files
from qlora_train.model.load import load_recipe_base
from qlora_train.model.low_rank import RANKS, ranks_of, with_ranks
from qlora_train.model.skeleton import build_skeleton, check_targets, linear_layers, load_config
from qlora_train.model.source import HUB_PATTERNS, Source, check_model_folder
from qlora_train.quant.bnb import cpu_width_multiple
from qlora_train.recipe.schema import QuantSection, Recipe

MOMENT_BYTES = 2**30  # of second moments that are gathered in one pass over the rows; at least those of one layer
RECORD = "lord.json"
_VERSION = 1  # raise it when the factors change


def rank_for(out_features: int, in_features: int, keep_frac: float, multiple: int) -> int:
    """The rank at which two factors hold at most `keep_frac` of a weight, as a multiple; 0 leaves it whole.

    >>> rank_for(1536, 576, 0.9, 64), rank_for(128, 128, 0.9, 64)
    (320, 0)
    """
    return int(keep_frac * out_features * in_features / (out_features + in_features)) // multiple * multiple


def planned_config(config: Any, recipe: Recipe) -> Any:
    """The config of the base that a recipe trains on: with a rank for each decomposed layer, known from shapes alone.

    The config itself where nothing is decomposed. ModelError where a name matches no layer, or no layer gets smaller.
    """
    keep_frac, names = recipe.model.lord_keep_frac, recipe.model.lord_modules
    if keep_frac is None:
        return config
    skeleton = build_skeleton(config)
    check_targets(skeleton, names, key="model.lord_modules")
    multiple = cpu_width_multiple(recipe.quant.block_size)
    ranks = {}
    for name, layer in linear_layers(skeleton).items():
        asked = isinstance(names, str) or is_named(name, names)
        rank = rank_for(layer.out_features, layer.in_features, keep_frac, multiple)
        if asked and rank and not is_named(name, recipe.quant.skip_modules):
            ranks[name] = rank
    if not ranks:
        raise ModelError(
            f"model.lord_keep_frac: no layer gets smaller: ranks are multiples of {multiple}, and two factors of rank "
            f"{multiple} hold more than {keep_frac:g} of any weight that is named",
            fix="raise model.lord_keep_frac, name wider layers in model.lord_modules, or remove it",
        )
    return with_ranks(config, ranks)


class Moments:
    """Sum and second moment of a layer's outputs, or of its inputs where there are fewer of those; float64.

    Each batch is summed in float32. Memory: 8 min(out, in)^2 bytes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.of_inputs = layer.in_features < layer.out_features
        width, device = min(layer.in_features, layer.out_features), layer.weight.device
        self.sum_D = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.num_rows = 0

    def add(self, rows_ND: Tensor) -> None:
        """Some more rows."""
        rows = rows_ND.float()
        self.sum_D += rows.sum(0).double()
        self.sum_DD += (rows.T @ rows).double()
        self.num_rows += len(rows)

    def mean(self) -> Tensor:
        """(D)."""
        return self.sum_D / max(self.num_rows, 1)

    def second(self, *, centred: bool) -> Tensor:
        """(D, D): about the mean, or about zero."""
        about_zero = self.sum_DD / max(self.num_rows, 1)
        return about_zero - torch.outer(self.mean(), self.mean()) if centred else about_zero


@dataclass(frozen=True)
class Factors:
    """A layer in two, in float32, and what it lost."""

    reduce_KI: Tensor
    expand_OK: Tensor
    bias_O: Tensor | None
    total: float  # sum of all eigenvalues: the mean square of the outputs, about their mean where there is a bias
    dropped: float  # of those that are left out: the mean squared error

    @property
    def kept_frac(self) -> float:
        """Share of the outputs' mean square that is kept."""
        return 1 - self.dropped / self.total if self.total else 1.0


@torch.no_grad()
def factorise(layer: nn.Linear, moments: Moments, rank: int) -> Factors:
    """The factors of a layer. Cost: one eigendecomposition of width min(out, in), and a thin SVD where in < out.

    tests/methods/test_lord.py holds the error against the dropped eigenvalues.
    """
    weight_OI = layer.weight.double()
    bias_O = None if layer.bias is None else layer.bias.double()
    values_D, vectors_DD = torch.linalg.eigh(moments.second(centred=bias_O is not None))
    if moments.of_inputs:  # the moment of W x is W M W^T, whose root is W M^(1/2)
        root_OI = weight_OI @ (vectors_DD * values_D.clamp(min=0).sqrt())
        basis_OD, singular, _ = torch.linalg.svd(root_OI, full_matrices=False)
        eigenvalues = singular.square()
    else:
        basis_OD, eigenvalues = vectors_DD.flip(1), values_D.flip(0).clamp(min=0)
    expand_OK = basis_OD[:, :rank]
    new_bias = None
    if bias_O is not None:
        mean_O = weight_OI @ moments.mean() + bias_O if moments.of_inputs else moments.mean()
        new_bias = (expand_OK @ (expand_OK.T @ (bias_O - mean_O)) + mean_O).float()
    return Factors(
        (expand_OK.T @ weight_OI).float(),
        expand_OK.float(),
        new_bias,
        float(eigenvalues.sum()),
        float(eigenvalues[rank:].sum()),
    )


@torch.no_grad()
def gather_moments(
    causal: CausalModel, layers: Mapping[str, nn.Linear], batches: Sequence[MicroBatch]
) -> dict[str, Moments]:
    """What the layers read or give out for every real token of the batches: one forward pass over them."""
    found = {name: Moments(layer) for name, layer in layers.items()}
    real: list[Tensor] = []  # of the batch that is running

    def watch(moments: Moments) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen = args[0] if moments.of_inputs else output
            rows = seen.reshape(-1, seen.shape[-1])
            # An expert sees the tokens that were routed to it: which ones they are is not known here.
            moments.add(rows[real[0]] if len(rows) == len(real[0]) else rows)

        return see

    hooks = [layer.register_forward_hook(watch(found[name])) for name, layer in layers.items()]
    try:
        for batch in batches:
            batch = batch.to(causal.head.device)
            real[:] = [real_tokens(batch)]
            causal.hidden(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def real_tokens(batch: MicroBatch) -> Tensor:
    """Which positions (B T) hold a token, and no padding."""
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    width = batch.input_ids.shape[1]
    starts = batch.row_starts or tuple(line * width for line in range(len(batch.row_lengths)))
    for start, length in zip(starts, batch.row_lengths, strict=True):
        mask[start : start + length] = True
    return mask


def decompose(
    causal: CausalModel, ranks: Mapping[str, int], batches: Sequence[MicroBatch]
) -> Iterator[tuple[str, Factors]]:
    """The factors of each named layer, by as few passes over the batches as MOMENT_BYTES allows."""
    layers = {name: layer for name, layer in linear_layers(causal.model).items() if name in ranks}
    for group in _groups(layers):
        moments = gather_moments(causal, group, batches)
        for name, layer in group.items():
            yield name, factorise(layer, moments.pop(name), ranks[name])


def _groups(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    group: dict[str, nn.Linear] = {}
    num_bytes = 0
    for name, layer in layers.items():
        more = 8 * min(layer.in_features, layer.out_features) ** 2
        if group and num_bytes + more > MOMENT_BYTES:
            yield group
            group, num_bytes = {}, 0
        group[name], num_bytes = layer, num_bytes + more
    if group:
        yield group


def low_rank_source(
    recipe: Recipe,
    source: Source,
    config: Any,
    batches: Sequence[MicroBatch],
    folder: Path,
    say: Callable[[str], None],
) -> Source:
    """The decomposed base as a model folder, made once and found again as long as nothing that it came from changes.

    `config` is that of `planned_config`. The folder appears whole or not at all. Memory while it is made: the base in
    compute_dtype, the factors, MOMENT_BYTES, and one file of weights.
    """
    made, key = Source(source.name, folder, source.commit, source.file_sha256), _made_from(recipe, source, batches)
    if folder.is_dir() and not manifest_faults(folder) and read_manifest(folder).get("made_from") == key:
        say(f"LoRD: the decomposed base is there already: {folder}")
        return made
    began, ranks = time.perf_counter(), ranks_of(config)
    num_tokens = sum(batch.num_tokens for batch in batches)
    say(f"LoRD: decomposing {len(ranks)} layers, fitted to {num_tokens:,} tokens of training rows")
    base = load_recipe_base(source, recipe.model_copy(update={"quant": QuantSection(quant_type="none")}))
    base.model.eval()
    shapes = {name: layer.weight.shape for name, layer in linear_layers(base.model).items()}
    rows, stored = [], {}
    for name, factors in decompose(CausalModel(base.model), ranks, batches):
        rows.append({"name": name, "shape": list(shapes[name]), "rank": ranks[name], "kept_frac": factors.kept_frac})
        stored[name] = _as_stored(factors, base.compute_dtype)
    num_dense = base.print.num_params
    del base
    gc.collect()
    record = {
        "keep_frac": recipe.model.lord_keep_frac,
        "num_tokens": num_tokens,
        "num_params": num_dense - sum(_saved(shapes[name], rank) for name, rank in ranks.items()),
        "num_dense_params": num_dense,
        "layers": rows,
    }
    with publishing(folder, manifest={"made_from": key}, replace=True) as temporary:
        _write(temporary, source, config, stored)
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"{_summary(record, len(shapes))} ({time.perf_counter() - began:.0f} s)")
    return made


def _saved(shape: Sequence[int], rank: int) -> int:
    return shape[0] * shape[1] - rank * sum(shape)


def _summary(record: Mapping[str, Any], num_layers: int) -> str:
    rows, before, after = record["layers"], record["num_dense_params"], record["num_params"]
    ranks, kept = [row["rank"] for row in rows], [row["kept_frac"] for row in rows]
    whole = f"; {num_layers - len(rows)} stay whole" if num_layers > len(rows) else ""
    return (
        f"LoRD: {len(rows)} of {num_layers} layers are two factors of rank {min(ranks)} to {max(ranks)}{whole}; "
        f"{after / 1e6:,.1f}M parameters, {before / 1e6:,.1f}M before ({after / before - 1:+.1%}); outputs keep "
        f"{sum(kept) / len(kept):.2%} of their mean square, {min(kept):.2%} at least"
    )


def _made_from(recipe: Recipe, source: Source, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Whatever the factors depend on."""
    rows = hashlib.sha256()
    for batch in batches:
        for numbers in (batch.input_ids.flatten().tolist(), batch.row_lengths, batch.row_starts):
            rows.update(repr(numbers).encode())
    return {
        "version": _VERSION,
        "weights": {path.name: sha256_file(path) for path in weight_files(source.folder)},
        "keep_frac": recipe.model.lord_keep_frac,
        "modules": json.loads(json.dumps(recipe.model.lord_modules)),
        "whole": list(recipe.quant.skip_modules),
        "rank_multiple": cpu_width_multiple(recipe.quant.block_size),
        "compute_dtype": recipe.model.compute_dtype,
        "rows": rows.hexdigest(),
    }


def _as_stored(factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer by the end of their names, on the host."""
    tensors = {"reduce.weight": factors.reduce_KI, "expand.weight": factors.expand_OK}
    if factors.bias_O is not None:
        tensors["expand.bias"] = factors.bias_O
    return {name: tensor.to(dtype).cpu().contiguous() for name, tensor in tensors.items()}


def _write(folder: Path, source: Source, config: Any, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The model folder: the base's own files, with factors in place of weights; one file of weights at a time."""
    for path in sorted(source.folder.iterdir()):
        kept = any(fnmatch(path.name, pattern) for pattern in HUB_PATTERNS)
        if path.is_file() and kept and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, folder / path.name)
    settings = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**settings, RANKS: ranks_of(config)}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    stored = stored_tensors(source, build_skeleton(with_ranks(config, {})))
    parameter_of = {(tensor.path, tensor.name): name for name, tensor in stored.items()}
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for path in weight_files(source.folder):
        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                parameter = parameter_of.get((path, name))
                if parameter is not None:
                    tensors |= _in_place_of(name, parameter, factors) or {name: file.get_tensor(name)}
        with explained(folder / path.name):
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1 or not (folder / "model.safetensors").is_file():
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _in_place_of(name: str, parameter: str, factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What is stored for a tensor of a decomposed layer, by the names of the base's files; nothing for another."""
    layer, _, kind = parameter.rpartition(".")
    if layer not in factors:
        return {}
    stem = name.removesuffix(kind)
    ends = ("reduce.weight", "expand.weight") if kind == "weight" else (f"expand.{kind}",)
    return {f"{stem}{end}": factors[layer][end] for end in ends}


def open_low_rank(name: str, folder: Path, commit: str | None) -> Source:
    """The decomposed base of a run. ModelError where it is not there, or is none."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not there: the decomposed base that this run was trained on (model.lord_keep_frac)",
            fix="restore the folder, or make it again: qlora-train train RECIPE --resume --from STEP",
        )
    source = Source(name, folder, commit)
    check_model_folder(source, weights=True)
    if not ranks_of(load_config(source)):
        raise ModelError(f"{folder / 'config.json'} names no decomposed layers ({RANKS})", fix="restore the folder")
    return source
