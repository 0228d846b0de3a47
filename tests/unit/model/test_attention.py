"""Each row of a pack gets the attention of that row alone, on every path, and what cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
)

from qlora_train.data.loader import collate
from qlora_train.errors import ModelError
from qlora_train.model import attention
from qlora_train.model.attention import (
    ATTENTION_NAME,
    PLAIN_TOKENS,
    RowBoundaries,
    check_packable,
    row_attention,
    run_packed,
)
from qlora_train.model.causal import CausalModel
from tests.packs import CONFIGS, alone, packed, rows_of, table_of, tiny_model
from tests.tiny import SIZES

# Row 3 fills a pack with 0 and 1; 5 shares one with 4; WINDOW is 8: rows of 3 and 8 lie within it, the others do not.
LENGTHS = (13, 5, 3, 20, 9, 8)
PACKS = ((3, 0, 1), (4, 5, 2))
STARTS = (0, 20, 33, 64, 73, 81)
T = 64  # PACK_MULTIPLE: the packs have 26 and 44 places of padding
HEADS, KEY_HEADS, DIM = 4, 2, 16


class Layer(nn.Module):
    """What the interface reads of a model's attention layer."""

    num_key_value_groups = HEADS // KEY_HEADS

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(2, T, heads, DIM, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )


def boundaries() -> RowBoundaries:
    batch = packed(table_of(LENGTHS), *PACKS)
    assert batch.row_starts == STARTS and batch.input_ids.shape == (2, T)
    return RowBoundaries(batch.row_starts, batch.row_lengths, 2 * T, torch.device("cpu"))


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """softmax(cap(scale q k^T)) v with an explicit mask of blocks, padding giving 0; (B, T, H, D)."""
    row = torch.full((2 * T,), -1)
    for index, (start, pack_row) in enumerate(zip(STARTS, (3, 0, 1, 4, 5, 2), strict=True)):
        row[start : start + LENGTHS[pack_row]] = index
    row = row.view(2, T)
    place = torch.arange(T)
    back = place[:, None] - place
    seen = (row[:, :, None] == row[:, None, :]) & (back >= 0) & (back < (window or T))
    seen = seen[:, None]
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return (out * (row >= 0)[:, None, :, None]).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 8, 100])
@pytest.mark.parametrize("plain_tokens", [512, 6], ids=["plain", "sdpa"])
def test_equals_attention_with_an_explicit_mask(
    plain_tokens: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "PLAIN_TOKENS", plain_tokens)
    expected = reference(*(inputs := qkv()), 0.3, window or 0, softcap or 0.0)
    out, _ = row_attention(
        Layer(), *inputs, None, scaling=0.3, row_boundaries=boundaries(), sliding_window=window, softcap=softcap
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_scale_is_one_over_the_root_of_the_head_dim_unless_given() -> None:
    inputs = qkv()
    usual, _ = row_attention(Layer(), *inputs, None, row_boundaries=boundaries())
    quarter, _ = row_attention(Layer(), *inputs, None, row_boundaries=boundaries(), scaling=0.25)
    other, _ = row_attention(Layer(), *inputs, None, row_boundaries=boundaries(), scaling=0.5)
    assert torch.equal(usual, quarter) and not torch.allclose(usual, other)


def test_bfloat16_is_near_float32() -> None:
    out, _ = row_attention(Layer(), *qkv(torch.bfloat16), None, scaling=0.25, row_boundaries=boundaries())
    assert out.dtype == torch.bfloat16
    # Scores and probabilities are rounded to 8 bits once each.
    torch.testing.assert_close(out.float(), reference(*qkv(), 0.25, 0, 0.0), rtol=0.05, atol=0.03)


def boundaries_of(*lengths: int) -> RowBoundaries:
    """Rows end to end, and six places of padding after them."""
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    return RowBoundaries(starts, lengths, sum(lengths) + 6, torch.device("cpu"))


def test_rows_of_like_length_share_a_bucket_and_little_is_padded() -> None:
    buckets, moves = boundaries_of(100, 75, 74, 20, 16, 15, 14).buckets
    assert [(b.num_rows, b.length) for b in buckets] == [(1, 128), (2, 96), (1, 32), (2, 16), (1, 16)]
    assert len(moves.empty_slots) == 28 + 21 + 22 + 12 + 1 + 2
    assert moves.empty_positions.tolist() == [314, 315, 316, 317, 318, 319]


def test_long_rows_are_hardly_padded() -> None:
    buckets, moves = boundaries_of(1000, 750, 749, 513, 512).buckets
    assert [(b.num_rows, b.length) for b in buckets] == [(2, 1000), (1, 749), (2, 513)]
    assert len(moves.empty_slots) == 250 + 1


def test_rows_of_all_lengths_come_in_few_shapes() -> None:
    """oneDNN makes and keeps matmuls for each: 1,000 packs of 64 rows have no more than 10 lengths in 7 sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(1000):
        lengths = torch.randint(1, PLAIN_TOKENS + 1, (64,), generator=generator).tolist()
        shapes |= {(bucket.num_rows, bucket.length) for bucket in boundaries_of(*lengths).buckets[0]}
    assert 30 < len(shapes) <= 70


class Allocations(TorchDispatchMode):
    """The largest result, in elements, of any operation under it."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_dense_mask_is_built() -> None:
    """120 rows of 8 tokens: T x T would be 921,600 elements, and the widest thing there is has 960 x 512."""
    model = CausalModel(tiny_model("gemma3"))
    batch = packed(table_of([8] * 120), range(120))
    with torch.no_grad(), Allocations() as seen:
        model.hidden(batch)
    assert 960 * 128 <= seen.largest <= 960 * 512 < 960 * 960
    # Control: the mask that transformers makes of the same position ids.
    sdpa = tiny_model("gemma3", "sdpa")
    with torch.no_grad(), Allocations() as seen:
        sdpa.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    assert seen.largest >= 960 * 960


@pytest.mark.parametrize("family", CONFIGS)
def test_each_row_is_what_it_is_alone(family: str) -> None:
    model, table = CausalModel(tiny_model(family)), table_of(LENGTHS)
    check_packable(model.model)
    batch = packed(table, *PACKS)
    with torch.no_grad():
        hidden = model.hidden(batch)
        assert hidden.isfinite().all(), "padding too"
        for row, found in zip(batch.row_ids, rows_of(batch, hidden), strict=True):
            expected = model.hidden(alone(table, row))[0]
            # Values are near 1 to 4; sums in another order.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_rows_and_generation_are_sdpa_s(family: str) -> None:
    """Without boundaries: the same numbers as sdpa's, or eager's where sdpa cannot cap scores."""
    other = "eager" if family == "gemma2" else "sdpa"
    ours, theirs = (tiny_model(family, name) for name in (ATTENTION_NAME, other))
    batch = collate(table_of(LENGTHS), [[0], [1], [3]], 0)
    padding = torch.tensor([[0] * 7 + [1] * 13, [1] * 20, [0] * 3 + [1] * 17])
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": padding}):
            found, expected = (
                model(input_ids=batch.input_ids, use_cache=False, **kwargs).logits for model in (ours, theirs)
            )
            assert bool(found.isfinite().all()), "padding has no defined value, but one"
            real = padding.bool() if kwargs else slice(None)
            torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-6)
        sampled = [
            model.generate(batch.input_ids[:1], attention_mask=padding[:1], max_new_tokens=12, do_sample=False)
            for model in (ours, theirs)
        ]
    assert torch.equal(*sampled) and sampled[0].shape[1] > 20


def edges(starts: tuple[int, ...], lengths: tuple[int, ...], num_positions: int) -> tuple[list[int], int]:
    cumulative, longest = RowBoundaries(starts, lengths, num_positions, torch.device("cpu")).segments
    assert cumulative.dtype == torch.int32
    return cumulative.tolist(), longest


def test_segments_cover_rows_and_padding() -> None:
    assert edges((0, 5), (5, 3), 8) == ([0, 5, 8], 5)
    # Two packs of eight: 5 + 2 and a place of padding, then 3 and five places.
    assert edges((0, 5, 8), (5, 2, 3), 16) == ([0, 5, 7, 8, 11, 16], 5)


@pytest.mark.parametrize("window", [0, 1, 4, 8, 100])
def test_the_kernel_for_rows_end_to_end_is_asked_for_the_same(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contract (torch.nn.attention.varlen), written out; the kernel itself needs a card."""

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max()) and enable_gqa
        left, right = window_size
        assert right == 0, "causal"
        outs = []
        for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            place = torch.arange(b - a)
            back = place[:, None] - place
            seen = (back >= 0) & ((back <= left) if left >= 0 else True)
            keys, values = (x[a:b].transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, dim=0) for x in (k, v))
            scores = (q[a:b].transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
            outs.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    inputs = qkv()
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in inputs)
    found = attention._by_varlen(q, k, v, boundaries(), 0.3, window).view(2, T, HEADS, DIM)
    expected = reference(*inputs, 0.3, window, 0.0)
    torch.testing.assert_close(found[0, :38], expected[0, :38], rtol=1e-5, atol=1e-6)  # padding has a value of its own
    torch.testing.assert_close(found[1, :20], expected[1, :20], rtol=1e-5, atol=1e-6)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"something_new": True}, "something_new"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"is_causal": False}, "both directions"),
    ],
    ids=str,
)
def test_what_changes_attention_is_refused_and_not_ignored(kwargs: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=rf"{what}.*data.batching: length_grouped"):
        row_attention(Layer(), *qkv(), None, row_boundaries=boundaries(), **kwargs)
    harmless: dict[str, Any] = {"position_ids": torch.zeros(1), "use_cache": False, "s_aux": None, "is_causal": True}
    row_attention(Layer(), *qkv(), None, row_boundaries=boundaries(), **harmless)
    with pytest.raises(ModelError, match="Layer attends in both directions"):
        row_attention(Layer(is_causal=False), *qkv(), None, row_boundaries=boundaries())


@contextmanager
def dropping(decoder: Any, keyword: str) -> Iterator[None]:
    """The decoder's layers do not hand on this keyword, as those of models without **kwargs."""
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != keyword}), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    yield
    for handle in handles:
        handle.remove()


def test_a_model_that_does_not_hand_on_boundaries_is_refused() -> None:
    model = CausalModel(tiny_model("llama"))
    batch = packed(table_of(LENGTHS), *PACKS)
    with dropping(model.decoder, "row_boundaries"), pytest.raises(ModelError, match="not told where the rows"):
        model.hidden(batch)
    model.hidden(batch)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_packs_are_refused_under_other_attention(name: str) -> None:
    with pytest.raises(ModelError, match=f"runs with {name} attention"):
        run_packed(tiny_model("llama", name).model, packed(table_of(LENGTHS), *PACKS))


GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1), "linear_attention"),
        (Qwen3NextConfig(**GROUPED, num_experts=2, num_experts_per_tok=1), "linear_attention"),
        (Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), "conv"),
        (Llama4TextConfig(**GROUPED, num_local_experts=2, head_dim=32), "chunked_attention"),
        (JambaConfig(**GROUPED, attn_layer_offset=1, attn_layer_period=2), "linear_attention"),
        (GptOssConfig(**GROUPED, num_local_experts=2, head_dim=32), "attention sinks"),
        (BloomConfig(vocab_size=512, hidden_size=64, n_layer=1, n_head=2), "an attention of its own"),
        (LlamaConfig(**GROUPED, attention_dropout=0.1), "attention_dropout of 0.1"),
        (LlamaConfig(**GROUPED, is_causal=False), "both directions"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_models_in_which_rows_cannot_be_kept_apart_are_refused(config: Any, what: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ModelError, match=f"{what}.*data.batching: length_grouped"):
        check_packable(model)


def test_a_state_or_a_convolution_is_refused_wherever_it_hides() -> None:
    model = tiny_model("llama")
    model._is_stateful = True
    with pytest.raises(ModelError, match="carries a state"):
        check_packable(model)
    model._is_stateful = False
    check_packable(model)
    model.model.layers[1].extra = nn.Conv1d(2, 2, 3)
    with pytest.raises(ModelError, match="or a convolution"):
        check_packable(model)
