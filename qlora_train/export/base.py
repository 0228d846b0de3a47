"""The base's tensors as training held them, one at a time from the files that training read, each proven."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_train.adapters.inits.residual import Taken, read_taken
from qlora_train.errors import ModelError
from qlora_train.export.clock import Clock
from qlora_train.export.safetensors_reader import read_rows, read_tensor
from qlora_train.model.binding import refuse_other_shape
from qlora_train.model.files import stored_tensors, weight_files
from qlora_train.model.load import resolve_device
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun
from qlora_train.quant.bnb import Params4bit, QuantSettings, dequantize, quantize
from qlora_train.quant.fingerprint import TensorPrint, print_tensor
from qlora_train.untrusted import read_header


class BaseReader:
    """Tensors of the base by transformers' parameter names. Holds none of them."""

    def __init__(self, run: FinishedRun, source: Source, clock: Clock | None = None) -> None:
        """ModelError when the base's files hold another model than the run's, or one that cannot be exported."""
        self.print = run.base_print
        self.device = resolve_device(run.recipe.model.device)
        self.clock = clock or Clock()
        # Loading hands weights to the quantiser in this dtype.
        self.compute_dtype: torch.dtype = getattr(torch, run.recipe.model.compute_dtype)
        skeleton = build_skeleton(load_config(source))
        refuse_other_shape(self.print, skeleton)
        _refuse_stored_buffers(source, skeleton)
        self.stored = stored_tensors(source, skeleton)
        self.left_out = _left_out(source, {tensor.name for tensor in self.stored.values()})
        self._settings = QuantSettings(**self.print.quant) if self.print.quant else None  # type: ignore[arg-type]
        # PiSSA and LoftQ take a part of a weight out of the base before it is quantised.
        self._taken: dict[str, Taken] = read_taken(run.run_dir.adapter)

    def recorded(self, name: str) -> TensorPrint:
        """What the run says of a tensor."""
        return self.print.tensors[name]

    def taken(self, name: str) -> Taken | None:
        """What the adapter's start took out of a tensor; None where it is whole."""
        return self._taken.get(name)

    def original(self, name: str) -> Tensor:
        """A tensor as the base's files hold it, on the run's device."""
        with self.clock.of("read"):
            return read_tensor(self.stored[name].path, self.stored[name].name).to(self.device)

    def rows(self, name: str, start: int, stop: int, *, original: bool = False) -> Tensor:
        """Some rows of an unquantised tensor, as training held them or as the files do, on the host.

        They are not held against the fingerprint, which is one of the whole tensor.
        """
        with self.clock.of("read"):
            found = read_rows(self.stored[name].path, self.stored[name].name, start, stop)
        return found if original else found.to(getattr(torch, self.recorded(name).dtype))

    def as_trained(self, name: str, original: Tensor | None = None) -> Tensor | Params4bit:
        """A tensor as training held it: quantised, or in the compute dtype.

        ModelError unless its fingerprint is the recorded one. `original` saves reading it again.
        """
        recorded = self.recorded(name)
        original = self.original(name) if original is None else original
        taken = self._taken.get(name)
        held: Tensor | Params4bit
        if recorded.quantised:
            with self.clock.of("quantise"):
                held = self.quantised(original) if taken is None else self.requantised(taken.rest_of(original))
        else:
            rest = original if taken is None else taken.rest_of(original)
            held = rest.to(getattr(torch, recorded.dtype))
        with self.clock.of("prove"):
            found = print_tensor(held).sha256
        if found != recorded.sha256:
            raise ModelError(
                f"{name} is not the tensor that was trained on"
                + (" after quantising it again" if recorded.quantised else ""),
                fix="export on the kind of device that trained (quantisers may differ), from the same base files",
            )
        return held

    def started(self, name: str, original: Tensor) -> Tensor:
        """What quantising was given: the original weight, without what a start took out of it."""
        taken = self._taken.get(name)
        return original if taken is None else taken.rest_of(original)

    def quantised(self, weight_OI: Tensor) -> Params4bit:
        """A weight in the run's 4-bit code, by way of the compute dtype, as loading does it."""
        assert self._settings is not None
        return quantize(weight_OI.to(self.compute_dtype), self._settings)

    def requantised(self, weight_OI: Tensor) -> Params4bit:
        """A float32 weight in the run's 4-bit code: what a start left (model/start.py), or a merged one."""
        assert self._settings is not None
        return quantize(weight_OI, self._settings)


def as_float32(held: Tensor | Params4bit) -> Tensor:
    """The float32 values of what training held; exact."""
    return dequantize(held) if isinstance(held, Params4bit) else held.float()


def _refuse_stored_buffers(source: Source, skeleton: torch.nn.Module) -> None:
    """Tensors of a model's state that are no parameters are in no fingerprint: an export could not prove them."""
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    if buffers := sorted(set(skeleton.state_dict()) - parameters):
        raise ModelError(
            f"{source.name} stores {len(buffers)} buffers beside its weights, first {buffers[0]}: they are not merged",
            fix="serve the base with the adapter instead",
        )


def _left_out(source: Source, used: set[str]) -> tuple[str, ...]:
    """Tensors of the base's files that the model does not compute with: a tied head stored again, rotary tables."""
    return tuple(sorted(name for path in weight_files(source.folder) for name in read_header(path) if name not in used))
