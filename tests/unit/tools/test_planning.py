"""The published figures: which rows count, the models they are of, and the arithmetic of errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from planning.architectures import ARCHITECTURES, Architecture
from planning.compare import Comparison, median_error, worst
from planning.explanations import BY_LINE
from planning.paper import PUBLISHED, Breakdown
from planning.peers import peer_of
from planning.published import CARD_SIZE, RULES, Row, read_rows, stated_rows, why_left_out

from qlora_train.model.skeleton import build_skeleton

ROWS = {row.line: row for row in read_rows()}


def stated() -> Row:
    """A row that states its settings."""
    return next(row for row in stated_rows() if row.tool == "litgpt")


def test_each_row_is_planned_or_left_out_for_a_reason() -> None:
    """No other reason than the rules', and what they leave is complete."""
    reasons = Counter(why_left_out(row) for row in ROWS.values())
    assert reasons.keys() - {None} <= {reason for reason, _ in RULES}
    assert reasons[None] == len(stated_rows()) == 55
    for row in stated_rows():
        assert row.peak_bytes > 10**9 and row.num_tokens * row.num_rows >= 512 and int(row.rank) >= 8


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mem_kind": "vendor minimum"}, "rule of thumb"),
        ({"peak": ""}, "no peak"),
        ({"peak": "OOM"}, "out of memory"),
        ({"seq_len": "OOM"}, "out of memory"),
        ({"n_gpu": "2"}, "sharded"),
        ({"seq_len": "Alpaca (unpacked)"}, "shorter than seq_len"),
        ({"notes": "max_seq_length only caps"}, "shorter than seq_len"),
        ({"micro_batch": "<=4 (reduced)"}, "micro-batch"),
        ({"rank": ""}, "rank"),
        ({"notes": "torch.compile"}, "compiled"),
        ({"model": "Qwen3.5-27B"}, "architecture"),
    ],
)
def test_a_row_is_left_out_for_what_it_does_not_state(changes: dict[str, Any], reason: str) -> None:
    """One change to a complete row, and the rule that catches it."""
    assert why_left_out(stated()) is None
    assert reason in str(why_left_out(replace(stated(), **changes)))


def test_units() -> None:
    """Gigabytes are of 10^9 bytes, gibibytes of 2^30, and a card's gigabytes are gibibytes."""
    assert replace(stated(), peak="2", unit="GB (1e9)").peak_bytes == 2 * 10**9
    assert replace(stated(), peak="1.5", unit="GiB").peak_bytes == 3 * 2**29
    assert replace(stated(), peak="24", unit="GB", mem_kind=CARD_SIZE).peak_bytes == 24 * 2**30


def test_each_stated_row_has_a_peer() -> None:
    """How its tool runs a step is configured; the paper's rows are sums."""
    names = {row.line: peer_of(row).name for row in stated_rows() if row.model not in PUBLISHED}
    tools = {name: {ROWS[line].tool for line in names if names[line] == name} for name in names.values()}
    assert all(len(found) == 1 for found in tools.values())
    assert len(tools) == 8


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("Llama-3.1-8B", "Llama-3.3-70B")])
def test_architectures_have_the_published_number_of_parameters(name: str) -> None:
    """Within 1 %; counted on three and four layers, whose difference is a layer."""
    architecture = ARCHITECTURES[name]
    three, four = (_num_params(architecture, num_layers) for num_layers in (3, 4))
    counted = three + (architecture.config().num_hidden_layers - 3) * (four - three)
    assert counted == pytest.approx(architecture.published_params, rel=0.01)


def _num_params(architecture: Architecture, num_layers: int) -> int:
    config = architecture.config()
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return sum(parameter.numel() for parameter in build_skeleton(config).parameters())


def _comparison(error: float) -> Comparison:
    row = replace(stated(), peak="10", unit="GB")
    return Comparison(row, round(10**10 * (1 + error)), "", "", "", {})


def test_errors() -> None:
    """Planned to published less one; the median takes absolute values, and so do the worst."""
    found = [_comparison(error) for error in (-0.3, 0.02, 0.1, -0.01, 0.2)]
    assert [each.error for each in found] == pytest.approx([-0.3, 0.02, 0.1, -0.01, 0.2])
    assert median_error(found) == pytest.approx(0.1)
    assert [each.error for each in worst(found, 2)] == pytest.approx([-0.3, 0.2])
    assert Breakdown("", (100, 10, 20, 200), (110, 9, 20, 210)).errors == pytest.approx((0.1, -0.1, 0.0, 0.05))


def test_explanations_are_of_stated_rows() -> None:
    """No text is left for a row that is not compared."""
    assert BY_LINE.keys() <= {row.line for row in stated_rows()}
