"""Memory runs out wherever it can: the user is told where and what to change, and nothing that was trained is lost."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.quant.fingerprint import hash_tensors
from tests.commandline import Outcome, run_cli, write_recipe

EXIT_CODE = 9
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB"


def on_card() -> None:
    raise torch.OutOfMemoryError(CUDA_MESSAGE)


def on_host() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # the real error of torch's allocator


def from_system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, fail: Callable[[], None] = on_card) -> None:
    """Let the n-th call of a function (dotted, from where it is called) run out of memory."""
    original, calls = resolve_name(name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            fail()
        return original(*args, **kwargs)

    monkeypatch.setattr(name, counted)


def advised(outcome: Outcome, *words: str) -> None:
    assert outcome.code == EXIT_CODE, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err
    for word in ("error[memory] out of memory", "were in use", "Fix: ", *words):
        assert word in outcome.err, (word, outcome.err)


def digests(run: Path, step: int = 5) -> dict[str, str]:
    """SHA-256 of what was trained, and every logged loss."""
    found = {}
    for folder in (run / "ckpt" / f"step-{step:06d}", run / "adapter"):
        for path in sorted(folder.glob("*.safetensors")):
            tensors = load_file(path)
            found[f"{folder.name}/{path.name}"] = hash_tensors(*(tensors[key] for key in sorted(tensors)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = str([(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines])
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A run that nothing disturbed, with its recipe."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder, tiny_llama_dir, eval__every=2, eval__generate_rows=1, train__keep=9)
    outcome = run_cli("train", recipe)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(autouse=True)
def advice_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest changes take seconds to find: one test looks at them, the others at what is kept."""
    if request.function is not test_at_a_step:
        monkeypatch.setattr("qlora_train.memory.exhausted.advise", lambda plan, limit_bytes: ())


def disturbed(straight: Path, run: Path, *overrides: str) -> Outcome:
    return run_cli("train", straight / "recipe.yaml", f"run.dir={run}", *overrides)


def goes_on_as_if_nothing_had_been(straight: Path, run: Path, resumed_from: int) -> None:
    outcome = disturbed(straight, run, "--resume")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step-{resumed_from:06d}" in outcome.err
    assert digests(run) == digests(straight / "run")


def test_at_a_step(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "qlora_train.train.step.accumulate_gradients", 4, on_host)
        patch.setattr("qlora_train.memory.advice.LEAST_R", 2)  # a smaller r is advised, which needs a new run
        outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "at step 4 of 5", "were asked for", "go on from step 3 with --resume", "train.checkpointing=full")
    assert "goes on with --resume" in outcome.err and "needs a new run" in outcome.err
    assert (tmp_path / "run" / "ckpt" / "step-000003").is_dir(), "not due, and saved for all that"
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())["out_of_memory"]
    assert (memory["phase"], memory["requested"]) == ("training", 2**60) and memory["held"] > 2**20
    goes_on_as_if_nothing_had_been(straight, tmp_path / "run", 3)


def test_in_the_first_step(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "qlora_train.train.step.accumulate_gradients", 1)
    outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "at step 1 of 5", "1.50 GiB more were asked for", "no step was trained yet", "start again")
    assert not (tmp_path / "run" / "ckpt").exists()


def test_in_the_middle_of_an_update(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter and moments are then partly new: nothing may be saved of them."""
    original = torch.optim.AdamW.step

    def half(optimizer: Any) -> None:
        original(optimizer)
        if len(list((tmp_path / "run" / "ckpt").glob("step-*"))) == 1:
            on_card()

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", half)
        outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "at step 3 of 5", "go on from step 2 with --resume")
    assert [path.name for path in (tmp_path / "run" / "ckpt").iterdir()] == ["step-000002"]
    goes_on_as_if_nothing_had_been(straight, tmp_path / "run", 2)


def test_in_an_evaluation(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is saved, and the evaluation is made up for: its loss decides which adapter is published."""
    with monkeypatch.context() as patch:
        fail_at(patch, "qlora_train.train.loop.validate", 3)  # of the base, after step 2, after step 4
        outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "in the evaluation after step 4 of 5", "eval.batch_size=1", "go on from step 4 with --resume")
    goes_on_as_if_nothing_had_been(straight, tmp_path / "run", 4)


def test_while_answers_are_generated(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "qlora_train.evaluate.tasks.generate_texts", 2)
    outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "while the answers of the adapter were generated", "eval.generate_rows=0")
    assert (tmp_path / "run" / "ckpt" / "step-000005").is_dir() and not (tmp_path / "run" / "run.json").exists()


def test_while_a_checkpoint_is_written(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once what the step held is freed, there is room for a second try."""
    with monkeypatch.context() as patch:
        fail_at(patch, "qlora_train.train.checkpoint.save_file", 3)  # of the rehearsal, of step 2, of step 4
        outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "while the checkpoint of step 4 was written", "go on from step 4 with --resume")
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    goes_on_as_if_nothing_had_been(straight, tmp_path / "run", 4)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("accumulate_gradients", "the largest micro-batch"),
        ("write_checkpoint", "a checkpoint"),
    ],
)
def test_in_the_rehearsal(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    fail_at(monkeypatch, f"qlora_train.train.rehearsal.{name}", 1)
    outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, f"in the rehearsal before step 1: {what}")
    assert not (tmp_path / "run" / "ckpt").exists() and not list((tmp_path / "run").rglob(".tmp-*"))


def test_a_resume_that_runs_out_before_it_goes_on_leaves_the_run_as_it_was(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight / "run", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        fail_at(patch, "qlora_train.train.rehearsal.write_checkpoint", 1)  # after what the rehearsal measures
        outcome = disturbed(straight, run, "--resume", "--from", "2")
    advised(outcome, "in the rehearsal before step 3: a checkpoint", "were planned for training")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"errors.jsonl", ".lock"}
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("fail", [on_host, from_system], ids=["host", "system"])
def test_while_the_model_is_loaded(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
) -> None:
    fail_at(monkeypatch, "qlora_train.model.low_rank.AutoModelForCausalLM.from_pretrained", 1, fail)
    outcome = disturbed(straight, tmp_path / "run")
    advised(outcome, "while data and model were loaded")
    assert not (tmp_path / "run" / "ckpt").exists()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("qlora_train.export.base.dequantize", "while the merged weights were written"),
        ("qlora_train.export.verify.to_float32", "while the merged model was compared with the trained one"),
    ],
)
def test_at_the_export(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    before = {path: path.read_bytes() for path in (straight / "run").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        fail_at(patch, name, 2, on_host)
        outcome = run_cli("export", straight / "run", tmp_path / "merged")
    advised(outcome, where, "were planned for export", "nothing was published", "on a machine with more memory")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept <= {".tmp-merged-shards"}, "at most finished shards, from which the next goes on"
    assert {path: path.read_bytes() for path in before} == before
    outcome = run_cli("export", straight / "run", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.slow
def test_at_the_export_of_a_format(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "qlora_train.export.formats.measure.fill_whole", 2, on_host)
    outcome = run_cli("export", straight / "run", tmp_path / "out", "--format", "lora", "--format", "gguf-f16")
    advised(outcome, "while gguf-f16 was written and measured", "nothing of gguf-f16 was published")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora"]


def test_in_an_evaluation_of_its_own(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "qlora_train.evaluate.sides.validate", 1)
    outcome = run_cli("eval", straight / "run")
    assert outcome.code == EXIT_CODE and "Traceback" not in outcome.err
    assert "error[memory] out of memory" in outcome.err and "lower eval.batch_size" in outcome.err
