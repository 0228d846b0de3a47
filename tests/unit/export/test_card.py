"""The model card carries the figures, and nothing that a page would act on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.evaluate.compare import Distance
from qlora_train.export.card import Facts, figures, model_card
from qlora_train.export.choice import Candidate, Choice
from qlora_train.export.licence import Licence
from qlora_train.export.merge import Merged, ModuleRow
from qlora_train.export.probe import Deviation
from qlora_train.export.verify import Verdict
from qlora_train.model.trained import FinishedRun
from qlora_train.quant.fingerprint import BasePrint
from qlora_train.recipe.schema import DataSection, ModelSection, QuantSection, Recipe, RunSection, SourceSection

MERGED = Distance(1234, 500, 2.5e-6, 1e-4, 0.9987, 1.2345, 1.2346)
OFF = Distance(1234, 500, 0.125, 2.0, 0.75, 1.2345, 3.5)
VERDICT = Verdict("eval", 16, MERGED, OFF, 0.01)
TRAIN = {"split": "train", "num_trained": 8150, "num_tokens": 123456, "num_supervised_tokens": 65432}
FILES = [{"name": "/home/me/rows.jsonl", "kind": "json", "sha256": "ab" * 32}]
SOURCE = {"name": "/home/me/rows.jsonl", "num_rows": 9000, "num_trained": 8150}
AUDIT = {"splits": [{**TRAIN, "sources": [SOURCE]}, {"split": "eval"}], "files": FILES}
ROWS = [ModuleRow("a", 1.0, 0.5, 0.1, 0.01), ModuleRow("b", 1.0, 0.001, 0.1, 0.01)]
APACHE = Licence("apache-2.0", "README.md of org/base-model")
NASTY = "<img src=x onerror=alert(1)>`**b**`|[a](javascript:x)\n# title"


def run(path: str = "org/base-model", quant: QuantSection | None = None) -> FinishedRun:
    recipe = Recipe(
        model=ModelSection(path=path),
        quant=quant or QuantSection(),
        data=DataSection(train=(SourceSection(path="a.jsonl"),)),
        run=RunSection(dir=Path("run")),
    )
    return FinishedRun(RunDir(Path("run")), recipe, BasePrint({}, {"quant_type": "nf4"}), commit=None, binding={})


def facts(of: FinishedRun | None = None, **changes: Any) -> Facts:
    merged = Merged("dequantized", ROWS, {"quantise": 1.5}, 1, 0, ("lm_head.weight",))
    return replace(Facts(of or run(), AUDIT, VERDICT, merged, APACHE, None, {"quantise": 1.5}), **changes)


def test_the_card_carries_the_figures() -> None:
    card = model_card("my-model", facts())
    for words in (
        "# my-model", "`org/base-model`", "lora (r = 16, alpha = 32)", "nf4 (double quantisation on)", "8,150 rows",
        "123,456 tokens of which 65,432 supervised", "2.5e-06 | 0.125", "99.87% | 75.00%", "1.2346 | 3.5000",
        "0.002% of the adapter's effect", "held-out rows", "dequantised base, which is the one that was trained",
        f"| rows.jsonl | `{'ab' * 32}` | 9,000 | 8,150 |", "license: apache-2.0\n", "from README.md of org/base",
        "base_model: org/base-model\nbase_model_relation: finetune\n", "adamw at 0.0002 (cosine)", "Beside the noise:",
        "qlora-train chat", "transformers serve", "vllm serve",
    ):  # fmt: skip
        assert words in card, words
    assert card.startswith("---\nlibrary_name: transformers\n") and card.count("\n---\n") == 1
    assert "/home/me" not in card, "no folder of the machine that trained"


def test_the_card_of_a_choice_and_of_another_base() -> None:
    off = Distance(1234, 500, 0.2, 3.0, 0.87, 1.2345, 1.2, 0.01)
    same = Candidate("dequantized", MERGED, 0.51)
    choice = Choice(
        (same, Candidate("original", off, 0.52), Candidate("requantized", off, 0.3)), 0.4, 0.51, 200, "eval", 128
    )
    verdict = replace(VERDICT, onto="original", max_loss_rise=0.5)
    card = model_card("m", facts(verdict=verdict, choice=choice, licence=Licence(None, "")))
    assert "**another model than the one that was trained**" in card and "the export refused more than +0.5000" in card
    assert "| the original weights (this model) | 0.2 | 87.00% | 1.2000 | 52.0% |" in card and choice.sentence in card
    assert "its files do not name it" in card and "license:" not in card
    found = json.loads(json.dumps(figures(facts(verdict=verdict, choice=choice)), allow_nan=False))
    assert found["merged_onto"] == "original" and found["choice"]["candidates"][1]["exact_match"] == 0.52


def test_a_local_base_is_named_without_its_folders() -> None:
    card = model_card("m", facts(run("/home/me/models/base")))
    assert "`base`, fine-tuned" in card and "/home/me" not in card and "base_model:" not in card


def test_the_card_says_when_nothing_was_quantised() -> None:
    card = model_card("m", facts(run(quant=QuantSection(quant_type="none"))))
    assert "unquantised base" in card and "nf4" not in card


def test_names_cannot_write_markdown_or_html() -> None:
    plain = model_card("x", facts(run("y")))
    card = model_card(NASTY, facts(run(NASTY)))
    for char in "<>`*|[]()#\n":
        assert card.count(char) == plain.count(char), repr(char)
    assert "img src" in card, "negative control: the harmless rest of the name is there"


def test_the_figures_are_plain_data() -> None:
    found = json.loads(json.dumps(figures(facts()), allow_nan=False))
    assert found["modules_above_rounding"] == 1 and [row["name"] for row in found["modules"]] == ["a", "b"]
    assert found["verification"]["accepted"] is True and found["verification"]["merged"]["mean_kl"] == 2.5e-6
    assert found["verification"]["kl_frac"] == pytest.approx(2e-5) and found["quant"] == {"quant_type": "nf4"}
    assert found["seconds"] == {"quantise": 1.5} and found["left_out"] == ["lm_head.weight"]
    assert found["noise"]["over_rounding"]["most"] == 50 and found["licence"]["name"] == "apache-2.0"


@pytest.mark.parametrize(
    ("merged_kl", "off_kl", "accepted"), [(0.001, 0.1, True), (0.0011, 0.1, False), (0.0, 0.0, False)]
)
def test_the_verdict_compares_with_the_adapter_s_effect(merged_kl: float, off_kl: float, accepted: bool) -> None:
    """At the limit it is accepted; an adapter without any effect proves nothing."""
    merged = Distance(1, 1, merged_kl, 0, 1, 1, 1)
    assert Verdict("eval", 1, merged, Distance(1, 1, off_kl, 0, 1, 1, 1), 0.01).accepted is accepted


@pytest.mark.parametrize(("rise", "accepted"), [(-0.1, True), (0.05, True), (0.051, False)])
def test_another_base_is_judged_by_its_loss(rise: float, accepted: bool) -> None:
    found = Distance(1, 1, 0.3, 0, 1, 2.0, 2.0 + rise)
    assert replace(VERDICT, merged=found, onto="original", max_loss_rise=0.05001).accepted is accepted


def test_a_single_layer_that_is_off_is_enough() -> None:
    assert replace(VERDICT, worst_layer=Deviation("w", 2.0)).accepted
    assert not replace(VERDICT, worst_layer=Deviation("w", 50.0)).accepted
