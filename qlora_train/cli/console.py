"""The live display of a run: a progress line on a terminal, quiet lines without one. All of it goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from qlora_train.printable import fit_to_show
from qlora_train.train.metrics import Progress as StepProgress
from qlora_train.train.metrics import Reporter

# Without a terminal: one line in so many, and the first and last.
QUIET_LINES = 20


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(3725)
    '1h02m'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def step_line(progress: StepProgress) -> str:
    """What one step says of itself."""
    return (
        f"step {progress.step}/{progress.num_steps}  loss {progress.loss:.4f}  grad_norm {progress.grad_norm:.2f}  "
        f"lr {progress.learning_rate:.2e}  {progress.supervised_tokens_per_s:,.0f} supervised tokens/s "
        f"({progress.tokens_per_s:,.0f} in all)  {progress.memory_gib:.2f} GiB peak  {duration(progress.eta_s)} left"
    )


class LineReporter:
    """Plain lines: for logs, pipes and CI."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(fit_to_show(text), style=style), soft_wrap=True)

    def message(self, text: str) -> None:
        """A line of information."""
        self._line(text)

    def warning(self, text: str) -> None:
        """A line that asks for action."""
        self._line(f"warning: {text}", "yellow")

    def step(self, progress: StepProgress) -> None:
        """About twenty lines for a whole run."""
        every = max(1, progress.num_steps // QUIET_LINES)
        if progress.step == 1 or progress.step % every == 0 or progress.step == progress.num_steps:
            self._line(step_line(progress))

    def evaluation(self, step: int, loss: float) -> None:
        """The held-out loss."""
        self._line(f"step {step}  held-out loss {loss:.4f}" if step else f"base  held-out loss {loss:.4f}", "bold")


class LiveReporter(LineReporter):
    """One line at the bottom of the terminal that follows the steps; messages scroll above it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.console)
        self._progress, self._task = progress, None

    _task: TaskID | None

    def step(self, progress: StepProgress) -> None:
        """Move the line."""
        if self._task is None:
            self._task = self._progress.add_task("", total=progress.num_steps)
        self._progress.update(self._task, completed=progress.step, description=escape(step_line(progress)))


@contextmanager
def display() -> Iterator[Reporter]:
    """The reporter that fits where stderr goes."""
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        yield LineReporter(console)
        return
    with Progress(
        SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"), console=console
    ) as progress:
        yield LiveReporter(progress)
