"""What the loop works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from qlora_train.adapters.hooks import NO_HOOKS, MethodHooks
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.loader import Loader
from qlora_train.data.table import TokenTable
from qlora_train.model.causal import CausalModel
from qlora_train.recipe.schema import Recipe
from qlora_train.train.last_steps import LastSteps
from qlora_train.train.metrics import Reporter
from qlora_train.train.state import Binding


@dataclass(frozen=True)
class Job:
    """What the loop works on; built by `train.setup`, never changed."""

    recipe: Recipe
    run_dir: RunDir
    causal: CausalModel
    model: PeftModel
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    loader: Loader
    table: TokenTable  # of the training rows
    eval_table: TokenTable | None
    tokenizer: Any
    binding: Binding
    environment: Mapping[str, Any]  # what the machine computes with: fork.environment_changes compares it
    reporter: Reporter
    last_steps: LastSteps
    hooks: MethodHooks = NO_HOOKS

    @property
    def pad_token_id(self) -> int:
        """What padding is filled with."""
        return int(self.tokenizer.pad_token_id)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.loader.num_steps(self.recipe.train.epochs, self.recipe.train.max_steps)
