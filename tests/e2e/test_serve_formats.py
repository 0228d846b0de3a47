"""Formats through the command line: each is written, read back, measured, published; and loaded by its own client."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from qlora_train.export.base import as_float32
from qlora_train.export.choice import Choice
from qlora_train.export.formats import gguf_lora, lora
from qlora_train.export.formats.families import Layout
from qlora_train.export.formats.gguf_file import GgufModel, GgufModelWriter
from qlora_train.export.tensors import MergedTensors
from qlora_train.model.trained import open_run
from tests.clients import checks, llama_cpp
from tests.commandline import Outcome, run_cli, write_recipe

FORMATS = ("gguf-f32", "gguf-f16", "gguf-q8_0", "lora", "gguf-lora", "w4a16", "nf4", "nf4-lora")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.AVAILABLE, reason="needs xllamacpp (uv sync --group serve)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    assert run_cli("train", write_recipe(folder, tiny_llama_dir, eval__generate_rows=0)).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> tuple[Path, Outcome]:
    asked = [part for name in FORMATS for part in ("--format", name)]
    outcome = run_cli("export", run, run.parent / "served", *asked, "--json")
    assert outcome.code == 0, outcome.err
    return run.parent / "served", outcome


def trained_model(run: Path) -> Any:
    from qlora_train.model.load import to_float32
    from qlora_train.model.trained import load_trained

    trained = load_trained(open_run(run))
    to_float32(trained.model)
    return trained.model


def test_every_format_is_measured_and_described(exported: tuple[Path, Outcome]) -> None:
    folder, outcome = exported
    results = {result["format"]: result for result in json.loads(outcome.out)["formats"]}
    assert tuple(results) == FORMATS
    for name, result in results.items():
        figures = json.loads((folder / name / "export.json").read_text())
        exact = figures["verification"]["exported"]
        assert exact["mean_kl"] == result["verdict"]["merged"]["mean_kl"] and exact["top1_agreement"] > 0.85
        # float32 rounds where a finite product is added up; 4 bit are coarse, and this adapter's effect is large.
        limit = {"w4a16": 1e-2, "nf4": 1e-2, "gguf-q8_0": 1e-4}.get(name, 1e-6)
        assert abs(exact["mean_kl"]) < limit, name
        card = (folder / name / "README.md").read_text()
        assert "adapter switched off" in card and result["commands"][0].split()[0] in card
        assert (folder / name / "MANIFEST.json").is_file()
    lines = (folder.parent / "run" / "exports.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines][: len(FORMATS)]
    assert [Path(line["folder"]).name for line in noted] == [line["export_dtype"] for line in noted] == list(FORMATS)


def test_one_format_is_the_folder_itself(run: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", run, tmp_path / "one", "--format", "gguf-f16")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "one" / "model-F16.gguf").is_file() and "llama-server -m" in outcome.out
    assert "accepted: KL is" in outcome.out and "Modelfile" in outcome.out
    again = run_cli("export", run, tmp_path / "one", "--format", "gguf-f16")
    assert again.code == 2 and "exists already" in again.err


@pytest.mark.slow
def test_safetensors_go_beside_the_others(run: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", run, tmp_path / "out", "--format", "safetensors", "--format", "lora", "--json")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "safetensors" / "model.safetensors").is_file()
    assert json.loads(outcome.out)["merged"]["verdict"]["accepted"]


@needs_llama_cpp
def test_llama_cpp_answers_as_the_trained_model(run: Path, exported: tuple[Path, Outcome]) -> None:
    folder = exported[0] / "gguf-f16"
    greedy = checks.transformers_greedy(trained_model(run))
    found = checks.check_llama_cpp(folder / "model-F16.gguf", checks.read_golden(folder), greedy)
    assert len(found) == 3 and all(check.ok for check in found), found
    assert min(check.of for check in found) >= 8


@needs_llama_cpp
def test_the_adapter_in_llama_cpp_is_the_merged_model(
    run: Path, exported: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """On a GGUF of the base that was trained on; without the adapter the answers are others."""
    from qlora_train.export.base import BaseReader, as_float32
    from qlora_train.model.skeleton import load_config
    from tests.tiny import VOCAB_SIZE

    finished = open_run(run)
    source = finished.source()
    base = BaseReader(finished, source)
    whole = exported[0] / "gguf-f32" / "model-F32.gguf"
    writer = _writer_like(whole, tmp_path / "base.gguf", load_config(source), finished)
    for name in writer_names(finished):
        writer.add(name, as_float32(base.as_trained(name)))
    writer.close()
    ids = list(range(5, 60))
    adapter = exported[0] / "gguf-lora" / "adapter.gguf"
    with llama_cpp.LlamaServer(whole, exact=True) as server:
        merged = torch.tensor(server.log_probabilities(ids, VOCAB_SIZE)).double()
    with llama_cpp.LlamaServer(tmp_path / "base.gguf", lora=adapter, exact=True) as server:
        adapted = torch.tensor(server.log_probabilities(ids, VOCAB_SIZE)).double()
    with llama_cpp.LlamaServer(tmp_path / "base.gguf", exact=True) as server:
        alone = torch.tensor(server.log_probabilities(ids, VOCAB_SIZE)).double()
    assert (
        float((merged.exp() * (merged - adapted)).sum()) < 1e-6 < 1e-3 < float((merged.exp() * (merged - alone)).sum())
    )


def writer_names(finished: Any) -> list[str]:
    return sorted(finished.base_print.tensors)


def _writer_like(whole: Path, path: Path, config: Any, finished: Any) -> GgufModelWriter:
    from qlora_train.export.formats.vocabulary import read_vocabulary

    tokenizer = finished.tokenizer(finished.source())
    shapes = {name: finished.base_print.tensors[name].shape for name in writer_names(finished)}
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, [])
    return GgufModelWriter(path, config, vocabulary, shapes, file_type="F32", name="base")


def test_transformers_reads_the_gguf_as_it_is(exported: tuple[Path, Outcome], run: Path) -> None:
    """An independent reader of weights and of hyperparameters."""
    from transformers import AutoModelForCausalLM, GgufConfig

    folder = exported[0] / "gguf-f32"
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model-F32.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, trained_model(run)(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_vllm_takes_the_folded_adapter(exported: tuple[Path, Outcome], run: Path, tiny_llama_dir: Path) -> None:
    from qlora_train.model.skeleton import build_skeleton, linear_layers, load_config
    from qlora_train.model.source import Source

    names = list(linear_layers(build_skeleton(load_config(Source("tiny", tiny_llama_dir)))))
    rules = checks.check_vllm_rules(exported[0] / "lora", names, None)[0]
    assert rules.ok, rules.note


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4a16", "nf4"])
def test_transformers_loads_four_bit_folders(name: str, exported: tuple[Path, Outcome], run: Path) -> None:
    from transformers import AutoModelForCausalLM

    if name == "w4a16":
        pytest.importorskip("compressed_tensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        exported[0] / name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        served = loaded(input_ids=ids).logits.float().log_softmax(-1)
        trained = trained_model(run)(input_ids=ids).logits.log_softmax(-1)
    assert 0 < float((trained.exp() * (trained - served)).sum(-1).mean()) < 1e-2


def test_the_base_with_its_own_codes_is_exact_in_four_bit(exported: tuple[Path, Outcome], run: Path) -> None:
    """By plain transformers and PEFT, as the card says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_train.model.load import to_float32
    from qlora_train.quant.bnb import forbid_cpu_repacking

    folder = exported[0] / "nf4-lora"
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    served = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    forbid_cpu_repacking(served)
    to_float32(served)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            served(input_ids=ids).logits, trained_model(run)(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


CHOOSING = ("export.base=auto", "export.compare_rows=4", "eval.generate_rows=2", "eval.max_new_tokens=2")


def test_what_to_merge_onto_is_measured_once_for_all_formats(run: Path, tmp_path: Path) -> None:
    asked = ("--format", "gguf-f16", "--format", "safetensors", "--format", "lora")
    outcome = run_cli("export", run, tmp_path / "out", *CHOOSING, *asked)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("measuring the merge: original") == 1 and "writing gguf-f16" in outcome.err
    found = {name: json.loads((tmp_path / "out" / name / "export.json").read_text()) for name in asked[1::2]}
    choice = found["gguf-f16"]["choice"]
    assert [one["onto"] for one in choice["candidates"]] == ["dequantized", "original", "requantized"]
    assert found["safetensors"]["choice"] == choice and found["lora"]["choice"] is None
    assert found["gguf-f16"]["merged_onto"] == found["safetensors"]["merged_onto"] and not found["lora"]["merged_onto"]
    assert outcome.out.count("merged onto") == 1 and " ".join(outcome.out.split()).count(choice["sentence"]) == 1
    card = (tmp_path / "out" / "gguf-f16" / "README.md").read_text()
    assert choice["sentence"] in card and "(which these files were made from)" in card


@pytest.mark.slow
def test_formats_are_merged_onto_what_was_chosen(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original weights, here by force: another model than the trained one, and the adapter's base stays its own."""
    monkeypatch.setattr(Choice, "onto", "original")
    asked = ("--format", "gguf-f32", "--format", "nf4-lora", "export.max_loss_rise=100", "--json")
    outcome = run_cli("export", run, tmp_path / "out", *CHOOSING, *asked)
    assert outcome.code == 0, outcome.err
    gguf, nf4 = json.loads(outcome.out)["formats"]
    assert gguf["verdict"]["onto"] == "original" and gguf["verdict"]["merged"]["mean_kl"] > 1e-6
    assert nf4["verdict"]["onto"] == "dequantized" and abs(nf4["verdict"]["merged"]["mean_kl"]) < 1e-6
    assert "another model than the trained one" in (tmp_path / "out" / "gguf-f32" / "README.md").read_text()
    assert "this is the model that was trained" in (tmp_path / "out" / "nf4-lora" / "README.md").read_text()
    finished = open_run(run)
    source = finished.source()
    name = "model.layers.0.mlp.up_proj.weight"
    written = GgufModel(tmp_path / "out" / "gguf-f32" / "model-F32.gguf", finished.config(source))[name]
    assert torch.equal(written, MergedTensors(finished, source, "original").exact(name))


def test_a_layer_that_no_row_reaches_is_not_rounded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_train.export.formats.writers.round_in_layers", lambda *_: None)
    outcome = run_cli("export", run, tmp_path / "w", "--format", "w4a16", "export.max_kl=9")
    assert outcome.code == 4 and "no calibration row reaches model.layers.0.mlp.down_proj.weight" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_is_too_far_off_is_refused_with_its_price(run: Path, tmp_path: Path) -> None:
    strict = "export.max_kl_frac=1e-9"
    refused = run_cli("export", run, tmp_path / "q", strict, "--format", "gguf-q8_0")
    assert refused.code == 4 and "KL " in refused.err and "accept this one: export.max_kl=" in refused.err
    assert list(tmp_path.iterdir()) == [], "nothing is published"
    taken = run_cli("export", run, tmp_path / "q", strict, "export.max_kl=1", "--format", "gguf-q8_0")
    assert taken.code == 0, taken.err
    assert "accepted by export.max_kl=1" in taken.out and "not quite the model" in taken.out
    assert "not quite the model that was trained" in (tmp_path / "q" / "README.md").read_text()
    exact = run_cli("export", run, tmp_path / "f", strict, "--format", "gguf-bf16")
    assert exact.code == 4 and "max_kl=" not in exact.err, "16 bit have to be the model that was trained"
    unread = run_cli("export", run, tmp_path / "f", "export.max_kl=1", "--format", "gguf-bf16")
    assert unread.code == 2 and "it is for formats of 8 bits or fewer" in unread.err, unread.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gguf-q9"], "no such format. Fix: one of safetensors, gguf-f32"),
        (["--format", "gguf-q4_k_m"], "llama-quantize model-F32.gguf model-Q4_K_M.gguf Q4_K_M"),
        (["--format", "lora", "--format", "nf4-lora", "export.base=auto"], "no effect on lora, nf4-lora"),
        (["--format", "gguf-f16", "export.export_dtype=float16"], "export.export_dtype has no effect here"),
        (["--format", "gguf-f16", "export.shard_gib=1"], "export.shard_gib has no effect here"),
        (["export.max_kl=1"], "export.max_kl has no effect here"),
        (["export.max_loss_rise=1"], "give export.base=original or export.base=auto"),
        (["export.base=original", "export.max_kl_frac=0.5"], "give export.base=dequantized or export.base=auto"),
        (["eval.generate_rows=3"], "eval.generate_rows has no effect here"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    arguments: list[str], words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    outcome = run_cli("export", run, tmp_path / "out", *arguments)
    assert outcome.code == 2 and words in outcome.err, outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_k_quants_by_llama_cpps_program(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program copies the file that it is given, and is asked for the right type."""
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$3" > "$(dirname "$2")/asked"\ncp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    outcome = run_cli("export", run, tmp_path / "out", "--format", "gguf-q4_k_m")
    assert outcome.code == 0, outcome.err
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model-Q4_K_M.gguf", "Modelfile"} <= files and "model-F32.gguf" not in files
    assert (tmp_path / "out" / "asked").read_text() == "Q4_K_M\n"
    program.write_text("#!/bin/sh\necho no such type >&2\nexit 1\n")
    failed = run_cli("export", run, tmp_path / "other", "--format", "gguf-q4_k_m")
    assert failed.code == 6 and "no such type" in failed.err and not (tmp_path / "other").exists()
    assert "llama-quantize model-F32.gguf model-Q4_K_M.gguf Q4_K_M" in " ".join(failed.err.split())


def rows_left_in_place(monkeypatch: pytest.MonkeyPatch) -> str:
    """Queries and keys are written in the order of transformers."""
    monkeypatch.setattr(Layout, "to_file", lambda self, parameter, rows: rows)
    return "gguf-f32"


def half_the_scale(monkeypatch: pytest.MonkeyPatch) -> str:
    whole = lora.folded
    monkeypatch.setattr(lora, "folded", lambda delta, rank: (whole(delta, rank)[0], whole(delta, rank)[1] / 2))
    return "lora"


def half_the_scale_of_one_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the mean over all tokens may not show."""
    exact = MergedTensors.exact

    def halved(self: MergedTensors, stored: str) -> torch.Tensor:
        whole = exact(self, stored)
        if stored != "model.layers.0.mlp.up_proj.weight":
            return whole
        return (whole + as_float32(self.base.as_trained(self.parameter(stored)))) / 2

    monkeypatch.setattr(MergedTensors, "exact", halved)
    return "gguf-f32"


def a_missing_module(monkeypatch: pytest.MonkeyPatch) -> str:
    read = gguf_lora.read_deltas
    monkeypatch.setattr(gguf_lora, "read_deltas", lambda adapter: dict(list(read(adapter).items())[1:]))
    return "gguf-lora"


def a_changed_byte(monkeypatch: pytest.MonkeyPatch) -> str:
    close = GgufModelWriter.close

    def spoil(self: GgufModelWriter) -> None:
        close(self)
        tensor = GGUFReader(self._path, "r+").tensors[0]
        tensor.data[:] = np.flip(tensor.data)

    monkeypatch.setattr(GgufModelWriter, "close", spoil)
    return "gguf-f16"


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (rows_left_in_place, "[qk]_proj.weight is not what was written"),
        (half_the_scale, "is not the model that was trained|is not the trained one"),
        (half_the_scale_of_one_module, "layers.0.mlp.up_proj.weight is not the trained one"),
        (a_missing_module, "lacks the update of model.layers"),
        (a_changed_byte, "is not what was written"),
    ],
)
def test_planted_faults_are_caught(
    plant: Callable[[pytest.MonkeyPatch], str], words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = plant(monkeypatch)
    outcome = run_cli("export", run, tmp_path / "out", "--format", name)
    assert outcome.code == 4 and re.search(words, outcome.err), outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_layers_alone_give_the_same_figures(run: Path, exported: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome = run_cli("export", run, tmp_path / "out", "--format", "w4a16", "export.verify=layers", "--json")
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(outcome.out)["formats"]
    whole = json.loads((exported[0] / "w4a16" / "export.json").read_text())["verification"]["exported"]
    assert result["verdict"]["how"] == "layers"
    assert result["verdict"]["merged"]["mean_kl"] == pytest.approx(whole["mean_kl"], rel=1e-3)
