"""LitGPT's LoRA finetuning on one card, statement by statement as far as tensors are kept.

Source: Lightning-AI/litgpt at e5493986 (22 July 2024: litgpt/lora.py, model.py, utils.py, finetune/lora.py), and at
8641822 (October 2023), whose RMSNorm stays in bfloat16. What matters for memory: no checkpointing; q, k and v in one
layer, whose update is padded with zeros where only q and v are adapted; the head is quantised too; logits are made 128
tokens at a time, but all of them are kept, in float32 (Fabric converts outputs); A and B are bfloat16; with
quantisation the moments are paged, so that only small ones lie on the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from planning.graph import BF16, OldMatmul4bit, OwnGraph, frozen_linear, parameter

CHUNK_TOKENS = 128
PAGED_ELEMENTS = 100_000  # moments of so many elements and more are paged (bitsandbytes' optim/optimizer.py)


@dataclass(frozen=True)
class Sizes:
    """A model as LitGPT's Config describes it."""

    hidden: int
    layers: int
    heads: int
    groups: int  # key and value heads
    head_dim: int
    mlp: int
    vocab: int
    rotary_dim: int
    rms: bool = True
    gated: bool = True
    bias: bool = False
    parallel: bool = False  # attention and MLP read the same input
    one_norm: bool = False  # and the same norm
    post_norms: bool = False
    softcaps: bool = False
    windows: bool = False  # every second layer attends to a window, through a mask
    scaled_embeddings: bool = False

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """From transformers' config."""
        kind, heads = config.model_type, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        neox, falcon = kind == "gpt_neox", kind == "falcon"
        groups = 1 if falcon else heads if neox else config.num_key_value_heads
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            mlp=4 * config.hidden_size if falcon else config.intermediate_size,
            vocab=config.vocab_size,
            rotary_dim=head_dim // 4 if neox else head_dim,
            rms=not (neox or falcon),
            gated=not (neox or falcon),
            bias=neox,
            parallel=neox or falcon,
            one_norm=falcon,
            post_norms=kind == "gemma2",
            softcaps=kind == "gemma2",
            windows=kind == "gemma2",
            scaled_embeddings=kind.startswith("gemma"),
        )


@dataclass(frozen=True)
class Settings:
    """Of one finetuning."""

    quant: str
    r: int
    targets: Sequence[str]  # of "q", "k", "v", "proj", "mlp", "head"
    dropout: float = 0.05
    norms_in_float32: bool = True


class _Linear(nn.Module):
    """A frozen layer, with LoRA where it is adapted."""

    def __init__(self, num_in: int, num_out: int, settings: Settings, *, adapted: bool, bias: bool = False) -> None:
        super().__init__()
        self.linear = frozen_linear(num_in, num_out, settings.quant, bias=bias)
        self.in_4bit = settings.quant != "none"
        self.dropout = settings.dropout
        self.lora_A = parameter(settings.r, num_in, trained=True) if adapted else None
        self.lora_B = parameter(num_out, settings.r, trained=True) if adapted else None

    def base(self, x: Tensor) -> Tensor:
        """The frozen layer's output."""
        y: Tensor = OldMatmul4bit.apply(x, self.linear) if self.in_4bit else self.linear(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.lora_A is None or self.lora_B is None:
            return y
        update = torch.native_dropout(x, self.dropout, True)[0] @ self.lora_A.t() @ self.lora_B.t() * 2.0
        return y + update


class _QKV(_Linear):
    """q, k and v together: one A below the other, and B as a convolution of one place."""

    def __init__(self, sizes: Sizes, settings: Settings) -> None:
        widths = {"q": sizes.heads * sizes.head_dim, "k": sizes.groups * sizes.head_dim}
        widths["v"] = widths["k"]
        super().__init__(sizes.hidden, sum(widths.values()), settings, adapted=False, bias=sizes.bias)
        self.num_out = sum(widths.values())
        self.widths = [width for name, width in widths.items() if name in settings.targets]
        self.lora_A = parameter(settings.r * len(self.widths), sizes.hidden, trained=True)
        self.lora_B = parameter(sum(self.widths), settings.r, trained=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        assert self.lora_A is not None and self.lora_B is not None
        down = functional.linear(torch.native_dropout(x, self.dropout, True)[0], self.lora_A).transpose(1, 2)
        weights = self.lora_B.unsqueeze(-1).split(self.widths)
        parts = zip(down.chunk(len(self.widths), dim=1), weights, strict=True)
        update = torch.cat([functional.conv1d(part, weight) for part, weight in parts], dim=1).transpose(1, 2)
        if len(self.widths) < 3:
            index = torch.empty(sum(self.widths), dtype=torch.int64, device=x.device)
            zeros = x.new_zeros(*x.shape[:-1], self.num_out)
            update = zeros.index_copy(-1, index, update.contiguous())  # keeps its source
        return y + update * 2.0


class _Norm(nn.Module):
    def __init__(self, sizes: Sizes, settings: Settings) -> None:
        super().__init__()
        self.weight = parameter(sizes.hidden)
        self.rms, self.in_float32 = sizes.rms, settings.norms_in_float32
        self.offset = parameter(sizes.hidden) if not sizes.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.rms:
            return functional.layer_norm(x, self.weight.shape, self.weight, self.offset)
        if not self.in_float32:
            return self.weight * (x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5))
        x = x.float()
        normed = x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5)
        return (normed * self.weight.float()).to(BF16)


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes, settings: Settings, *, window: bool) -> None:
        super().__init__()
        self.sizes, self.window = sizes, window
        self.attn = _QKV(sizes, settings)
        width = sizes.heads * sizes.head_dim
        self.proj = _Linear(width, sizes.hidden, settings, adapted="proj" in settings.targets, bias=sizes.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sizes, (num_rows, num_tokens, _) = self.sizes, x.shape
        per_group = sizes.heads // sizes.groups
        shape = (num_rows, num_tokens, sizes.groups, per_group + 2, sizes.head_dim)
        q, k, v = self.attn(x).view(shape).permute(0, 2, 3, 1, 4).split((per_group, 1, 1), dim=2)
        if sizes.groups != sizes.heads:
            k, v = (each.expand(*each.shape[:2], per_group, *each.shape[3:]) for each in (k, v))
        q, k, v = (each.reshape(num_rows, -1, num_tokens, sizes.head_dim) for each in (q, k, v))
        n = sizes.rotary_dim
        q, k = (torch.cat((_rotated(each[..., :n], cos, sin), each[..., n:]), dim=-1) for each in (q, k))
        y = self._attend(q, k, v).transpose(1, 2).reshape(num_rows, num_tokens, -1)
        out: Tensor = self.proj(y)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.sizes.softcaps:
            # On CUDA the kernel's output lies as q does.
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, 0.0, True)[0].transpose(1, 2).contiguous().transpose(1, 2)
        num_tokens = q.shape[2]
        mask = torch.ones(num_tokens, num_tokens, dtype=q.dtype, device=q.device).triu(diagonal=1)
        mask.masked_fill_(mask.bool(), float("-inf"))
        if self.window:
            bias = torch.ones_like(mask).tril(diagonal=-4096)
            mask += bias.masked_fill_(bias.bool(), float("-inf"))
        scores = _capped(q @ k.mT * 0.0625, 50.0) + mask
        return functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (turned * sin)).to(x.dtype)


def _capped(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap


class _MLP(nn.Module):
    def __init__(self, sizes: Sizes, settings: Settings) -> None:
        super().__init__()
        self.gelu = not sizes.gated or sizes.scaled_embeddings
        made = [(sizes.hidden, sizes.mlp)] * (1 + sizes.gated) + [(sizes.mlp, sizes.hidden)]
        adapted = "mlp" in settings.targets
        self.layers = nn.ModuleList(_Linear(*each, settings, adapted=adapted, bias=sizes.bias) for each in made)

    def forward(self, x: Tensor) -> Tensor:
        *ups, down = self.layers
        first, *second = [up(x) for up in ups]
        active = functional.gelu(first) if self.gelu else functional.silu(first)
        out: Tensor = down(active * second[0] if second else active)
        return out


class _Block(GradientCheckpointingLayer):
    def __init__(self, sizes: Sizes, settings: Settings, index: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.norm_1 = _Norm(sizes, settings)
        self.attn = _Attention(sizes, settings, window=sizes.windows and index % 2 == 0)
        self.norm_2 = None if sizes.one_norm else _Norm(sizes, settings)
        self.mlp = _MLP(sizes, settings)
        self.post_norms = nn.ModuleList(_Norm(sizes, settings) for _ in range(2 if sizes.post_norms else 0))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm_1(x)
        attended = self.attn(normed, cos, sin)
        if self.post_norms:
            attended = self.post_norms[0](attended)
        if self.sizes.parallel:
            normed = normed if self.norm_2 is None else self.norm_2(x)
            added: Tensor = self.mlp(normed) + attended + x
            return added
        assert self.norm_2 is not None
        x = attended + x
        out: Tensor = self.mlp(self.norm_2(x))
        return (self.post_norms[1](out) if self.post_norms else out) + x


class _GPT(nn.Module):
    def __init__(self, sizes: Sizes, settings: Settings) -> None:
        super().__init__()
        self.sizes = sizes
        self.wte = parameter(sizes.vocab, sizes.hidden)
        self.blocks = nn.ModuleList(_Block(sizes, settings, index) for index in range(sizes.layers))
        self.ln_f = _Norm(sizes, settings)
        self.lm_head = _Linear(sizes.hidden, sizes.vocab, settings, adapted="head" in settings.targets)

    def forward(self, ids: Tensor) -> Tensor:
        # Fabric's half precision makes the tables float16, which bfloat16 promotes to float32.
        cos, sin = (torch.empty(ids.shape[1], self.sizes.rotary_dim, dtype=torch.float16, device="meta") for _ in "cs")
        x = functional.embedding(ids, self.wte)
        if self.sizes.scaled_embeddings:
            x = x * torch.ones((), dtype=x.dtype, device=x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        out: Tensor = self.ln_f(x)
        return out


def litgpt_model(config: Any, settings: Settings) -> OwnGraph:
    """The model that LitGPT makes of this architecture."""
    return OwnGraph(_GPT(Sizes.of(config), settings))


def litgpt_loss(graph: Any, batch: Any, *, follows_another: bool) -> Tensor:
    """Chunked logits, all kept in float32, and the cross-entropy of each chunk.

    The training loop's names `logits` and `loss` hold those of the micro-step before until they are given new values;
    with `loss` its graph lives on, and with the graph what `OldMatmul4bit` keeps. `follows_another` says that the
    micro-step before was as long.
    """
    if follows_another:
        graph.logits = _logits(graph, batch)
        loss = _cross_entropy(graph.logits, batch.labels)
        loss.backward()
    graph.logits = _logits(graph, batch)
    return _cross_entropy(graph.logits, batch.labels)


def _logits(graph: Any, batch: Any) -> list[Tensor]:
    model: Any = graph.model
    chunks = [model.lm_head(part) for part in graph.hidden(batch).split(CHUNK_TOKENS, dim=1)]
    if model.sizes.softcaps:
        chunks = [_capped(chunk, 30.0) for chunk in chunks]
    return [chunk.float() for chunk in chunks]


def _cross_entropy(logits: list[Tensor], labels: Tensor) -> Tensor:
    losses = [
        functional.cross_entropy(chunk.flatten(0, 1), part.flatten(), reduction="none")
        for chunk, part in zip(logits, labels.split(CHUNK_TOKENS, dim=1), strict=True)
    ]
    return torch.cat(losses).sum()


def moments_on_card(quant: str, num_elements: int) -> int:
    """Bytes of AdamW's moments of one parameter that lie on the card."""
    if quant == "none":
        return 4 * num_elements  # torch's AdamW: in the parameter's bfloat16
    return 0 if num_elements >= PAGED_ELEMENTS else 8 * num_elements
