"""Files that the safetensors library reads back to the bit, cut where they were planned to be."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_train.export.safetensors_writer import Planned, plan_shards, write_shards

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensors() -> dict[str, torch.Tensor]:
    """All dtypes, odd sizes, a scalar, an empty one, a transposed one, and names that JSON must escape."""
    found = {f"layer.{i}.weight": torch.randn(3 + i, 5).to(dtype) for i, dtype in enumerate(DTYPES)}
    found["scalar"] = torch.tensor(2.5)
    found["empty"] = torch.zeros(0, 4)
    found["transposed"] = torch.randn(4, 6).t()
    found['quoted"é'] = torch.randn(7).bfloat16()
    found["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return found


def planned(values: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(name, tuple(value.shape), value.dtype) for name, value in values.items()]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    views = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*views)


def test_one_file_is_read_back_to_the_bit(tmp_path: Path) -> None:
    values = tensors()
    paths = write_shards(tmp_path, [planned(values)], values.__getitem__)
    assert paths == [tmp_path / "model.safetensors"] and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(paths[0])
    assert found.keys() == values.keys()
    assert all(same_bits(found[name], values[name]) for name in values)
    with safe_open(paths[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", range(1, 10))
def test_the_header_is_padded_to_eight_bytes(length: int, tmp_path: Path) -> None:
    name = "n" * length
    (path,) = write_shards(tmp_path, [[Planned(name, (3,), torch.bfloat16)]], lambda _: torch.ones(3).bfloat16())
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0 and len(content) == 8 + size + 6
    assert json.loads(content[8 : 8 + size])[name] == {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}


def names(shards: list[list[Planned]]) -> list[list[str]]:
    return [[tensor.name for tensor in shard] for shard in shards]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4, 4, 4], 8, [["0", "1"], ["2", "3"]]),
        ([4, 4, 4, 4], 11, [["0", "1"], ["2", "3"]]),
        ([4, 4, 4, 4], 16, [["0", "1", "2", "3"]]),
        ([4, 4, 4, 4], 4, [["0"], ["1"], ["2"], ["3"]]),
        ([4, 40, 4, 4], 8, [["0"], ["1"], ["2", "3"]]),
        ([40, 4], 8, [["0"], ["1"]]),
        ([4, 40], 8, [["0"], ["1"]]),
        ([40], 1, [["0"]]),
        ([], 8, [[]]),
    ],
)
def test_shards_are_cut_in_order_and_never_over_their_limit(
    sizes: list[int], limit: int, expected: list[list[str]]
) -> None:
    plan = [Planned(str(i), (size // 4,), torch.float32) for i, size in enumerate(sizes)]
    assert names(plan_shards(plan, limit)) == expected


def test_several_files_and_their_index(tmp_path: Path) -> None:
    values = {f"t{i}": torch.randn(4, 4) for i in range(5)}  # 64 bytes each
    asked: list[str] = []

    def produce(name: str) -> torch.Tensor:
        asked.append(name)
        return values[name]

    paths = write_shards(tmp_path, plan_shards(planned(values), 128), produce)
    assert [p.name for p in paths] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert asked == list(values), "each tensor once, in order"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 64}
    assert list(index["weight_map"]) == list(values)
    for name, file in index["weight_map"].items():
        assert same_bits(load_file(tmp_path / file)[name], values[name])
    assert sum(len(load_file(path)) for path in paths) == 5


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 3), torch.ones(6), torch.ones(3, 2).bfloat16(), torch.ones(3, 2).double()], ids=str
)
def test_a_tensor_that_was_not_planned_so_is_refused(wrong: torch.Tensor, tmp_path: Path) -> None:
    plan = [[Planned("right", (3, 2), torch.float32), Planned("wrong", (3, 2), torch.float32)]]
    with pytest.raises(ValueError, match="wrong: planned"):
        write_shards(tmp_path, plan, {"right": torch.ones(3, 2), "wrong": wrong}.__getitem__)
