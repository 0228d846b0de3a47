"""The model card carries the figures, and nothing that a page would act on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_train.artifacts import RunDir
from qlora_train.evaluate.compare import Distance
from qlora_train.export.card import figures, model_card
from qlora_train.export.merge import ModuleRow
from qlora_train.export.verify import Verdict
from qlora_train.model.trained import FinishedRun
from qlora_train.quant.fingerprint import BasePrint
from qlora_train.recipe.schema import DataSection, ModelSection, QuantSection, Recipe, RunSection, SourceSection

MERGED = Distance(1234, 500, 2.5e-6, 1e-4, 0.9987, 1.2345, 1.2346)
OFF = Distance(1234, 500, 0.125, 2.0, 0.75, 1.2345, 3.5)
VERDICT = Verdict("eval", 16, MERGED, OFF, 0.01)
TRAIN = {"split": "train", "num_trained": 8150, "num_tokens": 123456, "num_supervised_tokens": 65432}
AUDIT = {"splits": [TRAIN, {"split": "eval"}]}
NASTY = "<img src=x onerror=alert(1)>`**b**`|[a](javascript:x)\n# title"


def run(path: str = "org/base-model", quant: QuantSection | None = None) -> FinishedRun:
    recipe = Recipe(
        model=ModelSection(path=path),
        quant=quant or QuantSection(),
        data=DataSection(train=(SourceSection(path="a.jsonl"),)),
        run=RunSection(dir=Path("run")),
    )
    return FinishedRun(RunDir(Path("run")), recipe, BasePrint({}, {"quant_type": "nf4"}), commit=None, binding={})


def test_the_card_carries_the_figures() -> None:
    card = model_card("my-model", run(), VERDICT, AUDIT)
    for words in (
        "# my-model", "`org/base-model`", "lora (r = 16, alpha = 32)", "nf4 (double quantisation on)", "8,150 rows",
        "123,456 tokens of which 65,432 supervised", "2.5e-06 | 0.125", "99.87% | 75.00%", "1.2346 | 3.5000",
        "0.002% of the adapter's effect", "held-out rows",
    ):  # fmt: skip
        assert words in card, words
    assert card.startswith("---\nlibrary_name: transformers\n") and card.count("\n---\n") == 1


def test_the_card_says_when_nothing_was_quantised() -> None:
    card = model_card("m", run(quant=QuantSection(quant_type="none")), VERDICT, AUDIT)
    assert "unquantised base" in card and "nf4" not in card


def test_names_cannot_write_markdown_or_html() -> None:
    plain = model_card("x", run("y"), VERDICT, AUDIT)
    card = model_card(NASTY, run(NASTY), VERDICT, AUDIT)
    for char in "<>`*|[]()#\n":
        assert card.count(char) == plain.count(char), repr(char)
    assert "img src" in card, "negative control: the harmless rest of the name is there"


def test_the_figures_are_plain_data() -> None:
    rows = [ModuleRow("a", 1.0, 0.5, 0.1, 0.01), ModuleRow("b", 1.0, 0.001, 0.1, 0.01)]
    found = json.loads(json.dumps(figures(run(), VERDICT, rows), allow_nan=False))
    assert found["modules_above_rounding"] == 1 and [row["name"] for row in found["modules"]] == ["a", "b"]
    assert found["verification"]["accepted"] is True and found["verification"]["merged"]["mean_kl"] == 2.5e-6
    assert found["verification"]["kl_frac"] == pytest.approx(2e-5) and found["quant"] == {"quant_type": "nf4"}


@pytest.mark.parametrize(
    ("merged_kl", "off_kl", "accepted"), [(0.001, 0.1, True), (0.0011, 0.1, False), (0.0, 0.0, False)]
)
def test_the_verdict_compares_with_the_adapter_s_effect(merged_kl: float, off_kl: float, accepted: bool) -> None:
    """At the limit it is accepted; an adapter without any effect proves nothing."""
    merged = Distance(1, 1, merged_kl, 0, 1, 1, 1)
    assert Verdict("eval", 1, merged, Distance(1, 1, off_kl, 0, 1, 1, 1), 0.01).accepted is accepted
