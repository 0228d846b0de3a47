"""bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs, and training breaks silently. Not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_train.adapters.layers import lora_layers
from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel
from qlora_train.quant.bnb import dequantize, linear4bit_modules
from qlora_train.quant.fingerprint import print_base
from tests.loading import tiny_base, with_adapter

try:
    from bitsandbytes.nn.modules import has_avx512bf16
except ImportError:  # an older or newer bitsandbytes without the repacking
    has_avx512bf16 = None


def _evaluate(model: torch.nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 19)[None, :])
    model.train()


def test_weights_and_fingerprint_survive_an_evaluation(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    before = {name: dequantize(module.weight) for name, module in linear4bit_modules(base.model)}
    _evaluate(base.model)
    for name, module in linear4bit_modules(base.model):
        assert torch.equal(dequantize(module.weight), before[name]), name
    assert print_base(base.model).digest == base.print.digest


@pytest.mark.skipif(
    has_avx512bf16 is None or not has_avx512bf16(),
    reason="this CPU has no AVX512-BF16: bitsandbytes repacks nothing here",
)
def test_without_the_cure_training_breaks(tiny_llama_dir: Path) -> None:
    """The negative control: if this fails, bitsandbytes was mended and the cure can go."""
    base = tiny_base(tiny_llama_dir, dtype=torch.bfloat16)
    for _, module in linear4bit_modules(base.model):
        module.support_avx512bf16_for_cpu = True
    model = with_adapter(base)
    ids = torch.arange(3, 19)[None, :]
    batch = MicroBatch(ids, ids.clone(), 15, (0,), (16,))

    def gradient() -> torch.Tensor:
        CausalModel(model).loss_sum(batch).backward()
        parameter = next(p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in name)
        grad = parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
        model.zero_grad(set_to_none=True)
        return grad

    model.train()
    healthy = gradient()
    with model.disable_adapter():  # the base alone goes through bitsandbytes' own forward
        _evaluate(model)
    with pytest.raises(RuntimeError, match="repacked"):
        gradient()  # the fused function sees it
    for layer in lora_layers(model).values():
        layer.frozen = None
    broken = gradient()  # its plain twin, like PEFT's own layers, does not
    assert (broken - healthy).norm() > 0.1 * healthy.norm()
    _, module = next(linear4bit_modules(base.model))
    with pytest.raises(RuntimeError, match="repacked"):
        dequantize(module.weight)
