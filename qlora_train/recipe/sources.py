"""What sources of rows may be called, and their columns: known to the recipe's checks and to the readers of rows."""

from __future__ import annotations

import re
from pathlib import PurePath

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
_FILE_SUFFIXES = (*SUFFIXES, *PACKED_SUFFIXES, ".txt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Every name that a column map may give: the columns of all formats, and the fields of their messages.
COLUMN_NAMES = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "text"),
    *("system", "tools", "role", "content", "from", "value"),
)


def is_hub_id(text: str) -> bool:
    """Whether it reads as `owner/name`, such as teknium/OpenHermes-2.5, and not as a file of rows in a folder."""
    return bool(_HUB_ID.fullmatch(text)) and PurePath(text).suffix.lower() not in _FILE_SUFFIXES
