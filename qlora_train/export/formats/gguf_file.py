"""GGUF files, written as a stream and read back: a whole model for llama.cpp, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    Keys,
    LlamaFileType,
    quant_shape_to_byte_shape,
    quants,
)
from torch import Tensor

from qlora_train.artifacts.files import explained
from qlora_train.errors import ModelError
from qlora_train.export.formats.families import Layout, Value, extra_tensors, hyperparameters
from qlora_train.export.formats.vocabulary import Vocabulary, general_name
from qlora_train.export.licence import Licence

FILE_TYPES = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
IN_BLOCKS = ("Q8_0", "Q4_1")
BLOCK = 32  # of these
VOCABULARIES = frozenset({"token_embd.weight", "output.weight"})


class GgufModelWriter:
    """A model file: `add` every parameter in the order of `shapes`, then `close`. Holds one tensor at a time.

    Vectors (norms, biases) stay float32, as llama.cpp's own converter has it. `digests` keeps the SHA-256 of each
    parameter's rounded values, in the order of transformers and before they are laid out, for `GgufModel.unequal`.
    """

    def __init__(
        self,
        path: Path,
        config: Any,
        vocabulary: Vocabulary,
        shapes: Mapping[str, Sequence[int]],
        *,
        file_type: str,
        name: str,
        licence: Licence | None = None,
    ) -> None:
        self.layout = Layout(config)
        self.digests: dict[str, str] = {}
        self.notices = list(vocabulary.notices)
        self._path = path
        self._wide, file_type_id = FILE_TYPES[file_type]
        self._waiting = [
            (parameter, self.layout.name(parameter), self._kind(self.layout.name(parameter), shape))
            for parameter, shape in shapes.items()
        ]
        self._writer = GGUFWriter(None, self.layout.family.name)
        self._extra = extra_tensors(config)
        keys, notices = hyperparameters(config)
        self.notices += notices
        self._writer.add_type("model")
        self._writer.add_name(general_name(name, strips_right=vocabulary.strips_right))
        if licence is not None:
            _add_licence(self._writer, licence)
        self._writer.add_file_type(file_type_id)
        self._writer.add_quantization_version(GGML_QUANT_VERSION)
        add_values(self._writer, keys)
        _add_vocabulary(self._writer, vocabulary)
        # The frequencies' factors are few and come first.
        for tensor_name, values in self._extra.items():
            _plan(self._writer, tensor_name, values.shape, GGMLQuantizationType.F32)
        for (_, tensor_name, kind), shape in zip(self._waiting, shapes.values(), strict=True):
            _plan(self._writer, tensor_name, shape, kind)
        with explained(path):
            start_data(self._writer, path)
            for values in self._extra.values():
                self._writer.write_tensor_data(values.numpy())

    def _kind(self, name: str, shape: Sequence[int]) -> GGMLQuantizationType:
        if len(shape) < 2:
            return GGMLQuantizationType.F32
        in_blocks = self._wide.name in IN_BLOCKS
        # Four bits are for what an INT4 base has them for: the linear layers, whose steps and lowest values these are.
        if (in_blocks and shape[-1] % BLOCK) or (self._wide == GGMLQuantizationType.Q4_1 and name in VOCABULARIES):
            return GGMLQuantizationType.F16
        return self._wide

    def add(self, parameter: str, values: Tensor) -> None:
        """Write the next parameter, given in float32. ModelError for values that the type cannot hold."""
        expected, _, kind = self._waiting.pop(0)
        assert parameter == expected, (parameter, expected)
        shift = self.layout.shift(parameter)
        shifted = (values + shift).cpu().numpy()
        with np.errstate(over="ignore"):
            stored = quants.quantize(shifted, kind)
        rounded = quants.dequantize(stored, kind)
        if not np.isfinite(rounded).all():
            raise ModelError(
                f"{parameter}: values up to {np.abs(shifted).max():.3g} do not fit {kind.name}",
                fix="use --format gguf-bf16",
            )
        self.digests[parameter] = _digest(rounded - np.float32(shift))
        # Rows are quantised one by one: they may change places afterwards.
        laid_out = self.layout.to_file(parameter, torch.from_numpy(stored)).numpy()
        with explained(self._path):
            self._writer.write_tensor_data(laid_out)

    def close(self) -> None:
        """Finish the file."""
        assert not self._waiting, f"not written: {self._waiting[0][0]}"
        with explained(self._path):
            self._writer.flush()
            self._writer.close()


class GgufModel:
    """A model file as the gguf package reads it: parameters by transformers' names, in float32."""

    def __init__(self, path: Path, config: Any) -> None:
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._layout = Layout(config)

    def __getitem__(self, parameter: str) -> Tensor:
        """The values that this parameter has in the file, as transformers computes with them."""
        stored = self._stored(self._layout.name(parameter))
        return self._layout.to_model(parameter, stored) - self._layout.shift(parameter)

    def rows(self, parameter: str, start: int, stop: int) -> Tensor:
        """Some rows. Those of an embedding or a head lie there as in transformers: no others are dequantised."""
        name = self._layout.name(parameter)
        return self._stored(name, slice(start, stop)) if name in VOCABULARIES else self[parameter][start:stop]

    def shares(self) -> dict[str, float]:
        """The share of the matrices' weights that has each type, the most used first."""
        counts: Counter[str] = Counter()
        for tensor in self._tensors.values():
            if len(tensor.shape) > 1:
                counts[tensor.tensor_type.name] += int(tensor.n_elements)
        return {kind: count / counts.total() for kind, count in counts.most_common()}

    def unequal(self, digests: Mapping[str, str]) -> list[str]:
        """Parameters that are not to the bit what was to be written, and tensors that belong to none."""
        known = {self._layout.name(parameter) for parameter in digests} | extra_tensors(self._layout.config).keys()
        wrong = [parameter for parameter, digest in digests.items() if _digest(self[parameter].numpy()) != digest]
        return sorted(wrong) + sorted(self._tensors.keys() - known)

    def _stored(self, name: str, rows: slice = slice(None)) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"{self._reader.data.filename} lacks the tensor {name}", fix="export again")
        tensor = self._tensors[name]
        values = quants.dequantize(np.array(tensor.data[rows]), tensor.tensor_type)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def add_values(writer: GGUFWriter, keys: Mapping[str, Value]) -> None:
    """Add keys, each with the type of its value."""
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def start_data(writer: GGUFWriter, path: Path) -> None:
    """Write everything that stands before the tensors' data."""
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _plan(writer: GGUFWriter, name: str, shape: Sequence[int], kind: GGMLQuantizationType) -> None:
    num_bytes = int(np.prod(quant_shape_to_byte_shape(tuple(shape), kind)))
    writer.add_tensor_info(name, tuple(shape), np.dtype(np.float32), num_bytes, raw_dtype=kind)


def _add_licence(writer: GGUFWriter, licence: Licence) -> None:
    """The file travels without its card."""
    if licence.name is not None:
        writer.add_license(licence.name)
    if licence.own_name is not None:
        writer.add_license_name(licence.own_name)
    if licence.link is not None:
        writer.add_license_link(licence.link)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_bool(Keys.Tokenizer.ADD_PREFIX, vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _digest(values: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype=np.float32).tobytes()).hexdigest()
