"""The chunked loss against `F.cross_entropy` on whole logits: values, gradients, chunk sizes, soft cap, bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody reads

from qlora_train.loss import linear_cross_entropy_sum

N, H, V = 37, 64, 200


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    return hidden, (torch.randn(V, H) / 8).to(dtype), torch.randint(0, V, (N,))


def _reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, softcap: float
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 2, 7, 36, 37, 38, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy_for_any_chunk_size(chunk: int, softcap: float, with_bias: bool) -> None:
    hidden, weight, labels = _inputs()
    bias = torch.randn(V) if with_bias else None
    expected = _reference(hidden, weight, labels, bias, softcap)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    loss = linear_cross_entropy_sum(
        hidden, weight, labels, bias_V=bias, softcap=softcap, sizes=(chunk, (chunk + 1) // 2)
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    # float32 sums of 37 terms near 5 and of 200-term products: 1e-6 relative is a few ulp.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_the_softmax_in_float32() -> None:
    hidden, weight, labels = _inputs(torch.bfloat16)
    expected = _reference(hidden, weight, labels, None, 0.0)
    loss = linear_cross_entropy_sum(hidden, weight, labels, sizes=(8, 3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, hidden)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    assert grad.dtype == torch.bfloat16
    # Both round the logits' gradient to bf16 once before the matmul: they may differ by its last place.
    torch.testing.assert_close(grad, expected_grad, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("count", [515, 1031, 3000])
def test_bfloat16_divides_by_the_count_itself(count: int) -> None:
    """1 / count is no value of bfloat16: rounded, it would scale every gradient of a step by up to 0.4 %."""
    hidden, weight, labels = _inputs(torch.bfloat16)
    (whole,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels, sizes=(8, 3)), hidden)
    (part,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels, sizes=(8, 3)) / count, hidden)
    assert torch.equal(part, (whole.float() * (torch.ones(()) / count)).bfloat16())


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels = _inputs()
    loss = linear_cross_entropy_sum(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_weights_multiply_each_token_s_loss_and_gradient(chunk: int, softcap: float) -> None:
    hidden, weight, labels = _inputs()
    weights = torch.rand(N) * 2
    weights[3] = 0
    logits = F.linear(hidden, weight)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    loss = linear_cross_entropy_sum(
        hidden, weight, labels, weights_N=weights, softcap=softcap, sizes=(chunk, (chunk + 1) // 2)
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    assert not grad[3].any() and grad[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_one_change_no_bit(dtype: torch.dtype) -> None:
    hidden, weight, labels = _inputs(dtype)
    plain, ones = (linear_cross_entropy_sum(hidden, weight, labels, weights_N=w) for w in (None, torch.ones(N)))
    assert torch.equal(plain, ones)
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in (plain, ones)))


def test_scales_with_the_incoming_gradient() -> None:
    hidden, weight, labels = _inputs()
    (grad,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels), hidden)
    (tenth,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels) / 10, hidden)
    torch.testing.assert_close(tenth, grad / 10)


def test_no_supervised_token_gives_zero_and_not_nan() -> None:
    hidden = torch.randn(0, H, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, torch.randn(V, H), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and hidden.grad.shape == (0, H)


def test_never_holds_all_logits() -> None:
    """No tensor of the forward is as large as (N, V) when the chunk is smaller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    hidden, weight, labels = (
        torch.randn(64, 8, requires_grad=True),
        torch.randn(4096, 8),
        torch.zeros(64, dtype=torch.int64),
    )
    with Largest() as seen:
        linear_cross_entropy_sum(hidden, weight, labels, sizes=(4, 4)).backward()
    assert 0 < seen.numel <= 4096 * 8  # the weight itself; all logits would be 64 * 4096


def test_a_trainable_head_is_refused() -> None:
    hidden, weight, labels = _inputs()
    with pytest.raises(ValueError, match="frozen head"):
        linear_cross_entropy_sum(hidden, weight.requires_grad_(), labels)
