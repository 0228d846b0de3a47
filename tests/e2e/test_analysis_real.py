"""The LoRA paper's two findings looked for on two short runs of the real model: ranks 8 and 64, unlike seeds.

After ten steps A still is its random start, so that the runs cannot read the same of the input; B has learned, and they
write into the same directions: there the paper's first finding shows. Its second does not: through the directions of
the updates these weights look as they do through random ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from tests.commandline import run_cli

RECIPE = Path(__file__).resolve().parent.parent.parent / "recipes" / "quickstart.yaml"
SHORT = ["data.seq_len=256", "data.max_train_rows=200", "data.eval=[]", "eval.generate_rows=0", "train.max_steps=10"]


@pytest.mark.real
@pytest.mark.slow
def test_two_ranks_write_into_the_same_directions(tmp_path: Path) -> None:
    for r, seed in ((8, 0), (64, 1)):
        changes = [f"adapter.r={r}", f"adapter.alpha={2 * r}", f"run.seed={seed}", f"run.dir={tmp_path / str(r)}"]
        outcome = run_cli("train", RECIPE, *SHORT, *changes)
        assert outcome.code == 0, outcome.err
    outcome = run_cli("analyze", tmp_path / "8", tmp_path / "64", "--out", tmp_path / "look", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    by = {
        what: [o for o in found["overlaps"] if o["directions"] == what] for what in ("A", "delta_right", "delta_left")
    }
    for overlap in by["delta_left"]:
        assert (len(overlap["grid"]), len(overlap["grid"][0]), overlap["num_modules"]) == (8, 64, 30)
        first, whole = overlap["grid"][0][0], overlap["grid"][7][63]
        assert first > 10 / overlap["dim"], (overlap["name"], first)
        assert whole > 1.2 * 64 / overlap["dim"], (overlap["name"], whole)
    for overlap in by["A"]:
        assert overlap["grid"][7][63] == pytest.approx(overlap["control"][7][63], rel=0.15), overlap["name"]
    for look in found["looks"]:
        assert min(row["phi"] for row in look["start_overlaps"]) > 0.9
        assert len(look["amplifications"]) == 210
        assert median(a["whole"]["emphasis"] for a in look["amplifications"]) == pytest.approx(1, abs=0.1)
        assert max(a["above_quant_error"] for a in look["amplifications"]) < 1, "a short run is below the noise"
