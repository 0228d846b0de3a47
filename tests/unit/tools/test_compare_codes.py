"""The codes of the quantisation study, and losses that are compared row by row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing.codes import CODES, int4_absmax, relative_error, synthetic_weights
from comparing.perplexity import HeldOut, RowLosses, round_by_code, row_losses

from qlora_train.data.loader import eval_batches
from qlora_train.evaluate.compare import observe
from qlora_train.evaluate.validation import validate
from qlora_train.model.causal import CausalModel
from qlora_train.model.skeleton import linear_layers
from qlora_train.quant.bnb import QuantSettings, dequantize, quantize
from tests.loading import CPU, tiny_base
from tests.packs import table_of


def test_int4_has_fifteen_even_steps_to_either_end_of_a_block() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    blocks, rounded = weight.view(-1, 64), int4_absmax(weight).view(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    steps = rounded / absmax * 7
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert float(steps.abs().max()) == pytest.approx(7) and len(steps.round().unique()) == 15
    assert bool(((blocks - rounded).abs() <= absmax / 14 + 1e-6).all()), "to the nearest step"
    assert torch.equal(int4_absmax(torch.zeros(1, 64)), torch.zeros(1, 64))


def test_nf4_is_the_best_of_the_three_and_more_so_the_heavier_the_tails() -> None:
    leads = []
    for weight in synthetic_weights().values():
        errors = {code: relative_error(weight, code) for code in CODES}
        assert errors["bf16"] == 0 and errors["nf4"] < min(errors["fp4"], errors["int4"])
        assert errors["nf4"] <= errors["nf4_dq"] < errors["nf4"] * 1.01
        leads.append(min(errors["fp4"], errors["int4"]) / errors["nf4"])
    assert leads == sorted(leads)


def test_what_came_from_q4_1_is_kept_by_an_affine_code_with_its_groups() -> None:
    """16 even steps in groups of 32, all of which are used: the grid of the GGUF type."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 8, 32), generator=generator)
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    scale = torch.rand(64, 8, 1, generator=generator).to(torch.bfloat16).float() + 0.5
    scale = scale.to(torch.bfloat16).float()
    weight = (codes * scale - 7 * scale).view(64, 256)
    assert relative_error(weight, "int4_affine") < 1e-6
    assert relative_error(weight, "nf4") > 0.05, "negative control"


def test_the_rounded_weight_is_the_4_bit_layers_to_the_bit() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for code, quant_type, double in (("nf4_dq", "nf4", True), ("nf4", "nf4", False), ("fp4", "fp4", False)):
        layer = quantize(weight, QuantSettings.of(quant_type, double, 64, "uint8"))
        assert torch.equal(CODES[code](weight), dequantize(layer)), code


def test_differences_are_paired_by_row() -> None:
    tokens = torch.full((5,), 10.0, dtype=torch.float64)
    noise = torch.tensor([30.0, 10.0, 20.0, 50.0, 40.0], dtype=torch.float64)
    rise = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    low, high = RowLosses(noise, tokens), RowLosses(noise + rise, tokens)
    mean, error = high.above(low)
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(float((rise / 10).std()) / math.sqrt(5)), "of a mean, where rows are equally long"
    assert low.above(high)[0] == pytest.approx(-mean) and low.above(low) == (0.0, 0.0)
    assert high.perplexity == pytest.approx(math.exp(3.2))


def test_row_losses_add_up_to_the_held_out_loss(tiny_llama_dir: Path) -> None:
    causal = CausalModel(tiny_base(tiny_llama_dir).model)
    table = table_of([20, 12, 16])
    losses = row_losses(observe(causal, eval_batches(table, 2, 0), CPU))
    whole = validate(causal, eval_batches(table, 2, 0), CPU)
    assert len(losses.loss_R) == 3 and float(losses.tokens_R.sum()) == whole.num_supervised_tokens
    assert losses.loss == pytest.approx(whole.loss, rel=1e-5)


def test_rounding_changes_the_linear_layers_alone_and_is_undone(tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, quant_type="none")
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(base.model).items()}
    batches = {"rows": tuple(eval_batches(table_of([20, 12, 16]), 2, 0))}
    recipe: Any = None  # read by `quantised_loss` alone
    held_out = HeldOut(CausalModel(base.model), batches, weights, recipe)
    seen = {}
    for rounded in round_by_code(held_out, ("bf16", "nf4")):
        changed = {n for n, p in base.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == ({f"{name}.weight" for name in weights} if rounded.code == "nf4" else set())
        seen[rounded.code] = rounded
    assert seen["bf16"].error == 0 and 0.05 < seen["nf4"].error < 0.15
    assert seen["nf4"].losses["rows"].loss != seen["bf16"].losses["rows"].loss
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
