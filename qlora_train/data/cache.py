"""Tables of tokens kept between runs, by everything that decides what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qlora_train.artifacts import cache_dir, manifest_faults, publishing, retire
from qlora_train.data.build import FACTS, FAULTS, TOKENS, Facts, Reading, build
from qlora_train.data.sources.base import Source
from qlora_train.data.table import Encode, TokenTable
from qlora_train.environment import code_sha256, versions
from qlora_train.errors import MachineError

LIMIT_ENVIRONMENT, DEFAULT_LIMIT_GIB = "QLORA_TRAIN_CACHE_GIB", 50.0
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow")


@dataclass(frozen=True, eq=False)
class CachedSource:
    """One source's folder in the cache. Everything in it verified against its manifest when it was opened."""

    source: Source
    reading: Reading
    folder: Path
    facts: Facts

    def table(self, encode: Encode | None = None) -> TokenTable:
        """The tokens of its rows, memory-mapped."""
        with pa.memory_map(str(self.folder / TOKENS)) as file:
            table = pa.ipc.open_file(file).read_all()
        return TokenTable(table, [self.source.place], self.facts.digest, encode=encode)

    def faults(self) -> Iterator[dict[str, Any]]:
        """Rows that did not become tokens: number, kind, what, fix, num_tokens, row."""
        with (self.folder / FAULTS).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns a row into ids: vocabulary, normalisation, special tokens, chat template."""
    backend = tokenizer.backend_tokenizer.to_str()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([backend, tokenizer.chat_template, named]).encode()).hexdigest()


def cached(source: Source, reading: Reading, tokenizer: PreTrainedTokenizerBase) -> CachedSource:
    """The source's table, from the cache where its content, tokenizer, template, reading and our code are the same."""
    library_versions = versions()
    parts = [
        source.digest(),
        asdict(reading),
        tokenizer_fingerprint(tokenizer),
        code_sha256("data"),
        [library_versions[name] for name in _LIBRARIES],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = cache_dir() / "data" / key[:32]
    if folder.is_dir() and manifest_faults(folder):
        retire(folder)  # a disk fault, or a hand in the cache: make it again
    if not folder.is_dir():
        try:
            with publishing(folder, manifest={"source": source.name}) as temporary:
                build(source, reading, tokenizer, temporary)
        except MachineError:
            if not folder.is_dir():  # else another process published the same folder first
                raise
        _shrink(folder.parent, keep={folder})
    os.utime(folder)
    return CachedSource(source, reading, folder, Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8"))))


def _shrink(parent: Path, keep: Collection[Path]) -> None:
    """Remove the folders that were not used for longest until the cache is below its limit."""
    limit = float(os.environ.get(LIMIT_ENVIRONMENT, DEFAULT_LIMIT_GIB)) * 2**30
    folders = sorted((p for p in parent.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: -p.stat().st_mtime)
    num_bytes = 0.0
    for folder in folders:
        num_bytes += sum(path.stat().st_size for path in folder.iterdir())
        if num_bytes > limit and folder not in keep:
            retire(folder)
