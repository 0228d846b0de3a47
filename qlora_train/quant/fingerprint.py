"""What exactly the base was: one SHA-256 per tensor, of the packed codes and absmax where it is quantised."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from qlora_train.names import PEFT_PREFIX, TOKEN_BASE, TOKEN_ROWS
from qlora_train.quant.bnb import Params4bit, QuantSettings, packed_parts, settings_of

QUANT_TYPES = ("nf4", "fp4", "int4")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorPrint:
    """One tensor of the base as it was loaded."""

    sha256: str
    shape: tuple[int, ...]
    dtype: str  # of the stored tensor; for a quantised one its quant_type
    num_bytes: int
    quantised: bool
    finite: bool

    @property
    def num_params(self) -> int:
        """Weights, however few bits each takes."""
        return math.prod(self.shape)

    def is_sound(self) -> bool:
        """Whether every field has its type, and dtype a name that torch or the quantiser knows."""
        types = (str, str, int, bool, bool)
        values = (self.sha256, self.dtype, self.num_bytes, self.quantised, self.finite)
        if [type(value) for value in values] != [*types] or not all(type(s) is int and s >= 0 for s in self.shape):
            return False
        if not _SHA256.fullmatch(self.sha256):
            return False
        if self.quantised:
            return self.dtype in QUANT_TYPES
        return isinstance(getattr(torch, self.dtype, None), torch.dtype)


@dataclass(frozen=True)
class BasePrint:
    """All tensors of the base by name; `digest` stands for the whole."""

    tensors: dict[str, TensorPrint]
    quant: dict[str, object]  # settings read back from the loaded weights; empty for an unquantised base

    @property
    def num_params(self) -> int:
        """Weights of the whole base."""
        return sum(tensor.num_params for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """One SHA-256 over all names and tensor digests, in the order of the names."""
        lines = "\n".join(f"{name} {self.tensors[name].sha256}" for name in sorted(self.tensors))
        return hashlib.sha256(lines.encode()).hexdigest()

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {"digest": self.digest, "quant": self.quant, "tensors": {k: asdict(v) for k, v in self.tensors.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> BasePrint:
        """The inverse of `as_dict`. KeyError, TypeError or ValueError for data that it did not make."""
        tensors: dict[str, dict[str, object]] = json.loads(json.dumps(data["tensors"]))
        prints = {k: TensorPrint(**{**v, "shape": tuple(v["shape"])}) for k, v in tensors.items()}  # type: ignore[arg-type]
        quant = dict(data["quant"])  # type: ignore[call-overload]
        if odd := [name for name, tensor in prints.items() if not name.isascii() or not tensor.is_sound()]:
            raise ValueError(f"{odd[0]!a} is described in a way that no tensor is")
        if quant:
            QuantSettings(**quant)
        return cls(prints, quant)


def hash_tensors(*tensors: Tensor) -> str:
    """SHA-256 over shapes, dtypes and raw bytes, wherever the tensors lie."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().cpu()
        digest.update(f"{tuple(flat.shape)} {flat.dtype} ".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, told by the least and the greatest: no mask as large as the tensor."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())


def print_tensor(tensor: Tensor) -> TensorPrint:
    """The fingerprint of one parameter. `finite` looks at absmax where the weight is quantised: NaN spreads to it."""
    if isinstance(tensor, Params4bit) and tensor.quant_state is not None:
        parts = packed_parts(tensor)
        scales = [part for name, part in parts.items() if name != "codes" and part.is_floating_point()]
        finite = all(bool(torch.isfinite(part).all()) for part in scales)
        return TensorPrint(
            sha256=hash_tensors(*parts.values()),
            shape=tuple(tensor.quant_state.shape),
            dtype=tensor.quant_state.quant_type,
            num_bytes=sum(p.numel() * p.element_size() for p in parts.values()),
            quantised=True,
            finite=finite,
        )
    return TensorPrint(
        sha256=hash_tensors(tensor),
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        num_bytes=tensor.numel() * tensor.element_size(),
        quantised=False,
        finite=is_finite(tensor) if tensor.is_floating_point() else True,
    )


def base_parameter_name(name: str) -> str | None:
    """The base's own name of a parameter, with PEFT's wrapping undone; None for an adapter's parameter.

    >>> base_parameter_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    if ".lora_" in name or f".{TOKEN_ROWS}" in name:
        return None
    return name.removeprefix(PEFT_PREFIX).replace(f".{TOKEN_BASE}.", ".").replace(".base_layer.", ".")


def print_base(model: nn.Module) -> BasePrint:
    """Fingerprint every tensor of the frozen base, with or without an adapter on it. Reads every byte once."""
    tensors: dict[str, TensorPrint] = {}
    quant: dict[str, object] = {}
    for full_name, parameter in model.named_parameters():
        if (name := base_parameter_name(full_name)) is None:
            continue
        tensors[name] = print_tensor(parameter)
        if not quant and isinstance(parameter, Params4bit):
            quant = asdict(settings_of(parameter))
    return BasePrint(tensors, quant)
