"""A resume goes on with exactly the rows that would have come, or not at all."""

from __future__ import annotations

import pytest

from qlora_train.data.loader import Loader
from qlora_train.errors import ResumeError
from qlora_train.train.loop import _check_position
from qlora_train.train.state import TrainState
from tests.packs import table_of


def test_the_position_of_a_checkpoint_must_be_the_loader_s() -> None:
    # Packs of at most 10: (8), (5, 5), (5, 5) in some order, one a step.
    loader = Loader(table_of([5, 8, 5, 5, 5]), "packed", 1, 1, 0, 0, seq_len=10)
    rows = [len(loader.step(step)[0].row_ids) for step in range(6)]
    assert sorted(rows[:3]) == sorted(rows[3:]) == [1, 2, 2]
    for step in range(7):
        _check_position(loader, TrainState(step=step, num_rows=sum(rows[:step])))
    with pytest.raises(ResumeError, match="6 rows were consumed by step 3, 5 in today's order"):
        _check_position(loader, TrainState(step=3, num_rows=6))
