"""config.json and generation_config.json of a served model: the base's own, with what this export changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_train.model.load import with_end_tokens
from qlora_train.model.low_rank import RANKS
from qlora_train.model.source import Source

_OF_THE_BASE = ("torch_dtype", "_name_or_path", "auto_map", "transformers_weights", RANKS)


def generation_settings(source: Source, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """The base's generation config, which stops at the ends that were trained too."""
    path = source.folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    configured = settings.get("eos_token_id", _config(source).get("eos_token_id"))
    ends = with_end_tokens(configured, end_token_ids)
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return settings


def write_configs(
    folder: Path,
    source: Source,
    end_token_ids: Sequence[int],
    dtype: str,
    quantisation: dict[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
) -> None:
    """Both files; `quantisation` is transformers' `quantization_config`, `vocab_size` what new tokens made of it."""
    config = {key: value for key, value in _config(source).items() if key not in _OF_THE_BASE}
    config["dtype"] = dtype
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if quantisation is not None:
        config["quantization_config"] = quantisation
    generation = generation_settings(source, end_token_ids)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(source: Source) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return config
