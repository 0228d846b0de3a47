"""The answers that a served model is held against: of the weights that it was written from, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.checks import Following, Greedy, transformers_following, transformers_greedy


def trained_greedy(run: Path) -> Greedy:
    """Of the model that was trained: base as trained and update, added in float32, in dense layers."""
    return _greedy(run, "dequantized")


def original_greedy(run: Path) -> Greedy:
    """Of the adapter on the base's original weights, as a server has them that is given both."""
    return _greedy(run, "original")


def four_bit_greedy(run: Path, folder: Path) -> Greedy:
    """Of a folder's 4-bit weights, as the format says that they are read: what rounding did to them is in both."""
    return _greedy(run, "dequantized", folder)


def gguf_greedy(path: Path) -> Greedy:
    """Of a GGUF file's weights by transformers' own reader of such files."""
    return transformers_greedy(_gguf_model(path))


def gguf_following(path: Path) -> Following:
    """What the same weights expect next."""
    return transformers_following(_gguf_model(path))


def _gguf_model(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    place: dict[str, Any] = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **place).eval()


def _greedy(run: Path, onto: Any, four_bit: Path | None = None) -> Greedy:
    import torch

    from qlora_train.artifacts.files import read_json
    from qlora_train.export.formats.readers import FourBitFolder
    from qlora_train.export.layers import CandidateWeights, Weights, fill_whole
    from qlora_train.export.tensors import MergedTensors
    from qlora_train.model.hollow import build_hollow
    from qlora_train.model.load import add_end_tokens
    from qlora_train.model.trained import open_run

    finished = open_run(run)
    source = finished.source()
    model = build_hollow(finished.config(source), torch.device("cpu"))
    tensors = MergedTensors(finished, source, onto)
    weights: Weights = CandidateWeights(tensors, torch.float32)
    if four_bit is not None:
        weights = FourBitFolder(four_bit, tensors.stored_names)
    fill_whole(model, weights)
    add_end_tokens(model, read_json(finished.run_dir.data)["end_token_ids"])
    model.config.use_cache = True
    return transformers_greedy(model)
