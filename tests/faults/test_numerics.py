"""Numbers that are none, losses that leap, adapters that do not learn: said, recorded, and nothing is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora_train import api  # everything is imported before anything is replaced
from qlora_train.artifacts.folders import manifest_faults
from qlora_train.train import loop
from tests.commandline import chat_rows, run_cli, write_recipe, write_rows
from tests.invariant.runs import state_digest
from tests.spoil import ESCAPE, harmless, refused

FINITE = {"train__checkpointing": "full", "train__keep": 9, "eval__generate_rows": 0}


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Any], object]) -> None:
    """Do something to the model just before a step, counted from 1."""
    original = loop.train_step

    def changed(causal: Any, *arguments: Any, **options: Any) -> Any:
        if options["step"] == step - 1:
            change(causal.model)
        return original(causal, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", changed)


def overflow(model: Any) -> None:
    """As activations that leave the range of their type."""
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    mlp.register_forward_hook(lambda _module, _inputs, output: output * float("inf"))


def test_a_step_that_is_not_finite_is_recorded_and_changes_nothing(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4: those before it are saved; rows, norms, batch and the first bad module are written down."""
    rows = chat_rows(20)
    for row in rows:
        row["messages"][0]["content"] += ESCAPE
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = write_recipe(tmp_path, tiny_llama_dir, **FINITE)
    monkeypatch.setattr(loop, "spike_limit", lambda recent: 0.0 if len(recent) == 2 else None)
    before_step(monkeypatch, 4, overflow)
    outcome, run = run_cli("train", recipe), tmp_path / "run"
    refused(outcome, 7, "step 4: loss nan", "first not finite: the output of model.layers.1.mlp, in micro-batch 1")
    refused(outcome, 7, "recipe.yaml --resume --from 3", "flight/step-000004", "train.jsonl:", "step-000003")
    harmless(outcome)

    flight = run / "flight" / "step-000004"
    assert not manifest_faults(flight)
    record = json.loads((flight / "flight.json").read_text())
    assert (record["step"], record["loss"], record["last_steps"]["step"]) == (4, "nan", [1, 2, 3])
    assert record["first_not_finite"]["name"] == "model.layers.1.mlp"
    assert all("<|im_start|>user\n" in row["text"] and "\x1b" not in row["text"] for row in record["rows"])
    batch = load_file(flight / "batch.safetensors")
    row_tokens = sum(row["num_tokens"] for row in record["rows"])
    assert batch.keys() == {f"{i}/{name}" for i in (0, 1) for name in ("input_ids", "labels", "position_ids")}
    assert sum(int(batch[f"{i}/input_ids"].numel()) for i in (0, 1)) >= row_tokens
    history = record["last_steps"]["norm_of"]["model.layers.0.self_attn.q_proj.lora_B"]
    assert len(history) == 3 and 0 < history[0] < history[2]
    (error,) = map(json.loads, (run / "errors.jsonl").read_text().splitlines())
    assert (error["kind"], error["exit_code"]) == ("numerics", 7)
    events = [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == "event"
    ]
    assert [(event["step"], event["what"]) for event in events] == [(3, "loss spike")] and len(events[0]["rows"]) > 1
    assert "step 3: the loss leaps to" in outcome.err

    assert run_cli("train", recipe, "--resume").code == 7
    again = json.loads((flight / "flight.json").read_text())
    assert again["last_steps"] == record["last_steps"], "what was before the resume is known after it"


@pytest.mark.slow
def test_a_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed without the fault, it is the straight run."""
    straight, ill = (write_recipe(tmp_path / name, tiny_llama_dir, **FINITE) for name in ("straight", "ill"))
    assert run_cli("train", straight).code == 0
    before_step(monkeypatch, 4, overflow)
    assert run_cli("train", ill).code == 7
    monkeypatch.undo()
    assert run_cli("train", ill, "--resume").code == 0
    assert state_digest(ill.parent / "run") == state_digest(straight.parent / "run")


@pytest.mark.slow
def test_a_number_that_is_finite_the_second_time(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a failing machine: nothing is named as its cause, and nothing was changed by it."""
    from qlora_train.model.causal import CausalModel

    original, calls = CausalModel.loss_sum, []

    def once(self: CausalModel, batch: Any) -> Any:
        calls.append(self.model.training)
        loss = original(self, batch)
        return loss * float("nan") if sum(calls) == 9 else loss  # measuring, rehearsal, then step 4's second

    monkeypatch.setattr(CausalModel, "loss_sum", once)
    outcome = run_cli("train", write_recipe(tmp_path, tiny_llama_dir, **FINITE))
    refused(outcome, 7, "step 4: loss nan", "flight/step-000004")
    assert "first not finite" not in outcome.err
    tensors = load_file(tmp_path / "run" / "ckpt" / "step-000003" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.slow
def test_an_adapter_that_is_not_finite_is_not_saved(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: Any) -> None:
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight").data[0] = float("nan")

    recipe = write_recipe(tmp_path, tiny_llama_dir, **FINITE)
    before_step(monkeypatch, 4, poison)
    outcome = run_cli("train", recipe)
    refused(outcome, 7, "the value of model.layers.0.mlp.up_proj.lora_B", "step 3 is not saved", "from step 2")
    assert [path.name for path in (tmp_path / "run" / "ckpt").iterdir()] == ["step-000002"]


@pytest.mark.slow
def test_the_first_step_of_all(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is there to go on from, and the next start is a start."""
    recipe = write_recipe(tmp_path, tiny_llama_dir, **FINITE)
    before_step(monkeypatch, 1, overflow)
    refused(run_cli("train", recipe), 7, "step 1: loss nan", "start again")
    assert (tmp_path / "run" / "flight" / "step-000001").is_dir()
    monkeypatch.undo()
    assert run_cli("train", recipe).code == 0


@pytest.mark.slow
def test_a_held_out_loss_that_is_not_finite_ends_the_run_saved(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.evaluate_now

    def nothing(job: Any, *rest: Any) -> Any:
        overflow(job.model)
        return original(job, *rest)

    recipe = write_recipe(tmp_path, tiny_llama_dir, **FINITE, eval__every=3)
    monkeypatch.setattr(loop, "evaluate_now", nothing)
    refused(run_cli("train", recipe), 7, "after step 3, the held-out loss is nan", "step-000003")
    monkeypatch.undo()
    assert run_cli("train", recipe, "--resume").code == 0


@pytest.mark.slow
def test_a_rate_that_float32_cannot_hold_is_said(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, **FINITE, train__learning_rate=1e-30)
    outcome = run_cli("train", recipe)
    assert outcome.code == 0 and "14 of the 14 adapted layers have gradients and did not move in 2" in outcome.err
    assert "dead adapter" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_rate_of_zero_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    refused(run_cli("check", write_recipe(tmp_path, tiny_llama_dir, train__learning_rate=0)), 2, "train.learning_rate")


def test_our_own_bug_leaves_a_report(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With traceback, versions and recipe, and without secrets."""
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Zq7" * 12)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError(f"lost beside hf_{'Zq7' * 12}")

    monkeypatch.setattr(api, "load_recipe", broken)
    recipe = write_recipe(tmp_path, tiny_llama_dir)
    with pytest.raises(KeyError) as caught:
        run_cli("train", recipe)
    (report,) = (tmp_path / "cache" / "bugs").iterdir()
    assert caught.value.__notes__ == [
        f"this is a bug of qlora-train; the report to send with it, without secrets: {report}"
    ]
    text = report.read_text()
    for words in ("qlora-train train", "KeyError", "in broken", '"bitsandbytes": "0.50.2"', '"learning_rate": 0.01'):
        assert words in text, words
    assert "Zq7Zq7" not in text
