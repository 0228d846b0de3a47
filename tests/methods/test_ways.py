"""The same method by other ways: the fused function and its plain twin, and a process that knows only the folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.layers import lora_layers
from qlora_train.adapters.state import save_adapter
from qlora_train.recipe.methods import METHODS
from tests.methods.cases import IDS, Case, build, section_of, shake
from tests.structure.source_tree import ROOT

FORMS = ("dora", "mtlora", "flora_core", "adalora", "aflora", "milora")
CHILD = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.methods.cases import IDS, reloaded, section_of
base, adapter, out, method, *experts = sys.argv[1:]
case = reloaded(Path(base), Path(adapter), section_of(method, [Path(one) for one in experts]))
save_file({"logits": case.logits()}, out)
"""


def loss_and_gradients(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    case.model.train()
    out = case.model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", FORMS)
def test_the_fused_function_serves_every_form_of_two_factors(method: str, tiny_dir: Path) -> None:
    """q, k and v read one tensor and are computed together; what their factors are made of gets its gradients."""
    found = []
    for fused in (True, False):
        case = build(tiny_dir, section_of(method), fused=fused)
        for layer in lora_layers(case.model).values():
            shake(layer, 0.02)
        found.append(loss_and_gradients(case))
        assert not any(layer.num_fallbacks for layer in lora_layers(case.model).values())
    (logits, grads), (plain_logits, plain_grads) = found
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    assert grads.keys() == plain_grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-3, atol=1e-6, msg=name)


def test_layers_that_read_one_tensor_are_computed_once(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are made anew at each call must not hide that the sibling's result is there."""
    from qlora_train.adapters import layers

    calls = []

    def counted(x: torch.Tensor, branches: list[object], *rest: object) -> object:
        calls.append(len(branches))
        return original(x, branches, *rest)  # type: ignore[arg-type]

    original = layers.lora_linear
    monkeypatch.setattr(layers, "lora_linear", counted)
    case = build(tiny_dir, section_of("mtlora"))
    case.logits()
    assert sorted(calls) == [1, 1, 2, 3], "o and down alone, gate with up, q with k and v"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_new_process_gives_the_same_logits(method: str, tiny_dir: Path, experts: list[Path], tmp_path: Path) -> None:
    case = build(tiny_dir, section_of(method, experts))
    for layer in lora_layers(case.model).values():
        shake(layer, 0.02)
        assert layer_tensors(layer, "default")
    case.model.eval()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(case.model, adapter)
    arguments = [tiny_dir, adapter, tmp_path / "out.safetensors", method, *experts]
    subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], check=True, cwd=ROOT, timeout=300)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], case.logits())
