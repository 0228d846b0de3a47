"""PEFT's config of an adapter that also knows its row of the method table and the row's form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from qlora_train.adapters.forms.base import Form
from qlora_train.adapters.forms.registry import FORMS
from qlora_train.adapters.module_names import is_named
from qlora_train.recipe.methods import METHODS, Method
from qlora_train.recipe.schema import AdapterSection


class AdapterConfig(LoraConfig):
    """A LoraConfig with a method. PEFT's fields alone are PEFT's; what is ours is written as a tag by `state`."""

    method: Method
    options: dict[str, Any]
    form: Form

    @property
    def token_ids(self) -> frozenset[int]:
        """Tokens of which rows are trained, in the embedding or the head."""
        found = self.trainable_token_indices or []
        lists = found.values() if isinstance(found, dict) else [found]
        return frozenset(number for ids in lists for number in ids)

    def token_ids_of(self, module: str) -> list[int]:
        """Those of one table, by the order of its trained rows."""
        found = self.trainable_token_indices or ()
        if not isinstance(found, dict):
            return list(found)
        return next((ids for name, ids in found.items() if is_named(module, [name])), [])

    def rank_of(self, module: str) -> int:
        """The rank at one module: that of `rank_pattern` where it names it."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        """The factor on B A at one module."""
        r, alpha = self.rank_of(module), float(_by_pattern(self.alpha_pattern, module, self.lora_alpha))
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def build_config(method: Method, options: Mapping[str, Any], **fields: Any) -> AdapterConfig:
    """The config of a method; `options` are the values of its own keys, `fields` PEFT's."""
    config = AdapterConfig(
        use_rslora=method.use_rslora, use_dora=method.form == "dora", bias="none", task_type="CAUSAL_LM", **fields
    )
    config.method, config.options = method, dict(options)
    config.form = FORMS[method.form](options)
    return config


def section_config(section: AdapterSection) -> AdapterConfig:
    """The config that a recipe asks for."""
    targets = section.target_modules
    return build_config(
        METHODS[section.method],
        section_options(section),
        r=section.r,
        lora_alpha=section.alpha,  # PEFT computes with it and stores it as it is
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def section_options(section: AdapterSection) -> dict[str, Any]:
    """The values of the method's own keys, as JSON has them."""
    values = section.model_dump(mode="json")
    return {key: values[key] for key in METHODS[section.method].options}


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As PEFT looks it up: the first pattern that is the module's name or ends it after a dot."""
    for pattern, value in patterns.items():
        name = re.sub(r"\\(.)", r"\1", pattern)
        if is_named(module, [name]):
            return value
    return default
