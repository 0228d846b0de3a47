"""Rows of single tokens: what is attached, where they start, what is saved, and what plain PEFT makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from qlora_train.adapters.attach import adapter_facts, attach_adapter, load_adapter
from qlora_train.adapters.fold import read_deltas, read_updates
from qlora_train.adapters.state import CONFIG, load_adapter_config, save_adapter
from qlora_train.adapters.tokens import NewTokens, mean_row, token_layers
from qlora_train.adapters.updates import VocabularyRows
from qlora_train.artifacts.folders import publishing
from qlora_train.errors import ModelError
from qlora_train.model.causal import CausalModel
from qlora_train.model.load import to_float32
from qlora_train.quant.fingerprint import print_base
from qlora_train.recipe.schema import AdapterSection, TrainSection
from qlora_train.train.optim import build_optimizer
from tests.loading import tiny_base
from tests.tiny import VOCAB_SIZE, build_tiny_llama, build_tiny_neox

IDS = torch.tensor([[3, 4, 5, 300, 7, 300, 9]])
TEXTS = ("<a>", "<b>")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tokens") / "llama", tie=request.param)


def is_tied(folder: Path) -> bool:
    return bool(json.loads((folder / CONFIG.replace("adapter_", "")).read_text())["tie_word_embeddings"])


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rows 5 and 300, every tensor of it moved."""
    path = tmp_path_factory.mktemp("saved")
    save_adapter(shaken(attached(folder)), path)
    return path


def attached(
    folder: Path, ids: tuple[int, ...] = (5, 300), added: tuple[bool, ...] = (False, False), **section: Any
) -> PeftModel:
    tokens = NewTokens(TEXTS, ids, added)
    wanted = AdapterSection(r=4, alpha=8.0, new_tokens=TEXTS, **section)
    return attach_adapter(tiny_base(folder).model, wanted, 0, base_name="tiny", tokens=tokens)


def shaken(model: PeftModel) -> PeftModel:
    """Every trained tensor moved away from its start, to the same values each time."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=0.05, generator=generator)
    return model.eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_known_tokens_start_at_their_own_rows_and_nothing_of_the_base_changes(folder: Path) -> None:
    base = tiny_base(folder)
    expected, digest = logits(base.model), base.print.digest
    model = attached(folder)
    # The logits of two tokens are products of their own: sums of 128 terms in another order.
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert print_base(model).digest == digest
    tables = ["model.embed_tokens"] + ([] if is_tied(folder) else ["lm_head"])
    own = {name: layer for name, layer in token_layers(model).items() if layer.tied_adapter is None}
    assert list(own) == tables and set(token_layers(model)) == {"model.embed_tokens", "lm_head"}
    without = attach_adapter(tiny_base(folder).model, AdapterSection(r=4, alpha=8.0), 0, base_name="tiny")
    more = adapter_facts(model).num_trainable - adapter_facts(without).num_trainable
    assert more == len(tables) * len(TEXTS) * 128
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or "trainable_tokens_delta" in name), name
    groups = {group["name"]: group for group in build_optimizer(model, TrainSection(weight_decay=0.1)).param_groups}
    assert groups["adapter"]["weight_decay"] == 0.1 and groups["new tokens"]["weight_decay"] == 0.0
    assert len(groups["new tokens"]["params"]) == len(tables)


def test_added_tokens_and_rows_of_zeros_start_from_the_mean(folder: Path) -> None:
    """A token is as little known to a head of its own as to the embedding, whatever stands there."""
    base = tiny_base(folder)
    with torch.no_grad():
        base.model.get_input_embeddings().weight[300] = 1e-20
    tokens = NewTokens((*TEXTS, "<c>"), (5, 300, VOCAB_SIZE), (False, False, True))
    section = AdapterSection(r=4, alpha=8.0, new_tokens=tokens.texts)
    model: Any = attach_adapter(base.model, section, 0, base_name="tiny", tokens=tokens)
    for layer in token_layers(model).values():
        table, rows = layer.get_base_layer().weight, layer.trained()
        assert rows is not None and rows.num_new == 1
        assert torch.equal(rows.rows_RH[0], table[5])
        for row in rows.rows_RH[1:]:
            torch.testing.assert_close(row, table.mean(0), rtol=1e-5, atol=1e-7)


def test_the_mean_is_that_of_the_whole_table() -> None:
    table = torch.randn(100, 8).bfloat16()
    torch.testing.assert_close(mean_row(table.split(7)), table.float().mean(0), rtol=1e-5, atol=1e-7)


def test_plain_peft_computes_the_same_from_the_folder(folder: Path, saved: Path) -> None:
    model = load_adapter(tiny_base(folder).model, saved).eval()
    ours = logits(model)
    assert torch.equal(ours, logits(shaken(attached(folder)))), "what is loaded is what was saved"
    theirs = logits(PeftModel.from_pretrained(tiny_base(folder).model, str(saved)).eval())
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    base = logits(tiny_base(folder).model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base) and CausalModel(model).head.rows is None
    assert (ours - base).abs().max() > 0.1 and CausalModel(model).head.rows is not None


def test_rows_that_the_table_lacks_follow_its_last(folder: Path, tmp_path: Path) -> None:
    """One token has a row, the other none. Off, it reads and predicts as the mean row; the adapter's is saved."""
    new = torch.tensor([[3, 5, VOCAB_SIZE, 7, VOCAB_SIZE]])
    model = attached(folder, (5, VOCAB_SIZE), (False, True))
    start = logits(model, new)
    assert start.shape[-1] == VOCAB_SIZE + 1
    ours = logits(shaken(model), new)
    save_adapter(model, tmp_path)
    loaded = load_adapter(tiny_base(folder).model, tmp_path).eval()
    assert torch.equal(logits(loaded, new), ours) and not torch.allclose(ours, start, atol=1e-2)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, new), start, rtol=1e-5, atol=1e-6)
        assert CausalModel(loaded).head.vocab_size == VOCAB_SIZE + 1
    to_float32(loaded)
    assert torch.equal(logits(loaded, new), ours)
    update = read_updates(tmp_path)["model.embed_tokens.weight"]
    assert isinstance(update, VocabularyRows) and update.ids == (5, VOCAB_SIZE)
    table = tiny_base(folder).model.get_input_embeddings().weight
    merged = update.applied(table)
    assert update.shape_from((VOCAB_SIZE, 128)) == tuple(merged.shape) == (VOCAB_SIZE + 1, 128)
    assert torch.equal(merged[[5, VOCAB_SIZE]], update.rows) and torch.equal(merged[:5], table[:5])
    assert update.shape_from((VOCAB_SIZE - 1, 128)) is None and update.shape_from((VOCAB_SIZE, 64)) is None


def test_training_goes_on_after_a_first_call_in_inference_mode(folder: Path) -> None:
    model: Any = attached(folder, (5, VOCAB_SIZE), (False, True))
    new = torch.tensor([[3, 5, VOCAB_SIZE, 7]])
    with torch.inference_mode():
        first = model(input_ids=new).logits
    again = model(input_ids=new).logits
    assert torch.equal(again, first)
    again.square().sum().backward()
    for layer in token_layers(model).values():
        if layer.tied_adapter is None:
            assert bool((layer.trainable_tokens_delta["default"].grad.abs().amax(1) > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_of_a_table_with_rows_are_those_of_the_whole(dtype: torch.dtype) -> None:
    table, update = torch.randn(10, 4).bfloat16(), VocabularyRows((0, 3, 9, 10, 11), torch.randn(5, 4))
    whole = update.applied(table.to(dtype))
    parts = [update.applied_between(start, start + 4, table[start : start + 4], dtype) for start in (0, 4, 8)]
    assert whole.dtype == dtype and torch.equal(torch.cat(parts), whole)


def test_rslora_keeps_them_too(folder: Path, tmp_path: Path) -> None:
    model = shaken(attached(folder, method="rslora"))
    save_adapter(model, tmp_path)
    config = load_adapter_config(tmp_path)
    assert config.method.name == "rslora" and config.token_ids == {5, 300}
    assert torch.equal(logits(load_adapter(tiny_base(folder).model, tmp_path).eval()), logits(model))


def test_what_has_no_place_for_the_rows_says_so(saved: Path) -> None:
    with pytest.raises(ModelError, match="trains the rows of 2 tokens"):
        read_deltas(saved)


def test_going_on_needs_the_same_tokens(folder: Path, saved: Path) -> None:
    going_on = attached(folder, init_from=saved)
    own = next(layer for layer in token_layers(going_on).values()).trained()
    assert own is not None and own.rows_RH.requires_grad
    assert torch.equal(own.rows_RH, read_updates(saved)["model.embed_tokens.weight"].rows)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"new_tokens is the ids \[5, 300\] there and none here"):
        section = AdapterSection(r=4, alpha=8.0, init_from=saved)
        attach_adapter(tiny_base(folder).model, section, 0, base_name="tiny")
    with pytest.raises(ModelError, match=r"the ids \[5, 300\] there and the ids \[5, 7\] here"):
        attached(folder, (5, 7), init_from=saved)


def test_going_on_from_a_run_needs_its_tokens_in_their_order(folder: Path, tmp_path: Path) -> None:
    for name, texts in (("same", TEXTS), ("swapped", TEXTS[::-1])):
        with publishing(tmp_path / name, manifest={"recipe": {"adapter.new_tokens": list(texts)}}) as inside:
            save_adapter(attached(folder), inside)
    attached(folder, init_from=tmp_path / "same")
    with pytest.raises(ModelError, match=r"new_tokens is \[.*\] there and \[.*\] here"):
        attached(folder, init_from=tmp_path / "swapped")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"model.embed_tokens": [300, 5]}, "must give ascending ids"),
        ({"model.embed_tokens": [5, -1]}, "must give ascending ids"),
        ({"model.embed_tokens": [5, 5]}, "must give ascending ids"),
        ({"(.*)+$": [5, 300]}, "must give ascending ids"),
        ({"model.embed_tokens": [5, 300, 301]}, "names 3 tokens for it"),
        (None, "it holds trained rows of"),
    ],
    ids=str,
)
def test_a_config_that_tells_another_story_is_refused(
    value: Any, words: str, folder: Path, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / CONFIG
    data = json.loads(path.read_text())
    whole = value if value is None or is_tied(folder) or "names" not in words else {**value, "lm_head": [5, 300]}
    path.write_text(json.dumps({**data, "trainable_token_indices": whole}))
    with pytest.raises(ModelError, match=words):
        load_adapter_config(tmp_path)


def test_gaps_and_heads_with_a_bias_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ids before them have no rows either"):
        attached(folder, (5, VOCAB_SIZE + 1), (False, True))
    neox = tiny_base(build_tiny_neox(tmp_path / "neox"), quant_type="none").model
    neox.lm_head.bias = nn.Parameter(torch.zeros(VOCAB_SIZE), requires_grad=False)
    section = AdapterSection(r=4, alpha=8.0, new_tokens=TEXTS)
    with pytest.raises(ModelError, match="has a bias"):
        attach_adapter(neox, section, 0, base_name="tiny", tokens=NewTokens(TEXTS, (5, 6), (False, False)))
