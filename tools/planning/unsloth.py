"""Unsloth's QLoRA step, statement by statement as far as tensors are kept.

Source: unslothai/unsloth at its last commits before 15 April 2024 and 20 December 2024 (kernels/fast_lora.py,
rms_layernorm.py, rope_embedding.py, swiglu.py; models/llama.py, _utils.py). What matters for memory: each block of
linear layers saves its input, the MLP also both products; backward passes write into what was saved; every layer is
computed again from its input, which waits in host memory; A and B are float32 and cast for each use. Rotary embedding
works in place and needs nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from planning.graph import BF16, OwnGraph, frozen_linear, parameter

Head = Literal["kernel on all logits", "cut cross-entropy"]


class _Projection(nn.Module):
    """A frozen layer and its adapter."""

    def __init__(self, num_in: int, num_out: int, r: int, quant: str) -> None:
        super().__init__()
        self.shape = (num_out, num_in)
        self.linear = frozen_linear(num_in, num_out, quant)
        self.quantised = quant != "none"
        self.A = parameter(r, num_in, dtype=torch.float32, trained=True)
        self.B = parameter(num_out, r, dtype=torch.float32, trained=True)

    def dense(self) -> Tensor:
        """The weight (O, I), dequantised anew."""
        if self.quantised:
            return torch.empty(self.shape, dtype=BF16, device="meta")
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return weight

    def run(self, x: Tensor) -> Tensor:
        """`matmul_lora`: the update is added in place."""
        y = x @ self.dense().t()
        y += (x @ self.A.t().to(BF16)) @ (2.0 * self.B.t().to(BF16))
        return y

    def add_input_gradient(self, grad: Tensor, into: Tensor) -> Tensor:
        """`dX += dY W + (dY B) A`."""
        into += grad @ self.dense()
        into += grad @ self.B.to(BF16) @ (2.0 * self.A.to(BF16))
        return into

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of A and B, in bfloat16; autograd casts them to the parameters' float32."""
        grad_A = (x.t() @ (grad @ self.B.to(BF16))).t()
        grad_B = ((self.A.to(BF16) @ x.t()) @ grad).t()
        return grad_A.float(), grad_B.float()


class _Projections(torch.autograd.Function):
    """`LoRA_QKV`, and `LoRA_W` where there is one layer. The gradient of x is written over x, but for `LoRA_W`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[_Projection, ...], *_: Tensor) -> tuple[Tensor, ...]:
        ctx.layers = layers
        ctx.save_for_backward(x)
        return tuple(layer.run(x.flatten(0, 1)).view(*x.shape[:-1], -1) for layer in layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        x, flat = kept.flatten(0, 1), [grad.flatten(0, 1) for grad in grads]
        of_weights = [g for layer, grad in zip(ctx.layers, flat, strict=True) for g in layer.gradients(grad, x)]
        grad_x = torch.empty_like(x) if len(flat) == 1 else x.detach()
        for layer, grad in zip(ctx.layers, flat, strict=True):
            grad_x = layer.add_input_gradient(grad, grad_x)
        return grad_x.view(kept.shape), None, *of_weights


class _MLP(torch.autograd.Function):
    """`LoRA_MLP`: saves x and both products; its backward pass writes over all three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[_Projection, _Projection, _Projection], *_: Tensor) -> Tensor:
        gate, up, down = layers
        flat = x.flatten(0, 1)
        e, g = gate.run(flat), up.run(flat)
        y = down.run(torch.empty_like(e)).view(x.shape)
        ctx.layers = layers
        ctx.save_for_backward(x, e, g)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.layers
        kept, e, g = ctx.saved_tensors
        x, flat = kept.flatten(0, 1), grad.flatten(0, 1)
        grad_h = flat @ down.dense()
        grad_h += flat @ down.B.to(BF16) @ (2.0 * down.A.to(BF16))
        # The kernel leaves h, df and de where grad_h, e and g were.
        of_down = down.gradients(flat, grad_h)
        of_up, of_gate = up.gradients(e, x), gate.gradients(g, x)
        grad_x = gate.add_input_gradient(g, up.add_input_gradient(e, x.detach()))
        return grad_x.view(kept.shape), None, *of_gate, *of_up, *of_down


class _Norm(torch.autograd.Function):
    """`Fast_RMS_Layernorm`: its backward pass writes over the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _apply(function: Any, x: Tensor, *layers: _Projection) -> Any:
    return function.apply(x, layers, *(weight for layer in layers for weight in (layer.A, layer.B)))


class _Layer(GradientCheckpointingLayer):
    def __init__(self, config: Any, r: int, quant: str) -> None:
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        hidden, mlp = config.hidden_size, config.intermediate_size
        widths = [heads * self.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        self.norms = nn.ParameterList(parameter(hidden) for _ in range(2))
        self.qkv = nn.ModuleList(_Projection(hidden, width, r, quant) for width in widths)
        self.o = _Projection(widths[0], hidden, r, quant)
        shapes = ((hidden, mlp), (hidden, mlp), (mlp, hidden))
        self.mlp = nn.ModuleList(_Projection(*shape, r, quant) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        qkv = _apply(_Projections, _Norm.apply(x, self.norms[0]), *self.qkv)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv)
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        x = x + _apply(_Projections, out.transpose(1, 2).flatten(2), self.o)[0]
        result: Tensor = x + _apply(_MLP, _Norm.apply(x, self.norms[1]), *self.mlp)
        return result


class _Model(nn.Module):
    def __init__(self, config: Any, r: int, quant: str) -> None:
        super().__init__()
        self.embedding = parameter(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, r, quant) for _ in range(config.num_hidden_layers))
        self.norm = parameter(config.hidden_size)
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else parameter(config.vocab_size, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.embedding(ids, self.embedding).requires_grad_()
        for layer in self.layers:
            x = layer(x)
        out: Tensor = _Norm.apply(x, self.norm)
        return out


def unsloth_model(config: Any, r: int, quant: str) -> OwnGraph:
    """The model that Unsloth makes of a Llama."""
    return OwnGraph(_Model(config, r, quant))


class _InPlaceLoss(torch.autograd.Function):
    """`Fast_CrossEntropyLoss`: the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device))
        return torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits: Tensor = ctx.saved_tensors[0]
        return logits.detach()


class _CutLoss(torch.autograd.Function):
    """Apple's cut cross-entropy: no logits; the gradient of the hidden states is a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, torch.empty(hidden.shape[:1], dtype=torch.float32, device=hidden.device))
        return torch.empty(hidden.shape[:1], dtype=torch.float32, device=hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def unsloth_loss(graph: Any, batch: Any, *, head: Head) -> Tensor:
    """The summed loss. With all logits, accelerate's mixed precision hands the caller a float32 copy of them."""
    hidden = graph.hidden(batch)
    if head == "cut cross-entropy":
        return cut_loss(hidden, graph.model.head)
    logits = functional.linear(hidden, graph.model.head)
    loss = _InPlaceLoss.apply(logits).sum()
    logits.float()
    return loss


def cut_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    """The loss of shifted positions, through no logits."""
    return _CutLoss.apply(hidden[:, :-1].flatten(0, 1).contiguous(), weight).sum()
