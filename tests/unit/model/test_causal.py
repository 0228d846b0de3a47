"""Decoder and head are the whole model: its loss is torch's on its own logits, and a head we do not know is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody reads
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError
from qlora_train.model.causal import CausalModel
from qlora_train.names import IGNORE_INDEX
from tests.loading import tiny_base, with_adapter
from tests.tiny import SIZES, build_tiny_llama, build_tiny_neox, build_tiny_phi3


def batch(rows: int = 3, length: int = 12) -> MicroBatch:
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORE_INDEX
    labels[0, -2:] = IGNORE_INDEX
    return MicroBatch(ids, labels, int((labels[:, 1:] != IGNORE_INDEX).sum()), tuple(range(rows)), (length,) * rows)


def own_loss(model: Any, one: MicroBatch) -> torch.Tensor:
    """torch's cross-entropy on all the logits that the model itself gives."""
    logits = model(input_ids=one.input_ids, use_cache=False).logits.float()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), one.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def head_error(causal: CausalModel) -> float:
    """What `check_head` measures, computed again on other tokens."""
    ids = torch.arange(20, 60)[None, :]
    with torch.no_grad():
        own = causal.model(input_ids=ids, use_cache=False).logits[0].float()
        ours = causal.head.logits(causal.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
    return float((own - ours).abs().max() / own.abs().max())


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_neox, build_tiny_phi3], ids=lambda b: b.__name__)
def test_the_loss_is_torch_s_on_the_model_s_own_logits(build: Callable[[Path], Path], tmp_path: Path) -> None:
    base = tiny_base(build(tmp_path / "model"))
    causal = CausalModel(base.model)
    with torch.no_grad():
        torch.testing.assert_close(causal.loss_sum(batch()), own_loss(base.model, batch()), rtol=1e-5, atol=0)
    assert head_error(causal) <= 1e-6
    causal.check_head()

    with_head = CausalModel(with_adapter(base))
    adapted = with_head.loss_sum(batch())
    torch.testing.assert_close(adapted, own_loss(with_head.model, batch()), rtol=1e-5, atol=0)
    assert adapted.requires_grad and adapted.dtype == torch.float32
    with torch.no_grad(), with_head.model.disable_adapter():
        assert float(with_head.loss_sum(batch())) != float(adapted), "negative control: the adapter takes part"
    with_head.check_head()


def test_positions_without_labels_take_no_part(tiny_llama_dir: Path) -> None:
    causal = CausalModel(tiny_base(tiny_llama_dir, quant_type="none").model)
    one = batch()
    with torch.no_grad():
        supervised = one.labels[:, 1:] != IGNORE_INDEX
        hidden = causal.decoder(input_ids=one.input_ids, use_cache=False).last_hidden_state[:, :-1][supervised]
        assert len(hidden) == one.num_supervised_tokens == 16
        logits = causal.head.logits(hidden)
        targets = one.labels[:, 1:][one.labels[:, 1:] != IGNORE_INDEX]
        expected = F.cross_entropy(logits, targets, reduction="sum")
        torch.testing.assert_close(causal.loss_sum(one), expected, rtol=1e-5, atol=0)
    assert logits.dtype == torch.float32 and logits.shape == (16, SIZES["vocab_size"])


def test_a_label_counts_as_often_as_it_weighs(tiny_llama_dir: Path) -> None:
    causal = CausalModel(tiny_base(tiny_llama_dir, quant_type="none").model)
    one = batch()
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    weighted, ones = (replace(one, weights=w) for w in (weights, torch.ones(3, 12)))
    with torch.no_grad():
        logits = causal.model(input_ids=one.input_ids, use_cache=False).logits[:, :-1].float()
        terms = F.cross_entropy(logits.transpose(1, 2), one.labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none")
        expected = (terms * weights[:, 1:]).sum()
        torch.testing.assert_close(causal.loss_sum(weighted), expected, rtol=1e-5, atol=0)
        assert torch.equal(causal.loss_sum(ones), causal.loss_sum(one))


def tiny(config: Any) -> Any:
    return (
        AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        .eval()
        .requires_grad_(False)
    )


def test_a_capped_head_is_known() -> None:
    """Gemma 2 caps its logits; here at 0.05, so that the cap shows on random weights."""
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=32, final_logit_softcapping=0.05)
    causal = CausalModel(tiny(config))
    with torch.no_grad():
        assert causal.head.softcap == 0.05 and head_error(causal) <= 1e-6
        causal.check_head()
        torch.testing.assert_close(causal.loss_sum(batch()), own_loss(causal.model, batch()), rtol=1e-5, atol=0)
    config.final_logit_softcapping = None
    uncapped = CausalModel(causal.model)
    config.final_logit_softcapping = 0.05
    with pytest.raises(ModelError, match="its output head does more than we know"):
        uncapped.check_head()


def test_a_head_that_scales_is_refused() -> None:
    """Granite divides its logits; one is no scaling at all."""
    CausalModel(tiny(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=1.0))).check_head()
    with pytest.raises(ModelError, match="its output head does more than we know"):
        CausalModel(tiny(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=8.0))).check_head()


@pytest.mark.parametrize("factor", [0.9, 1.1, float("nan")])
def test_a_model_whose_forward_changes_its_logits_is_refused(
    factor: float, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model
    causal = CausalModel(model)
    causal.check_head()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: F.linear(x, model.lm_head.weight) * factor)
    with pytest.raises(ModelError, match="differ from hidden"):
        causal.check_head()


def test_a_head_that_is_no_linear_layer_is_refused(tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="the output head is a Sequential"):
        CausalModel(model)
