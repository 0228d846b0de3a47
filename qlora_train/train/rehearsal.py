"""Before step 1: the largest micro-batch, the largest evaluation, the longest answers, one checkpoint.

What would run out of memory or disk in an hour does so now. Nothing is changed: gradients are dropped, moments that are
made for the occasion go again, and every random draw of a step has a seed of its own.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from qlora_train.adapters.layers import lora_layers
from qlora_train.artifacts.files import TEMPORARY_PREFIX, explained, fsync_file
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.loader import MicroBatch, eval_batches
from qlora_train.evaluate.tasks import Question, generate_texts
from qlora_train.evaluate.validation import BASE_FIX, TRAINED_FIX, validate
from qlora_train.memory.available import host_free_bytes
from qlora_train.memory.live import LiveBytes
from qlora_train.memory.meta import base_tensors
from qlora_train.memory.trace import ADAPTER, DEQUANTISED, GRADIENTS, OPTIMISER, QUANTISED, RESIDENT, UNQUANTISED
from qlora_train.model.checkpointing import decoder_layers
from qlora_train.train.checkpoint import write_checkpoint
from qlora_train.train.job import Job
from qlora_train.train.memory import Batches, MemoryLog, PhaseName
from qlora_train.train.optim import trainable_parameters, with_all_moments
from qlora_train.train.setup import Prepared
from qlora_train.train.state import TrainState
from qlora_train.train.step import accumulate_gradients
from qlora_train.units import size_text

WHERE = "in the rehearsal before step {step}: {what}"


def largest_batches(job: Job) -> Batches:
    """The most tokens that come together in training, and in an evaluation."""
    held_out = None
    if job.eval_table is not None:
        held_out = next(eval_batches(job.eval_table, job.recipe.eval.batch_size, job.pad_token_id))
    return Batches(job.loader.longest_micro_batch(), held_out)


def rehearse(
    prepared: Prepared, batches: Batches, questions: Sequence[Question], state: TrainState, memory: MemoryLog
) -> None:
    """Do the largest of everything once, and note what it took in `memory`; OutOfMemory with advice where it fails.

    Costs a micro-step, an evaluation batch, one forward pass of prompts and a checkpoint.
    """
    job = prepared.job
    done = []
    with with_all_moments(job.model, job.optimizer):
        with _counted(prepared, state, memory, "training", "the largest micro-batch") as live:
            rehearse_micro_batch(job, batches.training, live)
        done.append(f"a micro-batch of {_shape(batches.training)}")
        if batches.evaluation is not None:
            with _counted(prepared, state, memory, "evaluation", "the largest evaluation batch"):
                fix = TRAINED_FIX if state.step else BASE_FIX
                validate(job.causal, [batches.evaluation], job.accelerator.device, fix=fix)
            done.append(f"an evaluation of {_shape(batches.evaluation)}")
        if questions:
            with _counted(prepared, state, memory, "generation", "the longest answers"):
                num_lines, num_tokens = _rehearse_answers(prepared, questions)
            done.append(f"{num_lines} answers of {num_tokens:,} tokens with their prompts")
        with memory.during("saving", WHERE.format(step=state.step + 1, what="a checkpoint")):
            num_bytes, save_s = rehearse_saving(job.run_dir, job, state)
    done.append(f"a checkpoint of {size_text(num_bytes)} in {save_s:.1f} s")
    job.reporter.message(f"rehearsed: {'; '.join(done)}")
    memory.rehearsal = {
        "checkpoint_bytes": num_bytes,
        "checkpoint_s": save_s,
        "checkpoints_kept": job.recipe.train.keep
        + 2,  # the best one, and the one that is written before an old one goes
        "disk_free": shutil.disk_usage(job.run_dir.root).free,
        "host_free": host_free_bytes() + psutil.Process().memory_info().rss,
    }
    _look_ahead(memory)


def rehearse_micro_batch(job: Job, batch: MicroBatch, live: LiveBytes | None = None) -> None:
    """Forward and backward pass, beside the gradients of an earlier micro-step where a step has several."""
    job.model.train()
    parameters, reached = trainable_parameters(job.model), set()

    def note(parameter: torch.nn.Parameter) -> None:
        reached.add(id(parameter))
        if live is not None and parameter.grad is not None:
            live.hold([parameter.grad], GRADIENTS)

    hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters.values()]
    try:
        if job.recipe.train.grad_accum_steps > 1:
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            if live is not None:
                live.hold([p.grad for p in parameters.values() if p.grad is not None], GRADIENTS)
        accumulate_gradients(job.causal, [batch], job.accelerator, seed=job.recipe.run.seed, step=-1)
    finally:
        for hook in hooks:
            hook.remove()
        job.optimizer.zero_grad(set_to_none=True)
    dead = [name for name, parameter in parameters.items() if id(parameter) not in reached]
    assert not dead, f"no gradient reaches {dead[0]}"


def rehearse_saving(run_dir: RunDir, job: Job, state: TrainState) -> tuple[int, float]:
    """Write a checkpoint to the disk, and remove it: its bytes, and seconds."""
    started = time.perf_counter()
    with (
        explained(run_dir.checkpoints),
        tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}rehearsal-", dir=run_dir.root) as name,
    ):
        write_checkpoint(Path(name), run_dir, state, job.model, job.optimizer, job.hooks)
        num_bytes = 0
        for path in Path(name).iterdir():
            num_bytes += path.stat().st_size
            fsync_file(path)
        return num_bytes, time.perf_counter() - started


def _rehearse_answers(prepared: Prepared, questions: Sequence[Question]) -> tuple[int, int]:
    """One forward pass of the longest prompts, each as long as it is when its answer ends: how many, of how many."""
    job, section = prepared.job, prepared.job.recipe.eval
    limit = getattr(job.causal.decoder.config.get_text_config(), "max_position_embeddings", None)
    longest = sorted((q.prompt_ids for q in questions), key=len)[-section.batch_size :]
    prompts = [(*ids, *ids[-1:] * (section.max_new_tokens - 1))[: limit and limit - 1] for ids in longest]
    was_training = job.model.training
    job.model.eval()
    try:
        with torch.inference_mode():
            generate_texts(job.model, prepared.inputs.tokenizer, prompts, max_new_tokens=1)
    finally:
        job.model.train(was_training)
    return len(prompts), max(map(len, prompts)) + 1


@contextmanager
def _counted(
    prepared: Prepared, state: TrainState, memory: MemoryLog, phase: PhaseName, what: str
) -> Iterator[LiveBytes | None]:
    """Count the tensors of a phase on a CPU; on a card torch counts. Compiled layers cannot be watched."""
    with memory.during(phase, WHERE.format(step=state.step + 1, what=what)):
        if memory.device.type == "cuda" or prepared.speed.compiled:
            yield None
            return
        live = LiveBytes()
        _hold_what_stays(prepared, live)
        with live:
            yield live
        memory.measured(phase, live.peak, live.at_peak)


def _hold_what_stays(prepared: Prepared, live: LiveBytes) -> None:
    """Base, adapter, moments and dense weights: what is there before a step and after it."""
    job = prepared.job
    for tensors, cause in zip(base_tensors(job.model), (QUANTISED, UNQUANTISED, ADAPTER), strict=True):
        live.hold(tensors, cause)
    moments = [v for state in job.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    live.hold(moments, OPTIMISER)
    for index, layer in enumerate(decoder_layers(job.model)):
        frozen = [lora.frozen for lora in lora_layers(layer).values() if lora.frozen is not None]
        if index < prepared.speed.memory.choice.resident_layers:
            live.hold([one.dense(prepared.base.compute_dtype) for one in frozen if one.is_quantised], RESIDENT)
        for one in frozen:
            live.hold(one.workspace.buffers, DEQUANTISED)


def _look_ahead(memory: MemoryLog) -> None:
    """Warn, with figures, where the export will not find memory."""
    if memory.plan is None or memory.rehearsal is None:
        return
    host, host_free = memory.plan.peak_bytes("export"), memory.rehearsal["host_free"]
    if host > host_free:
        memory.warn(
            f"exporting this run will take {size_text(host)} of host memory, and {size_text(host_free)} are free for "
            "it here: export on a machine with more; the run folder can be moved"
        )


def _shape(batch: MicroBatch) -> str:
    num_lines, num_tokens = batch.input_ids.shape
    what = "row" if batch.row_starts is None else "pack"
    return f"{num_lines} {what if num_lines == 1 else f'{what}s'} x {num_tokens:,} tokens"
