"""The console that results go to, and the form of their tables."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.table import Table


class ResultConsole(Console):
    """A console for results: where nobody reads them, the error reaches the caller; rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the BrokenPipeError."""
        raise BrokenPipeError


stdout = ResultConsole(highlight=False)


def new_table(*columns: str, of_words: Collection[str] = ()) -> Table:
    """A table without lines: words to the left, in the first column and those named; figures to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column in of_words else "right", overflow="fold")
    return table
