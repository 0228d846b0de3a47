"""What every source of rows can do: be read from start to end, be asked for single rows again, and be identified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from qlora_train.data.problems import RowFault

Columns = dict[str, object]  # plain JSON values
# Called with the row's number, what is wrong, the row as it stands in the file (for `rejected.jsonl`; of a very long
# one only the beginning, or nothing), and how many bytes it has there (0: unknown).
OnFault = Callable[[int, RowFault, str, int], None]


class RawRow(NamedTuple):
    """One row as it stands in its source."""

    number: int  # as a person counts: the line of a text file, else the row; from 1
    locator: int  # what `fetch` finds it by: a byte offset, else the row from 0
    columns: Columns


class Source(Protocol):
    """Rows of one file, folder or hub data set. Holds no row in memory after it was handed out."""

    name: str  # as the user wrote it
    kind: str  # how the bytes are read: the same bytes give other rows under another kind

    def place(self, number: int) -> str:
        """Where a row stands, for messages: `path:417`, or `path: row 417` where there are no lines."""

    def read(self, on_fault: OnFault) -> Iterator[RawRow]:
        """Every row in order; what is no row goes to `on_fault`. SourceFault where the whole cannot be read."""

    def fetch(self, locators: Sequence[int]) -> list[Columns]:
        """The rows at these places, in this order. SourceFault if they are not there any more."""

    def digest(self) -> str:
        """SHA-256 of the content: the same rows have the same digest wherever they lie."""
