"""The flight recorder: the norms of the last steps, and what is written down when a step comes to no finite number.

`flight/step-000012/` in the run folder, published whole, like a checkpoint:

    flight.json        step, loss, grad_norm, learning_rate, what was first not finite, the rows with their text, and of
                       the last steps, those before a resume too, loss, grad_norm and, for every trained tensor, the
                       norms of gradient and value (train/last_steps.py).
                       Numbers that are not finite are text: "nan", "inf"
    batch.safetensors  the micro-batches of the step: `0/input_ids`, `0/labels`, `0/position_ids`, `0/weights`, `1/...`
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_train.artifacts.folders import publishing
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import NumericsError
from qlora_train.printable import printable_lines
from qlora_train.seeds import derive_seed
from qlora_train.train.job import Job
from qlora_train.train.last_steps import short_name
from qlora_train.train.optim import trainable_parameters
from qlora_train.train.step import NotFinite, StepResult, backward, norms
from qlora_train.train.watch import DeadAdapters

MAX_ROW_CHARS = 4000  # of a row's text in flight.json
ROWS_NAMED = 4  # in a message


@dataclass(frozen=True)
class Culprit:
    """What was first not finite when the step was computed once more. `micro_step`: None for what was so before."""

    kind: str  # "value", "output", "loss" or "gradient"
    name: str  # of the tensor or module
    micro_step: int | None

    def __str__(self) -> str:
        where = "" if self.micro_step is None else f", in micro-batch {self.micro_step + 1}"
        return f"the {self.kind}{f' of {self.name}' if self.name else ''}{where}"


class FlightRecorder:
    """Keeps the norms of the last steps in the job; tells of dead adapters; writes down what went wrong.

    A step costs the norms of all trained tensors; those of the gradients are the step's own
    (`make prove WHAT=resume` measures it).
    """

    def __init__(self, job: Job, command: str, from_step: int = 0) -> None:
        """`command`: what started the run; `from_step`: the steps made before this process, 0 unless resumed."""
        self._job, self._started_by = job, command
        self._names = job.last_steps.names
        self._dead = DeadAdapters(self._names, norms(job.last_steps.parameters), from_start=from_step == 0)

    def note(self, step: int, result: StepResult, learning_rate: float) -> list[str]:
        """Keep what step `step`, from 0, came to; what is to be said of adapters that do not learn."""
        assert result.grad_norms is not None
        weight_norms = self._job.last_steps.note(step + 1, result, learning_rate)
        return self._dead.look(result.grad_norms, weight_norms, result.grad_norm, learning_rate)

    @contextmanager
    def recording(self, step: int, learning_rate: float, rescue: Callable[[BaseException], str]) -> Iterator[None]:
        """Around step `step`, from 0: NotFinite becomes a NumericsError that says what is known, and where it lies.

        `rescue` saves the last finished step and says what there is to go on from.
        """
        try:
            yield
        except NotFinite as error:
            batches = self._job.loader.step(step)
            found = self._diagnosed(batches, step)
            recorded = self._recorded(error, batches, found, learning_rate, step)
            raise self._explained(error, batches, found, recorded, rescue(error), step) from error

    def _diagnosed(self, batches: Sequence[MicroBatch], step: int) -> Culprit | None:
        """Compute the step once more with every module watched; None where that fails or ends well."""
        try:
            return find_culprit(self._job, batches, step)
        except Exception:  # a diagnosis must not hide the illness
            return None
        finally:
            self._job.optimizer.zero_grad(set_to_none=True)

    def _recorded(
        self, error: NotFinite, batches: Sequence[MicroBatch], found: Culprit | None, learning_rate: float, step: int
    ) -> str:
        """Write it down; where it lies, or why it could not be written."""
        target = self._job.run_dir.flight(step + 1)
        content = {
            "step": step + 1,
            "loss": error.loss,
            "grad_norm": error.grad_norm,
            "learning_rate": learning_rate,
            "first_not_finite": asdict(found) | {"text": str(found)} if found else None,
            "rows": list(self._rows(batches)),
            "last_steps": self._job.last_steps.as_dict(),
            "this_step": {"grad_norm_of": dict(zip(self._names, error.grad_norms.tolist(), strict=True))},
            "repeat": self._command(step),
        }
        tensors = {
            f"{index}/{name}": tensor.contiguous()
            for index, batch in enumerate(batches)
            for name in ("input_ids", "labels", "position_ids", "weights")
            if (tensor := getattr(batch, name)) is not None
        }
        try:
            with publishing(target, manifest={"step": step + 1}, replace=True) as folder:
                text = json.dumps(_as_json(content), indent=1, ensure_ascii=False, allow_nan=False)
                (folder / "flight.json").write_text(text, encoding="utf-8")
                save_file(tensors, folder / "batch.safetensors")
        except Exception as failure:  # a full disk, say: the message is worth more than the record
            return f"it could not be recorded ({failure})"
        return f"recorded in {target}"

    def _rows(self, batches: Sequence[MicroBatch]) -> Iterator[dict[str, Any]]:
        """The rows of a step, as they were trained on."""
        job = self._job
        for micro_step, batch in enumerate(batches):
            ids = batch.input_ids.flatten()
            starts = batch.row_starts or range(0, ids.numel(), batch.input_ids.shape[1])
            for row, start, length in zip(batch.row_ids, starts, batch.row_lengths, strict=True):
                text = str(job.tokenizer.decode(ids[start : start + length].tolist(), skip_special_tokens=False))
                left_out = len(text) - MAX_ROW_CHARS
                more = f" ... ({left_out:,} characters more)" if left_out > 0 else ""
                yield {
                    "row": row,
                    "where": job.table.where(row),
                    "micro_step": micro_step,
                    "num_tokens": length,
                    "text": printable_lines(text[:MAX_ROW_CHARS]) + more,
                }

    def _command(self, step: int) -> str:
        """What comes to the same step again."""
        return f"{self._started_by} --resume --from {step}" if step else self._started_by

    def _explained(
        self,
        error: NotFinite,
        batches: Sequence[MicroBatch],
        found: Culprit | None,
        recorded: str,
        saved: str,
        step: int,
    ) -> NumericsError:
        rows = [self._job.table.where(row) for batch in batches for row in batch.row_ids]
        if found is not None and found.micro_step is not None:
            rows = [self._job.table.where(row) for row in batches[found.micro_step].row_ids]
        named = ", ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
        first = f"; first not finite: {found}" if found else ""
        return NumericsError(
            f"step {step + 1}: loss {error.loss}, gradient norm {error.grad_norm}{first}; rows {named}; {recorded}",
            fix="look at these rows, or lower train.learning_rate (--allow-change train.learning_rate); the adapter is "
            f"what it was before this step; {saved}. The same step again: {self._command(step)}",
        )


def find_culprit(job: Job, batches: Sequence[MicroBatch], step: int) -> Culprit | None:
    """Compute a step's gradients as training would, compiled layers uncompiled; what is first not finite, by time.

    First the trained values themselves, then, as it is computed, each module's output, innermost first; the loss; each
    trained tensor's gradient, in the order of the backward pass. None where all is finite.
    """
    for name, parameter in trainable_parameters(job.model).items():
        if not _is_finite(parameter):
            return Culprit("value", short_name(name), None)
    found: list[Culprit] = []
    micro_step = -1

    def see(kind: str, name: str, value: Any) -> None:
        if not found and not _is_finite(value):
            found.append(Culprit(kind, name, micro_step))

    def watch(module: nn.Module, name: str) -> Any:
        return module.register_forward_hook(lambda _module, _inputs, output: see("output", name, output))

    def watch_gradient(parameter: nn.Parameter, name: str) -> Any:
        return parameter.register_post_accumulate_grad_hook(lambda one: see("gradient", name, one.grad))

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        modules = ((name, module) for name, module in job.model.named_modules() if name)
        handles = [watch(module, short_name(name)) for name, module in modules]
        handles += [watch_gradient(p, short_name(name)) for name, p in trainable_parameters(job.model).items()]
        for handle in handles:
            stack.callback(handle.remove)
        total = sum(batch.weight_sum for batch in batches)
        for micro_step, batch in enumerate(batches):
            torch.manual_seed(derive_seed(job.recipe.run.seed, "dropout", step, micro_step))
            loss = float(backward(job.causal, batch, job.accelerator, total=total, extra_loss=job.hooks.extra_loss))
            if not found and not math.isfinite(loss):
                found.append(Culprit("loss", "", micro_step))
            if found:
                return found[0]
    return None


def trained_values_are_finite(model: nn.Module) -> bool:
    """Whether every number that is trained is one."""
    return all(map(_is_finite, trainable_parameters(model).values()))


def _is_finite(value: Any) -> bool:
    """Whether every number of a tensor, or of the tensors in a tuple, list or mapping, is finite."""
    if isinstance(value, Tensor):
        # Detached: in a checkpointed layer, nothing may be saved that the recomputation would not save again.
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, tuple | list) else True


def _as_json(value: Any) -> Any:
    """Numbers that JSON does not know, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list) else value
