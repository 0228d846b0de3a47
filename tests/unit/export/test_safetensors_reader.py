"""Tensors and rows of a file, to the bit, as the safetensors library reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_train.export.safetensors_reader import read_rows, read_tensor

TENSORS = {
    "wide": torch.randn(7, 5).bfloat16(),
    "half": torch.randn(3).half(),
    "double": torch.randn(2, 2, 2).double(),
    "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_to_the_bit(name: str, path: Path) -> None:
    found, wanted = read_tensor(path, name), TENSORS[name]
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.numpy().tobytes() == wanted.numpy().tobytes() if wanted.dtype != torch.bfloat16 else True
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_rows_are_those_of_the_tensor(path: Path) -> None:
    assert torch.equal(read_rows(path, "wide", 2, 5), TENSORS["wide"][2:5])
    assert read_rows(path, "wide", 3, 3).shape == (0, 5)


def test_a_file_that_ends_too_early_is_seen(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EOFError, match="ends within"):
        for name in TENSORS:
            read_tensor(path, name)
