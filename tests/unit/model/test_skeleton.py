"""What can be refused from a config alone: targets, widths, vocabulary, length, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, Mamba2Config, Phi3Config, T5Config

from qlora_train.errors import ModelError
from qlora_train.model.skeleton import (
    build_skeleton,
    check_length,
    check_rotary,
    check_skipped,
    check_targets,
    check_vocabulary,
    check_widths,
    head_name,
    linear_layers,
    load_config,
    load_tokenizer,
    name_table,
)
from qlora_train.model.source import Source
from qlora_train.recipe.schema import QuantSection
from tests.tiny import SIZES
from tests.unit.memory.planned import recipe_of


def llama(**changes: Any) -> nn.Module:
    return build_skeleton(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes}))


@pytest.fixture(scope="module")
def skeleton() -> nn.Module:
    return llama()


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """Config and tokenizer only: a skeleton needs no weights."""
    shutil.copytree(tiny_llama_dir, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "m"


def test_a_skeleton_has_modules_and_no_memory(skeleton: nn.Module) -> None:
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in llama(num_hidden_layers=400).parameters()} == {"meta"}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), GPTNeoXConfig(**SIZES), Phi3Config(**SIZES, num_key_value_heads=2)],
    ids=lambda c: c.model_type,
)
def test_the_head_is_found_and_is_no_linear_layer_to_adapt(config: Any) -> None:
    model = build_skeleton(config)
    name = head_name(model)
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear) and head.out_features == SIZES["vocab_size"]
    everything = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert everything - set(linear_layers(model)) == {name}


def test_an_encoder_is_no_causal_model() -> None:
    with pytest.raises(ModelError, match="'t5'"):
        build_skeleton(T5Config(d_model=64, num_layers=1, d_ff=64, num_heads=2, vocab_size=64))


def test_name_table_counts_last_names(skeleton: nn.Module) -> None:
    assert name_table(["a.x", "b.x", "y"]) == {"x": 2, "y": 1}
    assert set(name_table(linear_layers(skeleton)).values()) == {2}


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj",), ("self_attn.v_proj", "mlp.up_proj"), ("model.layers.0.mlp.up_proj",)]
)
def test_targets_that_match(skeleton: nn.Module, targets: str | tuple[str, ...]) -> None:
    check_targets(skeleton, targets)


@pytest.mark.parametrize(
    ("target", "near"), [("q_projj", "q_proj"), ("up_prj", "up_proj"), ("proj", "proj"), ("lm_head", "q_proj")]
)
def test_a_target_that_matches_nothing_names_the_nearest(skeleton: nn.Module, target: str, near: str) -> None:
    """Neither a part of a name nor the head is a match."""
    with pytest.raises(ModelError) as caught:
        check_targets(skeleton, ("v_proj", target))
    message = str(caught.value)
    assert f"'{target}' matches no linear layer, nearest: " in message and "'v_proj' matches" not in message
    nearest = message.partition("nearest: ")[2].partition(". Fix")[0]
    assert near in nearest and "k_proj (2 layers)" in message


def test_every_target_that_matches_nothing_is_named(skeleton: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"'wq' matches no linear layer.*'wv' matches no linear layer"):
        check_targets(skeleton, ("wq", "q_proj", "wv"))


def test_mixers_that_pass_an_adapter_by_are_refused_with_what_is_left() -> None:
    """PEFT refuses them, too, by a ValueError and after the model is loaded."""
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}
    model = build_skeleton(Mamba2Config(vocab_size=64, num_hidden_layers=1, **sizes))
    with pytest.raises(ModelError, match=r"mamba2 models read the weight of out_proj \(1 layers\)") as caught:
        check_targets(model, "all-linear")
    assert "name others: [in_proj]" in str(caught.value)
    check_targets(model, ("in_proj",))


def test_a_model_without_linear_layers_is_refused() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Linear:
            return self.lm_head

    with pytest.raises(ModelError, match="no linear layer to adapt"):
        check_targets(Headed(), "all-linear")


@pytest.mark.parametrize(
    ("width", "block_size", "fits"),
    [(128, 64, True), (128, 128, True), (128, 256, False), (192, 64, True), (192, 32, True), (192, 128, False),
     (96, 32, False), (96, 64, False)],
)  # fmt: skip
def test_widths_that_a_cpu_gets_wrong(width: int, block_size: int, fits: bool) -> None:
    """64 at least, whatever the block size; the MLP's width is a multiple of all."""
    model = llama(hidden_size=width, num_attention_heads=2, intermediate_size=512)
    quant = QuantSection(block_size=block_size)  # type: ignore[arg-type]
    if fits:
        check_widths(model, quant, torch.device("cpu"))
        return
    check_widths(model, quant, torch.device("cuda"))
    with pytest.raises(ModelError, match=rf"multiple of {max(64, block_size)}, first .*_proj with {width}") as caught:
        check_widths(model, quant, torch.device("cpu"))
    assert ("quant.block_size: 64" in str(caught.value)) == (block_size > 64), "only where that is enough"


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_layers_that_stay_in_16_bit_may_have_any_width(quant_type: str) -> None:
    model, cpu = llama(intermediate_size=96), torch.device("cpu")
    quant = QuantSection(quant_type=quant_type)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"first .*down_proj with 96: .*\(quant\.skip_modules: \[down_proj\]\)"):
        check_widths(model, quant, cpu)
    check_widths(model, quant.model_copy(update={"skip_modules": ("down_proj",)}), cpu)


@pytest.mark.parametrize(
    ("keys", "fits"),
    [
        ({"seq_len": 64}, True),
        ({"seq_len": 65}, False),
        ({"seq_len": 65, "batching": "shuffled"}, True),
        ({"seq_len": 65, "batching": "shuffled", "micro_batch_size": 2}, False),
        ({"seq_len": 65, "batching": "shuffled", "memory": "auto"}, False),
        ({"seq_len": 65, "batching": "shuffled", "eval_batch": 2}, False),
    ],
    ids=str,
)
def test_rows_must_not_change_each_others_rotary_embedding(keys: dict[str, Any], fits: bool) -> None:
    """LongRoPE takes its table by the longest row of the micro-batch."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    sizes = {**SIZES, "num_key_value_heads": 2, "original_max_position_embeddings": 64}
    config = Phi3Config(**sizes, rope_parameters=rope)
    train = {"micro_batch_size": 1, "grad_accum_steps": 4}
    train |= {key: keys[key] for key in ("micro_batch_size", "memory") if key in keys}
    data = {"train": ({"path": "a"},), "eval": ({"path": "b"},), "seq_len": keys["seq_len"]}
    data["batching"] = keys.get("batching", "packed")
    recipe = recipe_of(data=data, train=train, eval={"batch_size": keys.get("eval_batch", 1)})
    check_rotary(LlamaConfig(**SIZES), recipe)
    if fits:
        check_rotary(config, recipe)
        return
    with pytest.raises(ModelError, match=r"seq_len is 65, .* more than 64 tokens \(longrope\).* to 64 or less"):
        check_rotary(config, recipe)


def test_no_token_id_may_lie_outside_the_embedding() -> None:
    config = LlamaConfig(**{**SIZES, "vocab_size": 64})
    check_vocabulary(63, config)
    with pytest.raises(ModelError, match="token id 64, the model's embedding has 64 rows"):
        check_vocabulary(64, config)


def test_entries_of_skip_modules_must_name_a_layer() -> None:
    model = llama()
    check_skipped(model, ())
    check_skipped(model, ("up_proj", "model.layers.0.self_attn.q_proj"))
    with pytest.raises(ModelError, match="'q_projj' matches no linear layer"):
        check_skipped(model, ("up_proj", "q_projj"))


def test_rows_must_not_be_longer_than_the_positions() -> None:
    config = LlamaConfig(**SIZES)
    check_length(config, 512)
    with pytest.raises(ModelError, match="513, the model knows 512 positions"):
        check_length(config, 513)


def test_the_tokenizer_gets_a_pad_token_and_the_recipe_s_template(folder: Path, tmp_path: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    (tmp_path / "chat.jinja").write_text("{{ messages }}é", encoding="utf-8")
    own = load_tokenizer(Source("tiny", folder))
    assert own.pad_token_id == own.eos_token_id is not None
    assert "im_start" in own.chat_template
    assert load_tokenizer(Source("tiny", folder), tmp_path / "chat.jinja").chat_template == "{{ messages }}é"


def test_a_tokenizer_without_an_end_is_refused(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for key in ("eos_token", "pad_token"):
        config.pop(key)
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end token"):
        load_tokenizer(Source("tiny", folder))


def test_a_missing_tokenizer_and_an_unknown_model_type_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="the tokenizer does not load"):
        load_tokenizer(Source("tiny", folder))
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match=r"tiny: config\.json is not usable"):
        load_config(Source("tiny", folder))


def test_the_config_s_own_dtype_is_no_surprise(folder: Path) -> None:
    config = load_config(Source("tiny", folder))
    assert config.model_type == "llama" and config.dtype in (torch.bfloat16, "bfloat16")
