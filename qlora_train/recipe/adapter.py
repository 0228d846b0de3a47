"""What is wrong in the section `adapter` alone: keys that its method does not read, and values it cannot use."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from qlora_train.errors import Problem
from qlora_train.recipe.methods import METHODS, OPTIONS
from qlora_train.recipe.origins import Origins, at, is_given, place_of
from qlora_train.recipe.schema import AdapterSection, Recipe


def check_method(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A method that the table lacks."""
    name = recipe.adapter.method
    if name not in METHODS:
        close = get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]}? " if close else ""
        fix += f"The methods are: {', '.join(METHODS)}"
        yield Problem(f"adapter.method: '{name}' is not a known method", fix, place_of(origins, "adapter.method"))


def check_method_keys(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """Keys of the adapter that its method does not read."""
    name = recipe.adapter.method
    if name not in METHODS:
        return
    for key in AdapterSection.model_fields:
        dotted = f"adapter.{key}"
        if key in METHODS[name].reads or not is_given(origins, dotted):
            continue
        readers = OPTIONS.get(key) or [other for other, method in METHODS.items() if key in method.reads]
        what = f"{dotted} has no effect: adapter.method is {name} ({at(origins, 'adapter.method')})"
        yield Problem(what, f"remove {key}; it belongs to {', '.join(readers)}", place_of(origins, dotted))


def check_rule(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """LoRA-Pro's moments of whole weights are float32, whatever the optimiser's are."""
    adapter, optimizer = recipe.adapter, recipe.train.optimizer
    if adapter.method == "lora_pro" and adapter.rule_mode == "full" and optimizer != "adamw":
        what = (
            f"train.optimizer: {optimizer} has no effect: adapter.rule_mode is full "
            f"({at(origins, 'adapter.rule_mode')}), which keeps moments of its own"
        )
        yield Problem(what, "remove optimizer, or set rule_mode to factor", place_of(origins, "train.optimizer"))


def check_start(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """What A and B hold besides an update, where zero factors are not the base: decay and dropout would take it away,
    and on the original weights it does not belong."""
    adapter, decay = recipe.adapter, recipe.train.weight_decay
    if adapter.method not in METHODS or METHODS[adapter.method].zero_is_base:
        return
    method = METHODS[adapter.method]
    named = f"adapter.method: {adapter.method} ({at(origins, 'adapter.method')})"
    if decay:
        what = f"train.weight_decay: {decay:g} pulls A and B towards zero, and {named} starts them elsewhere"
        fix = "remove weight_decay: it would undo the start"
        yield Problem(what, fix, place_of(origins, "train.weight_decay"))
    if adapter.dropout and method.form in ("residual", "loftq"):
        what = f"adapter.dropout: {adapter.dropout:g} drops parts of the weights: {named} keeps them in A and B"
        yield Problem(what, "remove dropout", place_of(origins, "adapter.dropout"))
    if method.start == "loftq" and recipe.export.base != "dequantized":
        what = (
            f"export.base: {recipe.export.base} adds a correction of the quantisation error to weights that have none: "
            f"{named} holds it in A and B"
        )
        yield Problem(what, "set export.base: dequantized", place_of(origins, "export.base"))


def check_experts(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A mixture of fewer than two adapters. Whether their folders are there is seen when the run begins."""
    adapter = recipe.adapter
    if adapter.method not in METHODS or "experts" not in METHODS[adapter.method].options:
        return
    if len(set(adapter.experts)) < 2:
        what = f"adapter.experts names {len(set(adapter.experts))} adapters: there is nothing to choose between"
        place = place_of(origins, "adapter.experts") or place_of(origins, "adapter.method")
        fix = "name the folders of two or more finished adapters: [runs/a/adapter, runs/b/adapter]"
        yield Problem(what, fix, place)


def check_new_tokens(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """New tokens given twice, with white space at an end, or beside the embedding's own adapter."""
    adapter, where = recipe.adapter, place_of(origins, "adapter.new_tokens")
    for text in dict.fromkeys(adapter.new_tokens):
        if adapter.new_tokens.count(text) > 1:
            yield Problem(f"adapter.new_tokens: {text!r} is given twice", "keep one of them", where)
        if text != text.strip():
            what = f"adapter.new_tokens: {text!r} begins or ends with white space"
            yield Problem(what, "name the token alone", where)
    if adapter.new_tokens and adapter.embeddings:
        what = f"adapter.new_tokens: adapter.embeddings ({at(origins, 'adapter.embeddings')}) adapts the same rows"
        yield Problem(what, "keep one of the two", where)


def check_schedule(recipe: Recipe, origins: Origins) -> Iterator[Problem]:
    """A target that is missing or no reduction, and a window without steps."""
    adapter = recipe.adapter
    if adapter.method not in METHODS or METHODS[adapter.method].schedule is None:
        return
    if "target_r" in METHODS[adapter.method].options:
        if adapter.target_r is None:
            what = f"adapter.target_r is missing, and adapter.method is {adapter.method}"
            yield Problem(what, f"give it, below adapter.r ({adapter.r})", place_of(origins, "adapter.method"))
        elif adapter.target_r >= adapter.r:
            what = (
                f"adapter.target_r: {adapter.target_r} is not below adapter.r, {adapter.r} "
                f"({at(origins, 'adapter.r')}): there is nothing to give up"
            )
            yield Problem(what, "raise adapter.r to 1.5 x target_r", place_of(origins, "adapter.target_r"))
    if "schedule_end_frac" in METHODS[adapter.method].options:
        shares = adapter.schedule_start_frac + adapter.schedule_end_frac
        if shares >= 1:
            what = f"adapter.schedule_start_frac + schedule_end_frac is {shares:g}: no step is left between them"
            yield Problem(what, "lower one of them", place_of(origins, "adapter.schedule_end_frac"))


ADAPTER_CHECKS = (check_method, check_method_keys, check_new_tokens, check_start, check_schedule, check_experts)
