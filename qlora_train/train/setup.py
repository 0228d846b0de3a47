"""From a recipe to the loop's job: data, then the base in 4 bit, then the adapter; each checked before the next."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from qlora_train.adapters.attach import AdapterFacts, adapter_facts, attach_adapter
from qlora_train.adapters.state import load_adapter_config
from qlora_train.artifacts import RunDir
from qlora_train.data.account import build_loader
from qlora_train.data.split import Split, load_splits
from qlora_train.errors import MachineError
from qlora_train.model.attention import check_packable
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import Base, add_end_tokens, load_recipe_base, resolve_device
from qlora_train.model.skeleton import (
    build_skeleton,
    check_length,
    check_shapes,
    check_skipped,
    check_targets,
    check_vocabulary,
    load_config,
    load_tokenizer,
)
from qlora_train.model.source import Source, resolve_source
from qlora_train.recipe.schema import Recipe
from qlora_train.train.loop import Job
from qlora_train.train.metrics import Reporter
from qlora_train.train.optim import build_optimizer, check_optimizer
from qlora_train.train.speed import Speed, settle_speed
from qlora_train.train.state import Binding, trajectory_keys


@dataclass(frozen=True)
class Inputs:
    """What can be known without weights: checked by `qlora-train check`, and by training before anything is loaded."""

    source: Source
    config: Any
    tokenizer: Any
    skeleton: torch.nn.Module
    train: Split
    eval: Split | None


@dataclass(frozen=True)
class Prepared:
    """A job, and the facts about it that the run folder keeps."""

    inputs: Inputs
    base: Base
    facts: AdapterFacts
    speed: Speed
    job: Job


def refuse_many_processes() -> None:
    """One process for now: several would each train the whole set and overwrite each other."""
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise MachineError(f"WORLD_SIZE is {count}: training uses one process", fix="start it without torchrun")


def load_inputs(recipe: Recipe, *, weights: bool = True) -> Inputs:
    """Config, tokenizer and data, checked against each other and the recipe."""
    device = resolve_device(recipe.model.device)
    check_optimizer(recipe.train, device)
    source = resolve_source(recipe.model, weights=weights)
    config = load_config(source)
    check_length(config, recipe.data.seq_len)
    tokenizer = load_tokenizer(source, recipe.model.chat_template)
    skeleton = build_skeleton(config)
    if recipe.data.batching == "packed":
        check_packable(skeleton)
    check_targets(skeleton, recipe.adapter.target_modules)
    if recipe.quant.quant_type != "none":
        check_skipped(skeleton, recipe.quant.skip_modules)
        if device.type == "cpu":
            check_shapes(skeleton, recipe.quant.block_size)
    if recipe.adapter.init_from is not None:
        load_adapter_config(recipe.adapter.init_from)
    train, held_out = load_splits(recipe, tokenizer)
    for split in (train, held_out):
        if split is not None:
            check_vocabulary(split.largest_id, config)
    return Inputs(source, config, tokenizer, skeleton, train, held_out)


def prepare(recipe: Recipe, run_dir: RunDir, reporter: Reporter) -> Prepared:
    """Load everything. Nothing is written."""
    refuse_many_processes()
    inputs = load_inputs(recipe)
    for split in (inputs.train, inputs.eval):
        if split is not None:
            reporter.message(split.audit.summary())
    base = load_recipe_base(inputs.source, recipe)
    CausalModel(base.model).check_head()
    add_end_tokens(base.model, inputs.train.end_token_ids)
    model = attach_adapter(
        base.model, recipe.adapter, recipe.run.seed, base_name=inputs.source.name, fused=recipe.train.fused
    )
    causal = CausalModel(model)
    facts = adapter_facts(model)
    loader = build_loader(recipe, inputs.train, inputs.tokenizer.pad_token_id)
    speed = settle_speed(recipe, causal, inputs.train.table, loader, facts.num_frozen, base.compute_dtype)
    # accelerate keeps the first device of a process for ever; a second run of a notebook may want another.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=base.device.type == "cpu", mixed_precision="no")
    job = Job(
        recipe=recipe,
        run_dir=run_dir,
        causal=causal,
        model=model,
        optimizer=build_optimizer(model, recipe.train),
        accelerator=accelerator,
        loader=loader,
        eval_table=inputs.eval.table if inputs.eval else None,
        pad_token_id=inputs.tokenizer.pad_token_id,
        binding=_binding(recipe, inputs, base, compiled=speed.compiled),
        reporter=reporter,
    )
    return Prepared(inputs, base, facts, speed, job)


def _binding(recipe: Recipe, inputs: Inputs, base: Base, *, compiled: bool) -> Binding:
    """What a checkpoint of this run belongs to. The token table holds all that the files, the template and the
    tokenizer did to the rows; the template's own hash is for the message."""
    template = json.dumps([inputs.tokenizer.chat_template, len(inputs.tokenizer), inputs.tokenizer.eos_token_id])
    return Binding(
        base=base.print.digest,
        data=inputs.train.table.fingerprint(),
        template=hashlib.sha256(template.encode()).hexdigest(),
        recipe={**trajectory_keys(recipe), "layers compiled": compiled},
    )
