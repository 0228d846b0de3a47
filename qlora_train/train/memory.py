"""What a run planned to hold in memory and what it held: `memory.json` in the run folder.

Written before step 1, after the rehearsal, and again when the run ends or runs out of memory. Sizes are in bytes.

    device         "cpu" or "cuda"
    limit          what settings that are `auto` were chosen for
    settings       micro_batch_size, grad_accum_steps, checkpointing, checkpoint_every, offload_checkpoints,
                   resident_layers, compiled: what the recipe's keys came to
    plan           memory.plan.Plan.as_dict(), terms by stage and cause; null where the model could not be traced
    phases         a list, each entry with the fields of Phase and `difference_frac`: what compares with the plan, which
                   is made for the largest batches of the run's own data; of generation it is an upper bound
    peak           most that the process took: allocated by torch on a card, resident on a CPU
    resident       {before, peak}: resident memory of the process, before the model was loaded and at most; `peak` is
                   null where an earlier peak of the same process hides it
    rehearsal      {checkpoint_bytes, checkpoint_s, checkpoints_kept, disk_free, host_free}: what saving took, and what
                   was free for the checkpoints and the export; null before the rehearsal
    warnings       a list of sentences
    out_of_memory  null, or {where, phase, requested, held, message}

On a CPU, `measured` counts the tensors: those that stay for the whole run, and those that the rehearsal of the heaviest
batch made while it ran (memory/live.py). Resident memory stands beside it, and is more: the interpreter and its
libraries, pages of weight files, what kernels take for themselves, and what the allocator keeps. On a card, `measured`
is torch's own peak of the phase, allocated, and `reserved` what torch had taken from the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import psutil
import torch

from qlora_train.artifacts.files import write_json
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import UserError, first_line, is_out_of_memory
from qlora_train.memory.advice import advise
from qlora_train.memory.available import available_bytes
from qlora_train.memory.exhausted import Exhaustion, Option, options_of, release
from qlora_train.memory.meta import DeviceKind, device_kind
from qlora_train.memory.plan import Plan, plan_training
from qlora_train.memory.trace import ADAPTER, DEQUANTISED, GRADIENTS, OPTIMISER, QUANTISED, RESIDENT, UNQUANTISED
from qlora_train.model.load import resolve_device
from qlora_train.model.lord import planned_config
from qlora_train.model.skeleton import load_config
from qlora_train.model.source import resolve_source
from qlora_train.recipe.schema import Recipe
from qlora_train.train.keys import is_neutral
from qlora_train.train.metrics import Reporter, peak_memory_bytes
from qlora_train.train.speed import Speed
from qlora_train.units import size_text

PhaseName = Literal["training", "evaluation", "generation"]
PHASES: tuple[PhaseName, ...] = ("training", "evaluation", "generation")
# Planned for prompts as long as the longest row, which they end before: an upper bound.
BOUNDS: frozenset[PhaseName] = frozenset({"generation"})
STATIC = frozenset({QUANTISED, UNQUANTISED, ADAPTER, GRADIENTS, OPTIMISER, DEQUANTISED, RESIDENT})
ACTIVATIONS = "activations and temporary tensors"  # what a trace tells apart, and a real step does not
# A plan that is further off is no basis for choosing settings.
TOLERANCE_FRAC = 0.1


@dataclass(frozen=True)
class Batches:
    """The largest of the training data, and of the held-out rows."""

    training: MicroBatch
    evaluation: MicroBatch | None


@dataclass
class Phase:
    """The peak of one phase, tensors alone: context, workspaces of libraries and fragmentation come on top."""

    name: PhaseName
    planned: int | None = None
    measured: int | None = None
    reserved: int | None = None  # on a card
    planned_by_cause: dict[str, int] = field(default_factory=dict)
    measured_by_cause: dict[str, int] = field(default_factory=dict)  # on a CPU, at the peak

    @property
    def difference_frac(self) -> float | None:
        """Measured against planned: 0.1 is 10 % more than planned."""
        return self.measured / self.planned - 1 if self.measured is not None and self.planned else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "difference_frac": self.difference_frac}

    def summary(self) -> str:
        """One line for people."""
        if self.planned is None or self.measured is None:
            known = self.planned if self.measured is None else self.measured
            return f"{self.name}: {size_text(known or 0)} {'planned' if self.measured is None else 'measured'}"
        most = "at most " if self.name in BOUNDS else ""
        sizes = f"{most}{size_text(self.planned)} planned, {size_text(self.measured)} measured"
        return f"{self.name}: {sizes} ({self.difference_frac:+.1%})"

    def warning(self) -> str | None:
        """What is off by more than a tenth, and by which cause."""
        if self.difference_frac is None or abs(self.difference_frac) <= TOLERANCE_FRAC:
            return None
        if self.difference_frac < 0 and self.name in BOUNDS:
            return None
        text = f"memory of {self.summary()}"
        planned, measured = self.planned_by_cause, self.measured_by_cause
        if not measured:
            return text + "; on a card it is not told by cause"
        off = {cause: measured.get(cause, 0) - planned.get(cause, 0) for cause in {*planned, *measured}}
        worst = max(off, key=lambda cause: (abs(off[cause]), cause))
        return (
            f"{text}; most of it in {worst}: {size_text(planned.get(worst, 0))} planned, "
            f"{size_text(measured.get(worst, 0))} measured"
        )


class MemoryLog:
    """Follows a run's memory from before its model is loaded, and turns an out-of-memory error into advice."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, reporter: Reporter) -> None:
        self.device = resolve_device(recipe.model.device)
        self.plan: Plan | None = None
        self.phases: dict[str, Phase] = {name: Phase(name) for name in PHASES}
        self.rehearsal: dict[str, Any] | None = None
        self.holds_back = False  # nothing is written: a run that goes on is as it was until nothing can refuse
        self._recipe, self._run_dir, self._reporter = recipe, run_dir, reporter
        self._limit_bytes = available_bytes(self.device)
        self._settings: dict[str, Any] | None = None
        self._current: str = "loading"
        self._peak_bytes = 0
        self._warnings: list[str] = []
        self._exhaustion: Exhaustion | None = None
        self._resident_before = psutil.Process().memory_info().rss
        self._highest_before = peak_memory_bytes(torch.device("cpu"))

    @contextmanager
    def during(self, phase: str, where: str, rescue: Callable[[BaseException], str] | None = None) -> Iterator[None]:
        """Count what happens in the block to a phase; OutOfMemory with advice where memory runs out in it.

        `where` goes on from "out of memory". `rescue` saves what can be saved and says what is: by then, what the
        failed computation held is freed.
        """
        self._note_peak()
        outer, self._current = self._current, phase
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._exhaustion = Exhaustion.of(error, where, phase, self.device)
            release(error, self.device)
            saved = rescue(error) if rescue else "what was saved before is intact"
            raise self._advised(saved) from error
        finally:
            self._note_peak()
            self._current = outer

    def settle(self, recipe: Recipe, config: Any, speed: Speed, longest_row: int, batches: Batches) -> None:
        """Plan what was settled, for the data's own batches. A model that cannot be traced can be trained nonetheless.

        `longest_row`: tokens, of the training set.
        """
        use, policy = speed.memory, speed.memory.choice.checkpointing
        self._recipe, self._limit_bytes = recipe, use.limit_bytes
        self._settings = {
            "micro_batch_size": use.micro_batch_size,
            "grad_accum_steps": use.grad_accum_steps,
            "checkpointing": policy.kind,
            "checkpoint_every": policy.every,
            "offload_checkpoints": policy.offload,
            "resident_layers": use.choice.resident_layers,
            "compiled": speed.compiled,
        }
        self.plan = self._planned(
            config,
            choice=use.choice,
            longest_row=longest_row,
            training_batch=batches.training,
            evaluation_batch=batches.evaluation,
        )
        if self.plan is not None:
            for phase in self.phases.values():
                tensors = [term for term in self.plan.of(phase.name) if term.how != "constant"]
                phase.planned = sum(term.num_bytes for term in tensors) or None
                phase.planned_by_cause = _grouped((term.cause, term.num_bytes) for term in tensors)
        if not use.choice.fits:
            self.warn(f"this takes more than there is: {self._cheapest_changes()}")

    def measured(self, phase: PhaseName, num_bytes: int, by_cause: dict[str, int]) -> None:
        """Note what the tensors of a rehearsed phase took; on a CPU, where torch does not count."""
        self.phases[phase].measured, self.phases[phase].measured_by_cause = num_bytes, _grouped(by_cause.items())

    @property
    def kind(self) -> DeviceKind:
        """What the plan calls the device."""
        return device_kind(self.device)

    @property
    def peak_bytes(self) -> int:
        """Most so far: allocated by torch on a card; resident memory of the process on a CPU."""
        if self.device.type != "cuda":
            return peak_memory_bytes(self.device)
        return max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))

    def compare(self) -> None:
        """Warn of phases that are not what was planned."""
        for phase in self.phases.values():
            if text := phase.warning():
                self.warn(text)

    def warn(self, text: str) -> None:
        """Say it and keep it, once."""
        if text not in self._warnings:
            self._warnings.append(text)
            self._reporter.warning(text)

    def summary(self) -> list[str]:
        """Lines for people: each phase that was measured, and what the process took in all."""
        lines = [phase.summary() for phase in self.phases.values() if phase.measured is not None]
        kind = "allocated on the card" if self.device.type == "cuda" else "resident"
        return [f"memory of {'; '.join(lines)}; {size_text(self.peak_bytes)} {kind} at most"] if lines else []

    def write(self) -> None:
        """Write `memory.json` as it is known by now, unless it is held back."""
        if self.holds_back:
            return
        highest = peak_memory_bytes(torch.device("cpu"))
        content = {
            "device": self.device.type,
            "limit": self._limit_bytes,
            "settings": self._settings,
            "plan": self.plan.as_dict() if self.plan else None,
            "phases": [phase.as_dict() for phase in self.phases.values()],
            "peak": self.peak_bytes,
            "resident": {
                "before": self._resident_before,
                "peak": highest if highest > self._highest_before else None,
            },
            "rehearsal": self.rehearsal,
            "warnings": self._warnings,
            "out_of_memory": self._exhaustion.as_dict() if self._exhaustion else None,
        }
        write_json(self._run_dir.memory, content)

    def _note_peak(self) -> None:
        """Give torch's peak since the last call to the current phase."""
        if self.device.type != "cuda":
            return
        allocated = torch.cuda.max_memory_allocated(self.device)
        self._peak_bytes = max(self._peak_bytes, allocated)
        if phase := self.phases.get(self._current):
            phase.measured = max(phase.measured or 0, allocated)
            phase.reserved = max(phase.reserved or 0, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    def _cheapest_changes(self) -> str:
        changes = advise(self.plan, self._limit_bytes) if self.plan is not None else ()
        texts = [change.text for change in changes[:3]]
        return f"change {', or '.join(texts)}" if texts else "lower train.micro_batch_size, data.seq_len or adapter.r"

    def _planned(self, config: Any, **known: Any) -> Plan | None:
        try:
            return plan_training(self._recipe, config, device=self.kind, limit_bytes=self._limit_bytes, **known)
        except Exception as error:  # the plan is advice: nothing may fail for the want of it
            self._reporter.warning(f"no memory plan could be made of this model: {first_line(error)}")
            return None

    def _advised(self, saved: str) -> UserError:
        """The error to raise, with the plan's advice where there is a plan or one can be made now."""
        assert self._exhaustion is not None
        phase, planned = self._exhaustion.phase, None
        stage: PhaseName = self.phases[phase].name if phase in self.phases else "training"
        options = _evaluation_options(self._recipe, phase)
        try:
            if self.plan is None:
                config = load_config(resolve_source(self._recipe.model, weights=False))
                self.plan = self._planned(planned_config(config, self._recipe))
            if self.plan is not None:
                planned = self.plan.peak_bytes(stage)
                options += options_of(self.plan, self._exhaustion, self._limit_bytes, is_neutral)
            self.write()
        except Exception as error:  # there is little memory to work out advice in
            self._reporter.warning(f"no more advice could be worked out: {first_line(error)}")
        return self._exhaustion.error(planned=planned, planned_for=stage, saved=saved, options=options)


def _grouped(causes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes by the causes that plan and measurement both know, largest first."""
    groups = Counter[str]()
    for cause, num_bytes in causes:
        groups[cause if cause in STATIC else ACTIVATIONS] += num_bytes
    return dict(groups.most_common())


def _evaluation_options(recipe: Recipe, phase: str) -> list[Option]:
    """What makes an evaluation smaller; it disturbs no training, so these come first."""
    if phase not in ("evaluation", "generation"):
        return []
    options, section = [], recipe.eval
    if section.batch_size > 1:
        half = section.batch_size // 2
        options.append(Option(f"eval.batch_size={half}", "half the rows at a time; goes on with --resume"))
    if phase == "generation":
        options.append(Option("eval.generate_rows=0", "no generated answers; goes on with --resume"))
    return options
