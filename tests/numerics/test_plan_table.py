"""The table, which follows from the formula: its cells hold against traces of just these settings."""

from __future__ import annotations

import pytest

from qlora_train.memory.budget import Choice
from qlora_train.memory.estimate import Request, estimate
from qlora_train.memory.table import MOST_PACKS, plan_table
from qlora_train.model.checkpointing import Checkpointing
from tests.unit.memory.planned import published_config, recipe_of


@pytest.mark.slow
def test_cells_hold() -> None:
    recipe, config = recipe_of(data={"eval": ()}), published_config("llama-3.1-8b")
    config.max_position_embeddings = 1024  # two rows
    table = plan_table([(recipe, config)], ["RTX 3060", "RTX 4090", "h100"])
    assert [card.name for card in table.cards] == ["RTX 3060", "RTX 4090", "H100 80GB"]
    assert [row.seq_len for row in table.rows] == [512, 1024]
    for row in table.rows:
        assert 0 < row.packs[0] < row.packs[1] <= row.packs[2] <= MOST_PACKS
        for card, packs in zip(table.cards[:2], row.packs, strict=False):
            assert _peak(recipe, config, row.seq_len, packs) <= 1.005 * card.total_bytes
            assert _peak(recipe, config, row.seq_len, packs + 2 + packs // 10) > card.total_bytes
    assert table.rows[0].packs[1] > table.rows[1].packs[1]
    data = table.as_dict()
    assert (
        data["rows"][0]["least_bytes"] == pytest.approx(_peak(recipe, config, 512, 1), rel=0.01)
        and len(data["cards"]) == 3
    )


def _peak(recipe: object, config: object, seq_len: int, packs: int) -> int:
    request = Request(recipe, config, "cuda").with_changes(  # type: ignore[arg-type]
        data={"seq_len": seq_len}, train={"micro_batch_size": packs}
    )
    return estimate(request, Choice(Checkpointing("full"), 0, 0, fits=True)).training_bytes
