"""An export leaves a line in its run's folder; where that cannot be, the export stands and somebody is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.evaluate.compare import Distance
from qlora_train.export import record


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(record, "adapter_sha256", lambda run: "ab")
    export = SimpleNamespace(export_dtype="bfloat16")
    return SimpleNamespace(run_dir=RunDir(tmp_path), recipe=SimpleNamespace(export=export))


def verdict() -> Any:
    near, far = (Distance(**dict.fromkeys(Distance.__dataclass_fields__, value)) for value in (0, 1))
    return SimpleNamespace(
        onto="dequantized", accepted=True, num_rows=4, split="eval", max_kl_frac=0.01, merged=near, adapter_off=far
    )


def test_each_export_is_a_line(run: Any, tmp_path: Path) -> None:
    said: list[str] = []
    record.record_export(run, tmp_path / "one", verdict(), said.append)
    record.record_export(run, tmp_path / "two", verdict(), said.append, stored="gguf-f16")
    lines = [json.loads(line) for line in run.run_dir.exports.read_text().splitlines()]
    assert [(Path(line["folder"]).name, line["export_dtype"]) for line in lines] == [
        ("one", "bfloat16"),
        ("two", "gguf-f16"),
    ]
    assert not said


def test_a_run_folder_that_takes_no_line_is_told_of(run: Any, tmp_path: Path) -> None:
    run.run_dir.exports.mkdir()
    said: list[str] = []
    record.record_export(run, tmp_path / "one", verdict(), said.append)
    (line,) = said
    assert "will not know of this export" in line and str(run.run_dir.exports) in line
