"""Account for and pack generated chat rows in a process of its own: seconds, tokens and the most memory, as JSON.

`python tools/proofs/data_scale.py ROWS FOLDER [--near]`: writes the rows into FOLDER if they are not there, and keeps
the cache of tokens there too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

SEQ_LEN = 2048
ROOT = Path(__file__).resolve().parent.parent.parent


def write_rows(path: Path, num_rows: int) -> None:
    """Conversations of 13 to 80 words out of the Jargon File: 82 tokens on average with the template."""
    rng = random.Random(0)
    text = (ROOT / "recipes" / "data" / "text_jargon" / "train.jsonl").read_text(encoding="utf-8")
    words = [word for word in text[:400_000].split() if word.isalpha()]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            question = " ".join(rng.choices(words, k=rng.randint(8, 40)))
            answer = " ".join(rng.choices(words, k=rng.randint(5, 40)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


class Memory:
    """The most memory that this process and its children held together, looked at ten times a second.

    Pages that several of them share are counted once (PSS): a child is its parent's copy until it has started.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Stop looking; the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak_bytes

    def _watch(self) -> None:
        import psutil

        own = psutil.Process(os.getpid())
        while not self._stop.wait(0.1):
            total = own.memory_full_info().pss
            for child in own.children(recursive=True):
                try:
                    total += child.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def measure(path: Path, *, near: bool) -> dict[str, Any]:
    """Read, render, tokenise, audit, write and pack the rows; then, if asked, look for near-duplicates."""
    from qlora_train.data.duplicates import near_duplicates
    from qlora_train.data.loader import Loader
    from qlora_train.data.split import load_split
    from qlora_train.model.skeleton import load_tokenizer
    from qlora_train.model.source import resolve_source
    from qlora_train.recipe.load import load_recipe
    from qlora_train.recipe.schema import DataSection, SourceSection

    model = load_recipe(ROOT / "recipes" / "quickstart.yaml").recipe.model
    tokenizer = load_tokenizer(resolve_source(model, weights=False), None)
    os.environ["QLORA_TRAIN_CACHE"] = str(path.parent / "cache")  # the model is found by now
    memory, started = Memory(), time.perf_counter()
    split = load_split(DataSection(train=(SourceSection(path=str(path)),), seq_len=SEQ_LEN), "train", tokenizer, 0)
    audit = split.audit
    loader = Loader(split.table, "packed", 1, 1, tokenizer.pad_token_id, 0, seq_len=SEQ_LEN)
    num_packs = loader.num_lines(0)
    wall_s = time.perf_counter() - started
    found: dict[str, Any] = {
        "num_rows": audit.num_rows,
        "num_tokens": audit.num_tokens,
        "wall_s": wall_s,
        "unfilled_frac": 1 - audit.num_tokens / (num_packs * SEQ_LEN),
    }
    if near:
        started = time.perf_counter()
        near_duplicates(split.table)
        found["near_s"] = time.perf_counter() - started
    return found | {"peak_bytes": memory.close()}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--near", action="store_true")
    arguments = parser.parse_args()
    path = arguments.folder / f"rows-{arguments.rows}.jsonl"
    if not path.is_file():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_rows(path, arguments.rows)
    print(json.dumps(measure(path, near=arguments.near)))


if __name__ == "__main__":
    main()
