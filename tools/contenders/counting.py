"""What a step costs, counted and measured: matmuls, dequantisations, saved bytes, resident memory, time of the head."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

PARTS = ("base", "adapter", "attention", "head")
_DEQUANTISING = ("bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit", "qlora_train::dequantize_into")
_MATMULS = ("mm", "addmm", "_addmm_activation")


def register_gemm_4bit() -> None:
    """Tell torch's FLOP counter what bitsandbytes' matmul with a 4-bit weight (N, K) costs: 2 M N K."""
    import bitsandbytes  # noqa: F401  registers the operator

    gemm = torch.ops.bitsandbytes.gemm_4bit
    if gemm not in flop_registry:

        @register_flop_formula(gemm)
        def flops(x_shape: Any, codes_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
            return 2 * prod(x_shape[:-1]) * prod(weight_shape)


class CountedOps(TorchDispatchMode):
    """Matmul FLOPs by part of the model, and 4-bit weights dequantised, of everything that runs inside.

    FLOPs are torch's own formulas. A matmul x W belongs to the base when W has the sizes of a base weight; to the head
    when the vocabulary is among its sizes, or W is a tile of the head: of the hidden size, and wider than any base
    weight; to attention when it is batched or sdpa; else to the adapter.
    """

    def __init__(self, weight_shapes: set[tuple[int, int]], vocabulary: int, hidden: int) -> None:
        """`weight_shapes`: (out, in) of the base's linear layers."""
        super().__init__()
        self._shapes = {frozenset(shape) for shape in weight_shapes}
        self._widest = max(max(shape) for shape in weight_shapes)
        self._vocabulary, self._hidden = vocabulary, hidden
        self.flops: Counter[str] = Counter()
        self.num_dequantised = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.num_dequantised += func._schema.name in _DEQUANTISING
        packet, name = func._overloadpacket, func._opname
        if func.namespace == "aten" and name.endswith("_"):  # in place: torch has formulas for the others only
            name = name.removesuffix("_")
            packet = getattr(torch.ops.aten, name, packet)
        if packet in flop_registry:
            self.flops[self._part(name, args)] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _part(self, name: str, args: Any) -> str:
        if name == "gemm_4bit":
            return "base"
        if name not in _MATMULS:
            return "attention"
        left, right = (x.shape for x in (args[:2] if name == "mm" else args[1:3]))
        if frozenset(right) in self._shapes:
            return "base"
        if self._vocabulary in (*left, *right):
            return "head"
        return "head" if self._hidden in right and max(right) > self._widest else "adapter"


class SavedBytes:
    """Bytes of the distinct storages that autograd saves while it is active; the model's own tensors are not counted.

    What a checkpointed layer recomputes never reaches these hooks; what it saves to do so, its input, does.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors = [
                    state.absmax,
                    state.code,
                    state.offset,
                    *(vars(state.state2).values() if state.nested else ()),
                ]
                own += [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._found: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Saved so far."""
        return sum(self._found.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Count what is saved inside."""
        self._found.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor


@dataclass
class HeadClock:
    """Seconds between a decoder's end and the arrival of its output's gradient: head, loss and what stands between."""

    meter: Meter
    seconds: float = field(default=0.0)

    def watch(self, decoder: nn.Module) -> None:
        """Start watching, for good."""
        decoder.register_forward_hook(self._decoded)

    def _decoded(self, module: nn.Module, args: Any, output: Any) -> None:
        started, hidden = self.meter.now(), output.last_hidden_state

        def arrived(grad: Tensor) -> None:
            self.seconds += self.meter.now() - started

        if hidden.requires_grad:
            hidden.register_hook(arrived)


@dataclass(frozen=True)
class Counts:
    """Totals of one optimiser step."""

    flops: dict[str, int]
    num_dequantised: int
    saved_bytes: int  # by the decoder, as it is trained, of one micro-batch
    layer_saved_bytes: int  # by one decoder layer when nothing is recomputed, of one micro-batch
    positions: int  # of that micro-batch, padding included


class StepCounter:
    """Counts one step of a causal model; the counting slows the step, so it is never timed."""

    def __init__(self, model: nn.Module, decoder: Any, weight_shapes: set[tuple[int, int]]) -> None:
        """`model` may carry an adapter; `decoder` is its stack of layers."""
        register_gemm_4bit()
        self._decoder, self._saved = decoder, SavedBytes(model)
        self._ops = CountedOps(weight_shapes, decoder.config.vocab_size, decoder.config.hidden_size)
        self._stack = ExitStack()
        self._first_call: tuple[Any, Any, bool] | None = None
        self._decoder_bytes = self._positions = 0

    def start(self) -> None:
        """Count until `stop`."""
        layer = self._decoder.layers[1]
        forward, counted = self._decoder.forward, self._saved

        def decoder_forward(*args: Any, **kwargs: Any) -> Any:
            with counted.active():
                output = forward(*args, **kwargs)
            self._decoder_bytes = counted.num_bytes
            self._positions = output.last_hidden_state.shape[:-1].numel()
            return output

        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            autocast = torch.is_autocast_enabled(args[0].device.type)
            kept = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            self._first_call = self._first_call or (kept, kwargs, autocast)

        self._decoder.forward = decoder_forward
        self._stack.callback(delattr, self._decoder, "forward")
        self._stack.callback(layer.register_forward_pre_hook(remember, with_kwargs=True).remove)
        if next(layer.parameters()).is_cuda:
            # There backward runs in another thread: a recomputation, compiled anew without the mode that counts here,
            # keeps other tensors than the forward pass did, and torch refuses it (seen on an H100).
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(self._ops)

    def stop(self) -> Counts:
        """What was counted."""
        self._stack.close()
        return Counts(
            dict(self._ops.flops),
            self._ops.num_dequantised,
            self._decoder_bytes,
            self._layer_bytes(),
            self._positions,
        )

    def _layer_bytes(self) -> int:
        """Run the second layer once more, without checkpointing."""
        assert self._first_call is not None
        (hidden, *args), kwargs, autocast = self._first_call
        layer = self._decoder.layers[1]
        flag = layer.gradient_checkpointing
        layer.gradient_checkpointing = False
        try:
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=autocast), self._saved.active():
                layer(hidden.requires_grad_(True), *args, **kwargs)
        finally:
            layer.gradient_checkpointing = flag
        return self._saved.num_bytes


class Meter:
    """Time and memory of a device: resident memory of this process, or what torch has allocated on a card."""

    def __init__(self, device: str) -> None:
        self._on_card = device != "cpu"

    def now(self) -> float:
        """Seconds, when all that was asked for before is done."""
        if self._on_card:
            torch.cuda.synchronize()
        return time.perf_counter()

    def in_use(self) -> int:
        """Bytes now."""
        return torch.cuda.memory_allocated() if self._on_card else _resident_bytes("VmRSS")

    def peak(self) -> int:
        """The most bytes since `reset`."""
        return torch.cuda.max_memory_allocated() if self._on_card else _resident_bytes("VmHWM")

    def reset(self) -> None:
        """Let the peak begin again at what is in use now."""
        if self._on_card:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def settle(self) -> None:
        """Give back what is free, so that what is resident is what is used."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        if self._on_card:
            torch.cuda.empty_cache()


def _resident_bytes(line: str) -> int:
    for text in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {line}")
