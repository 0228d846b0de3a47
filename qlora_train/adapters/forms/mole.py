"""MoLE: a router that weighs finished LoRA adapters for each token; only the router trains (arXiv 2404.13628)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_train.adapters.forms.base import Form, Shapes, Tensors, layer_tensors
from qlora_train.adapters.updates import Update
from qlora_train.errors import ModelError

Granularity = Literal["matrix", "layer"]
GATE, TAU = "lora_mole_gate", "lora_mole_tau"
LEAST_TAU = 0.05  # a trained temperature may fall to zero, where gates are no numbers, and below, where they turn round


class MixtureForm(Form):
    """`y = W x + sum_i g_i B_i A_i x` with `g = softmax(W_g u / tau)` for each token.

    The experts' A_i stand below each other in lora_A (N r, in) and their B_i, scaling included, side by side in lora_B
    (out, N r); both are frozen. W_g (N, in) starts at zero, where every expert has the weight 1 / N, and tau (1,) at
    one. The paper's gate reads all positions of a block, which in a causal model would look ahead: this one reads the
    token alone, so that no output depends on a later token (tests/methods/test_mole.py). Of the paper's granularities
    there are two: `matrix`, where every matrix has a gate of its own that reads the matrix's input (u = x); and
    `layer`, where all matrices of a decoder layer share one that reads the layer's input, normed; there W_g is (N,
    width of the model): adapters/layer_gates.py. No weight does the same for every input: it cannot be merged or
    folded.
    Cost beside LoRA's of rank N r: N in multiplications a token and gate.
    """

    frozen = ("lora_A", "lora_B")

    def __init__(self, num_experts: int, granularity: Granularity = "matrix") -> None:
        self.num_experts, self.granularity = num_experts, granularity
        self.masked: frozenset[int] = frozenset()  # experts that get no weight; the others share it out anew

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """W_g and tau besides, where each matrix has its own; r is N times an expert's."""
        own = self._gate_shapes(num_in) if self.granularity == "matrix" else {}
        return {**super().shapes(r, num_in, num_out), **own}

    def _gate_shapes(self, width: int) -> Shapes:
        return {GATE: (self.num_experts, width), TAU: (1,)}

    def expected(self, r: int, found: Mapping[str, tuple[int, ...]]) -> Shapes:
        """A decoder layer's gate, as wide as it is, belongs to one of its matrices."""
        shared = self._gate_shapes(found[GATE][-1]) if self.granularity == "layer" and found.get(GATE) else {}
        return {**super().expected(r, found), **shared}

    def start(self, tensors: dict[str, Tensor], layer: object) -> None:
        """Equal weights. The experts are filled in by `adapters.experts`."""
        if self.granularity == "matrix":
            nn.init.zeros_(tensors[GATE])
            nn.init.ones_(tensors[TAU])

    def gate_start(self, width: int, like: Tensor) -> dict[str, Tensor]:
        """W_g and tau of a gate that reads `width` numbers a token, for equal weights."""
        shapes = self._gate_shapes(width)
        return {GATE: like.new_zeros(shapes[GATE]), TAU: like.new_ones(shapes[TAU])}

    def gates(self, tensors: Tensors, x: Tensor) -> Tensor:
        """(..., N) in float32: not below zero, of sum one for each token. tau counts as LEAST_TAU below that."""
        logits = nn.functional.linear(x.float(), tensors[GATE]) / tensors[TAU].clamp_min(LEAST_TAU)
        if self.masked:
            logits = logits.index_fill(-1, torch.tensor(sorted(self.masked), device=x.device), -torch.inf)
        return logits.softmax(dim=-1)

    def gates_noted(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """Those of the gate that lies in an adapted layer; their mean is left there for the balance loss."""
        gates = self.gates(layer_tensors(layer, adapter), x)
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # not in a recomputation
            layer.mean_gates = gates.flatten(0, -2).mean(dim=0)
        return gates

    def own_forward(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """The layer's output."""
        result: Tensor = self._weighed(layer, adapter, x) + layer.base_layer(x)
        return result

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's way, beside other adapters."""
        return result + self._weighed(module, active_adapter, x).to(result.dtype)

    def _weighed(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """The experts' updates by their gates, scaling included."""
        tensors = layer_tensors(layer, adapter)
        gates = layer.layer_gate.gates(x) if self.granularity == "layer" else self.gates_noted(layer, adapter, x)
        down = nn.functional.linear(layer.lora_dropout[adapter](x), tensors["lora_A"].to(x.dtype))
        weights = gates.repeat_interleave(down.shape[-1] // self.num_experts, dim=-1)
        update: Tensor = nn.functional.linear(down * weights.to(x.dtype), tensors["lora_B"].to(x.dtype))
        return update * layer.scaling[adapter]

    def update(self, tensors: Tensors, scaling: float) -> Update:
        """There is none."""
        raise ModelError(
            "MoLE weighs its experts anew for each token: no weight does what this adapter does, so that it can be "
            "neither merged nor folded",
            fix="serve it with qlora-train chat, or give its experts fixed weights: qlora-train adapter combine",
        )
