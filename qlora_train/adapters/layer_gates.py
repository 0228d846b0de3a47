"""One gate for all experts' matrices of a decoder layer: where it lies, what it reads, and when it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.adapters.forms.base import hold
from qlora_train.adapters.forms.mole import GATE, TAU, MixtureForm
from qlora_train.adapters.layers import Lora4bit, LoraFloat, lora_layers
from qlora_train.errors import ModelError


class LayerGate:
    """The gate of one decoder layer: `softmax(W_g u / tau)`, u being the layer's input at a token over its root mean
    square. The paper norms what its gate reads, too; between decoder layers a token's size differs by orders.

    Its tensors lie in the layer's first adapted matrix (`holder`), where PEFT saves them, and its mean for the balance
    loss is left there.
    """

    def __init__(self, form: MixtureForm, holder: Lora4bit | LoraFloat, adapter: str) -> None:
        self._form, self.holder, self._adapter = form, holder, adapter
        self._input: Tensor | None = None
        self._gates: Tensor | None = None

    @property
    def is_closed(self) -> bool:
        """Whether the decoder layer is not running."""
        return self._input is None and self._gates is None

    @contextmanager
    def reading(self, hidden_BTH: Tensor) -> Iterator[None]:
        """What the decoder layer was given, for as long as it runs; nothing is kept alive after it."""
        self._input, self._gates = hidden_BTH, None
        try:
            yield
        finally:
            self._input = self._gates = None

    def gates(self, x: Tensor) -> Tensor:
        """(..., N) for the rows of x (..., in), one for each token of the decoder layer: computed for the first matrix
        that asks, and the same for all others.

        ModelError for a matrix that sees other tokens than its decoder layer.
        """
        assert self._input is not None, "the decoder layer is not running"
        if self._gates is None:
            normed = rms_norm(self._input.float(), self._input.shape[-1:])
            self._gates = self._form.gates_noted(self.holder, self._adapter, normed)
        tokens = x.shape[:-1]
        if tokens.numel() != self._gates.shape[:-1].numel():
            raise ModelError(
                f"adapter.granularity: a matrix is given {tokens.numel():,} tokens, and its decoder layer "
                f"{self._gates.shape[:-1].numel():,}: they cannot share gates",
                fix="set granularity to matrix",
            )
        return self._gates.view(*tokens, -1)


def share_gates(model: PeftModel, form: MixtureForm, adapter: str, *, trainable: bool) -> None:
    """Give every decoder layer with adapted matrices one gate, as wide as the model.

    ModelError for a matrix in no decoder layer, and for one of several of its kind in its layer, such as an expert of
    the model's own, which sees the tokens that are sent to it.
    """
    width: int = model.get_base_model().config.get_text_config().hidden_size
    gates: dict[str, LayerGate] = {}
    for name, layer in lora_layers(model).items():
        outer = decoder_layer_of(model, name)
        if outer not in gates:
            gates[outer] = LayerGate(form, layer, adapter)
            for attribute, values in form.gate_start(width, layer.lora_A[adapter].weight).items():
                hold(layer, attribute, adapter, values, is_buffer=False)
            for attribute in (GATE, TAU):
                getattr(layer, attribute)[adapter].requires_grad_(trainable)
            _enter_through(model.get_submodule(outer), gates[outer])
        layer.layer_gate = gates[outer]


def decoder_layer_of(model: nn.Module, name: str) -> str:
    """The name of the decoder layer that holds a matrix. ModelError as `share_gates` says."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        outer = ".".join(parts[:count])
        if isinstance(model.get_submodule(outer), GradientCheckpointingLayer):
            if any(part.isdecimal() for part in parts[count:]):
                raise ModelError(
                    f"adapter.granularity: {name} is one of several in its decoder layer, and may be given some of the "
                    "layer's tokens only: it cannot have the layer's gates",
                    fix="set granularity to matrix",
                )
            return outer
    raise ModelError(
        f"adapter.granularity: {name} lies in no decoder layer, whose gates it could have",
        fix="set granularity to matrix",
    )


def _enter_through(layer: nn.Module, gate: LayerGate) -> None:
    """From now on the decoder layer tells its gate what it reads.

    By a class of its own, whose forward transformers checkpoints as a whole (modeling_layers.py): a hook would stay
    outside, so that a recomputation had no gate.
    """
    layer.layer_gate = gate  # type: ignore[assignment]
    kind: Any = type(layer)
    layer.__class__ = _gated(kind)


def ungated(kind: Any) -> Any:
    """The class of a decoder layer without its gate: the model's own."""
    return kind.__mro__[1] if "inside" in vars(kind) else kind


@cache
def _gated(kind: Any) -> Any:
    """A kind of decoder layer that opens its gate around its forward pass."""

    class Gated(kind):
        inside: Callable[..., Any] | None = None  # a compiled forward of `kind`, for training

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            inside = self.inside if self.training and self.inside else kind.forward
            with self.layer_gate.reading(hidden):
                return inside(self, *args, **kwargs)

    Gated.__name__, Gated.__qualname__ = kind.__name__, kind.__qualname__
    return Gated
