"""Hold an exported folder against the clients that serve it: `python tools/serve_check.py FOLDER [--run RUN]`.

llama.cpp and vLLM (through their HTTP servers) and transformers, as far as they are installed; what is not is named and
does not pass. vLLM has an environment of its own: --vllm PATH names it. With --run the answers are compared with the
trained model's; without it those of a GGUF file with those of the same weights in float32 by transformers. Files of 8
bits or fewer are held against their own weights: what rounding did to these stands in export.json. Exit code 1 when a
check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.answers import four_bit_greedy, gguf_following, gguf_greedy, original_greedy, trained_greedy
from serving.checks import (
    NO_VLLM,
    Check,
    Served,
    check_llama_cpp,
    check_transformers,
    check_vllm,
    check_vllm_rules,
    quantisation,
    read_golden,
)
from serving.vllm_server import Vllm, find_vllm

from qlora_train.data.parity import Golden

_EXACT_GGUF = ("-F32", "-F16", "-BF16")
_QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def bos_of(path: Path) -> str:
    """What llama.cpp puts in front of every prompt, as text."""
    from gguf import GGUFReader, Keys

    reader = GGUFReader(path)
    adds, number = (reader.get_field(key) for key in (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.BOS_ID))
    if adds is None or number is None or not adds.contents():
        return ""
    tokens = reader.get_field(Keys.Tokenizer.LIST)
    return str(tokens.contents(int(number.contents()))) if tokens is not None else ""


def check_folder(folder: Path, run: Path | None = None, vllm: Vllm | None = None) -> list[Check]:
    """Every check that a folder's files allow."""
    golden = read_golden(folder)
    if files := sorted(folder.glob("model-*.gguf")):
        return [check for file in files for check in _check_gguf(file, run, golden)]
    if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        sys.exit(f"{folder} holds no model-*.gguf, no adapter_config.json and no config.json")
    if run is None:
        sys.exit(f"{folder}: name the run that it comes from (--run): its answers are what these are held against")
    if (folder / "adapter_config.json").is_file():
        return _check_adapter(folder, run, golden, vllm)
    # What 4 bit did to the weights was measured as they were published; here they are to be read as they are.
    greedy = four_bit_greedy(run, folder) if quantisation(folder) else trained_greedy(run)
    checks = check_transformers(folder, golden, greedy)
    return checks + ([NO_VLLM] if vllm is None else check_vllm(vllm, Served(folder), golden, greedy))


def _check_gguf(file: Path, run: Path | None, golden: Sequence[Golden]) -> list[Check]:
    if not file.stem.endswith(_EXACT_GGUF):
        return check_llama_cpp(file, golden, None, bos=bos_of(file), following=gguf_following(file))
    greedy = trained_greedy(run) if run else gguf_greedy(file)
    return check_llama_cpp(file, golden, greedy, bos=bos_of(file))


def _check_adapter(folder: Path, run: Path, golden: Sequence[Golden], vllm: Vllm | None) -> list[Check]:
    """The rules, and the adapter on the base's original weights, which are what a server has."""
    from qlora_train.model.skeleton import build_skeleton, linear_layers, load_config
    from qlora_train.model.trained import open_run

    source = open_run(run).source()
    checks = check_vllm_rules(folder, list(linear_layers(build_skeleton(load_config(source)))), vllm)
    if vllm is None:
        return [*checks, NO_VLLM]
    return checks + check_vllm(vllm, Served(source.folder, folder), golden, original_greedy(run))


def main() -> int:
    """Print a line for each check; 1 when one failed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, help="the run folder, whose trained model the answers are compared with")
    parser.add_argument(
        "--vllm", type=Path, help="vLLM's environment, its python or its vllm; else that of the vllm on PATH"
    )
    arguments = parser.parse_args()
    vllm = find_vllm(arguments.vllm)
    if arguments.vllm is not None and vllm is None:
        parser.error(f"--vllm {arguments.vllm}: no environment that vLLM is installed in")
    checks = check_folder(arguments.folder, arguments.run, vllm)
    for check in checks:
        verdict = "skipped" if check.skipped else "ok" if check.ok else "FAILED"
        note = f" ({check.note})" if check.note else ""
        print(f"{verdict:<8} {check.client:<13} {check.what}: {check.equal} of {check.of}{note}")
    return int(any(not check.ok and not check.skipped for check in checks))


if __name__ == "__main__":
    sys.exit(main())
