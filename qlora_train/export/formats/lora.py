"""The adapter as plain LoRA that every server takes: one rank for all modules, alpha = r, scaling folded into B."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from qlora_train.adapters.fold import Delta, read_deltas
from qlora_train.adapters.state import CONFIG, WEIGHTS
from qlora_train.artifacts.files import explained
from qlora_train.errors import ModelError
from qlora_train.names import PEFT_PREFIX
from qlora_train.untrusted import read_header, read_json_object

# What vLLM takes for --max-lora-rank (vllm/config/lora.py, MaxLoRARanks), but for 1, which is no rank to pad to.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Fields of PEFT's config for which vLLM has no code (vllm/lora/peft_helper.py, _validate_features).
_UNSET_FOR_VLLM = (
    *("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora"),
    "use_qalora",
)
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # others change the base's weights as PEFT loads


def served_rank(deltas: Mapping[str, Delta]) -> int:
    """The smallest rank that servers take and every update fits into. ModelError above the largest of them."""
    needed = max(delta.lora_A.shape[0] for delta in deltas.values())
    for rank in SERVED_RANKS:
        if rank >= needed:
            return rank
    raise ModelError(
        f"the adapter has rank {needed}, servers take at most {SERVED_RANKS[-1]}",
        fix=f"qlora-train adapter resize RUN OUT --rank {SERVED_RANKS[-1]}, or export the merged model",
    )


def folded(delta: Delta, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (rank, in) and lora_B (out, rank) in float32 whose product is the update, scaling included.

    Zeros fill up the rank: they add nothing. Where the scaling is a power of two, the product is the same to the bit.
    """
    pad = rank - delta.lora_A.shape[0]
    lora_A, lora_B = delta.lora_A.float(), delta.lora_B.float() * delta.scaling
    return torch.nn.functional.pad(lora_A, (0, 0, 0, pad)), torch.nn.functional.pad(lora_B, (0, pad))


def write_lora(folder: Path, adapter: Path, linear_names: Collection[str], base: str) -> int:
    """Write the adapter of a run as plain LoRA in PEFT's format; its rank.

    `linear_names` are the model's linear layers: where all of a name are adapted, the config says the name alone, which
    is what some servers can read; else it lists the layers. Raises ModelError for a method that is no such product.
    """
    deltas = read_deltas(adapter)
    rank = served_rank(deltas)
    tensors = {}
    for name, delta in deltas.items():
        module = PEFT_PREFIX + name.removesuffix(".weight")
        lora_A, lora_B = folded(delta, rank)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = (
            lora_A.contiguous(),
            lora_B.contiguous(),
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets({name.removesuffix(".weight") for name in deltas}, linear_names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with explained(folder / WEIGHTS):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    _keep_plain(folder / CONFIG)
    return rank


def _targets(modules: Collection[str], linear_names: Collection[str]) -> list[str]:
    last_names = {module.rpartition(".")[2] for module in modules}
    alike = {name for name in linear_names if name.rpartition(".")[2] in last_names}
    return sorted(last_names if alike == set(modules) else modules)


def _keep_plain(path: Path) -> None:
    """Only the fields that plain LoRA has: what a server does not know, it may refuse."""
    kept = (
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
        *("bias", "use_rslora", "use_dora", "modules_to_save", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    plain = {name: config[name] for name in kept if name in config}
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def vllm_problems(folder: Path, linear_names: Collection[str], max_lora_rank: int = SERVED_RANKS[-1]) -> list[str]:
    """Why vLLM would not load an adapter folder; empty if it would.

    After vLLM 0.32, vllm/lora/peft_helper.py (fields), utils.py (names of tensors) and lora_model.py (modules of the
    model); tests/e2e/test_vllm.py asks vLLM itself. Reads JSON and a header.
    """
    config = read_json_object(folder / CONFIG)
    problems = []
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        problems.append(f"{CONFIG} lacks {', '.join(sorted(missing))}")
    problems += [f"{name} is {config[name]}, must be unset" for name in _UNSET_FOR_VLLM if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']}, must be none")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        problems.append(f"init_lora_weights is {start}: PEFT changes the base's weights for it, and vLLM does not")
    if config.get("r", 1) <= 0:
        problems.append(f"rank {config['r']} is none")
    if config.get("r", 0) > max_lora_rank:
        problems.append(f"rank {config['r']} is above --max-lora-rank {max_lora_rank}")
    known = {name.rpartition(".")[2] for name in linear_names} | {"lm_head", "embed_tokens"}
    for name in sorted(read_header(folder / WEIGHTS)):
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if not name.startswith(PEFT_PREFIX) or not name.endswith(".weight") or half not in ("lora_A", "lora_B"):
            problems.append(f"{name} is no LoRA weight")
        elif module.rpartition(".")[2] not in known:
            problems.append(f"{module} is no layer of the model")
    return problems
