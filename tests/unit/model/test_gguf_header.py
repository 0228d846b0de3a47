"""A GGUF file that contradicts itself is refused before any library allocates what it asks for."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from qlora_train.errors import ModelError
from qlora_train.model.gguf_header import check_gguf
from tests.unit.model.ggufs import KEYS, TENSORS, gguf_bytes, key, tensor, text

HUGE = struct.pack("<Q", 2**62)


def test_sound_files_pass(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (gguf_bytes(), gguf_bytes(version=2), gguf_bytes(keys=KEYS[:1])):
        path.write_bytes(content)
        check_gguf(path)


def test_what_the_library_writes_passes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_token_list(["a", "é", "<|end|>"])
    writer.add_token_scores([0.0, 1.0, -1.0])
    writer.add_tensor("token_embd.weight", np.ones((4, 64), dtype=np.float32))
    writer.add_tensor(
        "blk.0.attn_q.weight", np.zeros((4, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(tmp_path / "x.gguf")


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "shorter than any"),
    "not GGUF": (gguf_bytes(magic=b"GGML"), "does not start with GGUF"),
    "of tomorrow": (gguf_bytes(version=4), "its version is 4"),
    "big-endian": (gguf_bytes(version=3 << 24), "its version is 50331648"),
    "keys without end": (gguf_bytes(counts=(2, 2**60)), "1,152,921,504,606,846,976 keys"),
    "tensors without end": (gguf_bytes(counts=(2**60, 5)), "more than any model"),
    "more keys than there are": (gguf_bytes(counts=(2, 9)), "could not be read as GGUF"),
    "a name beyond the file": (gguf_bytes(keys=(HUGE + b"a",)), "a string of 4,611,686,018,427,387,904 bytes"),
    "a value beyond the file": (gguf_bytes(keys=(key("a", 8, HUGE),)), "which are not there"),
    "a list beyond the file": (gguf_bytes(keys=(key("a", 9, struct.pack("<I", 4) + HUGE),)), "which are not there"),
    "strings beyond the file": (gguf_bytes(keys=(key("a", 9, struct.pack("<I", 8) + HUGE),)), "which are not there"),
    "a list of lists": (gguf_bytes(keys=(key("a", 9, struct.pack("<IQ", 9, 1) + bytes(12)),)), "type 9"),
    "an unknown type": (gguf_bytes(keys=(key("a", 99, bytes(8)),)), "type 99"),
    "an odd alignment": (gguf_bytes(keys=(key("general.alignment", 4, bytes(4)),)), "its alignment is 0"),
    "a tensor of many dimensions": (gguf_bytes(tensors=(tensor("a", (1,) * 5),)), "has 5 dimensions"),
    "a tensor twice": (gguf_bytes(tensors=(TENSORS[0], TENSORS[0])), "'a.weight' is there twice"),
    "a tensor of no type": (gguf_bytes(tensors=(tensor("a", (1,), kind=77),)), "is of type 77"),
    "a tensor of half a block": (gguf_bytes(tensors=(tensor("a", (33,), kind=2),)), "no multiple of 32"),
    "a tensor beyond the file": (gguf_bytes(tensors=(tensor("a", (2**40,)),)), "of 96"),
    "a tensor whose size overflows": (gguf_bytes(tensors=(tensor("a", (2**33, 2**33)),)), "of 96"),
    "a tensor out of line": (gguf_bytes(tensors=(tensor("a", (1,), start=4),)), "bytes 4 to 8"),
    "tensors in one place": (gguf_bytes(tensors=(tensor("a", (16,)), tensor("b", (16,)))), "after one that ends at 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    content, words = BAD[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(words)):
        check_gguf(path)


def test_names_are_shown_as_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(tensors=(text(b"\x1b\xff") + struct.pack("<IIQ", 0, 77, 0),)))
    with pytest.raises(ModelError, match=r"'\\x1b\ufffd' is of type 77"):
        check_gguf(path)
