"""An adapter as the tools take it: a run, a checkpoint or a folder of PEFT's; and the folder they leave.

What they leave is laid out like a run: `adapter/` in PEFT's format beside the facts that it was trained with, so that
`chat`, `eval`, `export`, `analyze` and `adapter.init_from` take it as they take any run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file

from qlora_train.adapters.config import AdapterConfig
from qlora_train.adapters.fold import Delta, Update, read_deltas, read_updates
from qlora_train.adapters.forms.offset import START, OffsetForm, ResidualForm
from qlora_train.adapters.inits.residual import Taken, read_taken
from qlora_train.adapters.state import CONFIG, MAX_RANK, WEIGHTS, load_adapter_config
from qlora_train.adapters.updates import RowDelta
from qlora_train.artifacts.files import write_file
from qlora_train.artifacts.folders import MANIFEST, appearing, publishing, read_manifest
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import ModelError, RecipeError
from qlora_train.model.binding import check_published, read_base, read_binding, refuse_changed_recipe
from qlora_train.names import PEFT_PREFIX
from qlora_train.recipe.load import LoadedRecipe, load_resolved, resolved_yaml
from qlora_train.recipe.methods import METHODS, Method
from qlora_train.recipe.schema import AdapterSection, Recipe


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter folder that verifies, and the run that it lies in, where it does."""

    path: Path  # as it was named
    folder: Path  # that holds the adapter's files
    config: AdapterConfig
    binding: dict[str, Any] | None  # what it belongs to; None for a folder that does not say
    run_dir: RunDir | None
    recipe: Recipe | None  # of the run

    @property
    def method(self) -> Method:
        """Its row of the method table. A folder that plain PEFT can load does not say; its run does."""
        return self.config.method if self.recipe is None else METHODS[self.recipe.adapter.method]

    @property
    def base(self) -> str | None:
        """The digest of the base that it belongs to."""
        return self.binding["base"] if self.binding else None

    @property
    def base_words(self) -> str:
        """Which base that is, for people."""
        digest = f"base {self.base[:16]}" if self.base else "no base that it proves"
        if self.recipe is None:
            named = self.config.base_model_name_or_path
            return f"{digest} ({named})" if named else digest
        return f"{digest} ({self.recipe.model.path}, {self.recipe.quant.quant_type})"

    @property
    def manifest(self) -> dict[str, Any]:
        """What its manifest says; empty where it has none."""
        return read_manifest(self.folder) if self.binding else {}

    def updates(self) -> dict[str, Update]:
        """Its updates by module. Holds all of its tensors."""
        return {name.removesuffix(".weight"): update for name, update in read_updates(self.folder).items()}

    def changes(self, starts: Mapping[str, Taken] | None = None) -> dict[str, Update]:
        """What training changed, by module, as factors where it is of low rank: embeddings too, and of rank 2 r where
        A and B began away from zero: as the folder says, or as `starts` does, by parameter of the base."""
        taken, updates = read_taken(self.folder) | dict(starts or {}), self.updates()
        return {module: _trained_part(update, taken.get(f"{module}.weight")) for module, update in updates.items()}

    def deltas(self) -> dict[str, Delta]:
        """Its updates as factors, by module. ModelError for a method that has none."""
        return {name.removesuffix(".weight"): delta for name, delta in read_deltas(self.folder).items()}


def _trained_part(update: Update, taken: Taken | None) -> Update:
    if isinstance(update, RowDelta):  # s (B A)^T = s A^T B^T
        return Delta(update.embedding_B.T, update.embedding_A.T, update.scaling)
    if taken is None or not isinstance(update, Delta):
        return update
    start = dict(zip(START, (taken.factors.lora_A, taken.factors.lora_B), strict=True))
    factors = OffsetForm().factors({"lora_A": update.lora_A, "lora_B": update.lora_B, **start})
    return Delta(*factors, update.scaling)


def open_adapter(path: Path) -> OpenedAdapter:
    """The adapter of a run, of a checkpoint, or in a folder of PEFT's. ModelError where there is none, or not whole."""
    folder, run_dir = _locate(path)
    config = load_adapter_config(folder)
    if not (folder / MANIFEST).exists():
        return OpenedAdapter(path, folder, config, None, None, None)
    check_published(folder)
    binding = read_binding(folder)
    if run_dir is None:
        return OpenedAdapter(path, folder, config, binding, None, None)
    recipe = load_resolved(run_dir.recipe)
    refuse_changed_recipe(run_dir, recipe, binding)
    base_print, _ = read_base(run_dir)
    if base_print.digest != binding["base"]:
        raise ModelError(
            f"{run_dir.base} describes the base {base_print.digest[:16]}, and the adapter was trained on "
            f"{binding['base'][:16]}",
            fix="restore the run folder as it was",
        )
    return OpenedAdapter(path, folder, config, binding, run_dir, recipe)


def _locate(path: Path) -> tuple[Path, RunDir | None]:
    """The adapter's folder, and the run that it lies in."""
    if (path / CONFIG).is_file():
        absolute = path.absolute()
        root = absolute.parent if absolute.name == "adapter" else absolute.parent.parent
        run_dir = RunDir(root)
        return path, run_dir if run_dir.recipe.is_file() and run_dir.base.is_file() else None
    run_dir = RunDir(path)
    if not run_dir.recipe.is_file():
        raise ModelError(
            f"{path} is neither a run folder nor an adapter: it holds no {run_dir.recipe.name} and no {CONFIG}",
            fix="name a run.dir, one of its checkpoints, or a folder that PEFT saved",
        )
    if not run_dir.adapter.is_dir():
        raise ModelError(f"{path} holds no finished adapter yet", fix=f"name a checkpoint in {run_dir.checkpoints}")
    return run_dir.adapter, run_dir


def refuse_other_bases(opened: Sequence[OpenedAdapter]) -> list[str]:
    """ModelError where two adapters belong to different bases, naming both; a notice for each that does not say."""
    bound = [adapter for adapter in opened if adapter.base]
    for other in bound[1:]:
        if other.base != bound[0].base:
            raise ModelError(
                f"{bound[0].path} belongs to {bound[0].base_words}, and {other.path} to {other.base_words}: an update "
                "means something on its own base only",
                fix="use adapters that were trained on one base, in one quantisation",
            )
    return [
        f"{adapter.path} does not prove which base it was trained on; only names and shapes are compared"
        for adapter in opened
        if not adapter.base
    ]


def refuse_existing(target: Path) -> None:
    """Nothing is written over."""
    if target.exists() or target.is_symlink():
        raise RecipeError(f"{target} exists already", fix="choose another folder; it was not touched")


def publish_adapter(
    target: Path, sources: Sequence[OpenedAdapter], deltas: Mapping[str, Delta], made: Mapping[str, Any]
) -> None:
    """Write plain LoRA made of `sources` as a folder like a run's; it appears whole or not at all.

    The facts (recipe, base, data, chat template) are those of the first source that has any; `made` says in the
    adapter's manifest how it came about. Every delta has scaling 1.

    ModelError for a source whose own start changed its base: only that start rebuilds the base, so nothing else can.
    """
    refuse_existing(target)
    for source in sources:
        if isinstance(source.config.form, ResidualForm):
            raise ModelError(
                f"{source.path}: {source.method.title} took a part of the base into its start, and only its own "
                "recipe rebuilds that base",
                fix="export the run: the merged model needs no start",
            )
    config = _peft_config(sources, deltas)
    first = next((source for source in sources if source.run_dir), None)
    bound = first or next((source for source in sources if source.binding), None)
    with appearing(target.absolute()) as folder:
        adapter = folder / RunDir(folder).adapter.name
        if bound is None or bound.binding is None:
            adapter.mkdir()
            _write_tensors(adapter, config, deltas)
            return
        binding = dict(bound.binding)
        if first is not None:
            assert first.run_dir is not None and first.recipe is not None
            recipe = _plain_recipe(first.recipe, config, target)
            binding["recipe"] = _bound_recipe(binding.get("recipe"), recipe)
            _copy_facts(first, folder, recipe)
        step = {"step": bound.manifest["step"]} if "step" in bound.manifest else {}
        with publishing(adapter, manifest={**step, **binding, "made": dict(made)}) as temporary:
            _write_tensors(temporary, config, deltas)


def _peft_config(sources: Sequence[OpenedAdapter], deltas: Mapping[str, Delta]) -> LoraConfig:
    """One rank for all, and a pattern for the modules that have another. The scaling is 1 everywhere.

    PEFT reads the names of a pattern as regular expressions: dots are escaped.
    """
    ranks = {module: delta.lora_A.shape[0] for module, delta in deltas.items()}
    r = max(ranks.values())
    if r > MAX_RANK:
        raise ModelError(f"the rank would be {r:,}; the limit is {MAX_RANK:,}", fix="ask for a smaller one: --r")
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=sources[0].config.lora_dropout,
        target_modules=_targets(sources, deltas),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=sources[0].config.base_model_name_or_path,
        inference_mode=True,
    )


def _targets(sources: Sequence[OpenedAdapter], deltas: Mapping[str, Delta]) -> list[str] | str:
    """What names exactly these modules: the targets of a source that has them all, else every module in full.

    A list of last names could match modules of other layers, which PEFT would then fill with fresh factors.
    """
    for source in sources:
        if source.deltas().keys() == deltas.keys():
            targets = source.config.target_modules
            return targets if isinstance(targets, str) else sorted(targets or ())
    return sorted(deltas)


def _write_tensors(folder: Path, config: LoraConfig, deltas: Mapping[str, Delta]) -> None:
    tensors = {}
    for module, delta in deltas.items():
        assert delta.scaling == 1, module
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = delta.lora_A.contiguous()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = delta.lora_B.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _plain_recipe(recipe: Recipe, config: LoraConfig, target: Path) -> Recipe:
    """The recipe with the section of a plain LoRA of this rank."""
    section = AdapterSection(
        method="lora",
        r=config.r,
        alpha=config.lora_alpha,
        dropout=recipe.adapter.dropout,
        target_modules=recipe.adapter.target_modules,
    )
    run = recipe.run.model_copy(update={"dir": target.absolute()})
    return recipe.model_copy(update={"adapter": section, "run": run})


def _bound_recipe(bound: Any, recipe: Recipe) -> dict[str, Any]:
    """The keys that an adapter is bound by, with the new section of the adapter."""
    adapter = {f"adapter.{key}": value for key, value in recipe.adapter.model_dump(mode="json").items()}
    return {key: adapter.get(key, value) for key, value in (bound if isinstance(bound, dict) else {}).items()}


def _copy_facts(source: OpenedAdapter, folder: Path, recipe: Recipe) -> None:
    """What eval, chat and export read of a run besides its adapter."""
    assert source.run_dir is not None
    there, here = source.run_dir, RunDir(folder)
    origin = str(there.recipe)
    keys = [f"{section}.{key}" for section, values in recipe.model_dump(mode="json").items() for key in values]
    origins = {key: "qlora-train adapter" if key.startswith(("adapter.", "run.dir")) else origin for key in keys}
    write_file(here.recipe, resolved_yaml(LoadedRecipe(recipe, there.recipe, origins)).encode())
    for old, new in (
        (there.base, here.base),
        (there.data, here.data),
        (there.environment, here.environment),
        (there.chat_template, here.chat_template),
    ):
        if old.is_file():
            write_file(new, old.read_bytes())
