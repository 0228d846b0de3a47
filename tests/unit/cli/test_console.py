"""What a run says on a terminal, in a log, and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from qlora_train.cli.console import QUIET_LINES, LineReporter, display, duration, step_line
from qlora_train.cli.show import to_plain
from qlora_train.evaluate.validation import Validation
from qlora_train.train.metrics import Progress


def progress(step: int = 3, num_steps: int = 1000) -> Progress:
    return Progress(step, num_steps, 1.23456, 0.789, 2e-4, 1234.5, 4321.0, 3725.0, 1.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (61, "1m01s"), (3599.6, "1h00m"), (3600, "1h00m"),
     (3725, "1h02m"), (90061, "25h01m")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_step_says_its_figures_with_their_units() -> None:
    line = step_line(progress())
    for words in (
        "step 3/1000", "loss 1.2346", "grad_norm 0.79", "lr 2.00e-04", "supervised tokens/s", "(4,321 in all)",
        "1.50 GiB peak", "1h02m left",
    ):  # fmt: skip
        assert words in line, words
    assert "\n" not in line


def reporter() -> tuple[LineReporter, io.StringIO]:
    out = io.StringIO()
    return LineReporter(Console(file=out, highlight=False, width=40)), out


@pytest.mark.parametrize(("num_steps", "num_lines"), [(1, 1), (2, 2), (10, 10), (20, 20), (100, 21), (1000, 21)])
def test_a_log_gets_about_twenty_lines(num_steps: int, num_lines: int) -> None:
    lines_of, out = reporter()
    for step in range(1, num_steps + 1):
        lines_of.step(progress(step, num_steps))
    lines = out.getvalue().splitlines()
    assert len(lines) == num_lines, "one line each, however narrow the console"
    assert lines[0].startswith(f"step 1/{num_steps}") and lines[-1].startswith(f"step {num_steps}/{num_steps}")


def test_no_run_fills_the_log() -> None:
    for num_steps in (3, 19, 21, 39, 40, 41, 59, 61, 119):
        lines_of, out = reporter()
        for step in range(1, num_steps + 1):
            lines_of.step(progress(step, num_steps))
        assert out.getvalue().count("\n") <= 2 * QUIET_LINES + 1


def test_texts_are_shown_as_they_are() -> None:
    lines_of, out = reporter()
    lines_of.message("rows [bold]a[/bold] [/x]")
    lines_of.warning("step-000010 is damaged: [red]")
    lines_of.evaluation(0, 2.5)
    lines_of.evaluation(7, 1.5)
    assert out.getvalue().splitlines() == [
        "rows [bold]a[/bold] [/x]",
        "warning: step-000010 is damaged: [red]",
        "base  held-out loss 2.5000",
        "step 7  held-out loss 1.5000",
    ]


def test_without_a_terminal_there_are_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with display() as shown:
        assert type(shown) is LineReporter
        shown.message("hello")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "hello\n"


@dataclass(frozen=True)
class Outer:
    """Everything that a result may hold."""

    folder: Path
    parts: tuple[Validation, ...]
    by_name: dict[str, Validation]
    best: int | None

    @property
    def double(self) -> Path:
        return self.folder / "x"


def test_to_plain_keeps_fields_and_properties() -> None:
    validation = Validation(4.0, 2.0, 2, 1)
    found = to_plain(Outer(Path("/a"), (validation,), {"k": validation}, None))
    inner = {
        "loss_sum": 4.0,
        "weight_sum": 2.0,
        "num_supervised_tokens": 2,
        "num_rows": 1,
        "loss": 2.0,
        "perplexity": pytest.approx(7.389056),
    }
    assert found == {"folder": "/a", "parts": [inner], "by_name": {"k": inner}, "best": None, "double": "/a/x"}
    json.dumps(found)
    assert to_plain([1, "a", (Path("b"),)]) == [1, "a", ["b"]]
