"""Hold an exported folder against the clients that serve it: `python tools/serve_check.py FOLDER [--run RUN]`.

llama.cpp (through its HTTP server), transformers and vLLM, as far as they are installed; what is not is named and does
not pass. With --run the answers are compared with the trained model's; else with those of the same weights in float32
by transformers. Exit code 1 when a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from serving.checks import (
    Check,
    Greedy,
    check_llama_cpp,
    check_transformers,
    check_vllm,
    read_golden,
    transformers_greedy,
)

_QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def trained_greedy(run: Path) -> Greedy:
    """Answers of the model that was trained: base as trained and update, added in float32, in dense layers."""
    import torch

    from qlora_train.artifacts.files import read_json
    from qlora_train.export.layers import CandidateWeights, fill_whole
    from qlora_train.export.tensors import MergedTensors
    from qlora_train.model.hollow import build_hollow
    from qlora_train.model.load import add_end_tokens
    from qlora_train.model.skeleton import load_config
    from qlora_train.model.trained import open_run

    finished = open_run(run)
    source = finished.source()
    model = build_hollow(load_config(source), torch.device("cpu"))
    fill_whole(model, CandidateWeights(MergedTensors(finished, source), torch.float32))
    add_end_tokens(model, read_json(finished.run_dir.data)["end_token_ids"])
    model.config.use_cache = True
    return transformers_greedy(model)


def gguf_greedy(path: Path) -> Greedy:
    """Answers of a GGUF file's weights by transformers' own reader of such files, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    place: dict[str, Any] = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **place)
    return transformers_greedy(model.eval())


def bos_of(path: Path) -> str:
    """What llama.cpp puts in front of every prompt, as text."""
    from gguf import GGUFReader, Keys

    reader = GGUFReader(path)
    adds, number = (reader.get_field(key) for key in (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.BOS_ID))
    if adds is None or number is None or not adds.contents():
        return ""
    tokens = reader.get_field(Keys.Tokenizer.LIST)
    return str(tokens.contents(int(number.contents()))) if tokens is not None else ""


def check_folder(folder: Path, run: Path | None = None) -> list[Check]:
    """Every check that a folder's files allow."""
    golden = read_golden(folder)
    if files := sorted(folder.glob("model-*.gguf")):
        greedy = trained_greedy(run) if run else gguf_greedy(files[0])
        return [check for file in files for check in check_llama_cpp(file, golden, greedy, bos=bos_of(file))]
    if (folder / "adapter_config.json").is_file():
        return check_vllm(folder, _linear_names(run, folder))
    if (folder / "config.json").is_file():
        if run is None:
            sys.exit(f"{folder}: name the run that it comes from (--run): its answers are what these are held against")
        return check_transformers(folder, golden, trained_greedy(run))
    sys.exit(f"{folder} holds no model-*.gguf, no adapter_config.json and no config.json")


def _linear_names(run: Path | None, folder: Path) -> list[str]:
    """Layers of the model; without a run those that adapters usually name."""
    from qlora_train.model.skeleton import build_skeleton, linear_layers, load_config
    from qlora_train.model.trained import open_run

    if run is None:
        sys.exit(f"{folder} is an adapter: name the run that it comes from (--run)")
    return list(linear_layers(build_skeleton(load_config(open_run(run).source()))))


def main() -> int:
    """Print a line for each check; 1 when one failed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, help="the run folder, whose trained model the answers are compared with")
    arguments = parser.parse_args()
    checks = check_folder(arguments.folder, arguments.run)
    for check in checks:
        verdict = "skipped" if check.skipped else "ok" if check.ok else "FAILED"
        note = f" ({check.note})" if check.note else ""
        print(f"{verdict:<8} {check.client:<13} {check.what}: {check.equal} of {check.of}{note}")
    return int(any(not check.ok and not check.skipped for check in checks))


if __name__ == "__main__":
    sys.exit(main())
