"""From a recipe to the loop's job: data, then the base in 4 bit, then the adapter; each checked before the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from qlora_train.adapters.attach import AdapterFacts, adapter_facts, attach_adapter
from qlora_train.adapters.schedules import method_hooks
from qlora_train.adapters.tokens import NewTokens, indices_for
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.account import build_loader, steps_notice
from qlora_train.data.loader import Loader, eval_batches
from qlora_train.data.split import Split, load_splits
from qlora_train.environment import environment
from qlora_train.errors import Collected, MachineError, is_out_of_memory
from qlora_train.memory.budget import check_resident
from qlora_train.memory.estimate import Request, Shallow
from qlora_train.memory.meta import device_kind
from qlora_train.model.attention import check_packable
from qlora_train.model.binding import check_start, refuse_other_start
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import stored_tensors
from qlora_train.model.load import Base, add_end_tokens, check_attention, load_recipe_base, resolve_device
from qlora_train.model.lord import low_rank_source, planned_config
from qlora_train.model.low_rank import with_factors
from qlora_train.model.skeleton import (
    build_skeleton,
    check_length,
    check_rotary,
    check_skipped,
    check_targets,
    check_vocabulary,
    check_widths,
    load_config,
    load_tokenizer,
    template_digest,
    tokenizer_digest,
)
from qlora_train.model.source import Source, resolve_source, verify_download
from qlora_train.model.start import (
    first_batches,
    probe_batches,
    rebuild,
    start_again,
    start_from_gradients,
    start_from_inputs,
    start_from_weights,
)
from qlora_train.model.tokens import LOOKED_AT, add_new_tokens, unused_tokens
from qlora_train.model.tokens import describe as describe_tokens
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import Recipe
from qlora_train.recipe.split import with_split
from qlora_train.train.disk import refuse_full_disk
from qlora_train.train.job import Job
from qlora_train.train.keys import trajectory_keys
from qlora_train.train.last_steps import LastSteps
from qlora_train.train.metrics import Reporter
from qlora_train.train.optim import build_optimizer, check_optimizer
from qlora_train.train.speed import (
    Speed,
    check_machine,
    settle_compiling,
    settle_memory,
    settle_speed,
    spend_spare_memory,
)
from qlora_train.train.state import Binding

Check = Callable[[], None]  # raises a UserError


@dataclass(frozen=True)
class Inputs:
    """What can be known without weights: checked by `qlora-train check`, and by training before anything is loaded."""

    source: Source
    config: Any
    tokenizer: Any
    skeleton: torch.nn.Module
    train: Split
    eval: Split | None
    tokens: NewTokens | None = None  # of adapter.new_tokens

    def tokens_notice(self) -> str | None:
        """The new tokens, and how the embedding grows for them."""
        return describe_tokens(self.tokens, self.config.get_text_config().vocab_size) if self.tokens else None

    def unused_notice(self) -> str | None:
        """New tokens of which nothing can be learned."""
        if self.tokens is None or not (unused := unused_tokens(self.train.table, self.tokens)):
            return None
        verb, first = "occurs" if len(unused) == 1 else "occur", ""
        if self.train.table.num_rows > LOOKED_AT:
            first = f"first {LOOKED_AT:,} "
        return f"adapter.new_tokens: {', '.join(unused)} {verb} in none of the {first}training rows"


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
    if (count := os.environ.get("WORLD_SIZE", "")) not in ("", "1"):
        raise MachineError(f"WORLD_SIZE is {count}: training uses one process", fix="start it without torchrun")


def load_inputs(recipe: Recipe, *, weights: bool = True) -> Inputs:
    """Config, tokenizer and data, checked against each other and the recipe: all that is wrong is told at once."""
    device = resolve_device(recipe.model.device)
    check_optimizer(recipe.train, device)
    source = resolve_source(recipe.model, weights=weights)
    plain = load_config(source)
    config = planned_config(plain, recipe)
    tokenizer = load_tokenizer(source, recipe.model.chat_template)
    tokens = add_new_tokens(tokenizer, recipe.adapter.new_tokens)
    skeleton = build_skeleton(config)
    collected = Collected()
    for check in _model_checks(recipe, config, skeleton, device):
        with collected:
            check()
    if weights:
        with collected:
            stored_tensors(source, skeleton if config is plain else build_skeleton(plain))
    for folder in _given_adapters(recipe):
        with collected:
            check_start(folder)
    if tokens is not None:
        with collected:
            indices_for(skeleton, tokens)
    num_added = tokens.num_lacking(config.get_text_config().vocab_size) if tokens else 0
    with collected:
        train, held_out = load_splits(recipe, tokenizer)
        for split in (train, held_out):
            if split is not None:
                check_vocabulary(split.largest_id, config, num_added)
    collected.raise_if_any()
    return Inputs(source, config, tokenizer, skeleton, train, held_out, tokens)


def _model_checks(recipe: Recipe, config: Any, skeleton: torch.nn.Module, device: torch.device) -> list[Check]:
    """What of the recipe must suit the model and the machine; no check depends on another."""
    quant, targets = recipe.quant, recipe.adapter.target_modules
    checks: list[Check] = [
        partial(check_machine, recipe.train, device),
        partial(check_resident, recipe.train.resident_layers, config.get_text_config().num_hidden_layers),
        partial(check_length, config, recipe.data.seq_len),
        partial(check_rotary, config, recipe),
        partial(check_attention, skeleton, recipe.model.attn_implementation),
        partial(check_targets, skeleton, targets, with_convolutions=METHODS[recipe.adapter.method].convolutions),
        partial(check_widths, skeleton, quant, device),
    ]
    if recipe.data.batching == "packed":
        checks.append(partial(check_packable, skeleton))
    if quant.quant_type != "none":
        checks.append(partial(check_skipped, skeleton, quant.skip_modules))
    return checks


def prepare(
    recipe: Recipe,
    run_dir: RunDir,
    reporter: Reporter,
    *,
    bound: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    low_rank: Path | None = None,
) -> Prepared:
    """Load everything. Nothing is written but the decomposed base, where the recipe wants one.

    `bound`: the recipe's keys as a checkpoint to go on from has them; `checkpoint`: its folder, which holds the start.
    `low_rank`: the folder of the decomposed base; by default in the run folder.
    """
    refuse_many_processes()
    inputs = load_inputs(recipe)
    for split in (inputs.train, inputs.eval):
        if split is not None:
            reporter.message(split.audit.summary())
    if notice := inputs.tokens_notice():
        reporter.message(notice)
    if notice := inputs.unused_notice():
        reporter.warning(notice)
    if notice := refuse_full_disk(recipe, inputs.config, run_dir):
        reporter.warning(notice)
    verify_download(inputs.source)
    base = load_recipe_base(_base_source(recipe, inputs, low_rank or run_dir.low_rank, reporter), recipe)
    CausalModel(base.model).check_head()
    add_end_tokens(base.model, inputs.train.end_token_ids)
    model = attach_adapter(
        base.model,
        with_factors(recipe.adapter, base.model),
        recipe.run.seed,
        base_name=inputs.source.name,
        fused=recipe.train.fused,
        tokens=inputs.tokens,
    )
    causal = CausalModel(model)
    is_new = checkpoint is None and recipe.adapter.init_from is None
    if checkpoint is not None:
        base = start_again(base, model, checkpoint)
    elif is_new:
        base = start_from_weights(base, model, recipe.adapter, reporter.message)
        start_from_inputs(causal, recipe.adapter, probe_batches(recipe, _loader(recipe, inputs)), reporter.message)
    else:
        base = rebuild(base, model)
    for folder in _given_adapters(recipe):
        if notice := refuse_other_start(folder, base.print):
            reporter.warning(notice)
    facts = adapter_facts(model)
    compiling = settle_compiling(recipe, _loader(recipe, inputs), facts.num_frozen, base.device)
    memory = settle_memory(
        recipe, causal, inputs.train.table, bound, compiled=compiling.on, held_out_bytes=_held_out_bytes(recipe, inputs)
    )
    recipe = with_split(recipe, memory.micro_batch_size, memory.grad_accum_steps)
    loader = _loader(recipe, inputs)
    if notice := steps_notice(recipe.train, loader):
        reporter.message(notice)
    speed = settle_speed(memory, compiling, causal)
    if is_new:
        batches = probe_batches(recipe, loader)
        start_from_gradients(causal, recipe.adapter, batches, reporter.message, seed=recipe.run.seed)
    spend_spare_memory(memory, causal, base.compute_dtype)
    # accelerate keeps the first device of a process for ever; a second run of a notebook may want another.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=base.device.type == "cpu", mixed_precision="no")
    optimizer = build_optimizer(model, recipe.train, recipe.adapter)
    job = Job(
        recipe=recipe,
        run_dir=run_dir,
        causal=causal,
        model=model,
        optimizer=optimizer,
        accelerator=accelerator,
        loader=loader,
        eval_table=inputs.eval.table if inputs.eval else None,
        table=inputs.train.table,
        tokenizer=inputs.tokenizer,
        binding=_binding(recipe, inputs, base),
        environment={**environment(), "device": base.device.type, "layers_compiled": speed.compiled},
        reporter=reporter,
        last_steps=LastSteps(model, optimizer),
        hooks=method_hooks(
            model,
            recipe.adapter,
            num_steps=loader.num_steps(recipe.train.epochs, recipe.train.max_steps),
            seed=recipe.run.seed,
        ),
    )
    return Prepared(inputs, base, facts, speed, job)


def _base_source(recipe: Recipe, inputs: Inputs, low_rank: Path, reporter: Reporter) -> Source:
    """The base as it is given, or decomposed by what the first micro-batches make of it."""
    if recipe.model.lord_keep_frac is None:
        return inputs.source
    batches = first_batches(recipe, _loader(recipe, inputs), recipe.model.lord_batches)
    return low_rank_source(recipe, inputs.source, inputs.config, batches, low_rank, reporter.message)


def _given_adapters(recipe: Recipe) -> list[Path]:
    """Finished adapters that this run builds on: one to go on from, or the experts of a mixture."""
    start = recipe.adapter.init_from
    return [*([start] if start is not None else []), *recipe.adapter.experts]


def _held_out_bytes(recipe: Recipe, inputs: Inputs) -> int:
    """Of `Costs`, as a plan has it. 0 where the model cannot be traced: it can be trained nonetheless."""
    if inputs.eval is None:
        return 0
    largest = next(eval_batches(inputs.eval.table, recipe.eval.batch_size, inputs.tokenizer.pad_token_id))
    longest, kind = int(inputs.train.table.lengths.max()), device_kind(resolve_device(recipe.model.device))
    request = Request(recipe, inputs.config, kind, longest_row=longest, evaluation_batch=largest)
    try:
        return Shallow(request).costs().held_out_bytes
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return 0


def _loader(recipe: Recipe, inputs: Inputs) -> Loader:
    return build_loader(recipe, inputs.train, inputs.tokenizer.pad_token_id)


def _binding(recipe: Recipe, inputs: Inputs, base: Base) -> Binding:
    """What a checkpoint of this run belongs to. The token table holds all that the files, the template and the
    tokenizer did to the rows; their own hashes say which it was, and bind the adapter to what chat and export use."""
    return Binding(
        base=base.print.digest,
        data=inputs.train.table.fingerprint(),
        template=template_digest(inputs.tokenizer),
        tokenizer=tokenizer_digest(inputs.tokenizer),
        recipe=trajectory_keys(recipe),
    )
