"""Compiled decoder layers: the same numbers up to rounding, in training only, and still fast where fused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from qlora_train.adapters.layers import adapted_layers, lora_layers
from qlora_train.model.causal import CausalModel
from qlora_train.model.checkpointing import Checkpointing, apply_checkpointing, decoder_layers
from qlora_train.model.compiling import _gated_mlp, _is_gated_mlp, compile_layers, compiler_fault
from tests.loading import gradients, tiny_base, with_adapter
from tests.methods.cases import build, section_of, shake, write_experts
from tests.numerics.test_fused_linear import batch, step
from tests.tiny import build_tiny_lfm2, build_tiny_llama

FAULT = compiler_fault(torch.device("cpu"))
pytestmark = pytest.mark.skipif(FAULT is not None, reason=f"no compiler: {FAULT}")


def operators(model: PeftModel) -> Counter[str]:
    """Calls by operator of one step. (Under a dispatch mode nothing would run compiled.)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CausalModel(model).loss_sum(batch()).backward()
    gradients(model)
    return Counter({event.key: event.count for event in profile.key_averages()})


def saved_tensors(model: PeftModel) -> list[torch.Tensor]:
    """Different tensors that are saved for the backward pass of one step."""
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        loss = CausalModel(model).loss_sum(batch())
    del loss
    return list(saved.values())


def test_only_the_gated_mlp_as_llama_computes_it_is_put_in_another_order() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)

    class Swapped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    sizes = {"hidden_size": 32, "intermediate_size": 48}
    mlp, llama = Qwen3MLP(Qwen3Config(**sizes)), LlamaConfig(**sizes)
    assert _is_gated_mlp(mlp)
    assert not any(_is_gated_mlp(module) for module in (Doubled(llama), Swapped(llama), torch.nn.Linear(2, 2)))
    x = torch.randn(3, 32)
    torch.testing.assert_close(_gated_mlp(mlp, x), mlp(x), rtol=0, atol=0)


def test_compiled_layers_train_alike_and_keep_the_early_stop(tiny_llama_dir: Path) -> None:
    """One test, as compiling is what takes its time."""
    model = with_adapter(tiny_base(tiny_llama_dir))
    expected_loss, expected = step(model)
    apply_checkpointing(model, Checkpointing("full"))
    step(model)
    eager = operators(model)
    compile_layers(model)
    for policy in (Checkpointing(), Checkpointing("full")):
        apply_checkpointing(model, policy)
        assert all(layer.gradient_checkpointing for layer in decoder_layers(model))
        loss, found = step(model)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for name in expected:
            assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 1e-4, name
    counts = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counts > 0, "nothing was compiled"
    compiled = operators(model)
    for name in ("aten::mm", "aten::addmm_", "qlora_train::dequantize_into"):
        assert compiled[name] == eager[name] > 0, name
    for name in ("aten::mul", "aten::rsqrt", "aten::silu"):
        assert compiled[name] < eager[name], f"{name} is fused"
    assert not any(layer.num_fallbacks for layer in lora_layers(model).values())
    apply_checkpointing(model, Checkpointing())
    inner, positions = model.config.intermediate_size, batch().input_ids.numel()
    wide = [t for t in saved_tensors(model) if t.numel() == positions * inner]
    # Gate, up, and their product, which the last projection reads: the activation's result is computed again.
    assert len(wide) == 3 * len(decoder_layers(model))
    model.eval()
    with torch.no_grad():
        CausalModel(model).loss_sum(batch(rows=3, length=9))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counts, "evaluation is not compiled"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mole", "flora_core"])
def test_gates_of_layers_and_weights_of_convolutions_go_with_compiled_layers(method: str, tmp_path: Path) -> None:
    """Both act inside of a decoder layer and outside of its linear layers."""
    if method == "mole":
        folder = build_tiny_llama(tmp_path / "model")
        section = section_of("mole", write_experts(folder, tmp_path), granularity="layer")
    else:
        folder = build_tiny_lfm2(tmp_path / "model")
        section = section_of("flora_core", target_modules=("conv", "q_proj"))
    model = build(folder, section).model
    for layer in adapted_layers(model).values():
        shake(layer)
    expected_loss, expected = step(model)
    compile_layers(model)
    for policy in (Checkpointing(), Checkpointing("full")):
        apply_checkpointing(model, policy)
        loss, found = step(model)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for name in expected:
            assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 1e-4, name


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> object:
        raise FileNotFoundError("g++ not found\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    assert compiler_fault(torch.device("cpu")) == "FileNotFoundError: g++ not found"
