"""Adapters as servers take them: one rank, no scaling left, nothing that vLLM refuses; in PEFT's format and in GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_train.adapters.fold import Delta
from qlora_train.errors import ModelError
from qlora_train.export.formats import writers
from qlora_train.export.formats.gguf_lora import read_gguf_lora, write_gguf_lora
from qlora_train.export.formats.lora import folded, served_rank, vllm_problems, write_lora
from qlora_train.model.skeleton import linear_layers
from tests.unit.export_formats.served import REFUSED_BY_VLLM, random_model, tokenizer_for

TARGETS = ["q_proj", "k_proj", "up_proj"]


def adapted(**settings: Any) -> PeftModel:
    """A random model with a random adapter."""
    config = LoraConfig(**{"r": 5, "lora_alpha": 12, "target_modules": TARGETS, "use_rslora": True, **settings})
    model = get_peft_model(random_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted().save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 40)[None]).logits
    return found


def names(model: Any) -> list[str]:
    return list(linear_layers(model))


def test_plain_peft_gives_the_same_outputs(adapter: Path, tmp_path: Path) -> None:
    base = random_model("llama")
    (tmp_path / "plain").mkdir()
    rank = write_lora(tmp_path / "plain", adapter, names(base), "org/base")
    ours = PeftModel.from_pretrained(random_model("llama"), str(tmp_path / "plain"))
    trained = PeftModel.from_pretrained(random_model("llama"), str(adapter))
    torch.testing.assert_close(logits(ours), logits(trained), rtol=1e-5, atol=1e-5)
    assert (logits(base) - logits(trained)).abs().max() > 0.1, "negative control: the adapter does something"
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (rank, config["r"], config["lora_alpha"]) == (8, 8, 8)
    assert not config["use_rslora"] and config["target_modules"] == sorted(TARGETS)
    assert config["base_model_name_or_path"] == "org/base"


def test_layers_are_listed_where_not_all_of_a_name_are_adapted(tmp_path: Path) -> None:
    only = "model.layers.1.self_attn.q_proj"
    adapted(target_modules=[only]).save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "plain").mkdir()
    write_lora(tmp_path / "plain", tmp_path / "adapter", names(random_model("llama")), "org/base")
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["target_modules"] == [only]


def test_folding_is_exact_where_the_scaling_is_a_power_of_two() -> None:
    delta = Delta(torch.randn(5, 16), torch.randn(24, 5), 2.0)
    lora_A, lora_B = folded(delta, 8)
    assert lora_A.shape == (8, 16) and lora_B.shape == (24, 8)
    assert torch.equal(lora_A[5:], torch.zeros(3, 16)) and torch.equal(lora_B[:, :5], 2 * delta.lora_B)


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_ranks_are_padded_to_what_servers_take(rank: int, served: int) -> None:
    deltas = {
        "a": Delta(torch.ones(rank, 2), torch.ones(2, rank), 1.0),
        "b": Delta(torch.ones(1, 2), torch.ones(2, 1), 1.0),
    }
    assert served_rank(deltas) == served


def test_a_rank_that_no_server_takes_is_refused() -> None:
    with pytest.raises(ModelError, match="rank 513"):
        served_rank({"a": Delta(torch.ones(513, 2), torch.ones(2, 513), 1.0)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *((changes, " ".join(changes)) for changes in REFUSED_BY_VLLM if "r" not in changes),
        ({"r": 600}, "rank 600 is above"),
        ({"r": 0}, "rank 0"),
        ({"target_modules": None, "r": None}, ""),
    ],
)
def test_vllms_rules(changes: dict[str, Any], words: str, adapter: Path) -> None:
    model_names = names(random_model("llama"))
    assert vllm_problems(adapter, model_names) == []
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    if words == "":
        config, words = {key: value for key, value in config.items() if value is not None}, "lacks r, target_modules"
    path.write_text(json.dumps(config))
    assert words in "; ".join(vllm_problems(adapter, model_names))


def test_vllms_rules_on_tensors(adapter: Path) -> None:
    path, model_names = adapter / "adapter_model.safetensors", names(random_model("llama"))
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.model.layers.0.mlp.router.lora_A.weight": torch.ones(5, 4)}, path)
    assert "router is no layer of the model" in "; ".join(vllm_problems(adapter, model_names))
    save_file({**tensors, "model.norm.weight": torch.ones(4)}, path)
    assert "model.norm.weight is no LoRA weight" in "; ".join(vllm_problems(adapter, model_names))


def test_gguf_holds_the_update_in_llama_cpps_order(adapter: Path, tmp_path: Path) -> None:
    model, path = random_model("llama"), tmp_path / "adapter.gguf"
    write_gguf_lora(path, adapter, model.config, "tiny")
    read = read_gguf_lora(path, model.config, [name for name, _ in model.named_parameters()])
    trained = PeftModel.from_pretrained(random_model("llama"), str(adapter))
    assert len(read) == 6
    for name, delta in read.items():
        layer = trained.base_model.model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(delta.dense(torch.device("cpu")), layer.get_delta_weight("default"))


def test_gguf_tensors_of_no_weight_are_refused(adapter: Path, tmp_path: Path) -> None:
    config = random_model("llama").config
    write_gguf_lora(tmp_path / "adapter.gguf", adapter, config, "tiny")
    with pytest.raises(ModelError, match="10 tensors of no known weight"):
        read_gguf_lora(tmp_path / "adapter.gguf", config, ["model.layers.0.self_attn.q_proj.weight"])


NF4 = {"quant_type": "nf4", "double_quant": True, "block_size": 64}


@pytest.mark.parametrize(
    ("path", "quant", "command", "notice"),
    [
        ("org/base", NF4, "vllm serve org/base --enable-lora --max-lora-rank 8", "up to 0.27 gives the base its 4 bit"),
        ("org/base", None, "vllm serve org/base --enable-lora", ""),
        ("org/base", {**NF4, "double_quant": False}, "vllm serve org/base --enable-lora", "double quantisation off"),
        ("org/base", {**NF4, "block_size": 128}, "vllm serve org/base --enable-lora", "blocks of 128"),
        ("package:some/tiny.gguf", None, "vllm serve BASE --enable-lora", "BASE stands for the model in safetensors"),
    ],
)
def test_the_command_serves_the_base_that_was_trained_on(
    path: str, quant: Any, command: str, notice: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "BaseReader", lambda *_: None)
    run = SimpleNamespace(
        run_dir=SimpleNamespace(adapter=adapter),
        recipe=SimpleNamespace(model=SimpleNamespace(path=path)),
        base_print=SimpleNamespace(quant=quant),
    )
    linear_names, tokenizer = names(random_model("llama")), tokenizer_for("llama")
    job: Any = SimpleNamespace(
        run=run, source=None, tokenizer=tokenizer, golden=[], name="mine", linear_names=lambda: linear_names
    )
    (tmp_path / "plain").mkdir(exist_ok=True)
    written = writers.write_plain_lora(job, tmp_path / "plain")
    assert written.commands[0].startswith(command) and notice in " ".join(written.notices)
    assert bool(written.notices) == bool(notice) and (tmp_path / "plain" / "golden_prompts.json").is_file()
