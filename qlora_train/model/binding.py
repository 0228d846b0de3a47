"""What an adapter belongs to: the base, tokenizer, template and recipe of its training, proven before it is used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from qlora_train.adapters.state import load_adapter_config
from qlora_train.artifacts.folders import MANIFEST, manifest_faults
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import ModelError
from qlora_train.quant.fingerprint import BasePrint
from qlora_train.recipe.schema import Recipe
from qlora_train.recipe.split import split_as_stored
from qlora_train.untrusted import read_json_object, refuse_links_out, refuse_pickles

MAX_BASE_BYTES = 256 * 2**20  # a line of 200 bytes for each tensor
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_published(folder: Path) -> None:
    """Refuse a folder of ours that is not what its manifest says; SecurityError where a pickle was put into it."""
    refuse_links_out(folder)
    refuse_pickles(sorted(folder.iterdir()), str(folder))
    if faults := manifest_faults(folder):
        raise ModelError(f"{folder}: {'; '.join(faults)}", fix="restore the folder, or train again")


def read_binding(folder: Path) -> dict[str, Any]:
    """What an adapter or a checkpoint belongs to: fingerprints of base, data, tokenizer, template, and its recipe."""
    manifest = read_json_object(folder / MANIFEST)
    binding = manifest.get("binding", manifest)
    if not isinstance(binding, dict) or not isinstance(binding.get("base"), str):
        raise ModelError(f"{folder / MANIFEST} does not say which base it belongs to", fix="restore the folder")
    return binding


def refuse_changed_recipe(run_dir: RunDir, recipe: Recipe, binding: dict[str, Any]) -> None:
    """What the adapter was trained with is in its manifest too; the file beside it must not tell another story."""
    bound = binding.get("recipe")
    if not isinstance(bound, dict):
        return
    sections = split_as_stored(recipe, bound).model_dump(mode="json")
    differing = []
    for dotted, then in bound.items():
        section, _, key = dotted.partition(".")
        if key in sections.get(section, ()) and sections[section][key] != then:
            differing.append(f"{dotted} is {sections[section][key]}, and was {then} in training")
    if differing:
        raise ModelError(
            f"{run_dir.recipe} is not the recipe that the adapter was trained with: {'; '.join(differing)}",
            fix="restore the file",
        )


def read_base(run_dir: RunDir) -> tuple[BasePrint, str | None]:
    """The fingerprint of a run's base, and the commit that it was taken from."""
    data = read_json_object(run_dir.base, max_bytes=MAX_BASE_BYTES)
    try:
        commit = data["source"]["commit"]
        if commit is not None and not _COMMIT.fullmatch(commit):
            raise ValueError("the commit is none")
        return BasePrint.from_dict(data), commit
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{run_dir.base} is no fingerprint of a base ({type(error).__name__}: {error})", fix="restore the file"
        ) from None


def check_start(adapter: Path) -> None:
    """Refuse an adapter to go on from (`adapter.init_from`) that is damaged or not plain LoRA; no weights are read."""
    load_adapter_config(adapter)
    if (adapter / MANIFEST).exists():
        check_published(adapter)


def refuse_other_start(adapter: Path, base: BasePrint) -> str | None:
    """ModelError when an adapter to go on from was trained on another base; a notice where it does not say on which."""
    if not (adapter / MANIFEST).exists():
        named = load_adapter_config(adapter).base_model_name_or_path or "nothing"
        return (
            f"adapter.init_from: {adapter} does not prove which base it was trained on (it names {named}): only names "
            "and shapes of its tensors are compared with this one"
        )
    if (then := read_binding(adapter)["base"]) == base.digest:
        return None
    try:
        trained_on, _ = read_base(RunDir(adapter.parent if adapter.name == "adapter" else adapter.parent.parent))
    except ModelError:
        trained_on = None
    if trained_on is not None and trained_on.digest == then:
        refuse_other_base(trained_on, base)
    raise ModelError(
        f"adapter.init_from: {adapter} was trained on base {then[:16]}, this base is {base.digest[:16]}",
        fix="use the model and the quant section of that run; to go on with another base all the same, copy "
        "adapter_config.json and adapter_model.safetensors into a folder of their own",
    )


def refuse_other_shape(trained_on: BasePrint, skeleton: nn.Module) -> None:
    """ModelError unless a model has the parameters of the base that was trained on, by name and shape."""
    here = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    there = {name: tensor.shape for name, tensor in trained_on.tensors.items()}
    if differing := sorted(name for name in {*here, *there} if here.get(name) != there.get(name)):
        first = differing[0]
        raise ModelError(
            f"the base is not the one that was trained on: {len(differing)} tensors differ, first {first}, which is "
            f"{here.get(first, 'absent')} here and was {there.get(first, 'absent')} there",
            fix="restore the model that the run was trained on",
        )


def refuse_other_base(trained_on: BasePrint, here: BasePrint) -> None:
    """ModelError naming the first differing tensor when a base is not the one an adapter was trained on."""
    if trained_on.digest == here.digest:
        return
    names = sorted(set(trained_on.tensors) | set(here.tensors))
    differing = [n for n in names if trained_on.tensors.get(n) != here.tensors.get(n)]
    # One that only one side has says most.
    differing.sort(key=lambda n: n in trained_on.tensors and n in here.tensors)
    raise ModelError(
        f"the adapter was trained on base {trained_on.digest[:16]}, this base is {here.digest[:16]}: "
        f"{len(differing)} of {len(names)} tensors differ, first {differing[0] if differing else names[0]}",
        fix="use the model, quantisation and kind of device of the run (quantisers may differ between CPU and GPU)",
    )
