"""What a start wants to know of the model and the data: leading directions of weight gradients, and of layer inputs.

Nothing of the size of a weight is held: a gradient (O, I) is met through thin products with it only, q (O + I) numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.adapters.forms.offset import START
from qlora_train.adapters.inits.informed import InputSketch, InputSpectrum, ThinGradient
from qlora_train.adapters.layers import lora_layers
from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel
from qlora_train.names import IGNORE_INDEX
from qlora_train.seeds import derive_seed

GRADIENT_OVERSAMPLING = 8  # directions of a gradient that are followed beyond those that are asked for
GRADIENT_PASSES = 4  # two give the range once; each further two are an iteration of the power method
INPUT_OVERSAMPLING = 16
INPUT_PASSES = 4


def probe_gradients(
    causal: CausalModel, batches: Sequence[MicroBatch], num_triples: int, *, seed: int, passes: int = GRADIENT_PASSES
) -> dict[str, ThinGradient]:
    """The leading singular triples of the gradient G of every adapted weight, by the layer's name.

    G is that of the mean loss over the batches' supervised tokens, at the weights which the model computes with. With
    A = Omega^T and B = 0 the gradient of B is s G Omega; with A = 0 and B = Q that of A is s Q^T G. So each pass is an
    ordinary backward pass through an adapter of q = num_triples + 8 columns, with checkpointing and fused layers as
    they are, and the passes alternate: Q = qr(G Omega), Omega = qr(G^T Q), ...; the last gives the SVD of Q^T G.
    Source: randomised range finder with power iterations, Halko et al., arXiv 0909.4061, algorithm 4.4.
    tests/methods/test_lora_ga.py holds it against autograd on the dense weight. `passes` is even. Adapter and dropout
    are as before afterwards; no parameter has a gradient.
    """
    assert passes >= 2 and passes % 2 == 0, passes
    layers = lora_layers(causal.model)
    q = num_triples + GRADIENT_OVERSAMPLING
    generator = torch.Generator().manual_seed(derive_seed(seed, "gradient probe"))
    right = {
        name: torch.linalg.qr(torch.randn(layer.in_features, min(q, *_sizes(layer)), generator=generator)).Q
        for name, layer in layers.items()
    }
    left: dict[str, Tensor] = {}
    for index in range(0, passes, 2):
        grads = _gradients(causal, batches, layers, {n: (omega.t(), None) for n, omega in right.items()})
        left = {name: torch.linalg.qr(grad).Q for name, grad in grads.items()}
        grads = _gradients(causal, batches, layers, {n: (None, basis) for n, basis in left.items()})
        if index + 2 < passes:
            right = {name: torch.linalg.qr(grad.t()).Q for name, grad in grads.items()}
    found = {}
    for name, grad_qI in grads.items():
        u_qq, singular, right_qI = torch.linalg.svd(grad_qI, full_matrices=False)
        kept = slice(num_triples)
        found[name] = ThinGradient(
            (left[name] @ u_qq)[:, kept], singular[kept] / layers[name].scaling[_name(layers[name])], right_qI[kept]
        )
    return found


def _sizes(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _name(layer: Any) -> str:
    name: str = layer.active_adapters[0]
    return name


def _gradients(
    causal: CausalModel,
    batches: Sequence[MicroBatch],
    layers: dict[str, Any],
    factors: dict[str, tuple[Tensor | None, Tensor | None]],
) -> dict[str, Tensor]:
    """One pass over the batches with these A and B, of which one is zero: the gradient of the zero one, float32."""
    was_training = causal.model.training
    causal.model.train()  # where layers are computed again in the backward pass, it is in training only
    with _replaced(layers, factors) as zeros:
        total = sum(batch.weight_sum for batch in batches)
        for batch in batches:
            device = next(iter(zeros.values())).device
            (causal.loss_sum(batch.to(device)) / total).backward()
        causal.model.train(was_training)
        return {
            name: zero.grad.float() if zero.grad is not None else torch.zeros_like(zero) for name, zero in zeros.items()
        }


@contextmanager
def _replaced(
    layers: dict[str, Any], factors: dict[str, tuple[Tensor | None, Tensor | None]]
) -> Iterator[dict[str, nn.Parameter]]:
    """Other A and B in the layers, no dropout, no start; yields those that are zero: their gradients are wanted."""
    kept, zeros = {}, {}
    for name, layer in layers.items():
        adapter, (given_A, given_B) = _name(layer), factors[name]
        q = given_A.shape[0] if given_A is not None else _columns(given_B)
        like = layer.lora_A[adapter].weight
        kept[name] = (like, layer.lora_B[adapter].weight, layer.lora_dropout[adapter], _starts(layer, adapter))
        # Both ask for a gradient: in the first layer the fused function has no graph to hang on where only B does.
        lora_A = nn.Parameter(like.new_zeros(q, layer.in_features))
        lora_B = nn.Parameter(like.new_zeros(layer.out_features, q))
        for parameter, given in ((lora_A, given_A), (lora_B, given_B)):
            if given is not None:
                parameter.data.copy_(given)
        zeros[name] = lora_A if given_A is None else lora_B
        _put(layer, adapter, lora_A, lora_B, nn.Identity(), [torch.zeros_like(lora_A), torch.zeros_like(lora_B)])
    try:
        yield zeros
    finally:
        for name, layer in layers.items():
            _put(layer, _name(layer), *kept[name])


def _columns(basis: Tensor | None) -> int:
    assert basis is not None
    return basis.shape[1]


def _starts(layer: Any, adapter: str) -> list[Tensor]:
    return [getattr(layer, attribute)[adapter] for attribute in START if hasattr(layer, attribute)]


def _put(
    layer: Any, adapter: str, lora_A: nn.Parameter, lora_B: nn.Parameter, dropout: nn.Module, starts: list[Tensor]
) -> None:
    layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = lora_A, lora_B
    layer.lora_dropout[adapter] = dropout
    for attribute, start in zip(START, starts, strict=False):
        if hasattr(layer, attribute):
            getattr(layer, attribute)[adapter] = start


@torch.no_grad()
def probe_inputs(
    causal: CausalModel, batches: Sequence[MicroBatch], num_directions: int, *, passes: int = INPUT_PASSES
) -> dict[str, InputSpectrum]:
    """The principal directions of every adapted layer's inputs at supervised positions, by the layer's name.

    `passes` forward passes over the batches; tests/methods/test_eva.py holds them against a whole SVD.
    """
    layers = lora_layers(causal.model)
    device, q = causal.head.weight_VH.device, num_directions + INPUT_OVERSAMPLING
    sketches = {name: InputSketch(layer.in_features, q, device) for name, layer in layers.items()}
    positions: list[Tensor] = []  # of the batch that is running

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            # An expert sees the tokens that were routed to it: which ones they are is not known here.
            sketches[name].add(rows[positions[0]] if len(rows) == len(positions[0]) else rows)

        return see

    was_training = causal.model.training
    causal.model.eval()
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for index in range(passes):
            for batch in batches:
                batch = batch.to(device)
                positions[:] = [(batch.labels != IGNORE_INDEX).reshape(-1)]
                causal.hidden(batch)
            if index + 1 < passes:
                for sketch in sketches.values():
                    sketch.advance()
    finally:
        for hook in hooks:
            hook.remove()
        causal.model.train(was_training)
    return {name: sketch.spectrum().leading(num_directions) for name, sketch in sketches.items()}
