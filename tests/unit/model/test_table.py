"""The table of dtypes accounts for every tensor of the fingerprint."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora_train.model.table import dtype_table
from qlora_train.quant.fingerprint import BasePrint, TensorPrint
from tests.loading import tiny_base


def test_the_rows_add_up_to_the_fingerprint(tiny_llama_dir: Path) -> None:
    base_print = tiny_base(tiny_llama_dir, dtype=torch.bfloat16, skip_modules=("down_proj",)).print
    rows = dtype_table(base_print)
    tensors = base_print.tensors.values()
    assert {row.kind for row in rows} == {"nf4", "bfloat16"}
    assert sum(row.num_tensors for row in rows) == len(base_print.tensors)
    assert sum(row.num_bytes for row in rows) == sum(entry.num_bytes for entry in tensors)
    assert sum(row.num_params for row in rows) == sum(math.prod(entry.shape) for entry in tensors)
    by_kind = {row.kind: row for row in rows}
    assert by_kind["nf4"].num_tensors == 12 and by_kind["nf4"].num_params == 2 * (2 * 128**2 + 2 * 128 * 64 + 2 * 2**15)
    assert by_kind["bfloat16"].num_bytes == 2 * by_kind["bfloat16"].num_params
    assert set(by_kind["nf4"].names) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert "down_proj" in by_kind["bfloat16"].names and "embed_tokens" in by_kind["bfloat16"].names


def test_the_largest_comes_first_and_names_come_once() -> None:
    def entry(dtype: str, num_bytes: int) -> TensorPrint:
        return TensorPrint("0", (num_bytes,), dtype, num_bytes, False, True)

    tensors = {
        "a.norm.weight": entry("float32", 1),
        "a.q.weight": entry("bfloat16", 5),
        "b.q.weight": entry("bfloat16", 5),
        "b.q.bias": entry("bfloat16", 1),
    }
    rows = dtype_table(BasePrint(tensors, {}))
    assert [(row.kind, row.num_tensors, row.num_params, row.num_bytes) for row in rows] == [
        ("bfloat16", 3, 11, 11),
        ("float32", 1, 1, 1),
    ]
    assert rows[0].names[0] == "q" and len(rows[0].names) == 2 and "bias" in rows[0].names[1]
    assert dtype_table(BasePrint({}, {})) == []
