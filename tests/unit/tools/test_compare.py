"""The comparison asks each run once, gives every method its own best rate, and says what it did not measure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import compare_methods
import pytest
from comparing import claims
from comparing import sweep as sweeping
from comparing.codes import CODES
from comparing.cost import cost_of
from comparing.entrants import BF16, RECIPES, REFERENCE, VERDICT, entrants
from comparing.ledger import Ledger
from comparing.pages import CLAIMS, TITLES, comparison, quantisation, theory
from comparing.rates import FACTOR, MAX_RATES, best_rate, is_inside, next_rate
from comparing.sweep import Sweep
from comparing.table import cells, figures, markdown
from comparing.trial import FULL, SAMPLE, Failed, Trial, search_files
from proofs.common import ROOT, Bar

from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.methods import METHODS

SMALL = replace(SAMPLE, seeds=(0, 1))


def searched(best: float, first: float, *, diverges_from: float = math.inf) -> dict[float, float]:
    """The rates that a search tries where the loss is least at `best`."""
    losses: dict[float, float] = {}
    while (rate := next_rate(losses, first)) is not None:
        losses[rate] = math.inf if rate >= diverges_from else abs(math.log(rate / best)) + 2.0
    return losses


@pytest.mark.parametrize("best", [2.5e-4, 1e-3, 3e-3, 8e-3])
def test_the_search_ends_with_worse_rates_on_both_sides(best: float) -> None:
    losses = searched(best, 1e-3)
    found = best_rate(losses)
    assert found is not None and is_inside(losses)
    assert 1 / FACTOR < found / best < FACTOR, "the nearest rate of the grid"
    assert len(losses) <= MAX_RATES


def test_a_search_that_never_ends_is_ended_and_says_so() -> None:
    losses = searched(1.0, 1e-3)
    assert len(losses) == MAX_RATES and not is_inside(losses)


def test_where_it_diverges_the_search_goes_down() -> None:
    losses = searched(1e-4, 4e-3, diverges_from=2e-3)
    assert best_rate(losses) == pytest.approx(4e-3 / 2**5) or best_rate(losses) == pytest.approx(4e-3 / 2**6)
    assert best_rate({1e-3: math.inf}) is None and next_rate({1e-3: math.inf}, 1e-3) == 5e-4


@pytest.mark.parametrize("name", entrants())
def test_every_method_takes_part_with_a_recipe_that_is_valid(name: str, tmp_path: Path) -> None:
    entrant = entrants()[name]
    experts = [tmp_path / "a", tmp_path / "b"] if entrant.needs_experts else []
    for folder in experts:
        folder.mkdir()
    for stage in ("search", "final", "spelling"):
        trial = Trial(stage, entrant, 1e-3, 0, FULL, 2, work=tmp_path, experts=tuple(experts))  # type: ignore[arg-type]
        recipe = load_recipe(trial.recipe, [*trial.overrides(), "run.dir=unused"]).recipe
        assert recipe.adapter.method == entrant.method
        assert recipe.train.learning_rate == 1e-3 and recipe.eval.generate_rows == 0
        own = (
            load_recipe(RECIPES / "methods" / f"{entrant.method}.yaml", with_data=False).recipe if not experts else None
        )
        if own is not None:
            assert recipe.adapter == own.adapter, "as the method's own recipe has it"
            assert entrant.first_rate == own.train.learning_rate
    assert recipe.quant.quant_type == {BF16: "none", "qalora": "int4"}.get(name, "nf4")


def test_nobody_is_left_out() -> None:
    assert entrants().keys() == {*METHODS, BF16}
    assert set(VERDICT) <= entrants().keys() and REFERENCE in VERDICT


def test_rates_are_chosen_by_rows_that_are_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    files = search_files(FULL, tmp_path)
    train, choose = (set(path.read_text().splitlines()) for path in files)
    assert (len(train), len(choose)) == (FULL.search_rows, FULL.choose_rows) and not train & choose
    recipe = load_recipe(Trial("final", entrants()["lora"], 1e-3, 0, FULL, 1, work=tmp_path).recipe, ["run.dir=x"])
    held_out = set(Path(recipe.recipe.data.eval[0].path).read_text().splitlines())
    assert len(held_out) == 222 and not (train | choose) & held_out


class Runs:
    """Stands for training: losses by rule, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing: dict[str, str] = {}

    def __call__(self, trial: Trial, *, limit_s: float) -> dict[str, Any]:
        self.asked.append(trial.name)
        if (why := self.failing.get(trial.entrant.name)) is not None:
            raise Failed(why)
        loss = abs(math.log(trial.learning_rate / 2e-3)) + 2.0 + trial.seed / 10
        export = {"kl": 1e-4, "effect_kl": 1.0, "top1_agreement": 1.0}
        scores = {"char_similarity": 0.5, "exact_match": 0.25}
        return {
            "loss": loss, "base_loss": 4.0, "num_trainable": 1_000_000, "memory_bytes": 2**30, "wall_s": 1.0,
            "scores": scores, "export": export,
        }  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(sweeping, "run_trial", made)
    return made


def sweep_in(folder: Path, **options: Any) -> Sweep:
    ledger = Ledger(folder / "ledger.jsonl", any_code=options.pop("any_code", False))
    return Sweep(ledger, SMALL, threads=1, limit_s=60, say=lambda text: None, work=folder, **options)


def test_an_interrupted_comparison_goes_on_where_it_was(runs: Runs, tmp_path: Path) -> None:
    stages = ("search", "final", "spelling")
    sweep_in(tmp_path).compare(["lora"], stages)
    first = list(runs.asked)
    assert len(first) == len(set(first)) and "final-lora-0.002-seed1" in first and "spelling-lora-0.002-seed0" in first
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(ledger.read_text() + '{"settings": {"torn')  # by a killed process
    runs.asked.clear()
    compared = sweep_in(tmp_path).compare(["lora", "mtlora"], stages)
    assert runs.asked and not [name for name in runs.asked if "-lora-" in name], "only the new method is run"
    assert compared[0].rate == 2e-3 and compared[0].rate_is_inside and len(compared[0].finals) == 2
    assert compared[1].spelling is None, "the second set is for the methods of the verdict table"
    again = [json.loads(line) for line in ledger.read_text().splitlines() if not line.endswith("torn")]
    assert len(again) == len(first) + len(runs.asked)


def test_another_checkout_goes_on_from_what_was_kept(runs: Runs, tmp_path: Path) -> None:
    """Wherever it lies; and the table says what its runs were made with."""
    kept = tmp_path / "kept.jsonl"

    def ledger(name: str, **options: Any) -> Ledger:
        return Ledger(tmp_path / name / "ledger.jsonl", kept=kept, **options)

    def compare(ledger: Ledger, *names: str) -> Any:
        work = ledger.path.parent
        return Sweep(ledger, SMALL, threads=1, limit_s=60, say=lambda text: None, work=work).compare(names, ["final"])

    compare(one := ledger("one"), "lora")
    assert one.keep(SMALL.name) == 2 and one.keep("another") == 0 and one.keep(SMALL.name) == 2
    runs.asked.clear()
    compare(other := ledger("other"), "lora", "dora")
    assert {name.split("-")[1] for name in runs.asked} == {"dora"} and len(other.path.read_text().splitlines()) == 2
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert str(tmp_path) not in kept.read_text() and all("torch" in line["machine"] for line in lines)
    kept.write_text("".join(json.dumps({**line, "code": "older", "machine": "a card"}) + "\n" for line in lines))
    mixed = ledger("other", any_code=True)
    compared = compare(mixed, "lora", "dora")
    found = mixed.sources(entry for each in compared for entry in each.entries())
    assert "a card" in found and found[-1] == "2 states of the code" and len(found) == 3
    report = {"rows": figures(compared), "sample": False, "missing": [], "sources": found}
    assert f"* Made with: {'; '.join(found)}." in markdown(report)
    assert "Step times" not in markdown(report | {"cost_sources": found})
    assert "* Step times were taken with: two cores." in markdown(report | {"cost_sources": ["two cores"]})
    assert compare(ledger("other"), "lora")[0].finals[0].machine != "a card", "of another code: made again"


def test_why_a_run_failed_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    entry = Ledger(tmp_path / "ledger.jsonl").add({}, failed=f"refused: {RECIPES / 'x.yaml'}: no")
    assert entry.failed == "refused: recipes/x.yaml: no"


def test_runs_of_other_code_count_only_when_asked_for(runs: Runs, tmp_path: Path) -> None:
    sweep_in(tmp_path).compare(["lora"], ["final"])
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(json.dumps({**json.loads(x), "code": "other"}) + "\n" for x in ledger.open()))
    assert len(sweep_in(tmp_path, any_code=True, make_missing=False).compare(["lora"], ["final"])[0].finals) == 2
    assert sweep_in(tmp_path, make_missing=False).compare(["lora"], ["final"])[0].finals == ()
    assert len(runs.asked) == 2


def test_a_method_that_breaks_is_told_and_the_others_are_compared(runs: Runs, tmp_path: Path) -> None:
    runs.failing = {"dora": "crashed: KeyError: 'x' (merge.py:7)", "olora": "diverged: step 3"}
    compared = sweep_in(tmp_path).compare(["dora", "olora", "lora"], ["search", "final"])
    rows = figures(compared)
    assert [row["name"] for row in rows] == ["lora", "dora", "olora"], "the least loss first, then what has none"
    assert len([name for name in runs.asked if name.startswith("search-dora")]) == 1, "a broken method is not searched"
    assert len([name for name in runs.asked if name.startswith("search-olora")]) == MAX_RATES
    assert cells(rows[1])[2] == "crashed" and cells(rows[2])[2] == "diverged"
    report = {"rows": rows, "sample": False, "missing": ["LoftQ"]}
    text = markdown(report)
    assert "KeyError: 'x' (merge.py:7)" in text and "Not measured yet: LoftQ" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and {line.count("|") for line in table} == {len(cells(rows[0])) + 1}


def test_what_crashed_is_tried_again_and_what_diverged_is_not(runs: Runs, tmp_path: Path) -> None:
    runs.failing = {"dora": "crashed: KeyError", "olora": "diverged: step 3"}
    sweep_in(tmp_path).compare(["dora", "olora"], ["final"])
    runs.failing, runs.asked = {}, []
    shown = sweep_in(tmp_path, make_missing=False).compare(["dora"], ["final"])
    assert [entry.failed for entry in shown[0].finals] == ["crashed: KeyError"] * 2 and not runs.asked
    dora, olora = figures(sweep_in(tmp_path).compare(["dora", "olora"], ["final"]))
    assert {name.split("-")[1] for name in runs.asked} == {"dora"}
    assert dora["loss"] is not None and not dora["failures"] and olora["loss"] is None


def test_the_table_has_the_mean_and_spread_of_seeds_and_lora_as_measure(runs: Runs, tmp_path: Path) -> None:
    row = figures(sweep_in(tmp_path).compare(["lora"], ["search", "final", "spelling"]))[0]
    assert row["loss"] == pytest.approx(2.05) and row["loss_spread"] == pytest.approx(0.05)
    assert (row["time_ratio"], row["memory_ratio"], row["similarity"], row["exact_match"]) == (1.0, 1.0, 0.5, 0.25)
    wanted = ["LoRA / QLoRA", "0.002", "2.050 ± 0.050", "0.500", "0.250", "1.00", "1.00", "1.00", "1.0e-04 (0.01%)"]
    assert cells(row) == wanted
    unsearched = figures(sweep_in(tmp_path).compare(["lora"], ["final"]))[0]
    assert cells(unsearched)[1] == "0.002 (guess)"


def test_a_cost_is_the_median_of_the_turns_ratios() -> None:
    cost = cost_of([(2.0, 1.0), (30.0, 10.0), (1.0, 1.0)])
    assert (cost.time_ratio, cost.lowest, cost.highest, cost.num_turns) == (2.0, 1.0, 3.0, 3)


def test_the_page_shows_each_claim_with_its_figures_and_what_does_not_hold(tmp_path: Path) -> None:
    bars = [
        Bar("rank: r = 1", 2.5, "nats", note="learning rate 0.002, best of 4"),
        Bar("latency: merged model as a multiple of the base", 1.3, at_most=1.1),
    ]
    path = tmp_path / "methods.json"
    path.write_text(json.dumps({"figures": [{**asdict(bar), "ok": bar.ok} for bar in bars]}))
    text = theory(path)
    assert all(claim.text in text for claim in CLAIMS)
    assert "| rank: r = 1 | 2.5 nats (learning rate 0.002, best of 4) | |" in text
    assert "| 1.3 | at most 1.1: **does not hold here** |" in text
    assert text.count("Not measured yet.") == len(CLAIMS) - 2
    assert theory(tmp_path / "none.json").count("Not measured yet.") == len(CLAIMS)
    own = {"figures": [{**asdict(Bar("rank: r = 1", 2.25, "nats")), "ok": True}], "sources": ["a card"]}
    (tmp_path / "claim-rank.json").write_text(json.dumps(own))
    text = theory(path)
    assert "| rank: r = 1 | 2.25 nats | |\n\nMade with: a card." in text and "2.5 nats" not in text
    assert all("Not measured yet" in page(tmp_path / "none.json") for page in (comparison, quantisation))


def test_pages_are_made_without_torch() -> None:
    code = "import sys, render_docs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=False).returncode == 0


def test_the_page_of_the_quantisation_study_has_every_code(tmp_path: Path) -> None:
    figure = {"perplexity": 45.032, "above_bf16": 0.405, "standard_error": 0.021}
    errors = dict.fromkeys(list(TITLES)[1:], 0.1)
    path = tmp_path / "quant.json"
    found = {"sets": {"shell": dict.fromkeys(TITLES, figure)}, "errors": {"Gaussian": errors}}
    machine = {"cuda_devices": ["a card"], "versions": {"torch": "2.15"}}
    path.write_text(json.dumps({**found, "trained": {"nf4": [2.0, 2.01], "bf16": [1.99, 2.02]}, "machine": machine}))
    text = quantisation(path)
    assert "| not quantised | 45.03 |" in text and "| NF4 | 45.03 (+0.4050 ± 0.0210 nats) |" in text
    assert "| Gaussian | 0.1000 | 0.1000 | 0.1000 | 0.1000 | 0.1000 |" in text
    assert "LoRA on bf16: held-out loss 1.9900, 2.0200 by seed." in text
    pair = {"set": "shell", "better": "nf4", "worse": "fp4", "difference": 0.3, "standard_error": 0.1}
    path.write_text(json.dumps({**json.loads(path.read_text()), "pairs": [pair, {**pair, "difference": 0.1}]}))
    claims_page = theory(tmp_path / "methods.json")
    assert "| shell: FP4 above NF4 | 0.3 nats (± 0.1000, paired by row) | at least 0 |" in claims_page
    assert "| 0.1 nats (± 0.1000, paired by row: not told apart) | at least 0 |" in claims_page
    assert "| weights, Gaussian: error of NF4 beside the better of FP4 and INT4 | 1 | at most 1 |" in claims_page
    assert "(within the distance between seeds) |" in claims_page
    assert text.endswith("Measured on a card, torch 2.15.")
    assert TITLES.keys() == CODES.keys()


def test_the_command_shows_what_there_is_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    asked = ["--show", "--methods", "lora,dora", "--work", str(tmp_path), "--json", str(target), "model.path=x"]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *asked])
    assert compare_methods.main() == 1, "something is missing"
    assert "not measured yet: LoRA / QLoRA, DoRA" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert report["missing"] == ["LoRA / QLoRA", "DoRA"] and report["shared"] == ["model.path=x"]
    with pytest.raises(SystemExit):
        compare_methods.parse(["--methods", "lora,lorra"])
    assert "'lorra' is none of lora" in capsys.readouterr().err
    sample = compare_methods.parse(["--sample"])
    assert sample.stages == ("final", "cost") and REFERENCE in sample.methods


def test_ranks_and_targets_are_each_searched_and_keep_their_own_keys(runs: Runs, tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path)
    bars = claims.rank(sweep, (1, 8)) + claims.targets(sweep)
    assert [bar.what for bar in bars[:3]] == ["rank: r = 1", "rank: r = 8", "targets: all seven layers, r = 4"]
    assert all(bar.value == 2.0 and "learning rate 0.002, best of 3" in bar.note for bar in bars)
    keys = {tuple(json.loads(line)["settings"]["keys"]) for line in (tmp_path / "ledger.jsonl").open()}
    assert ("adapter.method=lora", "adapter.target_modules=[q_proj]", "adapter.r=35", "adapter.alpha=70") in keys
    assert len(keys) == len(bars) == 2 + len(claims.TARGETS)
    for key in keys:
        load_recipe(Trial("search", entrants()["lora"], 1e-3, 0, SMALL, 1).recipe, [*key, "run.dir=x"])


def test_targets_are_compared_at_the_same_number_of_parameters() -> None:
    """Sizes of SmolLM2-135M: hidden 576, keys and values 192, MLP 1,536."""
    widths = {"q_proj": 1152, "k_proj": 768, "v_proj": 768, "o_proj": 1152, "mlp": 3 * 2112}
    counts = []
    for _, modules, r in claims.TARGETS:
        names = widths if modules == "all-linear" else modules.strip("[]").split(",")
        counts.append(r * sum(widths[name] for name in names))
    assert max(counts) / min(counts) < 1.05


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_on_a_tiny_model_trains_answers_exports_and_is_timed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tiny = ("data.seq_len=384", "data.max_lost_frac=1", "eval.batch_size=16", f"model.path={tiny_llama_dir}")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    scale = replace(SAMPLE, final_rows=24, held_out_rows=8, answers=4)
    sweep = Sweep(ledger, scale, threads=1, limit_s=300, say=print, work=tmp_path, shared=tiny)
    rows = {row["name"]: row for row in figures(sweep.compare(["lora", "pissa", "mole"], ["final", "cost"]))}
    for row in rows.values():
        assert row["failures"] == [] and row["loss"] < row["base_loss"] and 0 <= row["similarity"] <= 1
        assert row["num_trainable"] > 0 and row["memory_ratio"] > 0 and row["time_ratio"] > 0
    assert rows["lora"]["export"]["kl"] < 1e-3 * rows["lora"]["export"]["effect_kl"]
    assert "refused" in rows["mole"]["export"], "its gates depend on the input"
    left = {path.name for path in (tmp_path / "runs" / "sample").iterdir()}
    assert left == {f"expert-lora-0.002-seed0-half{half}" for half in (0, 1)}, "runs are put away once measured"
