"""K-quants by `llama-quantize` itself, where it is on PATH: what is in the file, and what llama.cpp makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from gguf import GGUFReader

from tests.clients import llama_cpp, serve_check
from tests.commandline import run_cli, write_recipe
from tests.tiny import build_tiny_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="needs `llama-quantize` on PATH"),
]


@pytest.fixture(scope="module", params=[256, 192])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose layers are in whole blocks of a K-quant, and of one whose layers are not."""
    folder = tmp_path_factory.mktemp("quantize")
    model = build_tiny_llama(folder / "model", hidden_size=request.param, intermediate_size=512)
    assert run_cli("train", write_recipe(folder, model, eval__generate_rows=0)).code == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["q2_k", "q4_k_m", "q6_k"])
def test_the_file_is_measured_described_and_read_by_llama_cpp(name: str, run: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", run, tmp_path / "out", "--format", f"gguf-{name}", "export.max_kl=100")
    assert outcome.code == 0, outcome.err
    (file,) = (tmp_path / "out").glob("*.gguf")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    figures = json.loads((tmp_path / "out" / "export.json").read_text())
    (said,) = (notice for notice in figures["notices"] if notice.startswith("llama-quantize took"))
    assert set(re.findall(r"(\w+) for", said)) == kinds
    assert ("192 wide" in said) == ("192" in (run.parent / "model" / "config.json").read_text())
    assert 0 < figures["verification"]["exported"]["mean_kl"] < figures["verification"]["adapter_off"]["mean_kl"]
    if llama_cpp.AVAILABLE:
        found = serve_check.check_folder(tmp_path / "out", run)
        assert len(found) == 3 and all(check.ok for check in found), found


def test_the_command_of_the_refusal_writes_the_same_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = run_cli("export", run, tmp_path / "k", "--format", "gguf-q4_k_m", "export.max_kl=100")
    assert exported.code == 0, exported.err
    program = Path(shutil.which("llama-quantize") or "").parent
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused = run_cli("export", run, tmp_path / "none", "--format", "gguf-q4_k_m")
    said = re.search(r"export --format (gguf-f32), .*`(.*)`", " ".join(refused.err.split()))
    assert refused.code == 2 and said is not None, refused.err
    assert run_cli("export", run, tmp_path / "f", "--format", said[1]).code == 0
    subprocess.run(f"PATH={program}:$PATH; {said[2]}", shell=True, cwd=tmp_path / "f", check=True, capture_output=True)
    made, pasted = (GGUFReader(tmp_path / folder / "model-Q4_K_M.gguf").tensors for folder in ("k", "f"))
    assert len(made) == len(pasted)
    assert all((one.data == other.data).all() for one, other in zip(made, pasted, strict=True))
