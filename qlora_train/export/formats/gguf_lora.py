"""The adapter alone as a GGUF file: what `llama-server --lora` puts on a base in GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFWriter, Keys, LlamaFileType
from torch import Tensor

from qlora_train.adapters.fold import Delta, read_deltas
from qlora_train.artifacts.files import explained
from qlora_train.errors import ModelError
from qlora_train.export.formats.families import Layout
from qlora_train.export.formats.gguf_file import start_data
from qlora_train.export.formats.lora import folded, served_rank

_HALVES = ("lora_a", "lora_b")


def write_gguf_lora(path: Path, adapter: Path, config: Any, name: str) -> int:
    """Write the adapter of a run in float32; its rank.

    For a weight NAME the file holds `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r), and llama.cpp adds
    alpha / r * B A (src/llama-adapter.cpp); alpha is r here. Rows of B go where the rows of the weight go.
    """
    deltas = read_deltas(adapter)
    rank, layout = served_rank(deltas), Layout(config)
    writer = GGUFWriter(None, layout.family.name)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    tensors: list[np.ndarray[Any, Any]] = []
    for parameter, delta in deltas.items():
        lora_A, lora_B = folded(delta, rank)
        for half, values in zip(_HALVES, (lora_A, layout.to_file(parameter, lora_B)), strict=True):
            array = values.contiguous().numpy()
            writer.add_tensor_info(f"{layout.name(parameter)}.{half}", array.shape, array.dtype, array.nbytes)
            tensors.append(array)
    with explained(path):
        start_data(writer, path)
        for array in tensors:
            writer.write_tensor_data(array)
        writer.flush()
        writer.close()
    return rank


def read_gguf_lora(path: Path, config: Any, parameters: list[str]) -> dict[str, Delta]:
    """The updates that a GGUF adapter makes, by transformers' parameter names, as llama.cpp computes them.

    ModelError for tensors that belong to none of `parameters`.
    """
    reader, layout = GGUFReader(path), Layout(config)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    alpha_field = reader.get_field(Keys.Adapter.LORA_ALPHA)
    if alpha_field is None:
        raise ModelError(f"{path} names no alpha", fix="export again")
    alpha = float(alpha_field.contents())
    deltas = {}
    for parameter in parameters:
        names = [f"{layout.name(parameter)}.{half}" for half in _HALVES]
        if not all(name in found for name in names):
            continue
        lora_A, lora_B = (_tensor(found.pop(name)) for name in names)
        rank = lora_A.shape[0]
        deltas[parameter] = Delta(lora_A, layout.to_model(parameter, lora_B), alpha / rank)
    if found:
        raise ModelError(
            f"{path} holds {len(found)} tensors of no known weight, first {min(found)}", fix="export again"
        )
    return deltas


def _tensor(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
