"""What is merged onto is decided by measurement: original weights only where they are better by more than chance."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_train.evaluate.compare import Distance
from qlora_train.export.choice import Candidate, Choice


def candidate(
    onto: Any, rise: float, *, error: float | None = 0.01, exact: float | None = None, kl: float = 0.2
) -> Candidate:
    return Candidate(onto, Distance(900, 300, kl, 3.0, 0.9, 2.0, 2.0 + rise, error), exact)


def choice(
    rise: float, *, error: float | None = 0.01, trained: float | None = None, exact: float | None = None
) -> Choice:
    candidates = (
        candidate("dequantized", 0.0001, exact=trained, kl=1e-5),
        candidate("original", rise, error=error, exact=exact),
        candidate("requantized", 0.3, kl=0.45),
    )
    return Choice(candidates, 0.5, trained, 0 if trained is None else 100, "eval", 64)


@pytest.mark.parametrize(
    ("rise", "error", "trained", "exact", "onto", "words"),
    [
        (-0.05, 0.01, None, None, "original", "answered better"),
        (-0.05, 0.01, 0.5, 0.5, "original", "answered better"),
        (-0.05, 0.01, 0.5, 0.49, "dequantized", "fewer answers are right"),
        (-0.015, 0.01, None, None, "dequantized", "no more than chance"),
        (0.015, 0.01, 0.5, 0.6, "dequantized", "no more than chance"),
        (0.05, 0.01, 0.5, 0.6, "dequantized", "answered worse"),
        (-0.05, None, None, None, "dequantized", "no more than chance"),
    ],
)
def test_the_choice_and_its_sentence(
    rise: float, error: float | None, trained: float | None, exact: float | None, onto: str, words: str
) -> None:
    found = choice(rise, error=error, trained=trained, exact=exact)
    assert found.onto == onto and words in found.sentence
    assert f"{rise:+.4f} nats per token" in found.sentence
    assert ("that is published" if onto == "original" else "the dequantised base is published") in found.sentence
    assert "10% of the training's effect would be left" in found.sentence
