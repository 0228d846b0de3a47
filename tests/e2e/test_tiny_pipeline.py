"""The whole pipeline through the command line on a tiny model: check, train, eval, export, chat."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.artifacts.folders import MANIFEST
from qlora_train.quant.fingerprint import hash_tensors
from tests.commandline import Outcome, run_cli, write_recipe, write_rows
from tests.tiny import build_tiny_gemma2, build_tiny_neox, build_tiny_phi3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = write_recipe(folder, tiny_llama_dir, eval__every=2)
    return folder, run_cli("train", recipe, "--json")


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, Outcome]) -> tuple[Path, Outcome]:
    folder, _ = trained
    return folder / "merged", run_cli("export", folder / "run", folder / "merged", "--json")


def test_check_shows_masks_and_modules(tmp_path: Path, tiny_llama_dir: Path) -> None:
    outcome = run_cli("check", write_recipe(tmp_path, tiny_llama_dir), "--list-modules")
    assert outcome.code == 0, outcome.err
    assert "train: 20 of 20 rows" in outcome.out and "q_proj" in outcome.out and "5 optimiser steps" in outcome.out
    assert "[<|im_end|>]" in outcome.out, "the end token is trained"
    assert not (tmp_path / "run").exists(), "check writes nothing"


def test_training_leaves_a_run_folder_that_explains_itself(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    run = folder / "run"
    assert result["num_steps"] == 5 and result["adapter"]["loss"] < result["base"]["loss"]
    assert {p.name for p in run.iterdir()} >= {
        "recipe.resolved.yaml",
        "environment.json",
        "base.json",
        "data.json",
        "metrics.jsonl",
        "eval.json",
        "run.json",
        "ckpt",
        "adapter",
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4, 5]
    resolved = (run / "recipe.resolved.yaml").read_text()
    assert "learning_rate: 0.01" in resolved and "# default" in resolved and "recipe.yaml:" in resolved
    base = json.loads((run / "base.json").read_text())
    assert base["quant"] == {"quant_type": "nf4", "double_quant": True, "block_size": 64, "storage_dtype": "uint8"}
    assert sum(t["quantised"] for t in base["tensors"].values()) == 14


def test_the_adapter_is_pefts_and_gives_our_logits(trained: tuple[Path, Outcome], tiny_llama_dir: Path) -> None:
    """Plain PEFT on a plain transformers 4-bit base, without a line of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_train.model.trained import load_trained, open_run

    folder, _ = trained
    ours = load_trained(open_run(folder / "run"))
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=quant, dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(base, str(folder / "run" / "adapter")).eval()
    ids = torch.arange(3, 40)[None, :]
    with torch.no_grad():
        theirs, mine = plain(input_ids=ids).logits, ours.model(input_ids=ids).logits
        with plain.disable_adapter():
            off = plain(input_ids=ids).logits
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
    assert (off - mine).abs().max() > 100 * (theirs - mine).abs().max(), "negative control: the adapter does something"


def test_the_export_is_accepted_and_described(exported: tuple[Path, Outcome]) -> None:
    folder, outcome = exported
    assert outcome.code == 0, outcome.err
    verdict = json.loads(outcome.out)["verdict"]
    assert verdict["accepted"] and verdict["kl_frac"] <= 0.01 and verdict["adapter_off"]["mean_kl"] > 0
    card = (folder / "README.md").read_text()
    assert "adapter switched off" in card and "20 rows" in card
    figures = json.loads((folder / "export.json").read_text())
    assert len(figures["modules"]) == 14 and all(row["delta_norm"] > 0 for row in figures["modules"])
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }


def oracle(run: Path) -> dict[str, torch.Tensor]:
    """The merge in memory, from the loaded model: the test's oracle, written without the streaming merge."""
    from qlora_train.adapters.layers import delta_weight, lora_layers
    from qlora_train.model.trained import load_trained, open_run
    from qlora_train.quant.bnb import dequantize

    trained = load_trained(open_run(run))
    weights = {}
    for name, layer in lora_layers(trained.model).items():
        merged = dequantize(layer.get_base_layer().weight) + delta_weight(layer, "default")
        weights[f"{name.removeprefix('base_model.model.')}.weight"] = merged.to(torch.bfloat16)
    return weights


def test_transformers_loads_the_export_bit_equal_to_the_oracle(
    exported: tuple[Path, Outcome], trained: tuple[Path, Outcome], tiny_llama_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = exported
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    weights = oracle(trained[0] / "run")
    assert len(weights) == 14
    missing = reference.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    ids = torch.arange(3, 40)[None, :]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_sharded_export_equals_the_single_file(
    exported: tuple[Path, Outcome], trained: tuple[Path, Outcome], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    outcome = run_cli("export", trained[0] / "run", tmp_path / "sharded", "export.shard_gib=1e-4")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    whole = load_file(exported[0] / "model.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "sharded").glob("*.safetensors"):
        parts |= load_file(path)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", output_loading_info=True)
    assert not any(info.values())


def test_export_dtype_changes_the_files_and_the_distance(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    kl = {}
    for dtype in ("bfloat16", "float16", "float32"):
        outcome = run_cli("export", trained[0] / "run", tmp_path / dtype, f"export.export_dtype={dtype}", "--json")
        assert outcome.code == 0, outcome.err
        kl[dtype] = json.loads(outcome.out)["verdict"]["merged"]["mean_kl"]
        assert {t.dtype for t in load_file(tmp_path / dtype / "model.safetensors").values()} == {getattr(torch, dtype)}
    # float16 rounds 8 times finer, which is a 64th in KL; what is below 1e-7 is the rounding of the comparison itself.
    assert abs(kl["float32"]) < 1e-7 and abs(kl["float16"]) < max(1e-7, kl["bfloat16"] / 16) and kl["bfloat16"] > 0


def test_a_wrong_merge_is_refused_and_nothing_published(
    trained: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification's own negative control: half of the scale."""
    from qlora_train.export import tensors

    real = tensors.read_updates
    monkeypatch.setattr(
        tensors, "read_updates", lambda folder: {n: replace(u, scaling=u.scaling / 2) for n, u in real(folder).items()}
    )
    outcome = run_cli("export", trained[0] / "run", tmp_path / "wrong")
    assert outcome.code == 4 and "is not the trained one" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_eval_repeats_the_runs_own_figures(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    stored = json.loads(outcome.out)
    again = run_cli("eval", folder / "run", "--json")
    assert again.code == 0, again.err
    figures = json.loads(again.out)
    for side in ("base", "adapter"):
        assert figures[side]["loss"] == pytest.approx(stored[side]["loss"], rel=1e-6), side
        assert figures[side]["answers"] == stored[side]["answers"], side
    more = json.loads(run_cli("eval", folder / "run", "eval.generate_rows=5", "--json").out)
    assert more["adapter"]["scores"]["num_answers"] == 5


def test_chat_answers_from_run_export_and_base(
    trained: tuple[Path, Outcome], exported: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    for where in (folder / "run", exported[0]):
        outcome = run_cli("chat", where, "--once", "list files number 3", "--max-new-tokens", "6")
        assert outcome.code == 0, outcome.err
        assert outcome.out.strip(), where
    import io

    typed = ["list files number 3", "/base", "/clear", "list files number 3", "/adapter x", "/clear all", "/exit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    outcome = run_cli("chat", folder / "run", "--max-new-tokens", "6", "--system", "be brief")
    assert outcome.code == 0, outcome.err
    assert "base answers" in outcome.err and "no adapter 'x'" in outcome.err and "/clear stands alone" in outcome.err
    first, second = outcome.out.split("\n")[:2]
    assert first != second, "the adapter and the base answer differently"


def test_several_adapters_on_one_base(trained: tuple[Path, Outcome], tiny_llama_dir: Path) -> None:
    from qlora_train import api

    folder, _ = trained
    other = folder / "other"
    other.mkdir()
    recipe = write_recipe(other, tiny_llama_dir, run__dir="second", run__seed=7, adapter__r=8, eval__generate_rows=0)
    assert run_cli("train", recipe).code == 0
    session = api.open_chat(folder / "run", adapters=[other / "second"])

    def ask() -> str:
        session.clear()
        return "".join(session.reply("list files number 3", max_new_tokens=8))

    alone = api.open_chat(other / "second")
    expected = "".join(alone.reply("list files number 3", max_new_tokens=8))
    first = ask()
    session.switch("second")
    assert ask() == expected
    session.switch("run")
    assert ask() == first


def run_real(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_a_real_process_prints_json_and_keeps_stderr_apart(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, eval__generate_rows=0, train__max_steps=1)
    done = run_real("train", recipe, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_steps"] == 1
    assert "held-out loss" in done.stderr and "Traceback" not in done.stderr
    assert "UserWarning" not in done.stderr and "kernels-community" not in done.stderr, done.stderr


@pytest.mark.parametrize("build", [build_tiny_neox, build_tiny_phi3])
def test_fused_projections_train_and_export(build: Callable[[Path], Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, build(tmp_path / "model"), eval__generate_rows=0)
    assert run_cli("train", recipe).code == 0
    outcome = run_cli("export", tmp_path / "run", tmp_path / "merged", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["verdict"]["accepted"]


def test_plain_text_and_full_checkpointing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """The text format, `loss_on` left alone, an unquantised base, and all batchings."""
    rows = [{"text": f"a line of text, number {i} " * (1 + i % 4)} for i in range(24)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", rows[:3])
    padding = {}
    for batching in ("shuffled", "length_grouped", "packed"):
        recipe = write_recipe(
            tmp_path,
            tiny_llama_dir,
            quant__quant_type="none",
            train__checkpointing="full",
            data__batching=batching,
            train__micro_batch_size=2,
            run__dir=batching,
        )
        outcome = run_cli("train", recipe, "--json")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["adapter"]["scores"] is None, "plain text asks nothing"
        train = json.loads((tmp_path / batching / "data.json").read_text())["splits"][0]
        padding[batching] = train["batching"]["padding_frac"]
    assert max(padding["packed"], padding["length_grouped"]) < padding["shuffled"]
    assert run_cli("export", tmp_path / "shuffled", tmp_path / "merged").code == 0


@pytest.mark.slow
def test_methods_and_schedules_change_the_adapter(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Each key that decides what is trained does."""
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__eval=[], eval__generate_rows=0, train__max_steps=4)
    changes = [
        "adapter.method=lora",
        "adapter.method=rslora",
        "adapter.alpha=12",
        "adapter.dropout=0.5",
        "quant.quant_type=fp4",
        "quant.double_quant=false",
        "quant.block_size=32",
        "train.schedule=constant",
        "train.schedule=linear",
        "train.warmup_frac=0.5",
        "train.learning_rate=0.02",
        "train.weight_decay=0.5",
        "train.adam_beta1=0.5",
        "train.adam_beta2=0.9",
        "train.max_grad_norm=0.01",
        "train.micro_batch_size=3",
        "train.grad_accum_steps=1",
        "data.loss_on=all",
        "data.max_train_rows=12",
        "run.seed=1",
        "model.compute_dtype=bfloat16",
    ]
    seen: dict[str, str] = {}
    for index, change in enumerate(changes):
        outcome = run_cli("train", recipe, change, f"run.dir={tmp_path / str(index)}")
        assert outcome.code == 0, (change, outcome.err)
        tensors = load_file(tmp_path / str(index) / "adapter" / "adapter_model.safetensors")
        digest = hash_tensors(*(tensors[name] for name in sorted(tensors)))
        assert digest not in seen, f"{change} trains what {seen[digest]} trains"
        seen[digest] = change


def test_a_step_that_the_run_split_itself_is_no_other_recipe(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """`train.memory: auto` trains with another split than the recipe says, and everything after it knows."""
    recipe = write_recipe(
        tmp_path, tiny_llama_dir, train__memory="auto", train__micro_batch_size=1, train__grad_accum_steps=4
    )
    assert run_cli("train", recipe).code == 0
    run = tmp_path / "run"
    bound = json.loads((run / "adapter" / MANIFEST).read_text())["recipe"]
    assert (bound["train.micro_batch_size"], bound["train.grad_accum_steps"]) == (4, 1)
    for arguments in (("eval", run), ("analyze", run), ("export", run, tmp_path / "merged")):
        outcome = run_cli(*arguments)
        assert outcome.code == 0, outcome.err


def test_a_model_that_transformers_runs_without_sdpa_trains_unpacked(tmp_path: Path) -> None:
    """`auto` leaves the attention of long rows to transformers; to ask for sdpa is refused before any loading."""
    model = build_tiny_gemma2(tmp_path / "model")
    long = {"data__batching": "length_grouped", "data__seq_len": 768, "train__max_steps": 1, "eval__generate_rows": 0}
    recipe = write_recipe(tmp_path, model, **long)
    asked = "model.attn_implementation=sdpa"
    refused = run_cli("check", recipe, asked)
    assert refused.code == 4 and "runs Gemma2ForCausalLM without sdpa" in refused.err, refused
    assert run_cli("plan", recipe).code == 0
    trained = run_cli("train", recipe)
    assert trained.code == 0, trained.err
    exported = run_cli("export", tmp_path / "run", tmp_path / "merged", "export.verify=layers", "export.verify_rows=2")
    assert exported.code == 0, exported.err
