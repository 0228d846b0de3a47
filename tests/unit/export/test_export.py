"""The export verb on a tiny run folder: every key of the recipe's section changes what happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from qlora_train.export import run as run_module
from qlora_train.export import tensors as tensors_module
from qlora_train.export.safetensors_writer import write_shard
from qlora_train.export.tensors import MergedTensors
from qlora_train.export.unfinished import FinishedShards, shards_folder
from tests.commandline import Outcome, run_cli

UP = "model.layers.1.mlp.up_proj.weight"
FEW = ("export.compare_rows=4", "export.verify_rows=4", "eval.generate_rows=2", "eval.max_new_tokens=2")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, which exports leave lines in."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def export(run: Path, name: str, *overrides: str) -> tuple[Outcome, Path]:
    return run_cli("export", run, run.parent / name, *overrides), run.parent / name


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return found


def test_the_terminal_says_what_the_files_hold(run: Path) -> None:
    outcome, folder = export(run, "merged", "export.verify_rows=4", "export.license=mit")
    assert outcome.code == 0, outcome.err
    found = figures(folder)
    assert found["merged_onto"] == "dequantized" and found["verification"]["how"] == "whole" and found["choice"] is None
    assert {"read", "quantise", "merge", "write", "verify"} <= found["seconds"].keys()
    assert found["noise"]["num_modules"] == 14 and found["verification"]["worst_layer"]["ratio"] < 1.5
    assert found["licence"]["name"] == "mit" and "license: mit" in (folder / "README.md").read_text()
    said = " ".join(outcome.out.split())
    for words in (
        "its quantisation error", "nearest to the noise: model.layers.", found["noise"]["reading"],
        "accepted: the merged model's KL is", "every layer by itself is off by what rounding explains",
        "licence of the base: mit", "peak memory", "14 layers merged",
    ):  # fmt: skip
        assert words in said, words
    stages = ("writing model.safetensors (20 tensors) ...", "running the trained model on 4 eval rows", "merged model")
    assert all(stage in outcome.err for stage in stages), outcome.err


def test_layers_and_whole_come_to_the_same_verdict(run: Path) -> None:
    verdicts = {}
    for how in ("whole", "layers"):
        outcome, folder = export(run, how, f"export.verify={how}")
        assert outcome.code == 0, outcome.err
        verdicts[how] = figures(folder)["verification"]
        assert verdicts[how].pop("how") == how
    for side in ("merged", "adapter_off"):
        one, other = (verdicts[how][side] for how in ("whole", "layers"))
        assert one["num_tokens"] == other["num_tokens"]
        for key in ("mean_kl", "reference_nll", "candidate_nll", "top1_agreement"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-8), (side, key)


def test_auto_measures_three_ways_and_publishes_the_better(run: Path) -> None:
    outcome, folder = export(run, "auto", "export.base=auto", *FEW)
    assert outcome.code == 0, outcome.err
    choice = figures(folder)["choice"]
    found = {candidate["onto"]: candidate for candidate in choice["candidates"]}
    assert list(found) == ["dequantized", "original", "requantized"]
    assert choice["num_rows"] == 4 and choice["num_answers"] == 2 and found["original"]["exact_match"] is not None
    kl = {onto: candidate["distance"]["mean_kl"] for onto, candidate in found.items()}
    assert kl["dequantized"] < 0.01 * min(kl["original"], kl["requantized"])
    published = figures(folder)["merged_onto"]
    assert published in ("dequantized", "original")
    assert figures(folder)["verification"]["merged"]["mean_kl"] == pytest.approx(kl[published], rel=1e-3, abs=1e-9)
    said = " ".join(outcome.out.split())
    assert "merged onto" in said and choice["sentence"] in said and "4 bit again" in said
    card = (folder / "README.md").read_text()
    assert choice["sentence"] in card and "What to merge onto, measured" in card


@pytest.mark.slow
def test_auto_a_layer_at_a_time_measures_the_same_and_asks_nothing(run: Path) -> None:
    outcome, folder = export(run, "layers", "export.base=auto", "export.verify=layers", "export.compare_rows=4")
    assert outcome.code == 0, outcome.err
    choice = figures(folder)["choice"]
    assert choice["num_answers"] == 0 and choice["candidates"][0]["exact_match"] is None
    assert choice["num_rows"] == 16, "verify_rows is larger, and held out"


def test_the_original_weights_have_a_gate_of_their_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_module.verify

    def worse(*args: Any) -> Any:
        verdict = real(*args)
        merged = replace(verdict.merged, candidate_nll=verdict.merged.reference_nll + 0.25)
        return replace(verdict, merged=merged)

    monkeypatch.setattr(run_module, "verify", worse)
    outcome, folder = export(run, "original", "export.base=original")
    assert outcome.code == 4 and not folder.exists()
    assert "another one than was trained, and worse" in outcome.err and "+0.2500, limit +0.0000" in outcome.err
    assert "export.base=dequantized" in outcome.err and "export.max_loss_rise=0.26" in outcome.err
    outcome, folder = export(run, "original", "export.base=original", "export.max_loss_rise=0.26")
    assert outcome.code == 0, outcome.err
    assert "accepted as another model than the trained one" in " ".join(outcome.out.split())
    assert figures(folder)["merged_onto"] == "original"
    lines = [json.loads(line) for line in (run / "exports.jsonl").read_text().splitlines()]
    assert [(line["merged_onto"], line["accepted"]) for line in lines] == [("original", False), ("original", True)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("export.compare_rows=4", "export.compare_rows has no effect"),
        ("export.base=best", "export.base"),
        ("export.verify=never", "export.verify"),
        ("export.license=MIT or so", "export.license"),
        ("export.max_loss_rise=-1", "export.max_loss_rise"),
    ],
)
def test_keys_that_make_no_sense_are_refused(override: str, words: str, run: Path) -> None:
    outcome, folder = export(run, "x", override)
    assert outcome.code == 2 and words in outcome.err and not folder.exists()


def test_each_layer_is_held_to_the_trained_one_on_the_original_weights_too(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much loss is accepted; a fault in one layer may even lower it."""
    asked = ("export.base=original", "export.max_loss_rise=100", "export.verify_rows=2")
    outcome, folder = export(run, "sound", *asked)
    assert outcome.code == 0, outcome.err
    assert 0 < figures(folder)["verification"]["worst_layer"]["ratio"] < 1.5
    real = tensors_module.read_updates
    monkeypatch.setattr(tensors_module, "read_updates", lambda path: faults()["half the scale of one"](real(path)))
    outcome, folder = export(run, "spoiled", *asked)
    assert outcome.code == 4 and not folder.exists()
    assert f"on the original weights: {UP} by itself is off by" in outcome.err


QUICK = ("one missing", "none")


def faults() -> dict[str, Any]:
    k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
    return {
        "half the scale": lambda u: {name: replace(one, scaling=one.scaling / 2) for name, one in u.items()},
        "half the scale of one": lambda u: {**u, UP: replace(u[UP], scaling=u[UP].scaling / 2)},
        "one missing": lambda u: {name: one for name, one in u.items() if name != UP},
        "k and v swapped": lambda u: {**u, k: u[v], v: u[k]},
        "none": dict,
    }


@pytest.fixture(scope="module")
def observed() -> dict[str, Any]:
    """What the trained model made of the rows: the same for every planted fault."""
    return {}


@pytest.mark.parametrize("fault", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in faults()])
def test_planted_faults_are_caught(
    fault: str, run: Path, observed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, observe = tensors_module.read_updates, run_module.observe_trained

    def once(*args: Any) -> Any:
        if "reference" not in observed:
            observed["reference"] = observe(*args)
        return observed["reference"]

    monkeypatch.setattr(run_module, "observe_trained", once)
    monkeypatch.setattr(tensors_module, "read_updates", lambda folder: faults()[fault](dict(real(folder))))
    outcome, folder = export(run, "x", "export.verify_rows=2")
    if fault == "none":
        assert outcome.code == 0, outcome.err
    else:
        assert outcome.code == 4 and "is not the trained one" in outcome.err and not folder.exists()
        assert "by itself is off by" in outcome.err and "model.layers." in outcome.err
        assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def _swap_two_rows(table: Tensor) -> None:
    table[[7, 299]] = table[[299, 7]].clone()  # of tokens that no row of the comparison need hold


def _scale_one_value(norm: Tensor) -> None:
    norm[5] *= 1.02


COPIED_FAULTS: dict[str, Callable[[Tensor], None]] = {
    "model.embed_tokens.weight": _swap_two_rows,
    "model.layers.1.input_layernorm.weight": _scale_one_value,
}


@pytest.mark.parametrize("how", ["whole", pytest.param("layers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COPIED_FAULTS)
def test_one_wrong_value_of_a_tensor_that_is_only_copied_is_caught(
    name: str, how: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MergedTensors.exact

    def spoilt(self: MergedTensors, stored: str, *arguments: Any) -> Tensor:
        exact = real(self, stored, *arguments).clone()
        if stored == name:
            COPIED_FAULTS[name](exact)
        return exact

    monkeypatch.setattr(MergedTensors, "exact", spoilt)
    outcome, folder = export(run, "x", "export.verify_rows=1", f"export.verify={how}", "export.max_kl_frac=0.99")
    assert outcome.code == 4 and f"{name} by itself is off by" in outcome.err and not folder.exists(), outcome


@pytest.mark.slow
def test_a_killed_export_goes_on_from_its_finished_shards(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of several shards is finished when the process dies; only the others are written again."""
    monkeypatch.setattr("qlora_train.export.merge.code_sha256", lambda: "the same code")
    sharded = ("export.shard_gib=0.0002", "export.verify_rows=2")
    outcome, clean = export(run, "clean", *sharded)
    assert outcome.code == 0, outcome.err
    target = run.parent / "merged"
    first = sorted(clean.glob("*.safetensors"))[0].name

    class Killed(BaseException):
        """What no clean-up sees."""

    def kept(self: FinishedShards, name: str, *rest: Any) -> None:
        finish(self, name, *rest)
        shutil.copytree(self.folder, run.parent / "left")
        raise Killed

    finish = FinishedShards.finish
    monkeypatch.setattr(FinishedShards, "finish", kept)
    with pytest.raises(Killed):
        export(run, "merged", *sharded)
    assert not target.exists()
    shutil.move(run.parent / "left", shards_folder(target))
    monkeypatch.setattr(FinishedShards, "finish", finish)
    written: list[str] = []

    def noted(path: Path, *rest: Any) -> str:
        written.append(path.name)
        return write_shard(path, *rest)

    monkeypatch.setattr("qlora_train.export.merge.write_shard", noted)
    outcome, _ = export(run, "merged", *sharded)
    assert outcome.code == 0, outcome.err
    assert "1 finished shards of an export that was killed were taken over" in " ".join(outcome.out.split())
    assert first not in written and len(written) == len(list(clean.glob("*.safetensors"))) - 1
    for path in clean.glob("*.safetensors"):
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert figures(target)["modules"] == figures(clean)["modules"], "rows of what was taken over are there too"
    assert len(load_file(target / first)) > 0 and not shards_folder(target).exists()


def test_too_little_room_is_told_before_any_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SMALL_FILES_BYTES", 2**60)
    outcome, folder = export(run, "x")
    assert outcome.code == 6 and "GiB free" in outcome.err and not folder.exists()


def test_pushing_is_refused_before_any_work_where_there_is_no_hub(run: Path) -> None:
    outcome = run_cli("export", run, run.parent / "x", "--push", "me/model")
    assert outcome.code == 6 and "HF_HUB_OFFLINE is set" in outcome.err
    assert run_cli("export", run, run.parent / "x", "--push", "model").code == 2
    assert not (run.parent / "x").exists() and not (run / "exports.jsonl").exists()
