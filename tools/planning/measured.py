"""The plan of a step's activations on a CPU, against what torch's CPU allocator hands out during a real step.

Measured is what torch's profiler reports: every allocation through torch's allocator, those inside kernels included,
which the tracker of the plan cannot see. Matmul libraries' own buffers are in neither.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qlora_train.adapters.attach import attach_adapter
from qlora_train.data.loader import MicroBatch
from qlora_train.memory.measure import trial_batch
from qlora_train.memory.meta import ModelStyle, build_meta_model
from qlora_train.memory.trace import StepStyle, trace_step
from qlora_train.model.attention import ATTENTION_NAME
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, Kind, apply_checkpointing
from qlora_train.model.load import load_base
from qlora_train.model.source import Source, resolve_source
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import AdapterSection, QuantSection


@dataclass(frozen=True)
class Point:
    """One model and one step."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 8192
    seq_len: int = 512
    row_tokens: int = 512
    r: int = 16
    kind: Kind = "full"
    every: int = 1

    @property
    def name(self) -> str:
        """What a reader knows it by."""
        sizes = f"{self.layers} layers of {self.hidden}, vocabulary {self.vocab:,}"
        return f"{sizes}, r {self.r}, {_step_name(self.seq_len, self.row_tokens, self.kind, self.every)}"

    def config(self) -> Any:
        """A Llama of this size, two query heads to a key head."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 128,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )

    def batch(self) -> MicroBatch:
        """A full pack, every token supervised but the first of each row."""
        return trial_batch(1, self.seq_len, self.row_tokens, packed=True)


def _step_name(seq_len: int, row_tokens: int, kind: Kind, every: int) -> str:
    rows = f"rows of {row_tokens}" if row_tokens < seq_len else "one row"
    return f"{seq_len:,} tokens, {rows}, recomputed: {kind}" + ("" if every == 1 else f", each {every}nd layer")


_BASE = Point()
POINTS: tuple[Point, ...] = (
    _BASE,
    replace(_BASE, seq_len=128, row_tokens=128),
    replace(_BASE, seq_len=1024, row_tokens=1024),
    replace(_BASE, seq_len=2048, row_tokens=256),
    replace(_BASE, r=4),
    replace(_BASE, r=128),
    replace(_BASE, kind="none"),
    replace(_BASE, kind="selective"),
    replace(_BASE, layers=8, every=2),
    replace(_BASE, vocab=512),
    replace(_BASE, vocab=64_000),
    replace(_BASE, hidden=512, kind="none", seq_len=1024, row_tokens=128),
)


# (tokens, of a row, rank, what is recomputed) of steps of SmolLM2-135M.
SMOLLM2_POINTS: tuple[tuple[int, int, int, Kind], ...] = (
    (512, 512, 16, "full"),
    (256, 64, 16, "none"),
    (1024, 128, 64, "full"),
)


@dataclass(frozen=True)
class Measured:
    """Most bytes that a step adds to what is there before it."""

    name: str
    planned_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Planned to measured, less one."""
        return self.planned_bytes / self.measured_bytes - 1


def measure_points(points: Sequence[Point] = POINTS) -> Iterator[Measured]:
    """Each point: a random model in 4 bit, one step of it, and its plan."""
    for point in points:
        with tempfile.TemporaryDirectory() as folder:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(point.config(), dtype=torch.float32)
            model.to(torch.bfloat16).save_pretrained(folder)
            source, policy = Source("random", Path(folder)), Checkpointing(point.kind, point.every)
            yield compare_step(point.name, source, point.r, point.batch(), policy)


def measure_smollm2() -> Iterator[Measured]:
    """Steps of the quickstart's model."""
    recipe = load_recipe(Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml", ()).recipe
    source = resolve_source(recipe.model)
    for seq_len, row_tokens, r, kind in SMOLLM2_POINTS:
        batch = trial_batch(1, seq_len, row_tokens, packed=True)
        name = f"SmolLM2-135M, r {r}, {_step_name(seq_len, row_tokens, kind, 1)}"
        yield compare_step(name, source, r, batch, Checkpointing(kind))


def compare_step(name: str, source: Source, r: int, batch: MicroBatch, policy: Checkpointing) -> Measured:
    """The plan of one model's step beside the step itself."""
    adapter = AdapterSection(r=r)
    base = load_base(source, QuantSection(), torch.bfloat16, torch.device("cpu"), ATTENTION_NAME)
    causal = CausalModel(attach_adapter(base.model, adapter, 0, base_name=name))
    apply_checkpointing(causal.model, policy)
    causal.model.train()
    style = ModelStyle(adapter=adapter, attention=ATTENTION_NAME)
    traced = trace_step(build_meta_model(base.model.config, style, "cpu"), batch, StepStyle(checkpointing=policy))
    return Measured(name, traced.peak_bytes - traced.held_bytes, measured_peak(causal, batch))


def measured_peak(causal: CausalModel, batch: MicroBatch) -> int:
    """Most that torch's CPU allocator hands out in a second forward and backward pass, above what is there before it.

    The first pass makes what stays: gradients, and the buffers of dense weights.
    """
    causal.loss_sum(batch).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        causal.loss_sum(batch).backward()
    inner: Any = profiler.profiler
    results = inner.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    current = peak = 0
    for _, num_bytes in events:
        current += num_bytes
        peak = max(peak, current)
    return peak
