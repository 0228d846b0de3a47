"""What ended a process is written down for machines, whatever it was, and goes on to whoever is to show it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import DataError, Interrupted
from qlora_train.train.facts import errors_recorded


@pytest.mark.parametrize(
    ("error", "kind", "code", "problem"),
    [
        (DataError("no rows", fix="add some", where="a:1"), "data", 3, {"what": "no rows", "fix": "add some"}),
        (Interrupted(signal.SIGTERM, "saved x"), "signal", 143, {"what": "SIGTERM: saved x", "fix": ""}),
        (ValueError("odd https://u:geheim12@host\nmore"), "bug", 1, {"what": "ValueError: odd https://[secret]@host"}),
    ],
)
def test_what_ended_it_is_recorded(
    tmp_path: Path, error: BaseException, kind: str, code: int, problem: dict[str, Any]
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text('{"kind": "train", "step": 7}\n{"kind": "eval", "step": 8}\n{"ki')
    with pytest.raises(type(error)), errors_recorded(run_dir):
        raise error
    (line,) = map(json.loads, run_dir.errors.read_text().splitlines())
    assert (line["kind"], line["exit_code"], line["step"]) == (kind, code, 8)
    assert {key: line["problems"][0][key] for key in problem} == problem


def test_where_it_cannot_be_written_the_first_error_is_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"), errors_recorded(RunDir(tmp_path / "removed")):
        raise DataError("no rows", fix="add some")


def test_a_block_that_ends_well_leaves_no_line(tmp_path: Path) -> None:
    with errors_recorded(RunDir(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []
