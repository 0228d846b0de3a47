"""The check before training passes where rows are kept apart, fails where they are not, and leaves no trace."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError
from qlora_train.model.attention import ATTENTION_NAME, RowBoundaries
from qlora_train.model.causal import CausalModel
from qlora_train.train import selfcheck as module
from qlora_train.train.selfcheck import SelfCheck, selfcheck
from tests.loading import CPU
from tests.packs import table_of, tiny_model
from tests.tiny import SIZES

LENGTHS = (40, 9, 12, 30, 17)  # the shortest four hold 68 tokens


def check(model: Any, lengths: tuple[int, ...] = LENGTHS, *, packed: bool = True) -> SelfCheck:
    return selfcheck(CausalModel(model), table_of(lengths), 0, CPU, packed=packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "neox", "gemma2"])
def test_a_sound_model_passes(family: str, dtype: torch.dtype) -> None:
    result = check(tiny_model(family, dtype=dtype))
    assert (result.num_rows, result.num_tokens, result.change_in_other_rows) == (4, 68, 0.0)
    assert result.loss_together == pytest.approx(result.loss_alone, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert result.change_in_the_row is not None and result.change_in_the_row > 0.1
    assert (
        result.summary().startswith("4 rows, 68 tokens: summed loss ") and "changes other rows by 0" in result.summary()
    )
    assert result.as_dict()["num_tokens"] == 68


@pytest.mark.parametrize("packed", [True, False])
def test_a_long_row_is_compared_where_there_is_one(packed: bool) -> None:
    result = check(tiny_model("gemma3"), (*LENGTHS, 700), packed=packed)
    assert (result.num_rows, result.num_tokens) == (3, 9 + 700 + 12)
    assert result.change_in_other_rows == (0.0 if packed else None)


def test_a_leak_of_long_rows_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost_where_long(starts: Any, lengths: Any, size: int, *rest: Any) -> RowBoundaries:
        if max(lengths) > 512:
            starts, lengths = (0,), (size,)
        return RowBoundaries(starts, lengths, size, *rest)

    monkeypatch.setattr("qlora_train.model.attention.RowBoundaries", lost_where_long)
    model = tiny_model("llama")
    check(model)
    with pytest.raises(ModelError, match="not what they are alone"):
        check(model, (*LENGTHS, 700))


def test_padded_rows_are_compared_too() -> None:
    result = check(tiny_model("llama", "eager"), packed=False)
    assert (result.num_rows, result.change_in_other_rows, result.change_in_the_row) == (4, None, None)
    assert result.loss_together == pytest.approx(result.loss_alone, rel=1e-5)


def test_experts_may_round_otherwise() -> None:
    """Tokens of all rows are joined by expert: here another row's last bit changes, which is no leak."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=torch.float32)
    result = check(model.eval().requires_grad_(False))
    assert result.change_in_other_rows is not None and result.change_in_other_rows <= 1e-5


@pytest.mark.parametrize(
    ("lengths", "num_rows", "num_tokens"),
    [
        ((9,), 2, 18),
        ((9, 5), 2, 14),
        ((500, 500, 200), 2, 700),
        ((500, 600, 200), 3, 1300),
        ((400, 300, 200, 500), 3, 900),
        ((900, 1100), 2, 2000),
        ((1, 5, 6), 2, 11),
        ((30, 20, 10, 512, 40), 4, 100),
        ((30, 20, 10, 513, 40), 3, 543),
        ((30, 20, 10, 513, 2048, 2049, 40), 3, 2078),
        ((30, 20, 10, 2049, 40), 4, 100),
        ((30, 20, 700), 3, 750),
        ((500, 500, 100, 2000), 3, 2600),
        ((600, 700, 2000), 2, 1300),
    ],
)
def test_which_rows_are_taken(lengths: tuple[int, ...], num_rows: int, num_tokens: int) -> None:
    """One row stands for two; rows that hold no label tell nothing; no more tokens than fit, but for two rows; one long
    row beside two short ones."""
    table = table_of(lengths)
    supervised = [row for row in range(len(lengths)) if lengths[row] > 1]
    if len(supervised) < len(lengths):
        assert lengths[0] == 1 and table.num_supervised[0] == 0
    rows = module._rows(table)
    assert (len(rows), sum(lengths[row] for row in rows)) == (num_rows, num_tokens)


def test_the_long_row_has_neighbours_on_both_sides() -> None:
    assert module._rows(table_of((30, 20, 10, 513, 40))) == [2, 3, 1]


def lost_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qlora_train.model.attention.RowBoundaries",
        lambda _starts, _lengths, size, *rest: RowBoundaries((0,), (size,), size, *rest),
    )


def test_rows_that_read_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    check(model)
    lost_boundaries(monkeypatch)
    with pytest.raises(ModelError, match=r"not what they are alone: .*length_grouped") as caught:
        check(model)
    together, alone = re.findall(r"loss ([\d.]+) together and ([\d.]+) alone", str(caught.value))[0]
    assert together != alone


def test_a_leak_too_small_for_the_loss_is_found_by_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_boundaries(monkeypatch)
    monkeypatch.setattr(module, "LOSS_TOLERANCE", {torch.float32: 10.0})
    with pytest.raises(ModelError, match=r"replacing a token changes other rows by \d"):
        check(tiny_model("llama"))


def test_a_large_loss_may_be_rounded_by_a_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of rows that a model finds very unlikely are large, and so is what rounding does to them."""
    model = tiny_model("llama")
    usual = check(model)
    assert usual.loss_tolerance == pytest.approx(1e-4 * max(1.0, usual.loss_alone / usual.weight_sum))
    monkeypatch.setattr(module, "LOSS_SHARE", {torch.float32: 0.5})
    for loss in (math.inf, math.nan):
        assert module._tolerance(torch.float32, loss) == 1e-4
    wide = check(model)
    assert wide.loss_tolerance == pytest.approx(0.5 * wide.loss_alone / wide.weight_sum)


def test_a_model_that_ignores_its_input_fails_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(self: CausalModel, batch: MicroBatch) -> torch.Tensor:
        return torch.ones(*batch.input_ids.shape, 128)

    monkeypatch.setattr(CausalModel, "hidden", constant)
    with pytest.raises(ModelError, match="does not even change its own row"):
        check(tiny_model("llama"))


def test_numbers_that_are_none_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="differs by nan"):
        check(model)


def test_it_leaves_no_trace() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj, nn.Dropout(0.5))
    model.train()
    table = table_of(LENGTHS)
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    result = selfcheck(CausalModel(model), table, 0, CPU, packed=True)
    assert model.training and model.model.layers[0].mlp.down_proj[1].training
    assert result.loss_together == pytest.approx(result.loss_alone, rel=1e-5), "without dropout"
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    monkeypatch.setattr(CausalModel, "loss_sum", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check(model)
    assert model.training
