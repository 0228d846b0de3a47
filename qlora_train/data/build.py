"""One source to a table of tokens on disk: every row becomes tokens, or is listed with the reason why not."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from qlora_train.data.encode import Encoder
from qlora_train.data.formats import detect, parse_row
from qlora_train.data.hashing import hashes
from qlora_train.data.problems import RowFault, TemplateFault
from qlora_train.data.rows import MessagesRow, Row, size_of
from qlora_train.data.sources.base import RawRow, Source
from qlora_train.data.table import SCHEMA, TokenRow, digest_rows, record_batch
from qlora_train.data.template import Rendered, Renderer

TOKENS, FAULTS, FACTS = "tokens.arrow", "faults.jsonl", "facts.json"
# Per call of the tokenizer: enough for its threads, and a bound on what its Python lists hold.
_BATCH_ROWS, _BATCH_CHARS = 256, 2**20
_CHUNK_ROWS, _CHUNK_TOKENS = 4096, 2**22  # of one batch of the Arrow file: what is held before it is written
# Tokenising takes some 150 bytes a character: a row that cannot fit in any case is not worth gigabytes.
LEAST_CHARS_LIMIT = 2**20
_COLUMNS = [name for name in SCHEMA.names[4:] if name not in ("num_tokens", "num_supervised")]  # as `_Writer.add` takes
_SHOWN_CHARS = 2**16  # of a faulty row, kept for rejected.jsonl

Kind = Literal["row", "template", "overlong"]  # of a fault
Note = Callable[..., None]


@dataclass(frozen=True)
class Reading:
    """How a source is read: what of the recipe decides which tokens its rows become."""

    row_format: str
    columns: Mapping[str, str]
    loss_on: str
    max_chars: int
    with_ids: bool = True


@dataclass
class Facts:
    """What was counted on the way."""

    row_format: str = ""  # "" as long as no row fits any
    num_rows: int = 0
    num_kept: int = 0
    num_faults: int = 0
    largest_id: int = 0
    end_token_ids: list[int] = field(default_factory=list)  # that rows were taught to end with
    digest: str = ""
    notes: dict[str, int] = field(default_factory=dict)  # what was not taken as written -> in how many rows


@dataclass(frozen=True)
class _Pending:
    """A parsed row on its way to tokens."""

    raw: RawRow
    row: Row


class _Writer:
    """Collects rows and writes them as batches of an Arrow file."""

    def __init__(self, path: Path, *, with_ids: bool) -> None:
        self._with_ids, self._path = with_ids, path
        self._rows: list[TokenRow] = []
        self._columns: dict[str, list[int]] = {}
        self._num_tokens = 0
        self._digest = digest_rows([])
        self._file: Any = None
        self._flush()  # the schema, even where no row follows

    def add(self, row: TokenRow, **columns: int) -> None:
        self._rows.append(row)
        for name, value in columns.items():
            self._columns[name].append(value)
        self._num_tokens += len(row.ids)
        if len(self._rows) == _CHUNK_ROWS or self._num_tokens >= _CHUNK_TOKENS:
            self._flush()

    def close(self) -> str:
        """Write what is left; the digest of all rows."""
        self._flush()
        self._file.close()
        return str(self._digest.hexdigest())

    def _flush(self) -> None:
        batch = record_batch(self._rows, with_ids=self._with_ids, **(self._columns or {name: [] for name in _COLUMNS}))
        if self._file is None:
            self._file = pa.ipc.new_file(str(self._path), batch.schema)
        if self._rows:
            self._file.write_batch(batch)
            digest_rows(self._rows, self._digest)
        self._rows, self._num_tokens, self._columns = [], 0, {name: [] for name in _COLUMNS}


def build(source: Source, reading: Reading, encoder: Encoder, folder: Path) -> Facts:
    """Write the table, the faults and the facts of one source into `folder`. SourceFault where it cannot be read.

    Rows are held a batch at a time, so memory does not grow with their number. The template's worker renders one batch
    while the tokenizer encodes the batch before.
    """
    facts = Facts(row_format="" if reading.row_format == "auto" else reading.row_format)
    writer = _Writer(folder / TOKENS, with_ids=reading.with_ids)
    with (
        (folder / FAULTS).open("x", encoding="utf-8") as faults,
        Renderer(encoder.tokenizer, reading.loss_on) as renderer,
    ):

        def note(
            number: int, fault: RowFault, shown: str, num_bytes: int = 0, *, kind: Kind = "row", num_tokens: int = 0
        ) -> None:
            num_chars = num_bytes or len(shown)
            entry = {"number": number, "kind": kind, "what": fault.what, "fix": fault.fix, "num_tokens": num_tokens}
            entry["num_chars"] = num_chars
            faults.write(json.dumps({**entry, "row": shown[:_SHOWN_CHARS]}) + "\n")
            facts.num_faults += 1

        waiting: deque[list[_Pending]] = deque()
        for rendered in renderer.render(_parsed(source, reading, facts, note, waiting)):
            _encode_batch(waiting.popleft(), rendered, encoder, reading, facts, writer, note)
    facts.digest = writer.close()
    facts.num_rows = facts.num_kept + facts.num_faults
    (folder / FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")
    return facts


def _parsed(
    source: Source, reading: Reading, facts: Facts, note: Note, waiting: deque[list[_Pending]]
) -> Iterator[list[Row]]:
    """Batches of rows; what belongs to each batch waits in `waiting` until it comes back rendered."""
    batch: list[_Pending] = []
    num_chars = 0
    for raw in source.read(note):
        try:
            facts.row_format = facts.row_format or detect(raw.columns, reading.columns) or ""
            row = parse_row(source.place(raw.number), raw.columns, facts.row_format or None, reading.columns)
        except RowFault as fault:
            note(raw.number, fault, _shown(raw))
            continue
        for text in row.notes if isinstance(row, MessagesRow) else ():
            facts.notes[text] = facts.notes.get(text, 0) + 1
        batch.append(_Pending(raw, row))
        num_chars += size_of(row)
        if len(batch) == _BATCH_ROWS or num_chars >= _BATCH_CHARS:
            waiting.append(batch)
            yield [pending.row for pending in batch]
            batch, num_chars = [], 0
    if batch:
        waiting.append(batch)
        yield [pending.row for pending in batch]


def _encode_batch(
    batch: Sequence[_Pending],
    rendered: Sequence[Rendered | RowFault],
    encoder: Encoder,
    reading: Reading,
    facts: Facts,
    writer: _Writer,
    note: Note,
) -> None:
    """Tokens of a rendered batch into the table, in order; what has none into the faults."""
    fit = [entry for entry in rendered if isinstance(entry, Rendered) and len(entry.text) <= reading.max_chars]
    encoded = iter(encoder.encode(fit))
    for pending, entry in zip(batch, rendered, strict=True):
        if isinstance(entry, RowFault):
            kind: Kind = "template" if isinstance(entry, TemplateFault) else "row"
            note(pending.raw.number, entry, _shown(pending.raw), kind=kind)
            continue
        if len(entry.text) > reading.max_chars:
            num_tokens = len(entry.text) // encoder.longest_piece
            what = f"the row is {len(entry.text):,} characters, so at least {num_tokens:,} tokens long"
            note(pending.raw.number, RowFault(what, "split it"), "", kind="overlong", num_tokens=num_tokens)
            continue
        tokens = next(encoded)
        if isinstance(tokens, RowFault):
            note(pending.raw.number, tokens, _shown(pending.raw))
            continue
        facts.num_kept += 1
        facts.largest_id = max(facts.largest_id, int(tokens.ids.max()))
        end = encoder.end_token_of(tokens)
        if end is not None and end not in facts.end_token_ids:
            facts.end_token_ids.append(end)
        content_hash, prompt_hash = hashes(pending.row)
        writer.add(
            tokens,
            num_chars=len(entry.text),
            num_plain_specials=entry.num_plain_specials,
            num_control_specials=entry.num_control_specials,
            num_context_turns=entry.num_context_turns,
            content_hash=content_hash,
            prompt_hash=prompt_hash,
            source=0,
            number=pending.raw.number,
            locator=pending.raw.locator,
        )


def _shown(raw: RawRow) -> str:
    """The row as JSON, for the list of faults."""
    return json.dumps(raw.columns, ensure_ascii=False, default=str)
