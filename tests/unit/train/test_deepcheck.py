"""`check --deep` passes on a sound model, names what is wrong with a broken one, and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.artifacts.layout import RunDir
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError
from qlora_train.model.attention import RowBoundaries
from qlora_train.model.causal import CausalModel
from qlora_train.quant.fingerprint import BasePrint, TensorPrint
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import QuantSection
from qlora_train.train import deepcheck
from qlora_train.train.deepcheck import Finding, check_quantised, examine, refuse_failed
from qlora_train.train.metrics import Silent
from qlora_train.train.setup import Prepared, prepare
from tests.commandline import run_cli, write_recipe
from tests.packs import table_of

pytestmark = pytest.mark.usefixtures("shared_workers")
LAYERS = 14  # of the tiny Llama: seven in each of two blocks
SKIPPING = QuantSection(skip_modules=("up_proj",))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Iterator[Prepared]:
    """A loaded job. A test that changes the model puts it back."""
    folder = tmp_path_factory.mktemp("deep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_TRAIN_CACHE", str(folder / "cache"))
        recipe = load_recipe(write_recipe(folder, tiny_llama_dir)).recipe
        yield prepare(recipe, RunDir(recipe.run.dir), Silent())


def failing(findings: Sequence[Finding]) -> dict[str, str]:
    return {finding.what: finding.measured for finding in findings if not finding.ok}


def layer_of(prepared: Prepared, name: str) -> Any:
    return prepared.job.model.get_submodule(f"base_model.model.model.layers.0.{name}")


def test_a_sound_model_passes_and_is_left_as_it_was(prepared: Prepared) -> None:
    model = prepared.job.model
    modes = [module.training for module in model.modules()]
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    findings = examine(prepared)
    assert failing(findings) == {}
    assert [finding.what for finding in findings] == [
        "linear layers in nf4",
        "matrices left unquantised",
        "end token trained",
        "prompts read by plain transformers",
        "loss of 4 rows packed together and alone",
        "a token replaced: change in the other rows of its pack",
        "a token replaced: change in its own row",
        "gradient of B before the first step",
        "B moved by one step",
        "bytes of the base after one step",
        "gradient of A after one step",
        "loss of one batch and of micro-batches",
        "adapter gradient of one batch and of micro-batches",
    ]
    measured = {finding.what: finding.measured for finding in findings}
    assert measured["linear layers in nf4"] == f"{LAYERS} of {LAYERS}"
    assert measured["gradient of A after one step"] == f"in {LAYERS} of {LAYERS} adapted layers"
    assert measured["matrices left unquantised"].startswith("embed_tokens 0.2 MiB in float32 (")
    assert measured["end token trained"] == "20 of 20 whole rows end in '<|im_end|>'"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not prepared.job.run_dir.root.exists()


def test_a_layer_left_in_16_bit_is_named(prepared: Prepared) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    found = prepared.base.print
    one_missing = BasePrint(
        {**found.tensors, name: replace(found.tensors[name], quantised=False, dtype="bfloat16")}, found.quant
    )
    findings = list(check_quantised(prepared.inputs, one_missing, QuantSection()))
    assert failing(findings) == {
        "linear layers in nf4": f"{LAYERS - 1} of {LAYERS}; not as the recipe says: model.layers.1.mlp.up_proj"
    }
    with pytest.raises(ModelError, match=r"linear layers in nf4: 13 of 14.*, must be 14\. Fix: name in quant\.skip"):
        refuse_failed(findings)
    other = BasePrint({**one_missing.tensors, name: replace(found.tensors[name], quantised=True)}, found.quant)
    assert failing(list(check_quantised(prepared.inputs, other, SKIPPING))), "quantised against the recipe"


def test_layers_that_the_recipe_skips_are_no_fault(prepared: Prepared) -> None:
    found = prepared.base.print
    skipped = {
        name: replace(tensor, quantised=False, dtype="bfloat16") if "up_proj" in name else tensor
        for name, tensor in found.tensors.items()
    }
    quantised, rest = check_quantised(prepared.inputs, BasePrint(skipped, found.quant), SKIPPING)
    assert (quantised.ok, quantised.measured, quantised.bar) == (
        True,
        "12 of 14",
        "12, 2 kept out by quant.skip_modules",
    )
    assert "up_proj" in rest.measured and "besides" not in rest.measured


def test_fused_experts_are_named_with_their_share(prepared: Prepared) -> None:
    found = prepared.base.print
    total = sum(tensor.num_bytes for tensor in found.tensors.values())
    experts = TensorPrint("", (4, 128, 256), "bfloat16", total, quantised=False, finite=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    _, rest = check_quantised(prepared.inputs, BasePrint({**found.tensors, name: experts}, found.quant), QuantSection())
    assert "besides: gate_up_proj" in rest.measured and rest.measured.endswith("in bfloat16 (50%)")


def test_a_base_without_quantisation_is_said_to_be_one(prepared: Prepared) -> None:
    (only,) = check_quantised(prepared.inputs, BasePrint({}, {}), QuantSection(quant_type="none"))
    assert only.ok and only.measured == "0 of 14"
    (only,) = check_quantised(prepared.inputs, prepared.base.print, QuantSection(quant_type="none"))
    assert not only.ok and only.measured == "14 of 14"
    nothing_done = next(check_quantised(prepared.inputs, BasePrint({}, {}), QuantSection()))
    assert not nothing_done.ok and nothing_done.measured.startswith("0 of 14; not as the recipe says: ")


def test_rows_that_read_each_other_are_found(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qlora_train.model.attention.RowBoundaries",
        lambda _starts, _lengths, size, *rest: RowBoundaries((0,), (size,), size, *rest),
    )
    found = failing(examine(prepared))
    assert {"loss of 4 rows packed together and alone", "a token replaced: change in the other rows of its pack"} < set(
        found
    )


def test_an_adapter_that_is_not_in_the_graph_is_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(prepared, "mlp.down_proj")
    monkeypatch.setattr(layer, "forward", lambda x: layer.base_layer(x))
    reason = "in 13 of 14 adapted layers; not in model.layers.0.mlp.down_proj"
    assert failing(examine(prepared)) == {
        "gradient of B before the first step": reason,
        "B moved by one step": reason,
        "gradient of A after one step": reason,
    }


def test_an_a_that_never_learns_is_named(prepared: Prepared) -> None:
    weight = layer_of(prepared, "mlp.up_proj").lora_A["default"].weight
    weight.requires_grad_(False)
    try:
        found = failing(examine(prepared))
    finally:
        weight.requires_grad_(True)
    assert found == {"gradient of A after one step": "in 13 of 14 adapted layers; not in model.layers.0.mlp.up_proj"}


def test_experts_that_no_token_reached_are_spared(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepcheck, "has_experts", lambda _: True)
    names = ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj"]
    monkeypatch.setattr(deepcheck, "_layers_with", lambda model, parts: names)
    one, zero = torch.ones(1), torch.zeros(1)
    spared = deepcheck._reached("", prepared.job, {f"{names[1]}.lora_B.default.weight": one}, ["lora_B"])
    assert spared.ok and spared.bar == "all but 1 experts that no token reached"
    assert not deepcheck._reached("", prepared.job, {f"{names[1]}.lora_B.default.weight": zero}, ["lora_B"]).ok
    nan = torch.full((1,), float("nan"))
    assert not deepcheck._reached("", prepared.job, {f"{names[1]}.lora_B.default.weight": nan}, ["lora_B"]).ok


def test_a_base_that_changes_when_it_runs_is_found(prepared: Prepared) -> None:
    norm = prepared.job.model.get_submodule("base_model.model.model.norm")
    original = norm.weight.detach().clone()

    def drift(*_: object) -> None:
        if torch.is_grad_enabled():
            norm.weight.data += 1e-6

    handle = norm.register_forward_hook(drift)
    try:
        found = failing(examine(prepared))
    finally:
        handle.remove()
        norm.weight.data.copy_(original)
    assert found == {"bytes of the base after one step": "another SHA-256"}


def test_a_mean_of_means_is_found(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_means(causal: CausalModel, batches: Sequence[MicroBatch], *_: object, **__: object) -> float:
        losses = [causal.loss_sum(batch) / batch.weight_sum / len(batches) for batch in batches]
        for loss in losses:
            loss.backward()
        return sum(float(loss.detach()) for loss in losses)

    monkeypatch.setattr(deepcheck, "accumulate_gradients", mean_of_means)
    assert set(failing(examine(prepared))) == {
        "loss of one batch and of micro-batches",
        "adapter gradient of one batch and of micro-batches",
    }


def test_rows_without_a_trained_end_token_are_found(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end token that is not trained, and one at which generation does not stop."""
    finding = deepcheck.check_end_tokens(prepared.inputs, prepared.job)
    assert finding.ok
    monkeypatch.setattr(deepcheck.Encoder, "end_token_of", lambda _, row: None if len(row.ids) % 2 else 2)
    some = deepcheck.check_end_tokens(prepared.inputs, prepared.job)
    assert not some.ok and "; not " in some.measured and "train.jsonl:" in some.measured
    monkeypatch.undo()
    monkeypatch.setattr(prepared.job.model.generation_config, "eos_token_id", [0])
    never = deepcheck.check_end_tokens(prepared.inputs, prepared.job)
    assert not never.ok and never.measured.startswith("0 of 20 whole rows end in one")


def test_a_template_that_others_read_otherwise_is_found(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deepcheck.check_prompts(prepared.inputs).ok
    real = prepared.inputs.tokenizer.apply_chat_template

    def otherwise(messages: Any, **kwargs: Any) -> Any:
        return real([{**message, "content": message["content"].strip() + "!"} for message in messages], **kwargs)

    monkeypatch.setattr(prepared.inputs.tokenizer, "apply_chat_template", otherwise)
    finding = deepcheck.check_prompts(prepared.inputs)
    assert not finding.ok and finding.measured.startswith("not prompt 0 of golden_prompts.json otherwise than training")


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((9,), [9]),
        ((9, 5), [5, 9]),
        ((30, 10, 20, 50, 40), [10, 30, 50]),
        ((30, 10, 20, 340, 341), [10, 30, 340]),
        ((500, 400, 600), [400, 500]),
        ((500, 100, 600), [100, 500]),
    ],
)
def test_which_rows_gradients_are_taken_of(lengths: tuple[int, ...], expected: list[int]) -> None:
    assert [lengths[row] for row in deepcheck._gradient_rows(table_of(lengths))] == expected


def test_on_the_command_line(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and exit code 0; and where a check fails, the table still, the reason on stderr and exit code 4."""
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__batching="length_grouped", train__compile=True)
    outcome = run_cli("check", recipe, "--deep", "--json")
    assert outcome.code == 0, outcome.err
    findings = json.loads(outcome.out)["findings"]
    assert len(findings) == 11 and all(finding["ok"] for finding in findings), "padded: nothing about packs"
    monkeypatch.setattr(deepcheck, "GRADIENT_TOLERANCE", {torch.float32: -1.0})
    outcome = run_cli("check", recipe, "--deep")
    assert outcome.code == 4 and outcome.out.count("FAILS") == 1 and "linear layers in nf4" in outcome.out
    assert "must be at most -1" in outcome.err and "Fix: set train.grad_accum_steps: 1" in outcome.err
    assert "The recipe is sound." not in outcome.out
    assert json.loads(run_cli("check", recipe, "--json").out)["findings"] == []
    assert not (tmp_path / "run").exists()
