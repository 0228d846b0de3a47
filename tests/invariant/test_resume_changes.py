"""A changed recipe on resume: refused with both sides and the place, accepted where no bit depends on it, or a fork."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.files import json_bytes, write_json
from qlora_train.artifacts.folders import MANIFEST, _sealed
from qlora_train.errors import OutOfMemory
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import Recipe
from qlora_train.train.keys import NEUTRAL_KEYS, NEUTRAL_SECTIONS, ROUNDING_KEYS, is_neutral
from tests.commandline import Outcome, chat_rows, run_cli, write_rows
from tests.invariant.runs import contents, copy_until, logged, losses, state_digest

# Each by itself another course.
TRAJECTORY = (
    *("train.learning_rate=0.02", "train.weight_decay=0.1", "train.adam_beta1=0.8", "train.adam_beta2=0.99"),
    *("train.schedule=linear", "train.warmup_frac=0.5", "train.max_grad_norm=0.5", "train.optimizer=adamw_8bit"),
    *("train.epochs=2", "train.max_steps=4", "train.micro_batch_size=2", "train.grad_accum_steps=1"),
    *("train.fused=false", "run.seed=3", "data.seq_len=64", "data.batching=shuffled", "data.loss_on=all"),
    *("data.max_train_rows=10", "data.duplicates=drop", "adapter.r=8", "adapter.alpha=16", "adapter.dropout=0"),
    *("adapter.target_modules=[q_proj]", "adapter.method=rslora", "model.compute_dtype=bfloat16"),
    *("quant.quant_type=fp4", "quant.double_quant=false", "quant.block_size=32", "quant.skip_modules=[q_proj]"),
    *("quant.storage_dtype=float32", "data.overlong=cut", "data.format=messages"),
    "data.columns={messages: messages}",
)
NEUTRAL: dict[str, Any] = {
    "eval.every": 1,
    "eval.batch_size": 2,
    "eval.generate_rows": 1,
    "eval.max_new_tokens": 3,
    "export.export_dtype": "float16",
    "export.shard_gib": 1.0,
    "data.bad_rows": "skip",
    "data.max_eval_rows": 4,
    "data.max_lost_frac": 0.5,
    "data.streaming": True,
    "run.log_every": 2,
    "run.trackers": ["tensorboard"],
    "train.checkpointing": "none",
    "train.checkpoint_every": 2,
    "train.resident_layers": 0,
    "train.memory_limit_gib": 0.5,
    "train.memory": "auto",
    "train.save_every": 1,
    "train.keep": 8,
    "train.on_disk_full": "wait",
}
# What these name is bound by its fingerprint and may lie elsewhere; or there is one value on this machine.
ELSEWHERE = {"adapter.init_from", "data.eval", "data.train", "model.path", "model.chat_template", "run.dir"}
NOT_HERE = {"model.revision", "run.tracker_project", "train.offload_checkpoints"}  # a hub id, wandb, CUDA
TOGETHER = {  # without which the key has no effect
    "train.checkpoint_every": {"train.checkpointing": "full"},
    "eval.max_new_tokens": {"eval.generate_rows": 1},
}


def resume(folder: Path, *arguments: str) -> Outcome:
    return run_cli("train", folder / "recipe.yaml", "--resume", *arguments)


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def resumes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]


def test_every_trajectory_key_is_refused_with_both_sides_and_its_place(straight: Path, tmp_path: Path) -> None:
    folder = copy_until(straight, tmp_path / "run", 2)
    before = contents(folder / "run")
    for override in TRAJECTORY:
        key = override.partition("=")[0]
        outcome = resume(folder, override)
        line = next((line for line in outcome.err.splitlines() if line.split()[:1] == [key]), "")
        assert outcome.code == 5 and line.endswith("command line"), (override, outcome.err)
        assert "Traceback" not in outcome.err and "at the checkpoint" in outcome.err
    errors = [json.loads(line) for line in (folder / "run" / "errors.jsonl").read_text().splitlines()]
    assert len(errors) == len(TRAJECTORY) and {(e["kind"], e["exit_code"]) for e in errors} == {("resume", 5)}
    assert errors[0]["problems"][0]["what"] == "train.learning_rate: 0.01 at the checkpoint, 0.02 now"
    (folder / "run" / "errors.jsonl").unlink()
    assert contents(folder / "run") == before


def test_a_changed_line_of_the_recipe_is_named(straight: Path, tmp_path: Path) -> None:
    folder = copy_until(straight, tmp_path / "run", 2)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.03'))
    number = 1 + next(i for i, line in enumerate(recipe.read_text().splitlines()) if '"learning_rate"' in line)
    outcome = resume(folder)
    assert outcome.code == 5 and f"recipe.yaml:{number}" in outcome.err and "0.03" in outcome.err, outcome.err


def test_neutral_keys_change_no_bit(straight: Path, tmp_path: Path) -> None:
    """All of them at once, the model and the rows in another place."""
    folder = copy_until(straight, tmp_path / "run", 2)
    (folder / "train.jsonl").rename(folder / "moved.jsonl")
    model = json.loads((folder / "recipe.yaml").read_text())["model"]["path"]
    shutil.copytree(model, folder / "model")
    # Which way of checkpointing comes with every second layer is said by its own test.
    values = {key: value for key, value in NEUTRAL.items() if key != "train.checkpoint_every"}
    elsewhere = {"data.train": [str(folder / "moved.jsonl")], "model.path": str(folder / "model")}
    outcome = resume(folder, *overrides(values | elsewhere))
    assert outcome.code == 0, outcome.err
    assert state_digest(folder / "run") == state_digest(straight / "run")
    expected = losses(straight / "run")
    assert losses(folder / "run") == [*expected[:2], *expected[3:]], "run.log_every: 2, and the last step"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", NEUTRAL)
def test_a_neutral_key_changes_no_bit(straight: Path, tmp_path: Path, key: str) -> None:
    folder = copy_until(straight, tmp_path / "run", 2)
    outcome = resume(folder, *overrides({key: NEUTRAL[key]} | TOGETHER.get(key, {})))
    assert outcome.code == 0, outcome.err
    assert state_digest(folder / "run") == state_digest(straight / "run")


def all_keys() -> set[str]:
    sections = {name: field.annotation.model_fields for name, field in Recipe.model_fields.items()}  # type: ignore[union-attr]
    return {f"{name}.{key}" for name, fields in sections.items() for key in fields}


def test_every_trajectory_key_is_tried() -> None:
    """But for the options of other methods, which come with `adapter.method`, and what this recipe cannot have."""
    cannot = {"model.attn_implementation", "data.split"}  # beside packs; beside data.eval
    cannot |= {key for key in all_keys() if key.startswith("model.lord_")}  # wider layers: tests/methods/test_lord.py
    tried = {override.partition("=")[0] for override in TRAJECTORY} | cannot
    options = {f"adapter.{option}" for method in METHODS.values() for option in method.options}
    assert {key for key in all_keys() - ROUNDING_KEYS if not is_neutral(key)} - tried == options


def test_every_neutral_key_is_tried() -> None:
    keys = {key for key in all_keys() if key.startswith("eval.")} | NEUTRAL_KEYS
    assert keys - NEUTRAL.keys() == ELSEWHERE | NOT_HERE
    assert {key.partition(".")[0] for key in NEUTRAL} >= NEUTRAL_SECTIONS


def test_a_fork_is_recorded_and_trained(straight: Path, tmp_path: Path) -> None:
    folder = copy_until(straight, tmp_path / "run", 4)
    run = folder / "run"
    change = ["train.learning_rate=0.02", "--from", "2"]
    outcome = resume(folder, *change, "--allow-change", "train.learning_rate")
    assert outcome.code == 0 and "a fork" in outcome.err and "train.learning_rate 0.01 -> 0.02" in outcome.err
    (entry,) = resumes(run)
    fork = {"key": "train.learning_rate", "old": 0.01, "new": 0.02, "where": "command line"}
    assert (entry["step"], entry["from"], entry["level"], entry["fork"]) == (2, "step-000002", "D0", [fork])
    assert state_digest(run) != state_digest(straight / "run")
    rates = [line["learning_rate"] for line in logged(run, "train")]
    assert rates[2:] == [2 * line["learning_rate"] for line in logged(straight / "run", "train")][2:]  # type: ignore[operator]
    assert losses(run)[:2] == losses(straight / "run")[:2], "the first steps are the same, each logged once"
    again = resume(folder, "train.learning_rate=0.02")
    assert again.code == 0 and "already complete" in again.err, "from then on it is this run's own value"


@pytest.mark.slow
def test_on_other_held_out_rows_the_best_is_judged_anew(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run that said so was stopped before its first checkpoint."""
    folder = Path(shutil.copytree(straight, tmp_path / "run", ignore=shutil.ignore_patterns("run")))
    assert run_cli("train", folder / "recipe.yaml", "eval.every=2", "train.max_steps=4").code == 0
    write_rows(folder / "test.jsonl", chat_rows(6, start=300))

    def too_large(*_: object, **__: object) -> None:
        raise OutOfMemory("too large", fix="take less")

    with monkeypatch.context() as patch:
        patch.setattr("qlora_train.train.loop.train_step", too_large)
        stopped = resume(folder, "eval.every=2", "train.max_steps=4", "--from", "2")
    for outcome, code in ((stopped, 9), (resume(folder, "eval.every=2", "train.max_steps=4"), 0)):
        assert outcome.code == code and "the held-out rows have changed" in outcome.err, outcome.err
    states = [json.loads((folder / "run" / "ckpt" / f"step-00000{n}" / "state.json").read_text()) for n in (2, 4)]
    assert states[0]["best_step"] == 2 and states[0]["best_rows"] != states[1]["best_rows"]


@pytest.mark.slow
def test_a_finished_run_goes_on_for_another_epoch(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    folder = tmp_path / "run"
    refused = resume(folder, "train.epochs=2")
    assert refused.code == 5 and "--allow-change train.epochs" in refused.err, refused.err
    outcome = resume(folder, "train.epochs=2", "--allow-change", "train.epochs")
    assert outcome.code == 0 and "step 10/10" in outcome.err, outcome.err
    assert [line["step"] for line in logged(folder / "run", "train")] == list(range(1, 11))


@pytest.mark.slow
def test_other_rows_are_a_fork_only_when_asked_for(straight: Path, tmp_path: Path) -> None:
    folder = copy_until(straight, tmp_path / "run", 2)
    write_rows(folder / "train.jsonl", chat_rows(20, start=50))
    refused = resume(folder)
    assert refused.code == 5 and "the training data" in refused.err and "--allow-change data.train" in refused.err
    outcome = resume(folder, "--allow-change", "data.train")
    assert outcome.code == 0 and "in another order from step 2 on" in outcome.err, outcome.err
    (entry,) = resumes(folder / "run")
    assert entry["level"] == "D0" and entry["fork"][0]["key"] == "data"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--allow-change", "adapter.r", "adapter.r=8"], 2, "do not fit another value"),
        (["--allow-change", "train.learning_rat"], 2, "train.learning_rate"),
        (["--allow-change", "eval.every"], 2, "one that may change anyway"),
        (["--allow-change", "run.seed"], 2, "nothing has changed there"),
        (["--allow-change", "train.max_steps", "train.max_steps=1"], 2, "now ends at step 1"),
        (["--allow-change", "run.seed", "run.seed=1", "train.fused=false"], 5, "train.fused"),
    ],
)
def test_what_cannot_be_allowed(straight: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    folder = copy_until(straight, tmp_path / "run", 2)
    outcome = resume(folder, *arguments)
    assert outcome.code == code and words in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert not (folder / "run" / "resumes.jsonl").exists()


def test_another_split_of_a_step_is_the_same_rows_in_the_same_order(straight: Path, tmp_path: Path) -> None:
    folder = copy_until(straight, tmp_path / "run", 2)
    outcome = resume(folder, "train.micro_batch_size=2", "train.grad_accum_steps=1")
    assert outcome.code == 0 and "D1" in outcome.err and "train.micro_batch_size 1 -> 2" in outcome.err, outcome.err
    (entry,) = resumes(folder / "run")
    assert entry["level"] == "D1" and not entry["fork"]
    tokens = [
        (line["step"], line["num_tokens"], line["num_supervised_tokens"]) for line in logged(folder / "run", "train")
    ]
    there = logged(straight / "run", "train")
    assert tokens == [(line["step"], line["num_tokens"], line["num_supervised_tokens"]) for line in there]
    refused = resume(copy_until(straight, tmp_path / "uneven", 2), "train.micro_batch_size=2")
    assert refused.code == 5 and "train.micro_batch_size" in refused.err, "twice the packs of a step"


def test_another_machine_is_said_and_recorded(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.train import setup

    folder = copy_until(straight, tmp_path / "run", 4)
    real = setup.environment
    there = {"cpu_capability": "NEON", "threads": 64, "cpu_features": {"amx_bf16": "of another kind"}}
    versions = real()["versions"] | {"torch": "9.9.9"}
    monkeypatch.setattr(setup, "environment", lambda: {**real(), **there, "versions": versions})
    outcome = resume(folder)
    assert outcome.code == 0 and "not bit for bit" in outcome.err, outcome.err
    assert "versions.torch 2.15.0 -> 9.9.9" in outcome.err and "threads 1 -> 64" in outcome.err
    (entry,) = resumes(folder / "run")
    assert entry["level"] == "D1"
    changed = {change["key"]: (change["old"], change["new"]) for change in entry["rounding"]}
    assert {"cpu_capability", "threads"} <= set(changed)
    features = real()["cpu_features"]
    assert features and changed["cpu_features.amx_bf16"] == (features.get("amx_bf16"), "of another kind")
    assert {f"cpu_features.{name}" for name in features} <= set(changed), "instructions that this machine lacks"
    assert state_digest(folder / "run") == state_digest(straight / "run"), "in truth it was the same machine"


def test_an_evaluation_that_is_due_is_not_made_without_rows(straight: Path, tmp_path: Path) -> None:
    """The run was stopped in an evaluation, and goes on without held-out rows."""
    folder = copy_until(straight, tmp_path / "run", 2)
    checkpoint = folder / "run" / "ckpt" / "step-000002"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_bytes(json_bytes({**state, "evaluation_due": True}))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    content = (checkpoint / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    write_json(checkpoint / MANIFEST, _sealed(manifest))
    outcome = resume(folder, "data.eval=[]", "eval.every=0", "eval.generate_rows=0")
    assert outcome.code == 0, outcome.err
    assert state_digest(folder / "run") == state_digest(straight / "run")
