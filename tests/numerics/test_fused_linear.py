"""The fused 4-bit linear + LoRA function against its plain twin, and what it costs: counted, not believed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_train.adapters.layers import Lora4bit, lora_layers, use_fused
from qlora_train.data.loader import MicroBatch
from qlora_train.kernels.dense import FrozenLinear, Workspace
from qlora_train.kernels.lora_linear import Branch, _keep, lora_linear
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing
from qlora_train.quant.bnb import QuantSettings, dequantize, dequantize_into, quantize
from tests.loading import gradients, tiny_base, with_adapter

QUANTS = [{}, {"quant_type": "fp4"}, {"double_quant": False}, {"block_size": 128}, {"quant_type": "none"}]
SETTINGS = QuantSettings("nf4", double_quant=True, block_size=64, storage_dtype="uint8")


MATMULS = [getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_")]
MATMULS = [getattr(op, overload) for op in MATMULS for overload in op.overloads()]


class Ops(TorchDispatchMode):
    """Counts operators by name; matmuls by their shapes too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.matmul_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        if func in MATMULS:
            a, b = args[-2:]  # (m, k), (k, n)
            self.matmul_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))

    @property
    def num_dequantised(self) -> int:
        return sum(self.names[name] for name in ("qlora_train::dequantize_into", "bitsandbytes::dequantize_4bit"))


def batch(rows: int = 2, length: int = 12) -> MicroBatch:
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    return MicroBatch(ids, ids.clone(), float(rows * length), tuple(range(rows)), (length,) * rows)


def step(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    torch.manual_seed(0)
    loss = CausalModel(model).loss_sum(batch())
    loss.backward()
    return loss.detach(), gradients(model)


def plain(model: PeftModel) -> PeftModel:
    for layer in lora_layers(model).values():
        layer.frozen = None
    return model


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_float32_loss_and_gradients_are_those_of_the_plain_twin(tiny_llama_dir: Path, quant: dict[str, Any]) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir, **quant))
    assert all(layer.frozen is not None for layer in lora_layers(model).values())
    loss, found = step(model)
    expected_loss, expected = step(plain(model))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys() and len(found) == 28
    for name in found:
        # Relative to the tensor's norm: sums of a few hundred float32 products in another order.
        assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 1e-5, name


def test_bfloat16_is_as_near_to_float32_as_the_plain_twin(tiny_llama_dir: Path) -> None:
    _, exact = step(with_adapter(tiny_base(tiny_llama_dir)))
    model = with_adapter(tiny_base(tiny_llama_dir, dtype=torch.bfloat16))
    errors = []
    for one in (model, plain(model)):
        _, found = step(one)
        errors.append(
            torch.stack([(found[n].float() - exact[n]).norm() / exact[n].norm() for n in sorted(exact)]).mean()
        )
    fused_error, plain_error = map(float, errors)
    assert fused_error <= 1.1 * plain_error, (fused_error, plain_error)
    assert plain_error < 0.1, "negative control: the comparison means something"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_layer_against_autograd(bias: bool, dropout: float) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(64, 96, bias=bias)
    x = torch.randn(3, 5, 64, generator=generator, requires_grad=True)
    A, B = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 64), (96, 4)))
    grad = torch.randn(3, 5, 96, generator=generator)
    torch.manual_seed(7)
    (y,) = lora_linear(x, [Branch(FrozenLinear(layer, "p", Workspace()), A, B, 1.5)], dropout)
    found = torch.autograd.grad(y, (x, A, B), grad)
    torch.manual_seed(7)
    mask = _keep(x.detach().reshape(-1, 64), dropout, int(torch.randint(2**62, ()))).view(3, 5, 64) if dropout else 1.0
    mask = mask / (1 - dropout)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + 1.5 * (x * mask) @ A.t() @ B.t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (x, A, B), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours.dtype == torch.float32


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    keep = _keep(torch.ones(400, 500), 0.3, seed=3)
    assert set(keep.unique().tolist()) == {0.0, 1.0} and float(keep.mean()) == pytest.approx(0.7, abs=0.005)
    assert torch.equal(keep, _keep(torch.ones(400, 500), 0.3, seed=3))
    assert not torch.equal(keep, _keep(torch.ones(400, 500), 0.3, seed=4))


def test_dropout_in_bfloat16_rounds_once() -> None:
    """1 / 0.95 is 1.0526, and 1.0547 once rounded to bfloat16: kept values would all be too large."""
    x, branch = torch.full((64, 64), 3.0, dtype=torch.bfloat16), torch.eye(64)
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(layer.weight)
    (y,) = lora_linear(x, [Branch(FrozenLinear(layer, "p", Workspace()), branch, branch, 1.0)], 0.05)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(3 / 0.95, dtype=torch.bfloat16))}


def counted_step(model: PeftModel, rows: int = 2, length: int = 12) -> Ops:
    """The operators of one step under full checkpointing."""
    apply_checkpointing(model, Checkpointing("full"))
    model.train()
    with Ops() as ops:
        CausalModel(model).loss_sum(batch(rows, length)).backward()
    gradients(model)
    return ops


def test_a_checkpointed_step_dequantises_every_weight_twice_and_the_plain_twin_thrice(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir, dtype=torch.bfloat16))
    num_weights = len(lora_layers(model))
    counts = [counted_step(model).num_dequantised for _ in range(3)]
    # The last layer's recomputation finds what its forward pass left; so does the first of the next step, never.
    assert max(counts) <= 2 * num_weights, counts
    assert max(counts) >= 2 * num_weights - 7, "a count of nothing would prove nothing"
    ops = counted_step(plain(model))
    three = ops.num_dequantised + ops.names["bitsandbytes::gemm_4bit"]
    assert three > 2 * num_weights


def test_resident_layers_are_never_dequantised_and_change_no_bit(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir, dtype=torch.bfloat16))
    expected_loss, expected = step(model)
    kept = 0
    for layer in lora_layers(model).values():
        assert layer.frozen is not None
        kept += layer.frozen.make_resident(torch.bfloat16)
    assert kept == 2 * sum(layer.in_features * layer.out_features for layer in lora_layers(model).values())
    assert counted_step(model).num_dequantised == 0
    apply_checkpointing(model, Checkpointing())
    loss, found = step(model)
    assert torch.equal(loss, expected_loss) and all(torch.equal(found[n], expected[n]) for n in expected)


def test_matmul_flops_of_a_checkpointed_step_are_those_of_the_formula(tiny_llama_dir: Path) -> None:
    """(6 - 2 s_down) N a token for the base of a layer that is computed again, and 4 N for the last, which is not."""
    model = with_adapter(tiny_base(tiny_llama_dir))
    base = branch = 0
    for name, layer in lora_layers(model).items():
        inputs, outputs, r = layer.in_features, layer.out_features, 4
        # Two layers, of which the first is computed again, but for the product of its last base matmul and B's.
        again = "layers.0" in name
        to_the_end = again and not name.endswith("down_proj")
        # Nothing before the first layer trains: what its q, k and v give back to their input is not asked for.
        dx = not ("layers.0.self_attn" in name and not name.endswith("o_proj"))
        base += 2 * inputs * outputs * (1 + to_the_end + dx)
        branch += 2 * r * (inputs * (2 + again + dx) + outputs * (3 + to_the_end))
    num_tokens, num_scored = 2 * 12, 2 * 11
    head = 4 * 512 * 128 * num_scored
    assert counted_step(model).matmul_flops == (base + branch) * num_tokens + head


def test_nothing_is_saved_but_the_input_and_the_skinny_activations() -> None:
    layer = nn.Linear(64, 96)
    x = torch.randn(10, 64, requires_grad=True)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, [Branch(FrozenLinear(layer, "p", Workspace()), A, B, 1.0)], 0.3)
    assert sorted(tuple(t.shape) for t in saved) == [(10, 4), (10, 64)]


def test_siblings_share_a_pass_and_never_a_stale_result(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir))
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    q, k, v = (attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj"))
    x = torch.randn(2, 5, q.in_features, requires_grad=True)

    def expected() -> list[torch.Tensor]:
        return list(lora_linear(x, [q.branch(), k.branch(), v.branch()]))

    with Ops() as ops:
        together = [one(x) for one in (q, k, v)]
    assert ops.names["aten::mm"] == 1 + 3, "x A^T once, and three base matmuls"
    for one, found, same in zip((q, k, v), together, expected(), strict=True):
        assert torch.equal(found, same)
        (alone,) = lora_linear(x, [one.branch()])  # on some processors a product by itself sums in another order
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    q(x)
    with torch.no_grad():
        k.lora_B["default"].weight.add_(1)
        assert not k(x).requires_grad
    changed = k(x)
    torch.testing.assert_close(changed, expected()[1], rtol=1e-5, atol=1e-5)
    assert (changed - together[1]).abs().max() > 0.1
    q(x)
    with torch.no_grad():
        x.mul_(2)
    torch.testing.assert_close(v(x), expected()[2], rtol=1e-5, atol=1e-5)
    assert (v(x) - together[2]).abs().max() > 0.1


def test_siblings_do_not_answer_for_another_mode_or_adapter(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir))
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    q, k = attention.q_proj, attention.k_proj
    x = torch.randn(5, q.in_features)
    model.add_adapter("other", model.peft_config["default"])
    use_fused(model)
    torch.nn.init.normal_(k.lora_B["other"].weight)
    model.eval()
    q(x)
    model.set_adapter("other")
    switched = k(x)
    model.set_adapter("default")
    assert (k(x) - switched).abs().max() > 0.1
    k.lora_dropout["default"] = torch.nn.Dropout(0.5)
    torch.nn.init.normal_(k.lora_B["default"].weight)
    still = k(x)
    q(x)
    model.train()
    assert (k(x) - still).abs().max() > 0.1, "with dropout now"


def test_an_output_that_nobody_reads_costs_no_gradient(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir))
    attention = model.get_submodule("base_model.model.model.layers.1.self_attn")
    x = torch.randn(5, attention.q_proj.in_features, requires_grad=True)
    attention.q_proj(x)
    attention.k_proj(x).sum().backward()
    assert (
        attention.q_proj.lora_A["default"].weight.grad is None
        or not attention.q_proj.lora_A["default"].weight.grad.any()
    )
    assert attention.k_proj.lora_A["default"].weight.grad.abs().max() > 0 and x.grad is not None
    base_x, lora_x = x.detach().requires_grad_(), x.grad
    plain(model)
    attention.k_proj(base_x).sum().backward()
    torch.testing.assert_close(lora_x, base_x.grad, rtol=1e-5, atol=1e-6)


def test_the_workspace_follows_a_weight_that_changes_in_place() -> None:
    workspace = Workspace()
    weight, other = (
        quantize(torch.randn(96, 64, generator=torch.Generator().manual_seed(s)), SETTINGS) for s in (0, 1)
    )
    first = workspace.dense("p", weight, torch.float32).clone()
    assert torch.equal(first, dequantize(weight))
    with Ops() as ops:
        workspace.dense("p", weight, torch.float32)
    assert ops.num_dequantised == 0, "asked again, it is still there"
    assert torch.equal(workspace.dense("p", other, torch.float32), dequantize(other))
    assert torch.equal(workspace.dense("p", weight, torch.float32), first)
    weight.data[:] = weight.data.flip(0)
    weight.data = weight.data.clone()
    assert not torch.equal(workspace.dense("p", weight, torch.float32), first)
    assert workspace.num_bytes == 96 * 64 * 4, "one place, one shape, one dtype: one buffer"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantising_in_place_gives_the_bits_of_bitsandbytes(
    quant_type: str, dtype: torch.dtype, double_quant: bool
) -> None:
    settings = QuantSettings(quant_type, double_quant, 64, "uint8")
    weight = quantize(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)), settings)
    out = torch.full((96, 128), float("nan"), dtype=dtype)
    dequantize_into(weight, out)
    assert torch.equal(out, dequantize(weight).to(dtype))
    strided = torch.full((96, 256), float("nan"), dtype=dtype)[:, ::2]
    dequantize_into(weight, strided)
    assert torch.equal(strided, out)


def test_the_switch_chooses_the_forward(tiny_llama_dir: Path) -> None:
    from qlora_train.adapters.attach import attach_adapter
    from qlora_train.recipe.schema import AdapterSection

    base = tiny_base(tiny_llama_dir)
    model = attach_adapter(base.model, AdapterSection(r=4), 0, base_name="tiny", fused=False)
    layer = next(iter(lora_layers(model).values()))
    assert isinstance(layer, Lora4bit) and layer.frozen is None
    with Ops() as before:
        layer(torch.randn(3, layer.in_features))
    workspace = use_fused(model)
    with Ops() as after:
        layer(torch.randn(3, layer.in_features))
    assert before.names["qlora_train::dequantize_into"] == 0 < after.names["qlora_train::dequantize_into"]
    assert workspace.num_bytes > 0
