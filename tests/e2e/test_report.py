"""The report of a run as a user makes it: trained, exported and shown through the command line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_train.train import loop
from tests.commandline import Outcome, run_cli, write_recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A folder with `run`, trained, and `merged`, its export."""
    folder = tmp_path_factory.mktemp("report")
    outcome = run_cli("train", write_recipe(folder, tiny_llama_dir, eval__every=2))
    assert outcome.code == 0, outcome.err
    # An export that is refused is a fact too; the next one is the newest.
    refused = run_cli("export", folder / "run", folder / "refused", "export.max_kl_frac=1e-30")
    assert refused.code == 4 and not (folder / "refused").exists()
    outcome = run_cli("export", folder / "run", folder / "merged")
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def reported(exported: Path) -> Outcome:
    return run_cli("report", exported / "run", "--json")


def test_a_real_run_has_its_page_with_nothing_missing(exported: Path, reported: Outcome) -> None:
    assert reported.code == 0, reported.err
    result = json.loads(reported.out)
    (run,) = result["runs"]
    assert run["notes"] == [] and run["is_complete"] and run["merge_accepted"]
    summary = json.loads((exported / "run" / "run.json").read_text())
    assert (run["base_loss"], run["adapter_loss"]) == (summary["base"]["loss"], summary["adapter"]["loss"])
    page = (exported / "run" / "report.html").read_text(encoding="utf-8")
    assert result["page"] == str(exported / "run" / "report.html") and result["num_bytes"] == len(page.encode())
    assert f"{summary['base']['loss']:.3f} \N{RIGHTWARDS ARROW} {summary['adapter']['loss']:.3f}" in page
    assert str(exported / "merged") in page and "Plan against peak" in page


def test_norms_are_those_that_the_export_found_densely(exported: Path, reported: Outcome) -> None:
    """The merge forms B A in float32 for each weight; the page shows four digits."""
    page = (exported / "run" / "report.html").read_text(encoding="utf-8")
    modules = json.loads((exported / "merged" / "export.json").read_text())["modules"]
    assert len(modules) == 14
    for module in modules:
        row = page[page.index(f">{module['name'].removesuffix('.weight')}</th>") :]
        shown = row[: row.index("</tr>")].split('<td class="n">')[3].partition("<")[0]
        assert float(shown) == pytest.approx(module["delta_norm"], rel=6e-4)


def test_both_verdicts_are_on_record(exported: Path) -> None:
    lines = [json.loads(line) for line in (exported / "run" / "exports.jsonl").read_text().splitlines()]
    assert [(Path(line["folder"]).name, line["accepted"]) for line in lines] == [("refused", False), ("merged", True)]
    verification = json.loads((exported / "merged" / "export.json").read_text())["verification"]
    assert lines[1]["merged"] == verification["merged"] and lines[1]["num_rows"] == verification["rows"]


def test_the_line_for_a_person(exported: Path, tmp_path: Path) -> None:
    outcome = run_cli("report", exported / "run", "--out", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(
        "run: llama in NF4 with LoRA (r = 4, alpha = 8), trained on 20 rows. Complete: 5 steps"
    )
    assert outcome.out.splitlines()[-1].startswith(f"the page: {tmp_path / 'page.html'} (")


def test_a_finished_run_with_a_page_can_still_be_asked_to_resume(exported: Path, reported: Outcome) -> None:
    """The page is part of a run folder, not a foreign file."""
    outcome = run_cli("train", exported / "recipe.yaml", "--resume", "eval.every=2")
    assert outcome.code == 0 and "already complete" in outcome.err, outcome.err


@pytest.mark.slow
def test_what_happened_to_a_run_is_on_its_page(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by SIGTERM in step 2, gone on with another learning rate, and in step 4 not finite."""
    recipe = write_recipe(tmp_path, tiny_llama_dir, eval__generate_rows=0, train__checkpointing="full")
    run, step_of = tmp_path / "run", loop.train_step

    def troubled(causal: Any, *arguments: Any, **options: Any) -> Any:
        if options["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if options["step"] == 3:
            mlp = causal.model.get_submodule("base_model.model.model.layers.1.mlp")
            mlp.register_forward_hook(lambda _module, _inputs, output: output * float("inf"))
        return step_of(causal, *arguments, **options)

    def told() -> str:
        outcome = run_cli("report", run)
        assert outcome.code == 0, outcome.err
        return outcome.out + (run / "report.html").read_text(encoding="utf-8")

    monkeypatch.setattr(loop, "train_step", troubled)
    assert run_cli("train", recipe).code == 128 + signal.SIGTERM
    shown = told()
    assert "Stopped by SIGTERM: step 2 of 5" in shown and "SIGTERM: saved" in shown and "Forked" not in shown
    change = ("--allow-change", "train.learning_rate", "train.learning_rate=0.005")
    assert run_cli("train", recipe, "--resume", *change).code == 7
    shown = told()
    assert "Stopped by a number that is not finite: step 3 of 5" in shown
    assert "train.learning_rate: 0.01 \N{RIGHTWARDS ARROW} 0.005" in shown
    assert "marks: 1 at step 2, 2 at step 2, 3 at step 4" in shown
    assert "the output of model.layers.1.mlp, in micro-batch 1" in shown and "--resume --from 3" in shown
    assert "&lt;|im_start|&gt;user" in shown and "<|im_start|>" not in shown


def test_what_is_no_run_ends_with_the_recipe_code(tmp_path: Path) -> None:
    outcome = run_cli("report", tmp_path)
    assert outcome.code == 2 and "is not a run folder" in outcome.err
