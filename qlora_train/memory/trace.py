"""A training step traced on the meta device: the peak of its memory, by cause, without a weight and without a card.

It is the step itself: our skeleton, our adapters, our fused function, our loss, our checkpointing. Seen is every tensor
that an operator makes, rounded up as CUDA's allocator does. Not seen are the constants of memory/constants.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn._varlen_attn_backward
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.adapters.layers import keep_dense, lora_layers
from qlora_train.data.loader import MicroBatch
from qlora_train.memory.live import CUDA_BLOCK_BYTES, INSIDE, LiveBytes, Workspaces, only_new_garbage
from qlora_train.memory.meta import MetaModel, as_on, base_tensors
from qlora_train.memory.moments import state_bytes
from qlora_train.model.checkpointing import Checkpointing, decoder_layers, set_layer

QUANTISED = "quantised base"
UNQUANTISED = "unquantised parts"
ADAPTER = "adapter"
GRADIENTS = "gradients"
OPTIMISER = "optimiser"
DEQUANTISED = "dequantisation buffers"
RESIDENT = "resident layers"
CHECKPOINTS = "checkpoints of activations"
KEPT = "kept activations"
RECOMPUTED = "largest recompute"
LAYER = "layer at work"
BACKWARD = "backward pass"
HEAD = "loss head"
OUTSIDE = "outside the layers"
CAUSES: Mapping[str, str] = {
    QUANTISED: "codes of the frozen linear layers, and their statistics",
    UNQUANTISED: "embeddings, output head, norms, biases",
    ADAPTER: "A and B",
    GRADIENTS: "of A and B",
    OPTIMISER: "moments of A and B",
    DEQUANTISED: "dense weights of one layer, in buffers that all layers share",
    RESIDENT: "layers with a dense copy",
    CHECKPOINTS: "what recomputed layers keep: their inputs, and attention's products under selective checkpointing",
    KEPT: "what layers that are not recomputed keep for their backward pass",
    RECOMPUTED: "activations of the one layer that is computed again",
    LAYER: "what a layer holds while it runs forward",
    BACKWARD: "gradients of activations",
    HEAD: "logits of a chunk, and the gradient of the hidden states",
    OUTSIDE: "embedded tokens, positions, last norm",
    INSIDE: "what operators allocate for themselves: attention's backward pass, matmuls on codes",
}

Loss = Callable[[MetaModel, MicroBatch], Tensor]


def our_loss(model: MetaModel, batch: MicroBatch) -> Tensor:
    """The summed loss as training computes it, chunk by chunk."""
    hidden = model.hidden(batch)
    with _now().cause(HEAD):
        return model.loss_of(hidden, batch)


def full_logits_loss(model: MetaModel, batch: MicroBatch) -> Tensor:
    """transformers' loss: all logits at once, upcast to float32."""
    hidden, head = model.hidden(batch), model.head
    with _now().cause(HEAD):
        logits = nn.functional.linear(hidden.to(head.weight_VH.dtype), head.weight_VH, head.bias_V).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")


@dataclass(frozen=True)
class StepStyle:
    """How a step is run. The defaults are ours; other trainers are described by other values."""

    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    recompute_last: bool = False  # our last layer never is; that of other trainers is
    resident_layers: int = 0
    optimizer: str = "adamw"  # as memory/moments.py names it
    accumulates: bool = True  # gradients of an earlier micro-step are there from the start
    loss: Loss = our_loss
    optimizer_bytes: Callable[[int], int] | None = None  # of a parameter with so many elements; None: by name


@dataclass(frozen=True)
class StepTrace:
    """Most bytes alive at once, and what they were."""

    peak_bytes: int
    peak_op: str
    causes: Mapping[str, int]  # bytes at the peak, by cause; their sum is peak_bytes
    held_bytes: int  # before the step: base, adapter, optimiser, buffers


_ACTIVE: list[LiveBytes] = []


def _now() -> LiveBytes:
    """The tracker of the trace that runs."""
    return _ACTIVE[-1] if _ACTIVE else LiveBytes()


@only_new_garbage()
def trace_step(model: MetaModel, batch: MicroBatch, style: StepStyle) -> StepTrace:
    """Forward, backward and update on one micro-batch, as on `model.device`.

    Costs a tenth of a second a layer, whatever the sizes. The batch may lie anywhere; its values do not matter.
    """
    batch = batch.to(torch.device("meta"))
    trainable = [p for p in model.model.parameters() if p.requires_grad]
    model.model.train()
    with _tracking(model) as live, _policy(model, live, style):
        _hold_optimiser(live, style, trainable)
        if style.accumulates:
            with live.cause(GRADIENTS):
                for parameter in trainable:
                    parameter.grad = torch.zeros_like(parameter)
        _make_dense(model, live, style)
        gc.collect()
        held = live.current
        with live.cause(OUTSIDE):
            loss = style.loss(model, batch)
        hooks = [p.register_post_accumulate_grad_hook(lambda p: live.hold([p.grad], GRADIENTS)) for p in trainable]
        with live.cause(BACKWARD):
            (loss / 8).backward()
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.grad = None
    return StepTrace(live.peak, live.peak_op, _sorted(live.at_peak), held)


@only_new_garbage()
@torch.no_grad()
def trace_evaluation(model: MetaModel, batch: MicroBatch, style: StepStyle) -> StepTrace:
    """The held-out loss of one batch, with the optimiser of the training beside it."""
    batch = batch.to(torch.device("meta"))
    model.model.eval()
    with _tracking(model) as live:
        _hold_optimiser(live, style, [p for p in model.model.parameters() if p.requires_grad])
        _make_dense(model, live, style)
        gc.collect()
        held = live.current
        with live.cause(LAYER):
            style.loss(model, batch)
    model.model.train()
    return StepTrace(live.peak, live.peak_op, _sorted(live.at_peak), held)


def now(cause: str) -> int:
    """Bytes of one cause at this moment of the trace that runs."""
    return _now().now().get(cause, 0)


def _sorted(causes: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(causes.items(), key=lambda item: -item[1]))


@contextmanager
def _tracking(model: MetaModel) -> Iterator[LiveBytes]:
    """Count from here on, the model included."""
    on_cuda = model.device == "cuda"
    live = LiveBytes(
        block_bytes=CUDA_BLOCK_BYTES if on_cuda else 1,
        workspaces=cuda_workspaces(model.style.compute_dtype) if on_cuda else cpu_workspaces(model.style.compute_dtype),
        causes={torch.ops.bitsandbytes.dequantize_4bit.default: DEQUANTISED},
    )
    for tensors, cause in zip(base_tensors(model.model), (QUANTISED, UNQUANTISED, ADAPTER), strict=True):
        live.hold(tensors, cause)
    _ACTIVE.append(live)
    try:
        with live, as_on(model.device):
            yield live
    finally:
        _ACTIVE.pop()


def _hold_optimiser(live: LiveBytes, style: StepStyle, trainable: list[nn.Parameter]) -> None:
    """Moments as the optimiser keeps them between steps."""
    if style.optimizer_bytes is not None:
        num_bytes = sum(style.optimizer_bytes(p.numel()) for p in trainable)
    else:
        num_bytes = state_bytes(style.optimizer, [p.shape for p in trainable])
    live.keep(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), OPTIMISER)


def _make_dense(model: MetaModel, live: LiveBytes, style: StepStyle) -> None:
    """The buffers of dense weights, as they are from the first step on."""
    dtype = model.style.compute_dtype
    frozen = [layer.frozen for layer in lora_layers(model.model).values() if layer.frozen is not None]
    for linear in frozen:
        linear.drop_resident()
        if linear.is_quantised:
            live.hold([linear.dense(dtype)], DEQUANTISED)
    with live.cause(RESIDENT):
        for decoder_layer in decoder_layers(model.model)[: style.resident_layers]:
            keep_dense(decoder_layer, dtype)


@contextmanager
def _policy(model: MetaModel, live: LiveBytes, style: StepStyle) -> Iterator[None]:
    """Checkpointing in place, and every layer's tensors under their causes."""
    layers, policy = decoder_layers(model.model), style.checkpointing
    for index, layer in enumerate(layers):
        is_last = index == len(layers) - 1
        again = policy.recomputes(index, len(layers)) or (is_last and style.recompute_last and policy.kind != "none")
        set_layer(layer, policy.kind if again else "none")
        run = partial(
            _run_under_cause,
            live,
            CHECKPOINTS if again else KEPT,
            policy.offload and again,
            layer._gradient_checkpointing_func,
        )
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, run
    yield


def _run_under_cause(
    live: LiveBytes, kept_as: str, offload: bool, function: Callable[..., Any], forward: partial[Any], *args: Any
) -> Any:
    """A layer's forward pass: what it leaves behind is `kept_as`; all of it, when it runs a second time, RECOMPUTED."""

    def run(layer: nn.Module, *args: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1  # within a backward pass
        with live.cause(RECOMPUTED) if again else live.cause(LAYER, kept_as=kept_as):
            return forward(*args)

    with _on_host() if offload else nullcontext():
        return function(partial(run, forward.args[0]), *args)


def _on_host() -> AbstractContextManager[Any]:
    """What is saved waits elsewhere: only its shape stays. torch's own would copy values to the host."""
    return saved_tensors_hooks(
        lambda saved: (saved.shape, saved.dtype),
        lambda packed: torch.empty(packed[0], dtype=packed[1], device="meta"),
    )


def cuda_workspaces(dtype: torch.dtype) -> Workspaces:
    """Flash attention's backward pass, and bitsandbytes' matmul on codes.

    FlashAttention-2 (csrc/flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd): float32 dq and the softmax's sums, and
    dk and dv of every query head where heads share keys. gemm_4bit dequantises the whole weight where there
    are many tokens (bitsandbytes 0.50, backends/cuda/ops.py).
    """

    def varlen(grad: Tensor, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> int:
        num_tokens, num_heads, head_dim = query.shape
        return _flash_backward_bytes(num_tokens, num_heads, key.shape[1], head_dim, query.dtype)

    def dense(grad: Tensor, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> int:
        num_lines, num_heads, num_tokens, head_dim = query.shape
        return _flash_backward_bytes(num_lines * num_tokens, num_heads, key.shape[1], head_dim, query.dtype)

    return {
        torch.ops.torch_attn._varlen_attn_backward.default: varlen,
        torch.ops.aten._scaled_dot_product_flash_attention_backward.default: dense,
        **cpu_workspaces(dtype),
    }


def cpu_workspaces(dtype: torch.dtype) -> Workspaces:
    """bitsandbytes' matmul on codes dequantises the whole weight."""

    def matmul(x: Tensor, codes: Tensor, shape: list[int], absmax: Tensor, *rest: Any, **kwargs: Any) -> int:
        return shape[0] * shape[1] * dtype.itemsize

    return {torch.ops.bitsandbytes.gemm_4bit.default: matmul}


def _flash_backward_bytes(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    accumulated = 4 * num_tokens * num_heads * (head_dim + 1)
    expanded = 2 * dtype.itemsize * num_tokens * num_heads * head_dim
    return accumulated + (expanded if num_kv_heads != num_heads else 0)
