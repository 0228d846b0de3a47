"""Attention that keeps packed rows apart, as an implementation registered with transformers.

Boundaries of the rows travel as the keyword `row_boundaries` through the decoder to every attention layer. Calls
without it (generation, padded batches) are sdpa with sdpa's mask.

Shape legend: B packs, T positions of a pack, H query heads, K key and value heads, G = H / K, D head dim; R rows of a
bucket, L positions of each; S slots, the sum of R * L over the buckets.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError

ATTENTION_NAME = "qlora_rows"
# Rows up to this length: plain matmuls, for on a CPU the backward pass of sdpa is slow for short rows.
PLAIN_TOKENS = 512
# Rows up to PLAIN_TOKENS are padded, inside attention only, to the next of these lengths, and attend in groups whose
# size is a power of two: oneDNN makes matmuls anew for every new shape, 5 ms and half a megabyte each, and keeps them.
_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, PLAIN_TOKENS)
# A longer row is at least this share of its bucket's longest row.
_LEAST_FILL = 0.75
_MASK_FREE = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


@dataclass(frozen=True)
class _Moves:
    """Slots gathered from positions, and positions from slots: each real token has one of either."""

    position_of_slot: Tensor  # (S,)
    slot_of_position: Tensor  # (B * T,)
    empty_slots: Tensor  # padding of buckets
    empty_positions: Tensor  # padding of packs


@dataclass(frozen=True)
class _Bucket:
    num_rows: int
    length: int


def _bucket_of(longest: int) -> tuple[int, int]:
    """Length of the bucket of a row, and the fewest tokens of others in it, none of which is longer.

    >>> _bucket_of(60), _bucket_of(64), _bucket_of(65), _bucket_of(1000)
    ((64, 49), (64, 49), (96, 65), (1000, 750))
    """
    if longest > PLAIN_TOKENS:
        return longest, math.ceil(_LEAST_FILL * longest)
    place = bisect_left(_LENGTHS, longest)
    return _LENGTHS[place], _LENGTHS[place - 1] + 1 if place else 1


@dataclass(frozen=True, eq=False)
class RowBoundaries:
    """Where the rows of a micro-batch lie. Index tensors are built at first use, once for all layers."""

    starts: tuple[int, ...]  # flat: pack * T + offset; rising
    lengths: tuple[int, ...]
    num_positions: int  # B * T
    device: torch.device
    kernel: bool | None = None  # whether torch's varlen kernel runs; None: as this device has it (meta tensors ask)
    _biases: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def buckets(self) -> tuple[tuple[_Bucket, ...], _Moves]:
        """Rows of like length side by side, longest first, and where their tokens come from."""
        order = np.argsort(-np.asarray(self.lengths), kind="stable").tolist()
        buckets: list[_Bucket] = []
        positions = np.full(self.num_positions, -1, dtype=np.int64)  # slot of each
        sources: list[np.ndarray[Any, Any]] = []
        filled: list[np.ndarray[Any, Any]] = []
        first = slot = 0
        while first < len(order):
            length, least = _bucket_of(self.lengths[order[first]])
            alike = next((i for i in range(first, len(order)) if self.lengths[order[i]] < least), len(order)) - first
            stop = first + 2 ** (alike.bit_length() - 1)
            buckets.append(_Bucket(stop - first, length))
            rows = order[first:stop]
            within = np.arange(length)
            real = within < np.asarray([self.lengths[row] for row in rows])[:, None]
            source = np.asarray([self.starts[row] for row in rows])[:, None] + within * real
            slots = slot + np.arange(real.size).reshape(real.shape)
            positions[source[real]] = slots[real]
            sources.append(source.ravel())
            filled.append(real.ravel())
            first, slot = stop, slot + real.size
        empty = positions < 0
        tensors = (
            np.concatenate(sources),
            np.where(empty, 0, positions),
            np.flatnonzero(~np.concatenate(filled)),
            np.flatnonzero(empty),
        )
        return tuple(buckets), _Moves(*(torch.from_numpy(a).to(self.device) for a in tensors))

    @cached_property
    def segments(self) -> tuple[Tensor, int]:
        """Edges (int32) of rows and of the padding between them, all positions in order; and the longest."""
        cuts = {0, self.num_positions, *self.starts, *(s + n for s, n in zip(self.starts, self.lengths, strict=True))}
        edges = torch.tensor(sorted(cuts), dtype=torch.int32)
        return edges.to(self.device), int(edges.diff().max())

    def bias(self, length: int, window: int, dtype: torch.dtype) -> Tensor:
        """(L, L), minus infinity where a query must not look: ahead, or `window` places back (0: no limit)."""
        if (length, window, dtype) not in self._biases:
            places = torch.arange(length, device=self.device)
            back = places[:, None] - places
            forbidden = (back < 0) | (back >= window) if window else back < 0
            bias = torch.zeros(length, length, dtype=dtype, device=self.device)
            self._biases[length, window, dtype] = bias.masked_fill_(forbidden, float("-inf"))
        return self._biases[length, window, dtype]


def run_packed(decoder: Any, batch: MicroBatch, *, kernel: bool | None = None) -> Tensor:
    """The last hidden state (B, T, hidden) of a decoder on packs, with no dense mask built.

    `kernel` says whether to run as a CUDA device with torch's varlen kernel would; None: as this device does.

    transformers hands a mask of four dimensions on as it is (masking_utils._preprocess_mask_arguments), where it would
    make a block mask of T x T from the position ids otherwise. One element tells our function, too, that boundaries
    must be there: a decoder that drops unknown keywords is found out.
    """
    assert batch.row_starts is not None and batch.position_ids is not None
    if (found := decoder.config._attn_implementation) != ATTENTION_NAME:
        raise _unpackable(f"{type(decoder).__name__} runs with {found} attention")
    ids = batch.input_ids
    hidden: Tensor = decoder(
        input_ids=ids,
        position_ids=batch.position_ids,
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device),
        use_cache=False,
        row_boundaries=RowBoundaries(batch.row_starts, batch.row_lengths, ids.numel(), ids.device, kernel),
    ).last_hidden_state
    return hidden


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    row_boundaries: RowBoundaries | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D).

    softmax(scaling q k^T) v within each row, causal, over `sliding_window` places where given, with `softcap` on the
    scores where given. ModelError for any other keyword that may change attention: none is ignored.
    """
    if row_boundaries is None:
        if attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
            raise _unpackable(f"{type(module).__name__} is not told where the rows of a pack begin")
        return _delegated(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise _unpackable(f"{type(module).__name__} attends in both directions")
    window, softcap = int(kwargs.pop("sliding_window", None) or 0), float(kwargs.pop("softcap", None) or 0.0)
    unknown = sorted(name for name, given in kwargs.items() if name not in _MASK_FREE and given is not None)
    if unknown or dropout:
        raise _unpackable(f"{type(module).__name__} asks for {', '.join(unknown) or 'attention dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, heads, D)
    has_kernel = _has_kernel(query) if row_boundaries.kernel is None else row_boundaries.kernel
    if has_kernel and _suits_kernel(query, value) and not softcap:
        out = _by_varlen(q, k, v, row_boundaries, scale, window)
    else:
        out = _by_buckets(q, k, v, row_boundaries, scale, window, softcap)
    return out.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def check_packable(model: Any) -> None:
    """ModelError for a model (its weights may be on meta) in which rows of a pack cannot be kept apart."""
    config, name = model.config.get_text_config(), type(model).__name__
    layer_types = set(getattr(config, "layer_types", None) or ())
    if foreign := sorted(layer_types - {"full_attention", "sliding_attention"}):
        raise _unpackable(f"{name} has layers of {', '.join(foreign)}")
    if getattr(model, "_is_stateful", False) or any(isinstance(m, nn.Conv1d) for m in model.base_model.modules()):
        raise _unpackable(f"{name} carries a state or a convolution along the sequence")
    if any(parameter_name.endswith(".sinks") for parameter_name, _ in model.named_parameters()):
        raise _unpackable(f"{name} has attention sinks")
    if not model._supports_attention_backend:
        raise _unpackable(f"{name} brings an attention of its own")
    if not getattr(config, "is_causal", True):
        raise _unpackable(f"{name} attends in both directions")
    if getattr(config, "attention_dropout", 0.0):
        raise _unpackable(f"{name} has an attention_dropout of {config.attention_dropout}")


def _unpackable(what: str) -> ModelError:
    return ModelError(
        f"{what}: rows of a pack cannot be kept apart in this model", fix="set data.batching: length_grouped"
    )


def _delegated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """sdpa; and plain matmuls where scores are capped, which sdpa cannot do."""
    softcap = kwargs.get("softcap")
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **kwargs)
    if mask is None:
        num_queries, num_keys = query.shape[2], key.shape[2]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    forbidden = mask.logical_not()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = _capped(query @ key.transpose(2, 3) * scale, softcap)
    # Not minus infinity: a padded query of a left-padded batch sees no key at all, and 0 / 0 spreads through the batch.
    scores = scores.masked_fill(forbidden, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2).contiguous(), None


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's varlen_attn runs on this device."""
    return query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _suits_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's varlen_attn takes these: half precision, head dims as flash attention 2 has them."""
    head_dim = query.shape[-1]
    in_half = query.dtype in (torch.bfloat16, torch.float16)
    return in_half and head_dim == value.shape[-1] <= 256 and head_dim % 8 == 0


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, rows: RowBoundaries, scale: float, window: int) -> Tensor:
    """Flash attention over rows end to end. Padding between them is one more row.

    On Hopper torch would choose cuDNN, which plans anew for every count and length of rows: in nearly every step.
    """
    edges, longest = rows.segments
    back, grouped = window - 1 if window and window < longest else -1, q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return varlen_attn(  # type: ignore[return-value]
            q, k, v, edges, edges, longest, longest, scale=scale, window_size=(back, 0), enable_gqa=grouped
        )


def _by_buckets(
    q: Tensor, k: Tensor, v: Tensor, rows: RowBoundaries, scale: float, window: int, softcap: float
) -> Tensor:
    """Rows of like length side by side, bucket by bucket. Padding of packs gives 0."""
    buckets, moves = rows.buckets
    gather = (moves.position_of_slot, moves.empty_slots, moves.slot_of_position, moves.empty_positions)
    scatter = (*gather[2:], *gather[:2])
    q, k, v = (_Move.apply(x, *gather) for x in (q, k, v))  # (S, heads, D)
    sizes = [bucket.num_rows * bucket.length for bucket in buckets]
    outs = []
    # Split, not sliced: the gradients of slices would each be a whole tensor of zeros around them.
    for bucket, *parts in zip(buckets, *(x.split(sizes) for x in (q, k, v)), strict=True):
        # A row that is not longer than the window sees all of itself.
        narrow = window if window < bucket.length else 0
        qb, kb, vb = (x.unflatten(0, (bucket.num_rows, -1)) for x in parts)
        if bucket.length > PLAIN_TOKENS and not softcap:
            out = _long(qb, kb, vb, scale, rows, narrow)
        else:
            out = _plain(qb, kb, vb, scale, rows.bias(bucket.length, narrow, q.dtype), softcap)
        outs.append(out.flatten(0, 1))
    moved: Tensor = _Move.apply(torch.cat(outs), *scatter)
    return moved


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, softcap: float) -> Tensor:
    """(R, L, H, D), (R, L, K, D) twice -> (R, L, H, D). softmax works in float32 inside and rounds once."""
    (num_rows, length, num_heads, _), groups = q.shape, q.shape[2] // k.shape[2]
    # The heads of a group share keys: they stand below each other as more queries, and no key is repeated.
    q = (
        q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).reshape(-1, groups * length, q.shape[-1])
    )  # (R * K, G * L, D)
    k, v = k.permute(0, 2, 3, 1).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    bias = bias.repeat(groups, 1)[None]
    scores = _capped(torch.bmm(q, k) * scale, softcap) + bias if softcap else torch.baddbmm(bias, q, k, alpha=scale)
    out = torch.bmm(scores.softmax(-1), v)  # (R * K, G * L, D)
    out = out.view(num_rows, -1, groups, length, out.shape[-1])
    return out.permute(0, 3, 1, 2, 4).reshape(num_rows, length, num_heads, -1)


def _long(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: RowBoundaries, window: int) -> Tensor:
    """As `_plain`, by sdpa, which holds no scores. With a window, so many queries at a time: they see two windows."""
    attend = nn.functional.scaled_dot_product_attention
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not window:
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    bias = rows.bias(2 * window - 1, window, q.dtype)
    outs = []
    for start in range(0, q.shape[2], window):
        first, stop = max(0, start - window + 1), min(start + window, q.shape[2])
        seen = bias[start - first : stop - first, : stop - first]
        queries, keys = slice(start, stop), slice(first, stop)
        outs.append(
            attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=seen, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(outs, dim=2).transpose(1, 2)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


class _Move(torch.autograd.Function):
    """Rows of x by index, 0 at the empty places. Its backward is the way back: also a gather, where autograd's own
    would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, empty: Tensor, back: Tensor, empty_back: Tensor) -> Tensor:
        ctx.save_for_backward(there, empty, back, empty_back)
        return x.index_select(0, there).index_fill_(0, empty, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, back, empty_back = ctx.saved_tensors
        return grad.index_select(0, back).index_fill_(0, empty_back, 0), None, None, None, None


AttentionInterface.register(ATTENTION_NAME, row_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
