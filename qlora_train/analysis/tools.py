"""One adapter out of others, and what an adapter is: info, combine, resize, fold, diff. Nothing is written over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qlora_train.adapters.arithmetic import concatenated, delta_svd, folded, inner_product, norm
from qlora_train.adapters.fold import Delta, Update
from qlora_train.adapters.forms.mole import Granularity, MixtureForm
from qlora_train.adapters.state import MAX_RANK, WEIGHTS, read_adapter_tensors, split_name
from qlora_train.adapters.updates import VocabularyRows
from qlora_train.analysis.compress import Ask, ResizedModule, resized
from qlora_train.analysis.folder import (
    OpenedAdapter,
    open_adapter,
    publish_adapter,
    refuse_existing,
    refuse_other_bases,
)
from qlora_train.analysis.overlap import baseline, similarity
from qlora_train.analysis.sparse import nearest, sparse_sum
from qlora_train.analysis.spectrum import Spectrum, in_model_order, spectra
from qlora_train.artifacts.files import sha256_file
from qlora_train.errors import ModelError, RecipeError
from qlora_train.names import PEFT_PREFIX

CombinationType = Literal["cat", "ties", "dare"]
COMBINATION_TYPES: tuple[CombinationType, ...] = get_args(CombinationType)


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted module."""

    module: str
    r: int
    scaling: float
    lora_A_norm: float | None  # None where the method has no such factor
    lora_B_norm: float | None
    spectrum: Spectrum | None  # None where the update is no product of two factors (DoRA, MoLE)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is, from its folder alone."""

    folder: Path
    method: str
    r: int
    alpha: float
    target_modules: tuple[str, ...]
    num_params: int
    num_bytes: int  # of adapter_model.safetensors
    dtypes: tuple[str, ...]
    base: str | None  # digest of the base it is bound to
    base_words: str
    step: int | None
    made: dict[str, Any] | None  # how one of these tools made it
    modules: tuple[ModuleInfo, ...]
    token_rows: dict[str, int]  # trained rows of new tokens, by table
    num_experts: int  # that a router weighs for each token; 0 where there is none
    granularity: Granularity | None  # of the router's gates


def describe_adapter(path: Path) -> AdapterInfo:
    """Method, rank, scaling, targets, norms and effective ranks of an adapter, and what it belongs to."""
    opened = open_adapter(path)
    found, tensors = _updates_of(opened), read_adapter_tensors(opened.folder)
    tables = {name: len(update.ids) for name, update in found.items() if isinstance(update, VocabularyRows)}
    updates = {module: update for module, update in found.items() if module not in tables}
    deltas = {module: update for module, update in updates.items() if isinstance(update, Delta)}
    spectrum = {s.module: s for s in spectra({module: delta_svd(delta) for module, delta in deltas.items()})}
    modules = []
    for module in in_model_order(updates):
        stem = f"{PEFT_PREFIX}{module}"
        halves = [tensors.get(f"{stem}.lora_{half}.weight") for half in "AB"]
        norms = [None if half is None else float(half.double().norm()) for half in halves]
        modules.append(
            ModuleInfo(
                module,
                r=opened.config.rank_of(stem),
                scaling=opened.config.scaling_of(stem),
                lora_A_norm=norms[0],
                lora_B_norm=norms[1],
                spectrum=spectrum.get(module),
            )
        )
    targets = opened.config.target_modules
    manifest = opened.manifest
    mixture = form if isinstance(form := opened.config.form, MixtureForm) else None
    return AdapterInfo(
        folder=opened.folder,
        method=opened.method.name,
        r=opened.config.r,
        alpha=float(opened.config.lora_alpha),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets or ())),
        num_params=sum(tensor.numel() for tensor in tensors.values()),
        num_bytes=(opened.folder / WEIGHTS).stat().st_size,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        base=opened.base,
        base_words=opened.base_words,
        step=manifest.get("step"),
        made=manifest.get("made"),
        modules=tuple(modules),
        token_rows=tables,
        num_experts=mixture.num_experts if mixture else 0,
        granularity=mixture.granularity if mixture else None,
    )


def _updates_of(opened: OpenedAdapter) -> dict[str, Update | None]:
    """By module; None throughout where the input decides what an adapter does, so that no update stands for it."""
    if opened.method.merges != "none":
        return {**opened.updates()}
    return dict.fromkeys(split_name(name)[0].removeprefix(PEFT_PREFIX) for name in read_adapter_tensors(opened.folder))


@dataclass(frozen=True)
class MadeAdapter:
    """A folder that a tool has written."""

    folder: Path  # like a run's; the adapter is in `adapter/`
    r: int  # the largest of any module
    ranks: dict[str, int]
    num_params: int
    num_bytes: int
    norm: float  # of the update that was asked for, over all modules
    error_frac: float  # ||asked for - written||_F / ||asked for||_F, measured on what was written
    notices: tuple[str, ...]


@dataclass(frozen=True)
class ResizedAdapter(MadeAdapter):
    """A resized adapter, with what each module lost."""

    expected_error_frac: float  # by the singular values that are dropped
    bound: float | None  # the error that was asked for
    modules: tuple[ResizedModule, ...]


def combine_adapters(
    paths: Sequence[Path],
    target: Path,
    *,
    weights: Sequence[float] | None = None,
    combination_type: CombinationType = "cat",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> MadeAdapter:
    """The weighted sum of adapters of one base; weights may be negative. See `api.adapter_combine` for what it raises.

    `cat` is the sum itself, of rank sum(r_i); with `r` its nearest of rank r. `ties` and `dare` take values out of each
    update first, and need `r` and `density`.
    """
    weights = list(weights) if weights is not None else [1.0] * len(paths)
    _check_combination(paths, weights, combination_type, r, density)
    refuse_existing(target)
    opened = [open_adapter(path) for path in paths]
    notices = refuse_other_bases(opened) + _template_notices(opened)
    sides = [adapter.deltas() for adapter in opened]
    _refuse_other_shapes(opened, sides)
    made: dict[str, Delta] = {}
    norms, errors = [], []
    for position, module in enumerate(in_model_order(dict.fromkeys(name for side in sides for name in side))):
        parts = [(side[module], weight) for side, weight in zip(sides, weights, strict=True) if module in side]
        deltas, own_weights = [delta for delta, _ in parts], [weight for _, weight in parts]
        if combination_type == "cat":
            whole = concatenated(deltas, own_weights)
            made[module] = folded(whole) if r is None else _of_rank(whole, r)
            norms.append(norm(whole))
            errors.append(norm(concatenated([whole, made[module]], [1, -1])))
        else:
            assert r is not None and density is not None
            dense = sparse_sum(deltas, own_weights, combination_type, density, seed, position)
            made[module], error = nearest(dense, r)
            norms.append(float(dense.double().norm()))
            errors.append(error)
    how = {"tool": "combine", "type": combination_type, "r": r, "density": density, "seed": seed}
    publish_adapter(target, opened, made, {**how, "from": _described(opened, weights)})
    return MadeAdapter(**_facts(target, made, norms, errors), notices=tuple(notices))


def resize_adapter(path: Path, target: Path, ask: Ask, *, per_module: bool = False, seed: int = 0) -> ResizedAdapter:
    """An adapter with another rank. See `api.adapter_resize` for what it raises."""
    _check_ask(ask, per_module=per_module)
    refuse_existing(target)
    opened = open_adapter(path)
    result = resized(opened.deltas(), ask, per_module=per_module, seed=seed)
    how = {"tool": "resize", "r": ask.r, "energy": ask.energy, "error": ask.error, "seed": seed}
    publish_adapter(target, [opened], result.deltas, {**how, "from": _described([opened], [1.0])})
    facts = _facts(target, result.deltas, [m.norm for m in result.modules], [m.error for m in result.modules])
    return ResizedAdapter(
        **facts,
        notices=tuple(refuse_other_bases([opened])),
        expected_error_frac=result.expected_error_frac,
        bound=ask.error,
        modules=result.modules,
    )


def fold_adapter(path: Path, target: Path) -> MadeAdapter:
    """The same update as plain LoRA with scaling 1, which every program that knows LoRA computes alike."""
    refuse_existing(target)
    opened = open_adapter(path)
    deltas = opened.deltas()
    made = {module: folded(delta) for module, delta in deltas.items()}
    norms = [norm(delta) for delta in deltas.values()]
    errors = [norm(concatenated([deltas[module], made[module]], [1, -1])) for module in deltas]
    publish_adapter(target, [opened], made, {"tool": "fold", "from": _described([opened], [1.0])})
    return MadeAdapter(**_facts(target, made, norms, errors), notices=tuple(refuse_other_bases([opened])))


@dataclass(frozen=True)
class ModuleDiff:
    """Two updates of one module. An adapter that leaves the module alone has an update of 0 there."""

    module: str
    norms: tuple[float, float]
    distance: float  # ||X - Y||_F
    cosine: float | None  # <X, Y>_F / (||X|| ||Y||); None where one of them is 0
    inputs_overlap: float | None  # phi of all directions that both updates read; None where one of them is 0
    inputs_by_chance: float | None  # of random directions, as many
    outputs_overlap: float | None  # phi of all directions that both updates write
    outputs_by_chance: float | None


@dataclass(frozen=True)
class AdapterDiff:
    """How far two adapters are from each other."""

    paths: tuple[Path, Path]
    norms: tuple[float, float]
    distance: float  # over all modules
    cosine: float | None
    modules: tuple[ModuleDiff, ...]
    notices: tuple[str, ...]

    @property
    def distance_frac(self) -> float:
        """Distance as a share of the larger norm; 0 for the same update, above 1 for opposed ones."""
        larger = max(self.norms)
        return self.distance / larger if larger else 0.0


def diff_adapters(first: Path, second: Path) -> AdapterDiff:
    """Compare two adapters of one base module by module. ModelError where they are of different bases or shapes."""
    opened = [open_adapter(path) for path in (first, second)]
    notices = refuse_other_bases(opened)
    sides = [adapter.deltas() for adapter in opened]
    _refuse_other_shapes(opened, sides)
    rows, products = [], 0.0
    for module in in_model_order({**sides[0], **sides[1]}):
        row, product = _diff_module(module, sides[0].get(module), sides[1].get(module))
        rows.append(row)
        products += product
    norms = (math.hypot(*(row.norms[0] for row in rows)), math.hypot(*(row.norms[1] for row in rows)))
    return AdapterDiff(
        paths=(first, second),
        norms=norms,
        distance=math.hypot(*(row.distance for row in rows)),
        cosine=_cosine(products, norms),
        modules=tuple(rows),
        notices=tuple(notices),
    )


def _diff_module(module: str, first: Delta | None, second: Delta | None) -> tuple[ModuleDiff, float]:
    """The row of a module, and the inner product of both updates."""
    norms = (norm(first) if first else 0.0, norm(second) if second else 0.0)
    if first is None or second is None:
        return ModuleDiff(module, norms, math.hypot(*norms), None, None, None, None, None), 0.0
    product = inner_product(first, second)
    one, other = delta_svd(first), delta_svd(second)
    sizes = one.numerical_rank, other.numerical_rank
    shared: list[float | None] = []
    for x, y in ((one.right_IK, other.right_IK), (one.left_OK, other.left_OK)):
        found = similarity(x[:, : sizes[0]], y[:, : sizes[1]])[-1, -1] if min(sizes) else None
        shared += [None, None] if found is None else [float(found), baseline(*sizes, x.shape[0])]
    distance = norm(concatenated([first, second], [1, -1]))
    return ModuleDiff(module, norms, distance, _cosine(product, norms), *shared), product


def _cosine(product: float, norms: tuple[float, float]) -> float | None:
    return max(-1.0, min(1.0, product / (norms[0] * norms[1]))) if all(norms) else None


def _of_rank(delta: Delta, r: int) -> Delta:
    """The nearest update of rank r; all of it where it has no more."""
    return folded(delta) if delta.lora_A.shape[0] <= r else delta_svd(delta).truncated(r)


def _facts(target: Path, made: Mapping[str, Delta], norms: Sequence[float], errors: Sequence[float]) -> dict[str, Any]:
    """What is told of a written adapter."""
    ranks = {module: delta.lora_A.shape[0] for module, delta in made.items()}
    whole = math.hypot(*norms)
    return {
        "folder": target,
        "r": max(ranks.values()),
        "ranks": ranks,
        "num_params": sum(delta.lora_A.numel() + delta.lora_B.numel() for delta in made.values()),
        "num_bytes": (target / "adapter" / WEIGHTS).stat().st_size,
        "norm": whole,
        "error_frac": math.hypot(*errors) / whole if whole else 0.0,
    }


def _described(opened: Sequence[OpenedAdapter], weights: Sequence[float]) -> list[dict[str, Any]]:
    """The sources as the new adapter's manifest names them."""
    return [
        {"path": str(a.folder.absolute()), "weight": weight, "sha256": sha256_file(a.folder / WEIGHTS)}
        for a, weight in zip(opened, weights, strict=True)
    ]


def _template_notices(opened: Sequence[OpenedAdapter]) -> list[str]:
    """Adapters of one base may have seen other prompts; the combined one is used with those of the first."""
    first = next((a for a in opened if a.binding), None)
    notices = []
    for other in opened:
        for key, what in (("template", "chat template"), ("tokenizer", "tokenizer")):
            if first and other.binding and other.binding.get(key) != first.binding.get(key):  # type: ignore[union-attr]
                notices.append(f"{other.path} was trained with another {what}; that of {first.path} is kept")
    return notices


def _refuse_other_shapes(opened: Sequence[OpenedAdapter], sides: Sequence[Mapping[str, Delta]]) -> None:
    """ModelError for a module that two adapters know in different sizes."""
    for adapter, side in zip(opened[1:], sides[1:], strict=True):
        for module in sorted(side.keys() & sides[0].keys()):
            if side[module].shape != sides[0][module].shape:
                raise ModelError(
                    f"{module} is {sides[0][module].shape} in {opened[0].path} and {side[module].shape} in "
                    f"{adapter.path}",
                    fix="use adapters of one base",
                )


def _check_combination(
    paths: Sequence[Path], weights: Sequence[float], combination_type: str, r: int | None, density: float | None
) -> None:
    """RecipeError for arguments that do not go together."""
    if len(paths) < 2 and list(weights) == [1.0]:
        raise RecipeError("one adapter alone is no combination", fix="name two or more, or give it a weight")
    if len(weights) != len(paths):
        raise RecipeError(
            f"{len(paths)} adapters and {len(weights)} weights", fix="give --weight once for each adapter, in order"
        )
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise RecipeError("weights must be finite, and not all 0", fix="give numbers, such as 0.5 or -1")
    if r is not None and not 1 <= r <= MAX_RANK:
        raise RecipeError(f"--r is {r}; a rank is from 1 to {MAX_RANK:,}", fix="give another rank")
    if combination_type == "cat":
        if density is not None:
            raise RecipeError("--density means nothing to cat", fix="remove it, or add --type ties or --type dare")
        return
    if combination_type not in COMBINATION_TYPES:
        raise RecipeError(f"--type is {combination_type!r}", fix=f"one of {', '.join(COMBINATION_TYPES)}")
    if density is None or not 0 < density <= 1:
        what = "the share of values that stay, above 0 and up to 1"
        raise RecipeError(f"--type {combination_type} needs --density, {what}", fix="add --density 0.2")
    if r is None:
        raise RecipeError(
            f"--type {combination_type} makes an update of full rank; --r says what it is brought back to",
            fix="add --r, such as the sum of the ranks",
        )


def _check_ask(ask: Ask, *, per_module: bool) -> None:
    """RecipeError unless exactly one size is asked for, within its limits."""
    given = {"--r": ask.r, "--energy": ask.energy, "--error": ask.error}
    if sum(value is not None for value in given.values()) != 1:
        raise RecipeError("resize needs exactly one of --r, --energy and --error", fix="give one of them")
    if ask.r is not None and not 1 <= ask.r <= MAX_RANK:
        raise RecipeError(f"--r is {ask.r}; a rank is from 1 to {MAX_RANK:,}", fix="give another rank")
    if ask.r is not None and per_module:
        raise RecipeError("--r is one rank for all modules", fix="remove --per-module, or ask by --energy or --error")
    for option, value in (("--energy", ask.energy), ("--error", ask.error)):
        if value is not None and not 0 < value <= 1:
            raise RecipeError(f"{option} is {value:g}; it is a share, above 0 and up to 1", fix="such as 0.95 or 0.1")
