"""Published memory figures (published_memory.csv), and which of their rows state enough to be planned."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from planning.architectures import ARCHITECTURES

CSV = Path(__file__).with_name("published_memory.csv")
CARD_SIZE = "max context that fits"  # the figure is the card's, the settings are the largest that ran on it
UNIT_BYTES = {"GB": 10**9, "GB (1e9)": 10**9, "MB/1000": 10**9, "GiB": 2**30}
# What a cell must say to be a value: "<=4 (reduced)", "not stated", "Alpaca (unpacked)" and "OOM" say none.
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Row:
    """One published figure, each cell as the file has it."""

    line: int  # of the file, from 2
    model: str
    method: str
    quant: str
    rank: str
    lora_targets: str
    seq_len: str
    micro_batch: str
    packed: str
    grad_ckpt: str
    optimizer: str
    loss_head: str
    gpu: str
    n_gpu: str
    peak: str
    unit: str
    mem_kind: str
    source: str
    notes: str

    @property
    def name(self) -> str:
        """What a reader knows the row by."""
        return f"{self.tool}: {self.model} {self.method} {self.quant} r={self.rank} {self.seq_len} x {self.micro_batch}"

    @property
    def tool(self) -> str:
        """Who measured."""
        known = ("litgpt", "LLaMA-Factory", "unsloth", "axolotl", "fsdp_qlora", "torchtune", "peft", "QLoRA")
        return next(name for name in known if name in self.source)

    @property
    def peak_bytes(self) -> int:
        """The figure in bytes; ValueError where the cell holds none. A card of so many GB holds as many GiB."""
        unit = "GiB" if self.mem_kind == CARD_SIZE else self.unit
        return round(float(self.peak) * UNIT_BYTES[unit])

    @property
    def num_tokens(self) -> int:
        """Tokens of a row."""
        return int(self.seq_len)

    @property
    def num_rows(self) -> int:
        """Rows of a micro-batch."""
        return int(self.micro_batch)


def read_rows(path: Path = CSV) -> list[Row]:
    """Every row of the file, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                line,
                peak=cells.pop("peak_GB"),
                **{name: value for name, value in cells.items() if name in Row.__dataclass_fields__},
            )
            for line, cells in enumerate(csv.DictReader(file), start=2)
        ]


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


# The first rule that holds says why a row cannot be planned. None of them looks at what the plan would say.
RULES: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("a rule of thumb of the vendor, not a run", lambda row: row.mem_kind in ("vendor minimum", "rule of thumb (x/2)")),
    ("no peak is given", lambda row: not row.peak),
    ("it ran out of memory: a bound, not a peak", lambda row: "OOM" in (row.peak, row.seq_len)),
    ("sharded over several cards: the plan is of one process", lambda row: row.n_gpu not in ("", "1")),
    (
        "rows were shorter than seq_len, and the longest is not stated",
        lambda row: not _is_number(row.seq_len) or "max_seq_length only caps" in row.notes,
    ),
    ("the micro-batch is not stated", lambda row: not _is_number(row.micro_batch)),
    ("the rank, the targets or the optimiser are not stated", lambda row: not (row.rank and row.lora_targets)),
    ("compiled: what is saved for the backward pass is the compiler's choice", lambda row: "compile" in row.notes),
    ("its architecture is none that this trainer trains", lambda row: row.model not in ARCHITECTURES),
)


def why_left_out(row: Row) -> str | None:
    """Why the row cannot be planned; None where it states its settings."""
    return next((reason for reason, holds in RULES if holds(row)), None)


def stated_rows() -> list[Row]:
    """The rows that state their settings."""
    return [row for row in read_rows() if why_left_out(row) is None]
